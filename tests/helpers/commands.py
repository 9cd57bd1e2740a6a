"""What the fixture `command` gives."""

from __future__ import annotations

from collections.abc import Callable

Command = Callable[..., tuple[int, str, str]]  # exit code, stdout, stderr


def refusal(command: Command, *arguments: object) -> str:
    code, out, err = command(*arguments)
    assert (code, out, err.count("\n")) == (1, "", 1)
    return err
