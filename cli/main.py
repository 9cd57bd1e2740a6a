"""The `ernie-quant` command. Commands are imported when they are called, so that `--help` is instant."""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import os
import signal
import sys
from typing import Any, NoReturn

import click

import ernie_quant
from ernie_quant.errors import ErnieQuantError

COMMANDS = (
    "inspect", "plan", "convert", "wint4", "wint8", "fp8", "wint2", "quantize", "dequantize", "reshard", "verify", "report",
    "publish", "nightly",
)  # fmt: skip
RETRY, INTERRUPTED, TERMINATED = 75, 130, 143
FULL = {errno.ENOSPC, errno.EDQUOT}


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
    try:
        sys.exit(group.main(standalone_mode=False, prog_name="ernie-quant") or 0)
    except click.exceptions.Abort:
        code, line = INTERRUPTED, RESUME
    except KeyboardInterrupt:
        code, line = INTERRUPTED, RESUME
    except Terminated:
        code, line = TERMINATED, RESUME
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ErnieQuantError as error:
        code, line = error.exit_code, f"error: {error}"
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)
    except OSError as error:
        code = RETRY if error.errno in FULL else 1
        again = "; the same command goes on where it stopped" if code == RETRY else ""
        line = f"error: {error.filename or 'input/output'}: {error.strerror}{again}"
    print(line, file=sys.stderr)
    sys.exit(code)


RESUME = "interrupted; the same command goes on where it stopped"


def _terminate(*_: object) -> NoReturn:
    raise Terminated


def return_freed_memory() -> None:
    """Give every freed slab back to the system at once.

    glibc moves its threshold for that up to 32 MiB when blocks below it are freed; slabs of changing sizes then leave
    holes: 0.9 GB at the peak instead of 0.37 on the tensors of the 300B.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 4 << 20)  # M_MMAP_THRESHOLD in malloc.h; setting it stops it from moving


def print_json(value: dict[str, Any]) -> None:
    """The one result on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))
