"""What this process does with memory that it does not need any more."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ernie_quant.planning.steps import Plan


def suit(plan: Plan) -> None:
    """As a run of the plan wants it."""
    if plan.calibration is None:
        return_freed_memory()
    else:
        keep_freed_memory()


def return_freed_memory() -> None:
    """Give every freed slab back to the system at once.

    glibc moves its threshold for that up to 32 MiB when blocks below it are freed; slabs of changing sizes then leave
    holes: 0.9 GB at the peak instead of 0.37 on the tensors of the 300B.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 4 << 20)  # M_MMAP_THRESHOLD in malloc.h; setting it stops it from moving
        mallopt(-1, 16 << 20)  # M_TRIM_THRESHOLD: what blocks of rows need stays, and is not asked of the system for each of them


def keep_freed_memory() -> None:
    """Calibration makes and drops activations of some tens of MB all the time, and would spend much of its time on getting
    their pages from the system and giving them back."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 32 << 20)  # the largest that glibc takes
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
