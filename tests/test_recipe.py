"""Rules of a recipe: by role, by a regex, or by exact names; the first match wins."""

from __future__ import annotations

import re

import pytest
from helpers.models import GOLDEN

from ernie_quant.codecs.keep import KEEP
from ernie_quant.errors import PlanError
from ernie_quant.names import Weight
from ernie_quant.plan import recipe
from ernie_quant.sources import open_source
from ernie_quant.weights.layouts import PADDLE
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
