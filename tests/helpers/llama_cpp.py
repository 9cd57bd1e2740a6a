"""The real llama.cpp, on its processor backend: an independent judge of what a GGUF file says."""

from __future__ import annotations

import ctypes as c
import importlib.util
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.llama_h import PACKAGE, Refused, Token, library

CPU = Path("/proc/cpuinfo")
TOKENS = 512  # that are decoded together


def _missing() -> str:
    """Why llama.cpp cannot be asked here; empty if it can."""
    if importlib.util.find_spec(PACKAGE) is None:
        return "pip install 'ernie-quant[llama-cpp]'"
    old = platform.machine() == "x86_64" and CPU.exists() and " avx2 " not in CPU.read_text()
    return f"{PACKAGE} needs a processor with AVX2" if old else ""


needs_llama_cpp = pytest.mark.skipif(bool(_missing()), reason=_missing())


class Llama:
    """A GGUF file as llama.cpp reads it; `vocab_only`: no weights and no logits. Raises Refused.

    The settings of a judge: no repacked weights, no flash attention, keys and values cached in float32.
    """

    def __init__(self, path: Path, *, vocab_only: bool = False, n_ctx: int = 4096, threads: int = 1) -> None:
        self.library = library()
        self.c = self.library.c
        self.library.log.clear()
        self.context = None
        params = self.library.model_params()
        params.n_gpu_layers, params.use_extra_bufts = 0, False
        params.vocab_only, params.check_tensors = vocab_only, True
        self.model = self.c.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise Refused(self.library.said())
        self.vocab = self.c.llama_model_get_vocab(self.model)
        self.n_vocab: int = self.c.llama_vocab_n_tokens(self.vocab)
        if not vocab_only:
            self.context = self._open(n_ctx, threads)
        self.log = "".join(self.library.log)

    def _open(self, n_ctx: int, threads: int) -> Any:
        params = self.library.context_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, TOKENS, TOKENS
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = params.flash_attn_type = 0  # float32, float32, off
        context = self.c.llama_init_from_model(self.model, params)
        if not context:
            raise Refused(self.library.said())
        return context

    def close(self) -> None:
        """Give its memory back; nothing can be asked afterwards."""
        if self.context:
            self.c.llama_free(self.context)
        if self.model:
            self.c.llama_model_free(self.model)
        self.context = self.model = None

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- text ----------------------------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        """Ids of a text; `special`: control tokens in it are known; `bos`: what the file wants put before it is."""
        raw = text.encode()
        ids = (Token * (len(raw) + 16))()  # no token is shorter than a byte, but those around the text
        n = self.c.llama_tokenize(self.vocab, raw, len(raw), ids, len(ids), bos, special)
        assert n >= 0, f"{-n} tokens"
        return ids[:n]

    def detokenize(self, ids: Sequence[int], *, special: bool = True) -> str:
        """Text of ids; `special`: control tokens show."""
        given = (Token * len(ids))(*ids)
        room = 64 + 16 * len(ids)
        for _ in range(2):
            text = c.create_string_buffer(room)
            n = self.c.llama_detokenize(self.vocab, given, len(ids), text, room, False, special)
            if n >= 0:
                break
            room = -n
        return text.raw[:n].decode("utf-8", "replace")

    def chat_template(self) -> str | None:
        """The file's own."""
        found = self.c.llama_model_chat_template(self.model, None)
        return found.decode() if found is not None else None

    # --- logits --------------------------------------------------------------------------------------------------------

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """float32 [n, vocab], after every one of `ids`; nothing is kept from before."""
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        return np.concatenate([self._decode(ids[at : at + TOKENS], at) for at in range(0, len(ids), TOKENS)])

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        """At most `n` likeliest tokens that follow `ids`, up to an end of text."""
        row = self.logits(ids)[-1]
        found: list[int] = []
        while len(found) < n and not self.c.llama_vocab_is_eog(self.vocab, token := int(row.argmax())):
            found.append(token)
            row = self._decode([token], len(ids) + len(found) - 1)[-1]
        return found

    def _decode(self, ids: Sequence[int], at: int) -> np.ndarray:
        """Logits, float32 [n, vocab], of ids that follow the `at` ones before."""
        with self._batch(ids, at) as batch:
            code = self.c.llama_decode(self.context, batch)
        if code:
            raise Refused(f"llama_decode: {code}\n{self.library.said()}")
        rows = (self.c.llama_get_logits_ith(self.context, j) for j in range(len(ids)))
        return np.stack([np.ctypeslib.as_array(row, (self.n_vocab,)) for row in rows])

    @contextmanager
    def _batch(self, ids: Sequence[int], at: int) -> Iterator[Any]:
        batch = self.c.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for j, token in enumerate(ids):
            batch.token[j], batch.pos[j], batch.n_seq_id[j], batch.logits[j] = int(token), at + j, 1, 1
            batch.seq_id[j][0] = 0
        try:
            yield batch
        finally:
            self.c.llama_batch_free(batch)
