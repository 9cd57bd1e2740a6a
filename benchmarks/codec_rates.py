"""Million weights that one core encodes in a second, for every codec: its `rate`, from which `plan` counts hours.

OMP_NUM_THREADS=1 python benchmarks/codec_rates.py
"""

import time

import torch

from ernie_quant import codecs, plugins
from ernie_quant.codecs.keep import Keep

SHAPE = (512, 4096)
REPEATS = 3


def main() -> None:
    torch.set_num_threads(1)
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    print(f"{'codec':34}{'M weights/s':>12}{'says':>8}")
    for module in plugins.modules(codecs):
        for codec in dict.fromkeys(module.EXAMPLES):
            if isinstance(codec, Keep):
                continue
            codec.encode(weight[: codec.rows])  # compiles
            seconds = min(timed(codec, weight) for _ in range(REPEATS))
            print(f"{codec.describe():34}{weight.numel() / seconds / 1e6:12.2f}{codec.rate:8.2f}")


def timed(codec: codecs.Codec, weight: torch.Tensor) -> float:
    begun = time.perf_counter()
    codec.encode(weight)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
