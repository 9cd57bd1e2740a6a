"""llama.h of the package xllamacpp, one shared object that exports all of it, so nothing is compiled.

The two structs that it passes by value are declared here and held against the library's own defaults: a version whose layout
differs is refused, not misread.
"""

from __future__ import annotations

import ctypes as c
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGE = "xllamacpp"  # 2026.10.11549 is llama.cpp b11549
Token = c.c_int32
_ptr, _i32, _u32, _f32, _bool, _size, _text = c.c_void_p, c.c_int32, c.c_uint32, c.c_float, c.c_bool, c.c_size_t, c.c_char_p
_log_type = c.CFUNCTYPE(None, c.c_int, _text, _ptr)


class Refused(Exception):
    """llama.cpp does not take the file; the text is the end of its log."""


def _struct(name: str, *fields: tuple[str, type]) -> type[c.Structure]:
    """A C struct: names with spaces between them, and their type."""
    return type(name, (c.Structure,), {"_fields_": [(n, kind) for names, kind in fields for n in names.split()]})


# the bytes at the end hold what a later llama.h may add
ModelParams = _struct(
    "ModelParams",
    ("devices tensor_buft_overrides", _ptr),
    ("n_gpu_layers split_mode load_mode lazy_mode main_gpu", _i32),
    ("tensor_split progress_callback progress_data kv_overrides", _ptr),
    ("vocab_only check_tensors use_extra_bufts no_host no_alloc load_mtp", _bool),
    ("slack", c.c_ubyte * 64),
)
MODEL_DEFAULTS = {
    "devices": None, "n_gpu_layers": -1, "split_mode": 1, "main_gpu": 0, "vocab_only": False, "check_tensors": False,
    "use_extra_bufts": True, "no_host": False, "no_alloc": False,
}  # fmt: skip


def _context_params(moe_cache: bool) -> type[c.Structure]:
    """llama_context_params; llama.cpp 0.6 put moe_cache_size into it."""
    return _struct(
        "ContextParams",
        ("n_ctx n_batch n_ubatch n_seq_max n_rs_seq n_outputs_max n_outputs_max_per_seq", _u32),
        ("n_threads n_threads_batch ctx_type rope_scaling_type pooling_type attention_type flash_attn_type", _i32),
        ("rope_freq_base rope_freq_scale yarn_ext_factor yarn_attn_factor yarn_beta_fast yarn_beta_slow", _f32),
        ("yarn_orig_ctx", _u32),
        ("defrag_thold", _f32),
        ("cb_eval cb_eval_data", _ptr),
        ("type_k type_v", _i32),
        ("moe_cache_size" if moe_cache else "", _size),
        ("abort_callback abort_data", _ptr),
        ("embeddings offload_kqv no_perf op_offload swa_full kv_unified", _bool),
        ("samplers", _ptr),
        ("n_samplers", _size),
        ("ctx_other", _ptr),
    )


CONTEXT_DEFAULTS = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "type_k": 1, "type_v": 1, "pooling_type": -1,
    "attention_type": -1, "flash_attn_type": -1, "yarn_ext_factor": -1.0, "embeddings": False, "offload_kqv": True,
    "no_perf": True, "samplers": None, "n_samplers": 0, "ctx_other": None,
}  # fmt: skip
Batch = _struct(
    "Batch",
    ("n_tokens", _i32),
    ("token", c.POINTER(Token)),
    ("embd", _ptr),
    ("pos n_seq_id", c.POINTER(_i32)),
    ("seq_id", c.POINTER(c.POINTER(_i32))),
    ("logits", c.POINTER(c.c_int8)),
)

# of llama.h: what a function returns and takes
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_model_default_params": (ModelParams, []),
    "llama_model_load_from_file": (_ptr, [_text, ModelParams]),
    "llama_model_free": (None, [_ptr]),
    "llama_model_chat_template": (_text, [_ptr, _text]),
    "llama_model_get_vocab": (_ptr, [_ptr]),
    "llama_vocab_n_tokens": (_i32, [_ptr]),
    "llama_vocab_get_add_bos": (_bool, [_ptr]),
    "llama_vocab_is_eog": (_bool, [_ptr, Token]),
    "llama_vocab_bos": (Token, [_ptr]),
    "llama_vocab_eos": (Token, [_ptr]),
    "llama_vocab_pad": (Token, [_ptr]),
    "llama_tokenize": (_i32, [_ptr, _text, _i32, c.POINTER(Token), _i32, _bool, _bool]),
    "llama_detokenize": (_i32, [_ptr, c.POINTER(Token), _i32, _text, _i32, _bool, _bool]),
    "llama_free": (None, [_ptr]),
    "llama_get_memory": (_ptr, [_ptr]),
    "llama_memory_clear": (None, [_ptr, _bool]),
    "llama_batch_init": (Batch, [_i32, _i32, _i32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (_i32, [_ptr, Batch]),
    "llama_get_logits_ith": (c.POINTER(_f32), [_ptr, _i32]),
}


class Library:
    """The shared object, its parameters, and its log since a file was opened. One for a process: it has one log."""

    def __init__(self) -> None:
        found = importlib.util.find_spec(PACKAGE)
        assert found
        assert found.origin
        self.c = c.CDLL(str(next(Path(found.origin).parent.glob(f"{PACKAGE}*.so"))))
        self.log: list[str] = []
        self._hears = _log_type(lambda _, text, __: self.log.append(text.decode("utf-8", "replace")))
        self._declare("llama_log_set", None, [_log_type, _ptr])
        self.c.llama_log_set(self._hears, None)
        for name, (result, arguments) in FUNCTIONS.items():
            self._declare(name, result, arguments)
        self.c.llama_backend_init()
        self.model_params = self.c.llama_model_default_params
        self.context_params = self._fitting()

    def _declare(self, name: str, result: Any, arguments: list[Any]) -> None:
        function = getattr(self.c, name)
        function.restype, function.argtypes = result, arguments

    def _fitting(self) -> Callable[[], Any]:
        """The default parameters of a context, in the layout that this version has."""
        for moe_cache in (True, False):
            params = _context_params(moe_cache)
            self._declare("llama_context_default_params", params, [])
            self._declare("llama_init_from_model", _ptr, [_ptr, params])
            both = ((self.model_params(), MODEL_DEFAULTS), (self.c.llama_context_default_params(), CONTEXT_DEFAULTS))
            if all(getattr(found, key) == value for found, known in both for key, value in known.items()):
                default: Callable[[], Any] = self.c.llama_context_default_params
                return default
        raise Refused(f"{PACKAGE}: llama.h of another version; the structs in {Path(__file__).name} do not fit")

    def said(self) -> str:
        """The end of its log."""
        return "".join(self.log)[-3000:]


library = functools.cache(Library)
