"""What the fixture `command` gives."""

from __future__ import annotations

from collections.abc import Callable

Command = Callable[..., tuple[int, str, str]]  # exit code, stdout, stderr
