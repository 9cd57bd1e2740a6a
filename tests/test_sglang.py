"""What SGLang asks of config.json beside the names of layers, as read in 0.5.23; tests/test_programs.py has the names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers.models import random_model
from helpers.results import WIDTHS

from ernie_quant import names
from ernie_quant.codecs import Codec
from ernie_quant.codecs.fp8 import COMPRESSED_TENSORS, Float8Block
from ernie_quant.codecs.mxfp4 import Float4Group
from ernie_quant.codecs.nvfp4 import NvFloat4
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.codecs.w4afp8 import Weight4Float8
from ernie_quant.planning.make import make_plan
from ernie_quant.planning.recipe import Recipe, RecipeRule
from ernie_quant.planning.steps import Plan
from ernie_quant.sources import open_source
from ernie_quant.weights import layouts

INT4, INT8 = RoundToNearest(4, 128), RoundToNearest(8, CHANNEL)
FLOAT8 = Float8Block(COMPRESSED_TENSORS)
W4AFP8_WIDTHS = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256, "moe_intermediate_size": 256, "moe_num_experts": 2}


def planned(folder: Path, *pairs: tuple[str, Codec], **widths: Any) -> tuple[Plan, dict[str, Any]]:
    """First match wins; what nothing matches is kept."""
    source = random_model(folder, layouts.PT, "moe", **(widths or WIDTHS["moe"]))
    rules = Recipe("test", tuple(RecipeRule(codec, match=match, optional=True) for match, codec in pairs))
    plan = make_plan(open_source(source), runtime="vllm", recipe=rules)
    return plan, plan.config["quantization_config"]


ROUTED = r"\.experts\."


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (((ROUTED, INT4),), "pack-quantized"),
        (((r"layers\.1" + ".*" + ROUTED, FLOAT8), (ROUTED, INT4)), "pack-quantized"),
        (((ROUTED, INT4), ("proj", FLOAT8)), "pack-quantized"),
        (((ROUTED, NvFloat4()), ("proj", INT8)), "nvfp4-pack-quantized"),
        (((r"layers\.1" + ".*" + ROUTED, NvFloat4()), (ROUTED, INT8)), "pack-quantized"),
        (((ROUTED, Float4Group()), ("proj", INT8)), "mixed-precision"),
        (((ROUTED, Float4Group()),), "mixed-precision"),
        (((ROUTED, FLOAT8), ("proj", INT8)), "float-quantized"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_format_of_all_is_that_of_integers_wherever_experts_are_integers(
    pairs: tuple[tuple[str, Codec], ...], expected: str, tmp_path: Path
) -> None:
    """CompressedTensorsWNA16MoE wants it; and it must not say mxfp4, or all experts are read so."""
    plan, entry = planned(tmp_path / "source", *pairs)
    assert entry["format"] == expected
    integers = any(step.role == names.EXPERT and isinstance(step.codec, RoundToNearest) for step in plan.steps)
    assert not integers or entry["format"] == "pack-quantized"
    assert "mxfp4" not in entry["format"]
    formats = {group["format"] for group in entry["config_groups"].values()}
    assert len(formats) == len({type(codec) for _, codec in pairs})  # vLLM and transformers read these


def test_experts_for_float8_inputs_are_found_under_linear_too(tmp_path: Path) -> None:
    """CompressedTensorsW4AFP8MoE reads the group of "Linear"; every layer has a name or is ignored before that is asked."""
    plan, entry = planned(tmp_path / "source", (ROUTED, Weight4Float8()), **W4AFP8_WIDTHS)
    (group,) = entry["config_groups"].values()
    assert group["targets"][-1] == "Linear"
    patterns = [re.compile(p.removeprefix("re:")) for p in (*group["targets"][:-1], *entry["ignore"])]
    layers = [step for step in plan.steps if names.is_layer(step.name, step.role, step.spec.shape)]
    assert layers
    assert all(any(p.match(step.name.removesuffix(".weight")) for p in patterns) for step in layers)


def test_no_other_form_has_a_target_that_is_no_name(tmp_path: Path) -> None:
    for number, codec in enumerate((INT4, Float4Group(), NvFloat4())):
        _, entry = planned(tmp_path / str(number), ("proj", codec))
        assert all(target.startswith("re:") for group in entry["config_groups"].values() for target in group["targets"])
    _, entry = planned(tmp_path / "attention", ("self_attn", Weight4Float8()), (ROUTED, INT4), **W4AFP8_WIDTHS)
    assert all(target.startswith("re:") for group in entry["config_groups"].values() for target in group["targets"])
