"""The output folder: whether it is ours, what of it is finished, and the files that are written last.

A folder is ours if it has the manifest `ernie-quant.json` (written last: the result is complete) or the private
state `.ernie-quant/` (a run has begun). Anything else that is not empty is left alone.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ernie_quant import writers
from ernie_quant.disk import FULL, PARTIAL, file_sha256, fsync_folder, hold, write_file
from ernie_quant.errors import AnotherPlanError, CheckpointError, OutputError, RetryError
from ernie_quant.jsonio import dumps, read_object
from ernie_quant.paths import CONFIG, MANIFEST, README, SOURCE_README, STATE, SUMS, inside, is_place, weight_folders
from ernie_quant.planning.identity import changes, libraries
from ernie_quant.planning.steps import Plan, Shard
from ernie_quant.reporting import rows as report
from ernie_quant.reporting.rows import ShardResult
from ernie_quant.result import room
from ernie_quant.threads import Progress, in_proportion

BEGUN, SWEPT = "plan.json", "swept.json"  # in the private state: what was begun; the manifest of a result that is dropped
LOCK, PREPARING, SHARE = "lock", "preparing", "share-"  # of the whole folder, of its beginning, of a share
JUST_FINISHED = "another run has just finished here; run the same command again"


class OutputFolder:
    """The folder that a plan is written to. `begin` decides whether it may be, and locks it; `finish` completes it."""

    SHARED = False  # does it lock the folder for itself alone?

    def __init__(self, path: Path) -> None:
        self.path, self.state = path, path / STATE
        self.unsplit = self.state / "unsplit"  # a result that is made only to be shared among ranks
        self.calibration = self.state / "calibration"  # weights that text has been run through, layer by layer

    @contextmanager
    def begin(self, plan: Plan, *, restart: bool, copies: int = 1, space_check: bool = True) -> Iterator[bool]:
        """Hold the folder for a run of `plan`; gives True if it is complete already.

        `copies`: how often the disk must have room for the result, unless nobody asks (`space_check`).
        Raises OutputError or RetryError.
        """
        self._refuse_strangers(plan)
        if self._is_complete() and not restart and not self.state.is_dir():
            self._check_complete(plan)
            yield True
            return
        room.check_names(plan, self.path)
        if space_check:
            room.check_space(plan, self.path, self._given_back(), copies)
        try:
            self.state.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None
        with self._lock():
            complete = self._is_complete() and not restart
            if complete:  # finished by another run just now, or by one that was killed before it had swept its state
                self._check_complete(plan)
                self.drop_state()
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
        place = self.state / LOCK
        with ExitStack() as stack:
            try:
                file = stack.enter_context(hold(place, self._busy(), shared=self.SHARED))
            except FileNotFoundError:
                raise RetryError(f"{self.path}: {JUST_FINISHED}") from None
            except OSError as error:
                raise self._unwritable(error) from None
            if not (place.exists() and os.path.samestat(os.fstat(file.fileno()), place.stat())):
                raise RetryError(f"{self.path}: {JUST_FINISHED}")  # between our two steps, and swept its lock
            yield

    def _busy(self) -> str:
        return f"{self.path}: another run is at work in this folder"

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
        times = {plan.source.name_of(path): stamp.mtime_ns for path, stamp in plan.source.changeable.items()}
        now = {**plan.identity, "libraries": libraries(), "mtime_ns": times}
        begun = self.state / BEGUN
        if begun.is_file() and not restart:
            self._refuse("holds the beginning of another plan", read_object(begun).get("identity"), now)
            self._drop_partials(plan)
        else:
            self._sweep()
        files = [
            shard.filename for shard in plan.shards if plan.format.SELF_CONTAINED
        ]  # whose names do not tell that they are ours
        copied = sorted({*plan.copied, *files, *self._copied()})  # an earlier run may have copied what is gone by now
        try:
            write_file(begun, dumps({"identity": now, "copied": copied}).encode())
        except OSError as error:
            raise self._unwritable(error) from None

    def _drop_partials(self, plan: Plan) -> None:
        _unlink(path for folder in (*weight_folders(self.path), self.state) for path in folder.glob(f"*{PARTIAL}"))

    def _sweep(self) -> None:
        """Remove what a run writes, and nothing else; from the first step on the folder is not complete."""
        if self._is_complete():
            os.replace(self.path / MANIFEST, self.state / SWEPT)
            fsync_folder(self.path)
        copied = self._copied()
        pages = (report.FILENAME, report.PAGE, report.COMPARISON)
        own = {MANIFEST, SUMS, *writers.indexes(), *pages, CONFIG, README, SOURCE_README, *copied}
        for folder in weight_folders(self.path):
            found = [p for p in folder.iterdir() if p.is_symlink() or p.is_file()]
            _unlink(p for p in found if p.name in own or _is_shard(p) or p.name.endswith(PARTIAL))
            if folder != self.path and not any(folder.iterdir()):  # ranks that the new plan may not have; a loader reads them
                folder.rmdir()
        self._drop_below(copied)
        _unlink(p for name in report.PLOTS if (p := self.path / report.PLOTS_FOLDER / name).is_file())
        for place in (self.unsplit, self.calibration):
            shutil.rmtree(place, ignore_errors=True)
        fsync_folder(self.path)
        _unlink(p for p in self.state.iterdir() if p.name not in (LOCK, PREPARING, SWEPT) and not p.name.startswith(SHARE))
        (self.state / SWEPT).unlink(missing_ok=True)

    def _copied(self) -> set[str]:
        """Files of the source that an earlier run carried along."""
        found: set[str] = set()
        for name, key in ((SWEPT, "files"), (BEGUN, "copied")):
            with suppress(CheckpointError):  # one that cannot be read any more names nothing
                found |= set(map(str, read_object(self.state / name).get(key) or ()))
        return found

    def forget_copies(self, kept: Collection[str]) -> None:
        """Drop what an earlier run has carried along, and this one has not."""
        gone = self._copied() - {*kept}
        _unlink(p for name in gone if "/" not in name and (p := self.path / name).is_file())
        self._drop_below(gone)

    def _drop_below(self, names: Iterable[str]) -> None:
        """Carried files in subfolders, and the subfolders where they are empty then."""
        for name in sorted(name for name in names if "/" in name and not is_place(name.partition("/")[0])):
            with suppress(CheckpointError, OSError):  # not there, or not empty
                path = inside(self.path, name, MANIFEST)
                path.unlink()
                for folder in [f for f in path.parents if self.path in f.parents]:
                    folder.rmdir()

    def drop_state(self) -> None:
        """The lock last: another run may come at any moment, and may finish what this one begins here."""
        for path in [p for p in self.state.iterdir() if p.name != LOCK]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        with suppress(OSError):
            (self.state / LOCK).unlink()
            self.state.rmdir()
        fsync_folder(self.path)

    def _given_back(self) -> int:
        """Bytes that weight files take already, or will give back."""
        places = [*weight_folders(self.path), *weight_folders(self.unsplit)]
        calibrated = [p for p in self.calibration.iterdir() if p.is_file()] if self.calibration.is_dir() else []
        return sum(p.stat().st_size for p in [*calibrated, *(p for f in places for p in f.iterdir() if _is_shard(p))])

    def record(self, result: ShardResult) -> None:
        """Remember a finished file."""
        write_file(self._record_of(result.filename), json.dumps(result.to_json(), allow_nan=False).encode())

    def _record_of(self, filename: str) -> Path:
        return self.state / f"{filename.replace('/', '-')}.json"

    def finished(self, shard: Shard, progress: Progress) -> ShardResult | None:
        """What was remembered of a file that is still there, and still what it was."""
        record, file = self._record_of(shard.filename), self.path / shard.filename
        if not record.is_file() or not file.is_file():
            return None
        try:
            result = ShardResult.from_json(shard.filename, read_object(record))
        except (CheckpointError, KeyError, TypeError):
            return None
        if file.stat().st_size != result.nbytes:
            return None
        if file_sha256(file, in_proportion(progress, result.nbytes, shard.nbytes_in)) == result.sha256:
            return result
        progress(-shard.nbytes_in)  # all of it is to be done again
        return None


def _is_shard(path: Path) -> bool:
    """A weight file of ours, whole or half-written."""
    return path.is_file() and path.name.startswith("model") and path.name.removesuffix(PARTIAL).endswith(writers.extensions())


def _unlink(paths: Iterable[Path]) -> None:
    for path in list(paths):
        path.unlink()
