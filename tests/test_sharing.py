"""Which tensor-parallel sizes a plan offers: tiles and groups, kv heads, and a vocabulary that nobody pads.

All models here have one layer of hidden size 64, and 8 heads unless said otherwise; they are planned, never written.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.models import GOLDEN, random_model

from ernie_quant import runtimes
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.names import OUT
from ernie_quant.planning import built_in
from ernie_quant.planning.make import make_plan
from ernie_quant.planning.recipe import KEEP_ALL, Recipe, RecipeRule
from ernie_quant.runtimes import Linear, _sharing
from ernie_quant.sources import open_source
from ernie_quant.weights import layouts

INT8 = RoundToNearest(8, CHANNEL)
WIDTHS = {
    "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
    "intermediate_size": 512, "vocab_size": 64,
}  # fmt: skip


def sizes(
    folder: Path, codec: Codec | None = None, match: str = "_proj", runtime: str = "vllm", **widths: int
) -> tuple[int, ...]:
    """Those of a plan in which `codec` stores the linears that `match` finds, and all else is kept."""
    source = random_model(folder / "src", layouts.PT, "dense", **WIDTHS | widths)
    rules = Recipe("test", (RecipeRule(codec, match=match),)) if codec else KEEP_ALL
    return make_plan(open_source(source), runtime=runtime, recipe=rules).tp_sizes


# --- tiles and groups ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        # 768 inputs; 2, 4 and 8 ranks have 384 = 3 x 128, 192 = 3 x 64 and 96 = 3 x 32 of them
        (32, (1, 2, 4)),  # 8 ranks would cut no group, but a tile of 64
        (64, (1, 2, 4)),
        (128, (1, 2)),  # 4 ranks would cut no tile, but a group
        (CHANNEL, (1, 2, 4)),
    ],
)
def test_a_ranks_inputs_of_experts_are_whole_tiles_of_64_and_whole_groups(
    group: int | str, expected: tuple[int, ...], tmp_path: Path
) -> None:
    source = random_model(
        tmp_path / "src",
        layouts.PT,
        "moe",
        **WIDTHS | {"hidden_size": 128, "moe_layer_start_index": 0, "moe_intermediate_size": 768},
    )
    rules = Recipe("test", (RecipeRule(RoundToNearest(4, group), match=r"\.experts\."),))
    assert make_plan(open_source(source), runtime="vllm", recipe=rules).tp_sizes == expected


@pytest.mark.parametrize(("group", "expected"), [(32, (1, 2)), (128, (1, 2)), (CHANNEL, (1, 2))])
def test_a_ranks_inputs_of_other_linears_are_whole_tiles_of_128(
    group: int | str, expected: tuple[int, ...], tmp_path: Path
) -> None:
    """o_proj has 8 x 96 = 768 inputs, of which 4 ranks have 192 = 1.5 x 128."""
    assert sizes(tmp_path, RoundToNearest(4, group), "o_proj", head_dim=96) == expected


@pytest.mark.parametrize("group", [32, 64, CHANNEL])
def test_a_ranks_outputs_are_whole_tiles_of_64(group: int | str, tmp_path: Path) -> None:
    """gate and up have 384 = 6 x 64 outputs: 2 ranks have 192 = 3 x 64, 4 ranks 96 = 1.5 x 64."""
    assert sizes(tmp_path, RoundToNearest(4, group), "(gate|up)_proj", intermediate_size=384) == (1, 2)


def test_what_is_kept_has_no_tiles(tmp_path: Path) -> None:
    """The same widths: 8 ranks have 96 inputs of o_proj and 48 outputs of gate and up."""
    assert sizes(tmp_path, head_dim=96, intermediate_size=384) == (1, 2, 4, 8)


# --- kv heads --------------------------------------------------------------------------------------------------------


def test_more_ranks_than_kv_heads_have_the_same_kv_head(tmp_path: Path) -> None:
    """k and v have 2 x 128 outputs: from 2 ranks on, each has 128 of them, whole tiles, and several have the same.

    q, o, gate, up and down have 1024 = 8 x 128 to share.
    """
    assert sizes(tmp_path, INT8, head_dim=128, intermediate_size=1024) == (1, 2, 4, 8)


@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "expected"),
    [
        (2, 32, (1,)),  # 2 ranks and more have one head of 32 outputs, which is half a tile
        (4, 32, (1, 2)),  # 2 ranks have 2 heads, which are a tile; 4 ranks have one
        (4, 64, (1, 2, 4, 8, 16)),
        (4, 48, (1,)),  # 2 ranks have 96, 4 and more 48
    ],
)
def test_whole_kv_heads_must_be_whole_tiles(kv_heads: int, head_dim: int, expected: tuple[int, ...], tmp_path: Path) -> None:
    """Of q, k and v, which are one layer; q with its 16 x 64 outputs is never the narrower one."""
    found = sizes(tmp_path, INT8, "[qkv]_proj", num_attention_heads=16, num_key_value_heads=kv_heads, head_dim=head_dim)
    assert found == expected


def test_the_reason_names_the_linear_and_the_sizes_that_would_do() -> None:
    """96 outputs of k are 1.5 tiles for any number of ranks; 128 outputs of gate are 2 tiles."""
    k, gate = (
        Linear(f"model.layers.0.{name}_proj.weight", TensorSpec((out, 64), "BF16"), "", INT8, OUT)
        for name, out in (("self_attn.k", 96), ("mlp.gate", 128))
    )
    assert list(_sharing.problems(runtimes.find("vllm"), [k, gate], {"kv_heads": 1, "V": 64}, 4, 4)) == [
        "model.layers.0.self_attn.k_proj.weight: 96 outputs in multiples of 64 cannot be shared by 4 ranks; no number would do",
        "model.layers.0.mlp.gate_proj.weight: 128 outputs in multiples of 64 cannot be shared by 4 ranks; 1, 2 would do",
    ]


# --- the vocabulary --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocabulary", "expected"),
    [(96, (1, 2, 4, 8)), (100, (1, 2, 4)), (102, (1, 2)), (103, (1,))],  # 8 x 12, 4 x 25, 2 x 51, a prime
)
def test_fastdeploy_shares_the_vocabulary_as_it_is(vocabulary: int, expected: tuple[int, ...], tmp_path: Path) -> None:
    assert sizes(tmp_path, runtime="fastdeploy", vocab_size=vocabulary) == expected


def test_vllm_pads_the_vocabulary(tmp_path: Path) -> None:
    assert sizes(tmp_path, vocab_size=103) == (1, 2, 4, 8)


def test_a_vocabulary_that_ranks_cannot_share_is_named() -> None:
    fastdeploy, vllm, dims = runtimes.find("fastdeploy"), runtimes.find("vllm"), {"kv_heads": 2, "V": 100}
    line = "embeddings: 100 tokens cannot be shared by 8 ranks"
    assert list(_sharing.problems(fastdeploy, [], dims, 8, 8)) == [line]
    assert list(_sharing.problems(fastdeploy, [], dims, 8, 4)) == []
    assert list(_sharing.problems(vllm, [], dims, 8, 8)) == []


def test_experts_that_no_kernel_takes_are_not_dealt_out_whole_either(tmp_path: Path) -> None:
    """Widths of 32, of which Marlin wants multiples of 64: no number of GPUs helps."""
    source = GOLDEN / "moe_mtp/paddle"
    rules = built_in.make("wint4", experts_only=True, group_size=32).recipe
    plan = make_plan(open_source(source), runtime="vllm", recipe=rules)
    assert (plan.tp_sizes, dict(plan.gpus)) == ((), {})
