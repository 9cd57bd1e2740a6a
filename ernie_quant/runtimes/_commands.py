"""How results are run, from which versions on: shell commands that can be pasted as they stand."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ernie_quant import hubs
from ernie_quant.names import natural
from ernie_quant.paths import FILE, MTP_FOLDER
from ernie_quant.runtimes import _wint2 as wint2
from ernie_quant.runtimes._transformers import ALONE, IMPORT, is_vl, loads_alone, rounds_inputs, versions
from ernie_quant.runtimes._values import Place, Spread

Commands = list[tuple[str, str]]
SPECIAL = set('"$`\\!')  # to a shell, in double quotes

# vLLM 0.12 looks for experts under "Linear" (compressed_tensors_moe.py), which no config.json of this tool has
VLLM = "vLLM >= 0.13"
# forms of newer versions: the oldest whose loader was read
NVFP4 = "nvfp4-pack-quantized"
NEWER = {"mxfp4-pack-quantized": "vLLM >= 0.32", NVFP4: "vLLM >= 0.32"}
FLOAT8_INPUTS = "vLLM >= 0.33, on Hopper"
WINT2 = f"vLLM {wint2.vllm_versions()}, with ernie-quant in the same environment"
LLAMA_CPP = "llama.cpp (tried: b11549)"
FD_SOURCES = {"hf": "HUGGINGFACE", "modelscope": "MODELSCOPE", "aistudio": "AISTUDIO"}  # FD_MODEL_SOURCE (FastDeploy, envs.py)


def vllm(place: Place, config: Mapping[str, Any], spread: Spread) -> Commands:
    """A server."""
    words = [f"--tensor-parallel-size {spread.tensor}"]
    words += [f"--pipeline-parallel-size {spread.stages}"] if spread.stages > 1 else []
    words += ["--enable-expert-parallel"] if spread.experts_whole else []
    words += ["--trust-remote-code"] if is_vl(config) else []
    title = _version(config)
    if place.hub not in ("", "hf", "modelscope"):  # of which vLLM knows nothing
        return [(title, _downloaded(place, f"vllm serve {shlex.quote(place.local)} {' '.join(words)}"))]
    hub = "VLLM_USE_MODELSCOPE=True " if place.hub == "modelscope" else ""
    return [(title, f"{hub}vllm serve {shlex.quote(place.name)} {' '.join(words)}")]


def _version(config: Mapping[str, Any]) -> str:
    """The oldest vLLM that loads every form of config.json."""
    entry = config.get("quantization_config", {})
    groups = entry.get("config_groups", {}).values()
    if entry.get("quant_method") == wint2.METHOD:
        return WINT2
    if any(map(rounds_inputs, groups)):
        return FLOAT8_INPUTS
    return max([VLLM, *(NEWER.get(group["format"], VLLM) for group in groups)], key=natural)


def transformers(place: Place, config: Mapping[str, Any]) -> Commands:
    """A few words of it; nothing for what it would not load, or computes otherwise than the file asks for.

    It does not know the flat config.json of VL models. Of the others text alone is shown: for images it wants files of its own.
    """
    groups = config.get("quantization_config", {}).get("config_groups", {}).values()
    if any(map(rounds_inputs, groups)) or (is_vl(config) and "text_config" not in config):
        return []
    elsewhere = place.hub not in ("", "hf")
    snippet = (_image_text if is_vl(config) else _text)(repr(place.local if elsewhere else place.name))
    alone = loads_alone(config)
    snippet = snippet if alone else f"{IMPORT}; {snippet}"
    quoted = shlex.quote(snippet) if SPECIAL & set(snippet) else f'"{snippet}"'
    command = f"python -c {quoted}"
    title = ALONE if alone else f"transformers {versions()}, with ernie-quant"
    return [(title, _downloaded(place, command) if elsewhere else command)]


def _text(name: str) -> str:
    return f"from transformers import pipeline; print(pipeline('text-generation', {name})('Hello', max_new_tokens=20))"


def _image_text(name: str) -> str:
    loaded = f"(cls.from_pretrained({name}) for cls in (AutoModelForImageTextToText, AutoTokenizer))"
    return (
        f"from transformers import AutoModelForImageTextToText, AutoTokenizer; m, t = {loaded};"
        " print(t.decode(m.generate(t('Hello', return_tensors='pt').input_ids, max_new_tokens=20)[0]))"
    )


def fastdeploy(place: Place, config: Mapping[str, Any], spread: Spread) -> Commands:
    """A server; with a draft model where there is one, which must lie in a folder."""
    quantized = "quantization_config" in config
    ready = "FD_USE_MACHETE=0 " if quantized else ""
    size = config.get("tensor_parallel_size", spread.tensor)
    sizes = f"--tensor-parallel-size {size} --max-model-len 32768 --max-num-seqs 32"

    def server(name: str) -> str:
        return f"{ready}python -m fastdeploy.entrypoints.openai.api_server --model {shlex.quote(name)} {sizes}"

    source = FD_SOURCES.get(place.hub)
    plain = f"FD_MODEL_SOURCE={source} {server(place.name)}" if source else _downloaded(place, server(place.local))
    found = [("FastDeploy", plain)]
    cached = config.get("quantization_config", {}).get("kv_cache_quant_type")  # scales that no draft model of ours has
    if quantized and not cached and config.get("num_nextn_predict_layers"):
        draft = json.dumps({"method": "mtp", "num_speculative_tokens": 1, "model": f"{place.local}/{MTP_FOLDER}"})
        drafted = f"{server(place.local)} --speculative-config {shlex.quote(draft)}"
        found.append(("FastDeploy with MTP", _downloaded(place, drafted)))
    return found


def llama_cpp(place: Place, config: Mapping[str, Any], spread: Spread) -> Commands:
    """A server, with the chat template that is in the file; layers go to GPUs by themselves."""
    file = str(config.get(FILE, "model.gguf"))
    if place.hub == "hf":
        kind = re.sub(r"-\d{5}-of-\d{5}$", "", Path(file).stem).rpartition("-")[2]
        return [(LLAMA_CPP, f"llama-server -hf {shlex.quote(f'{place.name}:{kind}')} --jinja")]
    return [(LLAMA_CPP, _downloaded(place, f"llama-server -m {shlex.quote(f'{place.local}/{file}')} --jinja"))]


def _downloaded(place: Place, command: str) -> str:
    """The command, after a download if it needs one."""
    if not place.hub:
        return command
    download = hubs.download_command(place.hub).format(name=shlex.quote(place.name), local=shlex.quote(place.local))
    return f"{download} && {command}" if download else command
