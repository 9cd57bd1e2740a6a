"""Kernels for GPUs where there is none: Triton's interpreter runs them on tensors of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ernie_quant import kernels


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on tensors of the CPU are taken for those of a GPU: `kernels.of` finds what it finds for these."""
    from triton.runtime import interpreter

    def call(function: Any, *args: Any, **named: Any) -> Any:
        # as InterpretedFunction.__call__, which patches triton.language anew for every call of one function by another,
        # even by kernels for which that has been done: nine tenths of the time
        if not function.fn.__module__.startswith("ernie_quant."):
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **named)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
    monkeypatch.setitem(kernels.DEVICES, "cpu", kernels.DEVICES["cuda"])


@contextmanager
def kernels_of_the_cpu() -> Iterator[None]:
    """What is computed in here is what the CPU computes."""
    before = kernels.DEVICES["cpu"]
    kernels.DEVICES["cpu"] = ""
    try:
        yield
    finally:
        kernels.DEVICES["cpu"] = before
