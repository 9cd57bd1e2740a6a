"""Round to nearest, symmetric: integer codes and one bf16 scale per group of inputs, or per output channel.

w ~ code * scale, codes from -2**(bits-1) to 2**(bits-1) - 1. The scale is searched by squared error (`mse`) or
taken from the largest |w| (`absmax`: max|w| / (2**(bits-1) - 1), as GPTQModel and llm-compressor do).

With `full_range=False` the lowest code is left out (-7 to 7, -127 to 127) and scales are positive: FastDeploy's
WINT4 and WINT8. `absmax` is then paddle's `weight_quantize` to the bit, which rounds half away from zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ernie_quant import kernels
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import _feedback
from ernie_quant.measure import Difference, squares

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded, Encoder
    from ernie_quant.kernels.curvature import Inputs
    from ernie_quant.kernels.rtn_feedback import Grid

CHANNEL = "channel"
SCALES = ("mse", "absmax")

# Shrinking factors tried by the search, before a least-squares step. Five spread over [.68, 1] come within 1.3% of an
# exhaustive search on Gaussian groups of 128; whole channels hold larger outliers and want the finer, longer list.
GROUP_RATIOS = (1.0, 0.92, 0.84, 0.76, 0.68)
CHANNEL_RATIOS = (1.0, 0.92, 0.84, 0.77, 0.70, 0.63, 0.57, 0.51, 0.45, 0.39, 0.33, 0.28, 0.23)
LONG_GROUP = 256
# Without the lowest code, for any group: on average .3% above an exhaustive search (every .02 down to .10; channels of
# 512 to 8192, Gaussian, Laplace and Student-t with 5 and 3 degrees). 8 bits gain only just below the largest |w|: .1%.
SYMMETRIC_RATIOS = (1.0, 0.9, 0.82, 0.76, 0.72, 0.68, 0.64, 0.6, 0.56, 0.5, 0.44, 0.38, 0.3, 0.2)
SYMMETRIC_RATIOS_INT8 = (1.0, 0.99, 0.98, 0.97, 0.96, 0.95, 0.94)
FEEDBACK_RATIOS = (1.0, 0.93, 0.86, 0.8, 0.74, 0.68)  # tried for a group with feedback


@dataclass(frozen=True)
class RoundToNearest:
    """`bits` 2, 4 or 8; `group_size` a number of inputs that share a scale, or "channel".

    `full_range` False leaves out the lowest code and negative scales. `method`, `damping` and `passes` say what is done with
    statistics of the inputs (codecs/_feedback.py); without them a weight is rounded to the nearest.
    """

    bits: int = 4
    group_size: int | str = 128
    scale: str = "mse"
    full_range: bool = True
    method: str = _feedback.NEAREST
    damping: float = _feedback.DAMPING
    passes: int = _feedback.PASSES
    rows = 1
    decodes_to = "BF16"
    version = 2
    needs = ()

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise ValueError(f"bits is {self.bits!r}, not 2, 4 or 8")
        if self.group_size != CHANNEL and (type(self.group_size) is not int or self.group_size < 16 or self.group_size % 8):
            raise ValueError(f"group_size is {self.group_size!r}, not 'channel' or a multiple of 8 from 16 on")
        if self.scale not in SCALES:
            raise ValueError(f"scale is {self.scale!r}, not {' or '.join(SCALES)}")
        if type(self.full_range) is not bool:
            raise ValueError(f"full_range is {self.full_range!r}, not True or False")
        _feedback.check(self.method, self.damping, self.passes)

    @property
    def rate(self) -> float:
        """Slower for whole rows than for groups."""
        return 220.0 if self.group_size == CHANNEL else 300.0

    @property
    def form(self) -> str:
        """Bits, group and codes."""
        group = "per channel" if self.group_size == CHANNEL else f"group {self.group_size}"
        high = 2 ** (self.bits - 1) - 1
        codes = "" if self.full_range else f" (-{high} to {high})"
        return f"int{self.bits}{codes}, {group}"

    def describe(self) -> str:
        """For people."""
        return f"{self.form}, {self.scale}{_feedback.describe(self.method, self.damping, self.passes)}"

    def group(self, spec: TensorSpec) -> int:
        """Inputs that share a scale."""
        return spec.shape[1] if self.group_size == CHANNEL else int(self.group_size)

    def problem(self, spec: TensorSpec) -> str | None:
        """A group must divide the inputs: no runtime loads ragged ones."""
        width = spec.shape[1]
        if self.group_size == CHANNEL:
            return None
        if width % self.group(spec):
            fits = [str(g) for g in (128, 64, 32) if width % g == 0]
            return f"group_size {self.group_size} does not divide {width} inputs; {', '.join([*fits, CHANNEL])} would"
        return None

    def specs(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """codes int8 [out, in] and scale bf16 [out, in / group]."""
        out, width = spec.shape
        return {
            "codes": TensorSpec((out, width), "I8"),
            "scale": TensorSpec((out, width // self.group(spec)), "BF16"),
        }

    def bits_per_weight(self, spec: TensorSpec) -> float:
        """The codes' bits, and 16 for the scale of each group."""
        return self.bits + 16 / self.group(spec)

    def prepare(self, spec: TensorSpec, statistics: Encoded) -> Encoder | None:
        """With `hessian` f32 [in, in] among the statistics: feedback, and descent where the method says so."""
        if self.method == _feedback.NEAREST or "hessian" not in statistics:
            return None
        from ernie_quant.kernels import curvature

        inputs = curvature.inputs(_feedback.hessian(spec, statistics), self.damping)
        passes, grid = _feedback.passes(self.method, self.passes), self._grid(self.group(spec))
        return _feedback.Feedback(lambda weight: self._encode_with(weight, inputs, grid, passes), self.encode)

    def _grid(self, group: int) -> Grid:
        """The codes, and the scales that are tried for a group of inputs."""
        from ernie_quant.kernels.rtn_feedback import Grid

        high = 2 ** (self.bits - 1) - 1
        ratios: tuple[float, ...] = FEEDBACK_RATIOS
        if self.bits == 8:
            ratios = SYMMETRIC_RATIOS_INT8
        elif self.bits == 2 and not self.full_range:  # -1, 0 and 1 want scales far below the largest |w|
            ratios = SYMMETRIC_RATIOS
        if self.scale == "absmax":
            return Grid(group, -high - self.full_range, high, high, (1.0,), False)
        return Grid(group, -high - self.full_range, high, high + self.full_range, ratios, self.full_range)

    def _encode_with(self, weight: torch.Tensor, inputs: Inputs, grid: Grid, passes: int) -> Encoded:
        """Fields of rows f32 [rows, in]; where a row has one scale, it is that of the data-free search."""
        scale_of = (lambda rows: self.encode(rows)["scale"][:, 0]) if self.group_size == CHANNEL else None
        codes, scales = kernels.of("rtn_feedback", weight).encode(weight, inputs, grid, passes, scale_of)
        return {"codes": codes, "scale": scales}

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Codes and scales of a weight [out, in] of any float dtype."""
        return self.measured(weight)[0]

    def measured(self, weight: torch.Tensor) -> tuple[Encoded, Difference]:
        """Codes and scales, and what the kernel saw being lost."""
        import numpy as np
        import torch

        if weight.dtype != torch.bfloat16:
            weight = weight.float()
        group = weight.shape[1] if self.group_size == CHANNEL else int(self.group_size)
        high = 2 ** (self.bits - 1) - 1
        if self.scale == "absmax" and not self.full_range:
            encoded = self._absmax_codes(weight, group)
            return encoded, squares(weight, self.decode(encoded))
        ratios: tuple[float, ...]
        low = -high - 1
        if self.scale == "absmax":
            ratios, refine, divisor, signed = (1.0,), 0, high, False
        elif self.full_range:
            ratios, refine = (GROUP_RATIOS, 1) if group <= LONG_GROUP else (CHANNEL_RATIOS, 2)
            divisor, signed = high + 1, True
        else:
            ratios, refine = (SYMMETRIC_RATIOS_INT8, 1) if self.bits == 8 else (SYMMETRIC_RATIOS, 2)
            low, divisor, signed = -high, high, False
        codes, scale, sums = kernels.of("rtn", weight).encode(
            weight, group, low, high, divisor, np.array(ratios, np.float32), refine, signed
        )
        return {"codes": codes, "scale": scale}, Difference(*sums)

    def _absmax_codes(self, weight: torch.Tensor, group: int) -> Encoded:
        """As paddle's `weight_quantize` makes them."""
        import torch

        codes, scale = kernels.of("weight_quantize", weight).absmax_codes(weight.reshape(-1, group), self.bits, torch.bfloat16)
        return {"codes": codes.reshape(weight.shape), "scale": scale.reshape(len(weight), -1)}

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """bf16 [out, in]."""
        weight: torch.Tensor = kernels.of("rtn", encoded["codes"]).decode(encoded["codes"], encoded["scale"])
        return weight

    def recode(self, weight: torch.Tensor, encoded: Encoded) -> Encoded:
        """Codes of weight / scale, rounded; as they are where the scale is 0, as paddle stores rows of zeros."""
        import torch

        scale = encoded["scale"].float()[..., None]
        high = 2 ** (self.bits - 1) - 1
        ratio = weight.float().reshape(*scale.shape[:2], -1) / torch.where(scale == 0, 1.0, scale)
        codes = ratio.round().clamp(-high - self.full_range, high).to(torch.int8)
        codes = torch.where(scale == 0, encoded["codes"].reshape(codes.shape), codes)
        return encoded | {"codes": codes.reshape(weight.shape)}


CODEC = RoundToNearest
EXAMPLES = (
    RoundToNearest(4, 128),
    RoundToNearest(4, 32, "absmax"),
    RoundToNearest(4, CHANNEL),
    RoundToNearest(8, CHANNEL),
    RoundToNearest(8, 64, "absmax"),
    RoundToNearest(2, 64),
    RoundToNearest(4, 64, method="feedback"),
    RoundToNearest(4, CHANNEL, method="descent"),
    RoundToNearest(4, 32, method="descent", damping=0.1, passes=1),
)
