"""Every architecture keeps every promise of `archs` and `names`; a new file is under test at once, and needs a golden model."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.models import GOLDEN

from ernie_quant import archs, names, plugins
from ernie_quant.archs._config import Facts
from ernie_quant.checkpoint import Extent, TensorRef, TensorSpec
from ernie_quant.names import NameMap, Row, size_of
from ernie_quant.sources import open_source
from ernie_quant.views import build, read
from ernie_quant.views import files as views_files
from ernie_quant.weights.plain import resolve

MODULES = plugins.modules(archs)
FOLDERS = sorted(p.parent for p in GOLDEN.glob("*/*/config.json"))


@cache
def table(folder: Path) -> NameMap:
    """The name table of a golden checkpoint."""
    return resolve(open_source(folder)).map


def short(folder: Path) -> str:
    return f"{folder.parent.name}-{folder.name}"


def one_row_per_rule(name_map: NameMap) -> list[Row]:
    return list({row.rule: row for row in name_map.rows()}.values())


@pytest.fixture(params=FOLDERS, ids=short)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_model_types_are_distinct() -> None:
    counts = Counter(t for module in MODULES for t in module.MODEL_TYPES)
    assert counts
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_architecture_has_a_golden_model(module: ModuleType) -> None:
    types = {json.loads((f / "config.json").read_text())["model_type"] for f in FOLDERS}
    assert types & set(module.MODEL_TYPES)
    assert all(archs.find({"model_type": t}) is module for t in module.MODEL_TYPES)


def test_no_two_rules_name_the_same_tensor(folder: Path) -> None:
    rows = list(table(folder).rows())
    for found in (Counter(r.paddle for r in rows), Counter(name for r in rows for name in r.pt)):
        assert [name for name, count in found.items() if count > 1] == []


def test_every_symbol_of_every_rule_resolves_and_every_id_is_known(folder: Path) -> None:
    name_map = table(folder)
    for rule in name_map.rules:
        assert len(rule.shapes) == len(rule.pt)
        assert rule.role in names.ROLES
        assert set(rule.ids) <= name_map.ids.keys(), rule.paddle
        symbols = [*(s for shape in rule.shapes for s in shape), *rule.op.split]
        assert all(size_of(symbol, name_map.dims) >= 0 for symbol in symbols), rule.paddle
        for pt in rule.pt:  # the same ids in both names, each once
            assert Counter(rule.ids) == Counter(i for i in name_map.ids if "{" + i + "}" in pt), pt


def test_pieces_of_a_split_are_the_rows_of_its_pt_tensors(folder: Path) -> None:
    for row in table(folder).rows():
        if row.rule.op.split:
            assert [size_of(s, table(folder).dims) for s in row.rule.op.split] == [shape[0] for shape in row.shapes], row.paddle


def test_the_inverse_of_an_op_gives_the_stored_bytes_again(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    dims = table(folder).dims
    with views_files.Files() as files:
        for i, row in enumerate(one_row_per_rule(table(folder))):
            stored = torch.randn(row.stored_shape)
            (tmp_path / str(i)).write_bytes(stored.numpy().tobytes())
            ref = TensorRef(row.paddle, TensorSpec(row.stored_shape, "F32"), tmp_path / str(i), (Extent(0, stored.nbytes),))
            pieces = row.rule.op.apply(build.leaf(ref), dims)
            assert tuple(p.shape for p in pieces) == row.shapes, row.paddle
            canonical = stored.t() if row.rule.op.transpose else stored
            for piece, plain in zip(pieces, canonical.split([s[0] for s in row.shapes]), strict=True):
                assert torch.equal(read.read(piece, files), plain), row.paddle
            assert torch.equal(read.read(row.rule.op.inverse(pieces), files), stored), row.paddle


def test_only_linears_of_the_language_model_are_quantizable(folder: Path) -> None:
    never = ("gate.weight", "gate.weight_1", "norm", "embed_tokens", "lm_head", "vision_model", "resampler", "e_score", ".bias")
    for row in table(folder).rows():
        if row.rule.linear:
            assert not any(word in name for word in never for name in row.pt), row.paddle


@pytest.mark.parametrize("layout", ["paddle", "pt"])
def test_config_json_says_the_same_in_every_layout(folder: Path, layout: str) -> None:
    """What is written is read again with the same dimensions, ids and flags."""
    found = resolve(open_source(folder))
    facts = Facts("bfloat16", found.map.dims.get("MS", 0) // found.map.dims.get("M", 1), len(found.map.ids.get("mtp", ())))
    config = found.arch.config_for(layout, found.config, facts)
    assert ("dtype" in config, "torch_dtype" in config) == ((True, False) if layout == "paddle" else (False, True))
    assert archs.find(config) is found.arch
    stored = [name for row in found.map.rows() for name in (row.paddle, *row.pt)]
    again = found.arch.name_map(found.arch.flat(config), stored)
    assert again.dims == found.map.dims
    assert list(again.rows()) == list(found.map.rows())
    assert again.flags == found.map.flags


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_making_a_config_does_not_change_the_one_it_is_made_from(module: ModuleType) -> None:
    folder = next(f for f in FOLDERS if json.loads((f / "config.json").read_text())["model_type"] in module.MODEL_TYPES)
    config = module.flat(json.loads((folder / "config.json").read_text()))
    before = json.dumps(config)
    for layout in ("paddle", "pt"):
        module.config_for(layout, config, Facts("bfloat16", 0, 0))
    assert json.dumps(config) == before
