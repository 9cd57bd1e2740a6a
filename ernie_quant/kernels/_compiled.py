"""Compiled functions, kept on disk between runs where that is possible: no run needs it, it only saves some seconds."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba as nb
from numba.core.caching import FunctionCache
from numba.extending import intrinsic


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """As `numba.njit(nogil=True, cache=True)`, which refuses to compile at all where no folder takes its cache."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        made: Any = nb.njit(nogil=True, **options)(function)
        if _has_place():
            with suppress(RuntimeError, OSError):  # the first: no folder can be written
                made._cache = _Forgiving(function)  # type: ignore[no-untyped-call]
        result: Callable[..., Any] = made
        return result

    return decorate


def written_out(make: Callable[..., Any]) -> Any:
    """As `numba.extending.intrinsic`: what LLVM is told to do, written out, for compiled functions to call."""
    return intrinsic(make)


def _has_place() -> bool:
    """Without HOME and a name for its number, a user's cache would be a folder `~` wherever they are."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home())
    except RuntimeError:
        home = Path("~")
    return bool(os.environ.get("NUMBA_CACHE_DIR")) or os.access(Path(__file__).parent, os.W_OK) or home.is_absolute()


class _Forgiving(FunctionCache):
    """What cannot be read or kept (a full disk, a file of somebody else, half of one) is compiled again."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """None where there is nothing to be had."""
        try:
            return super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        except Exception:  # whatever unpickling half a file raises
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Perhaps."""
        try:
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]
        except Exception:  # it reads its index first, which may be damaged
            self.disable()  # type: ignore[no-untyped-call]
