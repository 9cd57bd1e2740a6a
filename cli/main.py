"""The `ernie-quant` command, from the words that were typed to an exit code."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

import click
from ernie_quant.cli._group import COMMANDS, Commands
from ernie_quant.cli._streams import lasting_streams

import ernie_quant
from ernie_quant.errors import ErnieQuantError, RetryError

__all__ = ["COMMANDS", "group", "main"]
INTERRUPTED, TERMINATED = 130, 143
WINDOWS = "error: ernie-quant runs on Linux and macOS; on Windows use it inside WSL"


class Terminated(BaseException):
    """SIGTERM arrived."""


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
    if os.name == "nt":  # no fcntl, so no locks; said before anything needs it
        sys.exit(WINDOWS)
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
    except ModuleNotFoundError as error:
        from ernie_quant import needs

        if (said := needs.of_import(error)) is None:
            raise
        code, line = said.exit_code, f"error: {said}"
    except OSError as error:
        from ernie_quant.disk import FULL

        code = RetryError.exit_code if error.errno in FULL else 1
        again = "; the same command goes on where it stopped" if code == RetryError.exit_code else ""
        line = f"error: {error.filename or 'input/output'}: {error.strerror}{again}"
    print(line, file=sys.stderr)
    return code


RESUME = "interrupted; the same command goes on where it stopped"


def _terminate(*_: object) -> NoReturn:
    raise Terminated
