"""mypy over the whole package as it is installed: `cli/` and `calibration/` are folders of ernie_quant there.

python tests/typed.py     # what `make lint` runs; `mypy` alone sees what lies in ernie_quant/

mypy follows folders, not the table in pyproject.toml that says where the parts of the package lie. So it is shown a folder of
links that looks like the installed package.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TREE = ROOT / "build/typed"  # always the same place, for mypy's cache


def link_package(tree: Path) -> None:
    """ernie_quant in `tree`: links to what it is made of."""
    package = tree / "ernie_quant"
    package.mkdir(parents=True)
    elsewhere = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    places = {path.name: path for path in (ROOT / "ernie_quant").iterdir()}
    places |= {name.rpartition(".")[2]: ROOT / folder for name, folder in elsewhere.items()}
    for name, place in places.items():
        (package / name).symlink_to(place)


def main() -> int:
    """mypy's exit code."""
    shutil.rmtree(TREE, ignore_errors=True)  # links only
    link_package(TREE)
    line = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache/typed"]
    others = ROOT / "tests/helpers/protocols.py"
    return subprocess.run([*line, TREE / "ernie_quant", others], cwd=TREE, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
