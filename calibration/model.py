"""A checkpoint as a decoder whose weights are read when they are wanted: in any form that this tool reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ernie_quant.calibration import integers
from ernie_quant.calibration.layer import Attention, Linear, Routing

from ernie_quant.archs import _rope
from ernie_quant.archs._config import Config, attention_dims, pair, whole, with_rope_theta
from ernie_quant.errors import ConfigError
from ernie_quant.names import Weight
from ernie_quant.views.files import Files
from ernie_quant.views.read import read
from ernie_quant.weights.plain import Resolved

if TYPE_CHECKING:
    import torch

# what transformers takes where config.json says nothing (configuration_ernie4_5*.py)
UNSAID_THETA, UNSAID_EPS, UNSAID_NORM_MIN = 500000.0, 1e-5, 1e-12
EMBEDDINGS, LAST_NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"


@dataclass(frozen=True)
class Geometry:
    """All numbers of the text path. The last three are not there in a model without experts."""

    hidden_size: int
    layers: int
    vocab_size: int
    eps: float
    attention: Attention
    sparse: frozenset[int]  # layers with experts
    shared: bool
    routing: Routing | None
    turned_router: bool  # stored [H, E], as VL models do


@dataclass(frozen=True)
class Model:
    """The text path of a checkpoint. What is read is float32, as the checkpoint means it (quantized weights decoded).

    `rounds`: are activations and a KV cache rounded where the program that loads it does so?
    """

    geometry: Geometry
    weights: Mapping[str, Weight]  # by PT name
    files: Files
    rounds: bool = True

    def tensor(self, name: str) -> torch.Tensor:
        """A whole weight. Raises CheckpointError."""
        return read(self.weights[name].view, self.files).float()

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows of one."""
        return read(self.weights[name].view, self.files, (first, last)).float()

    def linear(self, name: str) -> Linear:
        """A projection, `model.layers.0.self_attn.q_proj`."""
        bias, weight = f"{name}.bias", f"{name}.weight"
        return Linear(self.tensor(weight), self.tensor(bias) if bias in self.weights else None, self._rounds(weight))

    def _rounds(self, name: str) -> integers.Rounding | None:
        kept = integers.found(self.weights[name].view, self.files) if self.rounds else None
        return None if kept is None else integers.rounding(*kept)

    def cache(self, layer: int) -> integers.Cache | None:
        """The KV cache of a layer, where it is one of integers. Raises CheckpointError."""
        keys = self.weights[f"model.layers.{layer}.self_attn.k_proj.weight"].view
        kept = integers.found(keys, self.files) if self.rounds else None
        return None if kept is None else integers.cache(*kept)

    def norm(self, name: str) -> torch.Tensor:
        """Gains [H]."""
        return self.tensor(f"{name}.weight")

    def router(self, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of text tokens: [E, H], and the bias [E]."""
        place = f"model.layers.{layer}.mlp"
        router = self.tensor(f"{place}.gate.weight")
        bias = f"{place}.moe_statics.e_score_correction_bias"
        return (
            router.T.contiguous() if self.geometry.turned_router else router,
            self.tensor(bias)[0] if bias in self.weights else None,
        )

    @property
    def head(self) -> str:
        """Name of the weight that makes logits."""
        name = f"{HEAD}.weight"
        return name if name in self.weights else f"{EMBEDDINGS}.weight"

    @cached_property
    def experts(self) -> Sequence[int]:
        """Numbers of the experts that text tokens are routed to."""
        return range(self.geometry.routing.experts if self.geometry.routing else 0)


def model_of(table: Resolved, files: Files, *, rounds: bool = True) -> Model:
    """The decoder of a resolved checkpoint. Raises ConfigError for what the forward pass does not know."""
    return Model(geometry_of(table), {weight.name: weight for weight in table.weights}, files, rounds)


def geometry_of(table: Resolved) -> Geometry:
    """Numbers from config.json. Raises ConfigError."""
    config, ids = with_rope_theta(dict(table.config)), table.map.ids
    dims, heads = attention_dims(config), whole(config, "num_attention_heads")
    if (act := config.get("hidden_act", "silu")) != "silu":
        raise ConfigError(f"config.json: hidden_act is {act!r:.80}; calibration and eval compute silu")
    scaled = _rope.scaling(config)
    if scaled is not None and scaled.kind != _rope.LINEAR:
        raise ConfigError(f"config.json: {scaled}; calibration and eval compute linear scaling only")
    attention = Attention(
        heads, dims["kv_heads"], dims["KV"] // dims["kv_heads"],
        _number(config, "rope_theta", UNSAID_THETA), scaled.factor if scaled else 1.0,
    )  # fmt: skip
    experts = len(ids.get("expert", ())) if ids.get("moe") else 0
    routing = Routing(experts, _top_k(config, experts), _number(config, "moe_norm_min", UNSAID_NORM_MIN)) if experts else None
    router = next((r for r in table.map.rules if r.pt[0].endswith(".mlp.gate.weight")), None)
    return Geometry(
        dims["H"], len(ids["layer"]), dims["V"], _number(config, "rms_norm_eps", UNSAID_EPS), attention,
        frozenset(ids.get("moe", ())) if experts else frozenset(), bool(ids.get("shared")), routing,
        router is not None and router.shape[0] == "H",
    )  # fmt: skip


def _top_k(config: Config, experts: int) -> int:
    top_k = pair(config, "moe_k")[0]
    if top_k > experts:
        raise ConfigError(f"config.json: moe_k is {top_k}, of {experts} experts")
    return top_k


def _number(config: Mapping[str, Any], key: str, unsaid: float) -> float:
    value = config.get(key)
    if value is None:
        return unsaid
    if type(value) not in (int, float) or not 0 < value < 1e12:
        raise ConfigError(f"config.json: {key} is {value!r:.80}, not a number above 0")
    return float(value)
