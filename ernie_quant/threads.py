"""Threads that work ahead, with results in order; how many of them there are."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

Progress = Callable[[int], None]  # is told the bytes of source data that are done
Watch = Callable[[float, str], None]  # is told what part of something long is done, and what is being done
Item = TypeVar("Item")
Result = TypeVar("Result")
TICK = 1.0  # seconds


def in_proportion(progress: Progress, real: int, told: int) -> Progress:
    """A progress that hears of `real` bytes, and tells of `told` in the same proportion."""
    heard = 0

    def hear(done: int) -> None:
        nonlocal heard
        before, heard = heard, heard + done
        progress(told * heard // max(1, real) - told * before // max(1, real))

    return hear


def ordered(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    stop: Callable[[], object] = lambda: None,
    tick: Callable[[], object] = lambda: None,
) -> Iterator[Result]:
    """`map` on threads, in order, with at most one finished result waiting per worker: memory stays bounded.

    `stop` is called when no more results are wanted, and must wake whoever waits in `work`. `tick` is called every second
    in which there is no result, and may raise.
    """
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future[Result]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) > workers:
                    yield _first(ahead, tick)
            while ahead:
                yield _first(ahead, tick)
        except BaseException:
            stop()
            raise
        finally:
            for future in ahead:
                future.cancel()


def _first(ahead: deque[Future[Result]], tick: Callable[[], object]) -> Result:
    while not wait([ahead[0]], TICK).done:
        tick()
    return ahead.popleft().result()


def default_workers() -> int:
    """The processors that this process may use; more than 8 wait for the disk."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, usable)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Slabs are the parallel work; threads inside torch's operations would fight with ours."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
