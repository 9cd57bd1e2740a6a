"""`eval`: the numbers of a plain evaluation with transformers, for every form, and one line for what cannot be compared."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import Command, refusal
from helpers.models import GOLDEN, copy, dequantized, invoke, random_model, states, tensors
from helpers.words import byte_tokenizer
from safetensors.torch import save_file

from ernie_quant.weights import layouts

WINDOWS = 3
TOKENS = WINDOWS * 511


def ids_of(text: Path, windows: int = WINDOWS) -> torch.Tensor:
    return torch.tensor(list(text.read_bytes())[: windows * 512]).view(windows, 512)


def log_probabilities(folder: Path, text: Path) -> torch.Tensor:
    """float64 [windows, 511, vocabulary], by transformers."""
    return states(folder, ids_of(text))[1][:, :-1].double().log_softmax(-1)


def nll(of: torch.Tensor, text: Path) -> torch.Tensor:
    return -of.gather(-1, ids_of(text)[:, 1:, None])[..., 0]


def evaluated(command: Command, *arguments: object) -> Any:
    code, out, err = command("eval", *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_numbers_of_a_plain_evaluation(model: Path, quantized: Path, book: Path, tmp_path: Path, command: Command) -> None:
    """Of four digits; the quantized model is decoded as it streams, transformers gets it decoded."""
    found = evaluated(command, quantized, "--against", model, "--text", book, "--tokens", TOKENS)
    p, q = log_probabilities(model, book), log_probabilities(dequantized(quantized, tmp_path / "plain"), book)
    kl = (p.exp() * (p - q)).sum(-1)
    (row,) = found["rows"]
    assert (row["name"], row["windows"], row["tokens"]) == ("book.txt", WINDOWS, TOKENS)
    assert row["source_perplexity"]["value"] == pytest.approx(float(nll(p, book).mean().exp()), rel=1e-4)
    assert row["perplexity"]["value"] == pytest.approx(float(nll(q, book).mean().exp()), rel=1e-4)
    assert kl.mean() > 1e-3
    assert row["kl"]["value"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert row["kl"]["token_error"] == pytest.approx(float(kl.std() / math.sqrt(TOKENS)), rel=1e-3)
    assert row["kl"]["window_error"] == pytest.approx(float(kl.mean(1).std() / math.sqrt(WINDOWS)), rel=1e-3)
    assert row["kl_99"]["value"] == pytest.approx(float(kl.flatten().quantile(0.99)), rel=0.02)
    assert row["same_top"]["value"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=1e-3)
    assert {**row, "name": "together", "sha256": ""} == found["together"]


def test_a_model_is_itself(model: Path, book: Path, command: Command) -> None:
    found = evaluated(command, model, "--against", model, "--text", book, "--tokens", 511)
    assert found["together"]["kl"]["value"] == 0
    assert found["together"]["same_top"] == {"value": 1.0, "token_error": 0.0, "window_error": None}


def test_several_texts_and_all_together(model: Path, book: Path, tmp_path: Path, command: Command) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"{n} " * 40}) + "\n" for n in range(20)))
    found = evaluated(command, model, "--text", book, "--text", other, "--tokens", 511)
    assert [row["name"] for row in found["rows"]] == ["book.txt", "other.jsonl"]
    mean = math.exp(sum(math.log(row["perplexity"]["value"]) for row in found["rows"]) / 2)
    assert found["together"]["perplexity"]["value"] == pytest.approx(mean)
    assert found["together"]["tokens"] == 1022
    assert (found["source"], found["together"]["kl"]) == (None, None)


def test_what_people_see(model: Path, quantized: Path, book: Path, command: Command) -> None:
    code, out, err = command("eval", quantized, "--against", model, "--text", book, "--tokens", TOKENS)
    assert (code, err) == (0, "")
    head, _, row, _, foot = out.splitlines()
    assert head.split("  ")[0] == "text"
    assert "perplexity of the source" in head
    assert row.startswith("book.txt")
    assert row.count("±") == 5
    assert foot == "± one standard error, over 3 windows of 512 tokens a text"
    code, out, _ = command("eval", model, "--text", book, "--tokens", 511)
    assert code == 0
    assert out.splitlines()[-1] == "± one standard error, over tokens, which are correlated (one window)"


def test_the_result_is_kept(model: Path, quantized: Path, book: Path, tmp_path: Path, command: Command) -> None:
    arguments = (quantized, "--against", model, "--text", book, "--tokens", 511)
    found = evaluated(command, *arguments, "--save", tmp_path / "eval.json")
    assert json.loads((tmp_path / "eval.json").read_text()) == found
    manifest = json.loads((quantized / "ernie-quant.json").read_text())
    assert (found["result"]["name"], found["result"]["fingerprint"]) == ("wint4", manifest["fingerprint"])
    assert found["result"]["weights"] == found["source"]["weights"]  # names and shapes
    assert str(tmp_path.parent) not in json.dumps(found)  # no place of this machine


# --- forms -----------------------------------------------------------------------------------------------------------


def numbers(command: Command, folder: Path, book: Path, against: Path) -> tuple[float, float]:
    found = evaluated(command, folder, "--against", against, "--text", book, "--tokens", 511)["together"]
    return found["perplexity"]["value"], found["kl"]["value"]


@pytest.mark.parametrize("form", ["paddle", "paddle_pdparams", "pt"])
def test_plain_forms_are_one_model(form: str, book: Path, tmp_path: Path, command: Command) -> None:
    """The tokenizer lies beside one of them only."""
    source = byte_tokenizer(copy(GOLDEN / "moe_mtp/pt", tmp_path / "source"))
    assert numbers(command, GOLDEN / "moe_mtp" / form, book, source)[1] == 0
    assert numbers(command, source, book, GOLDEN / "moe_mtp" / form)[1] == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_container_is_what_it_decodes_to(ranks: int, book: Path, tmp_path: Path, command: Command) -> None:
    widths = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256, "moe_intermediate_size": 256, "moe_num_experts": 4}
    source = byte_tokenizer(random_model(tmp_path / "source", layouts.PADDLE, "moe_mtp", **widths))
    invoke("wint4", source, tmp_path / "out", "--runtime", "fastdeploy", "--tp", ranks, "-q")
    invoke("dequantize", tmp_path / "out", tmp_path / "plain", "--to", "pt", "-q")
    perplexity, kl = numbers(command, tmp_path / "out", book, source)
    assert kl > 0
    assert numbers(command, tmp_path / "plain", book, source) == pytest.approx((perplexity, kl), rel=1e-4)


# --- refused ---------------------------------------------------------------------------------------------------------


def test_texts_that_cannot_be_used(model: Path, book: Path, tmp_path: Path, command: Command) -> None:
    told = refusal(command, "eval", model, "--text", tmp_path / "nothing.txt")
    assert told == f"error: {tmp_path / 'nothing.txt'}: cannot be read: No such file or directory\n"
    (tmp_path / "empty.txt").touch()
    assert "empty.txt: holds no text" in refusal(command, "eval", model, "--text", tmp_path / "empty.txt")
    assert "is not UTF-8 text" in refusal(command, "eval", model, "--text", model / "model.safetensors")
    told = refusal(command, "eval", model, "--text", book, "--tokens", 51100)
    assert f"book.txt: has {len(book.read_bytes()) + 1} tokens, 100 windows of 512 are 51200; ask for fewer (--tokens)" in told


def test_tokens_that_no_windows_predict(model: Path, book: Path, command: Command) -> None:
    told = refusal(command, "eval", model, "--text", book, "--tokens", 1000)
    assert "--tokens 1000: is no multiple of 511, which a window of 512 predicts; ask for 511 or 1022" in told


def test_no_tokenizer(book: Path, command: Command) -> None:
    told = refusal(command, "eval", GOLDEN / "moe/paddle", "--against", GOLDEN / "moe/pt", "--text", book)
    assert f"{GOLDEN / 'moe/pt'}: has no tokenizer (looked for tokenizer.json, tokenizer.model)" in told


def test_a_tokenizer_of_another_model(tmp_path: Path, command: Command) -> None:
    small = byte_tokenizer(random_model(tmp_path / "small", layouts.PT, "moe", vocab_size=128))
    (tmp_path / "text.txt").write_text("é" * 2000)
    told = refusal(command, "eval", small, "--text", tmp_path / "text.txt", "--tokens", 511)
    assert "token ids are 169 to 195, the model has 0 to 127: not its tokenizer" in told


def test_another_model(model: Path, book: Path, command: Command) -> None:
    told = refusal(command, "eval", model, "--against", GOLDEN / "dense/pt", "--text", book)
    shapes = "3 layers 64 wide, 8 experts, 256 tokens", "3 layers 64 wide, 256 tokens"
    assert told == f"error: {model} has {shapes[0]}, {GOLDEN / 'dense/pt'} has {shapes[1]}: not the same model\n"


def test_a_source_with_problems(model: Path, book: Path, tmp_path: Path, command: Command) -> None:
    table = tensors(model)
    del table["model.norm.weight"]
    broken = copy(model, tmp_path / "broken")
    save_file(table, broken / "model.safetensors", metadata={"format": "pt"})
    code, _, err = command("eval", model, "--against", broken, "--text", book)
    assert code == 1
    assert err.splitlines() == [f"error: {broken}: has 1 problem(s)", "  model.norm.weight: is missing"]


def test_a_model_that_is_not_sound(model: Path, book: Path, tmp_path: Path, command: Command) -> None:
    table = tensors(model)
    table["model.norm.weight"][0] = torch.nan
    broken = copy(model, tmp_path / "broken")
    save_file(table, broken / "model.safetensors", metadata={"format": "pt"})
    told = refusal(command, "eval", broken, "--against", model, "--text", book, "--tokens", 511)
    assert "broken: NaN or infinity comes out of it or its source; verify says more" in told


def test_no_place_for_what_is_kept(model: Path, book: Path, tmp_path: Path, command: Command) -> None:
    code, _, err = command("eval", model, "--text", book, "--save", tmp_path / "no/eval.json")
    assert code == 2
    assert f"there is no folder {tmp_path / 'no'}" in err
