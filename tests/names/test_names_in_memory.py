"""What transformers 5 holds in memory, saved so: experts of a layer in one tensor; it gives the bytes of the published form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.in_memory import fused, fused_vl
from helpers.models import GOLDEN, config, logits, random_model, same, tensors, write
from helpers.synthetic import write_bin
from helpers.tables import Tensors, model, problems, resolved

from ernie_quant import names
from ernie_quant.check.verify import verify
from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.inspection import inspect
from ernie_quant.planning import built_in
from ernie_quant.planning.make import make_plan
from ernie_quant.sources import open_source
from ernie_quant.views import build
from ernie_quant.views.files import Files
from ernie_quant.views.read import read
from ernie_quant.weights import layouts

GATE_UP, DOWN = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"
Saved = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A golden model, saved by transformers in its published form and as it is in memory (in several files)."""
    import transformers

    root, found = tmp_path_factory.mktemp("saved"), {}

    def save(family: str) -> tuple[Path, Path]:
        if family not in found:
            source, cls = GOLDEN / "moe_hf/pt", transformers.AutoModelForCausalLM
            if family == "vl":
                source, cls = GOLDEN / "vl/pt_resaved_by_transformers", transformers.AutoModelForImageTextToText
            loaded = cls.from_pretrained(source, dtype=torch.bfloat16)
            loaded.save_pretrained(root / family / "published")
            loaded.save_pretrained(root / family / "in_memory", save_original_format=False, max_shard_size="200KB")
            found[family] = (root / family / "published", root / family / "in_memory")
        return found[family]

    return save


WIDE = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "num_attention_heads": 4, "head_dim": 32}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Random weights in widths of 128: published, and in memory."""
    root = tmp_path_factory.mktemp("wide")
    published = random_model(root / "published", layouts.PT, "moe", **WIDE)
    return published, model(root / "in_memory", config(published), fused(tensors(published)))


# --- the same bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["vllm", "fastdeploy"])
@pytest.mark.parametrize("family", ["moe", "vl"])
def test_what_transformers_saves_from_memory_gives_the_published_form(
    family: str, runtime: str, saved: Saved, tmp_path: Path
) -> None:
    published, in_memory = saved(family)
    assert len(list(in_memory.glob("*.safetensors"))) > 2
    assert any(tensor.dim() == 3 for tensor in tensors(in_memory).values())
    write(published, tmp_path / "a", runtime)
    write(in_memory, tmp_path / "b", runtime)
    assert (tmp_path / "b/model.safetensors").read_bytes() == (tmp_path / "a/model.safetensors").read_bytes()
    assert config(tmp_path / "b") == config(tmp_path / "a")


def test_transformers_computes_the_same_logits(saved: Saved, tmp_path: Path) -> None:
    _, in_memory = saved("moe")
    write(in_memory, tmp_path / "pt")
    assert torch.equal(logits(tmp_path / "pt", case="moe_hf"), logits(in_memory, case="moe_hf"))


@pytest.fixture(scope="module")
def vl_pt(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The VL model that was saved from memory, in the published form that transformers loads."""
    out = tmp_path_factory.mktemp("vl") / "pt"
    write(saved("vl")[1], out, vl_config="transformers")
    return out


def test_transformers_computes_the_same_logits_of_a_vl_model(saved: Saved, vl_pt: Path) -> None:
    """Text alone: embeddings, attention, text router and text experts of every layer."""
    assert any(".text_moe.experts.gate_up_proj" in name for name in tensors(saved("vl")[1]))
    assert not any("gate_up_proj" in name for name in tensors(vl_pt))
    found = logits(vl_pt, case="vl")
    assert torch.equal(found, logits(saved("vl")[1], case="vl"))
    expected = torch.from_numpy(np.load(GOLDEN / "vl/expected_logits_fp32.npy"))  # of Baidu's own code
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("part", ["mlp.gate.weight", "mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.down_proj.weight"])
def test_a_swap_would_show_in_these_logits(part: str, vl_pt: Path, tmp_path: Path) -> None:
    """Two experts, or two rows of the router."""
    table = tensors(vl_pt)
    one, other = (next(name for name in table if name.endswith(f".1.{part.format(i)}")) for i in (0, 1))
    if one == other:  # the router of a VL model is [H, E]
        table[one] = table[one][:, [1, 0, 2, 3]].contiguous()
    else:
        table[one], table[other] = table[other], table[one]
    swapped = model(tmp_path / "swapped", config(vl_pt), table)
    assert (logits(swapped, case="vl") - logits(vl_pt, case="vl")).abs().max() > 1e-3


def test_the_layout_is_said(saved: Saved) -> None:
    for family in ("moe", "vl"):
        found = inspect(saved(family)[1])
        assert found.layout == "PT, experts of a layer fused (transformers 5)"
        assert (found.anomalies, found.notes) == ((), ())


def test_text_and_vision_experts_are_numbered_one_after_the_other(saved: Saved) -> None:
    experts = [w for w in resolved(saved("vl")[1]).weights if w.role in names.EXPERT_ROLES]
    places = {w.name.split(".")[5]: w.sources[0].split(".")[5] for w in experts}
    assert places == {str(i): "text_moe" if i < 4 else "vision_moe" for i in range(8)}


def test_the_helpers_of_these_tests_do_as_transformers_does(saved: Saved) -> None:
    for family, make in (("moe", fused), ("vl", lambda table: fused_vl(table, 4))):
        published, in_memory = saved(family)
        table = {n.removeprefix("model.") if ".vision_model." in n else n: t for n, t in tensors(published).items()}
        assert same(make(table), tensors(in_memory)) == []


def test_a_state_dict_in_a_pickle(wide: tuple[Path, Path], tmp_path: Path) -> None:
    published, in_memory = wide
    folder = tmp_path / "bin"
    folder.mkdir()
    shutil.copy(in_memory / "config.json", folder)
    write_bin(folder / "pytorch_model.bin", tensors(in_memory))
    write(folder, tmp_path / "out", "fastdeploy")
    write(published, tmp_path / "expected", "fastdeploy")
    assert same(tensors(tmp_path / "out"), tensors(tmp_path / "expected")) == []


WINT4 = built_in.one_codec("wint4", RoundToNearest(4, 128), experts_only=True, mtp=False, keep_unfit=False)
RECIPES = {"vllm": WINT4, "fastdeploy": built_in.fastdeploy_container("wint2", 2, effort=1)}


@pytest.mark.parametrize("runtime", RECIPES)
def test_quantized_they_are_the_same_and_verify_agrees(runtime: str, wide: tuple[Path, Path], tmp_path: Path) -> None:
    for name, source in zip(("a", "b"), wide, strict=True):
        write(source, tmp_path / name, runtime, recipe=RECIPES[runtime])
    assert (tmp_path / "b/model.safetensors").read_bytes() == (tmp_path / "a/model.safetensors").read_bytes()
    checked = verify(tmp_path / "b", wide[1])
    assert checked.against
    assert checked.sampled == checked.tensors
    row = next(r for r in json.loads((tmp_path / "b/report.json").read_text())["tensors"] if ".experts.3." in r["name"])
    assert all("experts.3." not in source for source in row["sources"])  # names of the source as it is


def test_one_folder_per_rank(wide: tuple[Path, Path], tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    for name, source in zip(("a", "b"), wide, strict=True):
        code, _, error = command("wint4", source, tmp_path / name, "--runtime", "fastdeploy", "--tp", "2")
        assert (code, error) == (0, "")
    for rank in ("rank0", "rank1"):
        one, other = (tmp_path / name / rank / "model.safetensors" for name in ("a", "b"))
        assert one.read_bytes() == other.read_bytes()


# --- no more is read than is needed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["vllm", "fastdeploy"])
def test_of_a_fused_tensor_only_one_experts_rows_are_read(
    runtime: str, wide: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(wide[1])
    step = next(s for s in make_plan(source, runtime=runtime).steps if ".layers.1.mlp.experts.5.up" in s.name)
    ref = source.refs[GATE_UP]
    runs: list[tuple[int, int]] = []
    real = Files.read_into
    monkeypatch.setattr(Files, "read_into", lambda self, r, b, at: (runs.append((at, at + len(b))), real(self, r, b, at))[1])
    with Files() as files:
        whole = read(step.view, files)
    assert [r.name for r in build.refs(step.view)] == [GATE_UP]
    expert = ref.spec.nbytes // 8
    first = 5 * expert + (expert // 2 if runtime == "vllm" else 0)  # PT: up alone; Paddle: gate and up
    assert (min(a for a, _ in runs), max(b for _, b in runs)) == (first, 6 * expert)
    assert sum(b - a for a, b in runs) == whole.nbytes == 6 * expert - first


# --- what disagrees --------------------------------------------------------------------------------------------------


def case(wide: tuple[Path, Path], **changes: torch.Tensor | None) -> tuple[dict[str, Any], Tensors]:
    """The model in memory with other tensors; None takes one away."""
    table = tensors(wide[1]) | {n: t for n, t in changes.items() if t is not None}
    return config(wide[1]), {n: t for n, t in table.items() if changes.get(n, 0) is not None}


def test_a_wrong_number_of_experts_is_one_line(wide: tuple[Path, Path], tmp_path: Path) -> None:
    found = problems(tmp_path, *case(wide, **{GATE_UP: torch.zeros(4, 256, 128).bfloat16()}))
    assert found == [f"{GATE_UP}: (4, 256, 128) is not E x M+M x H = (8, 256, 128)"]


def test_experts_stored_in_by_out_are_refused(wide: tuple[Path, Path], tmp_path: Path) -> None:
    found = problems(tmp_path, *case(wide, **{GATE_UP: torch.zeros(8, 128, 256).bfloat16()}))
    assert found == [f"{GATE_UP}: (8, 128, 256) is not E x M+M x H = (8, 256, 128)"]


def test_a_missing_fused_tensor_is_missed_once(wide: tuple[Path, Path], tmp_path: Path) -> None:
    assert problems(tmp_path, *case(wide, **{DOWN: None})) == [f"{DOWN}: is missing"]


def test_experts_in_both_forms_are_one_line(wide: tuple[Path, Path], tmp_path: Path) -> None:
    alone = {f"model.layers.1.mlp.experts.{e}.up_proj.weight": torch.zeros(128, 128).bfloat16() for e in range(8)}
    assert problems(tmp_path, *case(wide, **alone)) == [
        f"model.layers.1.mlp.experts.0.up_proj.weight: is one expert's, and {DOWN} holds those of a whole layer; a checkpoint has"
        " one form or the other (8 such tensors)"
    ]


def test_a_vl_model_lacks_its_vision_bias(saved: Saved, tmp_path: Path) -> None:
    folder, name = saved("vl")[1], "model.language_model.layers.1.mlp.vision_moe.gate.moe_statics.e_score_correction_bias"
    table = tensors(folder)
    wrong = table | {name: torch.zeros(1, 5)}
    assert problems(tmp_path / "wrong", config(folder), wrong) == [f"{name}: (1, 5) is not 1 x E = (1, 4)"]
    del table[name]
    assert problems(tmp_path / "none", config(folder), table) == [f"{name}: is missing"]
