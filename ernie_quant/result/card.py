"""README.md of a result, a model card: what it is, how to run it, what it lost, what it was made from.

It is written from the manifest and the report alone, so that `publish` can write it again under the repository's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie_quant import runtimes
from ernie_quant.planning.steps import Plan
from ernie_quant.reporting import calibration, evaluation, tables
from ernie_quant.reporting.rows import TensorReport
from ernie_quant.result import front_matter
from ernie_quant.runtimes import Place, Spread

CONTEXT = 32768  # tokens of the one sequence that GPUs have room for


def run_commands(plan: Plan, out: Path) -> list[tuple[str, str]]:
    """(runtime, command) that run the result in `out`, on the fewest GPUs of 80 GiB that hold it."""
    first = plan.quantized_by or plan
    return runtimes.find(plan.runtime).commands(Place(str(out)), plan.config, _served(first.gpus, plan.tp_sizes)[0])


def spreads_of(summary: Mapping[str, Any]) -> dict[str, Spread]:
    """Memory of a GPU -> how the fewest of them share a result; manifests of before 0.2 have a number only."""
    gpus = summary.get("gpus", {})
    return {memory: Spread(**said) if isinstance(said, Mapping) else Spread(said) for memory, said in gpus.items()}


def readme(
    made: Mapping[str, Any], config: Mapping[str, Any], rows: Sequence[TensorReport], place: Place,
    pictures: Sequence[str] = (), evaluated: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """Markdown. `made`: the manifest, with or without its files; `place`: where the commands look for the result.

    `evaluated`: the JSON of an evaluation.
    """
    facts = made["summary"]
    text = facts.get("calibration")
    title = made.get("card", {}).get("name") or place.name.rpartition("/")[2]
    parts = [
        front_matter.block(made, config, _tags(made, config)),
        f"# {title}\n\n{_headline(made, rows)}",
        *_running(made, config, place),
    ]
    if evaluated is not None:
        parts.append(_evaluation(evaluated))
    if any(r.changed for r in rows):
        parts.append(_errors(rows, text))
    if text is not None:
        parts.append(calibration.section(text, rows))
    parts += [f"![{picture.rpartition('/')[2].removesuffix('.png').replace('-', ' ')}]({picture})" for picture in pictures]
    parts.append(_provenance(made))
    if facts["notes"]:
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in facts["notes"]))
    return "\n\n".join(parts) + "\n"


def _running(made: Mapping[str, Any], config: Mapping[str, Any], place: Place) -> list[str]:
    """Commands, and the GPUs that hold it."""
    facts, spreads = made["summary"], spreads_of(made["summary"])
    spread, memory = _served(spreads, facts["tp_sizes"])
    on = f" on {spread.gpus} x {memory}" if memory and spread.gpus > 1 else ""
    parts = [
        f"## {program}{on if spread.describe() in command or spread.tensor > 1 else ''}\n\n```\n{command}\n```"
        for program, command in runtimes.find(made["runtime"]).commands(place, config, spread)
    ]
    if spreads:
        lines = [(memory, str(s.gpus), s.describe() if s.gpus > 1 else "") for memory, s in spreads.items()]
        about = f"Fewest GPUs that hold its weights and the KV cache of one sequence of {CONTEXT} tokens"
        parts.append(f"## GPUs\n\n{about}:\n\n{tables.markdown(('memory of each', 'GPUs', 'shared as'), lines)}")
    if facts["tp_sizes"]:
        sizes = ", ".join(map(str, facts["tp_sizes"]))
        parts.append(f"Tensor-parallel sizes that its widths, heads and groups allow: {sizes}.")
    return parts


def _served(spreads: Mapping[str, Spread], tp_sizes: Sequence[int]) -> tuple[Spread, str]:
    """How commands share it, and among GPUs of which memory: 80 GiB, larger ones where those are too small for it."""
    for memory in ("80GiB", "141GiB", *spreads):
        if memory in spreads:
            return spreads[memory], memory
    return Spread(max(tp_sizes, default=1)), ""


def _tags(made: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    entry = config.get("quantization_config") or {}
    method = entry.get("quant_method") or entry.get("quantization")
    return [tag for tag in (made["recipe"]["name"], method, *runtimes.find(made["runtime"]).TAGS) if isinstance(tag, str)]


def _errors(rows: Sequence[TensorReport], text: Mapping[str, Any] | None) -> str:
    drift = {} if text is None else {int(layer): value for layer, value in text["drift"].items()}
    found = ["## Error\n\nrel. error = ||W - W'||^2 / ||W||^2; every tensor is in report.json."]
    found += [
        (f"{part.title}:\n\n" if part.title else "") + tables.markdown(part.head, part.lines)
        for part in tables.parts(rows, drift)
    ]
    return "\n\n".join([*found, *([tables.after_layers(drift)] if drift else [])])


def _evaluation(evaluated: Mapping[str, Any]) -> str:
    source = evaluated["source"]
    against = "" if source is None else f" KL: of ({source['name']} || this), nats per token."
    head, lines, note = evaluation.columns(evaluated)
    return (
        f"## Evaluation\n\nFirst tokens of each text in windows of {evaluated['window']}, computed in float32 from the stored"
        f" weights.{against} Hashes of the texts are in eval.json.\n\n{tables.markdown(head, lines)}\n\n{note}"
    )


def _headline(made: Mapping[str, Any], rows: Sequence[TensorReport]) -> str:
    facts = made["summary"]
    quantized = any(r.changed for r in rows)
    verb = f"quantized ({made['recipe']['name']})" if quantized else f"converted to {made['layout']}"
    before, after, bits = facts["bytes_in"] / 1e9, facts["bytes_out"] / 1e9, facts["bits_per_weight"]
    sizes = f"{before:.2f} GB became {after:.2f} GB, {bits:.2f} bits per weight."
    return f"{made['source_name']}, {verb} by ernie-quant {made['version']}. {sizes}"


def _provenance(made: Mapping[str, Any]) -> str:
    revision = made["source"]["revision"]
    command = f"```\n{made['command']}\n```\n\n" if made.get("command") else ""
    lines = [f"- source: {made['source_address'] or made['source_name']}{f', commit {revision}' if revision else ''}"]
    lines += [f"- {rule['applies_to'] or 'every linear'}: {rule['codec']}" for rule in made["recipe"]["rules"]]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(made["libraries"].items()))
    lines += [f"- ernie-quant {made['version']}, {versions}", f"- fingerprint {made['fingerprint']}"]
    lines.append("- hashes of all files: `sha256sum -c SHA256SUMS`; everything else: `ernie-quant verify`")
    return f"## Made from\n\n{command}" + "\n".join(lines)
