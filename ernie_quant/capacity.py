"""How many GPUs a checkpoint takes in each format, from headers alone.

usable memory per GPU = utilization x memory - reserve; a tensor-parallel size fits if its share of the weights and the KV
cache of one sequence of max_model_len do. Sizes are powers of two that heads, widths and groups allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ernie_quant import names
from ernie_quant.archs._config import whole
from ernie_quant.checkpoint import ITEMSIZE, Checkpoint
from ernie_quant.codecs.fp8 import Float8Block
from ernie_quant.codecs.keep import KEEP, Keep
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.errors import PlanError
from ernie_quant.names import EXPERT, MTP, NORM, OUT, ROUTER, VISION_EXPERT, Weight
from ernie_quant.recipe import KEEP_ALL, Recipe, RecipeRule, container
from ernie_quant.resolve import refuse_quantized, resolve
from ernie_quant.views import spec_of

GIB = 1 << 30
TP_SIZES = (1, 2, 4, 8, 16, 32, 64)
REPLICATED = (NORM, ROUTER)  # every rank has them whole
KV_BYTES = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}
LINEARS = tuple(sorted(names.QUANTIZABLE))
INT4, INT8 = RoundToNearest(4, CHANNEL, full_range=False), RoundToNearest(8, CHANNEL, full_range=False)


@dataclass(frozen=True)
class Format:
    """A way to store a model; `multiple` of the inputs of down_proj and o_proj must stay on one rank."""

    name: str
    runtimes: str
    recipe: Recipe
    multiple: int
    text_only: bool = False
    needs_experts: bool = False


@dataclass(frozen=True)
class Rule:
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


def formats(wint4_layers: int) -> list[Format]:
    """What can be run, by program."""
    w4 = Recipe("wint4", (RecipeRule(RoundToNearest(4, 128), LINEARS),))
    return [
        Format("bf16", "vLLM, transformers, FastDeploy", KEEP_ALL, 1),
        Format("fp8", "vLLM, transformers", Recipe("fp8", (RecipeRule(Float8Block(), LINEARS),)), 128),
        Format("wint8", "FastDeploy", Recipe("wint8", (RecipeRule(INT8, LINEARS),)), 64),
        Format("wint4, group 128", "vLLM, transformers", w4, 128),
        Format("wint4", "FastDeploy", container("wint4", None), 64, needs_experts=True),
        Format("w4a8", "FastDeploy", container("w4a8", None), 128, text_only=True, needs_experts=True),
        Format(f"wint2 from layer {wint4_layers}", "FastDeploy", container("wint2", wint4_layers), 128, True, True),
    ]


def estimate(source: Checkpoint, rule: Rule, wint4_layers: int = 7, recipe: Recipe | None = None) -> list[Capacity]:
    """A row per format; the MTP block is not counted. Raises PlanError or ConfigError."""
    refuse_quantized(source)
    table = resolve(source)
    if table.problems:
        raise PlanError(f"{source.folder}: {len(table.problems)} problem(s) in the checkpoint", table.problems)
    weights = [w for w in table.weights if w.role != MTP]
    vl = any(w.role == VISION_EXPERT for w in weights)
    moe = any(w.role == EXPERT for w in weights)
    heads, layers = whole(table.config, "num_attention_heads"), whole(table.config, "num_hidden_layers")
    rows = []
    for form in formats(wint4_layers):
        if (vl and form.text_only) or (not moe and form.needs_experts):
            continue
        rows.append(_capacity(form, weights, table.map.dims, heads, layers, rule))
    if recipe is not None:
        form = Format(recipe.name, "by recipe", recipe, _multiple(recipe))
        rows.append(_capacity(form, weights, table.map.dims, heads, layers, rule))
    return rows


def _multiple(recipe: Recipe) -> int:
    """The largest group of a recipe's codecs; a whole channel splits at Marlin's 64."""
    groups = [r.codec.group_size for r in recipe.rules if isinstance(r.codec, RoundToNearest)]
    return max([128, *(g for g in groups if isinstance(g, int))])


def _capacity(form: Format, weights: Sequence[Weight], dims: Mapping[str, int], heads: int, layers: int, rule: Rule) -> Capacity:
    sizes = {w.name: _bytes(w, form.recipe) for w in weights}
    whole_bytes = sum(sizes[w.name] for w in weights if w.role in REPLICATED)
    shared = sum(sizes.values()) - whole_bytes
    total = int(shared + whole_bytes)
    head_dim, kv_heads = dims["Q"] // heads, dims["kv_heads"]
    fits = tuple(tp for tp in TP_SIZES if _splits(form, weights, tp, heads, kv_heads))
    kv = KV_BYTES[rule.kv_dtype] * 2 * layers * head_dim  # per token and kv head
    for tp in fits:
        per_gpu = shared / tp + whole_bytes
        sequence = kv * max(kv_heads // tp, 1) * rule.max_model_len
        if per_gpu + sequence <= rule.usable:
            count = min(rule.max_num_seqs, int((rule.usable - per_gpu) // sequence))
            return Capacity(form.name, form.runtimes, total, fits, tp, int(per_gpu), int(kv * kv_heads), count)
    return Capacity(form.name, form.runtimes, total, fits, 0, 0, int(kv * kv_heads), 0)


def _bytes(weight: Weight, recipe: Recipe) -> float:
    spec = spec_of(weight.view)
    codec = recipe.codec_for(weight)
    if isinstance(codec, Keep) or _ragged(codec, spec.shape):
        return spec.numel * ITEMSIZE[spec.dtype]
    return spec.numel * codec.bits_per_weight(spec) / 8


def _ragged(codec: object, shape: tuple[int, ...]) -> bool:
    """A group that does not divide the inputs would be kept."""
    group = codec.group_size if isinstance(codec, RoundToNearest) else 1
    return isinstance(group, int) and shape[1] % group > 0


def _splits(form: Format, weights: Sequence[Weight], tp: int, heads: int, kv_heads: int) -> bool:
    if heads % tp or (kv_heads % tp and tp % kv_heads):
        return False
    for weight in weights:
        if not weight.row.rule.linear or weight.row.rule.ranks is None:
            continue
        out, width = weight.view.shape
        if weight.row.rule.ranks == OUT:
            kv = weight.name.endswith(("k_proj.weight", "v_proj.weight"))
            if not kv and out % tp:
                return False
        elif width % (tp * (form.multiple if form.recipe.codec_for(weight) != KEEP else 1)):
            return False
    return True
