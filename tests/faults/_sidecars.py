"""What a stranger may put beside the weights: small configs, tokenizers, templates, code, folders, links and pipes.

A mutation is a list of edits (what, name, data) that depends on the random generator alone; `edited` makes them in a
folder and takes them back.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faults._mutations import NAMES, RAW, VALUES, changed_bytes, changed_json

AUTO_MAP = {"AutoModelForCausalLM": "modeling_x.Model", "AutoTokenizer": ["tokenization_x.Slow", None]}
FILES: dict[str, bytes] = {
    "generation_config.json": json.dumps({"eos_token_id": [2, 3], "temperature": 0.8, "auto_map": AUTO_MAP}).encode(),
    "tokenizer_config.json": json.dumps({
        "tokenizer_class": "X", "auto_map": AUTO_MAP, "chat_template": "{{ messages }}", "model_max_length": 1e30,
        "added_tokens_decoder": {"0": {"content": "<unk>"}}, "custom_pipelines": {"x": {"impl": "pipeline_x.P", "pt": []}},
    }).encode(),
    "tokenizer.json": json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}}}).encode(),
    "preprocessor_config.json": json.dumps({"auto_map": {"AutoProcessor": "org/x--processing_x.P"}, "patch_size": 14}).encode(),
    "special_tokens_map.json": json.dumps({"bos_token": "<s>", "auto_map": "<auto>"}).encode(),
    "configuration.json": b'{"framework": "pytorch", "task": "chat"}',
    "chat_template.jinja": b"{% for m in messages %}{{ m.content }}{% endfor %}",
    "additional_chat_templates/tool.jinja": b"{{ tools }}",
    "modeling_x.py": b"import os\nos.system('touch was-here')\n",
    "tokenization_x.py": b"class Slow: ...\n",
    "README.md": b"---\nlicense: apache-2.0\n---\n# X\n",
    "LICENSE": b"Apache\n",
    "figures/a.pdf": b"%PDF",
    "trainer_state.json": b"{}",
}  # fmt: skip
REFERENCES = (
    "modeling_x.Model", "a.b.c.D", "../../x.Y", "x", "", ".", "org/x--modeling_x.Model", "--", "\x00.X", 5, None, True, [], {},
    ["modeling_x.Model"], [None], {"a": {"b": "c.d"}}, "x" * 10_000, "²", "\ud800",
)  # fmt: skip
OUTSIDE = ("../canary.safetensors", "../canary", "/etc/passwd", "/dev/zero", "/proc/self/mem", "..", "/", "nowhere", "@SELF@",
           "config.json", "tokenizer.json", "figures")  # fmt: skip
FOLDERS = ("additional_chat_templates", "tokenizer", "processor", "LICENSES", "chat_templates", "assets", "rank7", "mtp", "plots",
           ".ernie-quant", ".git", "figures")  # fmt: skip
SIZES = (0, 1, 4 << 20, (4 << 20) + 1, 32 << 20, (64 << 20) + 1, 1 << 40)
PATTERNS = ("*", "figures", "figures/*", "assets/*", "*.pdf", "../*", "/etc/*", "", "[", "**", "*.py", "mtp/*", "x" * 5000, "\0")
WIDE, DEEP = 2000, (30, 62, 64, 66, 200, 300, 330, 480, 500, 900, 950, 980, 985, 990, 995, 1000, 5000, 100_000)
Edit = tuple[str, str, bytes]


def drawn(rng: random.Random, canary: str) -> list[Edit]:
    """1 to 3 edits."""
    return [_edit(rng, canary) for _ in range(rng.choice((1, 1, 1, 2, 3)))]


def options(rng: random.Random) -> dict[str, Any]:
    """Of a plan: what --copy and --copy-code are, mostly nothing."""
    return {"copy": tuple(rng.sample(PATTERNS, rng.choice((0, 0, 0, 1, 2)))), "copy_code": rng.random() < 0.3}


def _edit(rng: random.Random, canary: str) -> Edit:
    name = rng.choice(list(FILES))
    data, is_json = FILES[name], name.endswith(".json")
    match rng.randrange(10):
        case 0 | 1 if is_json:
            return ("write", name, changed_json(rng, data, canary))
        case 2 if is_json:
            return ("write", name, _coded(rng, data))
        case 3:
            return ("write", name, _whole(rng))
        case 4:
            return ("write", name, changed_bytes(rng, data))
        case 5:
            return ("write", name, data[: len(data) // 2] + rng.choice((b"\xff\xfe", b"\x80", b"\xed\xa0\x80", b"\0\0")) + data)
        case 6:
            return (rng.choice(("link", "link", "pipe", "folder", "remove")), name, rng.choice(OUTSIDE).encode())
        case 7:
            return ("sparse", name, str(rng.choice(SIZES)).encode())
        case 8:
            other = rng.choice(NAMES).replace("@CANARY@", "x").replace("/", "_").replace("\0", "")
            ending = rng.choice(("", ".json", ".py", ".jinja", ".md"))
            return (rng.choice(("write", "write", "link", "pipe")), f"{other or 'x'}{ending}", rng.choice(OUTSIDE).encode())
        case _:
            place = "/".join([rng.choice(FOLDERS), *["d"] * rng.choice((0, 0, 1, 60))])
            last = rng.choice((name.rpartition("/")[2], "model.safetensors", "x.txt", ".hidden"))
            return (rng.choice(("write", "link", "pipe")), f"{place}/{last}", rng.choice(OUTSIDE).encode())


def _coded(rng: random.Random, data: bytes) -> bytes:
    """Other names of code, at some depth."""
    table = json.loads(data)
    where = table
    for _ in range(rng.choice((0, 0, 1, 5, 70))):
        where["x"] = {}
        where = where["x"]
    for key in rng.sample(("auto_map", "custom_pipelines", "impl"), rng.randint(1, 3)):
        value = rng.choice(REFERENCES)
        where[key] = rng.choice((value, {"AutoModel": value}, [value], {"x": {"impl": value}}))
    return json.dumps(table).encode("utf-8", "surrogatepass")


def _whole(rng: random.Random) -> bytes:
    """Another text altogether: a value of the wrong type, NaN, deep, wide, no UTF-8."""
    depth = rng.choice(DEEP)
    match rng.randrange(6):
        case 0:
            return rng.choice(RAW).encode()
        case 1:
            return json.dumps(rng.choice(VALUES)).encode()
        case 2:
            return b'{"auto_map": ' * depth + b"{}" + b"}" * depth
        case 3:
            return b'{"x": {"auto_map": "gone.X"}, "y": ' + b"[" * depth + b"]" * depth + b"}"
        case 4:
            return b'{"auto_map": "gone.X", "y": ' + b'{"a":' * depth + rng.choice((b"NaN", b"1e999", b"1")) + b"}" * depth + b"}"
        case _:
            wide = ",".join(f'"{i}": {{"auto_map": "gone.X"}}' for i in range(rng.choice((WIDE, 20 * WIDE))))
            return f"{{{wide}}}".encode(rng.choice(("utf-8", "utf-16", "utf-32")))


def place_all(folder: Path) -> None:
    """The good files."""
    for name, data in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)


@contextmanager
def edited(folder: Path, edits: list[Edit]) -> Iterator[None]:
    """The folder with these edits, as far as the file system takes them; everything as it was afterwards."""
    before = {path.name for path in folder.iterdir()}
    try:
        for edit in edits:
            _make(folder, *edit)
        yield
    finally:
        for path in list(folder.iterdir()):
            if path.name not in before or path.name in {name.partition("/")[0] for name in FILES}:
                _remove(path)
        place_all(folder)


def _make(folder: Path, what: str, name: str, data: bytes) -> None:
    path = folder / os.fsdecode(name.encode("utf-8", "surrogatepass"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path in (folder, folder / "..", folder / "config.json", folder / "model.safetensors"):
            return
        _remove(path)
        match what:
            case "write":
                path.write_bytes(data)
            case "link":
                path.symlink_to(path.name if data == b"@SELF@" else data.decode())
            case "pipe":
                os.mkfifo(path)
            case "folder":
                path.mkdir()
                (path / "x.json").write_bytes(b"{}")
            case "sparse":
                with open(path, "wb") as file:
                    file.truncate(int(data))
    except (OSError, ValueError):  # a name that is too long, a file where a folder was wanted
        return


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
