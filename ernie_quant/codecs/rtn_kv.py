"""8 bits per channel for a linear that makes keys and values, and the scales of the cache that holds these in 8 bits.

A cached number of channel c is round(127 x / scale[c]), with scale[c] the largest |x| of a calibration: of keys as they are
cached, after their rotary position, and of values. The weight is coded as by `rtn` with codes -127 to 127.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import _feedback
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.errors import ErnieQuantError
from ernie_quant.measure import Difference

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded, Encoder

LARGEST = {"key_scale": "largest_key", "value_scale": "largest_value"}  # field -> statistic, f32 [cached_channels]


@dataclass(frozen=True)
class CachedRoundToNearest:
    """`cached_channels`: kv heads times their dimension, the keys of a token. The other options are those of `rtn`."""

    cached_channels: int
    scale: str = "mse"
    method: str = _feedback.NEAREST
    damping: float = _feedback.DAMPING
    passes: int = _feedback.PASSES
    rows = 1
    rate = 220.0
    version = 1
    decodes_to = "BF16"
    needs = tuple(LARGEST.values())

    def __post_init__(self) -> None:
        if type(self.cached_channels) is not int or self.cached_channels < 1:
            raise ValueError(f"cached_channels is {self.cached_channels!r}, not a number of channels")
        _ = self.integers  # which checks the other options

    @property
    def integers(self) -> RoundToNearest:
        """The codec of the weight."""
        return RoundToNearest(8, CHANNEL, self.scale, False, self.method, self.damping, self.passes)

    @property
    def form(self) -> str:
        """The weight's, and the cache."""
        return f"{self.integers.form}, int8 cache of {self.cached_channels} channels"

    def describe(self) -> str:
        """For people."""
        return f"{self.form}, {self.scale}{_feedback.describe(self.method, self.damping, self.passes)}"

    def problem(self, spec: TensorSpec) -> str | None:
        """Queries, keys and values are outputs of the linear."""
        if spec.shape[0] <= 2 * self.cached_channels:
            return (
                f"{spec.shape[0]} outputs are not queries and twice {self.cached_channels} cached channels, of keys and of values"
            )
        return None

    def specs(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """codes int8 [out, in] and scale bf16 [out, 1]; once key_scale and value_scale F32 [cached_channels]."""
        return self.integers.specs(spec) | {name: TensorSpec((self.cached_channels,), "F32") for name in LARGEST}

    def bits_per_weight(self, spec: TensorSpec) -> float:
        """8, 16 for the scale of each output, and 32 for each of the cache."""
        return (8 * spec.numel + 16 * spec.shape[0] + 64 * self.cached_channels) / spec.numel

    def prepare(self, spec: TensorSpec, statistics: Encoded) -> Encoder | None:
        """With `largest_key` and `largest_value` f32 [cached_channels] the scales of the cache; with `hessian` as `rtn` does.

        Raises ErnieQuantError where one is missing or is none of this model's.
        """
        if not statistics:
            return None
        once = {name: self._scale(statistics, wanted) for name, wanted in LARGEST.items()}
        encoder = self.integers.prepare(spec, statistics)
        return _feedback.Feedback(encoder.encode if encoder else self.encode, self.encode, once)

    def _scale(self, statistics: Encoded, name: str) -> torch.Tensor:
        """f32 [cached_channels]; a channel that is always zero has 1, as programs divide by it."""
        import torch

        if name not in statistics:
            raise ErnieQuantError(f"int8 cache: {name} is not among the statistics: a scale of the cache is made of it")
        largest = statistics[name].detach().float().reshape(-1)
        if len(largest) != self.cached_channels:
            raise ErnieQuantError(f"int8 cache: {name} has {len(largest)} channels, and the cache {self.cached_channels}")
        if not bool((largest.isfinite() & (largest >= 0)).all()):
            raise ErnieQuantError(f"int8 cache: {name} holds what is no magnitude")
        return torch.where(largest > 0, largest, 1.0)

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Codes and scales of a weight [out, in] of any float dtype; those of the cache are not known from it."""
        return self.integers.encode(weight)

    def measured(self, weight: torch.Tensor) -> tuple[Encoded, Difference]:
        """`encode`, and what the kernel saw being lost."""
        return self.integers.measured(weight)

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """bf16 [out, in]."""
        return self.integers.decode(encoded)

    def recode(self, weight: torch.Tensor, encoded: Encoded) -> Encoded:
        """Codes of weight / scale, rounded."""
        return self.integers.recode(weight, encoded)


CODEC = CachedRoundToNearest
EXAMPLES = (CachedRoundToNearest(32), CachedRoundToNearest(48, "absmax"), CachedRoundToNearest(32, method="descent"))
