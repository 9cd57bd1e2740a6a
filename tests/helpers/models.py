"""Checkpoints of the tests, and what they compute in a real runtime."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ernie_quant import archs, names, runtimes
from ernie_quant.planning.make import make_plan
from ernie_quant.run.whole import RunResult, run_plan
from ernie_quant.sources import open_source
from ernie_quant.views.files import Files
from ernie_quant.weights import layouts
from ernie_quant.weights.stored import open_stored
from helpers.paths import GOLDEN

FAMILIES = ("dense", "moe", "moe_mtp", "vl")


def config(folder: Path) -> dict[str, Any]:
    """config.json."""
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


def write(source: Path, out: Path, runtime: str = "vllm", **options: Any) -> RunResult:
    """Plan and run in one call."""
    return run_plan(make_plan(open_source(source), runtime=runtime, **options), out)


def invoke(*arguments: object) -> str:
    """A command that must succeed; what it prints. (The fixture `command` lives for one test only.)"""
    from click.testing import CliRunner
    from ernie_quant.cli.main import group

    result = CliRunner().invoke(group, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor, read with the safetensors library; U16 is bfloat16."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                tensor = opened.get_tensor(name)
                found[name] = tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
    return found


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """Names whose tensors differ in dtype, shape or any bit."""
    return [
        name
        for name in sorted(left.keys() | right.keys())
        if name not in left
        or name not in right
        or left[name].dtype != right[name].dtype
        or left[name].shape != right[name].shape
        or not torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8))
    ]


def random_model(folder: Path, layout: str, family: str = "moe", **changes: object) -> Path:
    """Random weights in every tensor that the table of a golden model asks for after `changes` to its config.json."""
    config = json.loads((GOLDEN / family / "paddle/config.json").read_text()) | changes
    rows = archs.find(config).name_map(config, list(tensors(GOLDEN / family / "paddle"))).rows()
    torch.manual_seed(2)
    table: dict[str, torch.Tensor] = {}
    for row in (r for r in rows if r.rule.need != "use_bias"):
        stored = zip(row.pt, row.shapes, strict=True) if layout == layouts.PT else [(row.paddle, row.stored_shape)]
        for name, shape in stored:
            table[name] = torch.randn(shape).mul(0.02).to(torch.float32 if row.rule.role == names.ROUTER else torch.bfloat16)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(table, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def dequantized(out: Path, plain: Path) -> Path:
    """A plain bf16 checkpoint with the weights that `out` decodes to."""
    checkpoint = open_source(out)
    target = runtimes.find("vllm")
    stored, problems = open_stored(checkpoint, target)
    assert not problems
    plain.mkdir()
    with Files() as files:
        weights = {s.name: s.read(files, (0, s.shape[0])).contiguous() for s in stored}
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    (plain / "config.json").write_text(json.dumps(config))
    return plain


def logits(folder: Path, dtype: torch.dtype | str = torch.float32, case: str = "") -> torch.Tensor:
    """float32 logits that transformers computes for the golden input ids of `case`."""
    return states(folder, torch.from_numpy(np.load(GOLDEN / (case or "moe") / "input_ids.npy")), dtype)[1].float()


def states(folder: Path, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """What transformers computes: hidden states before every layer and after the last norm, and logits."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    config = json.loads((folder / "config.json").read_text())
    cls = transformers.AutoModelForImageTextToText if "text_config" in config else transformers.AutoModelForCausalLM
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        found = cls.from_pretrained(folder, dtype=dtype).eval()(input_ids=ids, output_hidden_states=True)
    return found.hidden_states, found.logits


def copy(source: Path, out: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(source, out))
