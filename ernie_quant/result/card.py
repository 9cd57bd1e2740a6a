"""README.md of a result, a model card: what it is, how to run it, what it lost, what it was made from.

It is written from the manifest and the report alone, so that `publish` can write it again under the repository's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie_quant import runtimes
from ernie_quant.plan.steps import Plan
from ernie_quant.report import calibration, evaluation, tables
from ernie_quant.report.rows import TensorReport

FRONT = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)
FIELD = re.compile(r"^(license|license_name|license_link|pipeline_tag): *([\w.:/+-]+) *$", re.MULTILINE)
FRONT_BYTES = 1 << 16


def run_commands(plan: Plan, out: Path) -> list[tuple[str, str]]:
    """(runtime, command) that run the result in `out`."""
    return runtimes.find(plan.runtime).commands(out, plan.config, plan.tp_sizes)


def front_matter(readme: Path | None) -> dict[str, str]:
    """Licence and task as the source's card states them; nothing for a source without one."""
    if readme is None or not readme.is_file():
        return {}
    with open(readme, encoding="utf-8", errors="replace") as file:
        found = FRONT.search(file.read(FRONT_BYTES))
    return dict(FIELD.findall(found[1])) if found else {}


def readme(
    made: Mapping[str, Any], config: Mapping[str, Any], rows: Sequence[TensorReport], name: str, pictures: Sequence[str] = (),
    evaluated: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """Markdown. `made`: the manifest, with or without its files; `name`: what the commands call the result.

    `evaluated`: the JSON of an evaluation.
    """
    facts = made["summary"]
    text = facts.get("calibration")
    parts = [_yaml(made), f"# {name.rpartition('/')[2]}\n\n{_headline(made, rows)}"]
    for runtime, command in runtimes.find(made["runtime"]).commands(Path(name), config, facts["tp_sizes"]):
        parts.append(f"## {runtime}\n\n```\n{command}\n```")
    if facts["tp_sizes"]:
        parts.append(f"Tensor-parallel sizes that its widths, heads and groups allow: {', '.join(map(str, facts['tp_sizes']))}.")
    if facts["gpus"]:
        needed = ", ".join(f"{count} x {memory}" for memory, count in facts["gpus"].items())
        parts.append(f"GPUs for its weights and the KV cache of one sequence of 32768 tokens: {needed}.")
    if any(r.changed for r in rows):
        shown = tables.tables(rows, _drift(text))
        parts.append(f"## Error\n\nrel. error = ||W - W'||^2 / ||W||^2; every tensor is in report.json.\n\n```\n{shown}\n```")
    if text is not None:
        parts.append(calibration.section(text, rows))
    if evaluated is not None:
        parts.append(_evaluation(evaluated))
    parts += [f"![{picture.rpartition('/')[2].removesuffix('.png').replace('-', ' ')}]({picture})" for picture in pictures]
    parts.append(_provenance(made))
    if facts["notes"]:
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in facts["notes"]))
    return "\n\n".join(parts) + "\n"


def _drift(text: Mapping[str, Any] | None) -> dict[int, float]:
    return {} if text is None else {int(layer): value for layer, value in text["drift"].items()}


def _evaluation(evaluated: Mapping[str, Any]) -> str:
    source = evaluated["source"]
    against = "" if source is None else f" KL: of ({source['name']} || this), nats per token."
    return (
        f"## Evaluation\n\nFirst tokens of each text in windows of {evaluated['window']}, computed in float32 from the stored"
        f" weights.{against} Hashes of the texts are in eval.json.\n\n```\n{evaluation.text(evaluated)}\n```"
    )


def _yaml(made: Mapping[str, Any]) -> str:
    """The front matter that hubs read."""
    _, _, repo = made["source_address"].partition("://")
    lines = [f"base_model: {repo}", "base_model_relation: quantized"] if repo else []
    lines += [f"{key}: {value}" for key, value in sorted(made["summary"]["front_matter"].items())]
    lines += ["tags:", "- ernie4.5", "- ernie-quant", f"- {made['recipe']['name']}"]
    return "\n".join(["---", *lines, "---"])


def _headline(made: Mapping[str, Any], rows: Sequence[TensorReport]) -> str:
    facts = made["summary"]
    quantized = any(r.changed for r in rows)
    verb = f"quantized ({made['recipe']['name']})" if quantized else f"converted to {made['layout']}"
    before, after, bits = facts["bytes_in"] / 1e9, facts["bytes_out"] / 1e9, facts["bits_per_weight"]
    sizes = f"{before:.2f} GB became {after:.2f} GB, {bits:.2f} bits per weight."
    return f"{made['source_name']}, {verb} by ernie-quant {made['version']}. {sizes}"


def _provenance(made: Mapping[str, Any]) -> str:
    revision = made["source"]["revision"]
    lines = [f"- source: {made['source_address'] or made['source_name']}{f', commit {revision}' if revision else ''}"]
    lines += [f"- {rule['applies_to'] or 'every linear'}: {rule['codec']}" for rule in made["recipe"]["rules"]]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(made["libraries"].items()))
    lines += [f"- ernie-quant {made['version']}, {versions}", f"- fingerprint {made['fingerprint']}"]
    lines.append("- hashes of all files: `sha256sum -c SHA256SUMS`; everything else: `ernie-quant verify`")
    return "## Made from\n\n" + "\n".join(lines)
