"""What `calibrate` has kept of a model's inputs, as the importance of each weight's inputs: llama.cpp's imatrix.

`PLACE.POINT.second_moment` of the file is the mean of x^2 per input; those of experts are stacked. An expert that saw no token
has zeros, and its inputs count alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ernie_quant.checkpoint import TensorRef
from ernie_quant.codecs._ggml import IMPORTANCE
from ernie_quant.errors import PlanError
from ernie_quant.readers import read_header
from ernie_quant.views import build
from ernie_quant.views.kinds import View

STATISTIC = "second_moment"
NAME = re.compile(rf"(model\.layers\.\d+)\.(.+)\.{STATISTIC}")
QKV, GATE_UP, EXPERTS = "self_attn.qkv", "gate_up", "mlp.experts."

Statistics = Mapping[str, Mapping[str, View]]


def importance(path: Path) -> Statistics:
    """Weight -> the importance of its inputs. Raises PlanError or CheckpointError for a file that is none of `calibrate`."""
    if not path.is_file():
        raise PlanError(f"{path}: is no file; make one with `ernie-quant calibrate SRC {path}`", [])
    found = {name: {IMPORTANCE: view} for ref in read_header(path) for name, view in _of(ref)}
    if not found:
        raise PlanError(f"{path}: holds no {STATISTIC}; it was not made by `ernie-quant calibrate`", [])
    return found


def misfits(found: Statistics, widths: Mapping[str, int], path: Path) -> Sequence[str]:
    """Where it is of another model: weights (name -> inputs) that it knows nothing of, and other widths."""
    problems = [
        f"{name}: has {width} inputs, {path.name} knows {found[name][IMPORTANCE].shape[0]}"
        for name, width in widths.items()
        if name in found and found[name][IMPORTANCE].shape[0] != width
    ]
    if not found.keys() & widths.keys():
        problems.append(f"{path.name}: is of another model, it names none of the weights that are quantized")
    return problems


def _of(ref: TensorRef) -> Iterator[tuple[str, View]]:
    """The weights that have these inputs."""
    if (found := NAME.fullmatch(ref.name)) is None or ref.spec.dtype != "F32":
        return
    place, point = found.groups()
    view = build.leaf(ref)
    if not point.startswith(EXPERTS):
        yield from ((f"{place}.{name}.weight", view) for name in _weights(point))
    elif len(ref.spec.shape) == 2:
        for number in range(ref.spec.shape[0]):
            for name in _weights(point.removeprefix(EXPERTS)):
                yield f"{place}.{EXPERTS}{number}.{name}.weight", build.pick(view, number)


def _weights(point: str) -> list[str]:
    if point == QKV:
        return [f"self_attn.{x}_proj" for x in "qkv"]
    before, _, last = point.rpartition(".")
    names = [f"{x}_proj" for x in ("gate", "up")] if last == GATE_UP else [last]
    return [f"{before}.{name}" if before else name for name in names]
