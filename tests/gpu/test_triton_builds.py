"""Kernels are compiled for a GPU where there is none: an interpreter takes more than a compiler does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT


@pytest.mark.slow
def test_every_kernel_is_built_with_exact_arithmetic_and_all_tensors_stay_on_the_device(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; there is none for this system")
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    line = [sys.executable, ROOT / "tests/gpu/build_kernels.py"]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    if done.returncode == 2:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    built = {out.split()[0] for out in done.stdout.splitlines()[:-1]}
    names = {path.stem for path in (ROOT / "ernie_quant/kernels").glob("?*_triton.py")}
    assert names == {"ccq_search_triton", "ccq_triton", "difference_triton", "fp8_triton", "hadamard_triton", "packing_triton",
                     "rtn_triton", "weight_quantize_triton"}  # fmt: skip
    assert built == {"_search", "_sums_of_rows", "_pack", "_squares", "_scales", "_codes", "_codes_and_sums", "_liked_scales",
                     "_super_scales", "_gains", "_best_pairs", "_best_locals", "_decode", "_nearest_bytes"}  # fmt: skip
