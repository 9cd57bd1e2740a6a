"""Every form that this tool writes, loaded by vLLM's own loaders: `make test-vllm`.

Of each case the real command makes a checkpoint, and `ernie-quant dequantize` a plain one of it. vLLM loads both with its
arithmetic replaced (plugin/), in the same mode. Then every parameter on every rank must be the plain checkpoint's, to the bit,
and the logprobs of a prompt must differ by 0.0.

python tests/vllm/matrix.py --vllm-python .venv-vllm/bin/python --table table.md
python tests/vllm/matrix.py --vllm-python .venv-vllm/bin/python -k "mtp wint4" --keep /tmp/seen
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]  # tests/helpers, the program

import damages  # noqa: E402
import judge  # noqa: E402
import models  # noqa: E402
from cases import CASES, RECIPES, Case, Run  # noqa: E402
from helpers.models import invoke, tensors  # noqa: E402
from runtime import Runtime  # noqa: E402
from table import CLOSE, EXACT, FAILS, REFUSED, WRONG, Result, Verdict, line, markdown, some  # noqa: E402

NEAR = 0.25  # of two logprobs, whose spread is about 2; .035 was seen


@dataclass(frozen=True)
class Made:
    """A case's checkpoint and the plain one of it."""

    quantized: Path
    plain: Path


def make(case: Case, source: Path, folder: Path) -> Made:
    """Run the command, and dequantize its result."""
    if not source.exists():
        models.make(case.source, source)
    made, words = Made(folder / "quantized", folder / "plain"), list(case.command)
    if case.recipe:
        words[-1] = str(folder / "recipe.toml")
        Path(words[-1]).write_text(RECIPES[case.recipe])
    invoke(words[0], source, made.quantized, *words[1:])
    invoke("dequantize", made.quantized, made.plain, "--to", "pt")
    if case.damage:
        damages.do(case.damage, made.quantized)
    return made


def judged(made: Made, run: Run, runtime: Runtime, folder: Path) -> Verdict:
    """Load both, and compare."""
    loaded, reference = folder / "of-quantized", folder / "of-plain"
    if run.stock:
        return started(made, run, runtime, loaded, reference)
    if error := runtime.load(made.quantized, loaded, run):
        return Verdict(REFUSED if run.refused and run.refused in error else FAILS, error)
    if run.refused:
        return Verdict("not refused", run.refused)
    if error := runtime.load(made.plain, reference, run):
        return Verdict("no reference", error)
    plain = tensors(made.plain)
    if odd := judge.parameters(reference, plain, run):
        return Verdict("no reference", some(odd))
    logprobs = judge.distance(loaded, reference)
    if wrong := judge.parameters(loaded, plain, run):
        return Verdict(WRONG, some(wrong), logprobs)
    return Verdict(EXACT if logprobs == 0 else "wrong logprobs", "", logprobs)


def started(made: Made, run: Run, runtime: Runtime, loaded: Path, reference: Path) -> Verdict:
    """Start both as users do: their products are rounded differently, so logprobs are alike and no more."""
    if error := runtime.start(made.quantized, loaded, run):
        return Verdict(FAILS, error)
    if error := runtime.start(made.plain, reference, run):
        return Verdict("no reference", error)
    logprobs = judge.distance(loaded, reference)
    return Verdict(CLOSE if logprobs < NEAR else "wrong logprobs", "", logprobs)


def results(case: Case, runtime: Runtime, work: Path) -> Iterator[Result]:
    """One for each of the case's runs, or one that says why there is no file."""
    folder = work / re.sub(r"\W+", "-", case.name)
    folder.mkdir()
    started = time.monotonic()
    try:
        made = make(case, work / case.source, folder)
    except Exception as error:  # whatever the command failed with is a result
        yield Result(case.name, "-", Verdict("not made", f"{type(error).__name__}: {error}"), time.monotonic() - started)
        return
    for run in case.runs:
        started = time.monotonic()
        verdict = judged(made, run, runtime, folder / run.folder)
        wanted = REFUSED if run.refused else CLOSE if run.stock else WRONG if case.damage else EXACT
        yield Result(case.name, str(run), verdict, time.monotonic() - started, wanted)


def run_all(cases: Sequence[Case], python: str, keep: Path | None) -> tuple[list[Result], dict[str, str]]:
    """All results, printed as they come, and the versions they hold for."""
    found: list[Result] = []
    with ExitStack() as stack:
        work = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ernie-vllm-")))
        if keep:
            keep.mkdir(parents=True)
        runtime = stack.enter_context(Runtime(python, work / "vllm.log"))
        for case in cases:
            for result in results(case, runtime, work):
                print(line(result), flush=True)
                found.append(result)
            if not keep:
                for folder in work.glob(f"{case.source}-*"):
                    shutil.rmtree(folder)
        return found, runtime.versions


def arguments() -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--vllm-python", default="python3.11", help="of an environment with vLLM and the plug-in")
    parser.add_argument("-k", dest="words", default="", help="only cases whose name contains these words")
    parser.add_argument("--list", action="store_true", help="print the cases' names")
    parser.add_argument("--table", type=Path, help="write the results to this file, as Markdown")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="work in this new folder and leave checkpoints, parameters and logs"
    )
    return parser.parse_args()


def main() -> int:
    """1 if anything differs or fails."""
    wanted = arguments()
    cases = [case for case in CASES if wanted.words in case.name]
    if wanted.list or not cases:
        print("\n".join(case.name for case in cases or CASES))
        return 0 if cases else 2
    started = time.monotonic()
    found, versions = run_all(cases, wanted.vllm_python, wanted.keep)
    fine = sum(result.fine for result in found)
    print(f"{fine} of {len(found)} as they should be, {time.monotonic() - started:.0f} s")
    if wanted.table:
        wanted.table.write_text(markdown(found, versions))
    return int(fine < len(found))


if __name__ == "__main__":
    sys.exit(main())
