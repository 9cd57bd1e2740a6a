"""The file of statistics: which tensors are in it, of what shapes, and the way to write them layer after layer.

`PLACE.STATISTIC`, float32, where PLACE is `model.layers.N.` and one of the points of `forward.Observe`; experts are stacked:
`mlp.experts.gate_up` and `mlp.experts.down_proj` are [E, width].

    second_moment  mean of x^2 over the tokens that were seen, per channel
    max_abs        largest |x|, per channel; of `self_attn.k` and `self_attn.v` this alone
    hessian        mean of x' x, [width, width]; of the inputs that many outputs share, if it was asked for
    tokens         int64 [E], of `mlp.experts`: tokens that were routed to each expert
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ernie_quant.calibration import forward
from ernie_quant.calibration.model import Model

from ernie_quant import writers
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.errors import OutputError
from ernie_quant.writers import ShardWriter

if TYPE_CHECKING:
    import torch

SECOND, LARGEST, HESSIAN, TOKENS = "second_moment", "max_abs", "hessian", "tokens"
GATE_UP, DOWN = "gate_up", "down_proj"
EXPERTS = "mlp.experts"
CACHED = (forward.KEYS, forward.VALUES)
FORMAT = "ernie-quant statistics 1"
ROUTED = frozenset({f"{EXPERTS}.{GATE_UP}", f"{EXPERTS}.{DOWN}"})  # stacked points


def widths(model: Model, layer: int) -> dict[str, int]:
    """Point -> width of its inputs, in one layer."""
    geometry, place = model.geometry, f"model.layers.{layer}"
    hidden, heads = geometry.hidden_size, geometry.attention
    found = {forward.QKV: hidden, forward.O_PROJ: heads.heads * heads.head_dim}
    found |= dict.fromkeys(CACHED, heads.kv_heads * heads.head_dim)
    sparse = layer in geometry.sparse
    if sparse:
        found[forward.ROUTER] = hidden
    named = [(EXPERTS, f"{EXPERTS}.0")] if sparse else [(forward.DENSE, forward.DENSE)]
    named += [(forward.SHARED, forward.SHARED)] if sparse and geometry.shared else []
    for point, name in named:
        inner = model.weights[f"{place}.{name}.{DOWN}.weight"].view.shape[1]
        found |= {f"{point}.{GATE_UP}": hidden, f"{point}.{DOWN}": inner}
    return found


def has_hessian(point: str, sparse: bool) -> bool:
    """Is it an input that many outputs share, and not a very wide one?"""
    return point in (forward.QKV, forward.O_PROJ, forward.ROUTER if sparse else f"{forward.DENSE}.{GATE_UP}")


def specs_of(model: Model, matrices: bool) -> dict[str, TensorSpec]:
    """All tensors of the file."""
    found: dict[str, TensorSpec] = {}
    for layer in range(model.geometry.layers):
        for point, width in widths(model, layer).items():
            place, stack = f"model.layers.{layer}.{point}", (len(model.experts),) if point in ROUTED else ()
            for statistic in (LARGEST,) if point in CACHED else (SECOND, LARGEST):
                found[f"{place}.{statistic}"] = TensorSpec((*stack, width), "F32")
            if matrices and has_hessian(point, layer in model.geometry.sparse):
                found[f"{place}.{HESSIAN}"] = TensorSpec((width, width), "F32")
        if layer in model.geometry.sparse:
            found[f"model.layers.{layer}.{EXPERTS}.{TOKENS}"] = TensorSpec((len(model.experts),), "I64")
    return found


class Sums:
    """Of one layer, as its inputs come by: an `Observe`."""

    def __init__(self, model: Model, layer: int, matrices: bool) -> None:
        import torch

        self.layer, self.count = layer, len(model.experts)
        self.second: dict[str, torch.Tensor] = {}
        self.largest: dict[str, torch.Tensor] = {}
        self.seen: dict[str, torch.Tensor] = {}  # tokens
        self.hessian: dict[str, torch.Tensor] = {}
        self.routed = torch.zeros(self.count, dtype=torch.int64)
        for point, width in widths(model, layer).items():
            rows = self.count if point in ROUTED else 1
            self.largest[point], self.seen[point] = torch.zeros(rows, width), torch.zeros(rows, dtype=torch.int64)
            if point not in CACHED:
                self.second[point] = torch.zeros(rows, width, dtype=torch.float64)
            if matrices and has_hessian(point, layer in model.geometry.sparse):
                self.hessian[point] = torch.zeros(width, width)

    def __call__(self, point: str, inputs: torch.Tensor, heard: torch.Tensor | None, /) -> None:
        """Inputs [tokens, width] of a point; those of experts that are not asked have heard 0."""
        point, row = self._stacked(point)
        self.seen[point][row] += len(inputs)
        self.largest[point][row] = inputs.abs().amax(0).maximum(self.largest[point][row])
        if point in self.second:
            self.second[point][row] += inputs.square().sum(0)
        if point in self.hessian:
            self.hessian[point].addmm_(inputs.T, inputs)
        if heard is not None and point == f"{EXPERTS}.{GATE_UP}":
            self.routed[row] += int((heard > 0).sum())

    @staticmethod
    def _stacked(point: str) -> tuple[str, int]:
        """`mlp.experts.3.gate_up` -> `mlp.experts.gate_up`, 3."""
        if not point.startswith(f"{EXPERTS}."):
            return point, 0
        number, _, what = point.removeprefix(f"{EXPERTS}.").partition(".")
        return f"{EXPERTS}.{what}", int(number)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value, of all that the file has of this layer; zeros of experts that saw nothing."""
        place = f"model.layers.{self.layer}"
        for point, largest in self.largest.items():
            seen = self.seen[point].clamp(min=1)[:, None]
            found = {LARGEST: largest}
            if point in self.second:
                found[SECOND] = (self.second[point] / seen).float()
            for statistic, value in found.items():
                yield f"{place}.{point}.{statistic}", value if point in ROUTED else value[0]
            if point in self.hessian:
                yield f"{place}.{point}.{HESSIAN}", self.hessian[point] / seen[0]
        if self.count and f"{EXPERTS}.{GATE_UP}" in self.seen:
            yield f"{place}.{EXPERTS}.{TOKENS}", self.routed


def check_place(out: Path) -> None:
    """Can the file be written there? Raises OutputError."""
    extension = writers.find("safetensors").EXTENSION
    if out.suffix != extension:
        raise OutputError(f"{out}: statistics are a file that ends with {extension}")
    if out.exists():
        raise OutputError(f"{out}: is there already; choose another name, or remove it")
    if not out.parent.is_dir():
        raise OutputError(f"{out}: there is no folder {out.parent}")


def begun(out: Path, specs: dict[str, TensorSpec], metadata: dict[str, str]) -> ShardWriter:
    """A file that gets its name when it is closed, and leaves nothing behind if it is not."""
    kind = writers.find("safetensors")
    ordered = kind.order(specs)
    return ShardWriter(out, ordered, kind.lay_out(ordered, {"format": FORMAT, **metadata}))
