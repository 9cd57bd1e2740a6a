"""What a text did to a result: the header "calibration" of report.json, in short and for people."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ernie_quant.errors import line_of
from ernie_quant.reporting.place import Place
from ernie_quant.reporting.rows import FITTED, TensorReport, output_error

FEW = 64  # tokens of an expert that are worth saying
LAYERS_NAMED, EXPERTS_NAMED = 6, 8
LENT = "activation_scales_of_others"  # experts of a layer whose scales are of tokens that go to others, too
NUMBERS = ("tokens", "judging_tokens", "window", "seed", "method", "fit")


def summary(said: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in the manifest, for the card; `said`: the header of report.json."""
    return {
        "name": said["name"],
        "sha256": said["sha256"],
        **{key: said[key] for key in NUMBERS if key in said},
        "drift": {str(layer): value for layer, value in drift_of(said).items()},
    }


def drift_of(said: Any) -> dict[int, float]:
    """Layer -> drift after it, of what a run says; what is no such number is left out."""
    found = {layer["layer"]: layer.get("drift") for layer in _layers(said)}
    numbers = {n: value for n, value in found.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    return {n: float(value) for n, value in numbers.items() if math.isfinite(value) and value >= 0}


def tokens_of_experts(said: Any) -> dict[int, list[int]]:
    """Layer -> tokens of the text that each of its experts was given."""
    return _numbers(said, "expert_tokens")


def lent(said: Any) -> dict[int, list[int]]:
    """Layer -> experts whose activation scales are of tokens that go to others, too."""
    return _numbers(said, LENT)


def _numbers(said: Any, key: str) -> dict[int, list[int]]:
    found = {layer["layer"]: layer.get(key) for layer in _layers(said)}
    return {
        n: counts
        for n, counts in found.items()
        if isinstance(counts, list) and all(type(count) is int and 0 <= count < 2**40 for count in counts)
    }


def _layers(said: Any) -> list[Mapping[str, Any]]:
    layers = said.get("layers") if isinstance(said, Mapping) else None
    known = [layer for layer in layers if isinstance(layer, Mapping)] if isinstance(layers, list) else []
    return [layer for layer in known if type(layer.get("layer")) is int and 0 <= layer["layer"] < 10**6]


def section(made: Mapping[str, Any], rows: Sequence[TensorReport]) -> str:
    """Of a model card. `made`: `summary`."""
    how = f"method {made['method']}; " if "method" in made else ""
    lines = [
        "Quantized layer after layer, each fitted to what the quantized layers before it give for a text:"
        f" {line_of(made['name'])}, {made['tokens']} tokens to fit to and {made['judging_tokens']} to judge by ({how}seed"
        f" {made['seed']}, windows of {made['window']})."
    ]  # fmt: skip
    if (error := output_error(rows)) is not None:
        lines.append(
            "Output error: the part of its output's energy that a weight's rounding costs on the tokens to judge by,"
            f" {number(error)} over all, each weight matrix counted by its size."
        )
    if drift := [(value, layer) for layer, value in made["drift"].items()]:
        last, (most, where) = drift[-1][0], max(drift)
        lines.append(
            f"Drift: energy of what differs between the hidden states of this model and of its source, in parts of theirs:"
            f" {number(last)} after the last calibrated layer, at most {number(most)} (layer {where})."
        )
    lines += [f"- sha256 of {line_of(name)}: {digest}" for name, digest in made["sha256"].items()]
    corrected = sum(row.fitted and row.codec != FITTED for row in rows)
    if corrected:
        lines.append(
            f"- {corrected} quantized weights also make up for errors before them: they are meant to differ from the source's,"
            " and their rel. error says by how much"
        )
    if fitted := Counter("*".join(Place.of(row.name).parts) for row in rows if row.codec == FITTED):
        names = ", ".join(f"{name} ({count})" for name, count in sorted(fitted.items()))
        lines.append(f"- {_weights(sum(fitted.values()))} fitted to the text, beside codes: {names}")
    first = next((i for i, line in enumerate(lines) if line.startswith("- ")), len(lines))
    return "\n\n".join(["## Calibration", *lines[:first], *(["\n".join(lines[first:])] if lines[first:] else [])])


def notes(said: Any) -> list[str]:
    """Which experts had few tokens, if any, and whose activation scales are of others'; `said`: the header of report.json."""
    experts, of_others, lines = tokens_of_experts(said), lent(said), []
    of = sum(map(len, experts.values()))
    few = {layer: [n for n, count in enumerate(counts) if count < FEW] for layer, counts in experts.items()}
    if count := sum(map(len, few.values())):
        lines.append(
            f"{count} of {of} experts had fewer than {FEW} tokens of the text, and were shown inputs of other tokens:"
            f" {_named(few)}"
        )
    if count := sum(map(len, of_others.values())):
        lines.append(
            f"activation scales of {count} of {of} experts are of tokens that go to other experts, for they had fewer than {FEW}"
            f" to fit to: {_named(of_others)}; larger inputs of their own will be cut off; --calibration-tokens takes more"
        )
    return lines


def _named(experts: Mapping[int, Sequence[int]]) -> str:
    """Some of the layers and their experts."""
    there = {layer: numbers for layer, numbers in experts.items() if numbers}
    named = [f"layer {layer}: {_some(numbers)}" for layer, numbers in list(there.items())[:LAYERS_NAMED]]
    more = f"; … in {len(there) - LAYERS_NAMED} more layers" if len(there) > LAYERS_NAMED else ""
    return f"{'; '.join(named)}{more}"


def _weights(count: int) -> str:
    return (
        "1 weight that is kept is not the source's, but was"
        if count == 1
        else (f"{count} weights that are kept are not the source's, but were")
    )


def _some(numbers: Sequence[int]) -> str:
    more = f", … ({len(numbers)})" if len(numbers) > EXPERTS_NAMED else ""
    return ", ".join(map(str, numbers[:EXPERTS_NAMED])) + more


def number(value: float) -> str:
    """Of a part of an energy."""
    return f"{value:.3g}"
