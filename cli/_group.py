"""The commands, in groups, each with its line of `--help`. They are imported when they are called, so that help is instant."""

from __future__ import annotations

import importlib
from difflib import get_close_matches

import click
from click.shell_completion import CompletionItem

# fmt: off
GROUPS = {
    "Look": {
        "inspect":    "What a checkpoint is, its bytes, and what is wrong with it.",
        "plan":       "What can be made of it, and on how many GPUs.",
    },
    "Convert": {
        "convert":    "Between Paddle and PT; every weight keeps its bits.",
        "dequantize": "From a quantized checkpoint back to plain bf16.",
        "reshard":    "A FastDeploy checkpoint for another tensor-parallel size.",
    },
    "Quantize": {
        "wint4":      "To int4, for vLLM and transformers, or for FastDeploy.",
        "wint8":      "To int8, for vLLM and transformers.",
        "fp8":        "To float8, for vLLM and transformers.",
        "mxfp4":      "To float4, for vLLM on Blackwell, and transformers.",
        "nvfp4":      "To float4 with float8 scales, for vLLM on Blackwell.",
        "w4a8":       "Experts to int4 for int8 inputs, int8 KV cache; FastDeploy.",
        "wint2":      "Experts to 2 bits, for FastDeploy or vLLM.",
        "gguf":       "To one file for llama.cpp, Ollama and LM Studio.",
        "quantize":   "By a recipe of your own.",
        "allocate":   "A recipe for a size: the bits where they matter.",
        "calibrate":  "Statistics of a text, for gguf --imatrix.",
        "merge":      "Complete what several processes wrote in shares.",
    },
    "Check": {
        "verify":     "Read a result back from disk and compare it.",
        "eval":       "Perplexity on texts, and KL divergence from the source.",
        "report":     "One page: where the bytes are, the error of every tensor.",
    },
    "Publish": {
        "publish":    "A result to a hub repository.",
        "nightly":    "From a hub to published repositories, or nothing to do.",
    },
}
# fmt: on
LINES = {name: line for commands in GROUPS.values() for name, line in commands.items()}
COMMANDS = tuple(LINES)
WIDEST = max(map(len, COMMANDS))


class Commands(click.Group):
    """One command per file of this folder."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they are used."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import it."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"ernie_quant.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:  # fmt: skip
        """As click's; a name that is none is compared with those there are. Raises UsageError."""
        name = args[0]
        if name in COMMANDS or name.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        near = get_close_matches(name.lower(), COMMANDS, n=2)
        hint = f" Did you mean {' or '.join(near)}?" if near else f" There are {', '.join(COMMANDS)}."
        raise click.UsageError(f"No such command {name!r:.60}.{hint}", ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Under headings, and nothing is imported for it."""
        for heading, commands in GROUPS.items():
            with formatter.section(heading):
                formatter.write_dl([(f"{name:{WIDEST}}", line) for name, line in commands.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names that begin so; click would import all commands for their help."""
        found = [CompletionItem(name, help=line) for name, line in LINES.items() if name.startswith(incomplete)]
        return found + click.Command.shell_complete(self, ctx, incomplete)
