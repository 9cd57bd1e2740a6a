"""`plan`, `--dry-run`, config.json and `reshard` say the same tensor-parallel sizes: for every architecture, form and size."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from helpers.models import GOLDEN, random_model

from ernie_quant.checkpoint import Checkpoint
from ernie_quant.errors import PlanError
from ernie_quant.plan import built_in
from ernie_quant.plan.capacity import Limits, estimate, formats
from ernie_quant.plan.make import make_plan
from ernie_quant.plan.recipe import KEEP_ALL, Recipe
from ernie_quant.plan.reshard import check_size, make_reshard_plan
from ernie_quant.run.whole import run_plan
from ernie_quant.runtimes import _sharing
from ernie_quant.sources import open_source
from ernie_quant.weights import layouts

MAKE_GEOMETRY = Path(__file__).parents[2] / "benchmarks/make_geometry.py"
RELEASES = {"0.3b": 2, "21b": 3, "300b": 4, "vl-28b": 3}  # and so many of their layers: the widths are what matters
FAMILIES = ("dense", "moe", "moe_mtp", "vl")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """Sparse files with the true geometry of a release, or a golden model; headers are read once."""
    root = tmp_path_factory.mktemp("geometry")

    @cache
    def checkpoint(model: str) -> Checkpoint:
        if model in FAMILIES:
            return open_source(GOLDEN / model / "paddle")
        layers = ["--layers", str(RELEASES[model])]
        subprocess.run([sys.executable, MAKE_GEOMETRY, model, root / model, *layers], check=True, capture_output=True)
        return open_source(root / model)

    return checkpoint


@pytest.mark.parametrize("model", [*RELEASES, *FAMILIES])
def test_plan_and_dry_run_agree(model: str, opened: Callable[[str], Checkpoint]) -> None:
    """Every row of `plan` that a command can make has the sizes of that command's plan, and takes as many GPUs."""
    source = opened(model)
    written = {form.name: form for form in formats(7)}
    compared = 0
    for row in estimate(source, Limits(), 7):
        form = written[row.format]
        if row.format in ("wint8", "w4a8"):  # FastDeploy makes the first itself; nothing writes the second yet
            continue
        rules = replace(form.recipe, keep_unfit=True)
        try:
            plan = make_plan(source, runtime=form.runtime, recipe=rules, unsupported=True)
        except PlanError:  # its widths do not fit the container, and `plan` says that no size does, or counts it as kept
            assert form.runtime == "fastdeploy"
            continue
        assert row.tp_sizes == plan.tp_sizes, row.format
        assert plan.gpus.get("80GiB", 0) == row.gpus, row.format
        compared += 1
    assert compared >= 3


@pytest.mark.parametrize("model", [*RELEASES, *FAMILIES])
@pytest.mark.parametrize("group", [128, 64, 32, "channel"])
@pytest.mark.parametrize("name", ["wint4", "wint8"])
def test_every_group_size_agrees(name: str, group: int | str, model: str, opened: Callable[[str], Checkpoint]) -> None:
    rules = built_in.make(name, group_size=group, keep_unfit=True).recipe
    row = estimate(opened(model), Limits(), recipe=rules)[-1]
    plan = make_plan(opened(model), runtime="vllm", recipe=rules)
    assert (row.tp_sizes, row.gpus) == (plan.tp_sizes, plan.gpus.get("80GiB", 0))


def test_sizes_by_hand(opened: Callable[[str], Checkpoint]) -> None:
    """21B: 20 heads and 4 kv heads allow 1, 2, 4. 300B: 64 heads and 8 kv heads, of which more ranks have copies; experts of
    3584 inputs are 28 groups of 128, so 4 ranks, but 56 groups of 64, so 8."""
    sizes = {
        (model, group): make_plan(opened(model), runtime="vllm", recipe=built_in.make("wint4", group_size=group).recipe).tp_sizes
        for model in ("21b", "300b")
        for group in (128, 64)
    }
    assert sizes == {
        ("21b", 128): (1, 2, 4), ("21b", 64): (1, 2, 4), ("300b", 128): (1, 2, 4), ("300b", 64): (1, 2, 4, 8)
    }  # fmt: skip
    assert make_plan(opened("300b"), runtime="vllm", recipe=KEEP_ALL).tp_sizes == (1, 2, 4, 8, 16, 32, 64)


WIDTHS = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "moe_num_shared_experts": 0}
WIDTHS |= {"num_hidden_layers": 2, "moe_layer_end_index": 1, "moe_num_experts": 2}


@pytest.mark.parametrize(
    ("expert_width", "dense_width", "vocabulary", "sizes"),
    [
        (512, 512, 64, {"wint2": (1, 2, 4), "wint4": (1, 2, 4, 8)}),
        (256, 512, 64, {"wint2": (1, 2), "wint4": (1, 2, 4)}),  # 256 inputs of down_proj are 2 x 128, or 4 x 64
        (512, 192, 64, {"wint2": (1,), "wint4": (1,)}),  # 192 is 3 x 64
        (512, 512, 66, {"wint2": (1, 2), "wint4": (1, 2)}),  # tokens
    ],
)
def test_reshard_takes_the_sizes_that_the_plan_names_and_no_others(
    expert_width: int, dense_width: int, vocabulary: int, sizes: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    widths = {"moe_intermediate_size": expert_width, "intermediate_size": dense_width, "vocab_size": vocabulary}
    source = open_source(random_model(tmp_path / "src", layouts.PADDLE, **WIDTHS | widths))
    for name, rules in (("wint2", container(0)), ("wint4", container(None))):
        plan = make_plan(source, runtime="fastdeploy", recipe=rules)
        assert plan.tp_sizes == sizes[name], name
        run_plan(plan, tmp_path / name)
        stored = open_source(tmp_path / name)
        for tp in _sharing.TP_SIZES:
            refused = (is_refused(make_reshard_plan, stored, tp), is_refused(check_size, plan, tp))
            assert refused == (tp not in plan.tp_sizes,) * 2, (name, tp)


def container(wint4_layers: int | None) -> Recipe:
    return built_in.fastdeploy_container("test", wint4_layers, effort=1)


def is_refused(make: Callable[..., object], what: object, tp: int) -> bool:
    try:
        make(what, tp)
    except PlanError:
        return True
    return False
