"""Packages that are not there, and the command that installs them: with the bounds that this installation was made with.

The name ernie-quant stands in no hint: whoever installed it from a folder or a wheel cannot ask an index for its extras.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec

from ernie_quant.errors import NeedsError

NAMES = {
    "torch": "PyTorch", "triton": "Triton",
    "numpy": "numpy", "numba": "numba", "transformers": "transformers", "google": "protobuf",
    "compressed_tensors": "compressed-tensors",
    "modelscope_hub": "modelscope-hub", "aistudio_sdk": "aistudio-sdk",
}  # fmt: skip
REQUIREMENT = re.compile(r"(?P<wanted>(?P<name>[\w.-]+)[^;]*?)\s*(;.*extra == [\"'](?P<extra>[\w-]+)[\"'].*)?")


def _requirements() -> Iterator[tuple[str, str, str]]:
    """Name, what is wanted of it, and the extra that wants it, or nothing; none where the program runs uninstalled."""
    try:
        found = metadata.requires("ernie-quant") or []
    except metadata.PackageNotFoundError:
        found = []
    for line in found:
        match = REQUIREMENT.fullmatch(line)
        assert match, line
        yield match["name"].lower(), match["wanted"].strip(), match["extra"] or ""


def install_extra(extra: str) -> str:
    """`pip install …` of all that an extra brings."""
    wanted = [wanted for _, wanted, of in _requirements() if of == extra]
    return f"pip install {' '.join(map(_quoted, wanted))}" if wanted else f"pip install '.[{extra}]' in the folder of ernie-quant"


def install(package: str) -> str:
    """`pip install …` of one package."""
    wanted = next((wanted for name, wanted, _ in _requirements() if name == package.lower()), package)
    return f"pip install {_quoted(wanted)}"


def _quoted(wanted: str) -> str:
    return wanted if re.fullmatch(r"[\w.-]+", wanted) else f"'{wanted}'"


def require(*modules: str) -> None:
    """Before any work: are these there? Raises NeedsError."""
    for module in modules:
        try:
            there = find_spec(module) is not None
        except ValueError:  # it is None in sys.modules
            there = False
        if not there:
            raise _missing(module)


def of_import(error: ModuleNotFoundError) -> NeedsError | None:
    """What to say of an import, or a look for a version, that failed; None for modules of our own and of Python's."""
    module = (error.name or "").partition(".")[0]
    known = {name.replace("-", "_") for name, _, _ in _requirements()} | NAMES.keys()
    return _missing(module) if module in known - {"ernie_quant"} else None


def _missing(module: str) -> NeedsError:
    name = NAMES.get(module, module)
    return NeedsError(f"this needs {name}: {install(module if name == 'PyTorch' else name)}")
