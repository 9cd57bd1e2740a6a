"""The weights of a checkpoint that a runtime loads, plain or quantized: which stored tensors hold each, and how.

Nothing is taken from a report: names and shapes follow from the architecture's table, the form from config.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ernie_quant import archs, names, plugins, runtimes
from ernie_quant.checkpoint import Checkpoint, TensorRef, TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.codecs.keep import KEEP, Keep
from ernie_quant.devices import CPU
from ernie_quant.errors import PlanError
from ernie_quant.names import NameMap, Row, Rule, Weight
from ernie_quant.runtimes import Linear, Part, Runtime
from ernie_quant.views import build
from ernie_quant.views.files import Files
from ernie_quant.views.kinds import Decoded, View, spec_of
from ernie_quant.views.read import read, slabs
from ernie_quant.weights import claims, ranks
from ernie_quant.weights.layouts import LAYOUTS, Layout
from ernie_quant.weights.plain import Resolved

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded


@dataclass(frozen=True)
class Stored:
    """A weight: the row of the table, its spec ([out, in] where it is quantized), and the tensors that hold it."""

    name: str
    row: Row
    spec: TensorSpec
    codec: Codec
    runtime: str
    parts: Mapping[str, View]

    @property
    def rule(self) -> Rule:
        """Its line of the table."""
        return self.row.rule

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.spec.shape

    @property
    def target(self) -> Runtime:
        """The runtime whose files these are."""
        return runtimes.find(self.runtime)

    @property
    def layout(self) -> Layout:
        """How it is stored."""
        return LAYOUTS[self.target.LAYOUT]

    @cached_property
    def expected(self) -> dict[str, Part]:
        """The stored tensors that the runtime asks for."""
        return self.target.parts(self.name, self.codec, self.spec)

    def shares(self, part: str) -> ranks.Shares:
        """How ranks share one of its stored tensors; one that the runtime does not know is everybody's."""
        if part not in self.expected:
            return ranks.WHOLE
        turned = isinstance(self.codec, Keep) and self.layout.turns(self.rule) and len(self.shape) > 1
        return ranks.shares_of(self.expected[part], self.rule, turned=turned)

    def slabs(self, nbytes: int | None = None) -> list[tuple[int, int]]:
        """Ranges of rows that can be decoded by themselves, of about so many bytes of the weight, or SLAB_BYTES."""
        return slabs(self.spec, math.lcm(self.codec.rows, 1 if isinstance(self.codec, Keep) else self.target.ROWS), nbytes)

    def read(self, files: Files, rows: tuple[int, int], device: str = CPU) -> torch.Tensor:
        """Rows of the weight as the runtime will see them; `rows` as `slabs` gives them."""
        return self.codec.decode(self.encoded(files, rows, device))

    def encoded(self, files: Files, rows: tuple[int, int], device: str = CPU) -> Encoded:
        """The codec's fields for these rows."""
        return self.target.unpack(self.name, self.codec, self.packed(files, rows, device))

    def packed(self, files: Files, rows: tuple[int, int], device: str = CPU) -> dict[str, torch.Tensor]:
        """The stored tensors of these rows."""
        out = self.shape[0] if self.shape else 1
        tensors = {}
        for name, view in self.parts.items():
            part = self.expected[name]
            if part.out_axis is not None:
                view = build.cut(view, part.out_axis, *part.span(rows, out))
            tensors[name] = read(view, files, device=device)
        return tensors


def linears_of(entries: Sequence[Stored]) -> list[Linear]:
    """The layers that a runtime's configuration speaks of."""
    layers = [e for e in entries if names.is_layer(e.name, e.rule.role, e.shape, vocabulary=e.target.QUANTIZES_VOCABULARY)]
    return [e.layout.linear(e.name, e.rule, e.codec, e.spec) for e in layers]


def table_of(checkpoint: Checkpoint, target: Runtime) -> NameMap:
    """The table of a checkpoint whose weights are stored as `target` wants them. Raises ConfigError."""
    arch = archs.find(checkpoint.config)
    return arch.name_map(arch.flat(checkpoint.config), [target.weight_of(name)[0] for name in checkpoint.refs])


def open_stored(checkpoint: Checkpoint, target: Runtime) -> tuple[list[Stored], list[str]]:
    """Every weight that the table expects, and every disagreement. Raises ConfigError."""
    table, layout = table_of(checkpoint, target), LAYOUTS[target.LAYOUT]
    if problem := table.size_problem(len(checkpoint.refs)) or layout.problem(table.dims):
        return [], [problem]
    groups, problems = _by_weight(checkpoint, target)
    expected = {tensor.name: (row, tensor.shape) for row in table.rows() for tensor in layout.stored(row)}
    codecs = _promised(checkpoint, target, expected, groups)
    stored: list[Stored] = []
    used: set[str] = set()
    for name, (row, shape) in expected.items():
        refs = groups.get(name) or groups.get(names.starred(name))
        if refs is None:
            if row.rule.need in ("always", *table.flags):
                problems.append(f"{name}: is missing")
            continue
        codec = codecs.get(name, KEEP) if row.rule.linear or layout.out_first else KEEP
        kept = isinstance(codec, Keep)
        used |= {*refs}
        dtype = next(iter(refs.values()))[0].spec.dtype if kept else codec.decodes_to
        turned = not (kept or layout.out_first)  # codecs work on [out, in]
        entry = Stored(
            name, row, TensorSpec(shape[::-1] if turned else shape, dtype), codec, plugins.name_of(target, runtimes), {}
        )
        views = {part: _joined(entry, part, copies, table.dims) for part, copies in refs.items()}
        problems += _stack_problems(entry, refs)
        entry = replace(entry, parts=views)
        problems += _spec_problems(entry)
        stored.append(entry)
    unknown = sorted((name for refs in groups.values() for name in refs if name not in used), key=names.natural)
    return stored, [f"{name}: is unknown to this architecture" for name in unknown] + problems


def _by_weight(checkpoint: Checkpoint, target: Runtime) -> tuple[dict[str, dict[str, list[TensorRef]]], list[str]]:
    """Weight -> its stored tensors -> their copies in the ranks; and where ranks disagree."""
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
    return groups, problems


def _promised(
    checkpoint: Checkpoint, target: Runtime, expected: Mapping[str, tuple[Row, tuple[int, ...]]], there: Mapping[str, Any]
) -> dict[str, Codec]:
    """What config.json says of the linears that are there. Raises ConfigError."""
    promise = checkpoint.config.get("quantization_config")
    linears = [
        (name, TensorSpec(shape, "BF16"))
        for name, (row, shape) in expected.items()
        if (name in there or names.starred(name) in there)
        and names.is_layer(name, row.rule.role, shape, vocabulary=target.QUANTIZES_VOCABULARY)
    ]
    return target.codecs_of(promise, linears) if promise else {}


def _joined(entry: Stored, part: str, copies: Sequence[TensorRef], dims: ranks.Dims) -> View:
    if part in entry.expected and (index := entry.expected[part].index) is not None:
        return build.pick(build.leaf(copies[0]), index)
    if entry.shape[:1] == (1,) and copies[0].spec.shape == entry.shape[1:]:  # one row, stored without a first axis
        copies = [replace(ref, spec=TensorSpec(entry.shape, ref.spec.dtype)) for ref in copies]
    return ranks.join([build.leaf(ref) for ref in copies], entry.shares(part), dims)


def _stack_problems(entry: Stored, refs: Mapping[str, Sequence[TensorRef]]) -> Iterator[str]:
    """A stack has as many weights as the table; said with the first of them."""
    number, of = entry.row.place
    for part, copies in refs.items():
        shape = copies[0].spec.shape
        if number == 0 and part in entry.expected and entry.expected[part].index is not None and shape[0] != of:
            yield f"{part}: holds {shape[0]} weights, the model has {of} experts"


QUANTIZED = ("quantization_config", "is_quantized", "tensor_parallel_size")  # keys of config.json of a quantized checkpoint


def runtime_of(checkpoint: Checkpoint) -> Runtime:
    """The runtime whose files these are, by quantization_config. Raises PlanError or ConfigError."""
    promise = checkpoint.config.get("quantization_config")
    if not isinstance(promise, dict) or not promise:
        raise PlanError(f"{checkpoint.folder}: is not quantized (config.json has no quantization_config); convert it", [])
    if claims.leftover(checkpoint):
        raise PlanError(
            f"{checkpoint.folder}: is not quantized (config.json has quantization_config, but every tensor is plain); convert it",
            [],
        )
    return runtimes.recognize(promise)


def resolve_quantized(checkpoint: Checkpoint) -> Resolved:
    """As `plain.resolve`, of a quantized checkpoint: its weights are decoded when read. Raises PlanError or ConfigError."""
    target = runtime_of(checkpoint)
    entries, problems = open_stored(checkpoint, target)
    arch, name_map = archs.find(checkpoint.config), table_of(checkpoint, target)
    config = {key: value for key, value in arch.flat(checkpoint.config).items() if key not in QUANTIZED}
    return Resolved(
        arch, config, name_map, _canonical(entries, name_map), [*checkpoint.anomalies, *problems], LAYOUTS[target.LAYOUT]
    )


def _canonical(stored: Sequence[Stored], table: NameMap) -> list[Weight]:
    """The weights in PT form, to be decoded when they are read."""
    found = []
    for entry in stored:
        kept, layout = isinstance(entry.codec, Keep), entry.layout
        view: View = next(iter(entry.parts.values())) if kept else Decoded(entry)
        if layout.out_first:
            found.append(Weight(entry.name, view, entry.row))
            continue
        pieces = entry.rule.op.apply(view if kept else build.transpose(view), table.dims)
        found += [Weight(name, piece, entry.row) for name, piece in zip(entry.row.pt, pieces, strict=True)]
    return sorted(found, key=lambda w: names.natural(w.name))


def _spec_problems(entry: Stored) -> Iterator[str]:
    promised = {name: part.spec.held for name, part in entry.expected.items()}
    there = {name: spec_of(view) for name, view in entry.parts.items()}
    for name in sorted(promised.keys() | there.keys()):
        if there.get(name) != promised.get(name):
            said = f"config.json ({entry.codec.describe()}) wants {_words(promised.get(name))}"
            yield f"{name}: is {_words(there.get(name))}, {said}"


def _words(spec: TensorSpec | None) -> str:
    return f"{spec.dtype} {spec.shape}" if spec else "not there"
