"""Standard streams whose reader may go away (`| head -1`) or was never there (`>&-`)."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

STDOUT, STDERR = 1, 2


class _Output(io.FileIO):
    """Once nobody reads any more, what is written goes nowhere; what was asked for is done all the same."""

    def write(self, data: Any, /) -> int:
        """As of a file. Raises OSError, once, for output that somebody wants and the disk does not take."""
        try:
            return super().write(data)
        except OSError as error:  # of a broken pipe click would exit with 1, and Python complain once more at its end
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            if self.fileno() == STDOUT and not isinstance(error, BrokenPipeError):
                error.filename = "standard output"
                raise
            return super().write(data)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """stdout and stderr of this process can always be written to; streams that somebody else put there are left alone."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes this number, or the next file of a result would
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _lasting(sys.stdout, sys.__stdout__, STDOUT), _lasting(sys.stderr, sys.__stderr__, STDERR)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _lasting(stream: TextIO | None, original: TextIO | None, fd: int) -> Any:
    if stream is not original:
        return stream
    encoding, errors = (stream.encoding, stream.errors) if stream else ("utf-8", "")
    if errors in ("", "strict", None):  # names of files are bytes, not always text; what JSON shows of them can be read back
        errors = "backslashreplace"
    lines = fd == STDERR or (stream is not None and stream.isatty())
    return io.TextIOWrapper(io.BufferedWriter(_Output(fd, "wb", closefd=False)), encoding, errors, line_buffering=lines)
