"""The scripts of docs/scaling.md do what the document says: here on one machine, with a Slurm and an ssh that are a line each."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.disk import contents
from helpers.paths import ROOT
from helpers.synthetic import wide, write_model

PROGRAMS = {
    "ernie-quant": f'exec {sys.executable} -m ernie_quant "$@"',
    "ssh": 'shift; exec "$@"',
    "scontrol": 'echo "$@" >> requeued',
    "sbatch": """
if [ "$1" = --parsable ]; then
  for SLURM_ARRAY_TASK_ID in $(seq 0 15); do export SLURM_ARRAY_TASK_ID; bash -e "$2" || exit; done >&2
  echo 4711
else
  [ "$1" = --dependency=afterok:4711 ] && [ "$2" = --wrap ] && bash -c "$3"
fi""",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """src, and a folder of programs."""
    write_model(tmp_path / "src", *wide())
    (tmp_path / "bin").mkdir()
    for name, script in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


PROGRESS = re.compile(r"(\d+ of \d+ files, )?[\d.]+ of [\d.]+ GB\b")


def block(beginning: str, folder: Path, out: Path) -> str:
    """The block that begins so, with places of ours, and files that are small enough for several shares."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/scaling.md").read_text(), re.DOTALL)
    (found,) = [text for text in blocks if text.startswith(beginning)]
    found = re.sub(r"/shared/(ERNIE-4.5-300B-A47B-Paddle|src)\b", str(folder / "src"), found)
    found = re.sub(r"/shared/(ERNIE-4.5-300B-A47B-WINT4|out)\b", str(out), found)
    assert "/shared" not in found
    return found.replace("--experts-only", "--experts-only --group-size 32 --max-shard-size 20000")


def run(script: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_ID": "12"} | more
    return subprocess.run(["bash", "-c", script], cwd=folder, env=env, capture_output=True, text=True, check=False)


def whole(folder: Path) -> dict[str, bytes]:
    """The files of one run, whose folder is called out."""
    command = "ernie-quant wint4 src whole/out --experts-only --group-size 32 --max-shard-size 20000"
    done = run(command, folder)
    assert done.returncode == 0, done.stderr
    found = contents(folder / "whole/out")
    assert len([name for name in found if name.endswith(".safetensors")]) > 3
    return found


def test_a_loop_over_machines(folder: Path) -> None:
    (folder / "loop").mkdir()
    done = run(block("index=0", folder, folder / "loop/out"), folder)
    said = [line for line in done.stderr.splitlines() if not PROGRESS.match(line)]  # a busy machine takes long enough for some
    assert (done.returncode, said) == (0, [])
    assert contents(folder / "loop/out") == whole(folder)


@pytest.mark.slow
def test_an_array_of_jobs_and_a_merge(folder: Path) -> None:
    """The script as `sbatch` would run it, for every index; then the job that depends on it."""
    script = block("#!/bin/bash", folder, folder / "slurm/out")
    assert "--array=0-15" in script
    assert "N=16 " in script
    (folder / "slurm").mkdir()
    (folder / "shares.sh").write_text(script)
    done = run(block("job=", folder, folder / "slurm/out"), folder)
    assert done.returncode == 0, done.stderr
    assert contents(folder / "slurm/out") == whole(folder)
    assert not (folder / "requeued").exists()


def test_a_job_that_is_worth_another_try_is_queued_again(folder: Path) -> None:
    script = block("#!/bin/bash", folder, folder / "slurm/out")
    (folder / "bin/ernie-quant").write_text("#!/bin/bash\nexit $WITH\n")
    assert run(script, folder, SLURM_ARRAY_TASK_ID="0", WITH="1").returncode == 1
    assert not (folder / "requeued").exists()
    assert run(script, folder, SLURM_ARRAY_TASK_ID="0", WITH="75").returncode == 75
    assert (folder / "requeued").read_text() == "requeue 12\n"
