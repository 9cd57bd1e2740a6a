"""Time and memory of quantizing against layers, experts and workers: the one in proportion, the other flat.

python benchmarks/scaling.py WORK [--recipe wint4] [--plot scaling.png]        # 5 minutes on two cores, 20 GB of disk

Checkpoints of 21B-A3B's widths with real bytes (benchmarks/make_geometry.py) are made in WORK, one at a time, quantized
(`--experts-only`) from the page cache, and removed. Each run is a process of its own, timed to the end of a `sync`, imports
included. The straight line through times and bytes is printed: what starting costs, and seconds per GB. The plot needs
matplotlib.
"""

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from throughput import folder_bytes, read_once, run

LAYERS, EXPERTS, WORKERS = (2, 3, 4, 6), (8, 16, 32), (1, 2, 4)
USUAL_LAYERS, USUAL_WORKERS = 3, 2
GEOMETRY = Path(__file__).with_name("make_geometry.py")


@dataclass(frozen=True)
class Point:
    """What was varied, and what came of it."""

    what: str
    value: int
    gigabytes: float
    seconds: float
    peak_gigabytes: float


def measured(what: str, value: int, source: Path, recipe: str, workers: int) -> Point:
    """Quantize once."""
    out = source.with_name("out")
    read_once(source)
    os.sync()
    command = [sys.executable, "-m", "ernie_quant", recipe, str(source), str(out), "--experts-only", "--workers", str(workers)]
    seconds, sync, peak = run([*command, "--json"])
    shutil.rmtree(out)
    return Point(what, value, folder_bytes(source) / 1e9, seconds + sync, peak / 1e9)


def made(source: Path, layers: int, experts: int | None = None) -> Path:
    """A checkpoint instead of the one before."""
    shutil.rmtree(source, ignore_errors=True)
    options = ["--layers", str(layers), "--fill", "--format", "pt", "--shard-gb", "1"]
    options += ["--experts", str(experts)] if experts else []
    subprocess.run([sys.executable, str(GEOMETRY), "21b", str(source), *options], check=True, stdout=subprocess.DEVNULL)
    return source


def points(work: Path, recipe: str) -> list[Point]:
    """All of them; said as they come."""
    source, found = work / "src", []
    for layers in LAYERS:
        made(source, layers)
        found.append(measured("layers", layers, source, recipe, USUAL_WORKERS))
        print(found[-1], file=sys.stderr, flush=True)
        if layers == USUAL_LAYERS:
            for workers in WORKERS:
                found.append(measured("workers", workers, source, recipe, workers))
                print(found[-1], file=sys.stderr, flush=True)
    for experts in EXPERTS:
        found.append(measured("experts", experts, made(source, USUAL_LAYERS, experts), recipe, USUAL_WORKERS))
        print(found[-1], file=sys.stderr, flush=True)
    shutil.rmtree(source)
    return found


def line(found: list[Point]) -> tuple[float, float]:
    """Seconds per GB, and those of nothing: least squares over runs that differ in bytes alone."""
    by_bytes = [point for point in found if point.what != "workers"]
    slope, start = np.polyfit([p.gigabytes for p in by_bytes], [p.seconds for p in by_bytes], 1)
    return float(slope), float(start)


def table(found: list[Point]) -> str:
    """Markdown."""
    lines = ["| | | GB of bf16 in | seconds | peak anonymous GB |", "|---|---|---|---|---|"]
    lines += [f"| {p.what} | {p.value} | {p.gigabytes:.2f} | {p.seconds:.1f} | {p.peak_gigabytes:.2f} |" for p in found]
    slope, start = line(found)
    return "\n".join([*lines, "", f"{slope:.2f} s per GB, and {start:.1f} s to start"])


def plot(found: list[Point], path: Path) -> None:
    """Time above, memory below, one column for each thing that was varied."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(9, 4.5), sharey="row")
    for column, what in enumerate(("layers", "experts", "workers")):
        mine = sorted((p for p in found if p.what == what), key=lambda p: p.value)
        values = [p.value for p in mine]
        axes[0, column].plot(values, [p.seconds for p in mine], "o-")
        axes[1, column].plot(values, [p.peak_gigabytes for p in mine], "o-")
        axes[1, column].set_xlabel(what)
        axes[1, column].set_xticks(values)
        for axis in axes[:, column]:
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("peak anonymous GB")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--recipe", default="wint4", choices=["wint4", "wint8", "fp8"])
    parser.add_argument("--plot", type=Path, metavar="FILE")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    found = points(args.work.resolve(), args.recipe)
    print(table(found))
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
