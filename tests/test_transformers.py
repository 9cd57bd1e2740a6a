"""Quantized results in a real runtime: transformers computes from them what it computes from the dequantized weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.models import GOLDEN, config, dequantized, logits, random_model, tensors, write
from helpers.results import WIDTHS
from safetensors.torch import save_file

from ernie_quant import codecs
from ernie_quant.codecs.fp8 import Float8Block
from ernie_quant.codecs.keep import KEEP
from ernie_quant.codecs.mxfp4 import Float4Group
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.planning import built_in, recipe
from ernie_quant.planning.make import make_plan
from ernie_quant.sources import open_source
from ernie_quant.weights import layouts

ALL = {"experts_only": False, "mtp": True, "keep_unfit": False}
EXPERTS = ALL | {"experts_only": True}


def model_of_128s(folder: Path) -> Path:
    """A small MoE made by transformers whose widths are all multiples of 128."""
    from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

    torch.manual_seed(1)
    config = Ernie4_5_MoeConfig(
        vocab_size=256, hidden_size=256, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, moe_num_experts=4, moe_k=2, moe_num_shared_experts=1,
        moe_layer_start_index=1, moe_layer_end_index=2, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    Ernie4_5_MoeForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def check(source: Path, tmp_path: Path, rules: recipe.Recipe, runtime: str, at_most: float) -> None:
    """No logit differs from the dequantized checkpoint's, and none strays far from the source's (nothing is random)."""
    write(source, tmp_path / "out", runtime, recipe=rules)
    found = logits(tmp_path / "out", torch.bfloat16)
    assert torch.equal(found, logits(dequantized(tmp_path / "out", tmp_path / "plain"), torch.bfloat16))
    original = logits(source, torch.bfloat16)
    assert 0 < (found - original).square().sum() / original.square().sum() < at_most


# at_most: relative error of the logits, a few times what was measured; random experts give more than 1
@pytest.mark.parametrize(
    ("codec", "options", "at_most"),
    [
        (RoundToNearest(4, 32), EXPERTS, 0.2),
        (RoundToNearest(4, CHANNEL), EXPERTS, 0.2),
        (RoundToNearest(8, 32), ALL, 0.01),
        (RoundToNearest(8, CHANNEL), EXPERTS, 0.01),
    ],
    ids=lambda value: value.describe() if hasattr(value, "describe") else "",
)
@pytest.mark.parametrize("family", ["moe", "moe_mtp"])
def test_integers_on_the_golden_models(family: str, codec, options: dict, at_most: float, tmp_path: Path) -> None:
    check(GOLDEN / family / "pt", tmp_path, built_in.one_codec("test", codec, **options), "vllm", at_most)


@pytest.mark.parametrize(
    ("codec", "options", "at_most"),
    [
        (RoundToNearest(4, 128), EXPERTS, 0.2),
        (RoundToNearest(4, 128), ALL, 0.2),
        (RoundToNearest(8, 128), ALL, 0.01),
        (RoundToNearest(2, 64), EXPERTS, 1.0),
        (Float8Block(), EXPERTS, 0.02),
        (Float8Block(), ALL, 0.02),
        (Float4Group(), EXPERTS, 0.2),
        (Float4Group(), ALL, 0.2),
    ],
    ids=lambda value: value.describe() if hasattr(value, "describe") else "",
)
def test_groups_and_blocks_of_128(codec, options: dict, at_most: float, tmp_path: Path) -> None:
    source = model_of_128s(tmp_path / "source")
    check(source, tmp_path, built_in.one_codec("test", codec, **options), "transformers", at_most)


INT4, INT8 = RoundToNearest(4, 128), RoundToNearest(8, CHANNEL)


def rules_of(*pairs: tuple[str, codecs.Codec]) -> recipe.Recipe:
    """First match wins; what nothing matches is kept."""
    return recipe.Recipe("test", tuple(recipe.RecipeRule(codec, match=match) for match, codec in pairs))


MIXED = {
    "attention in 8 bits, shared experts in groups of 64": (
        (r"\.experts\.", INT4), ("self_attn", INT8), ("shared_experts", RoundToNearest(4, 64)),
    ),
    "shared experts in 8 bits": (("shared_experts", INT8), (r"\.experts\.", INT4)),
    "routed experts in 8 bits": (("shared_experts", INT4), (r"\.experts\.", INT8)),
    "routed experts in float4": (("shared_experts", INT4), (r"\.experts\.", Float4Group())),
    "all but routed experts in float4": (("shared_experts", Float4Group()), ("self_attn", Float4Group()), (r"\.experts\.", INT4)),
    "all but the first layer": ((r"layers\.0\.", KEEP), ("_proj", INT8)),
    "fp8, experts of layer 1 kept": ((r"layers\.1\.mlp\.experts", KEEP), ("_proj", Float8Block())),
    "fp8, shared experts alone": (("shared_experts", Float8Block()),),
}  # fmt: skip


@pytest.mark.parametrize("pairs", MIXED.values(), ids=MIXED)
def test_several_forms_in_one_checkpoint(pairs: tuple[tuple[str, codecs.Codec], ...], tmp_path: Path) -> None:
    check(model_of_128s(tmp_path / "source"), tmp_path, rules_of(*pairs), "transformers", 0.2)


@pytest.mark.parametrize(
    "codec", [INT4, RoundToNearest(2, 64), INT8, Float8Block(), Float4Group()], ids=lambda codec: codec.describe()
)
def test_a_dense_model(codec: codecs.Codec, tmp_path: Path) -> None:
    source = random_model(tmp_path / "source", layouts.PT, "dense", **WIDTHS["dense"])
    check(source, tmp_path, built_in.one_codec("test", codec, **ALL), "transformers", 1.0)


@pytest.mark.parametrize("mtp", [False, True])
@pytest.mark.parametrize("codec", [INT4, INT8, Float8Block(), Float4Group()], ids=lambda codec: codec.describe())
def test_a_model_with_an_mtp_block(codec: codecs.Codec, mtp: bool, tmp_path: Path) -> None:
    """transformers drops the block; config.json names it, and the layer after the last that it is elsewhere."""
    source = random_model(tmp_path / "source", layouts.PT, "moe_mtp", **WIDTHS["moe_mtp"] | {"moe_num_experts": 4})
    check(source, tmp_path, built_in.one_codec("test", codec, **ALL | {"mtp": mtp}), "transformers", 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_source_of_another_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """What is kept has the dtype that config.json says, and the bf16 scales are cast to it."""
    source = random_model(tmp_path / "source", layouts.PT, "moe", **WIDTHS["moe"])
    table = {name: t if t.dtype == torch.float32 else t.to(dtype) for name, t in tensors(source).items()}
    save_file(table, source / "model.safetensors", metadata={"format": "pt"})
    write(source, tmp_path / "out", recipe=built_in.one_codec("test", RoundToNearest(4, 128), **EXPERTS))
    assert config(tmp_path / "out")["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert tensors(tmp_path / "out")["model.norm.weight"].dtype == dtype
    found, original = logits(tmp_path / "out", "auto"), logits(source, "auto")
    plain = logits(dequantized(tmp_path / "out", tmp_path / "plain"), "auto")  # of weights that are rounded to bf16
    assert (found - plain).square().sum() < 1e-4 * plain.square().sum()
    assert 0 < (found - original).square().sum() / original.square().sum() < 0.2


BY_IMPORT = {
    "experts in two forms": ((r"layers\.1\.mlp\.experts", INT8), (r"\.experts\.", INT4)),
    "experts of a layer kept": ((r"layers\.1\.mlp\.experts", KEEP), ("_proj", INT4)),
    "all experts kept": (("self_attn", INT8),),
    "float8 in the words of compressed-tensors": (("_proj", Float8Block("compressed-tensors")),),
}


@pytest.mark.parametrize("pairs", BY_IMPORT.values(), ids=BY_IMPORT)
def test_what_it_does_not_read_by_itself_is_written_with_a_note(
    pairs: tuple[tuple[str, codecs.Codec], ...], tmp_path: Path
) -> None:
    """It would decode them wrongly without a word, or refuse the file; with our import it does not (tests/serving)."""
    source = model_of_128s(tmp_path / "source")
    plan = make_plan(open_source(source), runtime="transformers", recipe=rules_of(*pairs))
    assert [note for note in plan.notes if "loads this after `import ernie_quant.transformers` alone" in note]
    write(source, tmp_path / "out", "vllm", recipe=rules_of(*pairs))
    assert "import ernie_quant.transformers; from transformers import pipeline" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("pairs", MIXED.values(), ids=MIXED)
def test_what_it_reads_by_itself_is_written_without(pairs: tuple[tuple[str, codecs.Codec], ...], tmp_path: Path) -> None:
    plan = make_plan(open_source(model_of_128s(tmp_path / "source")), runtime="transformers", recipe=rules_of(*pairs))
    assert "import ernie_quant" not in "".join(plan.notes)


def test_a_quantized_vl_model_is_written_with_a_note(tmp_path: Path) -> None:
    source = random_model(tmp_path / "source", layouts.PT, "vl", **WIDTHS["vl"])
    rules = built_in.one_codec("test", INT4, **ALL)
    plan = make_plan(open_source(source), runtime="transformers", recipe=rules)
    assert "transformers does not know the flat config.json of VL models: --vl-config transformers" in plan.notes
