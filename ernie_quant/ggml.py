"""The numbers by which GGUF files name types of values and of tensors, and how Python values stand for the former.

Source: ggml-org/llama.cpp, ggml/include/gguf.h and ggml.h.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

MAGIC, VERSION = b"GGUF", 3
ALIGNMENT = 32  # of the data, and of every tensor in them
MAX_NAME = 63  # bytes of a tensor's name
MAX_DIMS = 4

# of tensors; the dtypes that this program knows
NUMBERS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12,
    "Q5_K": 13, "Q6_K": 14, "IQ4_NL": 20, "IQ4_XS": 23, "I8": 24, "I16": 25, "I32": 26, "I64": 27, "F64": 28, "BF16": 30,
    "MXFP4": 39,
}  # fmt: skip
# of values: number -> struct's letter
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
U16, U32, I32, F32, BOOL, STRING, ARRAY = 2, 4, 5, 6, 7, 8, 9


@dataclass(frozen=True)
class Number:
    """A whole number that is not u32: `kind` is its type."""

    value: int
    kind: int


# bool: bool; int: u32; float: f32; str: string; a tuple of str, float or int: an array of strings, f32 or i32
Value: TypeAlias = bool | int | float | str | Number | tuple[str, ...] | tuple[float, ...] | tuple[int, ...]
Keys: TypeAlias = Mapping[str, Value]
