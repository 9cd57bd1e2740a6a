"""How KL divergence at the output grows with the energy of an error in a layer: a line per place, with the slope.

python benchmarks/smol_ernie.py smol-256 --experts 4 --moe-inter 256 --pad-hidden 768
python benchmarks/error_slopes.py smol-256 [--runtime llama_cpp] [--tokens 512]

`allocate` disturbs each place once and takes KL to be in proportion to the error. Here it is done twice, with the codec in the
middle and with that of the fewest bits. A slope of 1 is proportion.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from ernie_quant.calibration import sensitivity
from ernie_quant.calibration.opened import readable
from ernie_quant.calibration.tokenizer import tokenizer_of
from ernie_quant.calibration.windows import windows

from ernie_quant.planning.units import units_of
from ernie_quant.run.allocate import LENGTH


def main() -> None:
    """Read the command line, print the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runtime", default="llama_cpp")
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    source = readable(args.model)
    units = units_of(source.checkpoint, args.runtime)
    text = windows(tokenizer_of(args.model), "auto", args.tokens, length=LENGTH, judge=False)
    more = sensitivity.measure(source, units, text).gains
    sensitivity.middle = lambda unit: 0
    few = sensitivity.measure(source, units, text).gains
    slopes, ratios = [], []
    for a, b in zip(more, few, strict=True):
        ratios.append(b.error / a.error)
        slopes.append(math.log(b.kl / a.kl) / math.log(ratios[-1]))
        print(
            f"layer {a.layer:2d} {a.place:9} error {a.error:.2e} {b.error:.2e}  KL {a.kl:.2e} {b.kl:.2e}  slope {slopes[-1]:.2f}"
        )
    near = sum(0.93 <= slope <= 1.06 for slope in slopes)
    print(f"{len(slopes)} places; errors {min(ratios):.0f} to {max(ratios):.0f} times as large; slopes {min(slopes):.2f} to"
          f" {max(slopes):.2f}, {near} of them from .93 to 1.06")  # fmt: skip


if __name__ == "__main__":
    main()
