"""A short run of tests/faults/fuzz.py, and proof that it would notice."""

from __future__ import annotations

import os
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import fuzz
from faults._watch import watching

from ernie_quant.errors import CheckpointError
from ernie_quant.readers import safetensors


@pytest.fixture(scope="module")
def sandbox() -> Iterator[fuzz.Sandbox]:
    with fuzz.sandbox() as built:
        yield built


def test_changed_files_are_read_or_refused(sandbox: fuzz.Sandbox) -> None:
    total = fuzz.fuzz(2500, seed=0, within=sandbox)
    assert total.findings == []
    for kind, row in total.rows.items():
        assert row.accepted > 0, kind
        assert row.refused > 0, kind
        assert row.accepted + row.refused == row.mutations
    assert total.runs > 0


def test_a_mutation_depends_on_the_seed_and_its_number_alone(sandbox: fuzz.Sandbox) -> None:
    assert sandbox.variants.keys() == set(fuzz.KINDS)
    for kind, variants in sandbox.variants.items():
        assert variants, kind
        for variant in variants:
            drawn = [variant.change(random.Random(f"0-{n}")) for n in (1, 2, 1)]
            assert drawn[0] == drawn[2] != drawn[1]


class Wordy(CheckpointError):
    def __str__(self) -> str:
        return "one\n" * 100


def fails(error: Exception) -> Callable[[Path], Any]:
    def read(path: Path) -> Any:
        raise error

    return read


def opens(path: Path) -> Any:
    (path.parents[1] / "canary.safetensors").read_bytes()
    raise CheckpointError("x")


def writes(path: Path) -> Any:
    (path.parent / "new").write_text("x")
    raise CheckpointError("x")


def removes(path: Path) -> Any:
    (path.parent / "new").unlink(missing_ok=True)
    raise CheckpointError("x")


def lists(path: Path) -> Any:
    list(path.parents[2].iterdir())
    raise CheckpointError("x")


def runs(path: Path) -> Any:
    os.system(f"touch {path.parents[1]}/was-here")


def evaluates(path: Path) -> Any:
    eval("1 + 1")
    raise CheckpointError("x")


def warns(path: Path) -> Any:
    warnings.warn("odd", stacklevel=1)


def waits(path: Path) -> Any:
    time.sleep(10)


@pytest.mark.parametrize(
    ("reader", "finding"),
    [
        (fails(KeyError("dtype")), "KeyError: \"'dtype'\" at __init__.py"),
        (fails(RecursionError("deep")), "RecursionError"),
        (fails(MemoryError()), "MemoryError"),
        (fails(AssertionError("ours")), "AssertionError"),
        (fails(Wordy("x")), "an error of 101 lines"),
        (opens, "escape: open: "),
        (writes, "escape: open for writing: "),
        (removes, "escape: os.remove: "),
        (lists, "escape: os.listdir: "),
        (runs, "stopped by the watch: os.system"),
        (evaluates, "escape: exec"),
        (warns, "UserWarning: 'odd'"),
        (waits, "Hang: 'more than 0.2 s'"),
    ],
)
def test_a_reader_that_misbehaves_is_reported(
    sandbox: fuzz.Sandbox, monkeypatch: pytest.MonkeyPatch, reader: Callable[[Path], Any], finding: str
) -> None:
    monkeypatch.setattr(safetensors, "read_header", reader)
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    variant = sandbox.variants["header"][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcome, findings = fuzz.attempt(sandbox, variant, random.Random(0), fuzz.Summary())
    assert outcome == "refused"
    assert any(finding in line for line in findings), findings
    assert not (sandbox.root / "was-here").exists()


def test_findings_are_counted_and_say_how_to_see_them_again(sandbox: fuzz.Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "read_header", fails(KeyError("dtype")))
    total = fuzz.fuzz(20, seed=3, first=40, within=sandbox)
    assert total.all.mutations == 20
    assert total.all.findings == len(total.findings) > 0
    assert all(line.startswith("--seed 3 --only ") and "KeyError" in line for line in total.findings)
    assert re.search(rf"^all +20 +\d+ +\d+ +{len(total.findings)} ", total.table(), re.M)


def test_links_are_followed_to_where_they_lead(sandbox: fuzz.Sandbox) -> None:
    folder = sandbox.variants["header"][0].folder
    with watching(folder, sandbox.results) as escapes:
        (folder / "config.json").read_bytes()
        (sandbox.results / "x").write_text("x")
    assert escapes == []
    with watching(folder, sandbox.results) as escapes:
        (folder / "link.safetensors").read_bytes()
    assert escapes == [f"open: '{folder / 'link.safetensors'}', which is {sandbox.canary}"]
