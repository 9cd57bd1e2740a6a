"""Threads of ours work on slabs; torch's own stay out of their way, and are given back afterwards."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import GOLDEN, write

from ernie_quant.check.verify import verify
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.planning.make import make_plan
from ernie_quant.planning.recipe import Recipe, RecipeRule
from ernie_quant.run.whole import run_plan
from ernie_quant.sources import open_source
from ernie_quant.threads import one_torch_thread

SOURCE = GOLDEN / "moe/paddle"
RULES = Recipe("test", (RecipeRule(RoundToNearest(4, CHANNEL), ("attention",)),))
LINEARS = 3 * 4  # q, k, v and o of 3 layers, of one slab each


@pytest.fixture(autouse=True)
def three_torch_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine of three processors; all other tests have one."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every step that the codec did, and how many threads torch had for it."""
    found: list[tuple[str, int]] = []

    def spied(step: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def spy(*given: Any) -> Any:
            found.append((step, torch.get_num_threads()))
            return original(*given)

        return spy

    for step in ("measured", "decode", "recode"):
        monkeypatch.setattr(RoundToNearest, step, spied(step, getattr(RoundToNearest, step)))
    return found


def here_and_in_a_new_thread() -> tuple[int, int]:
    """How many threads torch has."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return torch.get_num_threads(), found[0]


def test_torch_has_one_thread_inside_and_its_own_number_outside() -> None:
    with one_torch_thread():
        assert here_and_in_a_new_thread() == (1, 1)
    assert here_and_in_a_new_thread() == (3, 3)


def test_an_error_gives_them_back_too() -> None:
    with pytest.raises(KeyboardInterrupt), one_torch_thread():
        raise KeyboardInterrupt
    assert here_and_in_a_new_thread() == (3, 3)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_has_one_torch_thread_for_each_of_its_own(workers: int, seen: list[tuple[str, int]], tmp_path: Path) -> None:
    run_plan(make_plan(open_source(SOURCE), runtime="vllm", recipe=RULES), tmp_path / "out", workers=workers)
    assert seen == [("measured", 1)] * LINEARS
    assert here_and_in_a_new_thread() == (3, 3)


def test_verify_has_one_torch_thread(seen: list[tuple[str, int]], tmp_path: Path) -> None:
    write(SOURCE, tmp_path / "out", recipe=RULES)
    seen.clear()
    verify(tmp_path / "out")
    assert sorted(seen) == [("decode", 1)] * LINEARS + [("recode", 1)] * LINEARS
    assert here_and_in_a_new_thread() == (3, 3)
