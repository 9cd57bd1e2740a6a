"""What kernels with inputs of few bits and an integer KV cache make of the values that they are given.

FastDeploy's W4A8C8 and NVFP4's W4A4, in float32 but for the rounding that their files speak of:

- inputs: `codec.rounded`, with the `activation_scale` of a weight.
- KV cache (PaddlePaddle/FastDeploy, model_executor/layers/quantization/kv_cache.py and QuantToC8 in
  custom_ops/gpu_ops/append_attn/utils.cuh), of a channel with the scale s = max |x|, both factors in bfloat16:
  q = clamp(round to even(x * (127 / s)), -127, 127), and q * (s / 127) is what attention sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from ernie_quant.codecs import Codec, RoundsInputs, of_text
from ernie_quant.views.build import decoded
from ernie_quant.views.files import Files
from ernie_quant.views.kinds import View
from ernie_quant.weights.stored import Stored

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded

Rounding: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"  # inputs [..., in] -> as the kernel sees them

HIGH = 127.0
LARGEST, KEY, VALUE = "largest", "largest_key", "largest_value"  # what codecs may need to know of a text

CACHE = "an int8 KV cache"


@dataclass(frozen=True)
class Cache:
    """Scales of the keys (after RoPE) and values that a cache holds, float32 [kv_heads * head_dim] each."""

    key_scale: torch.Tensor
    value_scale: torch.Tensor

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """[windows, kv_heads, tokens, head_dim] as they are read back."""
        return _held(x, self.key_scale)

    def values(self, x: torch.Tensor) -> torch.Tensor:
        """[windows, kv_heads, tokens, head_dim] as they are read back."""
        return _held(x, self.value_scale)


def _held(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    import torch

    of_heads = scale.to(torch.bfloat16).view(x.shape[1], 1, x.shape[3])
    into, out_of = (HIGH / of_heads).float(), (of_heads / HIGH).float()
    return (x * into).round().clamp(-HIGH, HIGH) * out_of


def rounding(codec: Codec, once: Encoded) -> Rounding | None:
    """What happens to the inputs of a weight; None where nothing does. `once`: its fields."""
    return partial(codec.rounded, activation_scale=once["activation_scale"]) if isinstance(codec, RoundsInputs) else None


def cache(codec: Codec, once: Encoded) -> Cache | None:
    """That of an attention whose q, k and v are stored by `codec`; None where it holds what it is given."""
    return Cache(once["key_scale"], once["value_scale"]) if KEY in codec.needs else None


def named(views: Iterable[View]) -> str:
    """For people: what of few bits weights under these views are computed with, beside their own; "" for nothing."""
    found = {source.codec for view in views for source in decoded(view) if isinstance(source, Stored)}
    said = sorted({codec.inputs for codec in found if isinstance(codec, RoundsInputs)})
    return " and ".join([*said, *([CACHE] if any(KEY in codec.needs for codec in found) else [])])


def found(view: View, files: Files) -> tuple[Codec, Encoded] | None:
    """How the weight under a view is stored, and its fields (of a few rows); None for one that needs nothing of a text."""
    for source in decoded(view):
        if isinstance(source, Stored) and of_text(source.codec):
            return source.codec, source.encoded(files, source.slabs(1)[0])
    return None
