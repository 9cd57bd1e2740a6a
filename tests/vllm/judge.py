"""Is what vLLM loaded, and computes, what the plain checkpoint says?"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from cases import Run
from expected import Rank, Tensors
from safetensors.torch import load_file


def parameters(loaded: Path, plain: Tensors, run: Run) -> list[str]:
    """What differs from the file: parameters by rank and name, and tensors of the file that none holds."""
    found, used = [], set()
    for kind in ("target", "draft") if run.speculate else ("target",):
        for rank in range(run.tp):
            share = Rank(plain, rank, run.tp, run.ep)
            for name, value in load_file(loaded / f"{kind}-{rank}.safetensors").items():
                found += [f"{kind} {name}: {problem}" for problem in _problems(share, name, value)]
            used |= share.used
    asked = {name for name in plain if run.speculate or ".mtp_" not in name}
    lost = [f"{name}: in the file, in no parameter" for name in sorted(asked - used)]
    return list(dict.fromkeys(found)) + lost


def _problems(share: Rank, name: str, value: torch.Tensor) -> list[str]:
    try:
        expected = share.of(name)
    except KeyError as missing:
        return [f"the file has no {missing}"]
    if value.dtype != expected.dtype:
        return [f"{_short(value.dtype)}, not {_short(expected.dtype)}"]
    if value.shape != expected.shape:
        return [f"{tuple(value.shape)}, not {tuple(expected.shape)}"]
    wrong = int((value != expected).sum())
    return [f"{wrong} of {value.numel()} values differ"] if wrong else []


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def distance(left: Path, right: Path) -> float:
    """The largest difference of two logprobs; infinite where one is not a number."""
    one, other = (load_file(folder / "logprobs.safetensors")["logprobs"] for folder in (left, right))
    largest = float((one - other).abs().max())
    return math.inf if math.isnan(largest) else largest
