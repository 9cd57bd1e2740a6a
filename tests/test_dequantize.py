"""dequantize: from every format back to plain bf16, the very weights that a runtime computes with."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import Command
from helpers.containers import PUBLISHED, WIDTHS, decode_all, read_folder, widened
from helpers.disk import no_waiting
from helpers.models import GOLDEN, config, dequantized, invoke, logits, random_model, same, tensors, write
from helpers.synthetic import write_safetensors
from safetensors.torch import load_file

from ernie_quant.check.verify import verify
from ernie_quant.errors import PlanError
from ernie_quant.planning.make import make_plan
from ernie_quant.run.whole import run_plan
from ernie_quant.sources import open_source
from ernie_quant.weights import layouts

TWO_BITS = "[[rule]]\nrole = 'experts'\ncodec = 'rtn'\nbits = 2\ngroup_size = 64\n"

# the commands that make each format; widths are multiples of 128 here, so that float8 blocks fit
MADE: dict[str, tuple[object, ...]] = {
    "int4": ("wint4", "--mtp"),
    "int4 experts": ("wint4", "--experts-only", "--group-size", "32"),
    "int8 channel": ("wint8", "--mtp", "--group-size", "channel"),
    "fp8": ("fp8", "--mtp"),
    "int2": ("quantize", "--runtime", "transformers", "--recipe", "recipe.toml"),
    "wint2": ("wint2", "--wint4-layers", 2),
    "fastdeploy wint4": ("wint4", "--runtime", "fastdeploy"),
}
PT_FORMS = [form for form in MADE if "wint" not in form]
CONTAINERS = {"wint2": 1, "fastdeploy wint4": 2}  # the last layer whose experts are WINT4
every_form = pytest.mark.parametrize("form", MADE)


pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """src (Paddle) and src-pt; for each form FORM, FORM-pt and FORM-paddle."""
    folder = tmp_path_factory.mktemp("dequantize")
    (folder / "recipe.toml").write_text(TWO_BITS)
    with no_waiting(), pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        random_model(folder / "src", layouts.PADDLE, "moe_mtp", **WIDTHS | {"intermediate_size": 384})
        write(folder / "src", folder / "src-pt")
        for form, (name, *options) in MADE.items():
            invoke(name, folder / "src", folder / form, *options)
            for layout in ("pt", "paddle"):
                invoke("dequantize", folder / form, folder / f"{form}-{layout}", "--to", layout)
    return folder


def everything(folder: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor, subfolders included."""
    return {name: t for path in sorted(folder.rglob("*.safetensors")) for name, t in load_file(path).items()}


# --- what comes back -------------------------------------------------------------------------------------------------


@every_form
def test_names_shapes_dtypes_and_config_are_those_of_the_source(form: str, folder: Path) -> None:
    """The MTP block among them; nothing of the quantization is left in config.json."""
    for layout, source in (("pt", "src-pt"), ("paddle", "src")):
        found, original = everything(folder / f"{form}-{layout}"), everything(folder / source)
        assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in original.items()}
        assert sum(".mtp_" in name for name in found) == {"pt": 12, "paddle": 9}[layout]
        kept = [n for n in found if torch.equal(found[n].view(torch.uint8), original[n].view(torch.uint8))]
        assert {n for n in found if not n.endswith("_proj.weight")} <= set(kept)
        assert len(kept) < len(found)
    written = config(folder / f"{form}-pt")
    assert written == config(folder / "src-pt")
    assert not {"quantization_config", "is_quantized", "dtype"} & written.keys()
    paddle = config(folder / f"{form}-paddle")
    assert paddle["dtype"] == "bfloat16"
    assert not {"quantization_config", "is_quantized", "torch_dtype", "tensor_parallel_size"} & paddle.keys()


@every_form
def test_paddle_and_pt_are_the_same_weights(form: str, folder: Path, tmp_path: Path) -> None:
    invoke("convert", folder / f"{form}-paddle", tmp_path / "pt", "--to", "pt")
    assert (tmp_path / "pt/model.safetensors").read_bytes() == (folder / f"{form}-pt/model.safetensors").read_bytes()


@every_form
def test_a_result_is_verified(form: str, folder: Path) -> None:
    for layout in ("pt", "paddle"):
        assert verify(folder / f"{form}-{layout}").quantized == 0


# --- the weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", PT_FORMS)
def test_weights_are_what_the_codec_decodes(form: str, folder: Path, tmp_path: Path) -> None:
    assert same(tensors(folder / f"{form}-pt"), tensors(dequantized(folder / form, tmp_path / "plain"))) == []


@pytest.mark.parametrize("form", CONTAINERS)
def test_weights_of_a_container_are_those_of_the_independent_decoder(form: str, folder: Path) -> None:
    decoded, kept = decode_all(read_folder(folder / form), CONTAINERS[form])
    found = read_folder(folder / f"{form}-paddle")
    assert found.keys() == decoded.keys() | kept.keys()
    for name, weight in decoded.items():
        assert (widened(found[name]).view(np.uint32) == weight.view(np.uint32)).all(), name
    for name, array in kept.items():
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("form", PT_FORMS)
def test_transformers_computes_the_same_from_both(form: str, folder: Path) -> None:
    plain = logits(folder / f"{form}-pt", torch.bfloat16)
    assert (plain - logits(folder / form, torch.bfloat16)).abs().max() == 0
    assert (plain - logits(folder / "src-pt", torch.bfloat16)).abs().max() > 0


@pytest.mark.parametrize("form", CONTAINERS)
def test_transformers_loads_what_was_a_container(form: str, folder: Path) -> None:
    """WINT2 and WINT4 experts change the logits of a random model, but do not make other ones of them."""
    plain, original = logits(folder / f"{form}-pt"), logits(folder / "src-pt")
    assert 0 < (plain - original).square().sum() / original.square().sum() < 0.5


def test_a_vl_model_comes_back_too(tmp_path: Path) -> None:
    """Text and vision experts of different widths; the vision tower and the resampler keep their bytes."""
    widths = {"intermediate_size": 128, "moe_intermediate_size": [256, 128], "head_dim": 128}
    source = random_model(tmp_path / "src", layouts.PADDLE, "vl", **widths)
    for form, options in (("wint2", ("--unsupported", "--wint4-layers", 0)), ("fp8", ())):
        invoke(form, source, tmp_path / form, *options)
        for layout in ("pt", "paddle"):
            invoke("dequantize", tmp_path / form, tmp_path / f"{form}-{layout}", "--to", layout)
        write(tmp_path / f"{form}-paddle", tmp_path / f"{form}-again")
        assert same(tensors(tmp_path / f"{form}-again"), tensors(tmp_path / f"{form}-pt")) == []
    assert same(tensors(tmp_path / "fp8-pt"), tensors(dequantized(tmp_path / "fp8", tmp_path / "plain"))) == []
    decoded, kept = decode_all(read_folder(tmp_path / "wint2"), -1)
    found = read_folder(tmp_path / "wint2-paddle")
    assert all((widened(found[name]).view(np.uint32) == weight.view(np.uint32)).all() for name, weight in decoded.items())
    assert all(found[name].tobytes() == array.tobytes() for name, array in kept.items())
    assert config(tmp_path / "wint2-paddle") == config(tmp_path / "src")


# --- where it comes from ---------------------------------------------------------------------------------------------


def test_a_published_checkpoint_has_neither_manifest_nor_report(folder: Path, tmp_path: Path) -> None:
    """bf16 tagged U16, the config of the published files; the MTP block in the folder of the rest."""
    published = tmp_path / "published"
    published.mkdir()
    entry = copy.deepcopy(PUBLISHED)
    entry["moe_quant_config"]["moe_w4_quant_config"]["quant_end_layer"] = 1
    (published / "config.json").write_text(json.dumps(config(folder / "wint2") | {"quantization_config": entry}))
    (published / "tokenizer.model").write_bytes(b"tokens")
    for file in ("model.safetensors", "mtp/model.safetensors"):
        data = (folder / "wint2" / file).read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        head = data[8:start].replace(b'"BF16"', b'"U16"')
        (published / file).parent.mkdir(exist_ok=True)
        (published / file).write_bytes(len(head).to_bytes(8, "little") + head + data[start:])
    shutil.move(published / "mtp/model.safetensors", published / "model-00002-of-00002.safetensors")
    shutil.move(published / "model.safetensors", published / "model-00001-of-00002.safetensors")
    (published / "mtp").rmdir()
    invoke("dequantize", published, tmp_path / "out", "--to", "pt")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (folder / "wint2-pt/model.safetensors").read_bytes()
    assert (tmp_path / "out/tokenizer.model").read_bytes() == b"tokens"


@pytest.mark.parametrize("form", ["int4", "fp8", "wint2"])
@pytest.mark.parametrize("layout", ["pt", "paddle"])
def test_slabs_leave_no_trace(form: str, layout: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a result are columns of what is decoded, or rows of it, or rows of three matrices."""
    monkeypatch.setattr("ernie_quant.views.read.SLAB_BYTES", 20_000)
    runtime = {"pt": "vllm", "paddle": "fastdeploy"}[layout]
    plan = make_plan(open_source(folder / form), runtime=runtime, dequantize=True)
    assert max(len(step.slabs()) for step in plan.steps) > 8
    run_plan(plan, tmp_path / "out")
    assert same(everything(tmp_path / "out"), everything(folder / f"{form}-{layout}")) == []


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [GOLDEN / "moe/paddle", GOLDEN / "moe_mtp/pt", GOLDEN / "dense/pt"], ids=str)
def test_a_plain_checkpoint_is_refused(source: Path, command: Command, tmp_path: Path) -> None:
    line = f"error: {source}: is not quantized (config.json has no quantization_config); convert it\n"
    assert command("dequantize", source, tmp_path / "out", "--to", "pt") == (1, "", line)
    assert not (tmp_path / "out").exists()


def test_a_dequantized_checkpoint_can_be_quantized_again(folder: Path, command: Command, tmp_path: Path) -> None:
    assert command("dequantize", folder / "int4-pt", tmp_path / "out", "--to", "pt")[0] == 1
    invoke("wint8", folder / "int4-pt", tmp_path / "out")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq' is none that this tool writes"),
        ({"quantization": "wint4"}, "quantization_config is none that this tool writes"),
    ],
)
def test_the_format_of_another_program_is_refused(
    entry: dict[str, Any], words: str, folder: Path, command: Command, tmp_path: Path
) -> None:
    shutil.copytree(folder / "src", tmp_path / "src")
    (tmp_path / "src/config.json").write_text(json.dumps(config(folder / "src") | {"quantization_config": entry}))
    table = load_file(tmp_path / "src/model.safetensors")
    name = next(name for name in table if name.endswith("down_proj.weight"))
    write_safetensors(tmp_path / "src/model.safetensors", table | {name: table[name].to(torch.int8)})  # not plain
    code, out, err = command("dequantize", tmp_path / "src", tmp_path / "out", "--to", "pt")
    assert (code, out) == (1, "")
    assert words in err


def test_a_missing_part_is_named(folder: Path, command: Command, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shutil.copytree(folder / "wint2", tmp_path / "src")
    table = load_file(tmp_path / "src/model.safetensors")
    name = "ernie.layers.2.mlp.experts.0.down_proj.code_zp"
    del table[name]
    save_file(table, tmp_path / "src/model.safetensors", metadata={"format": "np"})
    code, _, err = command("dequantize", tmp_path / "src", tmp_path / "out", "--to", "pt")
    assert code == 1
    assert f"{name}: is not there, config.json (wint2 (CCQ)) wants F32 (256,)" in err


def test_a_layout_must_be_given(folder: Path, command: Command, tmp_path: Path) -> None:
    code, _, err = command("dequantize", folder / "int4", tmp_path / "out")
    assert code == 2
    assert "Missing option '--to'" in err


def test_a_config_that_promises_millions_of_tensors_is_not_expanded(folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folder / "int4", tmp_path / "int4"))
    config = json.loads((broken / "config.json").read_text()) | {"moe_num_experts": 2**24}
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match="is it the config of another model"):
        make_plan(open_source(broken), runtime="vllm", dequantize=True)
