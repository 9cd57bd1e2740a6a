"""Print perplexity and KL divergence of checkpoints, computed in float32 on one CPU thread.

python benchmarks/perplexity.py MODEL [MODEL ...] --text FILE [--tokens 3066] [--reference MODEL]

The text's first tokens are read in separate windows of 512, each predicting 511: 3066 are six windows. Quantized
weights are dequantized while loading, so that nothing but the weights differs between models: bf16 arithmetic
alone would cost a KL of 1e-3, more than int8 does. KL is the mean over tokens of KL(reference || model) in nats.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from models import load_model, load_tokenizer, silence
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss

PREDICTED = 511


@dataclass(frozen=True)
class Row:
    """One model's result; `kl` is None without a reference."""

    model: str
    perplexity: float
    kl: float | None


def windows(folder: Path, text: str, tokens: int) -> Tensor:
    """Return the text's first token ids, [windows, 512]."""
    count, rest = divmod(tokens, PREDICTED)
    if rest or not count:
        raise SystemExit(f"--tokens {tokens} is not a multiple of {PREDICTED}")
    ids = load_tokenizer(folder)(text, add_special_tokens=False)["input_ids"]
    length = count * (PREDICTED + 1)
    if len(ids) < length:
        raise SystemExit(f"the text has {len(ids)} tokens, --tokens {tokens} needs {length}")
    return torch.tensor(ids[:length]).view(count, PREDICTED + 1)


@torch.no_grad()
def log_probabilities(folder: Path, ids: Tensor) -> Iterator[Tensor]:
    """Yield the log probabilities of each window's next tokens, [511, vocabulary] float32."""
    model = load_model(folder, torch.float32)
    for window in ids:
        yield model(window[None], use_cache=False).logits[0, :-1].log_softmax(-1)


def evaluate(folder: Path, ids: Tensor, reference: list[Tensor] | None) -> Row:
    """Measure one model."""
    nll = kl = 0.0
    for i, log_q in enumerate(log_probabilities(folder, ids)):
        nll += nll_loss(log_q, ids[i, 1:]).item() / len(ids)
        if reference:
            kl += kl_div(log_q, reference[i], reduction="batchmean", log_target=True).item() / len(ids)
    return Row(folder.name, math.exp(nll), kl if reference else None)


def table(rows: list[Row]) -> str:
    """Return a markdown table."""
    lines = ["| model | perplexity | KL |", "|---|---|---|"]
    lines += [f"| {r.model} | {r.perplexity:.2f} | {'' if r.kl is None else f'{r.kl:.2e}'} |" for r in rows]
    return "\n".join(lines)


def main() -> None:
    """Read the command line, measure the models, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text, see texts.py")
    parser.add_argument("--tokens", type=int, default=3066, help="predicted tokens, a multiple of 511")
    parser.add_argument("--reference", type=Path, metavar="MODEL", help="model to measure KL against")
    args = parser.parse_args()
    silence()
    # on few and shared cores, two threads were 30 times slower than one
    torch.set_num_threads(1)
    ids = windows(args.reference or args.models[0], args.text.read_text(encoding="utf-8"), args.tokens)
    reference = list(log_probabilities(args.reference, ids)) if args.reference else None
    print(table([evaluate(folder, ids, reference) for folder in args.models]))


if __name__ == "__main__":
    main()
