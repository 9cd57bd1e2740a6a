"""A short run of tests/faults/fuzz.py, and proof that it would notice."""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import _sidecars, fuzz
from faults._watch import watching

from ernie_quant.errors import CheckpointError
from ernie_quant.readers import safetensors


@pytest.fixture(scope="module")
def sandbox() -> Iterator[fuzz.Sandbox]:
    with fuzz.sandbox() as built:
        yield built


def test_changed_files_are_read_or_refused(sandbox: fuzz.Sandbox) -> None:
    total = fuzz.fuzz(900, seed=0, within=sandbox)
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


# --- beside the weights ----------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, object]:
    """Every name, and what is there."""
    return {
        path.relative_to(folder).as_posix(): str(path.readlink())
        if path.is_symlink()
        else (path.stat().st_size, head(path))
        if path.is_file()
        else path.stat().st_mode
        for path in folder.rglob("*")
    }


def head(path: Path) -> bytes:
    """Sparse files have a terabyte."""
    with open(path, "rb") as file:
        return file.read(1 << 16)


def test_what_was_changed_beside_the_weights_is_taken_back(sandbox: fuzz.Sandbox) -> None:
    folder, rng, seen = sandbox.variants["beside"][0].folder, random.Random(0), set()
    before, outside = tree(folder), tree(sandbox.root / "canary")
    for _ in range(150):
        edits = _sidecars.drawn(rng, str(sandbox.canary))
        with _sidecars.edited(folder, edits):
            seen |= {what for what, *_ in edits if tree(folder) != before}
        assert tree(folder) == before, edits
    assert seen == {"write", "link", "pipe", "folder", "remove", "sparse"}
    assert tree(sandbox.root / "canary") == outside


def takes_from_outside(source: Path, name: str, target: Path, modules: set[str]) -> tuple[int, str]:
    data = next(p for p in source.parents if (p / "canary.safetensors").exists()).joinpath("canary.safetensors").read_bytes()
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(data)
    return len(data), hashlib.sha256(data).hexdigest()


def links(source: Path, name: str, target: Path, modules: set[str]) -> tuple[int, str]:
    target.parent.mkdir(exist_ok=True)
    target.symlink_to(source)
    return source.stat().st_size, hashlib.sha256(source.read_bytes()).hexdigest()


def forgets(source: Path, name: str, target: Path, modules: set[str]) -> tuple[int, str]:
    target.parent.mkdir(exist_ok=True)
    target.with_name("forgotten").write_bytes(b"")
    target.write_bytes(source.read_bytes())
    return source.stat().st_size, hashlib.sha256(source.read_bytes()).hexdigest()


def another_hash(source: Path, name: str, target: Path, modules: set[str]) -> tuple[int, str]:
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(source.read_bytes())
    return source.stat().st_size, "0" * 64


@pytest.mark.parametrize(
    ("copies", "finding"),
    [
        (takes_from_outside, "escape while running: open: "),
        (takes_from_outside, "the result has a file from outside"),
        (links, "the result has what is no file: "),
        (forgets, "manifest and folder differ: ['additional_chat_templates/forgotten'"),
        (another_hash, "its sha256 is"),
    ],
)
def test_a_result_that_is_not_what_it_should_be_is_reported(
    sandbox: fuzz.Sandbox, monkeypatch: pytest.MonkeyPatch, copies: Callable[..., Any], finding: str
) -> None:
    monkeypatch.setattr("ernie_quant.result.carry._copy", copies)
    monkeypatch.setattr(fuzz.Variant, "options", lambda self, rng: {})
    variant, total = sandbox.variants["beside"][0], fuzz.Summary()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [line for draw in range(8) for line in fuzz.attempt(sandbox, variant, random.Random(draw), total)[1]]
    assert total.runs > 0
    assert any(finding in line for line in found), found
