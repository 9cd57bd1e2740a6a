"""The few inner loops that torch operations make too slow, each beside the plain torch version that tests hold it to.

Both do the same float32 operations in the same order, without fused multiply-add and without reordered sums, so
they agree to the bit and a file does not depend on the machine that wrote it. Error feedback is the exception: between its
loops stand products of large matrices, which torch sums as the processor likes (feedback).

numba keeps what it compiled in __pycache__ or, where that cannot be written, in the user's cache or nowhere (`_compiled`). It
does not see that a function of another file has changed: after an edit in _ggml_search, _lanes, _registers, ccq_bytes,
ccq_feedback_loops or ccq_scores delete the *.nbi there, or the old code goes on in those who call it.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from ernie_quant.errors import ErnieQuantError

if TYPE_CHECKING:
    import torch

DEVICES = {"cpu": ""}  # type of a torch device -> how the names of its kernels' files end


def of(name: str, tensor: torch.Tensor) -> ModuleType:
    """The kernels `name` for the device on which a tensor lies. Raises ErnieQuantError where there are none."""
    device = tensor.device.type
    if device not in DEVICES:
        raise ErnieQuantError(f"kernels {name}: there are none for the device {device}; there are for {', '.join(DEVICES)}")
    return importlib.import_module(f"{__name__}.{name}{DEVICES[device]}")
