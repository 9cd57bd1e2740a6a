"""A pass of our own, a layer at a time, beside transformers': hidden states after every layer, logits, what is observed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ernie_quant.calibration import forward, judge
from ernie_quant.calibration.forward import start, through
from ernie_quant.calibration.judge import judge as judged
from ernie_quant.calibration.layer import rms_norm
from ernie_quant.calibration.opened import Opened, readable
from helpers.models import GOLDEN, random_model, states, tensors, write
from safetensors.torch import save_file

from ernie_quant.errors import PlanError, TextError
from ernie_quant.planning import built_in
from ernie_quant.weights import layouts

CLOSE = 1e-4

# every way in which a checkpoint of one of the models is stored
CASES = [
    *(("dense", form) for form in ("pt", "paddle", "paddle_pdparams", "paddleformers_native")),
    *(("moe", form) for form in ("pt", "paddle", "paddle_pdparams")),
    *(("moe_mtp", form) for form in ("pt", "paddle")),
    ("moe_hf", "pt"),
    *(("vl", form) for form in ("pt", "paddle", "pt_resaved_by_transformers")),
]


def ids_of(family: str) -> torch.Tensor:
    return torch.from_numpy(np.load(GOLDEN / family / "input_ids.npy"))


@contextmanager
def opened(folder: Path) -> Iterator[Opened]:
    with readable(folder).read() as found:
        yield found


def passed(found: Opened, ids: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """Embeddings, and the residual after every layer."""
    hidden = [start(found.model, ids)]
    for layer in range(found.model.geometry.layers):
        hidden.append(through(found.model, layer, hidden[-1], **options))
    return hidden


def logits(found: Opened, hidden: torch.Tensor) -> torch.Tensor:
    side = judge._Logits(found.model, hidden.flatten(0, 1))
    rows, vocabulary = slice(0, len(side.seen)), found.model.geometry.vocab_size
    return side.logits(rows, side.slab(0, vocabulary), 0).float().view(*hidden.shape[:2], vocabulary)


@pytest.mark.parametrize("family", ["dense", "moe", "moe_mtp", "moe_hf", "vl"])
def test_every_layer_is_that_states(family: str) -> None:
    folder = GOLDEN / family / ("pt_resaved_by_transformers" if family == "vl" else "pt")
    expected, expected_logits = states(folder, ids_of(family))
    with opened(folder) as found:
        hidden = passed(found, ids_of(family))
        assert len(hidden) == len(expected) > 2
        for layer, (mine, theirs) in enumerate(zip(hidden[:-1], expected[:-1], strict=True)):
            assert (mine - theirs).abs().max() < CLOSE, f"before layer {layer}"
        normed = rms_norm(hidden[-1], found.model.norm("model.norm"), found.model.geometry.eps)
        assert (normed - expected[-1]).abs().max() < CLOSE
        assert (logits(found, hidden[-1]) - expected_logits).abs().max() < CLOSE


@pytest.mark.parametrize(("family", "form"), CASES)
def test_logits_of_every_form_are_those_of_the_original_code(family: str, form: str) -> None:
    expected = torch.from_numpy(np.load(GOLDEN / family / "expected_logits_fp32.npy"))
    with opened(GOLDEN / family / form) as found:
        assert (logits(found, passed(found, ids_of(family))[-1]) - expected).abs().max() < CLOSE


def test_biases(tmp_path: Path) -> None:
    """In attention and the dense MLP."""
    folder = random_model(tmp_path / "model", layouts.PT, "dense", use_bias=True)
    checkpoint = tensors(folder)
    del checkpoint["lm_head.bias"]  # transformers has none in a dense model
    rows = [row for row in readable(GOLDEN / "dense/pt").table.map.rows() if row.rule.need == "use_bias"]
    for name, shape in ((name, shape) for row in rows for name, shape in zip(row.pt, row.shapes, strict=True)):
        checkpoint[name] = torch.randn(shape, generator=torch.Generator().manual_seed(len(name))).bfloat16()
    save_file(checkpoint, folder / "model.safetensors", metadata={"format": "pt"})
    _, expected = states(folder, ids_of("dense"))
    with opened(folder) as found:
        assert (logits(found, passed(found, ids_of("dense"))[-1]) - expected).abs().max() < CLOSE


def test_quantized_weights_are_decoded_as_they_stream(tmp_path: Path) -> None:
    write(GOLDEN / "moe/paddle", tmp_path / "out", recipe=built_in.make("wint4", "vllm", group_size=32, experts_only=True).recipe)
    _, expected = states(tmp_path / "out", ids_of("moe"))
    with opened(tmp_path / "out") as found, opened(GOLDEN / "moe/pt") as source:
        mine = logits(found, passed(found, ids_of("moe"))[-1])
        assert (mine - expected).abs().max() < 0.02 * expected.abs().max()  # it computes parts in bfloat16
        assert (mine - logits(source, passed(source, ids_of("moe"))[-1])).abs().max() > 10 * (mine - expected).abs().max()


# --- chunks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["dense", "moe", "vl"])
def test_the_size_of_chunks_does_not_matter(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(0, 256, (5, 16), generator=torch.Generator().manual_seed(0))
    with opened(GOLDEN / family / "pt") as found:
        whole = passed(found, ids)[-1]
        monkeypatch.setattr(forward, "TOKENS_AT_ONCE", 7)
        assert (passed(found, ids)[-1] - whole).abs().max() < CLOSE
        targets = ids.roll(-1, 1).flatten()
        expected = torch.nn.functional.cross_entropy(logits(found, whole).flatten(0, 1), targets, reduction="none")
        monkeypatch.setattr(judge, "SLAB_BYTES", 4 * found.model.geometry.hidden_size * 50)
        monkeypatch.setattr(judge, "LOGITS", 300)
        assert (judged(found.model, whole.flatten(0, 1), targets).nll - expected).abs().max() < CLOSE


def test_divergence_of_two_models_is_that_of_whole_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1).flatten()
    other = random_model(tmp_path / "other", layouts.PT, "moe_mtp")
    monkeypatch.setattr(judge, "SLAB_BYTES", 4 * 64 * 50)
    monkeypatch.setattr(judge, "LOGITS", 700)
    with opened(GOLDEN / "moe_mtp/pt") as one, opened(other) as two:
        mine, theirs = passed(one, ids)[-1], passed(two, ids)[-1]
        p, q = (logits(m, h).flatten(0, 1).double().log_softmax(-1) for m, h in ((one, mine), (two, theirs)))
        found = judged(one.model, mine.flatten(0, 1), targets, (two.model, theirs.flatten(0, 1)))
        same = judged(one.model, mine.flatten(0, 1), targets, (one.model, mine.flatten(0, 1)))
    assert found.kl is not None
    assert found.nll_other is not None
    assert found.same is not None
    assert same.kl is not None
    kl = (p.exp() * (p - q)).sum(-1)
    assert kl.mean() > 0.1
    assert (found.kl - kl).abs().max() < 1e-5
    assert (found.nll + p.gather(1, targets[:, None])[:, 0]).abs().max() < 1e-5
    assert (found.nll_other + q.gather(1, targets[:, None])[:, 0]).abs().max() < 1e-5
    assert torch.equal(found.same, (p.argmax(-1) == q.argmax(-1)).double())
    assert same.kl.abs().max() < 1e-12


# --- what is observed ------------------------------------------------------------------------------------------------


class Log:
    """All that was shown, by point."""

    def __init__(self) -> None:
        self.shown: dict[str, list[tuple[torch.Tensor, torch.Tensor | None]]] = {}

    def __call__(self, point: str, inputs: torch.Tensor, heard: torch.Tensor | None) -> None:
        self.shown.setdefault(point, []).append((inputs.clone(), heard))

    def inputs(self, point: str) -> torch.Tensor:
        return torch.cat([inputs for inputs, _ in self.shown[point]])

    def heard(self, point: str) -> torch.Tensor:
        return torch.cat([heard for _, heard in self.shown[point] if heard is not None])


def test_inputs_of_every_projection_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "TOKENS_AT_ONCE", 24)
    log, ids = Log(), ids_of("moe")
    with opened(GOLDEN / "moe/pt") as found:
        before = passed(found, ids)[1]
        after = through(found.model, 1, before, log)
        assert torch.equal(after, through(found.model, 1, before))
        shape, routing = found.model.geometry.attention, found.model.geometry.routing
        assert routing
        experts = [f"mlp.experts.{i}" for i in range(routing.experts) if f"mlp.experts.{i}.gate_up" in log.shown]
        places = ["mlp.gate", "self_attn.qkv", "self_attn.k", "self_attn.v", "self_attn.o_proj"]
        places += [f"{place}.{point}" for place in ("mlp.shared_experts", *experts) for point in ("gate_up", "down_proj")]
        assert sorted(log.shown) == sorted(places)
        assert len(log.shown["self_attn.qkv"]) == 2  # chunks
        assert log.inputs("self_attn.qkv").shape == (48, before.shape[-1])
        assert log.inputs("self_attn.k").shape == (48, shape.kv_heads * shape.head_dim)
        assert sum(len(log.inputs(f"{e}.gate_up")) for e in experts) == 48 * routing.top_k
        assert sum(float(log.heard(f"{e}.down_proj").sum()) for e in experts) == pytest.approx(48, rel=1e-5)
        # what was shown makes the output again
        added = after - forward.attention(found.model, 1, before)
        said = torch.zeros(48, before.shape[-1])
        x = log.inputs("mlp.shared_experts.gate_up")
        assert torch.equal(x, log.inputs("mlp.gate"))
        said += found.model.linear("model.layers.1.mlp.shared_experts.down_proj")(log.inputs("mlp.shared_experts.down_proj"))
        for expert in experts:
            rows = [int((x == row).all(1).nonzero()[0]) for row in log.inputs(f"{expert}.gate_up")]
            out = found.model.linear(f"model.layers.1.{expert}.down_proj")(log.inputs(f"{expert}.down_proj"))
            said[rows] += out * log.heard(f"{expert}.down_proj")[:, None]
        assert (said - added.flatten(0, 1)).abs().max() < CLOSE


def test_all_experts_see_all_tokens_and_nothing_else_changes() -> None:
    log, ids = Log(), ids_of("moe")
    with opened(GOLDEN / "moe/pt") as found:
        before = passed(found, ids)[1]
        after = through(found.model, 1, before, log, all_experts=True)
        assert (after - through(found.model, 1, before)).abs().max() < 1e-5
        routing = found.model.geometry.routing
        assert routing
        for number in range(routing.experts):
            assert len(log.inputs(f"mlp.experts.{number}.gate_up")) == 48
        heard = torch.stack([log.heard(f"mlp.experts.{number}.down_proj") for number in range(routing.experts)], 1)
        assert ((heard > 0).sum(1) == routing.top_k).all()


# --- refused ---------------------------------------------------------------------------------------------------------


def test_tokens_of_another_vocabulary() -> None:
    with opened(GOLDEN / "moe/pt") as found, pytest.raises(TextError, match="token ids are 0 to 256, the model has 0 to 255"):
        start(found.model, torch.tensor([[0, 256]]))


def test_a_checkpoint_with_problems(tmp_path: Path) -> None:
    folder = random_model(tmp_path / "model", layouts.PT, "moe")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7}))
    with pytest.raises(PlanError, match=r"has \d+ problem\(s\)"):
        readable(folder)
