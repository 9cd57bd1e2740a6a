"""What a quantized checkpoint is, for a person: the form of its weights, by role. Headers and config.json only.

Of files that this program writes the form is that of config.json, and every tensor is compared with it. Of others it is
what the stored sizes show: bits of the codes, and how many weights share a scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ernie_quant import archs, names, plugins, runtimes
from ernie_quant.checkpoint import Checkpoint, TensorRef
from ernie_quant.codecs.ccq import GROUP, ConvolutionalCode
from ernie_quant.codecs.keep import Keep
from ernie_quant.dtypes import FLOATS
from ernie_quant.errors import ConfigError, PlanError, line_of
from ernie_quant.names import NameMap
from ernie_quant.views.kinds import spec_of
from ernie_quant.weights.layouts import LAYOUTS, Layout, layout_of
from ernie_quant.weights.stored import Stored, open_stored, runtime_of, table_of


@dataclass(frozen=True)
class Form:
    """Weights of one role that are stored alike; `numel` elements in `nbytes`, scales included."""

    role: str
    form: str
    weights: int
    numel: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element."""
        return 8 * self.nbytes / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class Described:
    """A quantized checkpoint: what it is called, its table, forms, problems and notes."""

    title: str
    layout: Layout
    table: NameMap
    forms: tuple[Form, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()


def describe(checkpoint: Checkpoint) -> Described:
    """Look at a quantized checkpoint, whoever made it. Raises ConfigError."""
    try:
        target = runtime_of(checkpoint)
        entries, problems = open_stored(checkpoint, target)
    except (PlanError, ConfigError) as error:
        return _foreign(checkpoint, str(error))
    found = [
        (
            entry.rule.role, _words_of(entry), entry.spec.numel,
            sum(spec_of(view).nbytes for view in entry.parts.values()),
        )
        for entry in entries
    ]  # fmt: skip
    return Described(
        method(checkpoint, plugins.name_of(target, runtimes)),
        LAYOUTS[target.LAYOUT],
        table_of(checkpoint, target),
        _grouped(found),
        tuple(problems),
    )


def _words_of(entry: Stored) -> str:
    if isinstance(entry.codec, Keep):
        return entry.spec.dtype
    return f"{entry.codec.form}, group {GROUP}" if isinstance(entry.codec, ConvolutionalCode) else entry.codec.form


def _foreign(checkpoint: Checkpoint, why: str) -> Described:
    arch, layout = archs.find(checkpoint.config), layout_of(checkpoint.refs)
    table = arch.name_map(arch.flat(checkpoint.config), list(checkpoint.refs))
    if problem := table.size_problem(len(checkpoint.refs)):
        return Described(method(checkpoint), layout, table, (), (problem,))
    modules = {t.name.removesuffix(".weight"): (row, t) for row in table.rows() for t in layout.stored(row)}
    parts, unknown = _by_module(checkpoint, modules)
    problems = [
        f"{tensor.name}: is missing"
        for module, (row, tensor) in modules.items()
        if module not in parts and row.rule.need in ("always", *table.flags)
    ]
    found = []
    for module, stored in parts.items():
        row, tensor = modules[module]
        numel = 1
        for size in tensor.shape:
            numel *= size
        found.append((row.rule.role, _form(stored, numel), numel, sum(ref.spec.nbytes for ref in stored)))
    more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    notes = [f"of no weight that is known: {unknown[0]}{more}"] if unknown else []
    notes.append(f"what it is was taken from the sizes of its tensors; no command here reads it: {why}")
    return Described(method(checkpoint), layout, table, _grouped(found), tuple(problems), tuple(map(line_of, notes)))


def stored_bytes(checkpoint: Checkpoint) -> tuple[NameMap, list[tuple[str, str, int]]]:
    """Of a checkpoint whose tensors no command understands: its table, and (name, role, bytes) of every module that has any.

    Raises ConfigError for one whose names are not an ERNIE model's.
    """
    arch, layout = archs.find(checkpoint.config), layout_of(checkpoint.refs)
    table = arch.name_map(arch.flat(checkpoint.config), list(checkpoint.refs))
    if problem := table.size_problem(len(checkpoint.refs)):
        raise ConfigError(problem)
    modules = {t.name.removesuffix(".weight"): row.rule.role for row in table.rows() for t in layout.stored(row)}
    parts, _ = _by_module(checkpoint, modules)
    found = [(module, modules[module], sum(ref.spec.nbytes for ref in stored)) for module, stored in parts.items()]
    if not found:
        raise ConfigError(f"{checkpoint.folder}: none of its tensors belongs to a weight that is known")
    return table, found


def _by_module(checkpoint: Checkpoint, modules: Mapping[str, object]) -> tuple[dict[str, list[TensorRef]], list[str]]:
    """Stored tensors, of all ranks, by the weight that they are a part of; and those of none."""
    parts: dict[str, list[TensorRef]] = {}
    unknown: list[str] = []
    for ref in (ref for rank in checkpoint.ranks for ref in rank.refs.values()):
        module = ref.name
        while module not in modules and "." in module:
            module = module.rpartition(".")[0]
        if module in modules:
            parts.setdefault(module, []).append(ref)
        elif ref.name not in unknown:
            unknown.append(ref.name)
    return parts, unknown


def _form(stored: Sequence[TensorRef], numel: int) -> str:
    """`int4, group 128`, from the bytes of the codes and the number of scales."""
    codes = max(stored, key=lambda ref: ref.spec.nbytes)
    if codes.spec.dtype in FLOATS:
        return codes.spec.dtype
    bits = round(8 * sum(ref.spec.nbytes for ref in stored if ref.name == codes.name) / numel, 2)
    kind = "float" if codes.spec.dtype.startswith("F8") else "int"
    others = [ref for ref in stored if ref.name != codes.name and ref.spec.dtype in FLOATS]
    scales = max((sum(r.spec.numel for r in others if r.name == ref.name) for ref in others), default=0)
    return f"{kind}{bits:g}, " + (f"a scale per {numel // scales} weights" if scales else "no scales")


def _grouped(found: Sequence[tuple[str, str, int, int]]) -> tuple[Form, ...]:
    """One line for each role and form, in the order of roles."""
    lines: dict[tuple[str, str], list[int]] = {}
    for role, form, numel, nbytes in found:
        entry = lines.setdefault((role, form), [0, 0, 0])
        for i, value in enumerate((1, numel, nbytes)):
            entry[i] += value
    order = sorted(lines, key=lambda key: (names.ROLES.index(key[0]), key[1]))
    return tuple(Form(*key, *lines[key]) for key in order)


def method(checkpoint: Checkpoint, runtime: str = "") -> str:
    """What config.json calls it, and which program's files these are where that is known."""
    said = ", ".join(_words(checkpoint.config.get("quantization_config"))) or "config.json does not say how"
    return line_of(f"quantized{f' for {runtime}' if runtime else ''} ({said:.200})")


def _words(promise: object) -> Iterator[str]:
    if isinstance(promise, dict):
        for key in ("quant_method", "format", "quantization", "moe_quant_type", "dense_quant_type"):
            if isinstance(promise.get(key), str):
                yield promise[key]
