"""What the sweep measures, against plain passes of a model with these weights in these codecs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from ernie_quant.calibration import forward, sensitivity
from ernie_quant.calibration.judge import divergences, judge
from ernie_quant.calibration.model import Model
from ernie_quant.calibration.opened import readable
from ernie_quant.calibration.tokenizer import tokenizer_of
from ernie_quant.calibration.trials import Changed
from ernie_quant.calibration.windows import Windows, windows

from ernie_quant.codecs import Codec
from ernie_quant.planning.measured import Sensitivity
from ernie_quant.planning.units import ATTENTION, FFN, Units, units_of

LENGTH = 64


def measured(folder: Path, book: Path, runtime: str, method: str = "") -> tuple[Units, Sensitivity, Windows]:
    source = readable(folder)
    units = units_of(source.checkpoint, runtime, method)
    text = windows(tokenizer_of(folder), (book,), 256, length=LENGTH, judge=bool(method))
    return units, sensitivity.measure(source, units, text, method=method), text


def final(model: Model, ids: torch.Tensor) -> torch.Tensor:
    hidden = forward.start(model, ids)
    for layer in range(model.geometry.layers):
        hidden = forward.through(model, layer, hidden)
    return hidden


def kl(model: Model, other: Model, ids: torch.Tensor) -> float:
    one, two = (final(m, ids)[:, :-1].flatten(0, 1) for m in (model, other))
    found = judge(model, one, ids[:, 1:].flatten(), (other, two)).kl
    assert found is not None
    return float(found.mean())


def changed(folder: Path, codecs: Mapping[str, Codec], ids: torch.Tensor) -> float:
    """KL of the model with these weights changed, the whole way from the tokens."""
    with readable(folder).read() as opened:
        return kl(opened.model, Changed.of(opened.model, codecs), ids)


@pytest.mark.parametrize("runtime", ["vllm", "llama_cpp"])
def test_streams_end_where_the_changed_model_does(runtime: str, model: Path, book: Path) -> None:
    units, found, text = measured(model, book, runtime)
    assert len(found.gains) == 2 * 3
    for gain in found.gains:
        there = [unit for unit in units.free if (unit.layer, unit.place) == (gain.layer, gain.place)]
        codecs = {name: unit.options[sensitivity.middle(unit)].codec for unit in there for name in unit.weights}
        assert gain.kl == pytest.approx(changed(model, codecs, text.ids), rel=2e-3), gain
        for unit in there:
            for error, cost in zip(found.errors[unit.name], found.costs[unit.name], strict=True):
                assert cost == pytest.approx((error or 0.0) * gain.kl / gain.error)


def test_every_codec_of_the_vocabulary_has_a_stream(model: Path, book: Path) -> None:
    units, found, text = measured(model, book, "llama_cpp")
    for unit in units.free:
        if unit.layer < 0:
            for option, cost in zip(unit.options, found.costs[unit.name], strict=True):
                exact = 0.0 if option.kept else changed(model, {unit.weights[0]: option.codec}, text.ids)
                assert cost == pytest.approx(exact, rel=5e-3, abs=1e-7), (unit.name, option.codec.form)


def test_errors_are_those_of_one_layer(model: Path, book: Path) -> None:
    """Energy of the difference over that of the residual, with this unit alone changed."""
    units, found, text = measured(model, book, "vllm")
    with readable(model).read() as opened:
        hidden = forward.start(opened.model, text.ids)
        for layer in range(opened.model.geometry.layers):
            after = forward.attention(opened.model, layer, hidden)
            out = forward.mlp(opened.model, layer, after)
            for unit in (u for u in units.free if u.layer == layer):
                for index, option in enumerate(unit.options):
                    other = Changed.of(opened.model, dict.fromkeys(unit.weights, option.codec))
                    place = {ATTENTION: (forward.attention, hidden, after), FFN: (forward.mlp, after, out)}[unit.place]
                    made = place[0](other, layer, place[1])
                    exact = float(((made - place[2]).pow(2).sum(-1) / place[2].pow(2).sum(-1)).mean())
                    assert found.errors[unit.name][index] == pytest.approx(exact, rel=1e-3, abs=1e-9), unit.name
            hidden = out


def test_codecs_that_look_at_text_are_judged_by_other_tokens(model: Path, book: Path) -> None:
    """With feedback the output errors of 4 bits are smaller than without, on tokens that it has not seen."""
    units, by_text, _ = measured(model, book, "vllm", "feedback")
    _, alone, _ = measured(model, book, "vllm")
    experts = [unit.name for unit in units.free if unit.experts]
    with_text = sum(float(by_text.errors[name][0] or 0) for name in experts)
    without = sum(float(alone.errors[name][0] or 0) for name in experts)
    assert 0 < with_text < without
    assert all("feedback" in unit.options[0].codec.describe() for unit in units.free)


def test_divergences_of_many_are_those_of_each(model: Path) -> None:
    torch.manual_seed(0)
    with readable(model).read() as opened:
        width = opened.model.geometry.hidden_size
        one = torch.randn(100, width)
        others = [one + torch.randn(100, width) * spread for spread in (1e-2, 0.1, 1.0)]
        head = Changed.of(
            opened.model, {opened.model.head: units_of(readable(model).checkpoint, "llama_cpp").free[0].options[0].codec}
        )
        pairs = [*((opened.model, other) for other in others), (head, one)]
        found = divergences(opened.model, one, pairs, 2)
        targets = torch.zeros(100, dtype=torch.int64)
        for value, pair in zip(found, pairs, strict=True):
            exact = judge(opened.model, one, targets, pair).kl
            assert exact is not None
            assert value == pytest.approx(float(exact.mean()), rel=1e-3)
