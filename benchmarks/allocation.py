"""Bits where they matter, against one type everywhere and against the mixes that people use: KL divergence at equal sizes.

python benchmarks/smol_ernie.py smol-256 --experts 4 --moe-inter 256 --pad-hidden 768
python benchmarks/allocation.py smol-256 en-US.txt WORK --llama-quantize FOLDER --quantizer FILE     # llama.cpp
python benchmarks/allocation.py smol-256 en-US.txt WORK --runtime vllm [--calibration auto]          # vLLM
python benchmarks/allocation.py smol-640 en-US.txt WORK --runtime fastdeploy          # of smol_ernie.py --pad-hidden 640

Of llama.cpp the judge is llama.cpp itself (gguf_fidelity.py says what FOLDER and FILE are), of others `ernie-quant eval`. Each
size is that of a mix or of one codec everywhere; `allocate` may have as many bytes and no more. Sensitivities are measured
once, on the text `auto`; the text for judging is another. WORK keeps everything; `--plot FILE.png` draws what is there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from gguf_fidelity import Reference, write

MIXES = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K")
PURE = ("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_S", "Q5_K_S")  # with --pure one type each
HEADER = 1024  # our files say a little more of a model, and nothing is smaller than one type everywhere
INTEGERS = ("32", "64")  # group sizes that fit every width of the model
PREFIXES = ("4", "8", "15")  # the first is the published 7 of 54 layers, of 30


def tool(*arguments: object) -> str:
    """Of ernie-quant."""
    command = [sys.executable, "-m", "ernie_quant", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def allocated(args: argparse.Namespace, size: int) -> tuple[Path, float]:
    """The folder of the best result of so many bytes, and the KL that was predicted."""
    recipe, out = args.work / f"{args.runtime}-{size}.toml", args.work / f"{args.runtime}-{size}"
    kept = args.work / f"{args.runtime}{'-calibrated' if args.calibration else ''}.sensitivity.json"
    asked = ["--calibration", args.calibration] if args.calibration else ["--tokens", args.tokens]
    said = json.loads(tool("allocate", args.model, "-o", recipe, "--size", size, "--runtime", args.runtime, *asked,
                           "--sensitivity", kept, "--quiet", "--json"))  # fmt: skip
    if not (out / "ernie-quant.json").is_file():
        tool("quantize", args.model, out, "--recipe", recipe, "--quiet")
    return out, said["predicted_kl"]


def llama_cpp(args: argparse.Namespace) -> None:
    """A line per size."""
    plain = write(args.model, args.work / "plain", "F32")
    reference = Reference(plain, args.text.read_text(), args.windows)
    points = []
    rows = [(f"llama-quantize {mix}", mix, False) for mix in MIXES] + [(f"{mix} --pure", mix, True) for mix in PURE]
    rows = [row for row in rows if not args.only or row[0] in args.only]
    for title, mix, pure in rows:
        file = args.work / f"{mix}{'-pure' if pure else ''}.gguf"
        if not file.is_file():
            command = [sys.executable, args.quantizer, plain, file, mix, "--lib", args.llama_quantize]
            subprocess.run([*command, *(["--pure"] if pure else [])], check=True, capture_output=True)
        out, predicted = allocated(args, file.stat().st_size + HEADER * pure)
        mine = next(out.glob("*.gguf"))
        theirs_kl, mine_kl = reference.measure(file), reference.measure(mine)
        points.append({"title": title, "bytes": file.stat().st_size, "kl": theirs_kl.kl, "allocated_bytes": mine.stat().st_size,
                       "allocated": mine_kl.kl, "predicted": predicted})  # fmt: skip
        ratio = mine_kl.kl / theirs_kl.kl
        print(
            f"| {title} | {file.stat().st_size / 1e6:.1f} | {theirs_kl} | {mine_kl} | {predicted:.4f} | {ratio:.2f} |", flush=True
        )
    keep(args, points)


def keep(args: argparse.Namespace, points: list[dict]) -> None:
    """Beside those of before."""
    file = args.work / f"{args.runtime}.points.json"
    known = {point["title"]: point for point in json.loads(file.read_text())} if file.is_file() else {}
    known |= {point["title"]: point for point in points}
    file.write_text(json.dumps(list(known.values()), indent=1))


def plot(args: argparse.Namespace) -> None:
    """KL over bytes: the predicted curve, what was achieved, mixes and one type everywhere."""
    import matplotlib.pyplot as plt

    points = json.loads((args.work / f"{args.runtime}.points.json").read_text())
    kept = args.work / f"{args.runtime}.sensitivity.json"
    asked = ["--size", points[0]["bytes"], "--runtime", args.runtime, "--sensitivity", kept, "--json", "--quiet"]
    said = json.loads(tool("allocate", args.model, "-o", args.work / "plot.toml", *asked))
    low, high = (pick(point["bytes"] for point in points) for pick in (min, max))
    curve = [one for one in said["curve"] if 0.95 * low < one["bytes"] < 1.2 * high]
    figure, axes = plt.subplots(figsize=(7.2, 4.2), dpi=150)
    axes.plot(
        [one["bytes"] / 1e6 for one in curve],
        [one["predicted_kl"] for one in curve],
        color="#0072b2",
        label="predicted, allocated",
    )
    pure = [point for point in points if point["title"].endswith("--pure")]
    mixes = [point for point in points if point not in pure]
    for some, key, marker, color, label in (
        (points, "allocated", "o", "#0072b2", "achieved, allocated"), (mixes, "kl", "s", "#c25400", "llama-quantize, mixes"),
        (pure, "kl", "^", "#7a6a00", "llama-quantize, one type"),
    ):  # fmt: skip
        axes.plot([one["bytes"] / 1e6 for one in some], [one[key] for one in some], marker, color=color, label=label)
    axes.set(yscale="log", xlabel="MB of the file", ylabel="KL divergence, nats per token")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(args.plot)


def others(args: argparse.Namespace) -> None:
    """A line per group size of int4, or per number of WINT4 layers."""
    points = []
    asked = ["--calibration", args.calibration] if args.calibration else []
    lines = [("wint4", "--group-size", group) for group in INTEGERS]
    if args.runtime == "fastdeploy":
        lines = [("wint2", "--wint4-layers", number) for number in PREFIXES]
    for name, *options in lines:
        out = args.work / "-".join([name, *options])
        if not (out / "ernie-quant.json").is_file():
            tool(name, args.model, out, *options, *asked, "--quiet")
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        other, predicted = allocated(args, size)
        found = [evaluated(args, folder) for folder in (out, other)]
        title = " ".join([name, *options])
        points.append({"title": title, "bytes": size, "kl": found[0][0], "allocated": found[1][0], "predicted": predicted})
        ratio = found[1][0] / found[0][0]
        cells = [title, f"{size / 1e6:.1f}", *(f"{kl:.4f} ± {error:.4f}" for kl, error in found)]
        print(f"| {' | '.join([*cells, f'{predicted:.4f}', f'{ratio:.2f}'])} |", flush=True)
    keep(args, points)


def evaluated(args: argparse.Namespace, out: Path) -> tuple[float, float]:
    """KL and its standard error over windows."""
    tokens = 511 * args.windows
    kl = json.loads(tool("eval", out, "--against", args.model, "--text", args.text, "--tokens", tokens, "--json"))["together"][
        "kl"
    ]
    return kl["value"], kl["window_error"]


def main() -> None:
    """Read the command line, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--runtime", choices=["llama.cpp", "vllm", "fastdeploy"], default="llama.cpp")
    parser.add_argument("--calibration")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--only", nargs="+", default=[], help="titles of rows")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--llama-quantize", type=Path)
    parser.add_argument("--quantizer", type=Path)
    parser.add_argument("--plot", type=Path, help="draw only")
    args = parser.parse_args()
    args.work.mkdir(exist_ok=True)
    if args.plot:
        plot(args)
        return
    print("| at the size of | MB | its KL | allocated | predicted | ratio |\n|---|---|---|---|---|---|", flush=True)
    (llama_cpp if args.runtime == "llama.cpp" else others)(args)


if __name__ == "__main__":
    main()
