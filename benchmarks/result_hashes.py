"""Run every command on small models of every family and print the sha256 of every file that it writes.

python benchmarks/result_hashes.py WORK > before.json          # on one commit
python benchmarks/result_hashes.py WORK > after.json           # on another; then: diff before.json after.json
python benchmarks/result_hashes.py WORK --slice SLICE          # and of a slice that make_geometry.py has written

The models are the golden ones of the tests, and small ones of the true releases' structure whose widths every codec
takes. Everything lies in WORK, under the same names, so that cards and manifests can be compared too.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import make_geometry
from click.testing import CliRunner

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
RECIPE = """
[[rule]]
match = 'layers\\.1\\.mlp\\.experts'
codec = "rtn"
bits = 8
group_size = "channel"

[[rule]]
role = "experts"
codec = "rtn"
bits = 4
group_size = 64
scale = "absmax"
"""
# the structure of the releases in widths of some hundreds
SMALL = {
    "dense": replace(make_geometry.GEOMETRIES["0.3b"], hidden=256, layers=2, heads=8, ffn=512, first_moe=2),
    "moe": replace(
        make_geometry.GEOMETRIES["21b"], hidden=256, layers=3, heads=8, kv_heads=4, ffn=512, experts=(4,), widths=(256,)
    ),
    "untied": replace(
        make_geometry.GEOMETRIES["300b"], hidden=256, layers=3, heads=8, kv_heads=2, ffn=512, experts=(4,), widths=(256,),
        first_moe=1,
    ),
    "vl": replace(
        make_geometry.GEOMETRIES["vl-28b"], hidden=256, layers=3, heads=8, kv_heads=4, ffn=512, experts=(4, 4),
        widths=(256, 128),
    ),
}  # fmt: skip


def hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below a folder, by relative name."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in files}


class Commands:
    """Runs commands in this process and keeps what they wrote, or why they refused."""

    def __init__(self) -> None:
        """Nothing was run yet."""
        self.found: dict[str, object] = {}

    def run(self, *words: str, out: str = "") -> bool:
        """Run one command; `out` is the folder that it writes."""
        from ernie_quant.cli.main import group

        result = CliRunner().invoke(group, [*words, *(["-q"] if out else [])])
        refused = result.exit_code and (result.output.strip() or repr(result.exception))
        text = hashlib.sha256(result.output.encode()).hexdigest()[:16]
        self.found[" ".join(words)] = refused or (hashes(Path(out)) if out else text)
        print(result.exit_code, " ".join(words), file=sys.stderr)
        return result.exit_code == 0


def small_models() -> None:
    """Write the models of `SMALL` in both formats."""
    make_geometry.VOCABULARY, make_geometry.VISION_BLOCKS = 512, 1
    make_geometry.VISION_WIDTH, make_geometry.VISION_FFN = 64, 256
    for name, geometry in SMALL.items():
        make_geometry.GEOMETRIES[name] = geometry
        for layout in ("paddle", "pt"):
            out = Path(f"{name}-{layout}")
            args = SimpleNamespace(
                model=name, out=out, layers=None, format=layout, fill=True, shard_gb=0.004, seed=0, bf16_tag="U16"
            )
            make_geometry.write_checkpoint(args)


def one_source(commands: Commands, source: str, *, thorough: bool, effort: str) -> None:
    """Every command that reads a plain checkpoint, and those that read their results."""
    jobs: list[tuple[str, ...]] = [("convert", "--to", "pt"), ("convert", "--to", "paddle")]
    for name in ("wint4", "wint8", "fp8"):
        jobs += [(name, "--experts-only"), (name, "--mtp", "--keep-unfit")]
    jobs += [("wint2", "--effort", effort, "--wint4-layers", "2"), ("wint4", "--runtime", "fastdeploy")]
    jobs += [("wint2", "--effort", effort, "--wint4-layers", "2", "--tp", "2")]
    if thorough:
        for group in ("64", "32", "channel"):
            jobs += [("wint4", "--group-size", group), ("wint8", "--group-size", group, "--experts-only")]
        jobs += [
            ("quantize", "--recipe", "recipe.toml"), ("wint2", "--effort", effort, "--wint4-layers", "0"),
            ("wint4", "--scale", "absmax", "--runtime", "transformers"), ("wint4", "--vl-config", "transformers"),
            ("wint4", "--runtime", "fastdeploy", "--unsupported"), ("wint4", "--runtime", "fastdeploy", "--tp", "4"),
        ]  # fmt: skip
        commands.run("plan", source, "--json")
        commands.run("inspect", source, "--json")
    for number, (name, *options) in enumerate(jobs):
        out = f"{source}.{number}"
        commands.run(name, source, out, *options, "--dry-run", "--json")
        if not commands.run(name, source, out, *options, "--max-shard-size", "2MB" if thorough else "5GB", out=out):
            continue
        commands.run("verify", out, "--against", source, "--full", "--json")
        if name in ("wint4", "wint8", "fp8", "wint2") and thorough:
            for layout in ("pt", "paddle"):
                commands.run("dequantize", out, f"{out}.{layout}", "--to", layout, out=f"{out}.{layout}")
        if name == "wint2" or "fastdeploy" in options:
            for tp in ("1", "2", "4"):
                commands.run("reshard", out, f"{out}.tp{tp}", "--tp", tp, out=f"{out}.tp{tp}")
        for path in Path().glob(f"{out}*/**/*.safetensors"):
            path.unlink()  # what is compared is hashed; disks are small


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--slice", type=Path, action="append", default=[])
    args = parser.parse_args()
    slices = [folder.resolve() for folder in args.slice]
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    os.chdir(args.work)
    Path("recipe.toml").write_text(RECIPE)
    commands = Commands()
    small_models()
    for folder in sorted(p.parent for p in GOLDEN.glob("*/*/config.json")):
        source = f"golden-{folder.parent.name}-{folder.name}"
        shutil.copytree(folder, source)
        one_source(commands, source, thorough=True, effort="1")
    for name in SMALL:
        for layout in ("paddle", "pt"):
            one_source(commands, f"{name}-{layout}", thorough=True, effort="16")
    for folder in slices:
        Path(folder.name).symlink_to(folder)
        one_source(commands, folder.name, thorough=False, effort="1")
    print(json.dumps(commands.found, indent=1))


if __name__ == "__main__":
    main()
