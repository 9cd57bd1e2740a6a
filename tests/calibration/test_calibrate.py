"""`calibrate`: statistics that are those of the inputs, in a file that anybody can read, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import Command, refusal
from helpers.models import GOLDEN, copy, tensors
from helpers.words import byte_tokenizer, lines
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ernie_quant.calibration import collect, forward
from ernie_quant.calibration.forward import start, through
from ernie_quant.calibration.opened import readable
from ernie_quant.readers import read_header

TOKENS = 1024


@pytest.fixture(scope="module")
def text(book: Path) -> Path:
    """Many documents."""
    return lines(book.with_name("lines.jsonl"), *book.read_text().splitlines(keepends=True))


def collected(command: Command, model: Path, out: Path, text: Path, *options: object) -> Any:
    code, printed, err = command("calibrate", model, out, "--text", text, "--tokens", TOKENS, *options, "--json")
    assert (code, err) == (0, "")
    return json.loads(printed)


class Kept:
    """All inputs, by point; and routing weights."""

    def __init__(self) -> None:
        self.inputs: dict[str, torch.Tensor] = {}
        self.heard: dict[str, torch.Tensor] = {}

    def __call__(self, point: str, inputs: torch.Tensor, heard: torch.Tensor | None) -> None:
        assert point not in self.inputs
        self.inputs[point] = inputs.double()
        if heard is not None:
            self.heard[point] = heard


def inputs_of(model: Path, text: Path, layer: int, **options: Any) -> Kept:
    """Of the same windows, in one chunk."""
    from ernie_quant.calibration.tokenizer import tokenizer_of
    from ernie_quant.calibration.windows import windows

    kept = Kept()
    with readable(model).read() as opened:
        hidden = start(opened.model, windows(tokenizer_of(model), [text], TOKENS, judge=False).ids)
        for before in range(layer):
            hidden = through(opened.model, before, hidden)
        through(opened.model, layer, hidden, kept, **options)
    return kept


def test_statistics_are_those_of_the_inputs(
    model: Path, text: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {layer: inputs_of(model, text, layer) for layer in range(3)}
    monkeypatch.setattr(forward, "TOKENS_AT_ONCE", 200)  # several chunks
    found = collected(command, model, tmp_path / "s.safetensors", text, "--matrices")
    table = load_file(tmp_path / "s.safetensors")
    assert found["nbytes"] == (tmp_path / "s.safetensors").stat().st_size
    assert {ref.name for ref in read_header(tmp_path / "s.safetensors")} == table.keys()
    checked = set()
    for name, value in table.items():
        layer, point, statistic = re.fullmatch(r"model\.layers\.(\d)\.(.+)\.(\w+)", name).groups()  # type: ignore[union-attr]
        stacked = point.startswith("mlp.experts")
        checked.add(("mlp.experts" if stacked else point, statistic))
        for number, row in enumerate(value) if stacked else [(-1, value)]:
            kind = point.removeprefix("mlp.experts").lstrip(".")
            x = kept[int(layer)].inputs.get(f"mlp.experts.{number}.{kind or 'gate_up'}" if stacked else point)
            if statistic == "tokens":
                assert row == (0 if x is None else len(x))
            elif x is None:
                assert not row.any()
            else:
                expected = {"second_moment": x.square().mean(0), "max_abs": x.abs().amax(0), "hessian": x.T @ x / len(x)}
                assert torch.allclose(row.double(), expected[statistic], rtol=1e-4, atol=1e-6), name
    both = {"second_moment", "max_abs"}
    wanted = {p: both | {"hessian"} for p in ("self_attn.qkv", "self_attn.o_proj", "mlp.gate", "mlp.gate_up")}
    wanted |= dict.fromkeys(("mlp.down_proj", "mlp.shared_experts.gate_up", "mlp.shared_experts.down_proj"), both)
    wanted |= {"mlp.experts": both | {"tokens"}, "self_attn.k": {"max_abs"}, "self_attn.v": {"max_abs"}}
    assert checked == {(point, statistic) for point, statistics in wanted.items() for statistic in statistics}


def test_the_file_says_what_it_is_of(model: Path, text: Path, tmp_path: Path, command: Command) -> None:
    found = collected(command, model, tmp_path / "s.safetensors", text, "--seed", 5)
    with safe_open(tmp_path / "s.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "ernie-quant statistics 1"
    assert metadata["all_experts"] == "false"
    said = json.loads(metadata["text"])
    assert said == found["text"]
    assert (said["name"], said["tokens"], said["window"], said["seed"]) == ("lines.jsonl", TOKENS, 512, 5)
    assert json.loads(metadata["source"]) == readable(model).identity
    assert str(tmp_path.parent) not in str(metadata)
    other = copy(GOLDEN / "moe/pt", tmp_path / "other")
    assert readable(other).identity["weights"] != readable(GOLDEN / "dense/pt").identity["weights"]
    assert readable(other).identity["weights"] == readable(GOLDEN / "moe/paddle").identity["weights"]


def test_the_same_again(model: Path, text: Path, tmp_path: Path, command: Command) -> None:
    one, two = (collected(command, model, tmp_path / f"{n}.safetensors", text) for n in "ab")
    assert one["sha256"] == two["sha256"]
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def lonely(model: Path, folder: Path) -> Path:
    """Nobody asks expert 0 of layer 1."""
    table = tensors(copy(model, folder))
    table["model.layers.1.mlp.moe_statics.e_score_correction_bias"][:, 0] = -100
    save_file(table, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_experts_that_nobody_asks_are_named(model: Path, text: Path, tmp_path: Path, command: Command) -> None:
    alone = lonely(model, tmp_path / "lonely")
    found = collected(command, alone, tmp_path / "a.safetensors", text)
    assert [1, 0] in found["unseen"]
    assert not load_file(tmp_path / "a.safetensors")["model.layers.1.mlp.experts.down_proj.second_moment"][0].any()
    every = collected(command, alone, tmp_path / "b.safetensors", text, "--all-experts")
    assert every["unseen"] == found["unseen"]
    table = load_file(tmp_path / "b.safetensors")
    kept = inputs_of(alone, text, 1, all_experts=True)
    x = kept.inputs["mlp.experts.0.down_proj"]
    assert len(x) == TOKENS
    assert torch.allclose(
        table["model.layers.1.mlp.experts.down_proj.second_moment"][0].double(), x.square().mean(0), rtol=1e-4, atol=1e-9
    )
    assert torch.equal(
        table["model.layers.1.mlp.experts.tokens"], load_file(tmp_path / "a.safetensors")["model.layers.1.mlp.experts.tokens"]
    )
    code, out, err = command("calibrate", alone, tmp_path / "c.safetensors", "--text", text, "--tokens", TOKENS)
    assert (code, err) == (0, "")
    assert re.search(r"note: \d+ of 16 experts were asked by no token: .*layer 1 expert 0", out)
    assert re.search(r"GB, 1024 tokens in 2 windows through 3 layers\ntokens: lines 1024\n", out)


def test_experts_that_few_ask_are_named(
    model: Path, text: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "FEW", 10_000)
    found = collected(command, model, tmp_path / "a.safetensors", text)
    assert len(found["few"]) + len(found["unseen"]) == found["experts"] == 16
    assert sum(tokens for _, _, tokens in found["few"]) == 2 * TOKENS * 3  # two layers, three experts a token


@pytest.mark.parametrize("form", ["dense/paddle", "moe_mtp/paddle_pdparams", "vl/pt", "quantized"])
def test_every_form_of_model(form: str, quantized: Path, tmp_path: Path, text: Path, command: Command) -> None:
    source = quantized if form == "quantized" else byte_tokenizer(copy(GOLDEN / form, tmp_path / "source"))
    collected(command, source, tmp_path / "s.safetensors", text, "--matrices")
    table = load_file(tmp_path / "s.safetensors")
    assert table
    assert all(value.isfinite().all() for value in table.values())


def test_texts_that_had_no_turn_are_named(model: Path, text: Path, tmp_path: Path, command: Command) -> None:
    other = lines(tmp_path / "other.jsonl", "x" * 9000)
    code, out, _ = command("calibrate", model, tmp_path / "s.safetensors", "--text", text, "--text", other, "--tokens", 512)
    assert code == 0
    assert "note: no window has a word of other.jsonl; ask for more (--tokens)" in out


# --- refused ---------------------------------------------------------------------------------------------------------


def test_places_that_are_none(model: Path, text: Path, tmp_path: Path, command: Command) -> None:
    taken = tmp_path / "taken.safetensors"
    taken.write_text("mine")
    for place, told in (
        (tmp_path / "s.json", "statistics are a file that ends with .safetensors"),
        (taken, "is there already; choose another name, or remove it"),
        (tmp_path / "no/s.safetensors", f"there is no folder {tmp_path / 'no'}"),
    ):
        assert refusal(command, "calibrate", model, place, "--text", text) == f"error: {place}: {told}\n"
    assert taken.read_text() == "mine"


def test_texts_that_cannot_be_used(model: Path, text: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "s.safetensors"
    (tmp_path / "empty.txt").write_text("\n")
    for file, told in (
        (tmp_path / "nothing.txt", "cannot be read: No such file or directory"),
        (tmp_path / "empty.txt", "holds no text"),
        (model / "model.safetensors", "is not UTF-8 text"),
    ):
        assert f"{file}: {told}" in refusal(command, "calibrate", model, out, "--text", file)
    told = refusal(command, "calibrate", model, out, "--text", text, "--tokens", 100_000)
    assert re.search(r"lines\.jsonl: has \d+ tokens, in windows of 512; 100000 are wanted: name more files", told)
    told = refusal(command, "calibrate", model, out, "--tokens", 10**7)
    assert re.search(r"auto: has \d+ tokens, .* name files of your own \(--text FILE\), or ask for fewer", told)
    code, _, err = command("calibrate", model, out, "--text", "auto", "--text", text)
    assert code == 2
    assert "--text auto goes alone; a file of that name is ./auto" in err
    assert not out.exists()


def test_sources_that_cannot_be_used(text: Path, model: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "s.safetensors"
    assert "has no tokenizer (looked for" in refusal(command, "calibrate", GOLDEN / "moe/pt", out, "--text", text)
    table = tensors(model)
    del table["model.norm.weight"]
    broken = copy(model, tmp_path / "broken")
    save_file(table, broken / "model.safetensors", metadata={"format": "pt"})
    code, _, err = command("calibrate", broken, out, "--text", text)
    assert (code, err.splitlines()) == (1, [f"error: {broken}: has 1 problem(s)", "  model.norm.weight: is missing"])


def test_nothing_is_left_of_a_pass_that_fails(
    model: Path, text: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(opened: Any, layer: int, *rest: Any, **options: Any) -> torch.Tensor:
        if layer == 2:
            raise OSError(28, "No space left on device", str(tmp_path))
        return through(opened, layer, *rest, **options)

    monkeypatch.setattr(collect, "through", broken)
    code, out, err = command("calibrate", model, tmp_path / "s.safetensors", "--text", text, "--tokens", TOKENS)
    assert (code, out) == (75, "")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
