"""Scaled positions: Paddle's `compression_ratio` is linear scaling of RoPE, and never lost on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import GOLDEN, config, logits, random_model, same, tensors, write
from helpers.results import WIDTHS
from helpers.tables import golden, model

from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.errors import ConfigError, ErnieQuantError, PlanError
from ernie_quant.inspection import inspect
from ernie_quant.planning import built_in
from ernie_quant.planning.make import make_plan
from ernie_quant.sources import open_source
from ernie_quant.weights import layouts

FOUR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0}
CASES = {"dense": "dense", "moe": "moe", "moe_mtp": "moe_mtp"}


def scaled(folder: Path, family: str, layout: str = "paddle", **changes: Any) -> Path:
    return model(folder, *golden(family, layout, **changes))


def rope(folder: Path) -> dict[str, Any]:
    return {
        key: value for key, value in config(folder).items() if key in ("rope_scaling", "rope_parameters", "compression_ratio")
    }


@pytest.mark.parametrize("family", CASES)
def test_transformers_divides_the_positions(family: str, tmp_path: Path) -> None:
    """As if they had been divided by hand: transformers given positions 0, 1/4, 2/4, … computes the same."""
    write(scaled(tmp_path / "src", family, compression_ratio=4.0), tmp_path / "pt")
    assert rope(tmp_path / "pt") == {"rope_scaling": FOUR, "rope_parameters": FOUR}
    found = logits(tmp_path / "pt", case=family)
    assert torch.allclose(found, divided(GOLDEN / family / "pt", family, 4.0), atol=1e-4)
    assert (found - logits(GOLDEN / family / "pt", case=family)).abs().max() > 1e-2


def divided(folder: Path, case: str, ratio: float) -> torch.Tensor:
    import numpy as np
    from transformers import AutoModelForCausalLM

    ids = torch.from_numpy(np.load(GOLDEN / case / "input_ids.npy"))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    positions = torch.arange(ids.shape[1])[None] / ratio
    with torch.no_grad():
        return loaded(input_ids=ids, position_ids=positions).logits.float()


def test_there_and_back(tmp_path: Path) -> None:
    source = scaled(tmp_path / "src", "moe", compression_ratio=4)
    write(source, tmp_path / "pt")
    write(tmp_path / "pt", tmp_path / "paddle", "fastdeploy")
    assert rope(tmp_path / "paddle") == {"compression_ratio": 4.0}
    assert same(tensors(tmp_path / "paddle"), tensors(source)) == []
    write(tmp_path / "pt", tmp_path / "again")
    assert config(tmp_path / "again") == config(tmp_path / "pt")


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_every_spelling_becomes_compression_ratio(key: str, tmp_path: Path) -> None:
    kind = "type" if key == "rope_scaling" else "rope_type"
    write(scaled(tmp_path / "src", "moe", "pt", **{key: {kind: "linear", "factor": 2}}), tmp_path / "paddle", "fastdeploy")
    assert rope(tmp_path / "paddle") == {"compression_ratio": 2.0}


@pytest.mark.parametrize("value", [1, 1.0, None])
def test_no_scaling_is_none_in_pt(value: float | None, tmp_path: Path) -> None:
    settings, table = golden("moe", "paddle")
    settings["compression_ratio"] = value
    source = model(tmp_path / "src", settings, table)
    write(source, tmp_path / "pt")
    assert config(tmp_path / "pt") == config(GOLDEN / "moe/pt")
    assert inspect(source).notes == ()


def test_a_ratio_in_a_pt_config_is_baidus_own_code_speaking(tmp_path: Path) -> None:
    source = scaled(tmp_path / "src", "moe", "pt", compression_ratio=4.0)
    plan = make_plan(open_source(source), runtime="vllm")
    assert "compression_ratio is 4.0: written as linear scaling of RoPE (rope_scaling, rope_parameters)" in plan.notes
    write(source, tmp_path / "pt")
    assert rope(tmp_path / "pt") == {"rope_scaling": FOUR, "rope_parameters": FOUR}


WRONG = {
    "text": ("4", "is '4', not a number"),
    "true": (True, "is True, not a number"),
    "list": ([4], "is .4., not a number"),
    "zero": (0, "is 0, not a number above 0"),
    "negative": (-4.0, "is -4.0, not a number above 0"),
    "huge": (1e300, "not a number above 0 and up to"),
    "below 1": (0.5, "vLLM and transformers scale by 1 or more"),
}


@pytest.mark.parametrize(("value", "said"), WRONG.values(), ids=WRONG)
def test_what_is_no_ratio_is_refused_by_name(value: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^config.json: compression_ratio .*{said}"):
        make_plan(open_source(scaled(tmp_path / "src", "moe", compression_ratio=value)), runtime="vllm")


def test_two_ratios_are_refused_with_both(tmp_path: Path) -> None:
    other = {"rope_type": "linear", "factor": 2.0}
    source = scaled(tmp_path / "src", "moe", "pt", compression_ratio=4.0, rope_scaling=other)
    with pytest.raises(ConfigError, match=r"compression_ratio is 4.0, rope_scaling says 'linear' by 2.0"):
        make_plan(open_source(source), runtime="vllm")


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "llama3", "longrope"])
def test_what_paddle_cannot_say_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    said = {"rope_type": kind, "factor": 4.0}
    source = scaled(tmp_path / "src", "moe", "pt", rope_scaling=said)
    with pytest.raises(ConfigError, match=rf"rope_scaling says '{kind}': Paddle's code knows linear scaling only"):
        make_plan(open_source(source), runtime="fastdeploy")
    assert make_plan(open_source(source), runtime="vllm").config["rope_scaling"] == said  # PT can


@pytest.mark.parametrize("said", [{"type": "yarn", "factor": 4.0}, {"type": "linear", "factor": 2.0}], ids=["yarn", "linear"])
def test_a_key_that_paddles_code_does_not_read_is_no_scaling(said: dict[str, Any], tmp_path: Path) -> None:
    """Whoever wrote it beside Paddle weights meant it; that code computes without it."""
    source = scaled(tmp_path / "src", "moe", rope_scaling=said)
    for runtime in ("vllm", "fastdeploy"):
        with pytest.raises(PlanError, match=r"which Paddle's code does not read"):
            make_plan(open_source(source), runtime=runtime)


# --- VL --------------------------------------------------------------------------------------------------------------


def vl(folder: Path, style: str) -> Path:
    if style == "flat":
        return scaled(folder, "vl", compression_ratio=4.0)
    settings, table = golden("vl", "pt_resaved_by_transformers")
    (settings["text_config"] if style == "nested" else settings)["compression_ratio"] = 4.0
    return model(folder, settings, table)


@pytest.mark.parametrize("style", ["flat", "nested", "beside text_config"])
def test_nobody_scales_the_positions_of_vl_models_but_paddle(style: str, tmp_path: Path) -> None:
    source = vl(tmp_path / "src", style)
    for words in ("flat", "transformers"):
        with pytest.raises(ConfigError, match=r"compression_ratio is 4.0: neither vLLM nor transformers"):
            make_plan(open_source(source), runtime="vllm", vl_config=words)
    write(source, tmp_path / "paddle", "fastdeploy")
    assert rope(tmp_path / "paddle") == {"compression_ratio": 4.0}


# --- quantized -------------------------------------------------------------------------------------------------------

WINT4 = built_in.one_codec("wint4", RoundToNearest(4, 32), experts_only=True, mtp=False, keep_unfit=False)


def test_a_quantized_result_scales_too(tmp_path: Path) -> None:
    source = scaled(tmp_path / "src", "moe", compression_ratio=4.0)
    write(source, tmp_path / "pt")
    write(source, tmp_path / "out", recipe=WINT4)
    assert rope(tmp_path / "out") == rope(tmp_path / "pt")
    found, original = logits(tmp_path / "out", torch.bfloat16), logits(tmp_path / "pt", torch.bfloat16)
    assert 0 < (found - original).square().sum() / original.square().sum() < 0.2
    write(tmp_path / "out", tmp_path / "back", "fastdeploy", dequantize=True)
    assert rope(tmp_path / "back") == {"compression_ratio": 4.0}


def test_fastdeploy_does_not_scale(tmp_path: Path) -> None:
    """Its files are for it alone, and it would compute another model: refused, unless one insists."""
    source = random_model(tmp_path / "src", layouts.PADDLE, **WIDTHS["moe"], compression_ratio=4.0)
    rules = built_in.fastdeploy_container("wint4", None)
    with pytest.raises(PlanError, match=r"compression_ratio is 4.0: ERNIEKit divides positions by it, FastDeploy does not"):
        make_plan(open_source(source), runtime="fastdeploy", recipe=rules)
    plan = make_plan(open_source(source), runtime="fastdeploy", recipe=rules, unsupported=True)
    assert plan.config["compression_ratio"] == 4.0
    assert "compression_ratio is 4.0: ERNIEKit divides positions by it, FastDeploy does not" in plan.notes


def test_a_broken_scaling_is_one_line(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "moe/pt", tmp_path / "src")
    for value in ("linear", 3, [], {"rope_type": 3}, {"rope_type": "linear"}, {"type": "linear", "factor": "2"}):
        settings = config(GOLDEN / "moe/pt") | {"rope_scaling": value}
        (tmp_path / "src/config.json").write_text(json.dumps(settings))
        with pytest.raises(ErnieQuantError, match=r"^config.json: rope_scaling"):
            make_plan(open_source(tmp_path / "src"), runtime="vllm")
