"""Devices by name: `cpu`, `cuda` (all that are visible), `cuda:1`; and what a thread needs to work on one.

A thread has a stream of its own: while one reads a file, the weights of another are on their way to the device, those of a
third are encoded, and what is packed of a fourth comes back. Memory for copies is pinned, and torch keeps it for the next one.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ernie_quant.errors import ErnieQuantError
from ernie_quant.needs import require

if TYPE_CHECKING:
    import torch

CPU, CUDA = "cpu", "cuda"
LEAST = (8, 0)  # compute capability (Ampere): bf16
NAME = re.compile(r"cpu|cuda(:(0|[1-9][0-9]{0,3}))?")


def named(text: str) -> str:
    """The name of a device. Raises ValueError."""
    if not NAME.fullmatch(text):
        raise ValueError(f"{text!r} is no device; there are cpu, cuda (all GPUs) and cuda:0, cuda:1 and so on")
    return text


def found(name: str) -> tuple[str, ...]:
    """The devices of this machine that a name means. Raises NeedsError, or ErnieQuantError where there is none."""
    if named(name) == CPU:
        return (CPU,)
    require("torch")
    import torch

    if not torch.cuda.is_available():
        without = torch.version.cuda is None
        why = f"PyTorch {torch.__version__} was built without CUDA" if without else "PyTorch finds no GPU that it can use"
        raise ErnieQuantError(f"--device {name}: {why}; --device cpu works without")
    require("triton")
    there = tuple(f"{CUDA}:{i}" for i in range(torch.cuda.device_count()))
    if name != CUDA and name not in there:
        raise ErnieQuantError(f"--device {name}: there is no such GPU; PyTorch sees {', '.join(there)}")
    chosen = there if name == CUDA else (name,)
    for device in chosen:
        if (capability := torch.cuda.get_device_capability(device)) < LEAST:
            has, wants = (".".join(map(str, version)) for version in (capability, LEAST))
            raise ErnieQuantError(
                f"--device {name}: {device} has compute capability {has}, and kernels need {wants}: name another"
            )
    if not any(map(shutil.which, ("gcc", "clang"))) and "CC" not in os.environ:
        raise ErnieQuantError(f"--device {name}: Triton needs a C compiler for what launches its kernels: install gcc or clang")
    return chosen


class Crew:
    """The threads of a run: each has one of the devices that a name means, in turn, and keeps it."""

    def __init__(self, name: str) -> None:
        self.devices = found(name)
        self._turns = itertools.cycle(self.devices)
        self._lock = threading.Lock()
        self._mine = threading.local()

    def workers(self, asked: int) -> int:
        """At least one for each device."""
        return max(asked, len(self.devices))

    @contextmanager
    def at_work(self) -> Iterator[str]:
        """The device of this thread, which is torch's current one for so long. Raises ErnieQuantError if it is full."""
        with self._lock:
            device = self._mine.device = getattr(self._mine, "device", None) or next(self._turns)
        if device == CPU:
            yield device
            return
        import torch

        try:
            with torch.cuda.device(device):
                stream = self._mine.stream = getattr(self._mine, "stream", None) or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                with torch.cuda.stream(stream):
                    yield device
        except torch.OutOfMemoryError:
            total = torch.cuda.get_device_properties(device).total_memory
            raise ErnieQuantError(
                f"{device}: its {total / 2**30:.0f} GiB are full, of other programs too; fewer --workers need less"
            ) from None


def buffer(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """An empty tensor of this machine's memory, from which `sent` gets to the device fastest."""
    import torch

    return torch.empty(shape, dtype=dtype, pin_memory=device != CPU)


def sent(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """A buffer's contents on a device; the copy is under way, and what the thread does next there waits for it."""
    return tensor if device == CPU else tensor.to(device, non_blocking=True)


def fetched(tensors: Mapping[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    """The same tensors in this machine's memory, all of them there."""
    if device == CPU:
        return dict(tensors)
    import torch

    here = {}
    for name, tensor in tensors.items():
        if tensor.device.type == CPU:
            here[name] = tensor
        else:
            tensor = tensor.contiguous()
            here[name] = buffer(tuple(tensor.shape), tensor.dtype, device).copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(device).synchronize()
    return here
