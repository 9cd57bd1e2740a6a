"""The few inner loops that torch operations make too slow, each beside the plain torch version that tests hold it to.

Both do the same float32 operations in the same order, without fused multiply-add and without reordered sums, so
they agree to the bit and a file does not depend on the machine that wrote it. Error feedback is the exception: between its
loops stand products of large matrices, which torch sums as the processor likes (feedback).

A file that ends with `_triton` holds kernels for GPUs, again with the same bits: a GPU has lanes enough that each does one
group, or one column, by itself and in order, so that nothing is summed by a tree. What has none is done on the CPU (`of`).

numba keeps what it compiled in __pycache__ or, where that cannot be written, in the user's cache or nowhere (`_compiled`). It
does not see that a function of another file has changed: after an edit in _float4, _ggml_search, _lanes, _registers, ccq_bytes,
ccq_feedback_loops or ccq_scores delete the *.nbi there, or the old code goes on in those who call it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ernie_quant.errors import ErnieQuantError

if TYPE_CHECKING:
    import torch

DEVICES = {"cpu": "", "cuda": "_triton"}  # type of a torch device -> how the names of its kernels' files end


def of(name: str, tensor: torch.Tensor) -> Any:
    """The kernels `name` for the device on which a tensor lies: functions, as attributes.

    A function that the device has none of works on the CPU: its tensors are copied there, what it returns is copied back.
    Raises ErnieQuantError for a device that is not known.
    """
    device = tensor.device
    if device.type not in DEVICES:
        raise ErnieQuantError(f"kernels {name}: there are none for the device {device.type}; there are for {', '.join(DEVICES)}")
    suffix = DEVICES[device.type]
    if not suffix:
        return importlib.import_module(f"{__name__}.{name}")
    own = f"{__name__}.{name}{suffix}"
    return _OfDevice(name, importlib.import_module(own) if find_spec(own) else None, device)


class _OfDevice:
    """The functions of a device's file, and those of the CPU's where it has none of that name."""

    def __init__(self, name: str, own: ModuleType | None, device: torch.device) -> None:
        self._name, self._own, self._device = name, own, device

    def __getattr__(self, function: str) -> Any:
        found = getattr(self._own, function, None)
        return found or self._elsewhere(getattr(importlib.import_module(f"{__name__}.{self._name}"), function))

    def _elsewhere(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            return moved(function(*moved(args, "cpu"), **moved(named, "cpu")), self._device)

        return call


def moved(value: Any, device: torch.device | str) -> Any:
    """A tensor on a device; dicts, lists and tuples with those that they hold."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(inner, device) for key, inner in value.items()}
    return type(value)(moved(inner, device) for inner in value) if type(value) in (list, tuple) else value
