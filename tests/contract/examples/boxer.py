"""A runtime that wants all experts of a layer in one tensor, in a file format of its own."""

import re

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs.keep import Keep
from ernie_quant.runtimes import Part, kept, vllm

LAYOUT, FORMAT, ROWS, CONFIG, RECIPES = "pt", "box", 1, {}, ("pt",)
PER_RANK, SPLITS_VOCABULARY, QUANTIZES_VOCABULARY, CASTS = False, False, False, False
VERSION = 1
TAGS = ()
library = vllm.library
PROGRAM, PARALLEL, AT_LOAD = "Boxer", ("tensor",), {}
kept_as = vllm.kept_as
CODECS = (Keep,)
EXPERT = re.compile(r"experts\.(\d+)\.(\w+)\.weight$")
folder, layer_of, share_multiple, metadata = vllm.folder, vllm.layer_of, vllm.share_multiple, vllm.metadata
model_problems, stem, fallback = vllm.model_problems, vllm.stem, vllm.fallback


def recognizes(config):
    return config.get("quant_method") == "by input"


def where(name):
    found = EXPERT.search(name)
    return EXPERT.sub(rf"experts.{found[2]}", name), int(found[1])


def parts(name, codec, spec):
    if isinstance(codec, Keep):
        return {name: kept(spec)}
    (stack, number), (out, width) = where(name), spec.shape
    return {
        f"{stack}.codes": Part(TensorSpec((width, out), "I8"), 1, 0, index=number),
        f"{stack}.scale": Part(TensorSpec((out,), "F32"), 0, None, index=number),
        f"{stack}.of_input": Part(TensorSpec((width,), "F32"), None, 0, index=number),
    }


def constants(name, codec, spec, once):
    return {} if isinstance(codec, Keep) else {f"{where(name)[0]}.of_input": once["of_input"]}


def pack(name, codec, encoded):
    if isinstance(codec, Keep):
        return {name: encoded["weight"]}
    stack, _ = where(name)
    return {f"{stack}.codes": encoded["codes"].t().contiguous(), f"{stack}.scale": encoded["scale"]}


def problems(linears):
    return []


unsupported = notes = problems


def one_scale(name):
    return name


def suited(codec, roles):
    return codec


def misread(config, linears):
    return []


def quantization_config(linears):
    return {"quant_method": "by input"} if any(not isinstance(li.codec, Keep) for li in linears) else None


def codecs_of(config, linears):
    from ernie_quant.codecs import make
    from ernie_quant.codecs.keep import KEEP

    return {name: make("byinput", {}) if EXPERT.search(name) else KEEP for name, _ in linears}


def commands(out, config, tp):
    return [("boxer", f"boxer {out}")]
