"""What codecs do with statistics of a layer's inputs: options of a recipe rule, and the encoder that they make.

`method`: "nearest" does nothing with them; "feedback" makes up for the error of each input by those after it; "descent" goes
on with `passes` over all codes and scales. `damping` is added to H, as a part of its mean diagonal: .3 to .5 is best for inputs
that calibration has not seen, GPTQ's .01 fits those that it has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.errors import ErnieQuantError

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded

NEAREST, FEEDBACK, DESCENT = METHODS = ("nearest", "feedback", "descent")
DAMPING, PASSES = 0.3, 2
MAX_PASSES = 100


def check(method: str, damping: float, passes: int) -> None:
    """Raises ValueError where an option makes no sense."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, not {', '.join(METHODS[:-1])} or {METHODS[-1]}")
    if type(damping) not in (int, float) or not 0 < damping <= 100:
        raise ValueError(f"damping is {damping!r}, not a number above 0 and up to 100")
    if type(passes) is not int or not 1 <= passes <= MAX_PASSES:
        raise ValueError(f"passes is {passes!r}, not a whole number from 1 to {MAX_PASSES}")


def describe(method: str, damping: float, passes: int) -> str:
    """What follows in the description of a codec: `, descent, damping 0.1, passes 3`; options as they come are left out."""
    if method == NEAREST:
        return ""
    of_damping = f", damping {damping:g}" if damping != DAMPING else ""
    of_passes = f", passes {passes}" if method == DESCENT and passes != PASSES else ""
    return f", {method}{of_damping}{of_passes}"


def passes(method: str, n: int) -> int:
    """Of descent."""
    return n if method == DESCENT else 0


def hessian(spec: TensorSpec, statistics: Encoded) -> torch.Tensor:
    """H of the inputs of a weight [out, in]. Raises ErnieQuantError."""
    found, width = statistics["hessian"], spec.shape[1]
    if tuple(found.shape) != (width, width):
        shape = " x ".join(map(str, found.shape))
        raise ErnieQuantError(f"statistics of inputs are {shape}, and the weight has {width} inputs: these are not its inputs")
    return found


@dataclass(frozen=True)
class Feedback:
    """Encodes any rows of any weights that have the same inputs, in any thread; each row by itself."""

    feedback: Callable[[torch.Tensor], Encoded]
    data_free: Callable[[torch.Tensor], Encoded]
    once: Encoded = field(default_factory=dict)  # what is stored beside the codes and known from the statistics alone

    def encode(self, weight: torch.Tensor) -> Encoded:
        """The fields of rows [rows, in]; rows of zeros, of NaN and out of all bounds are encoded as without statistics."""
        from ernie_quant.kernels.feedback import encodable

        weight = weight.detach().float()
        good = encodable(weight)
        if good.all():
            return self.feedback(weight)
        encoded = self.data_free(weight)
        for name, rows in (self.feedback(weight[good]) if good.any() else {}).items():
            encoded[name][good] = rows
        return encoded
