"""Names as compilers and trainers leave them: read with a note where all tensors have them, refused by name where some do."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.models import GOLDEN, config, same, tensors, write
from helpers.synthetic import write_bin, write_ranks, write_safetensors
from helpers.tables import golden, model, problems, resolved

from ernie_quant.check.verify import verify
from ernie_quant.inspection import inspect
from ernie_quant.planning.make import make_plan
from ernie_quant.sources import open_source

Rename = Callable[[str], str]
WHOLE: dict[str, tuple[str, Rename]] = {  # what stands in the note, and the names
    "torch.compile": ("_orig_mod", lambda n: f"_orig_mod.{n}"),
    "DataParallel": ("module", lambda n: f"module.{n}"),
    "a compiled DataParallel": ("_orig_mod.', 'module", lambda n: f"_orig_mod.module.{n}"),
    "the compiled inner model": ("_orig_mod", lambda n: re.sub(r"^(model|ernie)\.", r"\1._orig_mod.", n)),
    "FSDP around every layer": ("_fsdp_wrapped_module", lambda n: n.replace(".mlp.", ".mlp._fsdp_wrapped_module.")),
    "checkpoints in one layer": ("_checkpoint_wrapped_module", lambda n: n.replace("s.1.", "s.1._checkpoint_wrapped_module.")),
    "a merged adapter": ("base_model.model", lambda n: f"base_model.model.{n}"),
    "a class with a model": ("model", lambda n: f"model.{n}"),
    "whatever it is": ("trainer.student", lambda n: f"trainer.student.{n}"),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["pt", "paddle"])
@pytest.mark.parametrize("case", WHOLE)
def test_a_wrapper_is_left_out_with_a_note(case: str, layout: str, tmp_path: Path) -> None:
    words, rename = WHOLE[case]
    settings, table = golden("moe", layout)
    source = model(tmp_path / "wrapped", settings, {rename(n): t for n, t in table.items()})
    plan = make_plan(open_source(source), runtime="vllm")
    wrapped = [n for n in table if rename(n) != n]
    note = next(note for note in plan.notes if note.startswith(f"left out of the names of {len(wrapped)} tensors, such as "))
    assert note.endswith(f": '{words}.', around the model or parts of it")
    assert note in inspect(source).notes
    write(source, tmp_path / "pt")
    assert same(tensors(tmp_path / "pt"), tensors(GOLDEN / "moe/pt")) == []
    assert verify(tmp_path / "pt", source).against


def test_a_clean_model_has_no_note() -> None:
    for folder in (
        "moe/pt",
        "moe/paddle",
        "vl/pt",
        "vl/pt_resaved_by_transformers",
        "moe_mtp/paddle",
        "dense/paddleformers_native",
    ):
        assert inspect(GOLDEN / folder).notes == ()


def test_ranks_that_are_wrapped(tmp_path: Path) -> None:
    source = write_ranks(tmp_path / "tp2", "moe", 2)
    for rank in ("rank0", "rank1"):
        table = {f"module.{n}": t for n, t in tensors(source / rank).items()}
        write_safetensors(source / rank / "model.safetensors", table)
    write(source, tmp_path / "pt")
    expected = tensors(GOLDEN / "moe/pt")
    del expected["lm_head.weight"]
    assert same(tensors(tmp_path / "pt"), expected) == []


def test_a_model_without_its_head_is_read_with_it(tmp_path: Path) -> None:
    settings, table = golden("moe")
    bare = {n.removeprefix("model."): t for n, t in table.items() if n.startswith("model.")}
    write(model(tmp_path / "bare", settings, bare), tmp_path / "pt")
    assert same(tensors(tmp_path / "pt"), table) == ["lm_head.weight"]  # tied
    assert "without its head" in inspect(tmp_path / "bare").notes[0]


HALF: dict[str, tuple[str, Rename]] = {
    "one layer": ("module", lambda n: f"module.{n}" if ".layers.1." in n else n),
    "all but the embeddings": ("base_model.model", lambda n: n if "embed_tokens" in n else f"base_model.model.{n}"),
    "half of a layer": ("_fsdp_wrapped_module", lambda n: n.replace("s.1.mlp", "s.1._fsdp_wrapped_module.mlp")),
    "another wrapper": ("_orig_mod", lambda n: f"module.{n}" if ".layers.1." in n else f"_orig_mod.{n}"),
    "a head of its own": ("policy", lambda n: n if n.startswith("lm_head") else f"policy.{n}"),
}


@pytest.mark.parametrize("case", HALF)
def test_a_wrapper_around_some_tensors_is_refused_with_one_of_each(case: str, tmp_path: Path) -> None:
    words, rename = HALF[case]
    settings, table = golden("moe")
    named = {rename(n): t for n, t in table.items()}
    line = problems(tmp_path, settings, named)[0]
    outside, _, rest = line.partition(": stands beside ")
    inside = rest.partition(": ")[0]
    assert {outside, inside} <= named.keys()
    assert words in line
    assert (words in outside) != (words in inside)


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    settings, table = golden("moe")
    name = "_orig_mod.model.norm.weight"
    found = problems(tmp_path, settings, table | {name: torch.zeros(64).bfloat16()})
    assert any(name in line and "model.norm.weight" in line and "both are model.norm.weight" in line for line in found)


def test_names_of_very_many_parts_are_looked_at_once(tmp_path: Path) -> None:
    """They are strangers', and the time to look into one must not grow with the square of its length."""
    settings, table = golden("moe")
    strange = {f"{'_orig_mod.' * 20}{i}.{'a._orig_mod.' * 20}x": torch.zeros(1) for i in range(3000)}
    start = time.monotonic()
    found = problems(tmp_path, settings, table | strange | {"module.y": torch.zeros(1)})
    assert time.monotonic() - start < 5
    assert len(found) == 3002  # each is unknown, and one stands beside what `module.` wraps


def test_a_wrong_shape_is_shown_under_the_stored_name(tmp_path: Path) -> None:
    settings, table = golden("moe")
    table["model.norm.weight"] = torch.zeros(63).bfloat16()
    found = problems(tmp_path, settings, {f"module.{n}": t for n, t in table.items()})
    assert found == ["module.model.norm.weight: (63,) is not H = (64,)"]


# --- buffers ---------------------------------------------------------------------------------------------------------

BUFFERS = {
    "model.layers.{}.self_attn.rotary_emb.inv_freq": torch.rand(8),
    "model.layers.{}.self_attn.rotary_emb.cos_cached": torch.rand(32, 16),
    "model.rotary_emb.original_inv_freq": torch.rand(8),
    "model.layers.{}.mlp.moe_statics.expert_usage": torch.ones(1, 8, dtype=torch.int64),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_are_left_out_with_a_note(name: str, tmp_path: Path) -> None:
    settings, table = golden("moe")
    found = {name.format(i): BUFFERS[name].clone() for i in (1, 2)}
    source = model(tmp_path / "buffers", settings, table | found)
    for runtime in ("vllm", "fastdeploy"):
        write(source, tmp_path / runtime, runtime)
        write(GOLDEN / "moe/pt", tmp_path / f"{runtime}-clean", runtime)
        assert same(tensors(tmp_path / runtime), tensors(tmp_path / f"{runtime}-clean")) == []
        assert config(tmp_path / runtime) == config(tmp_path / f"{runtime}-clean")
    assert any(note.startswith("left out: ") and name.format(1) in note for note in inspect(source).notes)
    assert verify(tmp_path / "vllm", source).against


def test_buffers_of_the_vision_tower_in_a_wrapped_pickle(tmp_path: Path) -> None:
    settings, table = golden("vl", "pt_resaved_by_transformers")
    (tmp_path / "vl").mkdir()
    (tmp_path / "vl/config.json").write_text((GOLDEN / "vl/pt_resaved_by_transformers/config.json").read_text())
    table["model.vision_model.rotary_pos_emb.inv_freq"] = torch.rand(8)
    write_bin(tmp_path / "vl/pytorch_model.bin", {f"module.{n}": t for n, t in table.items()})
    assert resolved(tmp_path / "vl").problems == []
    assert settings["model_type"] == "ernie4_5_vl_moe"
    write(tmp_path / "vl", tmp_path / "a")
    write(GOLDEN / "vl/pt_resaved_by_transformers", tmp_path / "b")
    assert same(tensors(tmp_path / "a"), tensors(tmp_path / "b")) == []


# --- routers ---------------------------------------------------------------------------------------------------------

BIAS = "layers.{}.mlp.moe_statics.e_score_correction_bias"


@pytest.mark.parametrize("layout", ["pt", "paddle"])
def test_a_routing_bias_without_its_first_axis_is_the_same_bias(layout: str, tmp_path: Path) -> None:
    """Baidu's auto-parallel trainer saves it so."""
    settings, table = golden("moe", layout)
    assert table[f"{'model' if layout == 'pt' else 'ernie'}.{BIAS.format(1)}"].shape == (1, 8)
    flat = {n: t.reshape(-1) if "e_score" in n else t for n, t in table.items()}
    source = model(tmp_path / "flat", settings, flat)
    write(source, tmp_path / "pt")
    assert same(tensors(tmp_path / "pt"), tensors(GOLDEN / "moe/pt")) == []
    assert "its one row is stored without a first axis (2 such tensors)" in inspect(source).notes[0]
    assert verify(tmp_path / "pt", source).against


@pytest.mark.parametrize("shape", [(8,), (4,), (1, 4), (4, 2)])
def test_a_vl_bias_of_another_shape_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Row 0 is for text, row 1 for vision: nobody says which numbers of a flat one are whose."""
    settings, table = golden("vl")
    name = f"model.{BIAS.format(1)}"
    table[name] = torch.zeros(shape)
    assert problems(tmp_path, settings, table) == [f"{name}: {shape} is not 2 x E = (2, 4)"]


def test_rounded_routers_are_kept_with_a_note(tmp_path: Path) -> None:
    settings, table = golden("moe")
    gate = "model.layers.{}.mlp.gate.weight"
    table |= {gate.format(i): table[gate.format(i)].bfloat16() for i in (1, 2)}
    source = model(tmp_path / "rounded", settings, table)
    write(source, tmp_path / "pt")
    assert same(tensors(tmp_path / "pt"), table) == []
    assert inspect(source).notes == (
        f"{gate.format(1)}: is BF16, the releases have F32 (2 such routers and biases); kept as it is",
    )
