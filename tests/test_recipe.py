"""Rules of a recipe: by role, by a regex, or by exact names; the first match wins. And what the built-in ones take."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers.commands import Command
from helpers.models import GOLDEN, random_model
from helpers.runs import OF_128S

from ernie_quant.check.verify import verify
from ernie_quant.codecs.keep import KEEP
from ernie_quant.errors import PlanError
from ernie_quant.names import Weight
from ernie_quant.planning import built_in, recipe
from ernie_quant.sources import open_source
from ernie_quant.weights.layouts import PADDLE, PT, Layout
from ernie_quant.weights.plain import resolve

UP = "model.layers.1.mlp.experts.0.up_proj.weight"
INT8 = {"codec": "rtn", "bits": 8, "group_size": "channel"}
INT4 = {"codec": "rtn", "bits": 4, "group_size": 32}


@pytest.fixture(scope="module")
def weights() -> list[Weight]:
    return resolve(open_source(GOLDEN / "moe/paddle")).weights


def codecs(rules: recipe.Recipe, weights: list[Weight]) -> dict[str, str]:
    """What is changed, and to what."""
    return {w.name: codec.form for w in weights if (codec := rules.codec_for(w)) != KEEP}


def test_a_rule_by_names_takes_these_and_no_others(weights: list[Weight]) -> None:
    """A dot is a dot: no regex is asked."""
    found = codecs(recipe.of_rules("mine", [{"names": [UP, "model.norm.weight"], **INT8}]), weights)
    assert found == {UP: "int8, per channel"}  # a norm is no linear, whoever names it


def test_names_stand_beside_roles_and_regexes(weights: list[Weight]) -> None:
    rules = [{"names": [UP], **INT8}, {"match": r"experts\.1\.", **INT8}, {"role": "experts", **INT4}]
    found = codecs(recipe.of_rules("mine", rules), weights)
    eight = [name for name, form in found.items() if form == "int8, per channel"]
    assert eight == [name for name in found if name == UP or re.search(r"experts\.1\.", name)]
    assert set(found.values()) == {"int8, per channel", "int4, group 32"}


def test_a_fused_weight_is_taken_by_the_name_of_one_of_its_parts(weights: list[Weight]) -> None:
    found = codecs(recipe.of_rules("mine", [{"names": [UP], **INT8}]), PADDLE.join(weights))
    assert found == {"ernie.layers.1.mlp.experts.0.up_gate_proj.weight": "int8, per channel"}


def test_names_that_fit_nothing_are_told(weights: list[Weight]) -> None:
    rules = recipe.of_rules("mine", [{"names": ["b", "a"], **INT8}])
    assert rules.unused(weights) == ["recipe mine: no linear of this model fits a and 1 more"]


@pytest.mark.parametrize("names", ["a", [1], {"a": 1}], ids=repr)
def test_names_are_a_list_of_texts(names: object) -> None:
    with pytest.raises(PlanError) as error:
        recipe.of_rules("mine", [{"names": names, **INT8}])
    assert error.value.problems == ["rule 1: names is not a list of PT names"]


def test_five_hundred_regexes_are_compiled_once(weights: list[Weight], monkeypatch: pytest.MonkeyPatch) -> None:
    """Python remembers 512 patterns; a recipe of more would compile them again for every weight."""
    rules = recipe.of_rules("mine", [{"match": rf"layers\.{i}\.nothing", **INT8} for i in range(600)])
    compiled = []
    compile_ = re.compile
    monkeypatch.setattr(re, "compile", lambda *arguments: compiled.append(arguments) or compile_(*arguments))
    assert codecs(rules, weights) == {}
    assert len(compiled) == 600


# --- built-in recipes ------------------------------------------------------------------------------------------------

ALL = {"experts", "shared_experts", "mlp", "attention"}


@pytest.mark.parametrize(
    ("which", "roles"),
    [
        ({}, ALL),
        ({"mtp": True}, ALL | {"mtp"}),
        ({"experts_only": True}, {"experts"}),
        ({"experts_only": True, "mtp": True}, {"experts", "mtp"}),
    ],
    ids=["all", "mtp", "experts_only", "experts_only and mtp"],  # a set has no order of its own
)
@pytest.mark.parametrize("name", ["wint4", "wint8", "fp8"])
@pytest.mark.parametrize("layout", [PT, PADDLE], ids=lambda layout: layout.name)
def test_experts_only_and_mtp_are_independent(name: str, which: dict[str, bool], roles: set[str], layout: Layout) -> None:
    rules = built_in.make(name, **which).recipe
    weights = layout.join(resolve(open_source(GOLDEN / "moe_mtp/paddle")).weights)
    linears = [w for w in weights if w.row.rule.linear]
    assert {w.role for w in linears} >= ALL - {"shared_experts"} | {"mtp"}
    found = codecs(rules, weights)
    assert found.keys() == {w.name for w in linears if w.role in roles}
    assert len(set(found.values())) == 1
    assert rules.unused(weights) == []


def test_both_without_an_mtp_block_are_experts_only(weights: list[Weight]) -> None:
    both, one = (built_in.make("wint4", experts_only=True, mtp=mtp).recipe for mtp in (True, False))
    assert codecs(both, weights) == codecs(one, weights)
    assert both.unused(weights) == []


def test_both_of_a_dense_model_say_that_it_has_no_experts() -> None:
    dense = resolve(open_source(GOLDEN / "dense/paddle")).weights
    (line,) = built_in.make("wint4", experts_only=True, mtp=True).recipe.unused(dense)
    assert line.startswith("this model has no experts;")


def test_no_other_combination_has_another_fingerprint_than_before() -> None:
    """What is published stays up to date: recipes stand in the identity of a result."""
    roles = "role experts or vision_experts"
    every = f"{roles} or shared_experts or mlp or attention"
    cases: list[tuple[dict[str, bool], list[str]]] = [
        ({}, [every]), ({"mtp": True}, [f"{every} or mtp"]), ({"experts_only": True}, [roles]),
        ({"experts_only": True, "mtp": True}, [roles, "role mtp"]),
    ]  # fmt: skip
    for which, applies in cases:
        said = recipe.as_dict(built_in.make("wint8", **which).recipe)["rules"]
        assert [rule["applies_to"] for rule in said] == applies


@pytest.mark.parametrize("arguments", [("wint4",), ("wint8", "--runtime", "transformers"), ("fp8",)], ids=" ".join)
def test_both_from_the_command_line_to_a_verified_result(arguments: tuple[str, ...], command: Command, tmp_path: Path) -> None:
    """config.json names the layers of the MTP block as it names the experts', and every other as kept."""
    source = random_model(tmp_path / "src", "paddle", "moe_mtp", **OF_128S)
    name, *options = arguments
    assert command(name, source, tmp_path / "out", *options, "--experts-only", "--mtp", "--quiet")[0] == 0
    rows = json.loads((tmp_path / "out/report.json").read_text())["tensors"]
    changed = {row["name"] for row in rows if row["codec"] != "kept"}
    layer = r"(layers\.1\.mlp\.experts\.\d+|mtp_block\.0\.(mlp|self_attn))\.(gate|up|down|q|k|v|o)_proj"
    assert changed == {row["name"] for row in rows if re.fullmatch(rf"model\.{layer}\.weight", row["name"])}
    assert len([name for name in changed if "mtp_block" in name]) == 7
    assert verify(tmp_path / "out", source).quantized == len(changed) == 2 * 3 + 7
