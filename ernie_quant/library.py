"""The library: one function for each of the commands that people use from a program or a notebook.

They do what the commands do, with the same checks, the same files and the same memory: `convert`, `quantize`, `dequantize`,
`reshard` and `verify` tell the C library of this process to give freed memory back at once, as the commands do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

if TYPE_CHECKING:
    from ernie_quant.check.verify import Verified
    from ernie_quant.checkpoint import Checkpoint
    from ernie_quant.inspection import Inspection
    from ernie_quant.planning.capacity import Estimate
    from ernie_quant.planning.recipe import Recipe
    from ernie_quant.reporting.saved import Report
    from ernie_quant.run.outcome import Result
    from ernie_quant.run.writing import Path_, Size, Writing


def inspect(source: Path_, *, fixes: Sequence[str] = (), follow_links: bool = False) -> Inspection:
    """What a checkpoint is: family, layout, dimensions, bytes by role, and everything that is wrong with it.

    `source`: a folder, or an address such as `hf://baidu/ERNIE-4.5-21B-A3B-Paddle`; plain or quantized. Reads headers only.
    Anomalies are in the result. Raises CheckpointError or ConfigError where nothing more can be said.
    """
    from ernie_quant import inspection as room

    return room.inspect(_source(source), frozenset(fixes), links=follow_links)


def plan(
    source: Path_, *, gpu_memory: str | Sequence[str] = "80GiB", gpus: int | None = None, utilization: float = 0.9,
    reserve: Size = "3GiB", max_model_len: int = 32768, max_num_seqs: int = 32, kv_dtype: str = "bf16", wint4_layers: int = 7,
    recipe: Path_ | None = None, follow_links: bool = False,
) -> Estimate:  # fmt: skip
    """What can be made of a checkpoint, the bytes of each form, and how many GPUs it takes; headers only.

    `gpu_memory`: sizes (`80GiB`) or names (`H100`), one or several. `gpus`: what so many GPUs have room for, instead of the
    fewest that do. `recipe`: a row for this TOML file, too. `max_model_len` in tokens, `reserve` in bytes per GPU.
    Raises PlanError, ConfigError, CheckpointError, or ValueError for a GPU that is none.
    """
    from ernie_quant.planning import capacity
    from ernie_quant.planning.gpus import Limits, find
    from ernie_quant.planning.recipe import read
    from ernie_quant.settings import parse_size
    from ernie_quant.sources import open_source

    kinds = [find(name) for name in ([gpu_memory] if isinstance(gpu_memory, str) else gpu_memory)]
    limits = Limits(utilization, parse_size(reserve), max_model_len, max_num_seqs, kv_dtype)
    own = None if recipe is None else read(Path(recipe))
    opened = open_source(_source(source), links=follow_links)
    question = capacity.Question(limits, kinds, gpus)
    return capacity.estimate(opened, question, wint4_layers=wint4_layers, recipe=own)


def convert(source: Path_, out: Path_, *, to: Literal["pt", "paddle"], **how: Unpack[Writing]) -> Result:
    """Names, layouts and config.json of the other format in the folder `out`; every weight keeps its bits.

    Raises PlanError with every problem of the source, OutputError for a folder that is somebody else's, RetryError for what
    is worth another try, CheckpointError.
    """
    return _plain(source, out, to, how, dequantize=False)


def quantize(
    source: Path_, out: Path_, recipe: str | os.PathLike[str] | Recipe, *, runtime: str = "", tp: int = 1,
    calibration: Path_ | Sequence[Path_] | None = None, calibration_tokens: int | None = None, method: str | None = None,
    fit: bool | None = None, imatrix: Path_ | None = None, device: str = "cpu", **options: Any,
) -> Result:  # fmt: skip
    """A quantized checkpoint in the folder `out`.

    `recipe`: `wint4`, `wint8`, `fp8`, `mxfp4`, `nvfp4`, `wint2`, `w4a8` or `gguf` with the options of that command
    (`experts_only=True`, `group_size=64`, `type="Q4_K_M"`, …), a TOML file of rules (`keep_unfit=True`), or a `Recipe`.
    Options of `Writing` go with all of them, and `vl_config`, `fixes` and `unsupported`. `runtime`: `vllm`, `transformers`,
    `fastdeploy` or `llama_cpp`; by default that which the recipe is for. `tp`: ranks to write, for FastDeploy.
    `calibration`: `auto`, or files of text that codes are chosen by; `imatrix`: statistics of `calibrate`, for gguf.
    `device`: `cpu`, `cuda` for all GPUs, or `cuda:1`; the files are the same.

    Raises PlanError with everything that does not fit, OutputError, RetryError, CheckpointError, TextError; ValueError for
    an option that is none.
    """
    from ernie_quant.devices import named
    from ernie_quant.planning import built_in
    from ernie_quant.planning.gguf import gguf_plan
    from ernie_quant.planning.recipe import Recipe, read
    from ernie_quant.run.asked import plan_of, text_of
    from ernie_quant.run.writing import asked_of, run, split

    how, planning, own = split(options)
    named(device)
    opened = _open(source, how)
    if recipe == "gguf":
        planning = {"shard_bytes": built_in.GGUF_BYTES, **planning}
        return run(gguf_plan(opened, settings=own, imatrix=_path(imatrix), **planning), out, how, device=device)
    if isinstance(recipe, str) and recipe in built_in.KINDS:
        made = built_in.make(recipe, runtime, **own)
    else:
        rules = recipe if isinstance(recipe, Recipe) else read(Path(recipe), keep_unfit=bool(own.pop("keep_unfit", False)))
        if own:
            raise ValueError(f"recipe {rules.name}: takes no option {', '.join(sorted(own))}")
        made = built_in.BuiltIn(rules, runtime or rules.runtime or built_in.VLLM)
    asked = asked_of(made.recipe, calibration, {"tokens": calibration_tokens, "method": method, "fit": fit})
    return run(plan_of(opened, made.recipe, made.runtime, text_of(asked), **planning), out, how, tp, device)


def dequantize(source: Path_, out: Path_, *, to: Literal["pt", "paddle"], **how: Unpack[Writing]) -> Result:
    """A plain bf16 checkpoint of a quantized one, with the weights that its program computes with.

    Raises PlanError, OutputError, RetryError, CheckpointError.
    """
    return _plain(source, out, to, how, dequantize=True)


def reshard(source: Path_, out: Path_, *, tp: int, **how: Unpack[Writing]) -> Result:
    """A prequantized FastDeploy checkpoint for another tensor-parallel size, without loss; published ones too.

    Raises PlanError with the sizes that fit, OutputError, RetryError, CheckpointError.
    """
    from ernie_quant.planning.reshard import make_reshard_plan
    from ernie_quant.run.writing import run, split

    writing, planning, _ = split(how)
    return run(make_reshard_plan(_open(source, writing), tp, **planning), out, writing)


def allocate(
    source: Path_, out: Path_, *, size: Size | None = None, bits: float | None = None, gpus: str = "",
    runtime: str = "vllm", calibration: Path_ | Sequence[Path_] | None = None, calibration_tokens: int | None = None,
    method: str | None = None, fit: bool | None = None, text: Literal["auto"] | Sequence[Path_] = "auto", tokens: int = 2048,
    sensitivity: Path_ | None = None, max_model_len: int = 32768, follow_links: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """A recipe in the file `out`: the codecs that cost least at the model's output under a budget, and what `--json` says of it.

    One of `size` (bytes of weight files, or `89GB`), `bits` per weight, and `gpus` (`2 x 80GiB`). `text`: what is measured on,
    `tokens` of it. `sensitivity`: a file that keeps what was measured, or has it. `quantize(source, folder, out)` makes it.

    Raises PlanError where nothing fits, TextError, OutputError, RetryError, CheckpointError; ValueError for no budget, or two.
    """
    from ernie_quant.planning.budget import Budget, Gpus
    from ernie_quant.planning.gpus import Limits
    from ernie_quant.planning.recipe import KEEP_ALL
    from ernie_quant.run import allocate as room
    from ernie_quant.run.memory import return_freed_memory
    from ernie_quant.run.writing import asked_of
    from ernie_quant.settings import parse_size
    from ernie_quant.sources import open_source

    limits = Limits(max_model_len=max_model_len)
    budget = Budget(None if size is None else parse_size(size), bits, Gpus.of(gpus) if gpus else None, limits)
    asked = asked_of(KEEP_ALL, calibration, {"tokens": calibration_tokens, "method": method, "fit": fit})
    read = (text if isinstance(text, str) else tuple(map(Path, text))) if asked is None else asked.text
    return_freed_memory()
    wish = room.Wish(runtime, budget, read, tokens, asked)
    opened = open_source(_source(source), links=follow_links)
    return room.as_json(room.allocate(opened, wish, Path(out), _path(sensitivity), progress))


def verify(
    out: Path_, *, against: Path_ | None = None, sample: int | None = None, progress: Callable[[int], None] = lambda _: None,
    follow_links: bool = False,
) -> Verified:  # fmt: skip
    """Read a result back from disk: hashes, headers, config.json and values must agree, with the source too if there is one.

    `sample`: tensors whose values are looked at; all by default. Raises VerifyError with every disagreement, OutputError for
    a folder that is no result.
    """
    from ernie_quant.check import verify as room
    from ernie_quant.run.memory import return_freed_memory

    return_freed_memory()
    return room.verify(Path(out), None if against is None else _source(against), progress, sample, links=follow_links)


def report(out: Path_, *, page: Path_ | None = None) -> Report:
    """What a run did to every tensor: `rows`, one for each, with shape, stored bytes and error; and the manifest.

    `page`: write the HTML page there, too. Raises OutputError or CheckpointError for a folder that is no result.
    """
    from ernie_quant.reporting import page as pages
    from ernie_quant.reporting.saved import read

    found = read(Path(out))
    if page is not None:
        pages.write(found, Path(page))
    return found


def _source(source: Path_) -> Path | str:
    """An address on a hub stays text."""
    text = os.fspath(source)
    return text if "://" in text else Path(text)


def _open(source: Path_, how: Writing) -> Checkpoint:
    from ernie_quant.sources import open_source

    return open_source(_source(source), links=how.get("follow_links", False))


def _path(file: Path_ | None) -> Path | None:
    return None if file is None else Path(file)


def _plain(source: Path_, out: Path_, to: str, options: Mapping[str, Any], *, dequantize: bool) -> Result:
    """To a layout, with no codes."""
    from ernie_quant.planning import built_in
    from ernie_quant.planning.make import make_plan
    from ernie_quant.run.writing import run, split

    if to not in ("pt", "paddle"):
        raise ValueError(f"to is {to!r}, not 'pt' or 'paddle'")
    how, planning, _ = split(options)
    made = built_in.make(to)
    plan = make_plan(_open(source, how), runtime=made.runtime, recipe=made.recipe, dequantize=dequantize, **planning)
    return run(plan, out, how)
