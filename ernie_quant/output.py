"""The output folder: whether it is ours, what of it is finished, and the files that are written last.

A folder is ours if it has the manifest `ernie-quant.json` (written last: the result is complete) or the private
state `.ernie-quant/` (a run has begun). Anything else that is not empty is left alone.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ernie_quant import card, report
from ernie_quant.errors import AnotherPlanError, CheckpointError, OutputError, RetryError
from ernie_quant.identity import changes, libraries
from ernie_quant.jsonio import dumps, read_object
from ernie_quant.locks import hold
from ernie_quant.manifest import MANIFEST, SUMS, describe, index, manifest, sums
from ernie_quant.plan import Plan, Shard
from ernie_quant.report import TensorReport
from ernie_quant.sources.folder import MTP_FOLDER, RANK_FOLDER, inside
from ernie_quant.writer import PARTIAL, file_sha256, fsync_folder, write_file

STATE, INDEX = ".ernie-quant", "model.safetensors.index.json"
BEGUN, SWEPT = "plan.json", "swept.json"  # in the private state: what was begun; the manifest of a result that is dropped
CONFIG, README, SOURCE_README = "config.json", "README.md", "README.source.md"
FULL = (errno.ENOSPC, errno.EDQUOT)
AGAIN = "--restart makes it again"
JUST_FINISHED = "another run has just finished here; run the same command again"
BYTES_PER_TENSOR = 1000  # what index, report and manifest say of one


class OutputFolder:
    """The folder that a plan is written to. `begin` decides whether it may be, and locks it; `finish` completes it."""

    def __init__(self, path: Path) -> None:
        self.path, self.state = path, path / STATE
        self.unsplit = self.state / "unsplit"  # a result that is made only to be shared among ranks

    @contextmanager
    def begin(self, plan: Plan, *, restart: bool, copies: int = 1) -> Iterator[bool]:
        """Hold the folder for a run of `plan`; gives True if it is complete already.

        `copies`: how often the disk must have room for the result. Raises OutputError or RetryError.
        """
        self._refuse_strangers(plan)
        if self._is_complete() and not restart and not self.state.is_dir():
            self._check_complete(plan)
            yield True
            return
        self._check_space(plan, copies)
        try:
            self.state.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None
        with self._lock():
            complete = self._is_complete() and not restart
            if complete:  # finished by another run just now, or by one that was killed before it had swept its state
                self._check_complete(plan)
                self._drop_state()
            else:
                self._prepare(plan, restart)
            yield complete

    def _refuse_strangers(self, plan: Plan) -> None:
        source = plan.source.folder.resolve()
        if self.path.resolve() == source or source in self.path.resolve().parents or self.path.resolve() in source.parents:
            raise OutputError(f"{self.path}: the output folder must lie beside the source {source}, not in or around it")
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path}: is a file, not a folder")
        if self.path.is_dir() and not (self._is_complete() or self.state.is_dir()) and any(self.path.iterdir()):
            raise OutputError(f"{self.path}: is not empty and was not made by ernie-quant; choose another folder")

    def _is_complete(self) -> bool:
        return (self.path / MANIFEST).is_file()

    def _unwritable(self, error: OSError) -> OutputError | RetryError:
        kind = RetryError if error.errno in FULL else OutputError
        return kind(f"{error.filename or self.path}: cannot be written: {error.strerror}")

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One run at a time; the lock of a dead run vanishes with it. Raises RetryError or OutputError."""
        place = self.state / "lock"
        with ExitStack() as stack:
            try:
                file = stack.enter_context(hold(place, f"{self.path}: another run is at work in this folder"))
            except FileNotFoundError:
                raise RetryError(f"{self.path}: {JUST_FINISHED}") from None
            except OSError as error:
                raise self._unwritable(error) from None
            if not (place.exists() and os.path.samestat(os.fstat(file.fileno()), place.stat())):
                raise RetryError(f"{self.path}: {JUST_FINISHED}")  # between our two steps, and swept its lock
            yield

    def _check_complete(self, plan: Plan) -> None:
        """Is the finished result that of this plan, and all there? Raises OutputError."""
        found = read_object(self.path / MANIFEST)
        self._refuse("holds the result of another plan", {key: found.get(key) for key in plan.identity}, plan.identity)
        files = found.get("files")
        for name, entry in files.items() if isinstance(files, dict) else ():
            try:
                nbytes = inside(self.path, name, MANIFEST).stat().st_size
            except CheckpointError as error:
                raise OutputError(f"{self.path}: {error}; --restart makes it again") from None
            if not isinstance(entry, dict) or nbytes != entry.get("bytes"):
                raise OutputError(
                    f"{self.path}: {name}: has {nbytes} bytes, the manifest says otherwise; --restart makes it again"
                )

    def _refuse(self, what: str, before: Any, now: Any) -> None:
        if differ := changes(before, now):
            raise AnotherPlanError(
                f"{self.path}: {what} ({'; '.join(differ)}); choose another folder, or --restart to begin anew here"
            )

    def _prepare(self, plan: Plan, restart: bool) -> None:
        """Go on with what was begun, or begin. Raises OutputError or RetryError."""
        # mtimes, because equal sizes and headers are not yet equal weights; private, as they say nothing about the result
        stamps = {} if plan.source.supply else plan.source.stamps
        times = {plan.source.name_of(path): stamp.mtime_ns for path, stamp in stamps.items()}
        now = {**plan.identity, "libraries": libraries(), "mtime_ns": times}
        begun = self.state / BEGUN
        if begun.is_file() and not restart:
            self._refuse("holds the beginning of another plan", read_object(begun).get("identity"), now)
            _unlink(path for folder in (*weight_folders(self.path), self.state) for path in folder.glob(f"*{PARTIAL}"))
        else:
            self._sweep()
        copied = [SOURCE_README if path.name == README else path.name for path in plan.copies]
        try:
            write_file(begun, dumps({"identity": now, "copied": copied}).encode())
        except OSError as error:
            raise self._unwritable(error) from None

    def _sweep(self) -> None:
        """Remove what a run writes, and nothing else; from the first step on the folder is not complete."""
        if self._is_complete():
            os.replace(self.path / MANIFEST, self.state / SWEPT)
            fsync_folder(self.path)
        own = {MANIFEST, SUMS, INDEX, report.FILENAME, report.PAGE, CONFIG, README, SOURCE_README, *self._copied()}
        for folder in weight_folders(self.path):
            found = [p for p in folder.iterdir() if p.is_symlink() or p.is_file()]
            _unlink(p for p in found if p.name in own or _is_shard(p) or p.name.endswith(PARTIAL))
            if folder != self.path and not any(folder.iterdir()):  # ranks that the new plan may not have; a loader reads them
                folder.rmdir()
        _unlink(p for name in report.PLOTS if (p := self.path / report.PLOTS_FOLDER / name).is_file())
        shutil.rmtree(self.unsplit, ignore_errors=True)
        fsync_folder(self.path)
        _unlink(p for p in self.state.iterdir() if p.name not in ("lock", SWEPT))
        (self.state / SWEPT).unlink(missing_ok=True)

    def _copied(self) -> set[str]:
        """Files of the source that an earlier run carried along."""
        found: set[str] = set()
        for name, key in ((SWEPT, "files"), (BEGUN, "copied")):
            with suppress(CheckpointError):  # one that cannot be read any more names nothing
                found |= set(map(str, read_object(self.state / name).get(key) or ()))
        return {name for name in found if "/" not in name}

    def _drop_state(self) -> None:
        """The lock last: another run may come at any moment, and may finish what this one begins here."""
        for path in [p for p in self.state.iterdir() if p.name != "lock"]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        with suppress(OSError):
            (self.state / "lock").unlink()
            self.state.rmdir()
        fsync_folder(self.path)

    def _check_space(self, plan: Plan, copies: int) -> None:
        """Room for the result, counting what its files take already or will give back. Raises RetryError."""
        there = next(p for p in (self.path.resolve(), *self.path.resolve().parents) if p.exists())
        places = [*weight_folders(self.path), *weight_folders(self.unsplit)]
        free = shutil.disk_usage(there).free + sum(p.stat().st_size for f in places for p in f.iterdir() if _is_shard(p))
        needed = copies * (plan.disk_bytes + BYTES_PER_TENSOR * len(plan.steps))
        if free < needed:
            missing = (needed - free) / 1e9
            raise RetryError(f"{self.path}: needs {needed / 1e9:.2f} GB, {missing:.2f} GB more than the disk has free")

    def record(self, shard: Shard, entry: dict[str, Any], reports: Sequence[TensorReport]) -> None:
        """Remember a finished file."""
        rows = [r.to_json() for r in reports]
        data = json.dumps({**entry, "reports": rows}, allow_nan=False).encode()
        write_file(self._record_of(shard), data)

    def _record_of(self, shard: Shard) -> Path:
        return self.state / f"{shard.filename.replace('/', '-')}.json"

    def finished(self, shard: Shard) -> tuple[dict[str, Any], list[TensorReport]] | None:
        """What was remembered of a file that is still there, and still what it was."""
        record, file = self._record_of(shard), self.path / shard.filename
        if not record.is_file() or not file.is_file():
            return None
        try:
            entry = read_object(record)
            rows = [TensorReport.from_json(r) for r in entry.pop("reports")]
        except (CheckpointError, KeyError, TypeError):
            return None
        same = file.stat().st_size == entry.get("bytes") and file_sha256(file) == entry.get("sha256")
        return (entry, rows) if same else None

    def finish(self, plan: Plan, files: dict[str, dict[str, Any]], rows: Sequence[TensorReport]) -> None:
        """Write all but the weights; the manifest last. `files` has bytes and sha256 of the weight files."""
        entries = dict(files)

        def put(name: str, data: bytes) -> None:
            entries[name] = {"bytes": len(data), "sha256": write_file(self.path / name, data)}

        for source in plan.copies:
            data = source.read_bytes()
            plan.source.extra_files[source].check(source)
            put(SOURCE_README if source.name == README else source.name, data)
        for folder, shards in plan.folders.items():
            if len(shards) > 1:
                put(f"{folder}/{INDEX}".lstrip("/"), dumps(index(shards)).encode())
        for model in sorted({"", *(re.sub(r"(^|/)rank\d+$", "", folder) for folder in plan.folders)}):
            put(f"{model}/{CONFIG}".lstrip("/"), dumps(plan.config).encode())
        if rows:
            header = {"recipe": plan.recipe.name, "runtime": plan.runtime, "notes": list(plan.notes)}
            put(report.FILENAME, report.to_json(rows, header).encode())
        described = describe(plan)
        put(README, card.readme(described, plan.config, rows, self.path.name).encode())
        text = dumps(manifest(described, plan, entries)).encode()
        write_file(self.path / SUMS, sums(entries, text).encode())
        write_file(self.path / MANIFEST, text)
        self._drop_state()


def _is_shard(path: Path) -> bool:
    """A weight file of ours, whole or half-written."""
    return path.is_file() and path.name.startswith("model") and path.name.removesuffix(PARTIAL).endswith(".safetensors")


def _unlink(paths: Iterable[Path]) -> None:
    for path in list(paths):
        path.unlink()


def weight_folders(root: Path) -> list[Path]:
    """The folders in which a result, of whatever number of ranks, may have weights: rank folders, mtp/ and the root."""
    models = [root, root / MTP_FOLDER]
    ranks = [p for m in models if m.is_dir() for p in sorted(m.iterdir()) if RANK_FOLDER.fullmatch(p.name) and p.is_dir()]
    return [*ranks, *(m for m in reversed(models) if m.is_dir())]
