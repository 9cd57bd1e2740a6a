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
from ernie_quant.planning import built_in
from ernie_quant.planning.calibration import Calibration
from ernie_quant.planning.capacity import estimate
from ernie_quant.planning.make import make_plan
from ernie_quant.planning.offers import KEEP_UNFIT, all_offers
from ernie_quant.planning.recipe import KEEP_ALL, Recipe
from ernie_quant.planning.reshard import check_size, make_reshard_plan
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
    """Every row of `plan` that a command makes has the sizes, the bytes and the GPUs of that command's plan."""
    source = opened(model)
    made = {offer.words: offer for offer in all_offers(7) if not offer.at_load}
    found = estimate(source)
    compared = 0
    for row in found.rows:
        if row.at_load:
            continue
        words = row.form.removesuffix(KEEP_UNFIT).strip()
        rules = replace(made[words].recipe, keep_unfit=row.form != words)
        text = Calibration("auto", {"a.txt": "0" * 64}) if "--calibration" in words else None
        plan = make_plan(source, runtime=made[words].runtime, recipe=rules, calibration=text)
        assert row.tp_sizes == plan.tp_sizes, row.form
        assert row.disk_bytes == plan.nbytes, row.form
        assert plan.gpus.get("80GiB") == row.fits[0].spread, row.form
        compared += 1
    for words in found.refused:
        if words in made:
            with pytest.raises(PlanError):
                make_plan(source, runtime=made[words].runtime, recipe=made[words].recipe)
            compared += 1
    assert compared == len(made)


@pytest.mark.parametrize("model", [*RELEASES, *FAMILIES])
@pytest.mark.parametrize("group", [128, 64, 32, "channel"])
@pytest.mark.parametrize("name", ["wint4", "wint8"])
def test_every_group_size_agrees(name: str, group: int | str, model: str, opened: Callable[[str], Checkpoint]) -> None:
    rules = built_in.make(name, group_size=group, keep_unfit=True).recipe
    found = estimate(opened(model), recipe=rules)
    plan = make_plan(opened(model), runtime="vllm", recipe=rules)
    row = found.rows[-1]
    if not row.form.startswith("quantize"):  # nothing would be quantized
        assert all(step.kept for step in plan.steps)
        return
    assert (row.tp_sizes, row.disk_bytes, row.fits[0].spread) == (plan.tp_sizes, plan.nbytes, plan.gpus.get("80GiB"))


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
