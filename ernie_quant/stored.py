"""The weights of a checkpoint that a runtime loads, plain or quantized: which stored tensors hold each, and how.

Nothing is taken from a report: names and shapes follow from the architecture's table, the form from config.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING

from ernie_quant import archs, names, ranks, runtimes, views
from ernie_quant.checkpoint import Checkpoint, TensorRef, TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.codecs.keep import KEEP, Keep
from ernie_quant.errors import PlanError
from ernie_quant.lazy import Decoded, View
from ernie_quant.names import NameMap, Row, Rule, Weight
from ernie_quant.views import Files, read

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded


@dataclass(frozen=True)
class Stored:
    """A weight: the row of the table, its shape ([out, in] where it is quantized), and the tensors that hold it."""

    name: str
    row: Row
    shape: tuple[int, ...]
    codec: Codec
    target: ModuleType
    parts: Mapping[str, View]

    @property
    def rule(self) -> Rule:
        """Its line of the table."""
        return self.row.rule

    @property
    def spec(self) -> TensorSpec:
        """Shape, and the dtype of the weight that decoding yields."""
        dtype = next(iter(self.parts.values())).dtype if isinstance(self.codec, Keep) else "BF16"
        return TensorSpec(self.shape, dtype)

    @property
    def spec_of_codec(self) -> TensorSpec:
        """Shape and the dtype that codecs decode to."""
        return TensorSpec(self.shape, "BF16")

    def slabs(self) -> list[tuple[int, int]]:
        """Ranges of rows that can be decoded by themselves."""
        return views.slabs(self.spec, math.lcm(self.codec.rows, 1 if isinstance(self.codec, Keep) else self.target.ROWS))

    def read(self, files: Files, rows: tuple[int, int]) -> torch.Tensor:
        """Rows of the weight as the runtime will see them; `rows` as `slabs` gives them."""
        return self.codec.decode(self.encoded(files, rows))

    def encoded(self, files: Files, rows: tuple[int, int]) -> Encoded:
        """The codec's fields for these rows."""
        axes = ranks.part_axes(self.target, self.name, self.codec, self.spec, 0)
        out = self.shape[0] if self.shape else 1
        tensors = {}
        for name, view in self.parts.items():
            axis = axes[name]
            if axis is not None:
                size = view.shape[axis]
                view = views.cut(view, axis, rows[0] * size // out, -(-rows[1] * size // out))
            tensors[name] = read(view, files)
        fields: Encoded = self.target.unpack(self.name, self.codec, tensors)
        return fields


def table_of(checkpoint: Checkpoint, target: ModuleType) -> NameMap:
    """The table of a checkpoint whose weights are stored as `target` wants them. Raises ConfigError."""
    arch = archs.find(checkpoint.config)
    table: NameMap = arch.name_map(arch.flat(checkpoint.config), [target.weight_of(name)[0] for name in checkpoint.refs])
    return table


def open_stored(checkpoint: Checkpoint, target: ModuleType) -> tuple[list[Stored], list[str]]:
    """Every weight that the table expects, and every disagreement. Raises ConfigError."""
    table = table_of(checkpoint, target)
    if problem := table.disbelieved(len(checkpoint.refs)):
        return [], [problem]
    groups: dict[str, dict[str, list[TensorRef]]] = {}
    problems: list[str] = []
    for name in dict.fromkeys(name for rank in checkpoint.ranks for name in rank.refs):
        copies = [rank.refs[name] for rank in checkpoint.ranks if name in rank.refs]
        if len(copies) < len(checkpoint.ranks):
            problems.append(f"{name}: is in {len(copies)} of {len(checkpoint.ranks)} ranks")
        else:
            if odd := next((i for i, ref in enumerate(copies) if ref.spec != copies[0].spec), 0):
                problems.append(f"{name}: is {_words(copies[0].spec)} in rank 0, {_words(copies[odd].spec)} in rank {odd}")
                copies = [copies[0]] * len(copies)
            groups.setdefault(target.weight_of(name)[0], {})[name] = copies
    expected = {name: (row, shape) for name, row, shape in _expected(table, target.LAYOUT)}
    linears = [
        (name, TensorSpec(shape, "BF16"))
        for name, (row, shape) in expected.items()
        if name in groups and names.is_layer(name, row.rule.role, shape)
    ]
    promise = checkpoint.config.get("quantization_config")
    codecs = target.codecs_of(promise, linears) if promise else {}
    stored: list[Stored] = []
    for name, (row, shape) in expected.items():
        refs = groups.pop(name, None)
        if refs is None:
            if row.rule.need in ("always", *table.flags):
                problems.append(f"{name}: is missing")
            continue
        codec = codecs.get(name, KEEP) if row.rule.linear or target.LAYOUT == names.PT else KEEP
        turned = target.LAYOUT == names.PADDLE and not isinstance(codec, Keep)  # codecs work on [out, in]
        whole = Stored(name, row, shape[::-1] if turned else shape, codec, target, {})
        entry = replace(whole, parts={part: ranks.join(whole, part, copies, table.dims) for part, copies in refs.items()})
        problems += _spec_problems(entry)
        stored.append(entry)
    return stored, problems + [f"{name}: is unknown to this architecture" for refs in groups.values() for name in refs]


QUANTIZED = ("quantization_config", "is_quantized", "tensor_parallel_size")  # keys of config.json of a quantized checkpoint


def runtime_of(checkpoint: Checkpoint) -> ModuleType:
    """The runtime whose files these are, by quantization_config. Raises PlanError."""
    promise = checkpoint.config.get("quantization_config")
    if not isinstance(promise, dict) or not promise:
        raise PlanError(f"{checkpoint.folder}: is not quantized (config.json has no quantization_config); convert it", [])
    return runtimes.find("fastdeploy" if "quantization" in promise else "vllm")


def canonical(stored: Sequence[Stored], table: NameMap) -> list[Weight]:
    """The weights in PT form, to be decoded when they are read."""
    found = []
    for entry in stored:
        view: View = Decoded(entry)
        if isinstance(entry.codec, Keep):
            view = next(iter(entry.parts.values()))
        if entry.target.LAYOUT == names.PT:
            found.append(Weight(entry.name, view, entry.row))
            continue
        if not isinstance(entry.codec, Keep):
            view = views.transpose(view)
        pieces = entry.rule.op.apply(view, table.dims)
        found += [Weight(name, piece, entry.row) for name, piece in zip(entry.row.pt, pieces, strict=True)]
    return sorted(found, key=lambda w: names.natural(w.name))


def _expected(table: NameMap, layout: str) -> Iterator[tuple[str, Row, tuple[int, ...]]]:
    for row in table.rows():
        if layout == names.PT:
            yield from ((name, row, shape) for name, shape in zip(row.pt, row.shapes, strict=True))
        else:
            yield row.paddle, row, row.stored_shape


def _spec_problems(entry: Stored) -> Iterator[str]:
    specs = entry.target.parts(entry.name, entry.codec, entry.spec)
    for name in sorted(specs.keys() | entry.parts.keys()):
        promised, part = specs.get(name), entry.parts.get(name)
        found = views.spec_of(part) if part else None
        if found != promised:
            yield (f"{name}: is {_words(found)}, config.json ({entry.codec.describe()}) wants {_words(promised)}")


def _words(spec: TensorSpec | None) -> str:
    return f"{spec.dtype} {spec.shape}" if spec else "not there"
