"""What each codec loses of weights that are drawn from a normal distribution: the table in ernie_quant/reporting/expected.py.

python benchmarks/gaussian_errors.py [rtn]

Prints millionths, a line per description of a codec; with `rtn` one per kind of integers, with an error for each number of
weights that share a scale.
"""

from __future__ import annotations

import sys

import torch

from ernie_quant import codecs, plugins
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.codecs._feedback import NEAREST
from ernie_quant.codecs.rtn import CHANNEL, SCALES, RoundToNearest
from ernie_quant.measure import compare
from ernie_quant.reporting.expected import SHARING

WEIGHTS = 1 << 22


def measured(codec: Codec, width: int, weights: int = WEIGHTS) -> float:
    """Relative error of bf16 weights [weights / width, width] of standard deviation .02."""
    weight = torch.randn(weights // width, width, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    assert codec.problem(TensorSpec(tuple(weight.shape), "BF16")) is None
    return compare("", weight, codec.decode(codec.encode(weight)).float()).rel_error


def of_groups() -> None:
    """Of integers, by how many weights share a scale."""
    for bits in (2, 4, 8):
        for full_range in (True, False):
            for scale in SCALES:
                codec = RoundToNearest(bits, CHANNEL, scale, full_range)
                errors = [measured(codec, width) for width in SHARING]
                print(f"{codec.describe()}: {', '.join(f'{1e6 * error:.3g}' for error in errors)}", flush=True)


def of_others() -> None:
    """Of all other codecs, which lose the same at any width."""
    for module in plugins.modules(codecs):
        for codec in () if module.__name__.endswith((".rtn", ".keep")) else module.EXAMPLES:
            if getattr(codec, "method", NEAREST) == NEAREST:
                print(f"{codec.describe()}: {1e6 * measured(codec, 4096):.4g}", flush=True)


if __name__ == "__main__":
    (of_groups if sys.argv[1:] == ["rtn"] else of_others)()
