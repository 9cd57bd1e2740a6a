"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem
from ernie_quant.cli._paths import FILE, FOLDER, TOML, ParamType, Source

from ernie_quant import devices
from ernie_quant.planning import built_in
from ernie_quant.planning.calibration import LEAST_TOKENS, METHOD, METHODS, MOST_TOKENS, TOKENS
from ernie_quant.settings import parse_size

__all__ = ["FILE", "FOLDER", "TOML", "Source"]
F = TypeVar("F", bound=Callable[..., Any])


follow_links = click.option(
    "--follow-links", is_flag=True, help="Read files that links in SRC lead to, wherever they lie; only for links of your own."
)


def source(command: F) -> F:
    """SRC, and whether its links are followed."""
    return click.argument("src", type=Source())(follow_links(command))


out = click.argument("out", type=FOLDER)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON result on stdout.")
quiet = click.option("--quiet", "-q", is_flag=True, help="No progress, no report on the terminal.")
fix = click.option(
    "--fix", "fixes", multiple=True, type=click.Choice(["mtp_linear_proj"]),
    help="Repair a tensor that is known to be stored wrongly: mtp_linear_proj, untransposed in a published file.",
)  # fmt: skip
experts_only = click.option("--experts-only", is_flag=True, help="Quantize the routed experts, keep everything else.")
mtp = click.option("--mtp", is_flag=True, help="Quantize the MTP block's linears too, also with --experts-only.")
keep_unfit = click.option("--keep-unfit", is_flag=True, help="Keep tensors whose widths do not fit, instead of refusing.")
to_layout = click.option("--to", "layout", type=click.Choice(["paddle", "pt"]), required=True, help="Layout of the result.")


class RuntimeName(ParamType):
    """One of the runtimes that `known` gives; they are looked up when somebody asks."""

    name = "runtime"

    def __init__(self, known: Callable[[], tuple[str, ...]]) -> None:
        self.known = known

    def _choice(self) -> click.Choice[str]:
        return click.Choice(self.known())

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name itself. To complete a word no runtime is looked up: that takes longer than anything else then."""
        return value if ctx and ctx.resilient_parsing else self._choice().convert(value, param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        """All of them."""
        return self._choice().get_metavar(param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Those that begin so."""
        return self._choice().shell_complete(ctx, param, incomplete)


def runtime(recipe: str, help: str = "; the files of vllm load in transformers too") -> Callable[[F], F]:
    """`--runtime`, one of those that a built-in recipe is for."""
    return click.option(
        "--runtime", type=RuntimeName(lambda: built_in.known_runtimes(recipe)), default=built_in.KINDS[recipe].default_runtime,
        show_default=True, help=f"Program that shall load the result{help}.",
    )  # fmt: skip


runtime_of_rules = click.option(
    "--runtime", type=RuntimeName(built_in.runtimes_of_rules),
    help=f"Program that shall load the result.  [default: that of the recipe, or {built_in.VLLM}]",
)  # fmt: skip


def settings(recipe: str, options: dict[str, Any]) -> dict[str, Any]:
    """Takes from `options` those of a built-in recipe for the runtime that is asked for."""
    takes = built_in.options(recipe, options["runtime"])
    taken = {key: options.pop(key) for key in takes}
    return {key: int(value) if isinstance(value, str) and value.isdigit() else value for key, value in taken.items()}


def write_options(command: F, shard_size: str = "5GB", files: str = "Largest output file.") -> F:
    """Options of every command that writes a folder."""
    for option in reversed(
        [
            click.option("--dry-run", is_flag=True, help="Show what would happen to each group of tensors; write nothing."),
            click.option("--restart", is_flag=True, help="Drop what an earlier run left in OUT and begin anew."),
            click.option("--workers", type=click.IntRange(1, 64), help="Threads.  [default: one per processor, at most 8]"),
            click.option("--disk-budget", type=Size(), help="SRC on a hub: bytes of it on disk at once.  [default: the least]"),
            click.option("--ray", metavar="auto|ADDRESS",
                         help="Write files on the nodes of a Ray cluster: this machine's, or of the head at ADDRESS."),
            click.option("--ray-gpus", type=click.IntRange(1), help="With --ray: GPUs for each file.  [default: none]"),
            click.option("--shard-index", type=click.IntRange(0), metavar="I",
                         help="Write share I of N, from 0 on, beside other processes; then `ernie-quant merge OUT`."),
            click.option("--num-shards", type=click.IntRange(1), metavar="N", help="With --shard-index: number of shares."),
            click.option("--merge", is_flag=True, hidden=True, help="What `ernie-quant merge` adds: write no weights."),
            click.option("--no-space-check", is_flag=True, help="Begin though the disk reports too little free space."),
            click.option("--max-shard-size", type=Size(), default=shard_size, show_default=True, help=files),
            click.option("--copy", multiple=True, metavar="PATTERN",
                         help="Carry other files of SRC along too: 'figures/*', '*.pdf'."),
            click.option("--copy-code", is_flag=True, help="Carry Python files of the source along; they are never run."),
            quiet, json_option,
        ]
    ):  # fmt: skip
        command = option(command)
    return command


def single_file_options(command: F) -> F:
    """`write_options` of a command whose result is one file, unless that is very large or somebody asks for more."""
    return write_options(command, "45GB", "Split into files of at most this size; Ollama pulls no split ones from hubs.")


def run_options(command: F) -> F:
    """`write_options`, and those of commands that read an unquantized checkpoint."""
    for option in (
        fix,
        click.option("--vl-config", type=click.Choice(["flat", "transformers"]), default="flat", show_default=True,
                     help="Spelling of config.json for VL models: flat is what vLLM and the -PT repositories use."),
    ):  # fmt: skip
        command = option(command)
    return write_options(command)


class Device(ParamType):
    """A name that `devices` knows; whether there is one is asked when it is used."""

    name = "device"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None) -> str | None:
        """What may be said."""
        return "cpu|cuda|cuda:N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name itself."""
        try:
            return devices.named(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


device = click.option(
    "--device", type=Device(), default=devices.CPU, show_default=True,
    help="Where weights are quantized: cuda is all GPUs, cuda:0 the first. The files are the same.",
)  # fmt: skip


class Size(ParamType):
    """Bytes: `5GB`, `500MB`, `2GiB` or a plain number."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes, whatever the unit."""
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


group_size = click.option(
    "--group-size", type=click.Choice(["128", "64", "32", "channel"]), default=str(built_in.GROUP_SIZE), show_default=True,
    help="Inputs that share a scale.",
)  # fmt: skip
scale = click.option(
    "--scale", type=click.Choice(["mse", "absmax"]), default=built_in.SCALE, show_default=True,
    help="Choose scales by squared error, or by the largest weight.",
)  # fmt: skip


def calibration(command: F) -> F:
    """Options of commands that quantize by text."""
    for option in reversed(
        [
            click.option("--calibration", multiple=True, metavar="auto|FILE",
                         help="Fit quantized weights to this text: the one that comes with ernie-quant, or files."),
            click.option("--calibration-tokens", type=click.IntRange(LEAST_TOKENS, MOST_TOKENS),
                         help=f"Tokens of it to fit to; a seventh more is for judging.  [default: {TOKENS}]"),
            click.option("--method", type=click.Choice(METHODS),
                         help=f"What codes make of --calibration.  [default: {METHOD}]"),
            click.option("--fit/--no-fit", default=None, help="With --calibration: fit o_proj and the shared experts'"
                         " down_proj too, which else stay as they are.  [default: no-fit]"),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


tp = click.option("--tp", type=click.IntRange(1, 16), default=1, show_default=True, help="Ranks to write, for FastDeploy.")


def wint4_layers(text: str) -> Callable[[F], F]:
    """`--wint4-layers`, of a 2-bit model."""
    layers = click.IntRange(0, built_in.MOST_LAYERS)
    return click.option("--wint4-layers", type=layers, default=built_in.WINT4_LAYERS, show_default=True, help=text)


unsupported = click.option(
    "--unsupported", is_flag=True, help="Write a checkpoint that no program loads (FastDeploy, VL) all the same."
)

texts = click.option(
    "--text", "texts", multiple=True, default=("auto",), show_default="auto", metavar="auto|FILE",
    help="What the model reads: the texts that come along, or files, UTF-8 or .jsonl of texts or messages.",
)  # fmt: skip


def chosen_texts(texts: tuple[str, ...]) -> list[Path] | str:
    """`auto`, or files. Raises UsageError for both."""
    if "auto" not in texts:
        return [Path(text) for text in texts]
    if len(texts) > 1:
        raise click.UsageError("--text auto goes alone; a file of that name is ./auto")
    return "auto"
