"""Layouts of names and weights: which stored tensors hold a row of the table, and the way back.

PT is the canonical one: a linear's weight is [out, in], one tensor per projection. Paddle stores linears as [in, out],
with q, k, v and gate, up in one tensor each. The others are only read: that of paddleformers is Paddle's with other first
parts of names and with q, k and v interleaved per kv head; those of transformers 5 are what it holds in memory, and saves with
`save_original_format=False` or as a state dict: the experts of a layer in one tensor [experts, out, in].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.codecs.keep import Keep
from ernie_quant.names import COPY, EXPERT_ROLES, TRANSPOSE, Dims, Op, Row, Rule, Weight, natural
from ernie_quant.runtimes import Linear
from ernie_quant.weights import in_memory, text


@dataclass(frozen=True)
class StoredTensor:
    """One stored tensor of a row: `op` makes the PT tensors `pt`, whose shapes are `shapes`, of it.

    With a `place` (i, n) it is number i of the n that are stacked in the tensor `name`; with `others` it lies in several
    tensors of one shape, to be joined along the first axis.
    """

    name: str
    op: Op
    pt: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    place: tuple[int, int] | None = None
    others: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored tensor, of each of them if there are others."""
        shape = self.op.stored_shape(self.shapes)
        if self.place is not None:
            return (self.place[1], *shape)
        return (shape[0] // (1 + len(self.others)), *shape[1:]) if self.others else shape


@dataclass(frozen=True)
class Layout:
    """Names and orientation of the stored tensors."""

    name: str
    title: str
    out_first: bool  # linears are stored [out, in], one tensor per projection
    root: str = "ernie."  # how the names of the model begin
    kv_groups: bool = False  # q, k and v take turns, a kv head at a time
    held: Callable[[str, str], tuple[str, ...]] | None = None  # transformers' names in memory of a PT tensor of a role
    turned_routers: bool = False  # stored transposed
    text_only: bool = False  # has no place for images and for multi-token prediction, and expects what is alike side by side

    def problem(self, dims: Dims) -> str:
        """Why attention cannot be read or written in this layout; empty if it can.

        With as many kv heads as heads Baidu's model code takes q, k and v from qkv_proj head by head, FastDeploy's loader
        one after the other (fastdeploy/model_executor/layers/linear.py): the same file is two models. By kv groups it is one.
        """
        if self.out_first or self.kv_groups or "KV" not in dims or dims["Q"] != dims["KV"]:
            return ""
        return (
            f"config.json: num_key_value_heads equals num_attention_heads ({dims['kv_heads']}): in Paddle's layout programs"
            " disagree about the order of q, k and v in qkv_proj then, and no ERNIE 4.5 release has it; PT files have them apart"
        )

    def stored(self, row: Row) -> list[StoredTensor]:
        """There: the stored tensors that hold a row of the table."""
        if self.held is not None:
            return self._in_memory(row, self.held)
        if self.out_first:
            return [StoredTensor(name, COPY, (name,), (shape,)) for name, shape in zip(row.pt, row.shapes, strict=True)]
        op = replace(row.rule.op, groups="kv_heads") if self.kv_groups and "KV" in row.rule.op.split else row.rule.op
        return [StoredTensor(re.sub(r"^ernie\.", self.root, row.paddle), op, row.pt, row.shapes)]

    def _in_memory(self, row: Row, held: Callable[[str, str], tuple[str, ...]]) -> list[StoredTensor]:
        role = row.rule.role
        if role in EXPERT_ROLES and row.pt[0].endswith(".weight"):  # gate, then up, of every expert
            return [StoredTensor(held(row.pt[0], role)[0], Op(split=row.rule.op.split), row.pt, row.shapes, row.place)]
        op = TRANSPOSE if self.turned_routers and ".gate.weight" in row.pt[0] else COPY
        tensors = []
        for name, shape in zip(row.pt, row.shapes, strict=True):
            first, *others = held(name, role)
            tensors.append(StoredTensor(first, op, (name,), (shape,), others=tuple(others)))
        return tensors

    def turns(self, rule: Rule) -> bool:
        """Is a kept weight of this rule stored as [in, out]?"""
        return rule.op.transpose and not self.out_first

    def linear(self, name: str, rule: Rule, codec: Codec, spec: TensorSpec) -> Linear:
        """A stored weight as a runtime sees it: [out, in], whatever the layout."""
        turned = isinstance(codec, Keep) and self.turns(rule)
        return Linear(name, TensorSpec(spec.shape[::-1], spec.dtype) if turned else spec, rule.role, codec, rule.ranks)

    def join(self, weights: Sequence[Weight]) -> list[Weight]:
        """And back: canonical weights under the names of this layout, in natural order."""
        assert self.name in LAYOUTS, "the other layouts are only read"
        if self.text_only:
            kept = text.only_text(weights, vl=text.is_vl(weights))
            return sorted(kept, key=lambda w: natural(_EXPERT.sub(r".experts.\2.\1", w.name)))
        if self.out_first:
            return list(weights)
        by_row: dict[str, list[Weight]] = {}
        for weight in weights:
            by_row.setdefault(weight.row.paddle, []).append(weight)
        joined = []
        for name, group in by_row.items():
            row = group[0].row
            pieces = {w.name: w.view for w in group}
            joined.append(Weight(name, row.rule.op.inverse([pieces[p] for p in row.pt]), row))
        return sorted(joined, key=lambda w: natural(w.name))

    def left_out(self, weights: Sequence[Weight]) -> list[str]:
        """Notes on what `join` drops."""
        return text.left_out(weights) if self.text_only else []


_EXPERT = re.compile(r"\.experts\.(\d+)\.(\w+)")
PT = Layout("pt", "PT", out_first=True)
PADDLE = Layout("paddle", "Paddle", out_first=False)
PADDLEFORMERS = Layout("paddleformers", "paddleformers (third layout)", out_first=False, root="model.", kv_groups=True)
FUSED = Layout("fused", "PT, experts of a layer fused (transformers 5)", out_first=True, held=in_memory.text)
FUSED_VL = Layout(
    "fused_vl", "PT, experts of a layer fused (transformers 5)", out_first=True, held=in_memory.vl, turned_routers=True
)
GGUF = Layout("gguf", "GGUF", out_first=True, text_only=True)
LAYOUTS = {layout.name: layout for layout in (PT, PADDLE, GGUF)}  # of results


def layout_of(names: Iterable[str]) -> Layout:
    """Which of them; only names tell (config keys have misled others)."""
    plain = fused = False
    for name in names:
        if name.startswith("ernie."):
            return PADDLE
        if in_memory.is_vl(name):
            return FUSED_VL
        plain = plain or (name.startswith("model.") and ".qkv_proj." in name)
        fused = fused or in_memory.is_stack(name)
    return FUSED if fused else PADDLEFORMERS if plain else PT
