"""Which files of a folder are the weights, where several could be: those that transformers would load.

It looks for one file, then for an index, of safetensors before .bin (modeling_utils.py, _get_resolved_checkpoint_files);
.pdparams come last. What is not there, or is a Git LFS pointer, is passed over if something else is. Every set that is
passed over is named.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ernie_quant.errors import CheckpointError, MissingFileError
from ernie_quant.jsonio import read_object
from ernie_quant.paths import inside
from ernie_quant.readers import by_suffix
from ernie_quant.sources.parts import GGUF, models
from ernie_quant.sources.pointers import is_pointer, words

# in order of preference
KINDS = (("model", ".safetensors"), ("pytorch_model", ".bin"), ("model_state", ".pdparams"))
INDEXES = tuple(f"{stem}{suffix}.index.json" for stem, suffix in KINDS)
PATTERNS = "model*.safetensors, pytorch_model*.bin, model_state.pdparams or *.gguf"
MAX_TENSORS = 500_000  # the 300B in 2 bits has 120,000
ABSENT, POINTERS, PARTLY, THERE = range(4)


@dataclass(frozen=True)
class WeightSet:
    """Files that may be the weights: one file, those of an index, or those whose names count them.

    `broken`: what is wrong with the index, for a set that nobody may need.
    """

    title: str  # what names it in a message: the file, the index, or the first shard
    files: tuple[str, ...]
    state: int
    index: Path | None = None
    weight_map: dict[str, str] | None = None
    promised: int = 0  # files by their own names, where there is no index
    broken: str = ""

    @property
    def words(self) -> str:
        """For a note: what it is called, and why it may not be there."""
        if self.index is None:
            return self.title if len(self.files) == 1 else f"{self.title} and {len(self.files) - 1} more"
        why = {ABSENT: ", of which none is there", POINTERS: ", which are Git LFS pointers"}.get(self.state, "")
        return self.title if self.broken else f"{self.title} ({len(self.files)} file(s){why})"


@dataclass(frozen=True)
class Chosen:
    """The set that is read, and what must be said about it."""

    files: tuple[str, ...]
    index: Path | None = None
    weight_map: dict[str, str] | None = None
    anomalies: tuple[str, ...] = ()
    others: tuple[str, ...] = ()  # sets that are passed over


def choose(folder: Path, beside: Collection[str] = (), *, links: bool = False) -> Chosen | None:
    """The weights of a folder; None if there are none. `beside`: files of it that are not here.

    Raises MissingFileError for weights that are named, but not there; CheckpointError where two sets are equally good.
    """
    names = {p.name for p in folder.iterdir()}
    sets = all_sets(folder, names, links=links)
    whole = [found for found in sets if found.state == THERE]
    chosen = next((s for s in sets if s.state == THERE or (s.state == PARTLY and (s.index or not whole))), None)
    if chosen is None:
        if not sets:
            return None
        if pointers := [name for s in sets if s.state == POINTERS for name in s.files or (s.title,)]:
            raise CheckpointError(words(pointers))
        raise MissingFileError(_nothing(sets[0]))
    if chosen.broken:
        raise CheckpointError(chosen.broken)
    if pointers := [n for n in chosen.files if chosen.state == PARTLY and is_pointer(folder / n)]:
        raise CheckpointError(words(pointers))
    _refuse_a_tie(chosen, sets)
    others = [s.words for s in sets if s is not chosen] + sorted(n for n in beside if _is_first(n) and n not in names)
    others += [model.words for model in models({*names, *beside})]
    anomalies = [f"{len(chosen.files)} shards are there, their names promise {chosen.promised}"] if _lacks(chosen) else []
    if chosen.state == PARTLY and others:
        anomalies.append(f"{chosen.title}: is read before {', '.join(others)}; move it away to have the other read")
    return Chosen(chosen.files, chosen.index, chosen.weight_map, tuple(anomalies), tuple(_remarks(chosen, others)))


def all_sets(folder: Path, names: Collection[str], *, links: bool) -> list[WeightSet]:
    """Whatever could be the weights, there or not, in order of preference; without GGUF files."""
    return [found for kind in KINDS for found in _sets(folder, names, kind, links=links)]


def _lacks(found: WeightSet) -> bool:
    return found.promised != 0 and len(found.files) != found.promised


def _nothing(named: WeightSet) -> str:
    """Why there are no weights although something names some."""
    if named.files == (named.title,):
        return f"{named.title}: is a link that leads nowhere"
    some = ", ".join(named.files[:3]) + (", …" if len(named.files) > 3 else "")
    return f"{named.title}: names {len(named.files)} file(s), of which none is there ({some}); download them"


def _refuse_a_tie(chosen: WeightSet, sets: Sequence[WeightSet]) -> None:
    """Two sets of shards that differ in their number only: nothing says which was saved later."""
    suffix = PurePosixPath(chosen.files[0]).suffix if chosen.files else ""
    for other in sets:
        like = other is not chosen and other.state == THERE and other.promised and chosen.promised
        if like and PurePosixPath(other.files[0]).suffix == suffix:
            raise CheckpointError(
                f"{chosen.title} and {other.title} are the first of two complete sets of weights, and no index says which"
                " are the model's; move the others away"
            )


def _remarks(chosen: WeightSet, others: Sequence[str]) -> Iterator[str]:
    """A note on what is passed over, and which program would take it."""
    if not others:
        return
    loaders = []
    if chosen.title == "model.safetensors" and any(".safetensors" in o for o in others):
        loaders.append("transformers chooses so too, vLLM does not")
    if any(".pdparams" in o for o in others):
        loaders.append("FastDeploy would read .pdparams first")
    told = f" ({'; '.join(loaders)})" if loaders else ""
    yield f"weights are read from {chosen.title}; also there, and not read: {', '.join(others)}{told}"


def _is_first(name: str) -> bool:
    """Is it a file by which a set is found?"""
    return any(re.fullmatch(rf"{stem}(-0+1-of-\d+)?{re.escape(suffix)}", name) for stem, suffix in KINDS)


def _sets(folder: Path, names: Collection[str], kind: tuple[str, str], *, links: bool) -> Iterator[WeightSet]:
    """The sets of one kind, in order of preference."""
    stem, suffix = kind
    single, index = f"{stem}{suffix}", f"{stem}{suffix}.index.json"
    indexed = _indexed(folder, index, links=links) if index in names else None
    named = set(indexed.files) if indexed else set()
    if single in names and single not in named:
        yield WeightSet(single, (single,), _state(folder, [single], links=links))
    if indexed:
        yield indexed
    groups: dict[int, list[str]] = {}
    for name in sorted(names):
        if name not in named and (found := re.fullmatch(rf"{stem}-\d{{5,6}}-of-(\d{{5,6}}){re.escape(suffix)}", name)):
            groups.setdefault(int(found[1]), []).append(name)
    for promised, files in sorted(groups.items(), key=lambda g: (len(g[1]) != g[0], g[0])):
        state = _state(folder, files, links=links)
        if state == THERE and len(files) != promised:
            state = PARTLY
        yield WeightSet(files[0], tuple(files), state, promised=promised)


def _state(folder: Path, files: Sequence[str], *, links: bool) -> int:
    """How much of a set is there; a link that leads nowhere is nothing."""
    absent = pointers = 0
    for name in files:
        try:
            pointers += is_pointer(inside(folder, name, "the folder", links=links))
        except MissingFileError:
            absent += 1
        except CheckpointError:  # it leads out of the folder: refused by whoever reads it
            pass
    if absent == len(files):
        return ABSENT
    return POINTERS if pointers == len(files) - absent else PARTLY if absent or pointers else THERE


def _indexed(folder: Path, name: str, *, links: bool) -> WeightSet:
    if is_pointer(folder / name):
        return WeightSet(name, (), POINTERS, folder / name, broken=words([name]))
    try:
        table = weight_map(folder, folder / name, links=links)
    except CheckpointError as error:
        return WeightSet(name, (), PARTLY, folder / name, broken=str(error))
    files = tuple(sorted(set(table.values())))
    return WeightSet(name, files, _state(folder, files, links=links) if files else PARTLY, folder / name, table)


def weight_map(folder: Path, index: Path, *, links: bool = False) -> dict[str, str]:
    """Tensor -> file, as an index says. Raises CheckpointError."""
    table = read_object(inside(folder, index.name, "the folder", links=links)).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
        raise CheckpointError(f"{index.name}: has no weight_map of names to file names")
    if len(table) > MAX_TENSORS:
        raise CheckpointError(f"{index.name}: names {len(table)} tensors, more than any such model has")
    for name, file in table.items():
        if not name.isprintable():
            raise CheckpointError(f"{index.name}: names a tensor {name[:200]!r}, which is not printable")
        if PurePosixPath(file).suffix not in by_suffix().keys() - {GGUF}:  # whose files name each other
            raise CheckpointError(f"{index.name}: {name} is said to be in {file[:200]!r}, which is no weight file")
    return table
