"""The plan of a GGUF file: which type for which source, and what text says of the inputs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from ernie_quant.checkpoint import Checkpoint
from ernie_quant.codecs._ggml import Blocks
from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.errors import PlanError
from ernie_quant.planning import built_in
from ernie_quant.planning.choose import folded_problems
from ernie_quant.planning.imatrix import Statistics, importance, misfits
from ernie_quant.planning.make import make_plan
from ernie_quant.planning.steps import Plan
from ernie_quant.planning.taken import taken_over
from ernie_quant.views.kinds import Decoded
from ernie_quant.weights.claims import evidence
from ernie_quant.weights.stored import Stored, resolve_quantized

HOLDS = {4: "Q4_0", 8: "Q8_0"}  # bits of integer codes -> the type whose codes they are


def gguf_plan(source: Checkpoint, *, settings: dict[str, Any], imatrix: Path | None = None, **options: Any) -> Plan:
    """As `make_plan`, with the options of the built-in recipe `gguf` in `settings`; without a `type` the one for the source.

    Of a quantized source codes are taken over where a type holds them, other weights are decoded. `imatrix`: a file of
    `calibrate`, by which searches weigh the inputs of a weight. Raises PlanError, ConfigError or CheckpointError.
    """
    quantized = bool(evidence(source))
    settings = {**settings, "type": settings.get("type") or type_for(source, quantized=quantized)}
    made = built_in.make("gguf", **settings)
    known = None if imatrix is None else importance(imatrix)
    plan = make_plan(
        source, runtime=made.runtime, recipe=made.recipe, dequantize=quantized, statistics=known, **options
    )  # fmt: skip
    notes = _taken(plan) if quantized else []
    if len(plan.shards) > 1:
        notes.append(f"{len(plan.shards)} files: a program is given the first; Ollama pulls no split files from hubs")
    if imatrix is not None and known is not None:
        notes += _weighed(plan, known, imatrix)
    return replace(plan, notes=(*plan.notes, *notes))


def _weighed(plan: Plan, known: Statistics, imatrix: Path) -> list[str]:
    """A note on what an imatrix is used for. Raises PlanError for that of another model."""
    widths = {step.name: step.spec.shape[1] for step in plan.steps if isinstance(step.codec, Blocks)}
    if wrong := misfits(known, widths, imatrix):
        raise PlanError(f"{imatrix}: does not fit {plan.source.folder}", folded_problems(wrong))
    missing = len(widths.keys() - known.keys())
    without = f"; it says nothing of {missing} others" if missing else ""
    return [f"errors of {len(widths) - missing} weights are weighed by their inputs in {imatrix.name}{without}"]


def type_for(source: Checkpoint, *, quantized: bool) -> str:
    """The usual type, or the one that holds most codes of a quantized source as they are."""
    if not quantized:
        return built_in.GGUF_TYPE
    stored = [w.view.source for w in resolve_quantized(source).weights if isinstance(w.view, Decoded)]
    bits = Counter(s.codec.bits for s in stored if isinstance(s, Stored) and isinstance(s.codec, RoundToNearest))
    return HOLDS.get(bits.most_common(1)[0][0], built_in.GGUF_TYPE) if bits else built_in.GGUF_TYPE


def _taken(plan: Plan) -> list[str]:
    """Notes on what a quantized source's weights become."""
    quantized = [step for step in plan.steps if step.quantized]
    same = sum(bool(taken_over(step.view, step.codec)) for step in quantized)
    decoded = sum(isinstance(step.view, Decoded) for step in quantized) - same
    notes = [f"{same} weights have the codes of the source, not rounded again where float16 holds their scales"] if same else []
    return notes + (
        [f"{decoded} weights of the source are quantized already, and are rounded a second time"] if decoded > 0 else []
    )
