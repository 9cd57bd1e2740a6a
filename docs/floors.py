"""Draw the structure of the code from its imports: rooms, the floors they stand on, circles.

python docs/floors.py             # print it
python docs/floors.py --write     # and put it into docs/architecture.md
python docs/floors.py --root DIR  # of another checkout

A room is a folder, or a file that lies in no folder of its own. It stands above every room that it imports, anywhere in
its files: inside of functions and for types too.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- floors: written by docs/floors.py -->\n", "<!-- end of floors -->\n"
FACES = {"ernie_quant", "ernie_quant.__main__"}  # the package's face and its door
WIDTH = 110

Graph = Mapping[str, set[str]]


def modules(root: Path) -> dict[str, Path]:
    """Name of every module as it is imported -> its file; `cli/` and `calibration/` are installed in ernie_quant."""
    found = {}
    for place, prefix in (("ernie_quant", ()), ("cli", ("cli",)), ("calibration", ("calibration",))):
        for path in sorted((root / place).rglob("*.py")):
            parts = ("ernie_quant", *prefix, *path.relative_to(root / place).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(tree: ast.AST, known: Iterable[str]) -> Iterator[str]:
    """Modules that a file imports, wherever in it: names of `known` as far as they are there."""
    names = set(known)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & names
            yield from inside
            if len(inside) < len(node.names):  # something of the module itself
                yield node.module


def imports(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """Module -> modules of this project that it imports."""
    trees = {name: ast.parse(path.read_text(), str(path)) for name, path in files.items()}
    return {name: {m for m in imported(tree, files) if m in files and m != name} for name, tree in trees.items()}


def room_of(module: str, files: Mapping[str, Path]) -> str:
    """The folder of a module, or the module itself where it lies beside the folders."""
    package = module if files[module].name == "__init__.py" else module.rpartition(".")[0]
    return module if package == "ernie_quant" else package


def rooms(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """Room -> rooms that it imports."""
    graph: dict[str, set[str]] = {}
    for module, targets in imports(files).items():
        if module not in FACES:
            mine = room_of(module, files)
            graph.setdefault(mine, set()).update({room_of(t, files) for t in targets - FACES} - {mine})
    return graph


def circles(graph: Graph) -> list[list[str]]:
    """What imports itself by way of others: the strongly connected parts of more than one."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        todo = list(graph[start])
        while todo:
            if (name := todo.pop()) not in seen:
                seen.add(name)
                todo += graph[name]
        reach[start] = seen
    return sorted({tuple(sorted(b for b in reach[a] if a in reach[b])) for a in graph if a in reach[a]})  # type: ignore[arg-type]


def floors(graph: Graph) -> list[list[str]]:
    """Rooms by floor, from the ground up; those of a circle stand together on the floor of the first that fits."""
    placed: dict[str, int] = {}
    around = {room: set(circle) for circle in circles(graph) for room in circle}
    while len(placed) < len(graph):
        ready = [r for r in graph if r not in placed and graph[r] - around.get(r, set()) <= placed.keys()]
        ready = [r for r in ready if all(o in ready or o in placed for o in around.get(r, ()))]
        level = {r: 1 + max((placed[t] for t in graph[r] if t in placed), default=0) for r in ready}
        lowest = min(level.values())
        placed |= {r: n for r, n in level.items() if n == lowest}
    return [sorted(r for r, n in placed.items() if n == floor) for floor in range(1, max(placed.values()) + 1)]


def draw(root: Path) -> str:
    """One line for a floor, the highest first; what stands on it rests on those below."""
    files = modules(root)
    graph = rooms(files)
    lines = []
    for number, inside in reversed(list(enumerate(floors(graph), 1))):
        words = [_title(room, files) for room in inside]
        line = f"{number:>2}  "
        for word in words:
            if len(line) + len(word) > WIDTH:
                lines.append(line.rstrip())
                line = "    "
            line += word + "  "
        lines.append(line.rstrip())
    lines.append(f"\n{len(graph)} rooms on {len(floors(graph))} floors")
    for what, found in (("rooms", circles(graph)), ("files", circles(imports(files)))):
        lines.append(f"{len(found)} circles of {what}")
        lines += ["  " + " <-> ".join(circle) for circle in found]
    return "\n".join(lines)


def _title(room: str, files: Mapping[str, Path]) -> str:
    folder = files[room].name == "__init__.py" if room in files else True
    return room.removeprefix("ernie_quant.").replace(".", "/") + ("/" if folder else "")


def document(root: Path) -> str:
    """docs/architecture.md with the drawing of today."""
    text = (root / "docs/architecture.md").read_text()
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}```text\n{draw(root)}\n```\n{END}{rest.partition(END)[2]}"


def main() -> None:
    """Print, or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the drawing into docs/architecture.md")
    parser.add_argument("--root", type=Path, default=ROOT)
    args = parser.parse_args()
    if args.write:
        (args.root / "docs/architecture.md").write_text(document(args.root))
    print(draw(args.root))


if __name__ == "__main__":
    main()
