"""How many GPUs: what is published, what can be computed by hand, and which way every option pulls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.models import GOLDEN, copy

from ernie_quant.checkpoint import Checkpoint
from ernie_quant.errors import PlanError
from ernie_quant.plan import built_in, recipe
from ernie_quant.plan.capacity import GGUF, GIB, Capacity, Limits, estimate
from ernie_quant.plan.make import make_plan
from ernie_quant.sources import open_source

MAKE_GEOMETRY = Path(__file__).parents[1] / "benchmarks/make_geometry.py"
Command = Callable[..., tuple[int, str, str]]
CONTAINER, GROUPED, WINT2 = "wint4", "wint4, group 128", "wint2 from layer 7"
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


def rows(source: Checkpoint, limits: Limits = Limits(), **options: Any) -> dict[str, Capacity]:  # noqa: B008 - frozen
    return {row.format: row for row in estimate(source, limits, **options)}


# --- what is published -----------------------------------------------------------------------------------------------


OF_GGUF = [f"GGUF {kind}" for kind in GGUF]


@pytest.fixture(scope="module")
def of_300b(geometry: Callable[[str], Checkpoint]) -> dict[str, Capacity]:
    return rows(geometry("300b"))


def test_the_300b_takes_8_gpus_in_wint8_4_in_wint4_and_2_in_wint2(of_300b: dict[str, Capacity]) -> None:
    assert {name: row.gpus for name, row in of_300b.items()} == {
        "bf16": 16, "fp8": 0, "wint8": 8, GROUPED: 4, CONTAINER: 4, "w4a8": 4, WINT2: 2,
        "GGUF Q8_0": 5, "GGUF Q6_K": 4, "GGUF Q5_K_M": 3, "GGUF Q4_K_M": 3, "GGUF IQ4_XS": 3, "GGUF Q3_K_M": 3, "GGUF Q2_K": 2,
    }  # fmt: skip


def test_the_300b_in_wint2_takes_one_gpu_of_141_gb(geometry: Callable[[str], Checkpoint]) -> None:
    found = rows(geometry("300b"), Limits(gpu_memory=141 * 10**9))
    assert (found[WINT2].gpus, found[CONTAINER].gpus, found["wint8"].gpus) == (1, 2, 4)
    assert found[WINT2].weight_bytes_per_gpu == found[WINT2].weight_bytes


@pytest.mark.parametrize(("name", "gib"), [(WINT2, 87.4), (CONTAINER, 146.8), ("wint8", 280.7)])
def test_weights_of_the_300b(name: str, gib: float, of_300b: dict[str, Capacity]) -> None:
    assert of_300b[name].weight_bytes / GIB == pytest.approx(gib, rel=0.005)


@pytest.fixture(scope="module")
def of_21b(geometry: Callable[[str], Checkpoint]) -> dict[str, Capacity]:
    return rows(geometry("21b"))


@pytest.mark.parametrize(("model", "gpus"), [("vl-424b", 16), ("vl-28b", 1), ("0.3b", 1)])
def test_gpus_of_80_gib_in_bf16(model: str, gpus: int, geometry: Callable[[str], Checkpoint]) -> None:
    found = rows(geometry(model))
    assert found["bf16"].gpus == gpus
    assert not found.keys() & {"w4a8", WINT2}  # FastDeploy has them for text models with experts only


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_kv_cache_of_the_300b_by_hand(of_300b: dict[str, Capacity]) -> None:
    token = 2 * 54 * 8 * 128 * 2  # k and v, layers, kv heads, head_dim, bytes of bf16
    assert token == 221184
    assert {row.kv_bytes_per_token for row in of_300b.values()} == {token}
    usable = 0.9 * 80 * GIB - 3 * GIB  # 69 GiB
    # 2 GPUs have 4 kv heads each: 32768 tokens take 3.375 GiB, and 7 times that goes into 69 - 43.7
    row = of_300b[WINT2]
    assert token // 2 * 32768 == 3.375 * GIB
    assert row.sequences == int((usable - row.weight_bytes_per_gpu) // (3.375 * GIB)) == 7
    assert Limits().usable == usable


@pytest.mark.parametrize(("dtype", "nbytes"), [("bf16", 18432), ("fp8", 9216), ("int8", 9216), ("int4", 4608)])
def test_kv_cache_of_the_0_3b_by_hand(dtype: str, nbytes: int, geometry: Callable[[str], Checkpoint]) -> None:
    """2 x 18 layers x 2 kv heads x 128."""
    assert rows(geometry("0.3b"), Limits(kv_dtype=dtype))["bf16"].kv_bytes_per_token == nbytes


def test_weights_of_a_small_model_by_hand() -> None:
    """3 layers, hidden 64; q 128, k and v 64, FFN 128, a vocabulary of 256 and a tied head that is stored."""
    (row, *_) = estimate(open_source(GOLDEN / "dense/pt"), Limits())
    linears = 3 * (64 * (128 + 64 + 64) + 128 * 64 + 3 * 128 * 64)
    norms = (3 * 2 + 1) * 64
    assert row.format == "bf16"
    assert row.weight_bytes == 2 * (linears + norms + 2 * 256 * 64)
    assert (row.gpus, row.weight_bytes_per_gpu, row.sequences) == (1, row.weight_bytes, 32)
    assert row.tp_sizes == (1, 2, 4)  # 4 heads


def test_the_mtp_block_is_not_counted(geometry: Callable[[str], Checkpoint], of_300b: dict[str, Capacity]) -> None:
    source = geometry("300b")
    mtp = sum(ref.spec.nbytes for ref in source.refs.values() if ".mtp_" in ref.name)
    assert mtp > 10**9
    assert of_300b["bf16"].weight_bytes == source.nbytes - mtp


def test_sizes_that_widths_allow(of_300b: dict[str, Capacity]) -> None:
    """Experts of 3584 = 28 x 128 = 56 x 64: 4 ranks for groups of 128, 8 for FastDeploy's 64."""
    assert of_300b["bf16"].tp_sizes == (1, 2, 4, 8, 16, 32, 64)  # 64 heads
    assert of_300b["wint8"].tp_sizes == of_300b[CONTAINER].tp_sizes == (1, 2, 4, 8)
    assert of_300b[GROUPED].tp_sizes == of_300b["fp8"].tp_sizes == of_300b[WINT2].tp_sizes == (1, 2, 4)


@pytest.mark.parametrize(("layers", "name"), [(7, WINT2), (None, CONTAINER)])
def test_sizes_agree_with_those_of_a_run(
    layers: int | None, name: str, geometry: Callable[[str], Checkpoint], of_21b: dict[str, Capacity]
) -> None:
    plan = make_plan(geometry("21b"), runtime="fastdeploy", recipe=built_in.fastdeploy_container("wint2", layers))
    assert of_21b[name].tp_sizes == plan.tp_sizes == (1, 2, 4)


# --- options ---------------------------------------------------------------------------------------------------------


def test_every_option_pulls_its_way(geometry: Callable[[str], Checkpoint]) -> None:
    """18432 bytes of KV cache per token: a sequence takes .5625 GiB of the 4.2 - .7 GiB that 8 GiB leave."""
    source, rule = geometry("0.3b"), Limits(gpu_memory=8 * GIB)

    def sequences(**changes: Any) -> int:
        return rows(source, replace(rule, **changes))["bf16"].sequences

    assert sequences() == 6
    assert sequences(gpu_memory=9 * GIB) > 6 > sequences(gpu_memory=7 * GIB)
    assert sequences(utilization=0.99) > 6 > sequences(utilization=0.8)
    assert sequences(reserve=0) > 6 > sequences(reserve=4 * GIB)
    assert sequences(max_model_len=16384) > 6 > sequences(max_model_len=65536)
    assert sequences(kv_dtype="int4") > sequences(kv_dtype="fp8") == sequences(kv_dtype="int8") > 6
    assert sequences(max_num_seqs=3) == 3


def test_less_memory_takes_more_gpus(geometry: Callable[[str], Checkpoint], of_21b: dict[str, Capacity]) -> None:
    found = [rows(geometry("21b"), Limits(gpu_memory=n * GIB))["bf16"].gpus for n in (40, 8)]
    assert [of_21b["bf16"].gpus, *found] == [1, 2, 0]  # 20 heads and 4 kv heads: never 8


def test_more_layers_in_wint4_are_more_bytes(geometry: Callable[[str], Checkpoint], of_21b: dict[str, Capacity]) -> None:
    none, every = (rows(geometry("21b"), wint4_layers=n)[f"wint2 from layer {n}"].weight_bytes for n in (0, 28))
    assert none < of_21b[WINT2].weight_bytes < every
    assert every == of_21b[CONTAINER].weight_bytes


def test_a_recipe_is_a_row_of_its_own(geometry: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(INT8_EXPERTS)
    found = rows(geometry("21b"), recipe=recipe.read(tmp_path / "mine.toml"))
    assert list(found)[-1] == "mine"
    assert found["wint8"].weight_bytes < found["mine"].weight_bytes < found["bf16"].weight_bytes
    assert found["mine"].runtimes == "by recipe"
    experts, saved = 27 * 64 * 3, found["bf16"].weight_bytes - found["mine"].weight_bytes
    scales = 2 * 27 * 64 * (1536 + 1536 + 2560)  # a bf16 scale per output of gate, up and down
    assert saved == experts * 2560 * 1536 - scales


# --- the command -----------------------------------------------------------------------------------------------------


def test_plan_prints_the_rule_with_its_constants(geometry: Callable[[str], Checkpoint], command: Command) -> None:
    code, out, err = command("plan", geometry("21b").folder, "--reserve", "4GiB", "--max-model-len", 1000, "--max-num-seqs", 5)
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    assert "usable per GPU: 0.9 x 80.0 GiB - 4.0 GiB = 68.0 GiB" in text
    assert "at least one sequence of 1000 tokens" in text
    assert "KV cache (bf16): 57344 bytes per token" in text  # 2 x 28 layers x 4 kv heads x 128 x 2 bytes
    assert "at most 5" in text
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert {"bf16", "fp8", "wint8", GROUPED, CONTAINER, "w4a8", WINT2} <= lines.keys()
    assert lines["bf16"].split()[-1] == "5"


def test_a_format_that_fits_nowhere_has_no_number(geometry: Callable[[str], Checkpoint], command: Command) -> None:
    code, out, _ = command("plan", geometry("0.3b").folder, "--gpu-memory", "3GiB")
    assert code == 0
    assert next(line for line in out.splitlines() if line.startswith("bf16")).split()[-3:] == ["-", "-", "0"]


def test_plan_gives_one_json_object(geometry: Callable[[str], Checkpoint], command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(INT8_EXPERTS)
    code, out, err = command(
        "plan", geometry("21b").folder, "--json", "--recipe", tmp_path / "mine.toml", "--wint4-layers", 3, "--kv-dtype", "fp8"
    )
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["rule"] == {
        "gpu_memory": 80 * GIB, "utilization": 0.9, "reserve": 3 * GIB, "max_model_len": 32768, "max_num_seqs": 32,
        "kv_dtype": "fp8",
    }  # fmt: skip
    names = [row["format"] for row in found["formats"]]
    assert names == ["bf16", "fp8", "wint8", GROUPED, CONTAINER, "w4a8", "wint2 from layer 3", *OF_GGUF, "mine"]
    assert {row["kv_bytes_per_token"] for row in found["formats"]} == {28672}


def test_a_dense_model_has_no_rows_for_experts(command: Command) -> None:
    """Not even FastDeploy's WINT4 container, which wint4 refuses to write for it."""
    code, out, _ = command("plan", GOLDEN / "dense/pt", "--json")
    assert code == 0
    assert [row["format"] for row in json.loads(out)["formats"]] == ["bf16", "fp8", "wint8", GROUPED, *OF_GGUF]


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
        estimate(open_source(broken), Limits())
    assert "ernie.layers.1.mlp.experts.8.down_proj.weight: is missing" in error.value.problems


def test_a_quantized_source_is_refused(command: Command, tmp_path: Path) -> None:
    assert command("wint4", GOLDEN / "moe/paddle", tmp_path / "out", "--group-size", 32)[0] == 0
    code, out, err = command("plan", tmp_path / "out")
    assert (code, out) == (1, "")
    assert "is quantized already" in err


@pytest.mark.parametrize(
    "arguments",
    [("--utilization", "2"), ("--gpu-memory", "much"), ("--max-model-len", "0"), ("--kv-dtype", "fp4")],
    ids=" ".join,
)
def test_two_for_usage(arguments: tuple[str, ...], command: Command) -> None:
    assert command("plan", GOLDEN / "dense/pt", *arguments)[0] == 2
