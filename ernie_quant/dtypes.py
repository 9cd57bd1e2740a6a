"""The stored dtypes in the spelling of safetensors and ggml: their sizes, and their names in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# U16 in Paddle files holds bfloat16 bits; readers hand it on as BF16
ITEMSIZE = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4,
    "BF16": 2, "F16": 2, "I16": 2, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
STORED_NAMES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
FLOATS = ("BF16", "F16", "F32")  # of plain weights
# ggml's types, whose elements lie in blocks along a row: elements and bytes of a block (ggml-org/llama.cpp, ggml-common.h)
BLOCKS = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "IQ4_NL": (32, 18), "MXFP4": (32, 17), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144),
    "Q5_K": (256, 176), "Q6_K": (256, 210), "IQ4_XS": (256, 136),
}  # fmt: skip


def nbytes(dtype: str, numel: int) -> int:
    """Bytes of so many elements; of blocks that are all full."""
    if dtype in BLOCKS:
        elements, size = BLOCKS[dtype]
        return numel // elements * size
    return numel * ITEMSIZE[dtype]


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of a stored one."""
    import torch

    found: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """The stored dtype of torch's."""
    return STORED_NAMES[str(dtype).removeprefix("torch.")]


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied where it is on the CPU."""
    import torch

    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
