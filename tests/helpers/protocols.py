"""Every plug-in against its protocol, for mypy: modules and classes of whose members a name, a type or an argument is wrong
are found here and not by a user. `tests/contract/test_protocols.py` sees to it that no file is missing."""

from __future__ import annotations

from ernie_quant.archs import Arch, ernie4_5, ernie4_5_moe, ernie4_5_vl_moe
from ernie_quant.codecs import (
    Codec,
    ccq,
    fp8,
    iq4_nl,
    iq4_xs,
    keep,
    mxfp4,
    nvfp4,
    q2_k,
    q3_k,
    q4_0,
    q4_k,
    q5_0,
    q5_1,
    q5_k,
    q6_k,
    q8_0,
    rtn,
    rtn_kv,
    w4a4,
    w4a8,
    w4afp8,
)  # fmt: skip
from ernie_quant.hubs import Hub, Publisher
from ernie_quant.hubs.aistudio import publish as aistudio_publish
from ernie_quant.hubs.aistudio import read as aistudio
from ernie_quant.hubs.hf import publish as hf_publish
from ernie_quant.hubs.hf import read as hf
from ernie_quant.hubs.modelscope import publish as modelscope_publish
from ernie_quant.hubs.modelscope import read as modelscope
from ernie_quant.runners import Runner, local, processes, ray
from ernie_quant.runtimes import Runtime, fastdeploy, llama_cpp, transformers, vllm
from ernie_quant.writers import Format, gguf, safetensors

ARCHS: tuple[Arch, ...] = (ernie4_5, ernie4_5_moe, ernie4_5_vl_moe)
CODECS: tuple[Codec, ...] = (
    *ccq.EXAMPLES, *fp8.EXAMPLES, *keep.EXAMPLES, *rtn.EXAMPLES, *q8_0.EXAMPLES, *q6_k.EXAMPLES, *q5_k.EXAMPLES, *q4_k.EXAMPLES,
    *q3_k.EXAMPLES, *q2_k.EXAMPLES, *q5_0.EXAMPLES, *q5_1.EXAMPLES, *q4_0.EXAMPLES, *iq4_nl.EXAMPLES, *iq4_xs.EXAMPLES,
    *rtn_kv.EXAMPLES, *w4a8.EXAMPLES, *mxfp4.EXAMPLES, *w4afp8.EXAMPLES, *nvfp4.EXAMPLES, *w4a4.EXAMPLES,
)  # fmt: skip
FORMATS: tuple[Format, ...] = (gguf, safetensors)
RUNNERS: tuple[Runner, ...] = (local, processes, ray)
RUNTIMES: tuple[Runtime, ...] = (fastdeploy, llama_cpp, transformers, vllm)


def hubs() -> tuple[tuple[Hub, Publisher], ...]:
    """What reads from each, and what publishes to it."""
    return (
        (aistudio.connect(), aistudio_publish.connect()),
        (hf.connect(), hf_publish.connect()),
        (modelscope.connect(), modelscope_publish.connect()),
    )
