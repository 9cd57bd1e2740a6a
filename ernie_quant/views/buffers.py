"""Memory that is used again: a slab's pages are asked of the system, and cleared by it, once and not for every slab."""

from __future__ import annotations

import math
import threading
import weakref
from typing import TYPE_CHECKING, Any

from ernie_quant.devices import CPU, buffer

if TYPE_CHECKING:
    import torch

LEAST = 1 << 20  # bytes; below it malloc has memory at hand


class Buffers:
    """Empty tensors. The memory of one is taken again when nobody has it any more; all is freed with this.

    As many buffers come to be as are in use at the same time.
    """

    def __init__(self) -> None:
        self._free: list[Any] = []
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: str = CPU) -> torch.Tensor:
        """A tensor of this machine's memory; for another device than the processor it is pinned, and torch reuses it."""
        import torch

        nbytes = dtype.itemsize * math.prod(shape)
        if device != CPU or nbytes < LEAST:
            return buffer(shape, dtype, device)
        memory = self._take(nbytes)
        loan = memory[:nbytes]  # an object of its own, which the tensor and all views of it keep alive
        weakref.finalize(loan, self._free.append, memory).atexit = False
        return torch.from_numpy(loan).view(dtype).view(shape)

    def _take(self, nbytes: int) -> Any:
        import numpy as np

        with self._lock:
            fitting = [i for i, memory in enumerate(self._free) if memory.size >= nbytes]
            if fitting:
                return self._free.pop(min(fitting, key=lambda i: self._free[i].size))
            self._free.clear()  # all are too small: slabs of a file are of about the same size
        return np.empty(nbytes, np.uint8)
