"""W4A8C8: what calibration measures of a text, and what `eval` makes of it, beside a plain forward pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ernie_quant.calibration import forward, integers
from ernie_quant.calibration.evaluate import evaluate, pair
from ernie_quant.calibration.opened import readable
from ernie_quant.calibration.targets import Largest
from ernie_quant.calibration.tokenizer import tokenizer_of
from ernie_quant.calibration.windows import windows
from helpers.commands import Command
from helpers.disk import no_waiting
from helpers.models import config, copy, invoke, random_model, tensors
from helpers.plain_w4a8c8 import PlainModel, Tensors
from helpers.words import byte_tokenizer
from safetensors.torch import save_file

from ernie_quant.codecs.w4a8 import RATIOS, Weight4Activation8
from ernie_quant.planning import built_in
from ernie_quant.planning.make import make_plan
from ernie_quant.run.whole import run_plan
from ernie_quant.sources import open_source

TOKENS = 1024
SHAPE: dict[str, object] = {
    "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "moe_num_experts": 4, "moe_k": 2, "num_hidden_layers": 3, "moe_layer_end_index": 2,
    "vocab_size": 256,
}  # fmt: skip
STARVED = 2  # an expert of layer 1 that no token is sent to
LENT = [(1, STARVED), (2, 0)]  # the other one has tokens, but fewer than 64 to fit to


@pytest.fixture(autouse=True)
def _at_once() -> Any:
    with no_waiting():
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, larger than the helper's, so that something happens in it; an expert that nobody asks."""
    folder = random_model(tmp_path_factory.mktemp("w4a8c8") / "source", "paddle", "moe", **SHAPE)
    table = {name: tensor * (4 if tensor.dim() == 2 else 1) for name, tensor in tensors(folder).items()}
    table["ernie.layers.1.mlp.moe_statics.e_score_correction_bias"][0, STARVED] = -100
    table |= {name: 1 + tensor for name, tensor in table.items() if name.endswith("norm.weight")}
    save_file(table, folder / "model.safetensors", metadata={"format": "np"})
    return byte_tokenizer(folder)


@pytest.fixture(scope="module")
def text(source: Path) -> Path:
    file = source.with_name("text.txt")
    file.write_text("".join(f"{n} is {'odd' if n % 2 else 'even'} and {n * n}.\n" for n in range(200)))
    return file


def quantized(source: Path, text: Path, out: Path, *options: object) -> Path:
    with no_waiting():
        invoke("w4a8", source, out, "--calibration", text, "--calibration-tokens", TOKENS, "--quiet", *options)
    return out


@pytest.fixture(scope="module")
def out(source: Path, text: Path) -> Path:
    return quantized(source, text, source.with_name("out"))


@pytest.fixture(scope="module")
def plain(source: Path, out: Path) -> tuple[dict[str, Any], Tensors, Tensors]:
    """config.json, and weights by their PT names: as the result has them, and the source's."""
    found = []
    for folder in (out, source):
        there = folder.with_name(f"{folder.name}-plain")
        command = "dequantize" if folder == out else "convert"
        invoke(command, folder, there, "--to", "pt", "--quiet")
        found.append(tensors(there))
    return config(there), found[0], found[1]


def scales_of(folder: Path) -> Tensors:
    return {name: tensor for name, tensor in tensors(folder).items() if name.endswith("activation_scale")}


def test_scales_are_parts_of_the_largest_that_a_plain_pass_over_the_text_rounds(
    source: Path, text: Path, out: Path, plain: tuple[dict[str, Any], Tensors, Tensors]
) -> None:
    """All tokens count, those that judge a fit too; what goes into a layer comes from the layers before it as they are stored.

    Keys and values by the weights of the source, and their scales are never less. An expert without tokens has scales, too.
    """
    facts, weights, sources = plain
    scales = scales_of(out)
    model = PlainModel(facts, weights, scales, sources)
    ids = windows(tokenizer_of(source), (text,), TOKENS, seed=0).ids
    for window in ids:
        model.logits(window)
    starved = {name for name in scales for layer, expert in LENT if f"layers.{layer}.mlp.experts.{expert}." in name}
    assert len(starved) == 2 * len(LENT)
    assert len(scales) == 3 * 2 + 2 * 4 * 2
    for name, scale in scales.items():
        assert scale.dtype == torch.float32
        assert (scale > 0).all()
        if "cache" in name:
            assert torch.allclose(scale, model.largest[name], rtol=1e-3), name
        elif name not in starved:
            part = float(scale / model.largest[name])
            assert min(abs(part / ratio - 1) for ratio in RATIOS) < 0.02, name


def test_a_scale_is_less_than_the_largest_input_where_that_costs_the_output_less() -> None:
    """127 tokens from -1 to 1, and one that is 2: to cut it off is worth half the step of all others, if it hardly counts."""
    inputs, columns = torch.linspace(-1, 1, 508).view(127, 4), torch.ones(4)
    loud = torch.cat([inputs, torch.full((1, 4), 2.0)])
    codec = Weight4Activation8()

    def scale(counts: float, columns: torch.Tensor) -> float:
        largest = Largest(codec)
        largest.add(loud)
        weight = torch.cat([torch.ones(127), torch.tensor([counts])])
        return float(largest.known([(loud[:100], weight[:100]), (loud[100:], weight[100:])], columns)["largest"])

    assert scale(1.0, columns) == 2.0
    assert scale(0.0, columns) == 1.0
    assert scale(0.0, torch.tensor([1.0, 0, 0, 0])) == 1.0
    assert float(Largest(codec).known([], columns)["largest"]) == 0.0


def test_experts_of_other_tokens_are_named(out: Path) -> None:
    layers = json.loads((out / "report.json").read_text())["calibration"]["layers"]
    assert [(i, e) for i, layer in enumerate(layers) for e in layer.get("activation_scales_of_others", [])] == LENT
    assert layers[1]["expert_tokens"][STARVED] == 0 < layers[2]["expert_tokens"][0]
    said = "activation scales of 2 of 8 experts are of tokens that go to other experts"
    assert said in (out / "ernie-quant.json").read_text()
    assert f"{said}, for they had fewer than 64 to fit to: layer 1: 2; layer 2: 0;" in (out / "README.md").read_text()


def nll(model: PlainModel, ids: torch.Tensor) -> torch.Tensor:
    """[windows * 511]."""
    found = [-model.logits(w)[:-1].log_softmax(-1).gather(-1, w[1:, None])[:, 0] for w in ids]
    return torch.cat(found).double()


def test_eval_computes_with_the_integers_that_lie_in_the_file(
    source: Path, text: Path, out: Path, plain: tuple[dict[str, Any], Tensors, Tensors]
) -> None:
    """Layer after layer from the same hidden states: a value between two codes goes here to one and there to the other where
    sums are in another order, and layers multiply that. The few that do cost a hundredth of what all rounding costs."""
    facts, weights, _ = plain
    exact, rounded = PlainModel(facts, weights), PlainModel(facts, weights, scales_of(out))
    h = weights["model.embed_tokens.weight"].float()[torch.tensor(list(text.read_bytes())[:512])]
    with readable(out).read() as opened, readable(out, rounds=False).read() as without:
        for layer in range(3):
            floats, expected = exact.through(layer, h), rounded.through(layer, h)
            assert torch.allclose(forward.through(without.model, layer, h[None])[0], floats, atol=1e-4)
            found = forward.through(opened.model, layer, h[None])[0]
            assert float((found - expected).square().sum()) < 1e-2 * float((floats - expected).square().sum())
            h = expected
    perplexity = float(nll(exact, torch.tensor(list(text.read_bytes())[:512])[None]).mean().exp())
    assert evaluate(pair(out, source, rounds=False), [text], 511).together.perplexity.value == pytest.approx(perplexity, rel=1e-4)
    simulated, left_out = (evaluate(pair(out, source, rounds=rounds), [text], 511).together.kl for rounds in (True, False))
    assert simulated is not None
    assert left_out is not None
    assert simulated.value != pytest.approx(left_out.value, rel=1e-3)


def damaged(out: Path, folder: Path, ending: str, factor: float) -> Path:
    """A copy with other scales."""
    copy(out, folder)
    file = next(folder.glob("model*.safetensors"))
    table = tensors(folder)
    changed = [name for name in table if name.endswith(ending)]
    assert changed
    save_file(table | {name: table[name] * factor for name in changed}, file, metadata={"format": "np"})
    return folder


@pytest.mark.parametrize(
    ("ending", "factor"),
    [
        ("up_gate_proj.activation_scale", 0.05), ("down_proj.activation_scale", 0.05), ("down_proj.activation_scale", 60),
        ("cachek_matmul.activation_scale", 60), ("cachev_matmul.activation_scale", 0.05),
    ],
)  # fmt: skip
def test_wrong_scales_cost_something(source: Path, text: Path, out: Path, tmp_path: Path, ending: str, factor: float) -> None:
    wrong = damaged(out, tmp_path / "wrong", ending, factor)
    before, after = (evaluate(pair(folder, source), [text], 511).together.kl for folder in (out, wrong))
    assert before is not None
    assert after is not None
    assert after.value > 1.05 * before.value
    weights = [evaluate(pair(folder, source, rounds=False), [text], 511).together for folder in (out, wrong)]
    assert weights[0] == weights[1]


class Stopped(Exception):
    """By us."""


def bytes_of(folder: Path) -> Mapping[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("moves", [2, 9, 15])
def test_a_stopped_run_goes_on_and_has_the_same_scales(
    moves: int, source: Path, text: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ernie_quant.calibration import calibrated

    seen: list[str] = []
    moved = calibrated.Where.moved

    def stop(self: calibrated.Where, place: str) -> None:
        seen.append(place)
        if len(seen) == moves:
            raise Stopped
        moved(self, place)

    monkeypatch.setattr(calibrated.Where, "moved", stop)
    with pytest.raises(Stopped):
        quantized(source, text, tmp_path / out.name)
    assert not list((tmp_path / out.name).glob("model*.safetensors"))
    monkeypatch.undo()
    quantized(source, text, tmp_path / out.name)
    assert bytes_of(tmp_path / out.name) == bytes_of(out)


def test_ranks_have_the_scales_of_their_share(source: Path, text: Path, out: Path, tmp_path: Path) -> None:
    """Of an expert all ranks the same; of the cache each those of its kv heads."""
    ranks = quantized(source, text, tmp_path / "ranks", "--tp", 2)
    whole, shares = scales_of(out), [scales_of(ranks / f"rank{rank}") for rank in range(2)]
    for name, scale in whole.items():
        parts = [share[name] for share in shares]
        if "cache" in name:
            assert torch.equal(torch.cat(parts), scale), name
        else:
            assert torch.equal(parts[0], scale), name
            assert torch.equal(parts[1], scale), name
    one, two = (evaluate(pair(folder, source), [text], 511).together for folder in (out, ranks))
    assert one == two


def test_a_cache_rounds_to_even_and_saturates() -> None:
    """Scale 127: x is its own code, in bfloat16 factors of exactly 1. Scale 1: steps of 1/127, a bfloat16 each way."""
    cache = integers.Cache(torch.tensor([127.0, 127.0]), torch.tensor([1.0, 254.0]))
    x = torch.tensor([[[[0.5, 1.5], [-2.5, 200.0]]]])
    assert cache.keys(x).tolist() == [[[[0.0, 2.0], [-2.0, 127.0]]]]
    step = float((torch.tensor(1.0) / 127).bfloat16())
    assert torch.allclose(cache.values(x)[..., 0], torch.tensor([64.0, -127.0]) * step)  # 63.5, and 1 that is not reached
    assert cache.values(x)[..., 1].tolist() == [[[2.0, 200.0]]]  # 0.75 and 100 steps of 2


def test_what_people_are_told(source: Path, text: Path, out: Path, command: Command) -> None:
    asked = ("eval", out, "--against", source, "--text", text, "--tokens", 511)
    words = "int8 activations of experts and an int8 KV cache"
    assert command(*asked)[1].splitlines()[-1].endswith(f"; {words}, simulated")
    assert command(*asked, "--weights-only")[1].splitlines()[-1].endswith(f"; {words}, left out")
    assert json.loads(command(*asked, "--json")[1])["result"]["integers"] == f"{words}, simulated"
    plain = json.loads(command("eval", source, "--text", text, "--tokens", 511, "--json")[1])
    assert plain["result"]["integers"] == ""


def test_other_forms_round_nothing(source: Path, text: Path, tmp_path: Path) -> None:
    """No input of a plain or another quantized checkpoint goes through anything."""
    made = built_in.make("wint4", "fastdeploy")
    run_plan(make_plan(open_source(source), runtime="fastdeploy", recipe=made.recipe), tmp_path / "out")
    for folder in (source, tmp_path / "out"):
        with readable(folder).read() as opened:
            model = opened.model
            assert model.linear("model.layers.1.mlp.experts.0.down_proj").rounds is None
            assert model.linear("model.layers.1.self_attn.k_proj").rounds is None
            assert model.cache(1) is None


def test_dequantized_weights_round_nothing(source: Path, text: Path, out: Path, plain: Any) -> None:
    """A plain form of it is `--weights-only`, bit for bit."""
    there = out.with_name("out-plain")
    if not (there / "tokenizer.json").exists():
        shutil.copy(source / "tokenizer.json", there)
    left_out = evaluate(pair(out, source, rounds=False), [text], 511).together
    assert evaluate(pair(there, source), [text], 511).together == left_out
