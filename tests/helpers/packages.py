"""Wheel and source archive, made without an index, and environments that have them and the packages of this one.

python tests/helpers/packages.py FOLDER            # both archives
python tests/helpers/packages.py FOLDER --unpack   # FOLDER/source, unpacked and installed for its tests in FOLDER/venv
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ("ernie_quant", "cli", "calibration", "pyproject.toml", "MANIFEST.in")
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"


def copy_checkout(source: Path, tree: Path) -> None:
    """The package and what MANIFEST.in names; environments, caches and models that lie in a checkout are no part of it."""
    lines = [line.split() for line in (source / "MANIFEST.in").read_text().splitlines()]
    named = [name for verb, *names in lines if verb in ("include", "graft") for name in names]
    for name in (*PACKAGE, *named):
        place = source / name
        if place.is_dir():
            shutil.copytree(place, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(place, tree / name)


def build(kind: str, out: Path, source: Path = ROOT) -> Path:
    """`wheel` or `sdist` of a checkout, as `python -m build --no-isolation` makes it; nothing is left in the checkout."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_checkout(source, tree)
        for link in ("cli", "calibration"):  # where somebody made the checkout look like the installed package
            (tree / "ernie_quant" / link).unlink(missing_ok=True)
        line = [sys.executable, "-c", BUILD, kind, out.resolve()]
        done = subprocess.run(line, cwd=tree, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    return out / done.stdout.splitlines()[-1]


def unpack(archive: Path, folder: Path) -> Path:
    """The one folder of a source archive, as `folder`."""
    with tempfile.TemporaryDirectory(dir=archive.parent) as place, tarfile.open(archive) as tar:
        tar.extractall(place, filter="data")
        (found,) = Path(place).iterdir()
        return Path(shutil.move(found, folder))


def environment(folder: Path, what: Path, *, editable: bool = False) -> Path:
    """Its python: `what` is installed, and beside it the packages of this environment, but not the checkout that is here."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin/python"
    scheme = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", scheme))
    here = [place for place in sys.path if Path(place).name == "site-packages"]  # several, if this is such an environment
    (site / "others.pth").write_text("\n".join(here))  # .pth files in there are not read: an editable checkout stays unseen
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", python, "install", "--no-deps", "--no-index", "--ignore-installed"]
    line = [*pip, "--no-build-isolation", *(["--editable"] if editable else []), what]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return python


def main() -> None:
    """For the Makefile."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--unpack", action="store_true")
    arguments = parser.parse_args()
    archive = build("sdist", arguments.folder)
    if arguments.unpack:
        source = unpack(archive, arguments.folder / "source")
        print(environment(arguments.folder / "venv", source, editable=True))
    else:
        print(archive, build("wheel", arguments.folder), sep="\n")


if __name__ == "__main__":
    main()
