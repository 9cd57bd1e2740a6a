"""The command line that makes a result again."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ernie_quant.planning import built_in

if TYPE_CHECKING:
    from ernie_quant.planning.calibration import Calibration
    from ernie_quant.planning.steps import Plan


def full(words: str, source: str, out: str) -> str:
    """`wint4 --experts-only` -> `ernie-quant wint4 SRC OUT --experts-only`."""
    name, _, options = words.partition(" ")
    return " ".join(filter(None, ["ernie-quant", name, shlex.quote(source), out, options]))


def command_of(plan: Plan) -> str:
    """Of a result, with the source as it is called and OUT for its folder.

    Texts and statistics of one's own are named by what they are called; where they lay nobody need know.
    """
    made = plan.quantized_by or plan
    words = [_words(made), *_options(plan.identity["options"])]
    usual = built_in.GGUF_BYTES if made.runtime == built_in.LLAMA_CPP else built_in.SHARD_BYTES
    words += [f"--max-shard-size {made.shard_bytes}"] if made.shard_bytes != usual else []
    words += _calibrated(made.calibration) if made.calibration else ()
    return full(" ".join(words), made.source.address or made.source.title, "OUT")


def _words(plan: Plan) -> str:
    options = plan.identity["options"]
    if "reshard" in options:
        return f"reshard --tp {options['reshard']}"
    if options.get("dequantize"):
        return f"dequantize --to {plan.layout.name}"
    own = f"quantize --recipe {shlex.quote(f'{plan.recipe.name}.toml')}"
    return plan.recipe.words or own + (
        f" --runtime {plan.runtime}" if plan.runtime != (plan.recipe.runtime or built_in.VLLM) else ""
    )


def _options(options: Mapping[str, Any]) -> Iterable[str]:
    if options.get("tp", 1) > 1:
        yield f"--tp {options['tp']}"
    if options.get("vl_config", "flat") != "flat":
        yield f"--vl-config {options['vl_config']}"
    for name in options.get("fixes", ()):
        yield f"--fix {name}"
    if options.get("statistics"):
        yield "--imatrix FILE"
    for pattern in options.get("copy", ()):
        yield f"--copy {shlex.quote(pattern)}"
    if options.get("copy_code"):
        yield "--copy-code"


def _calibrated(said: Calibration) -> Iterable[str]:
    for name in (said.name,) if isinstance(said.source, str) else said.sha256:
        yield f"--calibration {shlex.quote(name)}"
    yield f"--calibration-tokens {said.tokens} --method {said.method}"
    if said.fit:
        yield "--fit"
