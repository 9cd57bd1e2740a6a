"""How many GPUs: what is published, what can be computed by hand, and which way every option pulls."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.models import GOLDEN, copy
from helpers.words import byte_tokenizer

from ernie_quant.checkpoint import Checkpoint, TensorSpec
from ernie_quant.codecs.fp8 import Float8Block
from ernie_quant.errors import PlanError
from ernie_quant.planning import effort, gpus, held, recipe
from ernie_quant.planning.capacity import GIB, Question, Row, estimate
from ernie_quant.planning.fit import Fit
from ernie_quant.planning.gpus import Limits
from ernie_quant.runtimes import Spread
from ernie_quant.sources import open_source

MAKE_GEOMETRY = Path(__file__).parents[1] / "benchmarks/make_geometry.py"
Command = Callable[..., tuple[int, str, str]]
WINT2_PACKED = "wint2 --runtime vllm"
BF16, WINT4, WINT2, CONTAINER = "convert --to pt", "wint4", "wint2", "wint4 --runtime fastdeploy"
AT_LOAD_8, AT_LOAD_4 = "--quantization wint8", "--quantization wint4"  # FastDeploy's
INT8_EXPERTS = '[[rule]]\nrole = "experts"\ncodec = "rtn"\nbits = 8\ngroup_size = "channel"\n'


@pytest.fixture(scope="module")
def geometry(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """Sparse files with the true geometry of a release; headers are read once."""
    folder, opened = tmp_path_factory.mktemp("geometry"), {}

    def checkpoint(model: str) -> Checkpoint:
        if model not in opened:
            subprocess.run([sys.executable, MAKE_GEOMETRY, model, folder / model], check=True, capture_output=True)
            opened[model] = open_source(folder / model)
        return opened[model]

    return checkpoint


def rows(source: Checkpoint, limits: Limits | None = None, gpu: str = "80GiB", **options: Any) -> dict[str, Row]:
    question = Question(limits or Limits(), (gpus.find(gpu),), options.pop("count", None))
    return {row.form: row for row in estimate(source, question, **options).rows}


def fit(source: Checkpoint, form: str, limits: Limits | None = None, gpu: str = "80GiB", **options: Any) -> Fit:
    return rows(source, limits, gpu, **options)[form].fits[0]


@pytest.fixture(scope="module")
def of_300b(geometry: Callable[[str], Checkpoint]) -> dict[str, Row]:
    return rows(geometry("300b"))


@pytest.fixture(scope="module")
def of_21b(geometry: Callable[[str], Checkpoint]) -> dict[str, Row]:
    return rows(geometry("21b"))


# --- what is published -----------------------------------------------------------------------------------------------

# FastDeploy's "best practices" and vLLM's recipes: least GPUs of so much memory, with a context of 32768
PUBLISHED = [
    ("300b", "fp8", "80", 8), ("300b", AT_LOAD_8, "80", 8), ("300b", AT_LOAD_4, "80", 4), ("300b", WINT2, "80", 2),
    ("300b", WINT2, "141", 1), ("300b", BF16, "80", 16),
    ("vl-424b", BF16, "80", 16), ("vl-424b", BF16, "141", 8), ("vl-424b", AT_LOAD_8, "80", 8),
    ("vl-28b", BF16, "80", 1), ("vl-28b", AT_LOAD_4, "24", 1), ("vl-28b", AT_LOAD_8, "24", 2), ("vl-28b", BF16, "24", 4),
    ("21b", AT_LOAD_8, "24", 2), ("21b", AT_LOAD_4, "24", 1), ("0.3b", BF16, "24", 1), ("0.3b", AT_LOAD_8, "24", 1),
]  # fmt: skip


# what the README says of our own form
OURS = [("300b", WINT2_PACKED, "80", 2), ("vl-424b", WINT2_PACKED, "80", 2)]


@pytest.mark.parametrize(("model", "form", "gpu", "count"), [*PUBLISHED, *OURS])
def test_published_counts(model: str, form: str, gpu: str, count: int, geometry: Callable[[str], Checkpoint]) -> None:
    assert fit(geometry(model), form, gpu=gpu).gpus == count


def test_groups_of_64_of_the_300b_on_48_gib(geometry: Callable[[str], Checkpoint]) -> None:
    """3584 = 56 x 64 inputs: 8 ranks share groups of 64, 4 those of 128; or experts stay whole."""
    found = rows(geometry("300b"), gpu="48")
    assert found["wint4 --experts-only --group-size 64"].fits[0].spread == Spread(8)
    assert found["wint4 --experts-only"].fits[0].spread == Spread(8, experts_whole=True)
    assert found["wint4 --experts-only --group-size 64"].tp_sizes == (1, 2, 4, 8)
    assert found["wint4 --experts-only"].tp_sizes == (1, 2, 4)


def test_fp8_of_the_300b_keeps_its_experts_whole(of_300b: dict[str, Row]) -> None:
    (found,) = of_300b["fp8"].fits
    assert found.spread == Spread(8, experts_whole=True)
    assert found.stages == Spread(stages=5)  # 280.6 GiB on 69 each


@pytest.mark.parametrize(("form", "gib"), [(WINT2, 87.4), (CONTAINER, 146.8), (AT_LOAD_8, 280.7)])
def test_weights_of_the_300b(form: str, gib: float, of_300b: dict[str, Row]) -> None:
    assert of_300b[form].weight_bytes / GIB == pytest.approx(gib, rel=0.005)


@pytest.mark.parametrize("model", ["vl-424b", "vl-28b"])
def test_what_a_program_does_not_load_is_no_row(model: str, geometry: Callable[[str], Checkpoint]) -> None:
    found = estimate(geometry(model))
    assert not {row.form for row in found.rows} & {CONTAINER, WINT2}
    assert "no loader for a WINT2 or WINT4 VL checkpoint" in found.refused[WINT2]


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_kv_cache_of_the_300b_by_hand(of_300b: dict[str, Row]) -> None:
    token = 2 * 54 * 8 * 128 * 2  # k and v, layers, kv heads, head_dim, bytes of bf16
    assert token == 221184
    assert {row.kv_bytes_per_token for row in of_300b.values()} == {token}
    usable = 0.9 * 80 * GIB - 3 * GIB  # 69 GiB
    # 2 GPUs have 4 kv heads each: 32768 tokens take 3.375 GiB, and 7 times that goes into 69 - 43.7
    (found,) = of_300b[WINT2].fits
    assert found.kv_bytes_per_gpu == token // 2 * 32768 == 3.375 * GIB
    assert found.sequences == int((usable - found.weight_bytes_per_gpu) // (3.375 * GIB)) == 7
    assert found.context == min(131072, int((usable - found.weight_bytes_per_gpu) // (token // 2)))
    assert Limits().usable(gpus.find("80GiB")) == usable


@pytest.mark.parametrize(("dtype", "nbytes"), [("bf16", 18432), ("fp8", 9216), ("int8", 9216), ("int4", 4608)])
def test_kv_cache_of_the_0_3b_by_hand(dtype: str, nbytes: int, geometry: Callable[[str], Checkpoint]) -> None:
    """2 x 18 layers x 2 kv heads x 128."""
    assert rows(geometry("0.3b"), Limits(kv_dtype=dtype))[BF16].kv_bytes_per_token == nbytes


def test_weights_of_a_small_model_by_hand() -> None:
    """3 layers, hidden 64; q 128, k and v 64, FFN 128, a vocabulary of 256 and a tied head that is stored."""
    row = rows(open_source(GOLDEN / "dense/pt"))[BF16]
    linears = 3 * (64 * (128 + 64 + 64) + 128 * 64 + 3 * 128 * 64)
    norms = (3 * 2 + 1) * 64
    assert row.weight_bytes == row.disk_bytes == 2 * (linears + norms + 2 * 256 * 64)
    assert (row.fits[0].gpus, row.fits[0].weight_bytes_per_gpu, row.fits[0].sequences) == (1, row.weight_bytes, 32)
    assert row.tp_sizes == (1, 2, 4)  # 4 heads


def test_the_mtp_block_is_not_counted(geometry: Callable[[str], Checkpoint], of_300b: dict[str, Row]) -> None:
    source = geometry("300b")
    mtp = sum(ref.spec.nbytes for ref in source.refs.values() if ".mtp_" in ref.name)
    assert mtp > 10**9
    assert of_300b[BF16].weight_bytes == source.nbytes - mtp


def test_sizes_that_widths_allow(of_300b: dict[str, Row]) -> None:
    """Experts of 3584 = 28 x 128 = 56 x 64: 4 ranks for groups of 128, 8 for FastDeploy's 64."""
    assert of_300b[BF16].tp_sizes == (1, 2, 4, 8, 16, 32, 64)  # 64 heads
    assert of_300b[AT_LOAD_8].tp_sizes == of_300b[CONTAINER].tp_sizes == (1, 2, 4, 8)
    assert of_300b[WINT4].tp_sizes == of_300b["fp8"].tp_sizes == of_300b[WINT2].tp_sizes == (1, 2, 4)


def test_a_bound_on_speed_by_hand(geometry: Callable[[str], Checkpoint]) -> None:
    """0.3B, tied: a token reads everything once, the stored head being the embeddings; an H100 reads 3350 GB/s."""
    source = geometry("0.3b")
    row = rows(source, gpu="H100")[BF16]
    assert row.fits[0].tokens_per_second == pytest.approx(3350e9 / row.weight_bytes, rel=1e-3)
    assert fit(source, BF16, gpu="20GiB").tokens_per_second == 0  # of no GPU that is known


def test_a_token_reads_8_of_64_experts(of_21b: dict[str, Row], geometry: Callable[[str], Checkpoint]) -> None:
    """make_geometry.py says moe_k = 8 for models without shared experts, 6 for others."""
    top_k = geometry("21b").config["moe_k"]
    experts = 27 * 64 * 3 * 2560 * 1536 * 2
    read = of_21b[BF16].weight_bytes - experts * (1 - top_k / 64)
    assert of_21b[BF16].fits[0].tokens_per_second == pytest.approx(3350e9 / read, rel=1e-3)


@pytest.mark.parametrize(("layers", "stages", "sizes"), [(54, 4, [13, 14, 14, 13]), (28, 3, [9, 10, 9]), (3, 3, [1, 1, 1])])
def test_layers_of_stages_as_vllm_deals_them(layers: int, stages: int, sizes: list[int]) -> None:
    assert held.stage_sizes(layers, stages) == sizes


def test_stages_by_hand() -> None:
    """Two layers of 10 shared bytes and 4 experts of 1, embeddings of 100, tied: the last GPUs need those too."""
    layer = [held.Item(f"model.layers.{n}.x", role, size) for n in (0, 1) for role, size in (("attention", 10), ("experts", 4))]
    found = held.Held.of([*layer, held.Item("e", "embeddings", 100), held.Item("n", "norms", 1)], 2)
    assert (found.total, found.tied) == (129, True)
    assert found.stages(Spread(), 4) == [(129, 2)]
    assert found.stages(Spread(stages=2), 4) == [(114, 1), (115, 1)]
    assert found.stages(Spread(2), 4) == [((2 * 14 + 100) / 2 + 1, 2)]
    assert found.stages(Spread(8, experts_whole=True), 4) == [((2 * 10 + 100) / 8 + 2 * 1 + 1, 2)]  # nobody has less than one


def test_hours_are_the_codecs_rates_and_the_bytes(of_300b: dict[str, Row]) -> None:
    """Of one core; nothing is made of what a program does itself, and a codec that nobody has timed has no hours."""
    assert {row.form for row in of_300b.values() if row.core_hours is None} == {"--quantization fp8", AT_LOAD_8, AT_LOAD_4}
    kept, coded = of_300b[BF16].core_hours, of_300b["fp8"].core_hours
    assert kept is not None
    assert coded is not None
    linears = 54 * 8192 * 128 * (64 + 2 * 8 + 64) + 3 * 3 * 8192 * 28672 + 51 * 64 * 3 * 8192 * 3584
    assert (coded - kept) * 3600 == pytest.approx(linears / (Float8Block().rate * 1e6), rel=1e-6)
    untimed: Any = SimpleNamespace(codec=SimpleNamespace(rate=0.0), spec=TensorSpec((8, 8), "BF16"))
    assert effort.core_hours([untimed], [1]) is None


# --- options ---------------------------------------------------------------------------------------------------------


def test_every_option_pulls_its_way(geometry: Callable[[str], Checkpoint]) -> None:
    """18432 bytes of KV cache per token: a sequence takes .5625 GiB of the 4.2 - .7 GiB that 8 GiB leave."""
    source, rule = geometry("0.3b"), Limits()

    def sequences(gpu: str = "8GiB", **changes: Any) -> int:
        return fit(source, BF16, replace(rule, **changes), gpu).sequences

    assert sequences() == 6
    assert sequences("9GiB") > 6 > sequences("7GiB")
    assert sequences(utilization=0.99) > 6 > sequences(utilization=0.8)
    assert sequences(reserve=0) > 6 > sequences(reserve=4 * GIB)
    assert sequences(max_model_len=16384) > 6 > sequences(max_model_len=65536)
    assert sequences(kv_dtype="int4") > sequences(kv_dtype="fp8") == sequences(kv_dtype="int8") > 6
    assert sequences(max_num_seqs=3) == 3


def test_less_memory_takes_more_gpus(geometry: Callable[[str], Checkpoint], of_21b: dict[str, Row]) -> None:
    found = [fit(geometry("21b"), "convert --to paddle", gpu=f"{n}GiB") for n in (40, 8)]
    assert [of_21b["convert --to paddle"].fits[0].gpus, *(f.gpus for f in found)] == [1, 2, 0]  # 4 kv heads: never 8
    assert found[1].why == "4 GPUs (TP 4) need 10.2 GiB and 0.4 of KV cache each, 4.2 usable"


def test_so_many_gpus_have_room_for(geometry: Callable[[str], Checkpoint]) -> None:
    """The question turned around; 3 GPUs are stages, and FastDeploy has none."""
    source = geometry("21b")
    one, three = (fit(source, BF16, gpu="48", count=n) for n in (1, 3))
    assert (one.gpus, one.spread, one.sequences) == (0, None, 0)
    assert one.why.startswith("one GPU needs 40.7 GiB")
    assert three.spread == Spread(stages=3)
    assert (three.context, three.sequences) == (131072, 32)
    assert fit(source, CONTAINER, gpu="48", count=3).why == "its heads and widths cannot be shared by 3 GPUs"
    assert fit(source, BF16, gpu="24", count=2).context == 0
    little = fit(source, BF16, gpu="20", count=3)
    assert 0 < little.context < 131072
    assert fit(source, BF16, Limits(max_model_len=little.context, max_num_seqs=1), "20", count=3).sequences == 1
    assert fit(source, BF16, Limits(max_model_len=little.context + 1, max_num_seqs=1), "20", count=3).sequences == 0


def test_more_layers_in_wint4_are_more_bytes(geometry: Callable[[str], Checkpoint], of_21b: dict[str, Row]) -> None:
    few, many = (rows(geometry("21b"), wint4_layers=n)[f"wint2 --wint4-layers {n}"].weight_bytes for n in (0, 27))
    assert few < of_21b[WINT2].weight_bytes < many < of_21b[CONTAINER].weight_bytes
    assert "leaves no experts for 2 bits" in estimate(geometry("21b"), wint4_layers=28).refused["wint2 --wint4-layers 28"]


def test_a_recipe_is_a_row_of_its_own(geometry: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(INT8_EXPERTS)
    found = rows(geometry("21b"), recipe=recipe.read(tmp_path / "mine.toml"))
    own = found["quantize --recipe mine.toml"]
    assert list(found)[-1] == own.form
    assert found[AT_LOAD_8].weight_bytes < own.weight_bytes < found[BF16].weight_bytes
    experts, saved = 27 * 64 * 3, found[BF16].weight_bytes - own.weight_bytes
    scales = 2 * 27 * 64 * (1536 + 1536 + 2560)  # a bf16 scale per output of gate, up and down
    assert saved == experts * 2560 * 1536 - scales - experts * 16  # and its shape, of two int64


@pytest.mark.parametrize(
    ("text", "gib", "bandwidth"),
    [("80", 80, 3350e9), ("80GiB", 80, 3350e9), ("h100", 80, 3350e9), ("RTX 4090", 24, 1008e9), ("rtx4090", 24, 1008e9),
     ("rtx-4090", 24, 1008e9), ("H200", 141, 4800e9), ("40GiB", 40, 0)],
)  # fmt: skip
def test_gpus_by_name_and_by_size(text: str, gib: int, bandwidth: float) -> None:
    found = gpus.find(text)
    assert (found.memory, found.bandwidth) == (gib * GIB, bandwidth)


# --- rows are what can be made ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["dense", "moe", "moe_mtp", "vl"])
def test_the_command_of_every_row_makes_it(family: str, command: Command, tmp_path: Path) -> None:
    """Its dry run says so many bytes; and none of the forms that are refused can be made."""
    source = byte_tokenizer(copy(GOLDEN / family / "paddle", tmp_path / "source"))  # some forms want a text
    found = estimate(open_source(source))
    made = [row for row in found.rows if row.command]
    assert len(made) >= 6
    for row in made:
        name, *words = shlex.split(row.command.replace("SRC", str(source)).replace("OUT", str(tmp_path / "out")))
        assert name == "ernie-quant"
        code, out, err = command(*words, "--dry-run", "--json")
        assert (code, err) == (0, ""), row.command
        planned = json.loads(out)
        assert planned["bytes_out"] == row.disk_bytes, row.command
        assert planned["tp_sizes"] == list(row.tp_sizes), row.command
    for form in found.refused:
        if not form.startswith("--"):  # what a program does itself has no command
            name, *options = form.split()
            assert command(name, source, tmp_path / "out", *options, "--dry-run")[0] == 1, form


@pytest.mark.parametrize("family", ["moe", "dense"])
def test_a_quantized_checkpoint_is_planned_as_it_is(family: str, command: Command, tmp_path: Path) -> None:
    source, out = GOLDEN / family / "paddle", tmp_path / "out"
    assert command("wint4", source, out, "--group-size", 32)[0] == 0
    (row,) = estimate(open_source(out)).rows
    made = rows(open_source(source))["wint4 --group-size 32"]
    assert row.form.startswith("as it is (quantized for vllm (compressed-tensors")
    assert (row.weight_bytes, row.tp_sizes, row.fits[0].gpus) == (made.weight_bytes, made.tp_sizes, made.fits[0].gpus)
    assert row.command == ""


def test_ranks_are_planned_as_they_are_and_resharded(
    geometry: Callable[[str], Checkpoint], command: Command, tmp_path: Path
) -> None:  # fmt: skip
    from helpers.models import random_model

    source = random_model(
        tmp_path / "src", "paddle", "moe", hidden_size=256, head_dim=64, intermediate_size=256, moe_intermediate_size=256,
        moe_num_experts=4,
    )  # fmt: skip
    assert command("wint4", source, tmp_path / "out", "--runtime", "fastdeploy", "--tp", 2)[0] == 0
    as_it_is, resharded = estimate(open_source(tmp_path / "out")).rows
    assert (as_it_is.tp_sizes, as_it_is.fits[0].gpus) == ((2,), 2)
    assert (resharded.command, resharded.tp_sizes) == ("ernie-quant reshard SRC OUT --tp N", (1, 4))
    assert as_it_is.weight_bytes == pytest.approx(rows(open_source(source))[CONTAINER].weight_bytes, rel=0.01)


def test_a_gguf_file_is_planned_as_it_is(command: Command, tmp_path: Path) -> None:
    assert command("gguf", GOLDEN / "moe/paddle", tmp_path / "out", "--type", "Q8_0")[0] == 0
    (row,) = estimate(open_source(tmp_path / "out")).rows
    assert (row.program, row.tp_sizes, row.fits[0].gpus) == ("llama.cpp", (), 1)


def test_a_strangers_checkpoint_is_planned_by_its_bytes(tmp_path: Path, command: Command) -> None:
    """GPTQ's names, which no command here reads."""
    import torch
    from safetensors.torch import load_file, save_file

    assert command("wint4", GOLDEN / "dense/paddle", tmp_path / "out", "--group-size", 32)[0] == 0
    config = json.loads((tmp_path / "out/config.json").read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "out/model.safetensors")
    renamed = {name.replace("weight_packed", "qweight").replace("weight_scale", "scales"): v for name, v in tensors.items()}
    save_file({name: v.contiguous() for name, v in renamed.items()}, foreign / "model.safetensors")
    (row,) = estimate(open_source(foreign)).rows
    assert row.weight_bytes == sum(v.numel() * v.element_size() for v in renamed.values())
    assert row.form.startswith("as it is (quantized (gptq)")
    assert isinstance(torch.zeros(1), torch.Tensor)


# --- the command -----------------------------------------------------------------------------------------------------


def test_plan_prints_the_rule_with_its_constants(geometry: Callable[[str], Checkpoint], command: Command) -> None:
    code, out, err = command("plan", geometry("21b").folder, "--reserve", "4GiB", "--max-model-len", 1000, "--max-num-seqs", 5)
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    assert "GPUs of 80GiB: 68.0 GiB usable (0.9 of the memory less 4.0 GiB)" in text
    assert "one sequence of 1000 tokens, at most 5 at once" in text
    assert "KV cache (bf16): 57344 bytes per token" in text  # 2 x 28 layers x 4 kv heads x 128 x 2 bytes
    assert "a bound, not a promise" in text
    lines = {line[1:42].rstrip(): line for line in out.splitlines() if line.startswith(" ")}
    assert {BF16, "fp8", AT_LOAD_8, WINT4, CONTAINER, WINT2, "gguf --type Q4_K_M", "wint4 --experts-only"} <= lines.keys()
    assert lines[BF16].split()[3:7] == ["40.7", "1", "40.7", "5"]


@pytest.mark.parametrize("model", ["300b", "vl-28b", "0.3b"])
@pytest.mark.parametrize(
    "options",
    [(), ("--gpu-memory", "24,32,48,80,96,141,192,288"), ("--gpu-memory", "48", "--gpus", 8), ("--gpu-memory", "rtx4090,H100")],
    ids=str,
)
def test_it_fits_80_columns(
    model: str, options: tuple[object, ...], geometry: Callable[[str], Checkpoint], command: Command
) -> None:  # fmt: skip
    code, out, _ = command("plan", geometry(model).folder, *options)
    assert code == 0
    assert [line for line in out.splitlines() if len(line) > 80] == []


def test_every_dash_says_why(geometry: Callable[[str], Checkpoint], command: Command) -> None:
    code, out, _ = command("plan", geometry("300b").folder, "--gpu-memory", "24,80")
    assert code == 0
    table, _, why = out.partition("KV cache")
    without = [line[1:42].rstrip() for line in table.splitlines() if line[42:].split()[1:2] == ["-"]]
    assert {BF16, "fp8 --experts-only", AT_LOAD_8} <= set(without)
    text = " ".join(why.split())
    assert all(f"{form}: " in text or f"{form}, " in text for form in without)
    assert "16 GPUs (TP 16) need 35.0 GiB and 0.8 of KV cache each; usable: 18.6 of 24GiB." in text


def test_a_format_that_fits_nowhere_has_no_number(geometry: Callable[[str], Checkpoint], command: Command) -> None:
    code, out, _ = command("plan", geometry("0.3b").folder, "--gpu-memory", "3GiB")
    assert code == 0
    assert next(line for line in out.splitlines() if line.startswith(f" {BF16}")).split()[3:] == ["0.7", "-", "0.0"]
    assert " of KV cache each; usable: -0.3 of 3GiB." in " ".join(out.split())  # and why


def test_plan_gives_one_json_object(geometry: Callable[[str], Checkpoint], command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(INT8_EXPERTS)
    code, out, err = command(
        "plan", geometry("21b").folder, "--json", "--recipe", tmp_path / "mine.toml", "--wint4-layers", 3, "--kv-dtype", "fp8",
        "--gpu-memory", "80GiB,H200",
    )  # fmt: skip
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["limits"] == {
        "utilization": 0.9, "reserve": 3 * GIB, "max_model_len": 32768, "max_num_seqs": 32, "kv_dtype": "fp8",
    }  # fmt: skip
    assert [gpu["name"] for gpu in found["gpus"]] == ["80GiB", "H200"]
    names = [row["form"] for row in found["formats"]]
    assert names[0] == BF16
    assert {"wint2 --wint4-layers 3", "quantize --recipe mine.toml"} <= set(names)
    assert {row["kv_bytes_per_token"] for row in found["formats"]} == {28672}
    assert all(len(row["fits"]) == 2 for row in found["formats"])
    assert found["formats"][0]["fits"][0]["spread"] == {"tensor": 1, "stages": 1, "experts_whole": False}


def test_a_dense_model_has_no_rows_for_experts(command: Command) -> None:
    """Not even FastDeploy's WINT4 container, which wint4 refuses to write for it."""
    code, out, _ = command("plan", GOLDEN / "dense/pt", "--json")
    assert code == 0
    found = json.loads(out)
    assert not any("experts" in row["form"] or row["form"] in (CONTAINER, WINT2) for row in found["formats"])
    assert "has no experts" in found["refused"][CONTAINER]


def test_a_broken_source_is_one_and_no_table(command: Command, tmp_path: Path) -> None:
    assert command("plan", "/nowhere") == (1, "", "error: /nowhere: there is no such folder\n")
    broken = copy(GOLDEN / "dense/pt", tmp_path / "broken")
    for file in broken.glob("*.safetensors"):
        os.truncate(file, 20)
    code, out, err = command("plan", broken)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("error: model")


def test_every_problem_of_a_source_is_named(tmp_path: Path) -> None:
    broken = copy(GOLDEN / "moe/paddle", tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"moe_num_experts": 9}))
    with pytest.raises(PlanError) as error:
        estimate(open_source(broken))
    assert "ernie.layers.1.mlp.experts.8.down_proj.weight: is missing" in error.value.problems


@pytest.mark.parametrize(
    "arguments",
    [
        ("--utilization", "2"),
        ("--gpu-memory", "much"),
        ("--max-model-len", "0"),
        ("--kv-dtype", "fp4"),
        ("--gpu-memory", "24,80", "--gpus", "2"),
        ("--gpu-memory", "80,"),
        ("--gpus", "0"),
    ],
    ids=" ".join,
)
def test_two_for_usage(arguments: tuple[str, ...], command: Command) -> None:
    assert command("plan", GOLDEN / "dense/pt", *arguments)[0] == 2


def test_the_table_of_the_document_is_what_the_command_prints(geometry: Callable[[str], Checkpoint], command: Command) -> None:
    text = (Path(__file__).parents[1] / "docs/plan.md").read_text()
    ((line, shown),) = re.findall(r"```\n(ernie-quant plan [^\n]*)\n```\n\n```\n(.*?)\n```", text, re.DOTALL)
    words = shlex.split(line)
    code, out, _ = command(*words[1:2], geometry("300b").folder, *words[3:])
    assert (code, out.partition("\nKV cache")[0].rstrip()) == (0, shown)
    names = re.findall(r"with commas: (.*?), with memory", " ".join(text.split()))[0].split(", ")
    assert names == list(gpus.KNOWN)
