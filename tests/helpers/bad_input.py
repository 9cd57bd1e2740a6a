"""What the command line says of input that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

EXPERT = "model.layers.1.mlp.experts.0.gate_proj.weight"
WINT4 = ("wint4", "SRC", "OUT", "--experts-only", "--group-size", "32")
CONVERT = ("convert", "SRC", "OUT", "--to", "pt")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str
    out: Path

    @property
    def files(self) -> list[str]:
        """What stands in OUT under a final name."""
        return sorted(p.name for p in self.out.iterdir() if p.name != ".ernie-quant") if self.out.is_dir() else []


Run = Callable[..., Outcome]


def refused(outcome: Outcome, *lines: str) -> None:
    """Exit code 1; on stderr one line, or a headline and indented ones, and nothing else anywhere."""
    assert outcome.code == 1
    assert outcome.stdout == ""
    assert outcome.files == []
    headline, *more = outcome.stderr.splitlines()
    assert headline.startswith("error: ")
    assert all(line.startswith("  ") for line in more)
    assert "Traceback" not in outcome.stderr
    found = [headline.removeprefix("error: "), *(line.strip() for line in more)]
    for line in lines:
        assert line in found if more else line in found[0], f"{line!r} is not in {found}"
    if more:
        assert sorted(found[1:]) == sorted(lines)
