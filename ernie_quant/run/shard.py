"""The only loop over tensors.

Read `run_shard` from top to bottom and you know the program: what is read, encoded, measured, packed and written,
and in which order. Threads work ahead on slabs; results are taken in order, so that a file and its report do not
depend on how many there are.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ernie_quant import runtimes, writers
from ernie_quant.checkpoint import Download
from ernie_quant.codecs import MeasuringEncoder
from ernie_quant.devices import CPU, Crew, fetched
from ernie_quant.errors import CheckpointError
from ernie_quant.measure import Difference, Values, checked, means_something, squares, values_of
from ernie_quant.planning.steps import ShardJob, Step
from ernie_quant.planning.taken import given, moved
from ernie_quant.reporting.rows import FITTED, ShardResult, TensorReport
from ernie_quant.runtimes import Runtime
from ernie_quant.threads import Progress, one_torch_thread, ordered
from ernie_quant.views.buffers import Buffers
from ernie_quant.views.files import Files
from ernie_quant.views.kinds import View
from ernie_quant.views.read import read, row_bytes
from ernie_quant.writers import ShardWriter

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded, Encoder


AT_ONCE = 1 << 19  # weights: with codes and what is packed of them they fill most of a second cache


class Rows(NamedTuple):
    """A slab that is to be done: rows `first` to `last` of a step's weight."""

    step: Step
    first: int
    last: int


@dataclass(frozen=True)
class Slab:
    """A finished one: its stored tensors, what it lost, and what is odd about the values it was made of."""

    parts: Mapping[str, torch.Tensor]
    difference: Difference
    values: Values


def run_shard(job: ShardJob, *, folder: Path, workers: int, progress: Progress, download: Download) -> ShardResult:
    """Write one file of the result. Raises CheckpointError; nothing stays under the final name then."""
    shard, runtime = job.shard, runtimes.find(job.runtime)
    path = folder / shard.filename
    path.parent.mkdir(parents=True, exist_ok=True)
    todo = [Rows(step, *rows) for step in shard.steps for rows in step.slabs() or [(0, 0)]]
    layout = writers.find(runtime.FORMAT).lay_out(shard.specs, job.metadata)
    sums = {step.name: Difference() for step in shard.steps}
    values = {step.name: Values() for step in shard.steps}
    crew = Crew(job.device)
    with (
        one_torch_thread(),
        Files(job.stamps, download.path, once=job.once) as files,
        ShardWriter(path, shard.specs, layout, shard.stacks, job.once) as writer,
    ):
        encoders = _Encoders(todo, files, CPU)  # statistics make large matrices, which every device would sum in another order

        def work(rows: Rows) -> Slab:
            step = rows.step
            with crew.at_work() as own, encoders.of(step) as encoder:
                device = own if step.quantized else CPU  # what is kept would come back as it went
                known = given(step, files, (rows.first, rows.last), device)
                if known is not None and moved(step):
                    slab = _repacked(step, runtime, known)
                else:
                    weight = read(step.view, files, (rows.first, rows.last), device)
                    slab = encode_slab(step, runtime, weight, encoder, known, files.buffers)
                parts = fetched(slab.parts, device)
                once = encoder.once if encoder else known or {}
            constants = {} if rows.first else runtime.constants(step.name, step.codec, step.spec, once)
            return replace(slab, parts={**constants, **parts})

        for rows, slab in zip(todo, ordered(work, todo, crew.workers(workers), download.stop, lambda: progress(0)), strict=True):
            step, out = rows.step, max((1, *rows.step.spec.shape[:1]))
            for name, tensor in slab.parts.items():
                part = step.parts[name]
                first = 0 if part.out_axis is None else part.span((rows.first, rows.last), out)[0]
                writer.write(name, tensor, part.out_axis, first, part.index)
            sums[step.name] += slab.difference
            values[step.name] += slab.values
            progress((rows.last - rows.first) * row_bytes(step.spec))
        files.check()
        sha256 = writer.close()
    reports = tuple(_row(step, sums[step.name], values[step.name], writer) for step in shard.steps)
    return ShardResult(shard.filename, writer.nbytes, sha256, reports)


def encode_slab(
    step: Step, runtime: Runtime, weight: torch.Tensor, encoder: Encoder | None = None, known: Encoded | None = None,
    buffers: Buffers | None = None,
) -> Slab:  # fmt: skip
    """What is stored of rows of a weight, and what they lost; nothing is written. `known`: it has been encoded before.

    Some rows at a time, so that all that is done with them finds them in the processor's cache.
    """
    if not (step.quantized or known):
        return Slab(runtime.pack(step.name, step.codec, step.codec.encode(weight)), Difference(), values_of(weight))
    if known is not None:
        encoded, once = known, encoder.once if encoder else {}
    elif encoder is not None and not isinstance(encoder, MeasuringEncoder):
        encoded, once = encoder.encode(weight), encoder.once
    else:
        measured = encoder.measured if encoder else step.codec.measured
        slabs = [_finished(step, runtime, block, *measured(block)) for block in _blocks(step, weight)]
        return _joined(step, slabs, buffers or Buffers())
    return _finished(step, runtime, weight, encoded, squares(weight, step.codec.decode({**once, **encoded})))


def _repacked(step: Step, runtime: Runtime, known: Encoded) -> Slab:
    """Codes and scales of a quantized source, which nobody need decode. Raises CheckpointError for scales that are no numbers."""
    if odd := next((field for field, tensor in known.items() if values_of(tensor).not_finite), None):
        raise CheckpointError(f"{step.name}: its {odd} is NaN or infinity in the source; get the file again")
    return Slab(runtime.pack(step.name, step.codec, known), Difference(), Values(only_zeros=False))


def _finished(step: Step, runtime: Runtime, weight: torch.Tensor, encoded: Encoded, difference: Difference) -> Slab:
    difference = checked(step.name, weight, difference)
    return Slab(runtime.pack(step.name, step.codec, encoded), difference, Values(only_zeros=difference.total == 0))


def _blocks(step: Step, weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Rows that stay in the cache; on a GPU, all."""
    if weight.device.type != CPU or not weight.dim():
        yield weight
        return
    together = max(1, AT_ONCE // max(1, weight[:1].numel()) // step.multiple) * step.multiple
    for first in range(0, max(1, len(weight)), together):
        yield weight[first : first + together]


def _joined(step: Step, slabs: Sequence[Slab], buffers: Buffers) -> Slab:
    """One of several, in order of their rows."""
    import torch

    if len(slabs) == 1:
        return slabs[0]
    parts = {}
    for name, first in slabs[0].parts.items():
        axis, pieces = step.parts[name].out_axis, [slab.parts[name] for slab in slabs]
        if axis is None:
            parts[name] = first
            continue
        shape = (*first.shape[:axis], sum(piece.shape[axis] for piece in pieces), *first.shape[axis + 1 :])
        parts[name] = buffers.empty(shape, first.dtype)
        torch.cat([_whole_numbers(piece) for piece in pieces], axis, out=_whole_numbers(parts[name]))
    return Slab(parts, sum((s.difference for s in slabs), Difference()), sum((s.values for s in slabs), Values()))


def _whole_numbers(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes: torch does not join all dtypes."""
    import torch

    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def _row(step: Step, difference: Difference, values: Values, writer: ShardWriter) -> TensorReport:
    crc32 = writer.crc32((name, part.index) for name, part in step.parts.items())
    made = step.made
    return TensorReport(
        step.name, step.role, FITTED if made and step.kept else step.codec.describe(), step.spec.shape, step.nbytes,
        step.codec.bits_per_weight(step.spec), difference.rel_error, difference.sqnr_db, difference.largest,
        difference.error, difference.total, step.sources, crc32,
        values.not_finite, values.only_zeros and step.spec.numel > 0 and means_something(step.name),
        made.output_error if made else None, made is not None and made.fitted, made.tokens if made else None,
        moved(step),
    )  # fmt: skip


class _Encoders:
    """What codecs prepare once per weight: made with its first slab, shared by its threads, dropped with its last.

    Slabs are worked on in order and few at a time, so that few are alive.
    """

    def __init__(self, todo: Sequence[Rows], files: Files, device: str) -> None:
        self._files, self._device = files, device
        self._left = Counter(rows.step.name for rows in todo)
        self._alive: dict[str, Future[Encoder | None]] = {}
        self._weighed: dict[int, torch.Tensor] = {}  # the id of a view, which several steps may have -> the number under it
        self._lock = threading.Lock()

    def _prepared(self, step: Step) -> Encoder | None:
        statistics = {name: read(view, self._files, device=self._device) for name, view in step.statistics.items()}
        statistics |= {name: self._number(view) for name, view in step.weighed.items()}
        assert statistics.keys() >= {*step.codec.needs}, f"{step.name}: {step.codec.needs} are not all in {[*statistics]}"
        return step.codec.prepare(step.spec, statistics)

    def _number(self, view: View) -> torch.Tensor:
        if id(view) not in self._weighed:  # two threads may find the same
            self._weighed[id(view)] = read(view, self._files, device=self._device)
        return self._weighed[id(view)]

    @contextmanager
    def of(self, step: Step) -> Iterator[Encoder | None]:
        """The encoder of a weight, for one of its slabs; None where the codec needs none, or calibration has made it."""
        with self._lock:
            mine = step.name not in self._alive
            future = self._alive.setdefault(step.name, Future())
        if mine:
            try:
                future.set_result(None if step.made else self._prepared(step))
            except BaseException as error:
                future.set_exception(error)
        try:
            yield future.result()
        finally:
            with self._lock:
                self._left[step.name] -= 1
                if not self._left[step.name]:
                    del self._alive[step.name]
