"""The output folder: whether it is ours, what of it is finished, and the files that are written last.

A folder is ours if it has the manifest `ernie-quant.json` (written last: the result is complete) or the private
state `.ernie-quant/` (a run has begun). Anything else that is not empty is left alone.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ernie_quant
from ernie_quant import card, recipe, report
from ernie_quant.errors import OutputError, RetryError
from ernie_quant.jsonio import dumps, read_object
from ernie_quant.plan import Plan, Shard
from ernie_quant.report import TensorReport
from ernie_quant.sources.folder import MTP_FOLDER, RANK_FOLDER
from ernie_quant.writer import PARTIAL, fsync_folder, write_file

MANIFEST, STATE, INDEX = "ernie-quant.json", ".ernie-quant", "model.safetensors.index.json"
CONFIG, README, SOURCE_README = "config.json", "README.md", "README.source.md"


class OutputFolder:
    """The folder that a plan is written to. `prepare` decides whether it may be; `finish` completes it."""

    def __init__(self, plan: Plan, path: Path) -> None:
        self.plan, self.path, self.state = plan, path, path / STATE

    def prepare(self, *, restart: bool) -> bool:
        """Make the folder ours; True if it is complete already. Raises OutputError or RetryError."""
        source = self.plan.source.folder.resolve()
        if self.path.resolve() == source or source in self.path.resolve().parents or self.path.resolve() in source.parents:
            raise OutputError(f"{self.path}: the output folder must lie beside the source {source}, not in or around it")
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path}: is a file, not a folder")
        ours = (self.path / MANIFEST).is_file() or self.state.is_dir()
        if self.path.is_dir() and not ours and any(self.path.iterdir()):
            raise OutputError(f"{self.path}: is not empty and was not made by ernie-quant; choose another folder")
        if ours and restart:
            self.state.mkdir(exist_ok=True)
            with self.lock():  # not under the feet of a run that is at work
                self._sweep()
        elif ours and self._same_plan():
            return True
        self._check_space()
        try:
            self.state.mkdir(parents=True, exist_ok=True)
            write_file(self.state / "plan.json", dumps({"fingerprint": self.plan.fingerprint}).encode())
        except OSError as error:
            kind = RetryError if error.errno in (errno.ENOSPC, errno.EDQUOT) else OutputError
            raise kind(f"{self.path}: cannot be written: {error.strerror}") from None
        return False

    def _same_plan(self) -> bool:
        """True for a complete result of this plan, False for a begun one. Raises OutputError for another plan's."""
        complete = (self.path / MANIFEST).is_file()
        file = self.path / MANIFEST if complete else self.state / "plan.json"
        state = read_object(file) if file.exists() else {}
        if state and state.get("fingerprint") != self.plan.fingerprint:
            what = "the result" if complete else "the beginning"
            raise OutputError(
                f"{self.path}: holds {what} of another plan (source, recipe, options or version differ);"
                " choose another folder, or --restart to begin anew here"
            )
        return complete

    def _sweep(self) -> None:
        """Remove what a run writes, and nothing else."""
        own = {MANIFEST, INDEX, report.FILENAME, CONFIG, README, SOURCE_README}
        for path in (p for folder in weight_folders(self.path) for p in folder.iterdir()):
            shard = path.name.startswith("model") and path.suffix == ".safetensors"
            if path.is_file() and (path.name in own or shard or path.name.endswith(PARTIAL)):
                path.unlink()
        for folder in weight_folders(self.path):  # rank folders that the new plan may not have; the loader would read them
            if folder != self.path and not any(folder.iterdir()):
                folder.rmdir()
        shutil.rmtree(self.state, ignore_errors=True)

    def _check_space(self) -> None:
        done = sum((self.path / s.filename).stat().st_size for s in self.plan.shards if (self.path / s.filename).exists())
        there = next(p for p in (self.path.resolve(), *self.path.resolve().parents) if p.exists())
        free, needed = shutil.disk_usage(there).free, self.plan.disk_bytes - done
        if free < needed:
            raise RetryError(f"{self.path}: needs {needed / 1e9:.2f} GB more, the disk has {free / 1e9:.2f} GB free")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One run at a time; the lock of a dead run vanishes with it. Raises RetryError."""
        with open(self.state / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RetryError(f"{self.path}: another run is at work in this folder") from None
            yield

    def record(self, shard: Shard, entry: dict[str, Any], reports: Sequence[TensorReport]) -> None:
        """Remember a finished file."""
        rows = [r.to_json() for r in reports]
        data = json.dumps({**entry, "reports": rows}, allow_nan=False).encode()
        write_file(self._record_of(shard), data)

    def _record_of(self, shard: Shard) -> Path:
        return self.state / f"{shard.filename.replace('/', '-')}.json"

    def finished(self, shard: Shard) -> tuple[dict[str, Any], list[TensorReport]] | None:
        """What was remembered of a file that is still there."""
        record, file = self._record_of(shard), self.path / shard.filename
        if not record.is_file() or not file.is_file():
            return None
        try:
            entry = read_object(record)
            rows = [TensorReport.from_json(r) for r in entry.pop("reports")]
        except (ernie_quant.errors.CheckpointError, KeyError, TypeError):
            return None
        return (entry, rows) if file.stat().st_size == entry.get("bytes") else None

    def finish(self, files: dict[str, dict[str, Any]], rows: Sequence[TensorReport]) -> None:
        """Write all but the weights; the manifest last. `files` has bytes and sha256 of the weight files."""
        plan, entries = self.plan, dict(files)

        def put(name: str, data: bytes) -> None:
            entries[name] = {"bytes": len(data), "sha256": write_file(self.path / name, data)}

        for source in plan.copies:
            put(SOURCE_README if source.name == README else source.name, source.read_bytes())
        for folder, shards in plan.folders.items():
            if len(shards) > 1:
                put(f"{folder}/{INDEX}".lstrip("/"), dumps(index(shards)).encode())
        for model in sorted({"", *(re.sub(r"(^|/)rank\d+$", "", folder) for folder in plan.folders)}):
            put(f"{model}/{CONFIG}".lstrip("/"), dumps(plan.config).encode())
        if rows:
            header = {"recipe": plan.recipe.name, "runtime": plan.runtime, "notes": list(plan.notes)}
            put(report.FILENAME, report.to_json(rows, header).encode())
        put(README, card.readme(plan, rows, self.path.name).encode())
        write_file(self.path / MANIFEST, dumps(manifest(plan, entries)).encode())
        shutil.rmtree(self.state)
        fsync_folder(self.path)


def weight_folders(root: Path) -> list[Path]:
    """The folders in which a result, of whatever number of ranks, may have weights: rank folders, mtp/ and the root."""
    models = [root, root / MTP_FOLDER]
    ranks = [p for m in models if m.is_dir() for p in sorted(m.iterdir()) if RANK_FOLDER.fullmatch(p.name) and p.is_dir()]
    return [*ranks, *(m for m in reversed(models) if m.is_dir())]


def index(shards: Sequence[Shard]) -> dict[str, Any]:
    """model.safetensors.index.json of the files of one folder."""
    total = sum(spec.nbytes for shard in shards for spec in shard.specs.values())
    weight_map = {name: shard.filename.rpartition("/")[2] for shard in shards for name in shard.specs}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def manifest(plan: Plan, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`ernie-quant.json`: what was made from what, and the hash of every file. No times: the same run, the same text."""
    sources = {
        os.path.relpath(f, plan.source.folder): {"bytes": f.stat().st_size} for rank in plan.source.ranks for f in rank.files
    }
    return {
        "tool": "ernie-quant",
        "version": ernie_quant.__version__,
        "fingerprint": plan.fingerprint,
        "runtime": plan.runtime,
        "layout": plan.layout,
        "recipe": recipe.as_dict(plan.recipe),
        "source": {"name": plan.source.folder.resolve().name, "files": sources},
        "files": files,
    }
