"""Imports go one way, heavy packages wait until they are needed, and everything public says what it is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "numba", "numpy", "scipy", "transformers", "safetensors", "huggingface_hub", "ray", "matplotlib"}
MAX_LINES = 350


def modules() -> dict[str, Path]:
    """Name of every module as it is imported -> its file; `cli/` is installed as ernie_quant.cli."""
    found = {}
    for folder, prefix in ((ROOT / "ernie_quant", ("ernie_quant",)), (ROOT / "cli", ("ernie_quant", "cli"))):
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in MODULES.items()}


def imported(tree: ast.AST, *, at_import_time: bool) -> set[str]:
    """Names of imported modules; with `at_import_time` not those in functions and under TYPE_CHECKING."""
    return set(_imports(tree, at_import_time))


def _imports(node: ast.AST, at_import_time: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import(names=aliases):
                yield from (alias.name for alias in aliases)
            case ast.ImportFrom(module=str(module), names=aliases, level=0):
                yield module
                yield from (name for alias in aliases if (name := f"{module}.{alias.name}") in MODULES)
            case ast.ImportFrom():
                raise AssertionError("relative imports are not used here")
            case ast.FunctionDef() | ast.AsyncFunctionDef() if at_import_time:
                pass
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), orelse=rest) if at_import_time:
                for statement in rest:
                    yield from _imports(statement, at_import_time)
            case _:
                yield from _imports(child, at_import_time)


def ours(name: str) -> set[str]:
    """Modules of this project that a module imports, anywhere in its file but for types."""
    tree = TREES[name]
    for_types = {
        module
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for module in imported(node, at_import_time=False)
    }
    found = imported(tree, at_import_time=False)
    return {m for m in found if m in MODULES and m != "ernie_quant"} - (for_types - imported(tree, at_import_time=True))


def below(package: str) -> list[str]:
    return [name for name in MODULES if name == package or name.startswith(package + ".")]


def test_the_whole_project_is_seen() -> None:
    assert {"ernie_quant.cli.main", "ernie_quant.plan", "ernie_quant.codecs.rtn", "ernie_quant.runtimes"} <= MODULES.keys()
    assert "ernie_quant.names" in ours("ernie_quant.plan")
    assert "torch" in imported(TREES["ernie_quant.codecs.rtn"], at_import_time=False)
    assert "torch" not in imported(TREES["ernie_quant.codecs.rtn"], at_import_time=True)


# what a module (or package) must not import
FORBIDDEN = {
    "ernie_quant.errors": ("ernie_quant",),
    "ernie_quant.checkpoint": ("codecs", "runtimes", "names", "plan", "run", "verify", "archs"),
    "ernie_quant.readers": ("codecs", "runtimes", "names", "plan", "run", "verify", "archs", "sources"),
    "ernie_quant.sources": ("codecs", "runtimes", "names", "plan", "run", "verify", "archs"),
    "ernie_quant.views": ("codecs", "runtimes", "names", "plan", "run", "verify", "archs"),
    "ernie_quant.names": ("codecs", "runtimes", "plan", "run", "verify", "archs", "recipe"),
    "ernie_quant.archs": ("codecs", "runtimes", "plan", "run", "verify", "recipe"),
    "ernie_quant.codecs": ("runtimes", "names", "views", "plan", "run", "verify", "archs", "recipe"),
    "ernie_quant.kernels": ("codecs", "runtimes", "names", "views", "plan", "run", "verify", "archs", "recipe"),
    "ernie_quant.runtimes": ("plan", "run", "verify", "archs", "recipe", "writer", "output"),
    "ernie_quant.measure": ("codecs", "runtimes", "names", "plan", "run", "verify"),
    "ernie_quant.writer": ("codecs", "runtimes", "names", "plan", "run", "verify", "views"),
    "ernie_quant.recipe": ("runtimes", "plan", "run", "verify"),
    "ernie_quant.plan": ("run", "verify", "output", "report", "card"),
    "ernie_quant.run": ("verify", "inspect"),
}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package: str) -> None:
    assert below(package)
    forbidden = [x if x == "ernie_quant" else f"ernie_quant.{x}" for x in FORBIDDEN[package]]
    upwards = {
        f"{name} -> {target}"
        for name in below(package)
        for target in ours(name)
        if any(target == f or target.startswith(f + ".") for f in forbidden)
    }
    assert upwards == set()


def test_only_main_knows_the_command_line() -> None:
    """`python -m ernie_quant` is the one door."""
    outside = [name for name in MODULES if not name.startswith("ernie_quant.cli")]
    knowing = {name for name in outside if any(t.startswith("ernie_quant.cli") for t in ours(name))}
    assert knowing == {"ernie_quant.__main__"}


def test_no_two_modules_import_each_other() -> None:
    edges = {name: {t for t in imported(tree, at_import_time=True) if t in MODULES} - {name} for name, tree in TREES.items()}

    def reachable(start: str) -> set[str]:
        seen, todo = set(), list(edges[start])
        while todo:
            if (name := todo.pop()) not in seen:
                seen.add(name)
                todo += edges[name]
        return seen

    assert [name for name in edges if name in reachable(name)] == []


def test_looking_at_headers_needs_no_heavy_package() -> None:
    """What every command, inspect and the plan import when they are imported."""
    seen: set[str] = set()
    packages = ("cli", "inspect", "plan", "readers", "archs", "codecs", "runtimes", "sources")
    todo = [name for package in packages for name in below(f"ernie_quant.{package}")]
    heavy = set()
    while todo:
        if (name := todo.pop()) in seen:
            continue
        seen.add(name)
        targets = imported(TREES[name], at_import_time=True)
        heavy |= {f"{name} imports {t}" for t in targets if t.partition(".")[0] in HEAVY}
        todo += [t for t in targets if t in MODULES]
    assert heavy == set()


def public(tree: ast.Module) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (n for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_"))


def test_everything_public_has_a_docstring() -> None:
    silent = [name for name, tree in TREES.items() if not ast.get_docstring(tree)]
    silent += [f"{name}.{node.name}" for name, tree in TREES.items() for node in public(tree) if not ast.get_docstring(node)]
    assert silent == []


def test_no_file_is_too_long_to_read() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}
