"""A model in GGUF: one file, or parts that count themselves. What it is, its keys say; config.json beside it is not read.

Keys of split files: ggml-org/llama.cpp, src/llama-arch.cpp (LLM_KV_SPLIT_NO and those after it).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ernie_quant.archs import _gguf
from ernie_quant.checkpoint import Rank
from ernie_quant.errors import CheckpointError, MissingFileError
from ernie_quant.paths import CONFIG, inside
from ernie_quant.readers import read_keys
from ernie_quant.sources import sets
from ernie_quant.sources.headers import Headers, has_ranks
from ernie_quant.sources.parts import Model, model_with, models, number_of
from ernie_quant.sources.pointers import is_pointer, words

NO, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"


def model_at(path: Path, *, links: bool) -> Model:
    """The model that a file is of, or is part of. Raises CheckpointError."""
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: there is no such file")
    inside(path.parent, path.name, "the command", links=links)
    return model_with(path.name, [p.name for p in path.parent.iterdir()])


def only_model(folder: Path, *, links: bool) -> Model | None:
    """The one model of a folder that holds no other weights; None if there is none. Raises CheckpointError for several."""
    found = models(names := {path.name for path in folder.iterdir()})
    if not found or has_ranks(folder) or any(_is_there(s) for s in sets.all_sets(folder, names, links=links)):
        return None
    there = [model for model in found if not is_pointer(folder / model.title)]
    if not there:
        raise CheckpointError(words([name for model in found for name in model.files]))
    if len(there) > 1:
        named = ", ".join(f"{m.title} ({len(m.files)} files)" if m.promised > 1 else m.title for m in there)
        raise CheckpointError(f"{folder}: holds {len(there)} models; open the file of one, not the folder: {named}")
    return there[0]


def _is_there(found: sets.WeightSet) -> bool:
    """Would it be read, or refused for what it lacks?"""
    return found.state in (sets.PARTLY, sets.THERE)


def read(headers: Headers, model: Model) -> tuple[Rank, dict[str, Any], list[str]]:
    """Tensors, what config.json would say, and notes. Raises CheckpointError or ConfigError.

    Of parts that contradict each other `headers` gets anomalies.
    """
    folder, first = headers.root, model.title
    if number_of(first) != 1:
        raise MissingFileError(f"{first}: is a part of a model; the first part, which says what the model is, is not there")
    inside(folder, first, "the folder", links=headers.links)
    others = [s.words for s in sets.all_sets(folder, {p.name for p in folder.iterdir()}, links=headers.links)]
    told = [f"weights are read from {first}; also there, and not read: {', '.join(others)}"] if others else []
    rank = headers.read(folder, sets.Chosen(model.files, anomalies=tuple(_missing(model)), others=tuple(told)))
    keys = read_keys(folder / first)
    split = {file.name: _split(keys if file.name == first else read_keys(file)) for file in rank.files}
    _check_kind(model, keys)
    headers.anomalies += _disagreements(model, split, len(rank.refs))
    specs = {name: ref.spec for name, ref in rank.refs.items()}
    types = {name: spec.dtype for name, spec in specs.items()}
    config = _gguf.config_of(keys, specs) | {"quantization_config": {"quant_method": "gguf", "types": types}}
    beside = [f"{CONFIG}: is not read; the keys of {first} say what the model is"] if (folder / CONFIG).exists() else []
    return rank, config, beside


def _missing(model: Model) -> Iterator[str]:
    if missing := model.missing:
        few = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        yield f"{len(model.files)} of {model.promised} parts are there; not there: {few}"


def _split(keys: Mapping[str, object]) -> dict[str, object]:
    return {name: keys.get(name) for name in (NO, COUNT, TENSORS)}


def _check_kind(model: Model, keys: Mapping[str, object]) -> None:
    if (kind := keys.get("general.type", "model")) != "model":
        raise CheckpointError(f"{model.title}: is no model; its general.type is {kind!r:.80}")
    if model.promised == 1 and keys.get(COUNT) not in (None, 0, 1):  # 0 is what merging leaves
        raise CheckpointError(
            f"{model.title}: is a part of a split model ({COUNT} is {keys[COUNT]!r:.40}), whose name should end with"
            " -00001-of-00003.gguf or the like"
        )


def _disagreements(model: Model, split: Mapping[str, Mapping[str, object]], tensors: int) -> Iterator[str]:
    """What parts say of themselves, beside their names and what is in them."""
    if model.promised == 1:
        return
    whole = len(split) == model.promised
    for name, said in split.items():
        number = number_of(name) - 1
        if (said[NO], said[COUNT]) != (number, model.promised):
            yield (
                f"{name}: {NO} is {said[NO]!r:.40} and {COUNT} {said[COUNT]!r:.40}; by its name they are {number} and"
                f" {model.promised}"
            )
        if whole and said[TENSORS] != tensors:
            yield f"{name}: {TENSORS} is {said[TENSORS]!r:.40}, the parts hold {tensors}"
