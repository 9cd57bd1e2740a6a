"""GGUF files of a small model, and what a stranger may do to one: entries dropped, doubled, renamed, counts and bytes changed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from helpers.raw_gguf import array, file_of, key, string, tensor

from ernie_quant.checkpoint import TensorSpec
from faults._mutations import INTEGERS, NAMES, changed_bytes

KEYS = (
    key("general.architecture", 8, "ernie4_5"), key("general.type", 8, "model"), key("ernie4_5.block_count", 4, 1),
    key("ernie4_5.embedding_length", 4, 32), key("ernie4_5.rope.freq_base", 6, 500_000.0),
    array("tokenizer.ggml.tokens", 8, ["<unk>", "<s>", "é", "x"]), array("tokenizer.ggml.scores", 6, [0.0, -1.0, 2.0, 0.5]),
    key("tokenizer.ggml.add_bos_token", 7, 0), key("general.alignment", 4, 32),
)  # fmt: skip
SPECS = {
    "token_embd.weight": TensorSpec((8, 32), "Q8_0"),
    "output_norm.weight": TensorSpec((32,), "F32"),
    "blk.0.ffn_up_exps.weight": TensorSpec((2, 2, 32), "Q4_0"),
}


@dataclass(frozen=True)
class Gguf:
    """The entries of a file and its data."""

    keys: tuple[bytes, ...]
    tensors: tuple[bytes, ...]
    data: bytes

    @property
    def whole(self) -> bytes:
        """The file itself."""
        return file_of(self.keys, self.tensors, self.data)


ENTRIES = (  # of keys and of tensors, each in the place of the other too
    key("general.alignment", 4, 64), key("general.alignment", 4, 0), key("general.alignment", 4, 2**31),
    key("split.count", 2, 3), key("split.no", 2, 1), key("general.architecture", 8, "llama"),
    key("general.architecture", 4, 1), key("general.type", 8, "x"),
    key("a", 9, b"\x09\0\0\0\2" + bytes(7) + b"\x09\0\0\0" * 8), key("a", 8, b"\xff" * 8), key("a", 13, b""), key("", 4, 0),
    key("a", 7, b"\2"), key("a", 6, b"\0\0\xc0\x7f"), key("a", 8, "x" * 100_000), array("a", 8, ["x"] * 2000),
    array("a", 8, [], 2**61), array("a", 0, [], 2**64 - 1), array("a", 12, [bytes(80_000)], 10_000), array("a", 4, [1], 2),
    tensor("x", (32,), "IQ2_XXS"), tensor("x", (33,), "Q8_0"), tensor("x", (2**32, 2**32), "F32"), tensor("x", (0,), "F32"),
    tensor("x", (), "F32"), tensor("x", (1,) * 5, "F32"), tensor("x", (2**63,) * 4, "Q4_K"), tensor("x" * 64, (1,), "F32"),
)  # fmt: skip


def split(entry: bytes) -> tuple[bytes, bytes]:
    """A name with its length, and what follows it."""
    end = 8 + int.from_bytes(entry[:8], "little")
    return entry[:end], entry[end:]


def changed_gguf(rng: random.Random, file: Gguf) -> bytes:
    """Entries dropped, doubled, swapped, renamed or changed, other counts; now and then any bytes."""
    keys, tensors, data = list(file.keys), list(file.tensors), file.data
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        entries = rng.choice([e for e in (keys, tensors) if e] or [[b""]])
        i, j = rng.randrange(len(entries)), rng.randrange(len(entries))
        match rng.randrange(9):
            case 0:
                del entries[i]
            case 1:
                entries.insert(j, entries[i])
            case 2:
                entries[i], entries[j] = entries[j], entries[i]
            case 3:
                entries[i] = string(rng.choice(NAMES).encode("utf-8", "surrogatepass")) + split(entries[i])[1]
            case 4:
                entries.insert(i, rng.choice(ENTRIES))
            case 5:  # a known name, and a value or a shape that it never has
                entries[i] = split(entries[i])[0] + split(rng.choice(ENTRIES))[1]
            case 6:
                data = changed_bytes(rng, data)
            case _:
                entries[i] = changed_bytes(rng, entries[i])
    counts = len(tensors), len(keys)
    if rng.random() < 0.1:
        counts = rng.choice(INTEGERS), rng.choice((len(keys), *INTEGERS))
    start = b"GGUF\3\0\0\0" if rng.random() < 0.95 else changed_bytes(rng, b"GGUF\3\0\0\0")
    whole = file_of(keys, tensors, data, start=start, counts=(counts[0] % 2**64, counts[1] % 2**64))
    for _ in range(rng.randint(1, 3) if rng.random() < 0.3 else 0):
        whole = changed_bytes(rng, whole, 0, len(whole) - len(data))
    return whole


def file_with(keys: tuple[bytes, ...], names: tuple[str, ...]) -> Gguf:
    """Some of the tensors; zeros are as good as anything."""
    table, at = [], 0
    for name in names:
        spec = SPECS[name]
        table.append(tensor(name, spec.shape[::-1], spec.dtype, at))
        at += -(-spec.nbytes // 32) * 32
    return Gguf(keys, tuple(table), bytes(at))


def files(root: Path) -> Iterator[tuple[Path, Gguf]]:
    """A model in one file, and in two parts, each model in a folder."""
    for folder in ("gguf", "parts"):
        (root / folder).mkdir()
    yield root / "gguf" / "X-Q8_0.gguf", file_with(KEYS, tuple(SPECS))
    for number, names in enumerate((tuple(SPECS)[:1], tuple(SPECS)[1:])):
        split = (key("split.no", 2, number), key("split.count", 2, 2), key("split.tensors.count", 5, len(SPECS)))
        path = root / "parts" / f"X-{number + 1:05d}-of-00002.gguf"
        yield path, file_with((*split, *(KEYS if number == 0 else ())), names)


def bulk(rng: random.Random) -> bytes:
    """Much of one thing."""
    count = rng.choice((1000, 10_000, 100_000))
    match rng.randrange(3):
        case 0:
            return file_of([array("k", 8, ["x"] * count)])
        case 1:
            return file_of([key(f"k{i}", 4, i) for i in range(count)])
        case _:
            return file_of((), [tensor(f"t{i}", (0,)) for i in range(count)])
