"""How many GPUs a checkpoint takes in each format, from headers alone.

usable memory per GPU = utilization x memory - reserve; a tensor-parallel size fits if its share of the weights and the KV
cache of one sequence of max_model_len do. Sizes are powers of two that heads, widths and groups allow, as the runtime says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ernie_quant import runtimes
from ernie_quant.archs._config import Config, whole
from ernie_quant.checkpoint import Checkpoint
from ernie_quant.codecs.keep import Keep
from ernie_quant.errors import PlanError
from ernie_quant.names import EXPERT, IN, MTP, NORM, ROUTER, VISION_EXPERT
from ernie_quant.plan import built_in
from ernie_quant.plan.choose import Choice, choose, linears_of
from ernie_quant.plan.recipe import KEEP_ALL, Recipe
from ernie_quant.runtimes import Linear, Runtime, _sharing
from ernie_quant.weights.claims import refuse_quantized
from ernie_quant.weights.layouts import LAYOUTS
from ernie_quant.weights.plain import resolve

GIB = 1 << 30
MOST_GPUS = 16
GPUS = (("80GiB", 80 * GIB), ("141GiB", 141 * GIB))  # memory that people have
REPLICATED = (NORM, ROUTER)  # every rank has them whole
GGUF = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K")
KV_BYTES = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True)
class Format:
    """A way to store a model; `runtime` says which sizes it allows, with `multiple` inputs of a layer on every rank."""

    name: str
    runtimes: str
    recipe: Recipe
    runtime: str
    multiple: int = 1
    text_only: bool = False
    needs_experts: bool = False


@dataclass(frozen=True)
class Limits:
    """The constants of the estimate; memory in bytes per GPU."""

    gpu_memory: int = 80 * GIB
    utilization: float = 0.9
    reserve: int = 3 * GIB
    max_model_len: int = 32768
    max_num_seqs: int = 32
    kv_dtype: str = "bf16"

    @property
    def usable(self) -> float:
        """Bytes per GPU for weights and KV cache."""
        return self.utilization * self.gpu_memory - self.reserve


@dataclass(frozen=True)
class Capacity:
    """One format; sizes in bytes. `gpus` is 0 where no size fits."""

    format: str
    runtimes: str
    weight_bytes: int
    tp_sizes: tuple[int, ...]
    gpus: int
    weight_bytes_per_gpu: int
    kv_bytes_per_token: int  # over all kv heads
    sequences: int  # of max_model_len, at most max_num_seqs


@dataclass(frozen=True)
class Model:
    """What the KV cache and the sharing of a model depend on."""

    dims: Mapping[str, int]
    heads: int
    layers: int

    @staticmethod
    def of(config: Config, dims: Mapping[str, int]) -> Model:
        """From a flat config. Raises ConfigError."""
        return Model(dims, whole(config, "num_attention_heads"), whole(config, "num_hidden_layers"))


def formats(wint4_layers: int) -> list[Format]:
    """What can be run, by program."""
    vllm, fastdeploy = "vllm", "fastdeploy"
    container = built_in.fastdeploy_container
    return [
        Format("bf16", "vLLM, transformers, FastDeploy", KEEP_ALL, vllm),
        Format("fp8", "vLLM, transformers", built_in.make("fp8").recipe, vllm),
        Format("wint8", "FastDeploy", built_in.all_wint8(), fastdeploy),
        Format("wint4, group 128", "vLLM, transformers", built_in.make("wint4").recipe, vllm),
        Format("wint4", "FastDeploy", container("wint4", None), fastdeploy, needs_experts=True),
        # 128: the blocks in which down_proj is rotated
        Format("w4a8", "FastDeploy", container("w4a8", None), fastdeploy, 128, text_only=True, needs_experts=True),
        Format(
            f"wint2 from layer {wint4_layers}", "FastDeploy", container("wint2", wint4_layers), fastdeploy, text_only=True,
            needs_experts=True,
        ),
        *(Format(f"GGUF {t}", "llama.cpp", built_in.make("gguf", type=t).recipe, "llama_cpp") for t in GGUF),
    ]  # fmt: skip


def estimate(
    source: Checkpoint, limits: Limits, wint4_layers: int = built_in.WINT4_LAYERS, recipe: Recipe | None = None
) -> list[Capacity]:
    """A row per format; the MTP block is not counted. Raises PlanError or ConfigError."""
    refuse_quantized(source)
    table = resolve(source)
    if table.problems:
        raise PlanError(f"{source.folder}: {len(table.problems)} problem(s) in the checkpoint", table.problems)
    vl = any(w.role == VISION_EXPERT for w in table.weights)
    moe = any(w.role == EXPERT for w in table.weights)
    forms = [f for f in formats(wint4_layers) if not (vl and f.text_only) and not (not moe and f.needs_experts)]
    forms = [f for f in forms if not LAYOUTS[runtimes.find(f.runtime).LAYOUT].problem(table.map.dims)]
    if recipe is not None:
        forms.append(Format(recipe.name, "by recipe", recipe, "vllm"))
    model = Model.of(table.config, table.map.dims)
    programs = dict.fromkeys(form.runtime for form in forms)
    joined = {runtime: LAYOUTS[runtimes.find(runtime).LAYOUT].join(table.weights) for runtime in programs}
    rows = []
    for form in forms:
        target = runtimes.find(form.runtime)
        # what does not fit is counted as kept
        rules = replace(form.recipe, keep_unfit=True).for_model(table.map)
        chosen = choose(joined[form.runtime], rules, target).chosen
        linears = [li for li in linears_of(chosen, target) if li.role != MTP]
        if target.BY_LAYERS:
            rows.append(by_layers(form.name, form.runtimes, Held.of(chosen), model, limits))
            continue
        sizes = _sharing.tp_sizes(target, linears, model.dims, model.heads)
        sizes = tuple(tp for tp in sizes if all(_whole_blocks(li, form.multiple * tp) for li in linears))
        rows.append(capacity(form.name, form.runtimes, Held.of(chosen), sizes, model, limits))
    return rows


def _whole_blocks(linear: Linear, multiple: int) -> bool:
    return linear.ranks != IN or isinstance(linear.codec, Keep) or linear.spec.shape[1] % multiple == 0


@dataclass(frozen=True)
class Held:
    """Bytes of weights that ranks share, and that each of them has whole; the MTP block is not counted."""

    shared: float
    replicated: float

    @staticmethod
    def of(chosen: Sequence[Choice]) -> Held:
        """By the codecs that were chosen."""
        counted = [(c.weight.role in REPLICATED, _bytes(c)) for c in chosen if c.weight.role != MTP]
        replicated = sum(nbytes for everywhere, nbytes in counted if everywhere)
        return Held(sum(nbytes for everywhere, nbytes in counted if not everywhere), replicated)


def capacity(name: str, programs: str, held: Held, tp_sizes: Sequence[int], model: Model, limits: Limits) -> Capacity:
    """One row: the smallest of `tp_sizes` that has room."""
    total = int(held.shared + held.replicated)
    kv_heads = model.dims["kv_heads"]
    kv = KV_BYTES[limits.kv_dtype] * 2 * model.layers * (model.dims["Q"] // model.heads)  # per token and kv head
    for tp in tp_sizes:
        per_gpu = held.shared / tp + held.replicated
        sequence = kv * max(kv_heads // tp, 1) * limits.max_model_len
        if per_gpu + sequence <= limits.usable:
            count = min(limits.max_num_seqs, int((limits.usable - per_gpu) // sequence))
            return Capacity(name, programs, total, tuple(tp_sizes), tp, int(per_gpu), int(kv * kv_heads), count)
    return Capacity(name, programs, total, tuple(tp_sizes), 0, 0, int(kv * kv_heads), 0)


def by_layers(name: str, programs: str, held: Held, model: Model, limits: Limits) -> Capacity:
    """One row of a program whose GPUs have whole layers, each with its KV cache."""
    total, layers = int(held.shared + held.replicated), model.layers
    kv = int(KV_BYTES[limits.kv_dtype] * 2 * layers * model.dims["KV"])  # per token
    for count in range(1, min(MOST_GPUS, layers) + 1):
        part = -(-layers // count) / layers
        sequence = kv * part * limits.max_model_len
        if total * part + sequence <= limits.usable:
            sequences = min(limits.max_num_seqs, int((limits.usable - total * part) // sequence))
            return Capacity(name, programs, total, (), count, int(total * part), kv, sequences)
    return Capacity(name, programs, total, (), 0, 0, kv, 0)


def gpus_needed(chosen: Sequence[Choice], target: Runtime, tp_sizes: Sequence[int], model: Model) -> dict[str, int]:
    """How many GPUs of which memory take the result, with one sequence of 32768 tokens."""
    held = Held.of(chosen)
    rows = {
        memory: by_layers("", "", held, model, limits) if target.BY_LAYERS else capacity("", "", held, tp_sizes, model, limits)
        for memory, limits in ((memory, Limits(gpu_memory=nbytes)) for memory, nbytes in GPUS)
    }
    return {memory: row.gpus for memory, row in rows.items() if row.gpus}


def _bytes(choice: Choice) -> float:
    if isinstance(choice.codec, Keep):
        return choice.codec.specs(choice.spec)["weight"].nbytes
    return choice.spec.numel * choice.codec.bits_per_weight(choice.spec) / 8
