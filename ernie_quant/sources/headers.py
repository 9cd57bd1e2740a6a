"""The headers of a folder's weight files, of every tensor-parallel rank, and what files and index disagree about."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from ernie_quant.checkpoint import Rank, Stamp, TensorRef
from ernie_quant.errors import CheckpointError, MissingFileError
from ernie_quant.paths import MTP_FOLDER, RANK_FOLDER, inside
from ernie_quant.readers import read_header
from ernie_quant.sources import sets
from ernie_quant.sources.pointers import is_pointer, words
from ernie_quant.sources.sets import Chosen, choose

RANK_PICKLE = re.compile(r"model_state\.tp(\d+)\.pdparams")


def has_ranks(root: Path) -> bool:
    """Is anything there that is named like a rank?"""
    return any(RANK_FOLDER.fullmatch(p.name) or RANK_PICKLE.fullmatch(p.name) for p in root.iterdir())


class Headers:
    """Reads them, and remembers what was found wrong.

    `slips`: of an index, where every tensor is there all the same, with a few `notes` on them; `others`: weights that are
    there and not read.
    """

    def __init__(self, root: Path, links: bool) -> None:
        self.root, self.links = root, links
        self.anomalies: list[str] = []
        self.slips: list[str] = []
        self.notes: list[str] = []
        self.others: list[str] = []

    def ranks(self, beside: Collection[str]) -> tuple[Rank, ...]:
        """All ranks, each with its part of the MTP block; one for a model that is not shared. Raises CheckpointError."""
        found = {int(m[1]): p for p in self.root.iterdir() if (m := RANK_FOLDER.fullmatch(p.name)) and p.is_dir()}
        pickles = {int(m[1]): p for p in self.root.iterdir() if (m := RANK_PICKLE.fullmatch(p.name))}
        table = found or pickles
        try:
            whole = choose(self.root, beside, links=self.links)
        except MissingFileError as error:
            if not table:
                raise
            self.others.append(f"weights are read from the ranks; {error}")
            whole = None
        if whole or not table:
            if whole and table:
                shares = ", ".join(table[i].name for i in sorted(table))
                self.others.append(f"weights are read from the folder itself; also there, and not read: {shares}")
            return (self._rank(self.root, whole),)
        if sorted(table) != list(range(len(table))):
            raise CheckpointError(f"{self.root}: has the ranks {sorted(table)}, not 0 to {len(table) - 1}")
        if found:
            return tuple(self._rank(found[i], choose(found[i], links=self.links)) for i in sorted(found))
        return tuple(self._rank(self.root, Chosen((pickles[i].name,))) for i in sorted(pickles))

    def _rank(self, folder: Path, chosen: Chosen | None) -> Rank:
        """FastDeploy reads the MTP block from a folder of its own, beside the weights or the ranks."""
        rank = self.read(folder, chosen)
        place = self.root / MTP_FOLDER / folder.relative_to(self.root)
        if not place.is_dir():
            return rank
        mtp = self.read(place, choose(place, links=self.links))
        refs = {name: ref for name, ref in mtp.refs.items() if ".mtp_" in name and name not in rank.refs}
        return Rank(rank.refs | refs, {**rank.files, **mtp.files})

    def read(self, folder: Path, chosen: Chosen | None) -> Rank:
        """One set of files, in the folder or one of its subfolders. Raises CheckpointError."""
        if not self.links and folder.resolve() != (self.root.resolve() / folder.relative_to(self.root)):
            raise CheckpointError(f"{folder.name}: is a link; open the folder that it points to, or --follow-links")
        if chosen is None:
            return Rank({}, {})
        self.anomalies += chosen.anomalies
        self.others += chosen.others
        who = chosen.index.name if chosen.index else "the folder"
        refs: dict[str, TensorRef] = {}
        files: dict[Path, Stamp] = {}
        seen: dict[tuple[int, int], Path] = {}  # links would multiply the work without multiplying the bytes
        for name in chosen.files:
            try:
                path = inside(folder, name, who, links=self.links)
            except MissingFileError as error:
                self.anomalies.append(str(error))
                continue
            if is_pointer(path):
                raise CheckpointError(words([name]))
            files[path] = Stamp.of(path)
            if (twin := seen.setdefault((path.stat().st_dev, path.stat().st_ino), path)) != path:
                raise CheckpointError(f"{name}: is the same file as {twin.name}")
            for ref in read_header(path):
                if ref.name in refs:
                    self.anomalies.append(f"{ref.name}: stands in {refs[ref.name].file.name} and again in {path.name}")
                refs[ref.name] = ref
            if len(refs) > sets.MAX_TENSORS:
                most = f"more than {sets.MAX_TENSORS} tensors, which no such model has"
                raise CheckpointError(f"{folder.name or folder}: holds {most}")
        if chosen.weight_map is not None:
            self._compare(who, chosen.weight_map, {n: ref.file.relative_to(folder) for n, ref in refs.items()}, files)
        return Rank(refs, files)

    def _compare(self, index: str, said: Mapping[str, str], there: Mapping[str, Path], files: Collection[Path]) -> None:
        """An index against the files: a tensor that is nowhere is an anomaly; programs find the others all the same."""
        readable = {file.name for file in files}
        self.anomalies += [
            f"{name}: the index says it is in {file}, which does not hold it"
            for name, file in said.items()
            if name not in there and Path(file).name in readable  # a missing file has a line of its own
        ]
        wrong = [
            f"{name}: the index says it is in {file}, it is in {there[name].name}"
            for name, file in said.items()
            if name in there and there[name] != Path(file)
        ]
        forgotten = [f"{n}: is in {there[n].name}, the index does not name it" for n in there if n not in said]
        for slips in (wrong, forgotten):
            self.slips += slips
            more = f", and {len(slips) - 1} more like it" if len(slips) > 1 else ""
            self.notes += [f"{index}: {slips[0]}{more}; the files are what is read"] if slips else []
