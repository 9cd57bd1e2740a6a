"""The `ernie-quant` command. Commands are imported when they are called, so that `--help` is instant."""

from __future__ import annotations

import importlib
import signal
import sys
from typing import NoReturn

import click
from ernie_quant.cli._streams import lasting_streams

import ernie_quant
from ernie_quant.disk import FULL
from ernie_quant.errors import ErnieQuantError, RetryError

COMMANDS = (
    "inspect", "plan", "convert", "gguf", "wint4", "wint8", "fp8", "wint2", "quantize", "dequantize", "reshard", "verify", "eval",
    "calibrate", "report", "publish", "nightly",
)  # fmt: skip
INTERRUPTED, TERMINATED = 130, 143


class Terminated(BaseException):
    """SIGTERM arrived."""


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


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(ernie_quant.__version__, prog_name="ernie-quant")
def group() -> None:
    """Convert and quantize ERNIE 4.5 checkpoints, one tensor at a time.

    \b
    ernie-quant inspect ERNIE-4.5-21B-A3B-Paddle
    ernie-quant wint4 ERNIE-4.5-21B-A3B-Paddle out --experts-only --dry-run
    ernie-quant wint4 ERNIE-4.5-21B-A3B-Paddle out --experts-only
    ernie-quant verify out --against ERNIE-4.5-21B-A3B-Paddle

    Exit codes: 0 done, 1 bad input or failed verification, 2 usage, 75 worth retrying, 130 or 143 interrupted.
    """


def main() -> NoReturn:
    """Run, and turn every expected error into one line on stderr and an exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    with lasting_streams():
        sys.exit(_exit_code())


def _exit_code() -> int:
    try:
        return group.main(standalone_mode=False, prog_name="ernie-quant") or 0
    except click.exceptions.Abort:
        code, line = INTERRUPTED, RESUME
    except KeyboardInterrupt:
        code, line = INTERRUPTED, RESUME
    except Terminated:
        code, line = TERMINATED, RESUME
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except ErnieQuantError as error:
        code, line = error.exit_code, f"error: {error}"
    except OSError as error:
        code = RetryError.exit_code if error.errno in FULL else 1
        again = "; the same command goes on where it stopped" if code == RetryError.exit_code else ""
        line = f"error: {error.filename or 'input/output'}: {error.strerror}{again}"
    print(line, file=sys.stderr)
    return code


RESUME = "interrupted; the same command goes on where it stopped"


def _terminate(*_: object) -> NoReturn:
    raise Terminated
