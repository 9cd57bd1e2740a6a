"""Runs of the golden MoE, to their end or to the middle of the second file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ernie_quant.codecs import Codec
from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.planning import built_in, recipe
from ernie_quant.planning.make import make_plan
from ernie_quant.planning.steps import Plan
from ernie_quant.sources import open_source
from helpers.models import GOLDEN

SOURCE = GOLDEN / "moe/paddle"
SMALL = 60_000  # bytes per file: eight files of the converted golden MoE


def everything(codec: Codec, **options: Any) -> recipe.Recipe:
    return built_in.one_codec("test", codec, **{"experts_only": False, "mtp": True, "keep_unfit": False} | options)


INT4 = everything(RoundToNearest(4, 32))


def planned(source: Path = SOURCE, rules: recipe.Recipe = INT4, runtime: str = "vllm", shard_bytes: int = SMALL) -> Plan:
    return make_plan(open_source(source), runtime=runtime, recipe=rules, shard_bytes=shard_bytes)


# H 128, Q 256, KV 128, I 128, M 128, shared experts 256: one dense layer, one with two experts
OF_128S = {
    "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "head_dim": 64, "moe_num_experts": 2,
    "num_hidden_layers": 2, "moe_layer_end_index": 1, "vocab_size": 100,
}  # fmt: skip


class Killed(BaseException):
    pass


def stop_in_second_shard(plan: Plan) -> Callable[[int], None]:
    """A progress callback that raises when the second file is half written."""
    left = sum(step.spec.nbytes for step in plan.shards[0].steps)

    def progress(done: int) -> None:
        nonlocal left
        if left <= 0:
            raise Killed
        left -= done

    return progress
