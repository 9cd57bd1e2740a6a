"""Everything that a user or a stranger's file can get wrong, through the command line."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ernie_quant.cli.main import main
from helpers.synthetic import read_file, tiny, wide, write_index, write_model, write_pdparams, write_ranks, write_safetensors

EXPERT = "model.layers.1.mlp.experts.0.gate_proj.weight"
WINT4 = ("wint4", "SRC", "OUT", "--experts-only", "--group-size", "32")
CONVERT = ("convert", "SRC", "OUT", "--to", "pt")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str
    out: Path

    @property
    def files(self) -> list[str]:
        """What stands in OUT under a final name."""
        return sorted(p.name for p in self.out.iterdir() if p.name != ".ernie-quant") if self.out.is_dir() else []


Run = Callable[..., Outcome]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """The command line in this process; SRC and OUT stand for `tmp_path/src` and `tmp_path/out`."""
    handler = signal.getsignal(signal.SIGTERM)

    def call(*args: object) -> Outcome:
        named = {"SRC": tmp_path / "src", "OUT": tmp_path / "out"}
        monkeypatch.setattr(sys, "argv", ["ernie-quant", *(str(named.get(str(a), a)) for a in args)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err, tmp_path / "out")

    yield call
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., Path]:
    """Write the golden PT model with experts, changed, as SRC."""

    def write(tensors: dict[str, Any] | None = None, *, model: str = "moe", shards: int = 1, **config: Any) -> Path:
        settings, stored = tiny(model, **config)
        stored |= tensors or {}
        return write_model(tmp_path / "src", settings, {n: t for n, t in stored.items() if t is not None}, shards)

    return write


def refused(outcome: Outcome, *lines: str) -> None:
    """Exit code 1; on stderr one line, or a headline and indented ones, and nothing else anywhere."""
    assert outcome.code == 1
    assert outcome.stdout == ""
    assert outcome.files == []
    headline, *more = outcome.stderr.splitlines()
    assert headline.startswith("error: ")
    assert all(line.startswith("  ") for line in more)
    assert "Traceback" not in outcome.stderr
    found = [headline.removeprefix("error: "), *(line.strip() for line in more)]
    for line in lines:
        assert line in found if more else line in found[0], f"{line!r} is not in {found}"
    if more:
        assert sorted(found[1:]) == sorted(lines)


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


@pytest.mark.parametrize("kv_heads", [4, None])
def test_multi_head_attention(run: Run, source: Callable[..., Path], kv_heads: int | None) -> None:
    source(num_key_value_heads=kv_heads)
    refused(run(*CONVERT), "config.json: num_key_value_heads equals num_attention_heads (4): multi-head attention is fused")


def test_experts_only_on_a_model_without_experts(run: Run, source: Callable[..., Path]) -> None:
    source(model="dense")
    refused(run(*WINT4), "this model has no experts; without --experts-only its other linears are quantized")


@pytest.mark.parametrize("command", [WINT4, CONVERT, ("fp8", "SRC", "OUT")])
def test_a_source_that_is_quantized_already(run: Run, source: Callable[..., Path], command: tuple[str, ...]) -> None:
    folder = source(quantization_config={"quant_method": "fp8"})
    line = "is quantized already (config.json has quantization_config); start from the original checkpoint"
    refused(run(*command), f"{folder}: {line}")


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


# --- what does not fit -----------------------------------------------------------------------------------------------

FFN = "model.layers.*.mlp.experts.*"


def test_a_group_size_that_divides_no_width_is_refused_for_all_of_them_at_once(run: Run, source: Callable[..., Path]) -> None:
    source()
    refused(
        run("wint4", "SRC", "OUT", "--experts-only"),
        f"{FFN}.down_proj.weight: group_size 128 does not divide 32 inputs; 32, channel would (16 tensors)",
        f"{FFN}.gate_proj.weight: group_size 128 does not divide 64 inputs; 64, 32, channel would (16 tensors)",
        f"{FFN}.up_proj.weight: group_size 128 does not divide 64 inputs; 64, 32, channel would (16 tensors)",
    )


def test_keep_unfit_keeps_them_and_says_so(run: Run, source: Callable[..., Path]) -> None:
    source()
    outcome = run("wint4", "SRC", "OUT", "--keep-unfit", "--experts-only", "--json")
    assert outcome.code == 0
    result = json.loads(outcome.stdout)
    assert result["quantized"] == 0
    assert result["bits_per_weight"] == pytest.approx(16, abs=0.2)  # routers are float32
    line = "kept, because model.layers.*.mlp.experts.*.down_proj.weight: group_size 128 does not divide 32 inputs"
    assert any(note.startswith(line) for note in result["notes"])
    assert "quantization_config" not in json.loads((outcome.out / "config.json").read_text())


def test_fp8_blocks_that_do_not_divide_a_width(run: Run, source: Callable[..., Path]) -> None:
    source()
    refused(
        run("fp8", "SRC", "OUT", "--experts-only"),
        f"{FFN}.down_proj.weight: blocks of 128 do not divide 64 and 32 (16 tensors)",
        f"{FFN}.gate_proj.weight: blocks of 128 do not divide 32 and 64 (16 tensors)",
        f"{FFN}.up_proj.weight: blocks of 128 do not divide 32 and 64 (16 tensors)",
    )


def test_fp8_of_the_experts_of_a_model_whose_k_and_v_are_too_narrow(run: Run, tmp_path: Path) -> None:
    config, tensors = wide()
    write_model(tmp_path / "src", config, tensors)
    outcome = run("fp8", "SRC", "OUT")
    assert (outcome.code, outcome.files) == (1, [])
    for x in "kv":
        assert f"  model.layers.*.self_attn.{x}_proj.weight: blocks of 128 do not divide 64 (2 tensors)\n" in outcome.stderr
    assert run("fp8", "SRC", "OUT", "--experts-only", "--quiet").code == 0


# --- output folders --------------------------------------------------------------------------------------------------


def test_an_output_folder_that_is_not_empty_and_not_ours(run: Run, source: Callable[..., Path], tmp_path: Path) -> None:
    source()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("dear")
    for options in ((), ("--restart",)):
        outcome = run(*CONVERT, *options)
        assert outcome.code == 1
        line = "is not empty and was not made by ernie-quant; choose another folder"
        assert outcome.stderr == f"error: {tmp_path / 'out'}: {line}\n"
        assert outcome.files == ["thesis.tex"]
    assert (tmp_path / "out" / "thesis.tex").read_text() == "dear"


def test_an_output_folder_that_is_a_file(run: Run, source: Callable[..., Path], tmp_path: Path) -> None:
    source()
    (tmp_path / "out").write_text("dear")
    refused(run(*CONVERT), f"{tmp_path / 'out'}: is a file, not a folder")
    assert (tmp_path / "out").read_text() == "dear"


@pytest.mark.parametrize("where", ["src", "src/inside", ".", "src/../src"])
def test_an_output_folder_in_or_around_the_source(run: Run, source: Callable[..., Path], tmp_path: Path, where: str) -> None:
    folder = source()
    before = sorted(p.name for p in folder.iterdir())
    outcome = run("convert", "SRC", tmp_path / where, "--to", "pt")
    refused(outcome, f"{tmp_path / where}: the output folder must lie beside the source {folder}, not in or around it")
    assert sorted(p.name for p in folder.iterdir()) == before


def test_an_output_folder_that_is_a_link_to_the_source(run: Run, source: Callable[..., Path], tmp_path: Path) -> None:
    folder = source()
    (tmp_path / "out").symlink_to(folder)
    outcome = run(*CONVERT)
    assert (outcome.code, outcome.files) == (1, ["config.json", "model.safetensors"])
    assert "must lie beside the source" in outcome.stderr


def test_an_output_folder_of_another_plan(run: Run, source: Callable[..., Path], tmp_path: Path) -> None:
    source()
    assert run(*CONVERT, "--quiet").code == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    outcome = run(*WINT4)
    assert outcome.code == 1
    changed = "codecs rtn: is 1, was not there; recipe name: is wint4, was keep"
    assert f"holds the result of another plan ({changed};" in outcome.stderr
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert run(*CONVERT).stdout == f"{tmp_path / 'out'}: complete\n"


# --- recipes ---------------------------------------------------------------------------------------------------------

BROKEN_RECIPE = """
title = "mine"
[[rule]]
role = "experts"
match = "mlp"
codec = "rtn"
[[rule]]
codec = "rtn"
[[rule]]
role = "router"
codec = "rtn"
[[rule]]
match = "("
codec = "rtn"
[[rule]]
role = "experts"
[[rule]]
role = "experts"
codec = "awq"
[[rule]]
role = "experts"
codec = "rtn"
bit = 4
[[rule]]
role = "experts"
codec = "rtn"
bits = "4"
[[rule]]
role = "experts"
codec = "rtn"
group_size = 100
[[rule]]
role = "experts"
codec = "rtn"
scale = "max"
"""


def test_every_mistake_of_a_recipe_is_listed(run: Run, source: Callable[..., Path], tmp_path: Path) -> None:
    source()
    (tmp_path / "mine.toml").write_text(BROKEN_RECIPE)
    outcome = run("quantize", "SRC", "OUT", "--recipe", tmp_path / "mine.toml")
    lines = [line.strip() for line in outcome.stderr.splitlines()]
    assert (outcome.code, outcome.files) == (1, [])
    assert lines[0] == f"error: {tmp_path / 'mine.toml'}: 11 mistake(s)"
    expected = [
        "title: unknown; a recipe has [[rule]] tables only",
        "rule 1: needs one of role, match and names",
        "rule 2: needs one of role, match and names",
        "rule 3: role 'router' is not one that can be quantized (experts, vision_experts, shared_experts, mlp, attention, mtp)",
        "rule 4: match '(' is no regular expression: ",
        "rule 5: needs a codec",
        "rule 6: there is no codec 'awq'; there are ",
        "rule 7: codec rtn has no option bit; it takes bits, ",
        "rule 8: codec rtn: bits is '4', not 2, 4 or 8",
        "rule 9: codec rtn: group_size is 100, not 'channel' or a multiple of 8 from 16 on",
        "rule 10: codec rtn: scale is 'max', not mse or absmax",
    ]
    assert len(lines) == 12
    for line, start in zip(lines[1:], expected, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[[rule]", "is not valid TOML"),
        ("", "has no [[rule]]"),
        ("rule = 5", "has no [[rule]]"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_recipe_that_is_none(run: Run, source: Callable[..., Path], tmp_path: Path, text: str | None, reason: str) -> None:
    source()
    if text is not None:
        (tmp_path / "mine.toml").write_text(text)
    refused(run("quantize", "SRC", "OUT", "--recipe", tmp_path / "mine.toml"), f"{tmp_path / 'mine.toml'}: {reason}")


def test_a_rule_that_fits_nothing(run: Run, source: Callable[..., Path], tmp_path: Path) -> None:
    source()
    rules = [("role", "vision_experts"), ("match", r"layers\.7\.")]
    (tmp_path / "mine.toml").write_text("".join(f"[[rule]]\n{key} = '{value}'\ncodec = 'rtn'\n" for key, value in rules))
    refused(
        run("quantize", "SRC", "OUT", "--recipe", tmp_path / "mine.toml"),
        "recipe mine: no linear of this model fits role vision_experts",
        r"recipe mine: no linear of this model fits match = 'layers\\.7\\.'",
    )


# --- a process of its own --------------------------------------------------------------------------------------------


def test_inspect_shows_anomalies_and_exits_with_1(run: Run, source: Callable[..., Path]) -> None:
    source({"model.norm.weight": None, "model.ghost": torch.zeros(1)})
    outcome = run("inspect", "SRC")
    assert (outcome.code, outcome.stderr) == (1, "")
    assert outcome.stdout.splitlines()[-2:] == [
        "anomaly: model.norm.weight: is missing",
        "anomaly: model.ghost: is unknown to this architecture, 1, in model.safetensors",
    ]


def test_wrong_usage_exits_with_2(run: Run) -> None:
    for args in (("convert", "SRC", "OUT"), ("wint5", "SRC", "OUT"), ("wint4", "SRC"), (*WINT4[:4], "--group-size", "7")):
        assert run(*args).code == 2


def test_a_process_says_one_line_and_exits_with_1(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "config.json").write_text(json.dumps(tiny()[0]))
    write_pdparams(tmp_path / "src" / "model_state.pdparams", {"w": torch.zeros(2)})
    os.truncate(tmp_path / "src" / "model_state.pdparams", 100)
    command = [sys.executable, "-m", "ernie_quant", "wint4", str(tmp_path / "src"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: model_state.pdparams: pickle ends in the middle; it was not loaded\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "why"), [('"rope_theta": NaN', "NaN is no JSON number"), ('"x": 1e999', "1e999 is no"), ('"x": "\\ud800"', "codec")]
)
def test_config_json_that_could_not_be_written_again(run: Run, source: Callable[..., Path], text: str, why: str) -> None:
    folder = source()
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text("{" + text + "," + config[config.index("{") + 1 :])
    refused(
        run("convert", "SRC", "OUT", "--to", "pt"), f"config.json: is not valid JSON: {why}" if why != "codec" else "config.json"
    )


def test_a_config_that_promises_millions_of_tensors_is_not_expanded(run: Run, source: Callable[..., Path]) -> None:
    folder = source()
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 4096, "moe_num_experts": 2**24, "moe_layer_end_index": 4095}
    (folder / "config.json").write_text(json.dumps(config))
    outcome = run("inspect", "SRC")
    assert outcome.code == 1
    assert "is it the config of another model?" in outcome.stdout


def test_keep_unfit_keeps_all_of_a_layer_of_which_one_tensor_does_not_fit(run: Run, source: Callable[..., Path]) -> None:
    """Groups of 64 divide the 64 inputs of gate and up, not the 32 of down; the experts are one layer in memory."""
    source()
    outcome = run("wint4", "SRC", "OUT", "--keep-unfit", "--experts-only", "--group-size", "64", "--json")
    assert outcome.code == 0
    notes = json.loads(outcome.stdout)["notes"]
    assert "32 more tensors are kept, as parts of the same layers" in notes
