"""Which weights of a plan text runs through, and what there is to say of the others."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from ernie_quant import codecs
from ernie_quant.errors import PlanError
from ernie_quant.names import ATTENTION, MTP, SHARED, VISION_EXPERT, folded
from ernie_quant.planning.choose import Choice
from ernie_quant.planning.recipe import takes_method
from ernie_quant.planning.steps import Plan, Step

LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)\.weight$")
MAY_BE_FITTED = ("self_attn.o_proj", "mlp.shared_experts.down_proj")


def by_layer(plan: Plan, fit: bool) -> dict[int, list[Step]]:
    """Layer -> steps of the text path that are made by calibration: quantized ones, and with `fit` what may be fitted there."""
    found: dict[int, list[Step]] = {}
    for step in plan.steps:
        if (at := LAYER.match(step.holds[0])) and step.role != VISION_EXPERT:
            found.setdefault(int(at[1]), []).append(step)
    return {
        layer: chosen
        for layer, steps in sorted(found.items())
        if not all(step.kept for step in steps)
        and (chosen := [step for step in steps if not step.kept or (fit and _may_be_fitted(step))])
    }


def _may_be_fitted(step: Step) -> bool:
    at = LAYER.match(step.holds[0])
    return step.role in (ATTENTION, SHARED) and at is not None and at[2] in MAY_BE_FITTED


def unknown(chosen: Sequence[Choice], recipe: str, statistics: Mapping[str, Collection[str]]) -> list[str]:
    """What codecs must know of a text that no text is there for; `statistics`: weight -> what is known of its inputs."""
    lacking = {c.weight.name: [n for n in codecs.of_text(c.codec) if n not in statistics.get(c.weight.name, ())] for c in chosen}
    if statistics:
        return [f"{name}: there are no statistics {', '.join(needs)} of it" for name, needs in lacking.items() if needs]
    forms = " and ".join(sorted({codecs.name_of(c.codec) for c in chosen if codecs.of_text(c.codec)}))
    return [f"{recipe} wants --calibration: {forms} have scales of activations, which are measured on text"] if forms else []


def judged(plan: Plan) -> Plan:
    """The plan of a calibrated result, with notes on what text does not reach. Raises PlanError if it reaches nothing."""
    assert plan.calibration is not None
    steps = [step for chosen in by_layer(plan, plan.calibration.fit).values() for step in chosen]
    if problem := _problem(plan, steps):
        raise PlanError(f"{plan.source.folder}: cannot be calibrated: {problem}", [])
    return replace(plan, notes=(*plan.notes, *_notes(plan, steps)))


def _problem(plan: Plan, steps: Sequence[Step]) -> str:
    if all(step.kept for step in plan.steps):
        return "the recipe quantizes nothing; leave out calibration, or quantize something"
    if not steps:
        return "nothing that is quantized is in a layer that text runs through; leave it out"
    reached = {step.name for step in steps}
    if unmeasured := next((s for s in plan.steps if codecs.of_text(s.codec) and s.name not in reached), None):
        return f"{unmeasured.name}: {unmeasured.codec.form} stores what is measured on text, and no text runs through it"
    if not any(step.kept or takes_method(step.codec) or codecs.of_text(step.codec) for step in steps):
        forms = " and ".join(sorted({codecs.name_of(step.codec) for step in steps}))
        return f"{forms} takes the nearest codes whatever a text says; leave it out"
    return ""


def _notes(plan: Plan, steps: Sequence[Step]) -> Iterator[str]:
    quantized = [step for step in plan.steps if not step.kept]
    free = [step for step in steps if not step.kept and not takes_method(step.codec)]
    if mtp := [step for step in quantized if step.role == MTP]:
        yield f"the MTP block: {_weights(mtp)} quantized data-free: no text runs through it"
    if vision := [step for step in quantized if step.role == VISION_EXPERT]:
        yield f"vision experts: {_weights(vision)} quantized data-free: text goes to other experts"
    if free:
        forms = " and ".join(sorted({codecs.name_of(step.codec) for step in free}))
        beside = ", but for the scales of inputs" if any(codecs.of_text(step.codec) for step in free) else ""
        yield f"{forms}: {_weights(free)} quantized data-free{beside}: no method of it looks at inputs"
    if kept := [step for step in steps if step.kept]:
        names = ", ".join(sorted({folded(step.name) for step in kept}))
        yield f"{len(kept)} weights that are kept may be fitted to the text, where that helps: {names}"


def _weights(steps: Sequence[Step]) -> str:
    return f"{len(steps)} weight is" if len(steps) == 1 else f"{len(steps)} weights are"
