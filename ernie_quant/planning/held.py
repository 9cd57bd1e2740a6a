"""Where the bytes of a model lie once GPUs share it: of its weights, of the KV cache, and what one token makes them read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from ernie_quant.archs._config import Config, pair, whole
from ernie_quant.names import EMBED, EXPERT, HEAD, MTP, NORM, RESAMPLER, ROUTER, VISION, VISION_EXPERT
from ernie_quant.runtimes import Spread

LAYER = re.compile(r"\.layers\.(\d+)\.")
REPLICATED = (NORM, ROUTER)  # every rank has them whole
KV_BYTES = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True)
class Model:
    """What the KV cache and the sharing of a model depend on; `top_k` of the `experts` see a token."""

    dims: Mapping[str, int]
    heads: int
    layers: int
    experts: int
    top_k: int
    context: int  # longest that it was made for

    @staticmethod
    def of(config: Config, dims: Mapping[str, int]) -> Model:
        """From a flat config. Raises ConfigError."""
        experts = dims.get("E", 0)
        top_k = pair(config, "moe_k")[0] if experts and "moe_k" in config else experts
        context = whole(config, "max_position_embeddings", default=131072)
        layers, heads = whole(config, "num_hidden_layers"), whole(config, "num_attention_heads")
        return Model(dims, heads, layers, experts, min(top_k, experts), context)

    def kv_bytes(self, dtype: str, spread: Spread, layers: int) -> float:
        """Per token, of one GPU that has so many of the layers; where there are more ranks than kv heads, they have copies."""
        head = KV_BYTES[dtype] * 2 * (self.dims["Q"] // self.heads)
        return head * layers * max(self.dims["kv_heads"] // spread.tensor, 1)


class Item(NamedTuple):
    """Weights of one name and role, and their stored bytes."""

    name: str
    role: str
    nbytes: float


@dataclass(frozen=True)
class Bytes:
    """Of one part of a model: what ranks share, routed experts, those for images, and what every rank has whole."""

    shared: float = 0.0
    experts: float = 0.0
    of_images: float = 0.0
    everywhere: float = 0.0

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(
            self.shared + other.shared, self.experts + other.experts, self.of_images + other.of_images,
            self.everywhere + other.everywhere,
        )  # fmt: skip

    @property
    def total(self) -> float:
        """All of them, once."""
        return self.shared + self.experts + self.of_images + self.everywhere

    def on_one(self, spread: Spread, experts: int) -> float:
        """Of one GPU: experts that stay whole are dealt out, and somebody has the most."""
        of = spread.tensor
        part = math.ceil(experts / of) / experts if spread.experts_whole and experts else 1 / of
        return self.shared / of + (self.experts + self.of_images) * part + self.everywhere


@dataclass(frozen=True)
class Held:
    """Bytes of weights by layer, of the embeddings, of head and last norm, and of what sees images.

    The MTP block is not counted.
    """

    layers: tuple[Bytes, ...]
    embeddings: Bytes
    head: Bytes
    images: Bytes
    tied: bool  # the last GPUs need the embeddings too

    @staticmethod
    def of(items: Iterable[Item], layers: int) -> Held:
        """Of all weights."""
        inside = [Bytes()] * layers
        outside = {EMBED: Bytes(), HEAD: Bytes(), VISION: Bytes()}
        for name, role, nbytes in items:
            if role == MTP:
                continue
            found = LAYER.search(name)
            if found and role not in (VISION, RESAMPLER):
                inside[int(found[1])] += _bytes(role, nbytes)
            else:
                outside[{EMBED: EMBED, VISION: VISION, RESAMPLER: VISION}.get(role, HEAD)] += _bytes(role, nbytes)
        return Held(tuple(inside), outside[EMBED], outside[HEAD], outside[VISION], outside[HEAD].shared == 0)

    @property
    def total(self) -> float:
        """All of them, once."""
        return sum(layer.total for layer in (*self.layers, self.embeddings, self.head, self.images))

    def stages(self, spread: Spread, experts: int) -> list[tuple[float, int]]:
        """(bytes of one GPU, layers) of every stage; what sees images is on all of them."""
        found, first = [], 0
        for stage, count in enumerate(stage_sizes(len(self.layers), spread.stages)):
            inside = sum((layer for layer in self.layers[first : first + count]), self.images)
            if stage == 0:
                inside += self.embeddings
            if stage == spread.stages - 1:
                inside += self.head
                inside += self.embeddings if self.tied and stage else Bytes()
            found.append((inside.on_one(spread, experts), count))
            first += count
        return found

    def read_per_token(self, spread: Spread, model: Model) -> float:
        """Bytes that one GPU after the other reads for one token of text: `top_k` experts, one row of the embeddings.

        A bound from below: experts are taken to be spread evenly, and the KV cache is not counted.
        """
        part = model.top_k / model.experts if model.experts else 0.0
        seen = [replace(layer, experts=layer.experts * part, of_images=0.0) for layer in self.layers]
        seen.append(self.head if not self.tied else self.head + self.embeddings)
        together = sum(seen, Bytes())
        return (together.shared + together.experts) / spread.tensor + together.everywhere


def _bytes(role: str, nbytes: float) -> Bytes:
    if role in REPLICATED:
        return Bytes(everywhere=nbytes)
    if role == EXPERT:
        return Bytes(experts=nbytes)
    return Bytes(of_images=nbytes) if role == VISION_EXPERT else Bytes(shared=nbytes)


def stage_sizes(layers: int, stages: int) -> list[int]:
    """How many layers each stage gets: as even as can be, the last one not more than others.

    (vllm-project/vllm, vllm/distributed/utils.py, get_pp_indices; llama.cpp splits by free memory, about evenly.)
    """
    sizes = [layers // stages] * stages
    for left in range(layers % stages):
        sizes[-(left + 2)] += 1
    return sizes
