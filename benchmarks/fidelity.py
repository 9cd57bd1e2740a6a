"""Print what quantization costs a real model, without and with calibration: KL divergence and perplexity, in one table.

python benchmarks/fidelity.py WORK --text en-US.txt --text zh-CN.txt --text it-IT.txt [--tokens 3066] [--only WORD ...]

WORK gets the models of smol_ernie.py (made if they are not there) and a result for every row; what is there already is taken
as it is. The texts are those of texts.py, which no calibration text comes from; the first is the one that rows are compared
by, a text in a language that `auto` leaves out shows what that costs. `ernie-quant eval` measures: float32, windows of 512
tokens, KL(source || result) in nats per token with the standard error over windows.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

MODELS = {
    "u8": [],
    "u8-640": ["--pad-hidden", "640"],
    "s8k4-640": ["--routing", "sparse", "--experts", "8", "--top-k", "4", "--moe-inter", "128", "--pad-hidden", "640"],
}
EXPERTS = ["--experts-only"]


@dataclass(frozen=True)
class Row:
    """A line of the table: a command, without and with calibration."""

    title: str
    model: str
    command: list[str]
    calibrated: bool = False
    fit: bool = False
    weights_only: bool = False  # without the integer activations and KV cache that it is computed with

    @property
    def name(self) -> str:
        """Of its folder."""
        words = [self.model, *self.command, *(["calibrated"] if self.calibrated else []), *(["fit"] if self.fit else [])]
        return "-".join(word.strip("-") for word in words)


def variants(title: str, model: str, command: list[str]) -> list[Row]:
    """Data-free, calibrated, and calibrated with fits."""
    return [
        Row(title, model, command),
        Row(f"{title}, calibrated", model, command, calibrated=True),
        Row(f"{title}, calibrated, --fit", model, command, calibrated=True, fit=True),
    ]


ROWS = [
    *variants("int4, group 64", "u8", ["wint4", *EXPERTS, "--group-size", "64"]),
    *variants("int4 per channel", "u8", ["wint4", *EXPERTS, "--group-size", "channel"]),
    *variants("half WINT4, half WINT2", "u8-640", ["wint2", "--wint4-layers", "15"]),
    *variants("WINT2", "u8-640", ["wint2", "--wint4-layers", "0"]),
    *variants("top 4 of 8: int4, group 64", "s8k4-640", ["wint4", *EXPERTS, "--group-size", "64"]),
    *variants("top 4 of 8: WINT2", "s8k4-640", ["wint2", "--wint4-layers", "0"]),
    *[
        row
        for model, words in (("u8-640", ""), ("s8k4-640", "top 4 of 8: "))
        for row in (
            Row(f"{words}W4A8C8, calibrated", model, ["w4a8"], calibrated=True),
            Row(f"{words}its weights alone", model, ["w4a8"], calibrated=True, weights_only=True),
            Row(f"{words}WINT4 and WINT8, calibrated", model, ["wint4", "--runtime", "fastdeploy"], calibrated=True),
            Row(f"{words}int8 per channel", model, ["wint8", "--group-size", "channel"]),
        )
    ],
]


def run(*command: object) -> str:
    """What a program prints on stdout; its errors end this one."""
    return subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout


def tool(*arguments: object) -> str:
    """Of ernie-quant."""
    return run(sys.executable, "-m", "ernie_quant", *arguments)


def made(row: Row, work: Path, tokens: int) -> tuple[Path, float]:
    """The folder of a result, and the seconds that it took; 0 where it was there."""
    out = work / row.name
    if (out / "ernie-quant.json").is_file():
        return out, 0.0
    asked = ["--calibration", "auto", "--calibration-tokens", tokens] if row.calibrated else []
    began = time.monotonic()
    tool(row.command[0], work / row.model, out, *row.command[1:], *asked, *(["--fit"] if row.fit else []), "--quiet")
    return out, time.monotonic() - began


def measured(row: Row, out: Path, work: Path, texts: list[Path], tokens: int) -> dict:
    """The JSON of eval, kept beside the result."""
    kept = work / f"{out.name}{'-weights' if row.weights_only else ''}.eval.json"
    if not kept.is_file():
        asked = [*(word for text in texts for word in ("--text", text)), *(["--weights-only"] if row.weights_only else [])]
        kept.write_text(tool("eval", out, "--against", work / row.model, *asked, "--tokens", tokens, "--json"))
    return json.loads(kept.read_text())


def line(row: Row, found: dict, seconds: float) -> str:
    """Of the table."""
    cells = [row.title]
    for text in found["rows"]:
        kl = text["kl"]
        error = kl["window_error"] or kl["token_error"]
        cells += [f"{kl['value']:.3f} ± {error:.3f}", f"{text['perplexity']['value']:.2f}"]
    return f"| {' | '.join(cells)} | {f'{seconds:.0f} s' if seconds else ''} |"


def main() -> None:
    """Read the command line, make what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--tokens", type=int, default=3066, help="predicted tokens of each text")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--only", nargs="+", default=[], help="rows whose folder's name has all of these words")
    args = parser.parse_args()
    args.work.mkdir(exist_ok=True)
    rows = [row for row in ROWS if all(word in row.name for word in args.only)]
    for model in dict.fromkeys(row.model for row in rows):
        if not (args.work / model).is_dir():
            run(sys.executable, Path(__file__).with_name("smol_ernie.py"), args.work / model, *MODELS[model])
    print(f"| experts | {' | '.join(f'KL {text.stem} | perplexity' for text in args.text)} | made in |")
    print("|---" * (2 + 2 * len(args.text)) + "|", flush=True)
    for row in rows:
        out, seconds = made(row, args.work, args.calibration_tokens)
        print(line(row, measured(row, out, args.work, args.text, args.tokens), seconds), flush=True)


if __name__ == "__main__":
    main()
