"""llama.cpp itself, on the CPU: what it computes with a GGUF file, and ggml's own quantizers.

python benchmarks/llama_cpp.py MODEL.gguf "The capital of France is"    # one greedy sentence

It is the shared object of the PyPI package xllamacpp, called by its C functions: nothing is compiled, logits are all there.
Structs that llama.h passes by value are declared here and compared with the library's defaults, so that another version is
refused and not misread. Weights are not repacked, the KV cache is float32.
"""

from __future__ import annotations

import argparse
import ctypes as C
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

PACKAGE = "xllamacpp"
POINTER, I32, U32, F32, BOOL = C.c_void_p, C.c_int32, C.c_uint32, C.c_float, C.c_bool
LOG = C.CFUNCTYPE(None, C.c_int, C.c_char_p, POINTER)
BATCH = 512
TYPE_F32 = 0


class ModelParams(C.Structure):
    """llama_model_params."""

    _fields_ = [
        ("devices", POINTER), ("tensor_buft_overrides", POINTER), ("n_gpu_layers", I32), ("split_mode", I32), ("load_mode", I32),
        ("lazy_mode", I32), ("main_gpu", I32), ("tensor_split", POINTER), ("progress_callback", POINTER),
        ("progress_data", POINTER), ("kv_overrides", POINTER), ("vocab_only", BOOL), ("check_tensors", BOOL),
        ("use_extra_bufts", BOOL), ("no_host", BOOL), ("no_alloc", BOOL), ("load_mtp", BOOL), ("_slack", C.c_ubyte * 64),
    ]  # fmt: skip
    defaults = {"n_gpu_layers": -1, "split_mode": 1, "main_gpu": 0, "vocab_only": False, "use_extra_bufts": True}


class ContextParams(C.Structure):
    """llama_context_params."""

    _fields_ = [
        *((name, U32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max")),
        ("n_outputs_max_per_seq", U32),
        *((name, I32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type", "pooling_type")),
        *((name, I32) for name in ("attention_type", "flash_attn_type")),
        *((name, F32) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
        *((name, F32) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", U32), ("defrag_thold", F32), ("cb_eval", POINTER), ("cb_eval_data", POINTER),
        ("type_k", I32), ("type_v", I32), ("moe_cache_size", C.c_size_t), ("abort_callback", POINTER), ("abort_data", POINTER),
        *((name, BOOL) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        ("samplers", POINTER), ("n_samplers", C.c_size_t), ("ctx_other", POINTER),
    ]  # fmt: skip
    defaults = {
        "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "type_k": 1, "type_v": 1, "pooling_type": -1,
        "attention_type": -1, "flash_attn_type": -1, "yarn_ext_factor": -1.0, "embeddings": False, "samplers": None,
        "ctx_other": None,
    }  # fmt: skip


class Batch(C.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", I32), ("token", C.POINTER(I32)), ("embd", POINTER), ("pos", C.POINTER(I32)), ("n_seq_id", C.POINTER(I32)),
        ("seq_id", C.POINTER(C.POINTER(I32))), ("logits", C.POINTER(C.c_int8)),
    ]  # fmt: skip


FUNCTIONS = {
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (POINTER, [C.c_char_p, ModelParams]),
    "llama_init_from_model": (POINTER, [POINTER, ContextParams]),
    "llama_model_free": (None, [POINTER]),
    "llama_free": (None, [POINTER]),
    "llama_model_get_vocab": (POINTER, [POINTER]),
    "llama_vocab_n_tokens": (I32, [POINTER]),
    "llama_vocab_eos": (I32, [POINTER]),
    "llama_get_memory": (POINTER, [POINTER]),
    "llama_memory_clear": (None, [POINTER, BOOL]),
    "llama_batch_init": (Batch, [I32, I32, I32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (I32, [POINTER, Batch]),
    "llama_get_logits_ith": (C.POINTER(F32), [POINTER, I32]),
    "llama_tokenize": (I32, [POINTER, C.c_char_p, I32, C.POINTER(I32), I32, BOOL, BOOL]),
    "llama_token_to_piece": (I32, [POINTER, I32, C.c_char_p, I32, I32, BOOL]),
    "ggml_quantize_init": (None, [C.c_int]),
    "ggml_row_size": (C.c_size_t, [C.c_int, C.c_int64]),
    "ggml_quantize_chunk": (C.c_size_t, [C.c_int, POINTER, POINTER, C.c_int64, C.c_int64, C.c_int64, POINTER]),
    "ggml_validate_row_data": (BOOL, [C.c_int, POINTER, C.c_size_t]),
}


class Refused(Exception):
    """By llama.cpp, with the end of what it said."""


def library() -> C.CDLL:
    """The shared object. Raises OSError where it is not installed, or not for this processor (it needs AVX2)."""
    spec = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(spec.origin).parent.glob(f"{PACKAGE}*.so")) if spec and spec.origin else []
    if not files:
        raise OSError("llama.cpp is not there: pip install '.[llama-cpp]'")
    found = C.CDLL(str(files[0]))
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


class Llama:
    """One model and, unless `vocab_only`, one context; each call begins with an empty cache. A context manager."""

    def __init__(self, path: Path, *, vocab_only: bool = False, context: int = 2048, threads: int = 1) -> None:
        self.lib, self.said = library(), []
        self._log = LOG(lambda level, text, _: self.said.append(text.decode("utf-8", "replace")))
        self.lib.llama_log_set(self._log, None)
        self.lib.llama_backend_init()
        model, run = self.lib.llama_model_default_params(), self.lib.llama_context_default_params()
        for found in (model, run):
            if {name: getattr(found, name) for name in found.defaults} != found.defaults:
                raise OSError(f"{PACKAGE}: llama.h of another version, its structs are not those of this file")
        model.n_gpu_layers, model.vocab_only, model.check_tensors, model.use_extra_bufts = 0, vocab_only, True, False
        self.context = None
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), model)
        if not self.model:
            raise Refused("".join(self.said)[-3000:])
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        if vocab_only:
            return
        run.n_ctx, run.n_batch, run.n_ubatch, run.n_threads, run.n_threads_batch = context, BATCH, BATCH, threads, threads
        run.type_k = run.type_v = TYPE_F32
        run.flash_attn_type = 0
        self.context = self.lib.llama_init_from_model(self.model, run)
        if not self.context:
            raise Refused("".join(self.said)[-3000:])

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        if self.context:
            self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def rows(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        """Logits float32 [vocab] of every position."""
        size = self.lib.llama_vocab_n_tokens(self.vocab)
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        for at in range(0, len(ids), BATCH):
            part = ids[at : at + BATCH]
            batch = self.lib.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for j, token in enumerate(part):
                batch.token[j], batch.pos[j], batch.n_seq_id[j], batch.logits[j] = int(token), at + j, 1, 1
                batch.seq_id[j][0] = 0
            code = self.lib.llama_decode(self.context, batch)
            self.lib.llama_batch_free(batch)
            if code:
                raise Refused("".join(self.said)[-2000:])
            for j in range(len(part)):
                yield np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, j), (size,)).copy()

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """float32 [tokens, vocab]."""
        return np.stack(list(self.rows(np.asarray(ids))))

    def tokens(self, text: str, *, special: bool = False) -> list[int]:
        """Of a text, with what the file says of beginnings and spaces; `special` ones are read where they stand."""
        raw = text.encode()
        found = (I32 * (len(raw) + 16))()
        count = self.lib.llama_tokenize(self.vocab, raw, len(raw), found, len(found), True, special)
        return list(found[:count])

    def piece(self, token: int) -> bytes:
        """What a token stands for."""
        found = C.create_string_buffer(256)
        count = self.lib.llama_token_to_piece(self.vocab, token, found, 256, 0, True)
        return found.raw[:count]

    def sentence(self, prompt: str, most: int = 24) -> str:
        """The prompt and its greedy continuation, up to the first full stop."""
        ids, made = self.tokens(prompt), b""
        for _ in range(most):
            token = int(self.logits(np.array(ids))[-1].argmax())
            if token == self.lib.llama_vocab_eos(self.vocab):
                break
            ids.append(token)
            made += self.piece(token)
        return prompt + re.split(r"(?<=[.!?])\s", made.decode("utf-8", "replace"), maxsplit=1)[0].rstrip()


class Ggml:
    """ggml's own encoders and decoders, by the numbers of types."""

    class Traits(C.Structure):
        """ggml_type_traits."""

        _fields_ = [
            ("type_name", C.c_char_p), ("blck_size", C.c_int64), ("blck_size_interleave", C.c_int64), ("type_size", C.c_size_t),
            ("is_quantized", BOOL), ("to_float", POINTER), ("from_float_ref", POINTER),
        ]  # fmt: skip

    def __init__(self) -> None:
        self.lib = library()
        self.lib.ggml_get_type_traits.restype = C.POINTER(self.Traits)
        self.lib.ggml_get_type_traits.argtypes = [C.c_int]

    def quantize(self, number: int, values: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        """uint8 [rows, bytes] of float32 [rows, in]; importance: float32 [in]."""
        values = np.ascontiguousarray(values, np.float32)
        rows, width = values.shape
        self.lib.ggml_quantize_init(number)
        out = np.empty((rows, self.lib.ggml_row_size(number, width)), np.uint8)
        weights = None if importance is None else np.ascontiguousarray(importance, np.float32).ctypes.data
        self.lib.ggml_quantize_chunk(number, values.ctypes.data, out.ctypes.data, 0, rows, width, weights)
        return out

    def dequantize(self, number: int, blocks: np.ndarray, width: int) -> np.ndarray:
        """float32 [rows, in] of uint8 [rows, bytes]."""
        blocks = np.ascontiguousarray(blocks)
        out = np.empty((len(blocks), width), np.float32)
        function = C.CFUNCTYPE(None, POINTER, POINTER, C.c_int64)(self.lib.ggml_get_type_traits(number).contents.to_float)
        function(blocks.ctypes.data, out.ctypes.data, out.size)
        return out

    def is_valid(self, number: int, blocks: np.ndarray) -> bool:
        """Does its check of loaded data pass?"""
        blocks = np.ascontiguousarray(blocks)
        return bool(self.lib.ggml_validate_row_data(number, blocks.ctypes.data, blocks.nbytes))


def main() -> None:
    """Read the command line, print the sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("prompt")
    args = parser.parse_args()
    with Llama(args.model) as llama:
        print(llama.sentence(args.prompt))


if __name__ == "__main__":
    main()
