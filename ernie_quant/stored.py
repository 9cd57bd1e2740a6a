"""The weights of a checkpoint that a runtime loads, plain or quantized: which stored tensors hold each, and how.

Nothing is taken from a report: names and shapes follow from the architecture's table, the form from config.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from ernie_quant import archs, names, views
from ernie_quant.checkpoint import Checkpoint, TensorRef, TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.codecs.keep import KEEP, Keep
from ernie_quant.names import NameMap, Row, Rule
from ernie_quant.views import Files, read

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Stored:
    """A weight: the row of the table, its shape ([out, in] where it is quantized), and the tensors that hold it."""

    name: str
    row: Row
    shape: tuple[int, ...]
    codec: Codec
    target: ModuleType
    parts: Mapping[str, TensorRef]

    @property
    def rule(self) -> Rule:
        """Its line of the table."""
        return self.row.rule

    @property
    def spec(self) -> TensorSpec:
        """Shape, and the dtype of the weight that decoding yields."""
        dtype = next(iter(self.parts.values())).spec.dtype if isinstance(self.codec, Keep) else "BF16"
        return TensorSpec(self.shape, dtype)

    def slabs(self) -> list[tuple[int, int]]:
        """Ranges of rows that can be decoded by themselves."""
        return views.slabs(self.spec, math.lcm(self.codec.rows, 1 if isinstance(self.codec, Keep) else self.target.ROWS))

    def read(self, files: Files, rows: tuple[int, int]) -> torch.Tensor:
        """Rows of the weight as the runtime will see them; `rows` as `slabs` gives them."""
        axes = part_axes(self.target, self.name, self.codec, self.spec, 0)
        out = self.shape[0] if self.shape else 1
        tensors = {}
        for name, ref in self.parts.items():
            view, axis = views.leaf(ref), axes[name]
            if axis is not None:
                size = view.shape[axis]
                view = views.cut(view, axis, rows[0] * size // out, -(-rows[1] * size // out))
            tensors[name] = read(view, files)
        decoded: torch.Tensor = self.codec.decode(self.target.unpack(self.name, self.codec, tensors))
        return decoded


def part_axes(target: ModuleType, name: str, codec: Codec, spec: TensorSpec, axis: int) -> dict[str, int | None]:
    """Along which of its axes each stored tensor grows with `axis` of the weight; None where it does not."""
    if not spec.shape:
        return dict.fromkeys(target.parts(name, codec, spec))
    shape = tuple(n * (128 if i == axis else 1) for i, n in enumerate(spec.shape))
    once, more = target.parts(name, codec, spec), target.parts(name, codec, TensorSpec(shape, spec.dtype))
    return {
        part: next((i for i, (a, b) in enumerate(zip(once[part].shape, more[part].shape, strict=True)) if a != b), None)
        for part in once
    }


def open_stored(checkpoint: Checkpoint, target: ModuleType) -> tuple[list[Stored], list[str]]:
    """Every weight that the table expects, and every disagreement. Raises ConfigError."""
    arch = archs.find(checkpoint.config)
    groups: dict[str, dict[str, TensorRef]] = {}
    for name, ref in checkpoint.refs.items():
        groups.setdefault(target.weight_of(name)[0], {})[name] = ref
    table: NameMap = arch.name_map(arch.flat(checkpoint.config), list(groups))
    expected = {name: (row, shape) for name, row, shape in _expected(table, target.LAYOUT)}
    linears = [
        (name, TensorSpec(shape, "BF16"))
        for name, (row, shape) in expected.items()
        if name in groups and names.is_layer(name, row.rule.role, shape)
    ]
    promise = checkpoint.config.get("quantization_config")
    codecs = target.codecs_of(promise, linears) if promise else {}
    stored: list[Stored] = []
    problems: list[str] = []
    for name, (row, shape) in expected.items():
        refs = groups.pop(name, None)
        if refs is None:
            if row.rule.need in ("always", *table.flags):
                problems.append(f"{name}: is missing")
            continue
        codec = codecs.get(name, KEEP) if row.rule.linear or target.LAYOUT == names.PT else KEEP
        turned = target.LAYOUT == names.PADDLE and not isinstance(codec, Keep)  # codecs work on [out, in]
        entry = Stored(name, row, shape[::-1] if turned else shape, codec, target, refs)
        problems += _spec_problems(entry)
        stored.append(entry)
    return stored, problems + [f"{name}: is unknown to this architecture" for refs in groups.values() for name in refs]


def _expected(table: NameMap, layout: str) -> Iterator[tuple[str, Row, tuple[int, ...]]]:
    for row in table.rows():
        if layout == names.PT:
            yield from ((name, row, shape) for name, shape in zip(row.pt, row.shapes, strict=True))
        else:
            yield row.paddle, row, row.stored_shape


def _spec_problems(entry: Stored) -> Iterator[str]:
    specs = entry.target.parts(entry.name, entry.codec, entry.spec)
    for name in sorted(specs.keys() | entry.parts.keys()):
        promised, found = specs.get(name), entry.parts.get(name)
        if found is None or promised is None or found.spec != promised:
            yield (
                f"{name}: is {_words(found.spec if found else None)}, config.json"
                f" ({entry.codec.describe()}) wants {_words(promised)}"
            )


def _words(spec: TensorSpec | None) -> str:
    return f"{spec.dtype} {spec.shape}" if spec else "not there"
