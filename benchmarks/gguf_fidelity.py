"""What each GGUF type costs a real model in llama.cpp itself, beside ggml's own encoder in the same file.

python benchmarks/smol_ernie.py smol-256 --experts 4 --moe-inter 256 --pad-hidden 768
python benchmarks/gguf_fidelity.py smol-256 en-US.txt WORK
python benchmarks/gguf_fidelity.py smol-256 en-US.txt WORK --llama-quantize FOLDER    # mixes, beside llama-quantize's files

KL is that of (F32 file || file), in nats per token, over windows of 512 tokens, with its standard error over windows; the rows
`experts` have everything else in F32. FOLDER: shared objects with llama_model_quantize, as npm's @node-llama-cpp/linux-x64 has
them in bins/linux-x64; they are called by `llama_quantize` of a Python file given as --quantizer.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from llama_cpp import Ggml, Llama

from ernie_quant import ggml
from ernie_quant.planning.gguf import gguf_plan
from ernie_quant.run.whole import run_plan
from ernie_quant.sources import open_source

WINDOW = 512
EXPERTS = ("Q8_0", "Q6_K", "Q5_K_S", "Q4_K_S", "IQ4_XS", "IQ4_NL", "Q4_0", "Q3_K_M", "Q2_K")  # one type each with --experts-only
MIXES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q4_0", "Q3_K_M", "Q2_K")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64."""
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@dataclass(frozen=True)
class Measured:
    """Of a file; KL in nats per token, and its standard error over windows."""

    perplexity: float
    kl: float
    error: float

    def __str__(self) -> str:
        """`0.0123 ± 0.0004`."""
        return f"{self.kl:.4f} ± {self.error:.4f}"


class Reference:
    """Windows of tokens, and what the unquantized file makes of them."""

    def __init__(self, file: Path, text: str, windows: int) -> None:
        with Llama(file) as llama:
            ids = np.array(llama.tokens(text[: 8 * WINDOW * windows]))[: WINDOW * windows]
            self.windows = ids.reshape(windows, WINDOW)
            self.expected = [llama.logits(window) for window in self.windows]

    def measure(self, file: Path) -> Measured:
        """Perplexity and KL of a file."""
        losses, divergences = [], []
        with Llama(file) as llama:
            for window, expected in zip(self.windows, self.expected, strict=True):
                one, other = log_softmax(expected), log_softmax(llama.logits(window))
                losses.append(-np.take_along_axis(other[:-1], window[1:, None], 1).mean())
                divergences.append((np.exp(one) * (one - other)).sum(-1).mean())
        error = np.std(divergences, ddof=1) / np.sqrt(len(divergences))
        return Measured(float(np.exp(np.mean(losses))), float(np.mean(divergences)), float(error))

    def judge(self, file: Path) -> str:
        """For people."""
        found = self.measure(file)
        size = file.stat().st_size / 1e6
        return f"perplexity {found.perplexity:8.3f}  KL {found.kl:.5f} +- {found.error:.5f}  {size:7.1f} MB"


def write(source: Path, out: Path, mix: str, *, experts_only: bool = False) -> Path:
    """The file of a type."""
    checkpoint = open_source(source)
    settings = {"type": mix, "experts_only": experts_only, "keep_unfit": True}
    run_plan(gguf_plan(checkpoint, settings=settings), out, restart=True)
    return next(out.glob("*.gguf"))


@contextmanager
def encoder_of_ggml(dtype: str) -> Iterator[None]:
    """Files are written with ggml's own encoder of a type."""
    module, oracle = importlib.import_module(f"ernie_quant.kernels.ggml_{dtype.lower()}"), Ggml()
    ours = module.encode

    def encode(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        weights = None if importance is None else importance.numpy()
        return torch.from_numpy(oracle.quantize(ggml.NUMBERS[dtype], weight.float().numpy(), weights))

    module.encode = encode
    try:
        yield
    finally:
        module.encode = ours


def main() -> None:
    """Read the command line, print a line for each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--only", default="", help="types, with commas between them")
    parser.add_argument("--llama-quantize", type=Path)
    parser.add_argument("--quantizer", type=Path)
    args = parser.parse_args()
    only = set(filter(None, args.only.split(",")))
    plain = write(args.model, args.work / "plain", "F32")
    reference = Reference(plain, args.text.read_text(), args.windows)
    print(f"F32: {reference.judge(plain)}", flush=True)
    from ernie_quant.planning.mix import BASE

    for mix in EXPERTS if args.llama_quantize is None else ():
        if only and mix not in only:
            continue
        base = BASE[mix]
        ours = write(args.model, args.work / "ours", mix, experts_only=True)
        print(f"experts {base}: ernie-quant {reference.judge(ours)}", flush=True)
        with encoder_of_ggml(base):
            theirs = write(args.model, args.work / "theirs", mix, experts_only=True)
        print(f"experts {base}: ggml        {reference.judge(theirs)}", flush=True)
    for mix in MIXES if args.llama_quantize is not None else ():
        if only and mix not in only:
            continue
        print(f"{mix}: ernie-quant    {reference.judge(write(args.model, args.work / 'ours', mix))}", flush=True)
        file = args.work / f"{mix}.gguf"
        command = [sys.executable, args.quantizer, plain, file, mix, "--lib", args.llama_quantize]
        subprocess.run(command, check=True, capture_output=True)
        print(f"{mix}: llama-quantize {reference.judge(file)}", flush=True)
        file.unlink()


if __name__ == "__main__":
    main()
