"""A checkpoint's tokenizer, as transformers loads it; code that comes with a checkpoint is never run."""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ernie_quant.errors import CheckpointError, TextError
from ernie_quant.jsonio import read_object
from ernie_quant.needs import install_extra

# any of the first row is a tokenizer; those of the second say more about it
VOCABULARIES = ("tokenizer.json", "tokenizer.model")
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json")
OF_SENTENCEPIECE = ("sentencepiece", "google.protobuf")  # what transformers reads a tokenizer.model with

Messages = Sequence[Mapping[str, str]]  # role and content


class Tokenizer(Protocol):
    """What this package asks of one."""

    @property
    def eos(self) -> int | None:
        """What stands between documents, if there is such a token."""
        ...

    def ids(self, text: str) -> list[int]:
        """Of a text, without anything before or after it."""
        ...

    def chat(self, messages: Messages) -> str:
        """A conversation as the model sees it."""
        ...


@dataclass(frozen=True)
class OfTransformers:
    """A tokenizer of transformers."""

    wrapped: Any

    @property
    def eos(self) -> int | None:
        """Its end of text."""
        found: int | None = self.wrapped.eos_token_id
        return found

    def ids(self, text: str) -> list[int]:
        """No token is put around it."""
        found: list[int] = self.wrapped(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def chat(self, messages: Messages) -> str:
        """By its template; without one, "role: content" lines. Raises TextError."""
        if not self.wrapped.chat_template:
            return plain_chat(messages)
        try:
            return str(self.wrapped.apply_chat_template(list(messages), tokenize=False))
        except Exception as error:  # a template is a stranger's program, in a sandbox
            raise TextError(f"the tokenizer's chat template does not take {messages[0]['role']!r:.40} first: {error}") from None


def plain_chat(messages: Messages) -> str:
    """Without a template."""
    return "".join(f"{message['role']}: {message['content']}\n" for message in messages)


def has_tokenizer(folder: Path) -> bool:
    """Is there one to be loaded?"""
    return any((folder / name).is_file() for name in VOCABULARIES)


def check_tokenizer(folder: Path) -> None:
    """Is there one, and what it is loaded with? Raises TextError, which names the files that were looked for."""
    if not has_tokenizer(folder):
        raise TextError(f"{folder}: has no tokenizer (looked for {', '.join(VOCABULARIES)}); copy it there from the source")
    needed = ("transformers", *(() if (folder / VOCABULARIES[0]).is_file() else OF_SENTENCEPIECE))
    if missing := [name for name in needed if not _installed(name)]:
        raise TextError(f"{folder}: its tokenizer needs {' and '.join(missing)}: {install_extra('calibration')}")


def tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer in a checkpoint's folder. Raises TextError."""
    check_tokenizer(folder)
    import transformers

    with tempfile.TemporaryDirectory() as place, _Quiet(transformers):
        _only_its_files(folder, Path(place))
        try:
            return OfTransformers(transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False))
        except Exception as error:  # whatever a library makes of a damaged file
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TextError(f"{folder}: its tokenizer cannot be loaded: {why:.300}") from None


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _only_its_files(folder: Path, place: Path) -> None:
    """Copies of what makes a tokenizer, without a word of code to be loaded, and the kind of model.

    transformers knows for some kinds of models that the class in tokenizer_config.json is not to be believed.
    """
    for name in (*VOCABULARIES, *BESIDE):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, place / name)
    for name in ("tokenizer_config.json", "config.json"):
        with suppress(CheckpointError):
            said = read_object(folder / name)
            kept = {"model_type": said.get("model_type")} if name == "config.json" else said
            (place / name).write_text(json.dumps({key: value for key, value in kept.items() if key != "auto_map"}))


class _Quiet:
    """transformers says nothing on stderr meanwhile."""

    def __init__(self, transformers: Any) -> None:
        self.logging = transformers.utils.logging

    def __enter__(self) -> None:
        self.before = self.logging.get_verbosity()
        self.logging.set_verbosity_error()

    def __exit__(self, *_: object) -> None:
        self.logging.set_verbosity(self.before)
