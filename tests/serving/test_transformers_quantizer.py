"""`import ernie_quant.transformers`: it computes what it computes from the checkpoint that `dequantize` makes, to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.containers import decode_wint2
from helpers.in_transformers import CASES, TWO_BITS, Pair, difference, loaded, logits, other_parameters
from helpers.models import config, tensors
from transformers import AutoModel
from transformers.trainer_utils import validate_quantization_for_training

Pairs = Callable[[str], Pair]


@pytest.mark.parametrize("case", CASES)
def test_decoded_when_it_is_loaded(case: str, pairs: Pairs, ours: Any) -> None:
    """Every parameter, those of experts that no token of a text meets included."""
    pair = pairs(case)
    found, plain = loaded(pair.out), loaded(pair.plain)
    assert other_parameters(found, plain) == []
    assert difference(found, plain) == 0.0


def test_they_are_not_the_weights_of_the_source(pairs: Pairs) -> None:
    """Or the test above could not fail."""
    pair = pairs("WINT2")
    assert len(other_parameters(loaded(pair.plain), loaded(pair.source))) == 4


@pytest.mark.parametrize("case", TWO_BITS)
def test_native(case: str, pairs: Pairs, ours: Any) -> None:
    """Quantized experts stay as they are stored, and everything else is as if it had been decoded."""
    pair = pairs(case)
    found = loaded(pair.out, quantization_config=ours.Wint2Config(native=True))
    assert difference(found, loaded(pair.plain, experts_implementation="eager")) == 0.0
    experts = [module for module in found.modules() if type(module).__name__ == "PackedExperts"]
    assert len(experts) == TWO_BITS[case]
    for module in experts:
        assert {p.dtype for p in module.parameters()} == {torch.uint8}


PIECES = ((0, "gate_proj", slice(0, 256)), (2, "up_proj", slice(256, 512)), (1, "down_proj", slice(None)))


def test_an_independent_decoder_finds_the_same(pairs: Pairs, ours: Any) -> None:
    """Of numpy and FastDeploy's formulas, whose tensors these are, turned round."""
    pair = pairs("WINT2")
    stored, found = tensors(pair.out), dict(loaded(pair.out).named_parameters())
    for expert, projection, rows in PIECES:
        packed, local, channel = (
            stored[f"model.layers.2.mlp.experts.{expert}.{projection}.weight_{part}"].numpy().T
            for part in ("packed", "scale", "channel_scale")
        )
        bf16 = (channel[0].copy().view(np.uint32) >> 16).astype(np.uint16)
        parts = {
            "quant_weight": packed, "weight_scale": local, "super_scales": bf16,
            "code_scale": channel[1], "code_zp": channel[2],
        }  # fmt: skip
        name = "down_proj" if projection == "down_proj" else "gate_up_proj"
        weight = found[f"model.layers.2.mlp.experts.{name}"][expert][rows]
        assert np.array_equal(weight.detach().float().numpy(), decode_wint2(parts).T)


def test_what_native_experts_take(pairs: Pairs, ours: Any) -> None:
    """For a weight [N, K] K/4 + K/128 + 12 bytes a row: a seventh of bf16 for rows of 256."""
    pair = pairs("WINT2")
    sizes = []
    for folder, named in ((pair.plain, {}), (pair.out, {"quantization_config": ours.Wint2Config(native=True)})):
        model = loaded(folder, **named)
        sizes.append(sum(p.nbytes for name, p in model.named_parameters() if ".mlp.experts." in name))
        assert sum(p.nbytes for p in model.parameters()) > sizes[-1]
    layers, experts, hidden, inner = 2, 3, 256, 256
    rows = layers * experts * 2 * inner, layers * experts * hidden
    assert sizes[0] == 2 * (rows[0] * hidden + rows[1] * inner)
    assert sizes[1] == rows[0] * (hidden // 4 + hidden // 128 + 12) + rows[1] * (inner // 4 + inner // 128 + 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["WINT4, then WINT2, WINT8", "VL, int4"])
def test_in_another_dtype(case: str, dtype: torch.dtype, pairs: Pairs, ours: Any) -> None:
    pair = pairs(case)
    found, plain = loaded(pair.out, dtype=dtype), loaded(pair.plain, dtype=dtype)
    assert other_parameters(found, plain) == []
    if "WINT2" in case:
        native = loaded(pair.out, dtype=dtype, quantization_config=ours.Wint2Config(native=True))
        assert difference(native, loaded(pair.plain, dtype=dtype, experts_implementation="eager")) == 0.0


def test_native_experts_stand_a_cast(pairs: Pairs, ours: Any) -> None:
    """float16 has no room for their scales: these are bytes, which a cast leaves alone."""
    pair = pairs("WINT2")
    found = loaded(pair.out, quantization_config=ours.Wint2Config(native=True)).to(torch.float32)
    plain = loaded(pair.plain, experts_implementation="eager").to(torch.float32)
    assert difference(found, plain) == 0.0


def test_a_native_model_generates_and_is_copied(pairs: Pairs, ours: Any) -> None:
    pair = pairs("WINT4, then WINT2, WINT8")
    found = copy.deepcopy(loaded(pair.out, quantization_config=ours.Wint2Config(native=True)))
    plain = loaded(pair.plain, experts_implementation="eager")
    asked = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    left, right = (model.generate(torch.arange(3, 9)[None], **asked).logits for model in (found, plain))
    assert len(left) == 3
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


PLACES = ("embed_tokens", "rotary_emb", "norm", "layers.0", "layers.1", "layers.2")
ON_DISK = {f"model.{place}": "disk" if place == "layers.1" else "cpu" for place in PLACES} | {"lm_head": "cpu"}


@pytest.mark.parametrize("device_map", ["auto", "cpu", ON_DISK], ids=["auto", "cpu", "disk"])
def test_by_accelerate(device_map: Any, pairs: Pairs, ours: Any, tmp_path: Path) -> None:
    """On the CPU, and one layer on disk."""
    pair = pairs("WINT2")
    named = {"device_map": device_map, "offload_folder": tmp_path} if device_map is ON_DISK else {"device_map": device_map}
    assert difference(loaded(pair.out, **named), loaded(pair.plain)) == 0.0
    native = loaded(pair.out, quantization_config=ours.Wint2Config(native=True), **named)
    assert difference(native, loaded(pair.plain, experts_implementation="eager")) == 0.0


@pytest.mark.parametrize("case", ["WINT2", "VL, WINT2"])
def test_a_decoded_model_is_a_plain_one(case: str, pairs: Pairs, ours: Any, tmp_path: Path) -> None:
    """It is saved as one, in the names that transformers saves any in."""
    pair = pairs(case)
    found, plain = loaded(pair.out), loaded(pair.plain)
    validate_quantization_for_training(found)
    for name, model in {"found": found, "plain": plain}.items():
        model.save_pretrained(tmp_path / name)
    assert "quantization_config" not in (tmp_path / "found/config.json").read_text()
    assert tensors(tmp_path / "found").keys() == tensors(tmp_path / "plain").keys()
    assert other_parameters(loaded(tmp_path / "found"), plain) == []
    assert config(tmp_path / "found") == config(tmp_path / "plain")


def test_a_native_model_is_neither_saved_nor_trained(pairs: Pairs, ours: Any, tmp_path: Path) -> None:
    model = loaded(pairs("WINT2").out, quantization_config=ours.Wint2Config(native=True))
    with pytest.raises(ValueError, match="ernie-wint2 and is not serializable"):
        model.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        validate_quantization_for_training(model)


def test_a_model_without_a_head(pairs: Pairs, ours: Any) -> None:
    """Its parameters are called otherwise."""
    pair = pairs("WINT4, then WINT2, WINT8")
    named = {"dtype": torch.bfloat16}
    found, plain = (AutoModel.from_pretrained(folder, **named) for folder in (pair.out, pair.plain))
    assert other_parameters(found, plain) == []
    native = AutoModel.from_pretrained(pair.out, quantization_config=ours.Wint2Config(native=True), **named)
    assert type(native.layers[2].mlp.experts).__name__ == "PackedExperts"
    with torch.no_grad():
        assert native(input_ids=torch.arange(5)[None]).last_hidden_state.isfinite().all()


def test_a_vision_expert_is_asked_in_native_mode_too(pairs: Pairs, ours: Any) -> None:
    """Tokens of an image, whose experts have another width."""
    pair = pairs("VL, WINT2")
    kinds = (torch.arange(24).reshape(2, 12) % 3 == 0).int()
    found = loaded(pair.out, quantization_config=ours.Wint2Config(native=True))
    plain = loaded(pair.plain, experts_implementation="eager")
    ids = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        left, right = (model(input_ids=ids, moe_mm_token_type_ids=kinds).logits for model in (found, plain))
        text = plain(input_ids=ids).logits
    assert torch.equal(left, right)
    assert not torch.equal(right, text)
    assert logits(found).isfinite().all()
