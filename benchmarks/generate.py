"""Print one greedy sentence of a checkpoint, on the CPU.

python benchmarks/generate.py MODEL "The capital of France is"
"""

import argparse
import re
from pathlib import Path

import torch
from models import load_model, load_tokenizer, silence

MAX_NEW_TOKENS = 24


@torch.no_grad()
def generate(folder: Path, prompt: str) -> str:
    """Continue the prompt greedily and return it with the continuation up to its first full stop."""
    tokenizer, model = load_tokenizer(folder), load_model(folder, torch.float32)
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[0]
    text = tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    # a full stop ends a sentence where a space or the end follows: not in 3.5
    return prompt + re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0].rstrip()


def main() -> None:
    """Read the command line, print the sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("prompt")
    args = parser.parse_args()
    silence()
    print(generate(args.model, args.prompt))


if __name__ == "__main__":
    main()
