"""Does a model fit on GPUs, and how: the fewest that have room for it, or what a given number of them has room for.

usable bytes of a GPU = utilization x memory - reserve; GPUs fit if the share of the weights and the KV cache of one sequence
of max_model_len of each of them do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ernie_quant.planning.gpus import GIB, Gpu, Limits
from ernie_quant.planning.held import Held, Model
from ernie_quant.runtimes import Spread

MOST_GPUS = 16


@dataclass(frozen=True)
class Fit:
    """A model on GPUs of one kind; sizes in bytes. `why` says what is missing where it does not fit: then `gpus` is 0.

    `stages` is a way with fewer GPUs, that have some of the layers each.
    """

    gpu: str
    memory: int
    gpus: int = 0
    spread: Spread | None = None
    weight_bytes_per_gpu: int = 0
    kv_bytes_per_gpu: int = 0  # of one sequence of max_model_len
    sequences: int = 0  # of max_model_len, at most max_num_seqs
    context: int = 0  # tokens of one sequence alone, at most what the model was made for
    tokens_per_second: float = 0.0  # of one sequence: a bound from bytes and bandwidth, 0 where that is not known
    stages: Spread | None = None
    why: str = ""


@dataclass(frozen=True)
class _Load:
    """What one way of sharing asks of the fullest GPU."""

    spread: Spread
    weights: float
    kv: float  # per token
    room: float

    def sequences(self, limits: Limits) -> int:
        """Of max_model_len."""
        return min(limits.max_num_seqs, max(0, int(self.room // (self.kv * limits.max_model_len))))


def fewest(held: Held, spreads: Sequence[Spread], model: Model, gpu: Gpu, limits: Limits) -> Fit:
    """The first of `spreads` that has room, without stages if any such has; they come in order of GPUs."""
    loads = [_load(held, spread, model, gpu, limits) for spread in spreads]
    fitting = [load for load in loads if load.sequences(limits)]
    plain = next((load for load in fitting if load.spread.stages == 1), None)
    staged = next((load for load in fitting if load.spread.stages > 1), None)
    if plain is None:
        found = staged
        staged = None
    else:
        found = plain
        staged = staged if staged and staged.spread.gpus < plain.spread.gpus else None
    if found is None:
        return Fit(gpu.name, gpu.memory, why=_why(loads, gpu, limits))
    return _fit(found, held, model, gpu, limits, staged.spread if staged else None)


def on(held: Held, spreads: Iterable[Spread], model: Model, gpu: Gpu, limits: Limits, count: int) -> Fit:
    """What so many GPUs have room for, shared in the way that leaves most for the KV cache."""
    loads = [_load(held, spread, model, gpu, limits) for spread in spreads if spread.gpus == count]
    if not loads:
        return Fit(gpu.name, gpu.memory, why=f"its heads and widths cannot be shared by {count} GPUs")
    best = max(loads, key=lambda load: (load.sequences(limits), load.room / load.kv, -load.spread.stages))
    if best.room < best.kv:
        return Fit(gpu.name, gpu.memory, why=_why(loads, gpu, limits))
    return _fit(best, held, model, gpu, limits)


def missing(held: Held, spreads: Iterable[Spread], model: Model, gpu: Gpu, limits: Limits, count: int) -> float:
    """Bytes that weights are too large by, for so many GPUs to have room for one sequence too; below 0 there is more room.

    Infinite where they cannot share the model.
    """
    loads = [_load(held, spread, model, gpu, limits) for spread in spreads if spread.gpus == count]
    return min((count * (load.kv * limits.max_model_len - load.room) for load in loads), default=math.inf)


def _load(held: Held, spread: Spread, model: Model, gpu: Gpu, limits: Limits) -> _Load:
    """Of the stage with the least room for a sequence."""
    found = []
    for weights, layers in held.stages(spread, model.experts):
        kv = model.kv_bytes(limits.kv_dtype, spread, max(layers, 1))
        found.append(_Load(spread, weights, kv, limits.usable(gpu) - weights))
    return min(found, key=lambda load: load.room / load.kv)


def _fit(load: _Load, held: Held, model: Model, gpu: Gpu, limits: Limits, stages: Spread | None = None) -> Fit:
    spread = load.spread
    heaviest = max(weights for weights, _ in held.stages(spread, model.experts))
    speed = gpu.bandwidth / held.read_per_token(spread, model)
    return Fit(
        gpu.name, gpu.memory, spread.gpus, spread, int(heaviest), int(load.kv * limits.max_model_len),
        load.sequences(limits), min(model.context, int(load.room // load.kv)), round(speed, 1), stages,
    )  # fmt: skip


def _why(loads: Sequence[_Load], gpu: Gpu, limits: Limits) -> str:
    """How far the best way is from fitting."""
    if not loads:
        return "its widths are none that the kernels take"
    best = max(loads, key=lambda load: load.room - load.kv * limits.max_model_len)
    many = f"{best.spread.gpus} GPUs ({best.spread.describe()}) need" if best.spread.gpus > 1 else "one GPU needs"
    kv = best.kv * limits.max_model_len / GIB
    return f"{many} {best.weights / GIB:.1f} GiB and {kv:.1f} of KV cache each, {limits.usable(gpu) / GIB:.1f} usable"
