"""Compare the compiled search for WINT2 with the same search in plain torch: speed, error, and that the bytes are equal.

python benchmarks/ccq_speed.py [--rows 64] [--repeat 5]        # 20 seconds on one core

One thread each, best of `--repeat`, in turns. Speeds are millions of weights per second of processor time, so that a
machine shared with others says nearly the same, for a whole encode or decode.
The plain search gets fewer rows, since a row costs the same however many there are.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ernie_quant.codecs.ccq import CANDIDATES, EFFORTS, ConvolutionalCode
from ernie_quant.kernels import ccq, ccq_reference

WIDTHS = (1536, 2048, 8192)
PLAIN_ROWS = 8  # one of so many rows goes through the plain search


def speeds(calls: dict[Callable[[], object], int], repeat: int) -> list[float]:
    """Return the millions of weights per second of each call, which handles so many."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeat):
        for call in calls:
            start = time.thread_time()
            call()
            best[call] = min(best[call], time.thread_time() - start)
    return [weights / best[call] / 1e6 for call, weights in calls.items()]


def samples(rows: int) -> dict[str, Tensor]:
    """Return bf16 weights by name, as many in each."""
    torch.manual_seed(7)
    student = torch.distributions.StudentT(5.0)
    found = {}
    for width in WIDTHS:
        shape = (max(PLAIN_ROWS, rows * 2048 // width), width)
        found[f"Gaussian, {width}"] = torch.randn(shape).mul(0.02).bfloat16()
        found[f"Student-t 5, {width}"] = student.sample(shape).mul(0.02).bfloat16()
    return found


def row(name: str, weight: Tensor, effort: int, repeat: int) -> list[str]:
    """Return one row of the table."""
    codec, pairs = ConvolutionalCode(effort), CANDIDATES[:effort]
    encoded = codec.encode(weight)
    decoded = codec.decode(encoded)
    error = ((decoded.double() - weight.double()).square().sum() / weight.double().square().sum()).item()
    few = weight[: len(weight) // PLAIN_ROWS]
    plain = ccq_reference.encode(few, pairs)
    equal = all(torch.equal(plain[field], encoded[field][: len(few)]) for field in plain)
    fast, slow, decoding = speeds(
        {
            lambda: ccq.encode(weight, pairs): weight.numel(),
            lambda: ccq_reference.encode(few, pairs): few.numel(),
            lambda: ccq.decode(encoded): weight.numel(),
        },
        repeat,
    )
    cells = [f"{fast:.1f}", f"{slow:.2f}", f"{fast / slow:.0f}", f"{decoding:.0f}"]
    return [name, str(effort), f"{error:.4f}", *cells, "yes" if equal else "NO"]


def main() -> None:
    """Print a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="of 2048; wider ones in proportion")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    ConvolutionalCode().encode(torch.randn(1, 128))  # compiled before the clock starts
    titles = ["weights", "effort", "error", "encode Mw/s", "plain torch Mw/s", "ratio", "decode Mw/s", "same bytes"]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for name, weight in samples(args.rows).items():
        for effort in EFFORTS:
            print(f"| {' | '.join(row(name, weight, effort, args.repeat))} |", flush=True)


if __name__ == "__main__":
    main()
