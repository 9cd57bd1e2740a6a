"""Encoders of GGUF's block types beside ggml's own, on one thread of one processor, in one run.

python benchmarks/gguf_speed.py               # all types
python benchmarks/gguf_speed.py Q4_K Q2_K

Rows are Gaussian, 1536 wide. Speeds are millions of weights per second, the best of three; errors ||W - W'||^2 / ||W||^2.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable

import numpy as np
import torch
from llama_cpp import Ggml

from ernie_quant.dtypes import BLOCKS
from ernie_quant.ggml import NUMBERS

TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q5_0", "Q5_1", "Q3_K", "Q2_K")
ROWS, WIDTH, TRIES = 512, 1536, 3


def seconds(call: Callable[[], object]) -> float:
    """The least of a few."""
    found = []
    for _ in range(TRIES):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return min(found)


def main() -> None:
    """Read the command line, print a line for each type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", default=TYPES)
    torch.set_num_threads(1)
    oracle = Ggml()
    weight = torch.randn((ROWS, WIDTH), generator=torch.Generator().manual_seed(0))
    values = weight.numpy()
    total, millions = float((values.astype(np.float64) ** 2).sum()), weight.numel() / 1e6
    for name in parser.parse_args().types:
        kernels, number = importlib.import_module(f"ernie_quant.kernels.ggml_{name.lower()}"), NUMBERS[name]
        ours, theirs = kernels.encode(weight), oracle.quantize(number, values)  # compiled before it is timed
        errors = [
            float(((values - decoded).astype(np.float64) ** 2).sum()) / total
            for decoded in (kernels.decode(ours).numpy(), oracle.dequantize(number, theirs, WIDTH))
        ]
        times = [seconds(lambda k=kernels: k.encode(weight)), seconds(lambda n=number: oracle.quantize(n, values))]
        elements, nbytes = BLOCKS[name]
        print(
            f"{name:7} {8 * nbytes / elements:7.4f} bits  error {errors[0]:.6f} (ggml {errors[1]:.6f})"
            f"  {millions / times[0]:6.1f} M/s (ggml {millions / times[1]:6.1f}): {times[1] / times[0]:.1f} times as fast",
            flush=True,
        )


if __name__ == "__main__":
    main()
