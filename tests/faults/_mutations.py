"""What a stranger may do to a file: bytes changed, JSON values replaced, opcodes inserted, archives rebuilt.

Every function takes a random generator and an original, and depends on nothing else.
"""

from __future__ import annotations

import io
import json
import pickletools
import random
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# where a path must not lead; the sandbox puts links of these names into the folder
NAMES = (
    "../canary.safetensors", "..\\canary.safetensors", "@CANARY@", "/etc/passwd", "//etc/passwd", "C:\\x.safetensors",
    "C:x.safetensors", "\\\\host\\share\\x.bin", "file:///etc/passwd", "~/x.bin", "./model.safetensors",
    "x/../../canary.safetensors", "link.safetensors", "linkdir/model.safetensors", "loop.safetensors", "pipe.safetensors",
    "absolute.bin", "link.pdparams", "model.safetensors/", "model.safetensors/x.safetensors", "config.json", "model.gguf",
    "x.py", "", ".", "..", "NUL", "a\0b.bin", "a\nb.safetensors", "\x1b[31mred", "\u202etxt", "\ud800", "x" * 300,
    "x" * 5000 + ".bin", "²", "1²3", "model.layers.².x", "model.layers." + "9" * 5000 + ".x", "model.layers.00.mlp.gate.weight",
    "model.layers.\uff11.mlp.gate.weight", "{layer}", "%s%n", "ernie.mtp_block.9999.mlp.down_proj.weight",
    "model.mtp_emb_norm.9999.weight", "x.shared_experts.y", "a.qkv_proj.b", "model.qkv_proj.", "ernie.",
    "vision_model.blocks.0.norm1.weight", "model.vision_model.ln.weight", "__metadata__", "lm_head.weight", "w@@.0",
    "UnpackBigParamInfor@@", "StructuredToParameterName@@", "weight_packed", "x.weight_scale", "constructor", "\ud83d\ude00",
    "😀", "_orig_mod.model.norm.weight", "model._orig_mod.norm.weight", "module.", "module.module.module",
    "model.model.norm.weight", "base_model.model.model.norm.weight", "x.model.embed_tokens.weight", "embed_tokens.weight",
    "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.0.up_proj.weight", "model.language_model.norm.weight",
    "model.vision_tower.ln.weight", "model.rotary_emb.inv_freq", "model." * 700 + "x", "_orig_mod." * 500 + "x",
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2, 3, 4, 7, 8, 16, 255, 4095, 4096, 4097, 65535, 2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**32,
    2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63), 10**30, 0.5, -0.0, 1e308, 5e-324,
)  # fmt: skip
VALUES = (
    None, True, False, "", "x", "8", "BF16", "U16", "F8_E4M3", "I4", "ernie4_5", "ernie4_5_moe", "ernie4_5_moe_vl",
    "bfloat16", [], {}, [[]], [{}], {"a": 1}, [1], [1, 2], [2, 1, 3], [8, 8], [None, None], [True, 4], [-1, -1], [0] * 9,
    ["dense"], ["sparse", []], [2**63, 2**63], [2**24, 2**24], [1e9, 2], "x" * 100_000, list(range(3000)),
    {str(i): i for i in range(500)}, 4.0, {"type": "linear", "factor": 2}, {"rope_type": "yarn"},
    {"rope_type": "linear", "factor": []},
)  # fmt: skip
RAW = (  # no value of Python's makes these texts
    "[" * 5000, '{"a":' * 3000, "[" * 70 + "]" * 70, "[" * 900 + "]" * 900, '{"a":' * 200 + "1" + "}" * 200, "9" * 5000,
    "-" + "9" * 4300, "9" * 4301, "NaN", "Infinity", "-Infinity", "1e999", "1E400", "-0", "0x10", "1_000", '"\\ud800"',
    '"\\ud83d\\ude00"', '"\\u0000"', '{"a": 1, "a": 2}', "tru", "'a'", "1 2", "//", '"\t"', "[" + "0," * 20_000 + "0]",
    "[" + "{}," * 5_000 + "{}]", "\ufeff1",
)  # fmt: skip
INTEGERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1)


def changed_bytes(rng: random.Random, data: bytes, first: int = 0, last: int | None = None) -> bytes:
    """One change between `first` and `last`."""
    out = bytearray(data)
    last = len(out) if last is None else min(last, len(out))
    if last <= first:
        return bytes(out) + rng.randbytes(rng.randint(1, 8))
    at, count = rng.randrange(first, last), rng.choice((1, 1, 2, 3, 4, 8, 16, 64, 500))
    match rng.randrange(9):
        case 0 | 1:
            out[at] ^= 1 << rng.randrange(8)
        case 2:
            out[at] = rng.choice(b"\0\1\x7f\x80\xff0-9{}[]\"':,.()tuRbqhcQ\\")
        case 3:
            del out[at : at + count]
        case 4:
            out[at:at] = out[at : at + count]
        case 5:
            out[at:at] = rng.randbytes(min(count, 16))
        case 6:
            width = rng.choice((1, 2, 4, 8))
            value = rng.choice(INTEGERS) & (1 << 8 * width) - 1
            out[at : at + width] = value.to_bytes(width, rng.choice(("little", "little", "big")))
        case 7:
            source = rng.randrange(first, last)
            out[at : at + count] = out[source : source + count]
        case _ if rng.random() < 0.3:
            del out[at:]
        case _:
            out[at : at + count] = b"\0" * count
    return bytes(out)


# --- JSON ------------------------------------------------------------------------------------------------------------


class Json:
    """A JSON value to be changed in place, and the texts that replace some of its strings at the end."""

    def __init__(self, text: bytes) -> None:
        self.value = [json.loads(text)]  # in a list, so that the whole has a place too
        self.raw: list[str] = []

    def mutate(self, rng: random.Random, canary: str) -> None:
        """One change somewhere."""
        top, name = self.value[0], rng.choice(NAMES).replace("@CANARY@", canary)
        if isinstance(top, dict) and top and rng.random() < 0.3:  # another name for a tensor or a key of the config
            top[name] = top.pop(rng.choice(list(top)))
            return
        place, key = rng.choice(list(_places(self.value)))
        match rng.randrange(10):
            case 0 | 1 | 2:
                place[key] = self.nasty(rng, name)
            case 3:
                place[key] = rng.choice(NUMBERS)
            case 4 if isinstance(place[key], int) and not isinstance(place[key], bool):
                place[key] = rng.choice(
                    (place[key] + 1, place[key] - 1, place[key] * 2, -place[key], place[key] * 2**32, str(place[key]))
                )
            case 5 if isinstance(place, dict):
                place[name] = place.pop(key)
            case 6 if isinstance(place, dict):
                place[name] = place[key]
            case 7 if place is not self.value:
                del place[key]
            case 8:
                other, there = rng.choice(list(_places(self.value)))
                if other is not self.value and place is not self.value:
                    place[key] = json.loads(json.dumps(other[there])) if not isinstance(other[there], str) else other[there]
            case 9 if isinstance(place, list) and place is not self.value:
                place.insert(key, rng.choice(NUMBERS))
            case _:
                place[key] = name

    def nasty(self, rng: random.Random, name: str) -> Any:
        """A value that nobody writes."""
        if rng.random() < 0.3:
            self.raw.append(rng.choice(RAW))
            return f"@RAW{len(self.raw) - 1}@"
        return json.loads(json.dumps(rng.choice(VALUES))) if rng.random() < 0.6 else name

    def text(self, rng: random.Random) -> bytes:
        """The whole, now and then with a key twice."""
        text = json.dumps(self.value[0])
        for i, raw in enumerate(self.raw):
            text = text.replace(f'"@RAW{i}@"', raw)
        if rng.random() < 0.03:
            objects = [place for place, _ in _places(self.value) if isinstance(place, dict)]
            twice = json.dumps(rng.choice(list(rng.choice(objects)))) if objects else '"a"'
            text = text.replace("{", "{" + f"{twice}: 1,", 1)
        return text.encode("utf-8", "surrogatepass")


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in `value`; the first one is the whole."""
    keys: Sequence[Any] = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys[:200]:
        yield value, key
        if isinstance(value[key], dict | list) and depth < 6:
            yield from _places(value[key], depth + 1)


def changed_json(rng: random.Random, text: bytes, canary: str) -> bytes:
    """1 to 4 changes of values, or of bytes."""
    if rng.random() < 0.75:
        value = Json(text)
        for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
            value.mutate(rng, canary)
        text = value.text(rng)
    if rng.random() < 0.3:
        for _ in range(rng.randint(1, 3)):
            text = changed_bytes(rng, text)
    return text


def changed_safetensors(rng: random.Random, data: bytes, canary: str) -> bytes:
    """A header with other values or bytes; mostly its length is made right again."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.9:
        header = changed_json(rng, header, canary)
    prefix = len(header).to_bytes(8, "little")
    if rng.random() < 0.15:
        prefix = changed_bytes(rng, prefix)
    if rng.random() < 0.1:
        rest = changed_bytes(rng, rest)
    return prefix + header + rest


# --- pickles ---------------------------------------------------------------------------------------------------------

GLOBALS = (
    "posix system", "os system", "builtins eval", "builtins exec", "builtins getattr", "__builtin__ getattr",
    "subprocess Popen", "numpy load", "numpy ndarray", "numpy dtype", "numpy._core.multiarray _reconstruct",
    "numpy.core.multiarray scalar", "_codecs encode", "_codecs decode", "collections OrderedDict", "collections namedtuple",
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch FloatStorage", "torch load",
    "builtins tuple", "builtins set", "functools partial", "operator attrgetter", "..x y", "\xff y",
)  # fmt: skip
SNIPPETS = (
    b"R", b"\x81", b"\x92", b"b", b"h\0", b"h\1", b"h\5", b"h\xff", b"j\xff\xff\xff\xff", b"j\2\0\0\0", b"q\0", b"q\1",
    b"r\0\0\0\0", b"\x94", b"(", b"t", b"u", b"s", b"a", b"e", b"}", b"]", b")", b"N", b"0", b"1", b"2", b".", b"\x85",
    b"\x86", b"\x87", b"l", b"d", b"i", b"o", b"Q", b"P0\n", b"I10\n", b"I01\n", b"L1L\n", b"F1\n", b"S'a'\n", b"V\\ud800\n",
    b"\x82\1", b"\x83\1\1", b"\x97", b"\x98", b"\x8f", b"\x91", b"\x96" + b"\xff" * 8, b"\x88", b"\x89", b"K\xff",
    b"M\xff\xff", b"J\xff\xff\xff\xff", b"\x8a\xff" + b"\x7f" * 255, b"\x8a\0", b"\x8b\xff\xff\xff\x7f", b"G" + b"\xff" * 8,
    b"X\xff\xff\xff\x7f", b"X\0\0\0\0", b"\x8c\3a\nb", b"\x8c\1w", b"\x8c\1\xff", b"\x8d" + b"\xff" * 8, b"B\xff\xff\xff\xff",
    b"\x8e" + b"\xff" * 8, b"C\0", b"C\4abcd", b"T\xff\xff\xff\x7f", b"\x95" + b"\xff" * 8, b"\x80\5", b"\x80\xff", b")R",
    b"(tR", b"}b", b"NsN", b")" + b"q\7h\7\x86" * 60, b"]" + b"q\7h\7h\7\x86" * 30, b"(" * 3000, b"N" + b"\x85" * 3000,
    b"N" + b"Q" * 3000, b"]q\x07h\x07a", b"}q\x07\x8c\x01wh\x07s", b"\x94" * 500, b"\x8c\x05posix\x8c\x06system\x93",
    b"\x8c\x08builtins\x8c\x04eval\x93", b"cposix\nsystem\n(X\x04\0\0\0echotR", b"\x8c\x02id\x85R",
)  # fmt: skip


def boundaries(data: bytes) -> list[int]:
    """Where the opcodes of a pickle begin."""
    return [at for _, _, at in pickletools.genops(data) if at is not None]


def changed_pickle(rng: random.Random, data: bytes, starts: Sequence[int]) -> bytes:
    """1 to 4 changes at opcodes, or of bytes."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        at = min(rng.choice(starts), len(data))
        end = next((s for s in starts if s > at), len(data))
        if data[at : at + 1] in (b"X", b"\x8c") and rng.random() < 0.5:  # a name, or one of what it is made of
            text = rng.choice(NAMES).encode("utf-8", "surrogatepass")
            data = data[:at] + b"X" + len(text).to_bytes(4, "little") + text + data[end:]
            continue
        match rng.randrange(8):
            case 0 | 1 | 2:
                data = data[:at] + rng.choice(SNIPPETS) + data[at:]
            case 3:
                module, _, name = rng.choice(GLOBALS).partition(" ")
                data = data[:at] + f"c{module}\n{name}\n".encode("latin1") + data[at if rng.random() < 0.5 else end :]
            case 4:
                data = data[:at] + data[end:]
            case 5:
                data = data[:end] + data[at:]
            case 6:
                data = data[:at] + rng.choice(SNIPPETS) + data[end:]
            case _:
                data = changed_bytes(rng, data, at, end)
    return data


# --- archives --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Archive:
    """An archive of torch.save's, taken apart once."""

    data: bytes
    members: dict[str, bytes]
    starts: list[int]  # of the pickle's opcodes
    directory: int  # where the directory begins

    @staticmethod
    def of(data: bytes) -> Archive:
        """Take apart."""
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
            pickled = next(data for name, data in members.items() if name.endswith("/data.pkl"))
            return Archive(data, members, boundaries(pickled), archive.start_dir)


def changed_archive(rng: random.Random, archive: Archive) -> bytes:
    """The pickle changed in place, the directory changed, or the archive rebuilt with other members."""
    data = archive.data
    match rng.randrange(8):
        case 0 | 1 | 2:
            for _ in range(rng.randint(1, 4)):
                data = changed_bytes(rng, data, archive.directory)
            return data
        case 3:
            return changed_bytes(rng, data)
        case 4 | 5:
            root = next(iter(archive.members)).partition("/")[0]
            pickled = changed_pickle(rng, archive.members[f"{root}/data.pkl"], archive.starts)
            return _zipped({**archive.members, f"{root}/data.pkl": pickled}.items())
        case _:
            return _zipped(_members(rng, archive), zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED)


def _members(rng: random.Random, archive: Archive) -> list[tuple[str, bytes]]:
    members = list(archive.members.items())
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(members))
        name, data = members[i]
        root, _, rest = name.partition("/")
        other = rng.choice(NAMES).encode("utf-8", "replace").decode()
        match rng.randrange(9):
            case 0:
                del members[i]
            case 1:
                members.append((name, data))
            case 2:
                members[i] = (
                    rng.choice((f"/{name}", f"../{name}", f"{root}/../{rest}", f"{root}/{other}", f"C:\\{rest}", rest or "x")),
                    data,
                )
            case 3:
                members.append(
                    (rng.choice((other, f"{root}/data/{other}", f"{root}/data/../../x", "y/data.pkl", "y/data/0")) or "x", data)
                )
            case 4:
                members[i] = (name, archive.data if len(archive.data) < 100_000 else b"PK\3\4")  # an archive in an archive
            case 5:
                members[i] = (name, b"\0" * 1_000_000)
            case 6:
                members[i] = (name, data[: len(data) // 2])
            case 7:
                members[i] = (name, changed_bytes(rng, data))
            case _:
                members.append((f"{root}/byteorder", rng.choice((b"big", b"little", b""))))
        if not members:
            break
    return members


def _zipped(members: Any, compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", compression) as archive:
        warnings.simplefilter("ignore")  # a name twice is what we want
        for name, data in members:
            info = zipfile.ZipInfo("x")
            info.filename = name or "x"  # whatever it holds; the constructor would clean it
            info.compress_type = compression
            archive.writestr(info, data)
    return out.getvalue()


# --- much of one thing -----------------------------------------------------------------------------------------------

BULKS: dict[str, tuple[Callable[[int], bytes], ...]] = {
    "json": (
        lambda n: b'{"weight_map": {' + b",".join(b'"%d":"a.bin"' % i for i in range(n)) + b"}}",
        lambda n: b"[" + b"{}," * n + b"0]",
        lambda n: b'{"' + b"x" * n + b'": 0}',
    ),
    "header": (
        lambda n: b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(n)) + b"}",
        lambda n: b"{" + b",".join(b'"%d":0' % i for i in range(n)) + b"}",
    ),
    "pickle": (
        lambda n: b"}" * n, lambda n: b"N" + b"\x85" * n,
        lambda n: b"}(" + b"".join(b"\x8c\6%06dN" % i for i in range(n)) + b"u.",
        lambda n: b"]\x94" * n, lambda n: b"N" + b"Q" * n,
    ),
}  # fmt: skip
