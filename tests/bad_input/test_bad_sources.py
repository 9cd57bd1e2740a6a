"""Everything that a stranger's checkpoint can get wrong, through the command line."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bad_input import CONVERT, EXPERT, SHARDS, WINT4, Run, refused
from helpers.synthetic import read_file, tiny, wide, write_index, write_model, write_ranks, write_safetensors


def test_the_model_of_these_tests_is_good_before_it_is_broken(run: Run, source: Callable[..., Path]) -> None:
    source()
    outcome = run(*WINT4, "--quiet")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert outcome.files == ["README.md", "SHA256SUMS", "config.json", "ernie-quant.json", "model.safetensors", "report.json"]


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_missing_shard(run: Run, source: Callable[..., Path]) -> None:
    (source(shards=2) / SHARDS[1]).unlink()
    outcome = run(*CONVERT)
    assert outcome.code == 1
    lines = outcome.stderr.splitlines()
    assert lines[1] == f"  {SHARDS[1]}: named by model.safetensors.index.json, but is not there"
    assert len(lines) > 2
    assert all(line.endswith(": is missing") for line in lines[2:])
    assert outcome.files == []


def test_a_truncated_shard(run: Run, source: Callable[..., Path]) -> None:
    file = source(shards=2) / SHARDS[1]
    size = file.stat().st_size
    os.truncate(file, size - 1)
    refused(run(*CONVERT), f"{SHARDS[1]}: truncated: the header promises {size} bytes, the file has {size - 1}")


def test_an_index_that_names_a_tensor_no_file_has(run: Run, source: Callable[..., Path]) -> None:
    folder = source(shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    write_index(folder, index["weight_map"] | {"model.ghost.weight": SHARDS[0]})
    refused(run(*CONVERT), f"model.ghost.weight: the index says it is in {SHARDS[0]}, which does not hold it")


@pytest.mark.parametrize("name", ["../stray.safetensors", "/stray.safetensors", "C:\\stray.safetensors", "C:stray.safetensors"])
def test_an_index_that_leaves_the_folder(run: Run, source: Callable[..., Path], name: str) -> None:
    folder = source(shards=2)
    write_safetensors(folder.parent / "stray.safetensors", {"w": torch.zeros(2)})
    write_index(folder, {"w": name})
    refused(run(*CONVERT), f"model.safetensors.index.json names the file {name!r}, which is not a plain name in the folder")


def test_a_link_that_leaves_the_folder(run: Run, source: Callable[..., Path]) -> None:
    folder = source()
    (folder / "model.safetensors").rename(folder.parent / "stray.safetensors")
    (folder / "model.safetensors").symlink_to("../stray.safetensors")
    stray = folder.parent / "stray.safetensors"
    refused(run(*CONVERT), f"model.safetensors: is a link to {stray}, outside the folder; copy the file or open its folder")


@pytest.mark.parametrize("command", [("inspect", "SRC"), CONVERT, WINT4])
def test_a_pickle_with_a_global_outside_the_list(run: Run, tmp_path: Path, command: tuple[str, ...]) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, ("false",)

    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "config.json").write_text(json.dumps(tiny()[0]))
    (tmp_path / "src" / "model_state.pdparams").write_bytes(pickle.dumps({"w": Evil()}, 4))
    reason = "pickle asks for 'posix.system', which is not on the list of harmless names; it was not loaded"
    refused(run(*command), f"model_state.pdparams: {reason}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "config.json: is not valid JSON"),
        ("[1]", "config.json: is not a JSON object"),
        ("{}", "config.json: model_type is None; supported are ernie4_5, ernie4_5_moe, ernie4_5_moe_vl, ernie4_5_vl_moe"),
        ('{"model_type": "ernie4_5_moe"}', "config.json: num_hidden_layers is missing"),
        ('{"model_type": ["ernie4_5_moe"]}', "config.json: model_type is ['ernie4_5_moe']"),
        (b"\xff", "config.json: is not valid JSON"),
        ("[" * 100_000, "config.json: is nested too deep"),
        (None, "config.json: named by the checkpoint, but is not there"),
    ],
)
def test_a_broken_config(run: Run, source: Callable[..., Path], text: str | bytes | None, reason: str) -> None:
    path = source() / "config.json"
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(run(*CONVERT), reason)


def test_no_folder_at_all(run: Run, tmp_path: Path) -> None:
    refused(run(*CONVERT), f"{tmp_path / 'src'}: there is no such folder")


# --- tensors ---------------------------------------------------------------------------------------------------------


def test_an_unknown_tensor(run: Run, source: Callable[..., Path]) -> None:
    source({"model.layers.1.mlp.extra.weight": torch.zeros(2, 3)})
    refused(run(*CONVERT), "model.layers.1.mlp.extra.weight: is unknown to this architecture, 2x3, in model.safetensors")


def test_every_disagreement_is_listed_at_once(run: Run, source: Callable[..., Path]) -> None:
    source({"model.norm.weight": torch.zeros(65), EXPERT: torch.zeros(31, 64), "model.layers.0.input_layernorm.weight": None})
    refused(
        run(*CONVERT),
        "model.norm.weight: (65,) is not H = (64,)",
        f"{EXPERT}: (31, 64) is not M x H = (32, 64)",
        "model.layers.0.input_layernorm.weight: is missing",
    )


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"vocab_size": 250}, "model.embed_tokens.weight: (256, 64) is not V x H = (250, 64)"),
        ({"intermediate_size": 96}, "model.layers.0.mlp.down_proj.weight: (64, 128) is not H x I = (64, 96)"),
        ({"moe_num_experts": 9}, "model.layers.1.mlp.gate.weight: (8, 64) is not E x H = (9, 64)"),
        ({"moe_num_experts": 9}, "model.layers.2.mlp.experts.8.up_proj.weight: is missing"),
        ({"head_dim": 8}, "model.layers.0.self_attn.q_proj.weight: (64, 64) is not Q x H = (32, 64)"),
        ({"num_hidden_layers": 2}, "model.layers.2.mlp.experts.0.up_proj.weight: is unknown to this architecture, 32x64"),
    ],
)  # fmt: skip
def test_a_shape_that_does_not_follow_from_the_config(run: Run, source: Callable[..., Path], change: Any, line: str) -> None:
    source(**change)
    outcome = run(*CONVERT)
    assert outcome.code == 1
    assert f"\n  {line}" in outcome.stderr
    assert re.match(r"error: .*: \d+ problem\(s\) in the checkpoint\n", outcome.stderr)
    assert outcome.files == []


def test_an_untransposed_mtp_linear_proj_is_refused_and_repaired_on_request(run: Run, source: Callable[..., Path]) -> None:
    name = "model.mtp_linear_proj.0.weight"
    source({name: tiny("moe_mtp")[1][name].t().contiguous()}, model="moe_mtp")
    refused(run(*CONVERT), f"{name}: (128, 64) is not H x 2H = (64, 128): stored untransposed; --fix mtp_linear_proj repairs it")
    assert run(*CONVERT, "--fix", "mtp_linear_proj", "--quiet").code == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_or_infinity_in_a_weight_to_be_quantized(run: Run, source: Callable[..., Path], value: float) -> None:
    broken = tiny()[1][EXPERT].clone()
    broken[31, 63] = value  # the last one of all
    source({EXPERT: broken})
    refused(run(*WINT4), f"{EXPERT}: holds NaN or infinity, which cannot be quantized")
    assert run(*WINT4, "--dry-run").code == 0  # headers cannot tell


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_or_infinity_in_a_weight_for_fp8(run: Run, tmp_path: Path, value: float) -> None:
    config, tensors = wide()
    tensors[EXPERT][127, 127] = value
    write_model(tmp_path / "src", config, tensors)
    refused(run("fp8", "SRC", "OUT", "--experts-only"), f"{EXPERT}: holds NaN or infinity, which cannot be quantized")


def test_a_finished_file_of_a_failed_run_is_whole_and_the_broken_one_is_not_there(run: Run, source: Callable[..., Path]) -> None:
    name = "model.layers.2.mlp.experts.7.up_proj.weight"
    broken = tiny()[1][name].clone()
    broken[0, 0] = float("nan")
    source({name: broken})
    outcome = run(*WINT4, "--max-shard-size", "100KB")
    assert outcome.code == 1
    assert outcome.stderr == f"error: {name}: holds NaN or infinity, which cannot be quantized\n"
    assert outcome.files
    assert all(re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", file) for file in outcome.files)
    from safetensors import safe_open

    for file in outcome.files:
        with safe_open(outcome.out / file, framework="pt") as opened:
            assert opened.keys()
    assert run("verify", "OUT").stderr == f"error: {outcome.out}: is not finished; run the same command again\n"


def test_integers_in_place_of_a_weight_to_be_quantized(run: Run, source: Callable[..., Path]) -> None:
    source({EXPERT: torch.zeros(32, 64, dtype=torch.int8)})
    outcome = run(*WINT4)
    assert outcome.code == 1
    assert f"  {EXPERT}: is I8, not one of BF16, F16, F32\n" in outcome.stderr


def test_ranks_that_hold_their_shares_in_several_dtypes(run: Run, tmp_path: Path) -> None:
    file = write_ranks(tmp_path / "src", "moe", 2) / "rank1" / "model.safetensors"
    name = "ernie.layers.1.mlp.experts.0.down_proj.weight"
    share = read_file(file)
    write_safetensors(file, share | {name: share[name].float()})
    line = f"{name} (rank0/model.safetensors) is BF16, {name} (rank1/model.safetensors) is F32: they are parts of one tensor"
    refused(run(*CONVERT), line)


def test_gate_and_up_of_several_dtypes_cannot_become_one_paddle_tensor(run: Run, source: Callable[..., Path]) -> None:
    source({EXPERT: tiny()[1][EXPERT].float()})
    up = EXPERT.replace("gate_proj", "up_proj")
    line = f"{EXPERT} (src/model.safetensors) is F32, {up} (src/model.safetensors) is BF16: they are parts of one tensor"
    refused(run("convert", "SRC", "OUT", "--to", "paddle"), line)


# --- models that are not for us --------------------------------------------------------------------------------------


def test_an_unsupported_model_type(run: Run, source: Callable[..., Path]) -> None:
    source(model_type="llama")
    supported = "ernie4_5, ernie4_5_moe, ernie4_5_moe_vl, ernie4_5_vl_moe"
    refused(run(*CONVERT), f"config.json: model_type is 'llama'; supported are {supported}")


def test_experts_only_on_a_model_without_experts(run: Run, source: Callable[..., Path]) -> None:
    source(model="dense")
    refused(run(*WINT4), "this model has no experts; without --experts-only its other linears are quantized")


@pytest.mark.parametrize("command", [WINT4, ("fp8", "SRC", "OUT")])
def test_a_source_that_is_quantized_already(run: Run, source: Callable[..., Path], command: tuple[str, ...]) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    folder = source({name: tiny()[1][name].to(torch.float8_e4m3fn)}, quantization_config={"quant_method": "fp8"})
    line = "is quantized already (config.json has quantization_config); start from the original checkpoint"
    refused(run(*command), f"{folder}: {line}")
    refused(run(*CONVERT), f"{folder}: is quantized for vllm already, in PT layout")


def test_our_own_output_is_not_quantized_again(run: Run, source: Callable[..., Path], tmp_path: Path) -> None:
    source()
    assert run(*WINT4, "--quiet").code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]  # a config that hides it does not help
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    outcome = run("wint8", "OUT", tmp_path / "again", "--experts-only")
    assert outcome.code == 1
    assert "is quantized already (it holds model.layers.1.mlp.experts.0.down_proj.weight_packed)" in outcome.stderr
    assert not (tmp_path / "again").exists()


# --- a process of its own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('"rms_norm_eps": NaN', "config.json: rms_norm_eps is nan, and programs compute with it; give it its number"),
        ('"rope_theta": -1e999', "config.json: rope_theta is -inf, and programs compute with it"),
        ('"rope_parameters": {"factors": [1, NaN]}', "config.json: rope_parameters.factors is [1, nan], and programs"),
        ('"vocab_size": Infinity', "config.json: vocab_size is inf, not a whole number"),
        ('"x": "\\ud800"', "config.json: is not valid JSON"),
    ],
)
def test_config_json_that_could_not_be_written_again(run: Run, source: Callable[..., Path], text: str, why: str) -> None:
    folder = source(**{text.split('"')[1]: None})
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text("{" + text + "," + config[config.index("{") + 1 :])
    refused(run("convert", "SRC", "OUT", "--to", "pt"), why)


def test_numbers_that_are_none_in_keys_that_nobody_uses_are_left_out_and_named(run: Run, source: Callable[..., Path]) -> None:
    folder = source()
    config = (folder / "config.json").read_text()
    odd = '{"router_jitter": NaN, "loss": {"scale": 1e999, "kept": 1}, "bounds": [0, -Infinity],'
    (folder / "config.json").write_text(odd + config[config.index("{") + 1 :])
    outcome = run("convert", "SRC", "OUT", "--to", "pt")
    assert outcome.code == 0
    note = "config.json: router_jitter is nan, loss.scale is inf, bounds is [0, -inf]: JSON has no such numbers"
    assert f"note: {note}" in outcome.stdout
    assert note in (outcome.out / "README.md").read_text()
    made = json.loads((outcome.out / "config.json").read_text(), parse_constant=pytest.fail)
    assert made == json.loads(config) | {"loss": {"kept": 1}} | {k: made[k] for k in ("torch_dtype", "moe_num_shared_experts")}
    assert run("verify", "OUT", "--against", "SRC").code == 0


def test_a_config_that_promises_millions_of_tensors_is_not_expanded(run: Run, source: Callable[..., Path]) -> None:
    folder = source()
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 4096, "moe_num_experts": 2**24, "moe_layer_end_index": 4095}
    (folder / "config.json").write_text(json.dumps(config))
    outcome = run("inspect", "SRC")
    assert outcome.code == 1
    assert "is it the config of another model?" in outcome.stdout
