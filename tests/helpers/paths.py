"""Where things lie."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
MAKE_GEOMETRY = ROOT / "benchmarks/make_geometry.py"
