"""Every error that a user can cause or meet; anything else that is raised is our own mistake.

ErnieQuantError             exit code 1, one line for the user
├── CheckpointError         a file of the source is broken, hostile or missing
│   └── MissingFileError    something else names it
├── ConfigError             config.json lacks or contradicts something
├── TextError               a text for calibration or evaluation, or the tokenizer for it, cannot be used
├── PlanError               what is asked for does not fit this checkpoint; holds every problem found
├── OutputError             the output folder is not ours, not finished, or cannot be written
│   └── AnotherPlanError    it holds the result, or the beginning, of another plan
├── HubError                a hub refuses, or holds something else than it should
├── ClusterError            a Ray cluster does not answer, lacks what is asked for, or does not share the output folder
├── NeedsError              a package that a command needs is not installed
├── VerifyError             what lies on disk is not what the report says
└── RetryError              exit code 75: the same command may work later (disk full, another run at work)
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_LINE, MAX_LINES = 500, 50  # what is shown of an error: names come from strangers, and may be millions


def line_of(text: str) -> str:
    """`text` on one line: what does not print is escaped, and the middle of a long one left out."""
    text = _cut(text)  # first: escaping a million characters takes a while
    return text if text.isprintable() else _cut("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


def _cut(text: str) -> str:
    return text if len(text) <= MAX_LINE else f"{text[: MAX_LINE - 203]} … {text[-200:]}"


def shown(lines: Sequence[str]) -> list[str]:
    """The first of `lines`, and how many more there are."""
    more = len(lines) - MAX_LINES
    return [line_of(line) for line in lines[:MAX_LINES]] + ([f"… and {more} more"] if more > 0 else [])


class ErnieQuantError(Exception):
    """Base of every error that is shown to a user as one line."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(line_of(message))


class CheckpointError(ErnieQuantError):
    """A file of the source is broken, hostile or missing."""


class MissingFileError(CheckpointError):
    """A file that something else names is not there."""


class ConfigError(ErnieQuantError):
    """config.json lacks a key, holds a wrong type, or contradicts itself."""


class TextError(ErnieQuantError):
    """A text for calibration or evaluation cannot be used, or there is no tokenizer for it."""


class ProblemsError(ErnieQuantError):
    """Several problems found together; `problems` has one line each, the text at most `MAX_LINES` of them."""

    def __init__(self, headline: str, problems: Sequence[str]) -> None:
        super().__init__(headline)
        self.headline = headline
        self.problems = list(problems)

    def __reduce__(self) -> tuple[type[ProblemsError], tuple[str, list[str]]]:
        return type(self), (self.headline, self.problems)  # with the arguments that it is made of

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *(f"  {line}" for line in shown(self.problems))])


class PlanError(ProblemsError):
    """What is asked for does not fit this checkpoint."""


class OutputError(ErnieQuantError):
    """The output folder is not ours, not finished, or cannot be written."""


class AnotherPlanError(OutputError):
    """The output folder holds the result, or the beginning, of another plan."""


class HubError(ErnieQuantError):
    """A hub refuses, or holds something else than it should."""


class ClusterError(ErnieQuantError):
    """A Ray cluster does not answer, lacks what is asked for, or does not share the output folder."""


class NeedsError(ErnieQuantError):
    """A package that a command needs is not installed."""


class VerifyError(ProblemsError):
    """What lies on disk is not what the report says."""


class RetryError(ErnieQuantError):
    """The same command may work later."""

    exit_code = 75
