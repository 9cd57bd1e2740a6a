"""A dense model that a MoE class has saved, and a MoE that is called dense: the tensors say what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import GOLDEN, config, logits, random_model, same, tensors, write
from helpers.tables import golden, model

from ernie_quant.errors import ConfigError, PlanError
from ernie_quant.inspection import inspect
from ernie_quant.planning.make import make_plan
from ernie_quant.sources import open_source
from ernie_quant.weights import layouts

MOE = {"model_type": "ernie4_5_moe", "architectures": ["Ernie4_5_MoeForCausalLM"]}
NO_EXPERTS = {"moe_num_experts": 0, "moe_intermediate_size": 0, "moe_layer_interval": 2}
KEYS: dict[str, dict[str, Any]] = {
    "no experts": NO_EXPERTS | {"moe_num_shared_experts": 0, "moe_layer_start_index": 0, "moe_layer_end_index": -1},
    "no keys at all": {},
    "the defaults of the class": {"moe_num_experts": 64, "moe_intermediate_size": 1536, "moe_k": 6, "moe_layer_start_index": 1},
}


def expected(family: str) -> torch.Tensor:
    return torch.from_numpy(np.load(GOLDEN / family / "expected_logits_fp32.npy"))


@pytest.mark.parametrize("layout", ["paddle", "pt"])
@pytest.mark.parametrize("keys", KEYS)
def test_a_dense_model_that_a_moe_class_has_saved(keys: str, layout: str, tmp_path: Path) -> None:
    source = model(tmp_path / "src", *golden("dense", layout, **MOE, **KEYS[keys]))
    found = inspect(source)
    assert (found.family, found.anomalies) == ("ernie4_5", ())
    assert "read as the dense 'ernie4_5'" in found.notes[0]
    assert all(key in found.notes[0] for key in KEYS[keys])
    write(source, tmp_path / "pt")
    assert config(tmp_path / "pt") == config(GOLDEN / "dense/pt")
    assert (logits(tmp_path / "pt", case="dense") - expected("dense")).abs().max() < 1e-4
    write(source, tmp_path / "paddle", "fastdeploy")
    write(GOLDEN / "dense" / layout, tmp_path / "clean", "fastdeploy")
    assert config(tmp_path / "paddle") == config(tmp_path / "clean")
    assert same(tensors(tmp_path / "paddle"), tensors(GOLDEN / "dense/paddle")) == []


def test_a_moe_class_whose_layers_are_dense_by_config_stays_one(tmp_path: Path) -> None:
    """transformers loads it as it is."""
    keys = {"moe_num_experts": 8, "moe_intermediate_size": 32, "moe_k": 2, "moe_layer_start_index": 3}
    source = model(tmp_path / "src", *golden("dense", **MOE, **keys))
    write(source, tmp_path / "pt")
    assert config(tmp_path / "pt")["model_type"] == "ernie4_5_moe"
    assert (logits(tmp_path / "pt", case="dense") - expected("dense")).abs().max() < 1e-4


def test_a_moe_that_lost_its_experts_is_no_dense_model(tmp_path: Path) -> None:
    settings, table = golden("moe")
    rest = {n: t for n, t in table.items() if ".mlp.experts." not in n and ".mlp.gate." not in n}
    with pytest.raises(PlanError, match=r"experts.0.gate_proj.weight: is missing"):
        make_plan(open_source(model(tmp_path / "lost", settings, rest)), runtime="vllm")


def test_a_dense_model_says_the_width_of_its_heads(tmp_path: Path) -> None:
    """`head_dim: null` is hidden_size / heads for Paddle; for transformers' dense class nothing said is 128."""
    source = random_model(tmp_path / "src", layouts.PADDLE, "dense", head_dim=None)
    write(source, tmp_path / "pt")
    assert config(tmp_path / "pt")["head_dim"] == 64 // 4
    assert bool(logits(tmp_path / "pt", case="dense").isfinite().all())


@pytest.mark.parametrize("layout", ["paddle", "pt"])
@pytest.mark.parametrize("changes", [{}, {"moe_layer_start_index": None, "moe_layer_end_index": None}], ids=["said", "unsaid"])
def test_a_moe_that_is_called_dense(changes: dict[str, None], layout: str, tmp_path: Path) -> None:
    """Where config.json does not say which layers have experts, transformers takes all but the first."""
    settings = {"model_type": "ernie4_5", "architectures": ["Ernie4_5ForCausalLM"]} | changes
    source = model(tmp_path / "src", *golden("moe", layout, **settings))
    write(source, tmp_path / "pt")
    assert config(tmp_path / "pt") == config(GOLDEN / "moe/pt")
    assert same(tensors(tmp_path / "pt"), tensors(GOLDEN / "moe/pt")) == []
    assert "read as 'ernie4_5_moe'" in inspect(source).notes[0]


def test_a_moe_that_is_called_dense_and_does_not_say_enough(tmp_path: Path) -> None:
    source = model(tmp_path / "src", *golden("moe", model_type="ernie4_5", moe_k=None, moe_num_experts=None))
    with pytest.raises(
        ConfigError, match=r"a dense model, and the files hold model.layers.1.mlp.+ lacks moe_num_experts, moe_k$"
    ):
        inspect(source)


def test_experts_that_are_none_by_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"moe_num_experts is 0"):
        inspect(model(tmp_path / "src", *golden("moe", moe_num_experts=0)))
