"""Which tokens begin and end a text, and which ones files add."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ernie_quant.errors import CheckpointError
from ernie_quant.vocabulary._files import ADDED, GENERATION, SETTINGS, SPECIAL, Files, content, special_names
from ernie_quant.vocabulary._table import UNKNOWN, Added, Token

CONFIG = "config.json"
# name in these files -> llama.cpp's
NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
TEXTS = {"bos": "<s>", "eos": "</s>"}  # where no file says anything, as in Baidu's Ernie4_5_Tokenizer
ENDS = ("eos", "eot", "eom")  # llama.cpp stops at each of them


def added_tokens(files: Files) -> Iterator[Added]:
    """added_tokens.json, then added_tokens_decoder of tokenizer_config.json. Raises CheckpointError."""
    special = {*special_names(files)}
    for text, i in files.table(ADDED).items():
        if type(i) is not int:
            raise CheckpointError(f"{ADDED}: {text!r:.60} has the id {i!r:.40}")
        yield Added(i, text, text in special, ADDED)
    decoder = files.settings().get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise CheckpointError(f"{SETTINGS}: added_tokens_decoder is no object")
    for key, value in decoder.items():
        found = content(value)
        if not (key.isascii() and key.isdigit() and len(key) < 10) or found is None:
            raise CheckpointError(f"{SETTINGS}: {key!r:.20}: {value!r:.60} of added_tokens_decoder is no token")
        yield Added(int(key), found, isinstance(value, dict) and bool(value.get("special")), SETTINGS)


def without_id(files: Files, tokens: list[Token]) -> list[str]:
    """A note of the special tokens that have no id: whoever loads the tokenizer may give them one of the free ids."""
    known = {token.text for token in tokens}
    missing = [name for name in dict.fromkeys(special_names(files)) if name not in known]
    some = ", ".join(f"{name!r:.40}" for name in missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    return [f"{some}: named as special, but no file gives an id; left out"] if missing else []


def special_ids(files: Files, config: Mapping[str, Any], tokens: list[Token], template: str) -> tuple[dict[str, int], list[str]]:
    """llama.cpp's name -> id, and notes. Raises CheckpointError for an id that is none.

    generation_config.json is believed first, for it says how the model is run; then config.json; then the files of the
    tokenizer, which name a token by its text.
    """
    numbers = {token.text: i for i, token in enumerate(tokens)}
    named = {name: _by_name(files, name, numbers) for name in (*NAMES, "sep")}
    found: dict[str, int] = {}
    notes: list[str] = []
    for name, theirs in NAMES.items():
        ids = _ids(files, config, name, len(tokens)) or named[name]
        if name == "unk" and not ids:
            ids = [i for i, token in enumerate(tokens) if token.kind == UNKNOWN]
        if name == "eos" and not ids:
            notes.append("no file names the token at which a text ends: llama.cpp may not stop, or stop at another one")
        elif name == "eos":
            ends = _ends(ids, named["sep"], template, tokens)
            found |= dict(zip(ENDS, ends, strict=False))
            notes += [f"llama.cpp knows three ends of a text; {ends[3:]} are left out"] if ends[3:] else []
        elif ids:
            found[theirs] = ids[0]
    return found, notes


def _ends(eos: list[int], sep: list[int], template: str, tokens: list[Token]) -> list[int]:
    """Where an answer ends: ERNIE's chat template prints the sep token behind each, where a model may print it too."""
    printed = [i for i in sep if "sep_token" in template or tokens[i].text in template]
    return list(dict.fromkeys([*eos, *printed]))


def _ids(files: Files, config: Mapping[str, Any], name: str, rows: int) -> list[int]:
    text = config.get("text_config")
    places = [(GENERATION, files.table(GENERATION)), (CONFIG, config), (CONFIG, text if isinstance(text, Mapping) else {})]
    for file, table in places:
        value = table.get(f"{name}_token_id")
        ids = [i for i in (value if isinstance(value, list) else [value]) if i is not None]
        for i in ids:
            if type(i) is not int or i >= rows:
                raise CheckpointError(f"{file}: {name}_token_id is {i!r:.40}, but the embedding has {rows} rows")
        if found := [i for i in ids if i >= 0]:  # -1: there is none
            return found
    return []


def _by_name(files: Files, name: str, numbers: Mapping[str, int]) -> list[int]:
    texts = [content(files.table(file).get(f"{name}_token")) for file in (SETTINGS, SPECIAL)] + [TEXTS.get(name)]
    return [numbers[text] for text in texts if text is not None and text in numbers][:1]
