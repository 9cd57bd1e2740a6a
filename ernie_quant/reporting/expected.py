"""What a codec loses of weights that are drawn from a normal distribution: a yardstick for the errors of a report.

No bound: weights of a model have other tails, or few values, and lose more or less than these. Measured by
benchmarks/gaussian_errors.py on bf16 weights; a test measures them again. A report has descriptions of codecs, not codecs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

# fmt: off
SHARING = tuple(2**n for n in range(4, 16))  # weights that share a scale: 16, 32, ... 32768
# in millionths of the weights' energy: integers, by how the scale is chosen, for each of SHARING
INTEGERS = {
    "int2, mse":                ( 91800, 112000, 126000, 136000, 143000, 145000, 147000, 148000, 149000, 149000, 149000, 149000),
    "int2, absmax":             (343000, 433000, 515000, 588000, 652000, 708000, 755000, 794000, 828000, 855000, 879000, 899000),
    "int2 (-1 to 1), mse":      (165000, 178000, 184000, 187000, 189000, 190000, 190000, 190000, 190000, 190000, 190000, 190000),
    "int2 (-1 to 1), absmax":   (343000, 433000, 515000, 588000, 652000, 708000, 755000, 794000, 828000, 855000, 879000, 899000),
    "int4, mse":                (  5250,   6780,   8220,   9460,  10400,  11000,  11400,  11600,  11800,  11900,  11900,  11900),
    "int4, absmax":             (  7270,   9420,  11600,  13800,  16000,  18200,  20400,  22600,  24900,  27000,  29200,  31500),
    "int4 (-7 to 7), mse":      (  6500,   8370,  10000,  11300,  12000,  12500,  12700,  12800,  12900,  12900,  12900,  13000),
    "int4 (-7 to 7), absmax":   (  7270,   9420,  11600,  13800,  16000,  18200,  20400,  22600,  24900,  27000,  29200,  31500),
    "int8, mse":                (  23.9,   30.8,   37.9,   45.1,   52.1,   58.8,   64.8,   70.6,   76.7,   82.4,   85.3,   87.2),
    "int8, absmax":             (  24.3,   31.3,   38.5,   45.8,   52.8,   59.5,   65.6,   71.5,   77.5,   83.5,   90.1,   97.2),
    "int8 (-127 to 127), mse":  (  24.2,   31.1,   38.3,   45.5,   52.2,   58.7,   64.6,   70.3,   75.8,   80.3,   84.5,   88.8),
    "int8 (-127 to 127), absmax":(  24.3,   31.3,   38.5,   45.8,   52.8,   59.5,   65.6,   71.5,   77.5,   83.5,   90.1,   97.2),
}
# all others, at any width
OTHERS = {
    "wint2 (CCQ)": 102500,
    "wint2 (CCQ), effort 4": 103200,
    "wint2 (CCQ), effort 1": 104400,
    "fp8, blocks 128x128": 702.4,
    "fp8, blocks 128x128, compressed-tensors": 702.4,
    "int4, group 128, fp8 inputs, mse": 10350,
    "int4, group 128, fp8 inputs, absmax": 13800,
    "mxfp4, group 32": 12420,
    "nvfp4, group 16": 6660,
    "nvfp4, group 16, fp4 inputs": 6660,
    "IQ4_NL": 5384,
    "IQ4_XS": 5466,
    "Q2_K": 67290,
    "Q3_K": 20600,
    "Q4_0": 6561,
    "Q4_K": 4846,
    "Q5_0": 1615,
    "Q5_1": 1116,
    "Q5_K": 1190,
    "Q6_K": 278.2,
    "Q8_0": 28.66,
}
# fmt: on
INTEGER = re.compile(
    r"(?P<kind>int\d(?: \(-\d+ to \d+\))?|w4a8), (?:group (?P<group>\d{1,6})|per channel)"
    r"(?:, Hadamard \d+|, int8 cache of \d+ channels)?, (?P<scale>mse|absmax)"
)
W4A8 = {"w4a8": "int4 (-7 to 7)"}  # what is rotated is as normal as before


def of(codec: str, shape: Sequence[int]) -> float | None:
    """The relative error of Gaussian weights [out, in]; None where nobody has measured it, or a text decides."""
    if codec in OTHERS:
        return OTHERS[codec] / 1e6
    found = INTEGER.fullmatch(codec)
    errors = INTEGERS.get(f"{W4A8.get(found['kind'], found['kind'])}, {found['scale']}") if found else None
    if not found or errors is None or not shape:
        return None
    return _between(errors, int(found["group"] or shape[-1]))


def _between(errors: Sequence[float], sharing: int) -> float | None:
    """Of a straight line between two measured numbers of weights that share a scale, both as logarithms."""
    if not SHARING[0] <= sharing <= SHARING[-1]:
        return None
    place = math.log2(sharing / SHARING[0])
    left = min(int(place), len(errors) - 2)
    part = place - left
    return float(errors[left] ** (1 - part) * errors[left + 1] ** part) / 1e6
