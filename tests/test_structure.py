"""The structure of the code: rooms rest on rooms below, heavy packages wait, and everything public says what it is."""

from __future__ import annotations

import ast
import importlib.util
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "numba", "numpy", "scipy", "transformers", "safetensors", "huggingface_hub", "ray", "matplotlib"}
MAX_LINES = 250

spec = importlib.util.spec_from_file_location("floors", ROOT / "docs/floors.py")
assert spec
assert spec.loader
floors = importlib.util.module_from_spec(spec)
spec.loader.exec_module(floors)

MODULES: dict[str, Path] = floors.modules(ROOT)
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in MODULES.items()}
IMPORTS: dict[str, set[str]] = floors.imports(MODULES)
ROOMS: dict[str, set[str]] = floors.rooms(MODULES)


def test_all_imports_are_seen() -> None:
    """At the top of a file, inside of a function and under TYPE_CHECKING; a package, a module and a name of one."""
    assert {
        "ernie_quant.cli.main",
        "ernie_quant.planning.make",
        "ernie_quant.codecs.rtn",
        "ernie_quant.runtimes",
    } <= MODULES.keys()
    assert "ernie_quant.names" in IMPORTS["ernie_quant.planning.choose"]
    assert "ernie_quant.run.asked" in IMPORTS["ernie_quant.cli._execute"]  # in a function
    assert "ernie_quant.planning.recipe" in IMPORTS["ernie_quant.cli._execute"]  # for types
    assert "ernie_quant.runtimes._sharing" in IMPORTS["ernie_quant.planning.capacity"]  # from a package
    assert "ernie_quant.planning" in ROOMS["ernie_quant.cli"]


def test_a_circle_is_found_and_drawn() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}
    assert [list(c) for c in floors.circles(graph)] == [["b", "c"], ["d"]]
    assert floors.floors({"a": {"b"}, "b": set(), "c": {"a", "b"}}) == [["b"], ["a"], ["c"]]


def test_no_import_is_relative() -> None:
    nodes = [(name, node) for name, tree in TREES.items() for node in ast.walk(tree)]
    assert [name for name, node in nodes if isinstance(node, ast.ImportFrom) and node.level] == []


@pytest.mark.parametrize("graph", [ROOMS, IMPORTS], ids=["rooms", "files"])
def test_nothing_imports_itself_by_way_of_others(graph: dict[str, set[str]]) -> None:
    assert floors.circles(graph) == []


# floors that a newcomer may rely on, from the ground up; what is not named may stand anywhere between
ORDER = (
    ("errors", "plugins", "dtypes", "ggml", "threads"),
    ("kernels", "checkpoint", "disk", "jsonio", "needs", "paths", "settings"),
    ("measure", "hubs"),
    ("codecs", "readers", "views", "vocabulary", "writers"),
    ("names", "reporting"),
    ("archs",),
    ("runtimes", "sources"),
    ("weights",),
    ("serving",),
    ("planning",),
    ("result", "runners"),
    ("run", "check", "publish"),
    ("nightly",),
    ("cli",),
)
HEIGHT = {f"ernie_quant.{room}": height for height, inside in enumerate(ORDER) for room in inside}


def test_no_room_imports_upwards() -> None:
    up = [f"{room} -> {t}" for room, targets in ROOMS.items() for t in targets if HEIGHT.get(t, -1) >= HEIGHT.get(room, 99)]
    assert up == []
    assert ROOMS.keys() >= HEIGHT.keys()


def test_the_drawing_in_the_documents_is_that_of_today() -> None:
    """`python docs/floors.py --write` after an import that moves a room; look at what moved."""
    assert (ROOT / "docs/architecture.md").read_text() == floors.document(ROOT)


def test_only_main_knows_the_command_line() -> None:
    """`python -m ernie_quant` is the one door."""
    outside = [name for name in MODULES if not name.startswith("ernie_quant.cli")]
    knowing = {name for name in outside if any(t.startswith("ernie_quant.cli") for t in IMPORTS[name])}
    assert knowing == {"ernie_quant.__main__"}


def test_only_readers_and_writers_know_a_file_format() -> None:
    """Of safetensors and GGUF; the names of files are `sources.folder`'s and the runtimes' business."""
    knowing = {
        name
        for name, targets in IMPORTS.items()
        for t in targets
        if t in ("ernie_quant.writers.safetensors", "ernie_quant.readers.safetensors")
    }
    assert knowing == set()


def at_import_time(tree: ast.AST) -> Iterator[str]:
    """What a file imports when it is imported: not in functions, not under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(tree):
        match child:
            case ast.Import(names=aliases):
                yield from (alias.name for alias in aliases)
            case ast.ImportFrom(module=str(module), names=aliases):
                yield module
                yield from (name for alias in aliases if (name := f"{module}.{alias.name}") in MODULES)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                pass
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), orelse=rest):
                for statement in rest:
                    yield from at_import_time(statement)
            case _:
                yield from at_import_time(child)


def below(package: str) -> list[str]:
    return [name for name in MODULES if name == package or name.startswith(package + ".")]


def test_looking_at_headers_needs_no_heavy_package() -> None:
    """What every command, inspect and the plan import when they are imported."""
    seen: set[str] = set()
    packages = ("cli", "inspect", "plan", "readers", "archs", "codecs", "runtimes", "sources", "weights", "writers", "runners")
    todo = [name for package in packages for name in below(f"ernie_quant.{package}")]
    heavy = set()
    while todo:
        if (name := todo.pop()) in seen:
            continue
        seen.add(name)
        targets = set(at_import_time(TREES[name]))
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


def test_no_docstring_says_nothing() -> None:
    empty = {"None.", "Parse.", "The same.", "TODO.", "Begin."}
    nodes = [(name, n) for name, tree in TREES.items() for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    assert [f"{name}.{node.name}" for name, node in nodes if (ast.get_docstring(node) or "") in empty] == []


def test_no_file_is_too_long_to_read() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


def test_every_package_is_installed() -> None:
    """A folder that pyproject.toml does not name works here and is missing in a wheel."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(packages) == sorted(name for name, path in MODULES.items() if path.name == "__init__.py")


# --- order -----------------------------------------------------------------------------------------------------------

ORDERLESS = ("sorted", "any", "all", "sum", "max", "min", "set", "frozenset", "len")  # what takes a set as well as a list
LISTING = ("join", "extend", "list", "tuple", "next", "iter", "enumerate", "dict", "fromkeys")


def is_set(node: ast.expr) -> bool:
    """A set by its own looks, or what sets and keys of dicts have in common or not."""
    match node:
        case ast.Set() | ast.SetComp() | ast.Call(func=ast.Name(id="set" | "frozenset")):
            return True
        case ast.BinOp(left=left, op=ast.BitAnd() | ast.BitOr() | ast.Sub() | ast.BitXor(), right=right):
            return any(is_set(side) or getattr(getattr(side, "func", None), "attr", "") == "keys" for side in (left, right))
        case ast.Starred(value=value):
            return is_set(value)
    return False


def name_of_call(node: ast.AST) -> str:
    return getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""


def listed_sets(tree: ast.AST) -> Iterator[str]:
    """Sets that are gone through in an order that shows: it is another one in every process."""
    nodes = list(ast.walk(tree))
    orderless = {id(argument) for node in nodes if name_of_call(node) in ORDERLESS for argument in node.args}
    for node in nodes:
        gone_through: list[ast.expr] = []
        match node:
            case ast.For(iter=values):
                gone_through = [values]
            case ast.ListComp(generators=loops) | ast.GeneratorExp(generators=loops) | ast.DictComp(generators=loops):
                gone_through = [loop.iter for loop in loops] if id(node) not in orderless else []
            case ast.List(elts=values) | ast.Tuple(elts=values):
                gone_through = [value for value in values if isinstance(value, ast.Starred)]
            case ast.Call(args=values) if name_of_call(node) in LISTING:
                gone_through = values
        yield from (f"line {value.lineno}: {ast.unparse(value)}" for value in gone_through if is_set(value))


def test_a_set_that_is_listed_is_seen() -> None:
    listed = [
        "for x in {1, 2}: pass",
        "[f(x) for x in a.keys() - b]",
        "', '.join(set(a))",
        "[*{x for x in a}, 1]",
        "next(iter(set(a)))",
    ]
    sound = [
        "for x in sorted({1, 2}): pass",
        "sorted(f(x) for x in a.keys() - b)",
        "any(x for x in set(a))",
        "{x for x in set(a)}",
    ]
    assert [len(list(listed_sets(ast.parse(line)))) for line in listed + sound] == [1] * len(listed) + [0] * len(sound)


def test_nothing_is_written_in_the_order_of_a_set() -> None:
    """Messages and files are the same in every process; names are sorted, those of tensors by `names.natural`."""
    found = {name: lines for name, tree in TREES.items() if (lines := list(listed_sets(tree)))}
    assert found == {}
