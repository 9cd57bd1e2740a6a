"""Quantized checkpoints between FastDeploy's container and PT files: every code and scale stays, there and back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import w4a8
from helpers.containers import decode_all, read_folder, widened
from helpers.models import copy, invoke, random_model, tensors
from helpers.ranks import FORMS, LAST_WINT4, WIDTHS, lasting
from safetensors.torch import load_file, save_file

import ernie_quant
from ernie_quant.check.verify import verify
from ernie_quant.errors import CheckpointError, VerifyError
from ernie_quant.weights import layouts

Command = Callable[..., tuple[int, str, str]]
Arrays = dict[str, np.ndarray]


def refusal(command: Command, *arguments: object) -> list[str]:
    """What a command that cannot be done says, line by line."""
    code, out, err = command(*arguments)
    assert (code, out) == (1, "")
    return err.splitlines()


@pytest.fixture(scope="module")
def converted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FORM/SIZE of the container of so many ranks, in PT files."""
    out = tmp_path_factory.mktemp("pt")
    for form in LAST_WINT4:
        for size in ("1", "2", "4"):
            invoke("convert", folder / form / size, out / form / size, "--to", "pt", "--quiet")
    return out


def decode_wint2(packed: np.ndarray, pairs: np.ndarray, channel: np.ndarray) -> np.ndarray:
    """f32 [N, K] of the three tensors of a weight, value by value as _wint2.py and the codec's formula say."""
    rows, width = packed.shape[0], 4 * packed.shape[1]
    weight = np.zeros((rows, width), np.float32)
    exact = packed.astype(np.float64) * channel[:, 1:2].astype(np.float64) + channel[:, 2:3]
    code = np.floor(exact.astype(np.float32) + np.float32(0.5)).astype(np.int64)
    for column in range(width):
        group, at = divmod(column, 64)
        b, a, c = at // 8, at % 8 // 2, at % 2
        stored = 64 * group + 16 * a + 2 * b + c
        value = (code[:, stored // 4] >> (9, 6, 3, 0)[stored % 4] & 63) - 32
        local = pairs[:, group // 2] >> (0 if group % 2 else 4) & 15
        scale = rounded(local.astype(np.float32) * channel[:, 0])
        weight[:, column] = rounded(value.astype(np.float32) * scale)
    return weight


def rounded(x: np.ndarray) -> np.ndarray:
    """float32 that bf16 holds."""
    return torch.from_numpy(x).bfloat16().float().numpy()


def decode_integers(packed: np.ndarray, scale: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """f32 [N, K] of compressed-tensors' pack-quantized, one scale per row."""
    bits = 32 * packed.shape[1] // int(shape[1])
    words = packed.view(np.uint32)[:, :, None] >> np.arange(0, 32, bits, dtype=np.uint32)
    codes = (words & (2**bits - 1)).reshape(len(packed), -1)[:, : shape[1]].astype(np.float32) - 2 ** (bits - 1)
    return rounded(codes * widened(scale))


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """bf16 as its bits."""
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def decoded(folder: Path) -> Arrays:
    """Every quantized weight of PT files."""
    stored = {name: as_array(tensor) for name, tensor in tensors(folder).items()}
    found = {}
    for module in (name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")):
        if f"{module}.weight_channel_scale" in stored:
            parts = ("weight_packed", "weight_scale", "weight_channel_scale")
            found[f"{module}.weight"] = decode_wint2(*(stored[f"{module}.{part}"] for part in parts))
        else:
            parts = ("weight_packed", "weight_scale", "weight_shape")
            found[f"{module}.weight"] = decode_integers(*(stored[f"{module}.{part}"] for part in parts))
    return found


def pieces(name: str, weight: np.ndarray) -> Arrays:
    """PT weights of one of a container, [K, N]."""
    module, weight = name.replace("ernie.", "model.", 1), weight.T
    if "up_gate_proj" in name:
        half = len(weight) // 2
        return {module.replace("up_gate", "gate"): weight[:half], module.replace("up_gate", "up"): weight[half:]}
    if "qkv_proj" in name:
        cuts = (weight[:512], weight[512:640], weight[640:])
        return {module.replace("qkv", x): cut for x, cut in zip("qkv", cuts, strict=True)}
    return {module: weight}


@FORMS
def test_the_weights_are_those_of_the_container(form: str, folder: Path, converted: Path) -> None:
    container, _ = decode_all(read_folder(folder / form / "1"), LAST_WINT4[form])
    expected = {name: piece for whole, weight in container.items() for name, piece in pieces(whole, weight).items()}
    found = decoded(converted / form / "1")
    assert found.keys() == expected.keys()
    assert [name for name in found if not np.array_equal(found[name], expected[name])] == []


@FORMS
def test_any_number_of_ranks_becomes_the_same_files(form: str, converted: Path) -> None:
    one, *others = ((converted / form / size / "model.safetensors").read_bytes() for size in ("1", "2", "4"))
    assert [data == one for data in others] == [True, True]


def bare(folder: Path) -> dict[str, bytes]:
    """All files but those that say how the result was made."""
    return {name: data for name, data in lasting(folder).items() if name not in ("report.json", "ernie-quant.json", "README.md")}


@FORMS
@pytest.mark.parametrize("tp", [1, 4])
def test_back_again_it_is_the_container_to_the_byte(form: str, tp: int, folder: Path, converted: Path, tmp_path: Path) -> None:
    invoke("convert", converted / form / "2", tmp_path / "back", "--to", "paddle", "--tp", tp, "--quiet")
    back, was = bare(tmp_path / "back"), bare(folder / form / str(tp))
    configs = [[json.loads(files.pop(name)) for name in ("config.json", "mtp/config.json")] for files in (back, was)]
    assert back == was
    for one, other in zip(*configs, strict=True):  # other keys are those of a plain conversion
        keys = ("quantization_config", "is_quantized", "tensor_parallel_size")
        assert [one.get(key) for key in keys] == [other.get(key) for key in keys]


def test_from_vllm_to_fastdeploy_and_back_nothing_changes(folder: Path, tmp_path: Path) -> None:
    options = ("--wint4-layers", 2, "--group-size", "channel", "--mtp", "--effort", 1, "--runtime", "vllm")
    invoke("wint2", folder / "src", tmp_path / "pt", *options, "--quiet")
    invoke("convert", tmp_path / "pt", tmp_path / "paddle", "--to", "paddle", "--quiet")
    invoke("convert", tmp_path / "paddle", tmp_path / "again", "--to", "pt", "--quiet")
    assert bare(tmp_path / "again") == bare(tmp_path / "pt")


def test_a_published_checkpoint_becomes_files_for_vllm(folder: Path, converted: Path, tmp_path: Path) -> None:
    """It has no manifest and no report; here with the ranks of 2 GPUs."""
    published = copy(folder / "wint2/2", tmp_path / "published")
    for name in ("report.json", "ernie-quant.json", "README.md"):
        (published / name).unlink()
    result = ernie_quant.convert(published, tmp_path / "out", to="pt")
    assert bare(tmp_path / "out") == bare(converted / "wint2/1")
    assert any("what these lose of the original weights, its own report says" in note for note in result.notes)
    assert verify(tmp_path / "out", published).quantized == verify(converted / "wint2/1").quantized


@FORMS
def test_it_claims_no_error_and_is_verified_against_the_original(form: str, folder: Path, converted: Path) -> None:
    """An error of 0 on a card would be one beside the quantized source."""
    out = converted / form / "1"
    assert "## Error" not in (out / "README.md").read_text()
    rows = json.loads((out / "report.json").read_text())["tensors"]
    assert {row.get("as_stored", False) for row in rows if "_proj" in row["name"] and "mtp_linear" not in row["name"]} == {True}
    was = json.loads((folder / form / "1/report.json").read_text())["roles"]["experts"]
    verified = verify(out, folder / "src")
    assert verified.against
    assert verified.compared.worst_rel_error >= was["rel_error"] > 0


@FORMS
def test_verify_compares_codes_with_the_container(
    form: str, folder: Path, converted: Path, command: Command, tmp_path: Path
) -> None:
    source = folder / form / "4"
    assert command("verify", converted / form / "1", "--against", source, "--full")[0] == 0
    other = copy(folder / form / "1", tmp_path / "other")
    stored = load_file(other / "model.safetensors")
    stored["ernie.layers.2.mlp.experts.1.up_gate_proj.quant_weight"][3, 5] += 1
    save_file(stored, other / "model.safetensors", metadata={"format": "np"})
    with pytest.raises(VerifyError) as caught:
        verify(converted / form / "1", other)
    (line,) = caught.value.problems
    assert re.match(
        r"model\.layers\.2\.mlp\.experts\.1\.(gate|up)_proj\.weight: rows 0 to 512 have not the source's codes;", line
    )


def test_config_json_is_that_of_the_other_program(converted: Path) -> None:
    config = json.loads((converted / "wint2/4/config.json").read_text())
    assert "is_quantized" not in config
    assert "tensor_parallel_size" not in config
    entry: dict[str, Any] = config["quantization_config"]
    assert (entry["quant_method"], entry["version"], entry["wint2"]["group_size"]) == ("ernie-wint2", 1, 64)
    assert (
        json.loads((converted / "wint4/4/config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    )


def test_forms_that_the_container_lacks_are_refused(folder: Path, command: Command, tmp_path: Path) -> None:
    invoke("wint2", folder / "src", tmp_path / "pt", "--runtime", "vllm", "--experts-only", "--wint4-layers", 2, "--quiet")
    lines = refusal(command, "convert", tmp_path / "pt", tmp_path / "out", "--to", "paddle")
    assert lines[0] == (
        f"error: {tmp_path / 'pt'}: is quantized in forms that FastDeploy does not load; quantize the original for it, or"
        " dequantize --to paddle"
    )
    wanted = "FastDeploy's container wants wint2 (CCQ) or int4 (-7 to 7), per channel, mse, not int4, group 128, mse"
    assert any(f".mlp.experts.*.down_proj.weight: {wanted}" in line for line in lines), lines


def test_what_is_in_that_layout_already_is_refused(folder: Path, converted: Path, command: Command, tmp_path: Path) -> None:
    (line,) = refusal(command, "convert", converted / "wint2/1", tmp_path / "out", "--to", "pt")
    assert line.endswith("wint2/1: is quantized for vllm already, in PT layout")
    (line,) = refusal(command, "convert", folder / "wint2/2", tmp_path / "out", "--to", "paddle")
    assert line.endswith("wint2/2: is quantized for fastdeploy already, in Paddle layout; reshard changes its ranks")


def test_ranks_are_for_quantized_checkpoints(folder: Path, converted: Path, command: Command, tmp_path: Path) -> None:
    for source, to in ((folder / "src", "pt"), (converted / "src", "paddle"), (folder / "wint2/1", "pt")):
        if not source.exists():
            invoke("convert", folder / "src", source, "--to", "pt", "--quiet")
        (line,) = refusal(command, "convert", source, tmp_path / "out", "--to", to, "--tp", 2)
        assert "only quantized checkpoints for FastDeploy are stored per rank; leave out --tp" in line


def test_a_code_that_fastdeploy_never_writes_is_refused_by_name(converted: Path, tmp_path: Path) -> None:
    source = copy(converted / "wint4/1", tmp_path / "src")
    stored = tensors(source)
    name = "model.layers.1.mlp.experts.0.down_proj.weight_packed"
    stored[name][7, 0] = 0  # eight codes of -8
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.0\.down_proj\.weight: holds the code -8, int4 \(-7 to 7\)"):
        ernie_quant.convert(source, tmp_path / "out", to="paddle")


def test_w4a8_has_no_form_in_pt_files(command: Command, tmp_path: Path) -> None:
    w4a8.with_statistics(w4a8.model(tmp_path / "src"), tmp_path / "w4a8")
    lines = refusal(command, "convert", tmp_path / "w4a8", tmp_path / "out", "--to", "pt")
    assert "is quantized in forms that vLLM does not load" in lines[0]


def test_scales_that_are_no_numbers_are_refused_by_name(converted: Path, tmp_path: Path) -> None:
    source = copy(converted / "wint2/1", tmp_path / "src")
    stored = tensors(source)
    stored["model.layers.2.mlp.experts.0.down_proj.weight_channel_scale"][9, 1] = float("nan")
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.0\.down_proj\.weight: its code_scale is NaN or infinity in the source"):
        ernie_quant.convert(source, tmp_path / "out", to="paddle")


def test_a_vl_container_is_written_only_with_unsupported(command: Command, tmp_path: Path) -> None:
    """FastDeploy has no loader for it; the files are those that wint2 would write."""
    shape = {k: v for k, v in WIDTHS.items() if "moe" not in k} | {"moe_intermediate_size": [256, 128]}
    source = random_model(tmp_path / "src", layouts.PADDLE, "vl", **shape)
    invoke("wint2", source, tmp_path / "pt", "--wint4-layers", 0, "--runtime", "vllm", "--effort", 1, "--quiet")
    lines = refusal(command, "convert", tmp_path / "pt", tmp_path / "out", "--to", "paddle")
    assert "--unsupported writes this one all the same" in lines[1]
    invoke("convert", tmp_path / "pt", tmp_path / "out", "--to", "paddle", "--unsupported", "--quiet")
    invoke("wint2", source, tmp_path / "like", "--wint4-layers", 0, "--effort", 1, "--unsupported", "--quiet")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "like/model.safetensors").read_bytes()
