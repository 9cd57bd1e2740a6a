"""Convert and quantize ERNIE 4.5 checkpoints, one tensor at a time.

    import ernie_quant

    ernie_quant.inspect("ERNIE-4.5-21B-A3B-Paddle")
    ernie_quant.quantize("ERNIE-4.5-21B-A3B-Paddle", "out", "wint4", experts_only=True)

Functions are those of `ernie_quant.library`, imported when they are first asked for; all expected errors are `ErnieQuantError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ernie_quant.version import __version__ as __version__

__all__ = [
    "ErnieQuantError", "allocate", "convert", "dequantize", "inspect", "plan", "quantize", "report", "reshard", "verify",
]  # fmt: skip

if TYPE_CHECKING:
    from ernie_quant.errors import ErnieQuantError as ErnieQuantError
    from ernie_quant.library import allocate as allocate
    from ernie_quant.library import convert as convert
    from ernie_quant.library import dequantize as dequantize
    from ernie_quant.library import inspect as inspect
    from ernie_quant.library import plan as plan
    from ernie_quant.library import quantize as quantize
    from ernie_quant.library import report as report
    from ernie_quant.library import reshard as reshard
    from ernie_quant.library import verify as verify


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "ErnieQuantError":
        from ernie_quant import errors as room
    else:
        from ernie_quant import library as room  # type: ignore[no-redef]
    return getattr(room, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
