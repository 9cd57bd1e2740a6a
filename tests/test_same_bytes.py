"""The same input, recipe and version give the same bytes: on another processor, with other hashes, threads and times."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.disk import contents
from helpers.models import random_model

from ernie_quant.weights import layouts

COMMANDS = (("wint4",), ("wint8",), ("fp8",), ("wint2", "--wint4-layers", "2"), ("convert", "--to", "pt"))
# numba without AVX and with its own cache, torch without its vectorized kernels
OLD_PROCESSOR = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "ATEN_CPU_CAPABILITY": "default"}
SIZES = {"hidden_size": 512, "intermediate_size": 512, "moe_intermediate_size": 256, "head_dim": 64, "moe_num_experts": 4}


def run(source: Path, out: Path, command: tuple[str, ...], **env: str) -> dict[str, bytes]:
    program = [sys.executable, "-m", "ernie_quant", command[0], str(source), str(out), *command[1:], "--quiet"]
    subprocess.run(program, check=True, env=os.environ | env, timeout=600)
    return contents(out)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
def test_another_processor_other_hashes_and_other_threads_write_the_same_bytes(command: tuple[str, ...], tmp_path: Path) -> None:
    source = random_model(tmp_path / "src", layouts.PADDLE, **SIZES)
    one = run(source, tmp_path / "one/out", (*command, "--workers", "1"), PYTHONHASHSEED="1")
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    other = run(source, tmp_path / "other/out", (*command, "--workers", "4"), PYTHONHASHSEED="2", **OLD_PROCESSOR, **cache)
    assert one == other
