"""ggml's own quantizers and dequantizers, through ctypes: what encoders and decoders of GGUF block types are held to."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Array = np.ndarray[Any, Any]

INT64, SIZE, POINTER = ctypes.c_int64, ctypes.c_size_t, ctypes.c_void_p


class _Traits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", INT64),
        ("blck_size_interleave", INT64),
        ("type_size", SIZE),
        ("is_quantized", ctypes.c_bool),
        ("to_float", POINTER),
        ("from_float_ref", POINTER),
    )


class Ggml:
    """The functions of ggml.h that need no context. Types are given as ggml's numbers: 8 is Q8_0, 12 is Q4_K."""

    def __init__(self) -> None:
        library = ctypes.CDLL(str(_library()))
        signatures: dict[str, tuple[Any, list[Any]]] = {
            "ggml_quantize_init": (None, [ctypes.c_int]),
            "ggml_quantize_chunk": (SIZE, [ctypes.c_int, POINTER, POINTER, INT64, INT64, INT64, POINTER]),
            "ggml_get_type_traits": (ctypes.POINTER(_Traits), [ctypes.c_int]),
            "ggml_row_size": (SIZE, [ctypes.c_int, INT64]),
            "ggml_validate_row_data": (ctypes.c_bool, [ctypes.c_int, POINTER, SIZE]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self._library = library

    def quantize(self, type_number: int, x: Array, imatrix: Array | None = None) -> Array:
        """x float32 [..., n] -> uint8 [..., row bytes]; imatrix float32 [n] asks for llama.cpp's weighted search."""
        x = np.ascontiguousarray(x, np.float32)
        n, rows = x.shape[-1], x.size // x.shape[-1]
        weights = None if imatrix is None else np.ascontiguousarray(imatrix, np.float32)
        raw = np.empty((*x.shape[:-1], self._library.ggml_row_size(type_number, n)), np.uint8)
        self._library.ggml_quantize_init(type_number)
        written = self._library.ggml_quantize_chunk(
            type_number, x.ctypes.data, raw.ctypes.data, 0, rows, n, None if weights is None else weights.ctypes.data
        )
        assert written == raw.nbytes
        return raw

    def dequantize(self, type_number: int, raw: Array, n: int) -> Array:
        """uint8 [..., row bytes] -> float32 [..., n]."""
        raw = np.ascontiguousarray(raw, np.uint8)
        assert raw.shape[-1] == self._library.ggml_row_size(type_number, n)
        out = np.empty((*raw.shape[:-1], n), np.float32)
        traits = self._library.ggml_get_type_traits(type_number).contents
        ctypes.CFUNCTYPE(None, POINTER, POINTER, INT64)(traits.to_float)(raw.ctypes.data, out.ctypes.data, out.size)
        return out

    def valid(self, type_number: int, raw: Array) -> bool:
        """Whether ggml takes these rows: no scale is infinite or not a number."""
        raw = np.ascontiguousarray(raw, np.uint8)
        return bool(self._library.ggml_validate_row_data(type_number, raw.ctypes.data, raw.nbytes))


def _library() -> Path:
    """The shared object of the package xllamacpp, which holds all of llama.cpp; its Python part is not needed."""
    spec = find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("xllamacpp: pip install 'ernie-quant[llama-cpp]'")
    return next(Path(spec.origin).parent.glob("xllamacpp*.so"))


def _missing() -> str:
    """Why these tests cannot run here, or an empty string."""
    if find_spec("xllamacpp") is None:
        return "needs llama.cpp: pip install 'ernie-quant[llama-cpp]'"
    processor = Path("/proc/cpuinfo")
    if processor.exists() and "flags" in (text := processor.read_text()) and " avx2" not in text:
        return "the llama.cpp of xllamacpp does not load on this processor: it needs AVX2"
    try:
        ctypes.CDLL(str(_library()))
    except (OSError, StopIteration) as error:
        return f"the llama.cpp of xllamacpp does not load here: {error}"
    return ""


MISSING = _missing()
needs_ggml = pytest.mark.skipif(bool(MISSING), reason=MISSING or "ggml is there")
