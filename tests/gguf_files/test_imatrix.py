"""`--imatrix`: what `calibrate` has seen of inputs decides which errors matter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.models import tensors
from helpers.paths import GOLDEN
from safetensors.torch import save_file

from ernie_quant.codecs.q4_0 import Q40
from ernie_quant.planning.gguf import gguf_plan
from ernie_quant.planning.imatrix import importance
from ernie_quant.run.whole import run_plan
from ernie_quant.sources import open_source
from ernie_quant.weights.stored import Stored, open_stored, runtime_of

Command = Callable[..., tuple[int, str, str]]
SOURCE = GOLDEN / "moe/pt"
EXPERTS, HIDDEN, INNER = 8, 64, 32


def statistics(path: Path, experts: int = EXPERTS, hidden: int = HIDDEN) -> dict[str, torch.Tensor]:
    """Of the layers 1 and 2, as calibrate writes them; expert 0 saw nothing."""
    generator = torch.Generator().manual_seed(4)
    found = {}
    for layer in (1, 2):
        place = f"model.layers.{layer}"
        for point, shape in (
            ("self_attn.qkv", (hidden,)), ("self_attn.o_proj", (hidden,)), ("mlp.experts.gate_up", (experts, hidden)),
            ("mlp.experts.down_proj", (experts, INNER)), ("mlp.shared_experts.gate_up", (hidden,)),
        ):  # fmt: skip
            found[f"{place}.{point}.second_moment"] = torch.randn(shape, generator=generator).mul(2).exp()
            found[f"{place}.{point}.max_abs"] = torch.ones(shape)
        found[f"{place}.mlp.experts.gate_up.second_moment"][0] = 0
    save_file(found, path)
    return found


def stored(folder: Path) -> dict[str, Stored]:
    source = open_source(folder)
    entries, problems = open_stored(source, runtime_of(source))
    assert problems == []
    return {entry.name: entry for entry in entries}


def test_each_weight_has_the_inputs_that_were_seen(tmp_path: Path) -> None:
    found = statistics(tmp_path / "stats.safetensors")
    known = importance(tmp_path / "stats.safetensors")
    names = {f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkvo"}
    names |= {f"model.layers.1.mlp.experts.{i}.{x}_proj.weight" for i in range(EXPERTS) for x in ("gate", "up", "down")}
    names |= {f"model.layers.1.mlp.shared_experts.{x}_proj.weight" for x in ("gate", "up")}
    assert {name for name in known if ".layers.1." in name} == names
    assert len(found) == 20


def test_errors_that_matter_are_smaller(tmp_path: Path, command: Command) -> None:
    found, file = statistics(tmp_path / "stats.safetensors"), tmp_path / "stats.safetensors"
    status, out, err = command("gguf", SOURCE, tmp_path / "with", "--type", "Q4_0", "--keep-unfit", "--imatrix", file)
    assert (status, err.count("Error")) == (0, 0)
    assert "are weighed by their inputs in stats.safetensors; it says nothing of" in out
    run_plan(gguf_plan(open_source(SOURCE), settings={"type": "Q4_0", "keep_unfit": True}), tmp_path / "without")
    plain, results = tensors(SOURCE), {name: stored(tmp_path / name) for name in ("with", "without")}
    from ernie_quant.views.files import Files

    def error(name: str, which: str, weights: torch.Tensor) -> float:
        with Files({}) as files:
            entry = results[which][name]
            decoded = entry.read(files, (0, entry.shape[0]))
        return float((weights * (plain[name].float() - decoded).square()).sum())

    for expert in (1, 5):
        name = f"model.layers.1.mlp.experts.{expert}.up_proj.weight"
        weights = found["model.layers.1.mlp.experts.gate_up.second_moment"][expert]
        assert error(name, "with", weights) < 0.9 * error(name, "without", weights)
    unseen = "model.layers.1.mlp.experts.0.up_proj.weight"
    assert error(unseen, "with", torch.ones(HIDDEN)) == error(unseen, "without", torch.ones(HIDDEN))


def test_that_of_another_model_is_refused(tmp_path: Path, command: Command) -> None:
    file = tmp_path / "stats.safetensors"
    for make, said in (
        (lambda: statistics(file, hidden=32), "has 64 inputs, stats.safetensors knows 32"),
        (lambda: save_file({"x": torch.ones(3)}, file), "holds no second_moment"),
        (lambda: save_file({"model.layers.9.mlp.down_proj.second_moment": torch.ones(3)}, file), "is of another model"),
    ):
        make()
        status, _, err = command("gguf", SOURCE, tmp_path / "out", "--type", "Q4_0", "--keep-unfit", "--imatrix", file)
        assert status == 1
        assert said in err
    assert command("gguf", SOURCE, tmp_path / "out", "--imatrix", tmp_path / "nothing")[0] == 1


@pytest.mark.parametrize("width", [32, 96])
def test_importance_of_another_width_is_refused_by_the_codec(width: int) -> None:
    from ernie_quant.checkpoint import TensorSpec
    from ernie_quant.errors import ErnieQuantError

    with pytest.raises(ErnieQuantError, match="has 64 inputs"):
        Q40().prepare(TensorSpec((4, 64), "BF16"), {"importance": torch.ones(width)})
