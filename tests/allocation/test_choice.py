"""The solver against all choices that there are, and units against the plans that are made of them."""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import tomllib
from pathlib import Path

import pytest
import scipy.optimize

from ernie_quant.codecs.keep import KEEP
from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.errors import PlanError
from ernie_quant.planning import allocated
from ernie_quant.planning.allocate import allocation, solve
from ernie_quant.planning.make import make_plan
from ernie_quant.planning.recipe import of_rules
from ernie_quant.planning.units import Option, Unit, Units, units_of
from ernie_quant.sources import open_source


def some_units(rng: random.Random, runtime: str, count: int = 5) -> tuple[Units, list[list[float]]]:
    """Units of three options with random bytes and costs; experts of layers 0, 1, …"""
    units, costs = [], []
    codecs = (RoundToNearest(4), RoundToNearest(8), KEEP)
    for layer in range(count):
        sizes = sorted(rng.sample(range(10, 500), 3))
        options = tuple(Option(codec, size) for codec, size in zip(codecs, sizes, strict=True))
        units.append(Unit(f"u{layer}", "experts", (f"model.layers.{layer}.mlp.experts.0.up_proj.weight",), options))
        costs.append([*sorted((rng.random() for _ in range(2)), reverse=True), 0.0])
    return Units(runtime, tuple(units), (), rng.randrange(100), 1000, {}), costs


def best_of_all(units: Units, costs: list[list[float]], budget: int, *, ordered: bool) -> float:
    found = float("inf")
    for chosen in itertools.product(range(3), repeat=len(units.free)):
        if ordered and list(chosen) != sorted(chosen, reverse=True):
            continue
        one = allocation(units, costs, chosen)
        if one.nbytes <= budget:
            found = min(found, one.kl)
    return found


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("runtime", ["vllm", "fastdeploy"])
def test_no_choice_is_better(runtime: str, seed: int) -> None:
    rng = random.Random(seed)
    units, costs = some_units(rng, runtime)
    for budget in (units.least, (2 * units.least + units.most) // 3, (units.least + units.most) // 2, units.most):
        found = solve(units, costs, budget)
        assert found.nbytes <= budget
        assert found.kl == pytest.approx(best_of_all(units, costs, budget, ordered=runtime == "fastdeploy"), rel=1e-3)
        free = solve(units, costs, budget, ordered=False)
        assert free.kl <= found.kl * (1 + 1e-3)


def test_what_the_solver_prints_is_not_on_stdout(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS prints a debugging line in some solves; written at once, or left in the C library's buffer."""
    original = scipy.optimize.milp

    def chatty(*args: object, **options: object) -> object:
        os.write(1, b"at once\n")
        ctypes.CDLL(None).printf(b"later\n")
        return original(*args, **options)

    monkeypatch.setattr(scipy.optimize, "milp", chatty)
    units, costs = some_units(random.Random(0), "vllm")
    solve(units, costs, units.most)
    print("result")
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == "result\n"


def test_less_than_the_least_is_refused() -> None:
    units, costs = some_units(random.Random(0), "vllm")
    with pytest.raises(PlanError, match=f"{units.least - 1} bytes are too few.* {units.least} bytes"):
        solve(units, costs, units.least - 1)


@pytest.mark.parametrize("runtime", ["vllm", "fastdeploy", "llama_cpp"])
@pytest.mark.parametrize("seed", range(3))
def test_bytes_are_those_of_the_plan(runtime: str, seed: int, wide: Path) -> None:
    """Whatever is chosen: the rules that are written give every weight that codec, and the plan has these bytes."""
    rng = random.Random(seed)
    source = open_source(wide)
    units = units_of(source, runtime)
    chosen = [rng.randrange(len(unit.options)) for unit in units.free]
    if runtime == "fastdeploy":
        chosen.sort(reverse=True)  # experts alone have a choice, in the order of layers
    costs = [[rng.random() for _ in unit.options] for unit in units.free]
    made = allocation(units, costs, chosen)
    groups = allocated.groups_of(units, made, costs)
    text = allocated.text(["why"], runtime, groups, None, wide)
    plan = make_plan(source, runtime=runtime, recipe=of_rules("allocated", tomllib.loads(text)["rule"]))
    assert plan.nbytes == made.nbytes
    codec_of = {pt: step.codec.form for step in plan.steps for pt in step.holds}
    for unit, index in zip(units.free, chosen, strict=True):
        assert {codec_of[name] for name in unit.weights} == {unit.options[index].codec.form}, unit.name
    assert sum(group.kl for group in groups) == pytest.approx(
        sum(cost[i] for cost, i, unit in zip(costs, chosen, units.free, strict=True) if not unit.options[i].kept)
    )


@pytest.mark.parametrize("runtime", ["vllm", "fastdeploy", "llama_cpp"])
def test_units_hold_every_linear_once(runtime: str, wide: Path) -> None:
    units = units_of(open_source(wide), runtime)
    names = [name for unit in units.free for name in unit.weights] + [name for name, _ in units.fixed]
    assert len(names) == len(set(names))
    linears = {name for name in open_source(wide).refs if name.endswith("_proj.weight")}
    assert linears <= set(names)
    assert all(list(unit.options) == sorted(unit.options, key=lambda o: o.nbytes) for unit in units.free)
    for form, chosen in units.uniform.items():
        have = [(unit.options[i].codec.form, unit) for unit, i in zip(units.free, chosen, strict=True)]
        assert any(found == form for found, _ in have), form
        assert [u.name for found, u in have if found != form and form in [o.codec.form for o in u.options]] == [], form


def test_what_a_program_stores_alike_is_one_unit(wide: Path) -> None:
    vllm = {unit.name: unit for unit in units_of(open_source(wide), "vllm").free}
    assert len(vllm["model.layers.1.mlp.experts"].weights) == 3 * 4
    assert len(vllm["model.layers.0.self_attn.qkv_proj"].weights) == 3
    llama = {unit.name: unit for unit in units_of(open_source(wide), "llama_cpp").free}
    assert len(llama["blk.1.ffn_up_exps.weight"].weights) == 4
    fastdeploy = units_of(open_source(wide), "fastdeploy")
    assert [len(unit.weights) for unit in fastdeploy.free] == [12, 12]


def test_layers_are_written_in_runs() -> None:
    assert allocated.in_runs([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_dense_models_leave_fastdeploy_no_choice() -> None:
    from helpers.paths import GOLDEN

    with pytest.raises(PlanError, match="FastDeploy leaves nothing to choose among"):
        units_of(open_source(GOLDEN / "dense/pt"), "fastdeploy")
