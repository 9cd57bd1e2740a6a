"""Results of every kind to be verified, and ways in which a stored tensor of one can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ernie_quant.codecs.fp8 import Float8Block
from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.weights import layouts
from helpers.calibrated import calibrated, worded
from helpers.models import copy, invoke, random_model, write
from helpers.ranks import WIDTHS
from helpers.results import edit, sealed
from helpers.runs import everything

NARROW = {"intermediate_size": 256, "moe_intermediate_size": 256}  # the least that two ranks can share in WINT2
# 43 stored weights: 24 linears (attention and FFN of 3 layers and of the MTP block, 2 x 2 experts and 2 times shared ones),
# 19 others; as PT 59, of which 40 linears, for q, k, v and gate, up are stored apart
WHOLE, RANK = ("model.safetensors",), ("rank1/model.safetensors",)
BOTH = ("rank0/model.safetensors", *RANK)


def make(folder: Path) -> None:
    """One folder of each kind, all of the model in `src`; `fitted` is of `worded`, which has a tokenizer."""
    random_model(folder / "src", layouts.PADDLE, "moe_mtp", **WIDTHS | NARROW)
    write(folder / "src", folder / "pt")
    write(folder / "src", folder / "int4", recipe=everything(RoundToNearest(4, 64)))
    write(folder / "src", folder / "fp8", recipe=everything(Float8Block()))
    invoke("wint2", folder / "src", folder / "wint2", "--wint4-layers", 2, "--effort", 1, "--quiet")
    invoke("reshard", folder / "wint2", folder / "ranks", "--tp", 2, "--quiet")
    published = copy(folder / "wint2", folder / "published")  # weights and config alone
    for name in ("report.json", "ernie-quant.json", "SHA256SUMS", "README.md"):
        (published / name).unlink()
    invoke("reshard", published, folder / "bare", "--tp", 2, "--quiet")
    invoke("dequantize", folder / "wint2", folder / "plain", "--to", "paddle", "--quiet")
    calibrated(worded(folder / "worded"), folder / "fitted")
    for name in ("int4", "fp8"):
        unmeasured(copy(folder / name, folder / f"{name}-unmeasured"))


def unmeasured(out: Path) -> Path:
    """Without its report, as a manifest has it of files whose errors nobody measured."""
    manifest = json.loads((out / "ernie-quant.json").read_text())
    del manifest["files"]["report.json"]
    manifest["options"]["report"] = False
    (out / "ernie-quant.json").write_text(json.dumps(manifest))
    (out / "report.json").unlink()
    return sealed(out)


def _one_bit(tensor: torch.Tensor) -> torch.Tensor:
    """The second lowest of the first byte."""
    tensor.view(-1).view(torch.uint8)[0] ^= 2
    return tensor


def _calibrated(tensor: torch.Tensor) -> torch.Tensor:
    """Every eighth code of WINT8 another by one; bytes are codes plus 128, and those near the ends stay."""
    codes = tensor.view(-1).view(torch.uint8)
    some = codes[::8]
    some ^= ((some > 64) & (some < 192)).to(torch.uint8)
    return tensor


WAYS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "one bit": _one_bit,
    "reversed": lambda tensor: tensor.view(-1).view(torch.uint8).flip(0).view(tensor.dtype).view(tensor.shape),
    "doubled": lambda tensor: tensor * 2,
    "infinite": lambda tensor: tensor * float("inf"),
    "zero": torch.zeros_like,
    "calibrated": _calibrated,
}


def spoil(out: Path, way: str, start: str, files: tuple[str, ...]) -> None:
    """Change the stored tensor of this name, or those whose names begin so; the hashes are true again."""
    for file in files:
        table = load_file(out / file)
        names = [start] if start in table else [name for name in table if name.startswith(start)]
        assert names
        table |= {name: WAYS[way](table[name].contiguous()) for name in names}
        save_file(table, out / file, metadata={"format": "pt"})
    sealed(out)


def report_lies(out: Path, name: str) -> None:
    """The report says another error of this weight."""

    def change(report: dict[str, list[dict[str, object]]]) -> None:
        next(row for row in report["tensors"] if row["name"] == name)["rel_error"] = 0.25

    edit(out, "report.json", change)
