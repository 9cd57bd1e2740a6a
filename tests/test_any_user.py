"""A user without a name, a home or a place in the package to write to, as in a container; and what the Dockerfile promises."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.models import GOLDEN
from helpers.paths import ROOT

NOBODY = 12345
DOCKERFILE = (ROOT / "Dockerfile").read_text()
IMAGE = dict(re.findall(r"^(?:ENV|   ) ([A-Z_]+)=(\S+)", DOCKERFILE, re.MULTILINE))
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def place() -> Iterator[Path]:
    """Where that user may write; pytest's own folders are root's alone."""
    folder = Path(tempfile.mkdtemp(prefix="ernie-quant-"))
    shutil.copytree(GOLDEN / "moe/paddle", folder / "src")
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def as_nobody(place: Path) -> Run:
    """`ernie-quant …` of that user, with nothing in its environment but what is given."""
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    try:
        subprocess.run([sys.executable, "-c", "import click, numba"], user=NOBODY, group=NOBODY, extra_groups=[], check=True,
                       cwd="/", env={"PYTHONPATH": str(ROOT)}, capture_output=True)  # fmt: skip
        subprocess.run(["/bin/ls", ROOT], user=NOBODY, group=NOBODY, extra_groups=[], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this Python or this checkout lies where other users may not look")

    def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        env |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-m", "ernie_quant", *words]
        return subprocess.run(line, cwd=place, env=env, user=NOBODY, group=NOBODY, extra_groups=[], text=True,
                              capture_output=True, check=False)  # fmt: skip

    return run


WINT4 = ("wint4", "src", "out", "--experts-only", "--group-size", "32")


@pytest.mark.parametrize("env", [{"HOME": "/nonexistent"}, {"HOME": "/nonexistent", "NUMBA_CACHE_DIR": "/proc/1/numba"}, {}])
def test_a_run_needs_no_home_and_no_cache(env: dict[str, str], as_nobody: Run, place: Path) -> None:
    done = as_nobody(*WINT4, **env)
    assert (done.returncode, done.stderr) == (0, "")
    done = as_nobody("verify", "out", "--against", "src", **env)
    assert (done.returncode, done.stderr) == (0, "")
    assert {p.name for p in place.iterdir()} == {"src", "out"}  # no cache in the folder that they are in


def test_the_images_environment_keeps_everything_in_the_volume(as_nobody: Run, place: Path) -> None:
    env = {name: value.replace("/data", str(place)) for name, value in IMAGE.items() if name != "PATH"}
    done = as_nobody(*WINT4, **env)
    assert (done.returncode, done.stderr) == (0, "")
    assert list((place / ".cache/numba").rglob("*.nbi"))
    assert place.stat().st_uid != NOBODY
    assert stat.S_IMODE((place / "out/config.json").stat().st_mode) & 0o400


# --- the Dockerfile, which no test can build ---------------------------------------------------------------------------


def test_caches_of_the_image_are_where_it_may_write() -> None:
    caches = {name for name, value in IMAGE.items() if value.startswith(("/data/", "/tmp"))}
    assert caches == {"HOME", "XDG_CACHE_HOME", "ERNIE_QUANT_CACHE", "NUMBA_CACHE_DIR", "HF_HOME", "MPLCONFIGDIR"}
    told = set(re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / "docs/installing.md").read_text(), re.MULTILINE))
    assert told == caches - {"HOME", "XDG_CACHE_HOME"}


def test_the_image_does_not_run_as_root() -> None:
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (.+)$", last, re.MULTILINE) == [f"{NOBODY}:{NOBODY}"]
    assert "RUN " not in last


def test_what_the_image_is_built_from_is_there_and_sent() -> None:
    copied = [name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()]
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == sent
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_extras_of_the_image_are_extras() -> None:
    (extras,) = re.findall(r"^ARG EXTRAS=(.+)$", DOCKERFILE, re.MULTILINE)
    project = (ROOT / "pyproject.toml").read_text()
    assert [name for name in extras.split(",") if f"\n{name} = [" not in project] == []
