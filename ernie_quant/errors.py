"""Every error that a user can cause or meet; anything else that is raised is our own mistake.

ErnieQuantError             exit code 1, one line for the user
├── CheckpointError         a file of the source is broken, hostile or missing
├── ConfigError             config.json lacks or contradicts something
├── PlanError               what is asked for does not fit this checkpoint; holds every problem found
├── OutputError             the output folder is not ours, not finished, or cannot be written
├── VerifyError             what lies on disk is not what the report says
└── RetryError              exit code 75: the same command may work later (disk full, another run at work)
"""

from __future__ import annotations

from collections.abc import Sequence


class ErnieQuantError(Exception):
    """Base of every error that is shown to a user as one line."""

    exit_code = 1


class CheckpointError(ErnieQuantError):
    """A file of the source is broken, hostile or missing."""


class ConfigError(ErnieQuantError):
    """config.json lacks a key, holds a wrong type, or contradicts itself."""


class ProblemsError(ErnieQuantError):
    """Several problems found together; `problems` has one line each."""

    def __init__(self, headline: str, problems: Sequence[str]) -> None:
        self.headline = headline
        self.problems = list(problems)
        super().__init__("\n".join([headline, *(f"  {p}" for p in self.problems)]) if self.problems else headline)


class PlanError(ProblemsError):
    """What is asked for does not fit this checkpoint."""


class OutputError(ErnieQuantError):
    """The output folder is not ours, not finished, or cannot be written."""


class VerifyError(ProblemsError):
    """What lies on disk is not what the report says."""


class RetryError(ErnieQuantError):
    """The same command may work later."""

    exit_code = 75
