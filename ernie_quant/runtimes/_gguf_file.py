"""What a GGUF file of llama.cpp says beside its tensors, and how it is called."""

from __future__ import annotations

import re
from collections import Counter

from ernie_quant import vocabulary
from ernie_quant.archs import _gguf
from ernie_quant.codecs._ggml import Blocks
from ernie_quant.codecs._rounded import Rounded
from ernie_quant.ggml import Value
from ernie_quant.runtimes import About

# enum llama_ftype of llama.h, by the name of the mix; and what a file of one type is called
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q5_0": 8, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16,
    "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32,
}  # fmt: skip
MIXES = {"Q2_K": "Q2_K", "Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "Q5_1": "Q5_K_M", "F32": "F32"}
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION


def metadata(about: About) -> tuple[dict[str, Value], tuple[str, ...]]:
    """All keys, and notes on the tokenizer. Raises ConfigError or CheckpointError."""
    rows = about.table.dims["V"]
    about.source.bring(path for path in about.source.extra_files if path.name in vocabulary.FILES)
    tokens = vocabulary.read(about.source.folder, rows, about.config, links=about.source.links)
    model = _gguf.keys_of(about.config, about.table)
    if tokens.keys[vocabulary.MODEL] == vocabulary.NO_VOCABULARY:
        model[f"{model['general.architecture']}.vocab_size"] = rows
    general: dict[str, Value] = {
        "general.architecture": model.pop("general.architecture"),
        "general.type": "model",
        "general.name": name(about.source.title),
        "general.file_type": FILE_TYPES[file_type(about)],
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    return {**general, **model, **tokens.keys}, tokens.notes


def file_type(about: About) -> str:
    """By the recipe's name, or by the type that most weights have."""
    if about.recipe in FILE_TYPES:
        return about.recipe
    counts: Counter[str] = Counter()
    for codec, numel in about.codecs:
        counts[codec.dtype if isinstance(codec, Blocks | Rounded) else "BF16"] += numel
    most = counts.most_common(1)[0][0]
    return MIXES.get(most, most)


def problems(about: About) -> list[str]:
    """What of the model llama.cpp would compute otherwise."""
    return _gguf.problems(about.config, about.table)


def stem(about: About) -> str:
    """`ERNIE-4.5-21B-A3B-PT-Q4_K_M`: LM Studio and Ollama find the type at the end of the name."""
    title = re.sub(r"[^\w.+-]+", "-", name(about.source.title)).strip("-.") or "model"
    return f"{title}-{file_type(about)}"


def name(title: str) -> str:
    """A model's name without the layout it comes from, which its file does not show."""
    return re.sub(r"(?i)-(paddle|pt|gguf)$", "", title) or title
