"""Every line that verify prints of a good result, and folders in which exactly that thing is wrong: those exit with 1.

The hashes are true in all of these folders, so that nothing but the values can tell.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Command
from helpers.disk import no_waiting
from helpers.models import copy
from helpers.verified import BOTH, RANK, WHOLE, make, report_lies, spoil

from ernie_quant.check.verify import verify

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

PT_EXPERT, EXPERT = "model.layers.2.mlp.experts.1.down_proj", "ernie.layers.2.mlp.experts.1.down_proj"
NEIGHBOUR = "ernie.layers.2.mlp.experts.0.down_proj"
WINT4, WINT8 = "ernie.layers.1.mlp.experts.0.down_proj", "ernie.layers.0.mlp.down_proj"
NORM, PT_NORM, HEAD = "ernie.norm", "model.norm", "ernie.embed_tokens"
DOWN, MLP_DOWN = "model.layers.1.mlp.shared_experts.down_proj", "model.layers.0.mlp.down_proj"
ATTENTION = "model.layers.0.self_attn.o_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """src, and of every kind one result of it: `helpers.verified`."""
    folder = tmp_path_factory.mktemp("wordings")
    with no_waiting():
        make(folder)
    return folder


# --- what is printed of good folders -----------------------------------------------------------------------------------

LINES = {
    "recoded": "quantized: decode to finite weights, and these to the same codes",
    "kept": "kept: bit for bit those of SRC",
    "fitted": "kept, fitted by calibration: change recomputed from SRC, it is the reported one",
    "decoded": "kept: bit for bit what SRC decodes to",
    "stored": "quantized: codes and scales are those of SRC",
    "reported": "quantized: error recomputed from SRC, it is the reported one",
    "measured": "quantized, without a report: relative error ERROR to SRC\n    at most MOST, of WORST",
    "nearest": "of these: no code could be nearer to SRC at its scale",
    "others": "of these: other codes, as calibration or another rounding chooses; only large errors would show",
    "no source": "not compared: no source (--against SRC)",
    "not sampled": "not compared: not in the sample (--full)",
}

SAMPLED = "16 of 40 recoded; 6 kept; 16 reported; 37 not sampled"

# fmt: off
PRINTED: list[tuple[str, str, tuple[Any, ...], str, str]] = [
    ("pt",    "",          (),               "4 files, 59 tensors, 0 quantized",  "59 no source"),
    ("pt",    "src",       (),               "4 files, 59 tensors, 0 quantized",  "59 kept"),
    ("int4",  "",          (),               "4 files, 59 tensors, 40 quantized", "40 recoded; 59 no source"),
    ("int4",  "",          ("--sample", 20), "4 files, 59 tensors, 40 quantized", "16 of 40 recoded; 59 no source"),
    ("int4",  "src",       ("--sample", 20), "4 files, 59 tensors, 40 quantized", SAMPLED),
    ("int4",  "src",       (),               "4 files, 59 tensors, 40 quantized", "40 recoded; 19 kept; 40 reported"),
    ("fp8",   "src",       ("--full",),      "4 files, 59 tensors, 40 quantized", "40 recoded; 19 kept; 40 reported"),
    ("wint2", "src",       ("--full",),      "6 files, 43 tensors, 24 quantized", "24 recoded; 19 kept; 24 reported"),
    ("ranks", "src",       ("--full",),      "8 files, 43 tensors, 24 quantized", "24 recoded; 19 kept; 24 reported"),
    ("ranks", "wint2",     ("--full",),      "8 files, 43 tensors, 24 quantized", "24 recoded; 19 kept; 24 stored"),
    ("wint2", "ranks",     ("--full",),      "6 files, 43 tensors, 24 quantized", "24 recoded; 19 kept; 24 stored"),
    ("bare",  "",          ("--full",),      "7 files, 43 tensors, 24 quantized", "24 recoded; 43 no source"),
    ("bare",  "published", ("--full",),      "7 files, 43 tensors, 24 quantized", "24 recoded; 19 kept; 24 stored"),
    ("fitted", "worded",  ("--full",),      "7 files, 82 tensors, 48 quantized", "48 recoded; 32 kept; 2 fitted; 48 reported"),
    ("fitted", "",        ("--full",),      "7 files, 82 tensors, 48 quantized", "48 recoded; 82 no source"),
    ("plain", "wint2",     ("--full",),      "5 files, 43 tensors, 0 quantized",  "19 kept; 24 decoded"),
]
UNREPORTED = [
    ("bare",            "wint2", "7 files, 43 tensors, 24 quantized", "24 recoded; 19 kept; 24 measured; 24 nearest"),
    ("int4-unmeasured", "int4",  "3 files, 59 tensors, 40 quantized", "40 recoded; 19 kept; 40 measured; 40 nearest"),
    ("fp8-unmeasured",  "fp8",   "3 files, 59 tensors, 40 quantized", "40 recoded; 19 kept; 40 measured; 40 nearest"),
]
# fmt: on


def printed(out: Path, first: str, counts: str) -> str:
    """What `12 kept; 3 reported` stands for."""
    found = [re.fullmatch(r"(\d+(?: of \d+)?) (.*)", count) for count in counts.split("; ")]
    lines = [(match[2], f"{match[1]} {LINES[match[2]]}") for match in found if match]
    indented = [("    " if word in ("nearest", "others") else "  ") + line for word, line in lines]
    return "\n".join((f"{out}: verified: {first}", *indented, ""))


def said(command: Command, out: Path, against: Path | None, *options: Any) -> tuple[int, str, str]:
    code, text, err = command("verify", out, *(("--against", against) if against else ()), *options)
    return code, text.replace(str(against), "SRC"), err


@pytest.mark.parametrize(("name", "against", "options", "first", "counts"), PRINTED, ids=lambda value: str(value) or "-")
def test_what_was_compared_with_what_is_said(
    name: str, against: str, options: tuple[Any, ...], first: str, counts: str, folder: Path, command: Command
) -> None:
    found = said(command, folder / name, folder / against if against else None, *options)
    assert found == (0, printed(folder / name, first, counts), "")


@pytest.mark.parametrize(("name", "like", "first", "counts"), UNREPORTED)
def test_without_a_report_the_errors_are_computed(
    name: str, like: str, first: str, counts: str, folder: Path, command: Command
) -> None:
    """They are those of the same weights where there is a report."""
    rows = [row for row in json.loads((folder / like / "report.json").read_text())["tensors"] if row["codec"] != "kept"]
    error = sum(row["squared_error"] for row in rows) / sum(row["squared_norm"] for row in rows)
    most = max(rows, key=lambda row: row["rel_error"])
    text = printed(folder / name, first, counts).replace("ERROR", f"{error:.3g}")
    text = text.replace("MOST", f"{most['rel_error']:.3g}").replace("WORST", most["name"])
    assert said(command, folder / name, folder / "src", "--full") == (0, text, "")


def test_numbers_are_in_the_json_too(folder: Path, command: Command) -> None:
    _, text, _ = command("verify", folder / "bare", "--against", folder / "src", "--json")
    found = json.loads(text)
    numbers = {key: found["compared"][key] for key in ("kept", "decoded", "stored", "reported", "measured", "nearest")}
    assert numbers == {"kept": 19, "decoded": 0, "stored": 0, "reported": 0, "measured": 24, "nearest": 24}
    assert (found["compared"]["worst"], found["recoded"], found["not_compared"]) == (f"{NEIGHBOUR}.weight", 24, {})
    assert 0.01 < found["compared"]["rel_error"] < found["compared"]["worst_rel_error"] < 0.11
    _, text, _ = command("verify", folder / "bare", "--json")
    found = json.loads(text)
    assert (found["compared"]["kept"], found["against"], found["not_compared"]) == (0, False, {"no source": 43})


@pytest.mark.parametrize("sample", [1, None])
@pytest.mark.parametrize(("name", "against"), [*dict.fromkeys(row[:2] for row in PRINTED if row[1]), ("bare", "src")], ids=str)
def test_every_tensor_is_in_one_number(name: str, against: str, sample: int | None, folder: Path) -> None:
    """Compared in one way, or not compared for a reason that is said."""
    found = verify(folder / name, folder / against, sample=sample)
    assert found.compared.total + sum(found.not_compared.values()) == found.tensors
    assert found.compared.total == found.sampled


def test_codes_that_somebody_calibrated_are_told_from_the_nearest(folder: Path, command: Command, tmp_path: Path) -> None:
    """Two of every sixteen codes are a step away, everywhere in one weight."""
    out = copy(folder / "bare", tmp_path / "out")
    spoil(out, "calibrated", f"{WINT8}.quant", BOTH)
    code, text, _ = said(command, out, folder / "src", "--full")
    assert (code, text.splitlines()[-2:]) == (0, [f"    23 {LINES['nearest']}", f"    1 {LINES['others']}"])


# --- where exactly that is wrong ---------------------------------------------------------------------------------------

BYTES, PACKING = "should be the source's bytes, and is not", "is not what packing the codes of .* gives; .*"
LIMIT, ROWS = (
    "its relative error to the source is {}; .* stays below {}",
    r"512 of 512 rows \(0, 1, 2, 3, 4, …\) are no nearer .*",
)
OTHER = r"in \d+ of 2048 blocks of 64 weights the codes are not the nearest to the source at their scales, in all others .*"
DIFFER = r"its (relative|squared|largest) error is [\d.e-]+, the report says [\d.e-]+"
FIT_NAN = "was fitted to text, and holds NaN or infinity"
FIELD = "rows 0 to 512 have not the source's {}; nothing should change any"
OTHER_FORM = "is (int4|fp8), .*, in the source (int8|fp8|wint2).*; compare it with what it was made from"

LIE, DECODES = "its relative error is {}, the report says 0.25", "should be what the source decodes to, and is not"
INFINITE, NO_CODEC = "rows 0 to 512 decode to NaN or infinity", "rows 0 to 512 decode to weights whose codes are others; .*"
ONE_OR_TWO, NEARLY_ONE = r"[12]\.?\d*", r"(0\.99\d|1)"

# fmt: off
WRONG: list[tuple[str, str, str, str, str, str, tuple[str, ...], str]] = [
    # the line that would be false; result and source; what is wrong with which stored tensors; what is said of the weight
    ("kept",     "pt",              "src",       "one bit",  PT_NORM,   "weight",        WHOLE, BYTES),
    ("kept",     "pt",              "src",       "reversed", PT_EXPERT, "weight",        WHOLE, BYTES),
    ("kept",     "int4",            "src",       "one bit",  PT_NORM,   "weight",        WHOLE, BYTES),
    ("kept",     "wint2",           "src",       "one bit",  NORM,      "weight",        WHOLE, BYTES),
    ("kept",     "bare",            "published", "one bit",  HEAD,      "weight",        RANK,  BYTES),
    ("kept",     "pt",              "src",       "report",   PT_NORM,   "weight",        WHOLE, LIE.format("0")),
    ("kept",     "fitted",          "worded",    "one bit",  MLP_DOWN,  "weight",        WHOLE, BYTES),
    ("fitted",   "fitted",          "worded",    "one bit",  DOWN,      "weight",        WHOLE, DIFFER),
    ("fitted",   "fitted",          "worded",    "reversed", DOWN,      "weight",        WHOLE, FIT_NAN),
    ("fitted",   "fitted",          "worded",    "report",   DOWN,      "weight",        WHOLE, LIE.format(r"0\.00\d+")),
    ("decoded",  "plain",           "wint2",     "one bit",  EXPERT,    "weight",        WHOLE, DECODES),
    ("recoded",  "int4",            "",          "doubled",  PT_EXPERT, "weight_shape",  WHOLE, PACKING),
    ("recoded",  "fp8",             "",          "infinite", PT_EXPERT, "weight_scale",  WHOLE, INFINITE),
    ("recoded",  "wint2",           "",          "zero",     WINT4,     "quant",         WHOLE, NO_CODEC),
    ("reported", "int4",            "src",       "one bit",  PT_EXPERT, "weight_packed", WHOLE, DIFFER),
    ("reported", "int4",            "src",       "doubled",  PT_EXPERT, "weight_scale",  WHOLE, DIFFER),
    ("reported", "fp8",             "src",       "one bit",  PT_EXPERT, "weight",        WHOLE, DIFFER),
    ("reported", "wint2",           "src",       "one bit",  EXPERT,    "quant",         WHOLE, DIFFER),
    ("reported", "ranks",           "src",       "one bit",  EXPERT,    "quant",         RANK,  DIFFER),
    ("reported", "wint2",           "src",       "report",   EXPERT,    "weight",        WHOLE, LIE.format(r"0\.10\d+")),
    ("stored",   "ranks",           "wint2",     "one bit",  EXPERT,    "quant",         RANK,  FIELD.format("codes")),
    ("stored",   "bare",            "published", "one bit",  WINT4,     "quant",         RANK,  FIELD.format("codes")),
    ("stored",   "bare",            "published", "one bit",  EXPERT,    "weight_scale",  RANK,  FIELD.format("local_scale")),
    ("stored",   "bare",            "published", "doubled",  WINT8,     "weight_scale",  BOTH,  FIELD.format("scale")),
    ("stored",   "int4",            "wint2",     "",         ATTENTION, "weight",        WHOLE, OTHER_FORM),
    ("stored",   "int4",            "fp8",       "",         PT_EXPERT, "weight",        WHOLE, OTHER_FORM),
    ("stored",   "fp8",             "wint2",     "",         PT_EXPERT, "weight",        WHOLE, OTHER_FORM),
    ("measured", "bare",            "src",       "reversed", EXPERT,    "quant",         RANK,  LIMIT.format(ONE_OR_TWO, "0.5")),
    ("measured", "bare",            "src",       "reversed", WINT4,     "quant",         RANK,  LIMIT.format(ONE_OR_TWO, "0.25")),
    ("others",   "bare",            "src",       "doubled",  WINT8,     "weight_scale",  BOTH,  LIMIT.format(NEARLY_ONE, "0.05")),
    ("measured", "bare",            "src",       "zero",     EXPERT,    "",              BOTH,  ROWS),
    ("measured", "int4-unmeasured", "src",       "reversed", PT_EXPERT, "weight_packed", WHOLE, LIMIT.format(ONE_OR_TWO, "0.25")),
    ("measured", "fp8-unmeasured",  "src",       "reversed", PT_EXPERT, "weight",        WHOLE, LIMIT.format(ONE_OR_TWO, "0.05")),
    ("nearest",  "bare",            "src",       "one bit",  EXPERT,    "quant",         RANK,  OTHER),
    ("nearest",  "bare",            "src",       "one bit",  WINT4,     "quant",         RANK,  OTHER),
    ("measured", "bare",            "src",       "doubled",  EXPERT,    "code_zp",       BOTH,  LIMIT.format(ONE_OR_TWO, "0.5")),
    ("nearest",  "int4-unmeasured", "src",       "one bit",  PT_EXPERT, "weight_packed", WHOLE, OTHER),
    ("nearest",  "fp8-unmeasured",  "src",       "one bit",  PT_EXPERT, "weight",        WHOLE, OTHER),
]
# fmt: on


@pytest.mark.parametrize(
    ("_", "name", "against", "way", "layer", "part", "files", "problem"),
    WRONG,
    ids=[f"{row[1]} {row[2]} {row[4].rpartition('.')[2]} {row[3]}" for row in WRONG],
)
def test_a_folder_in_which_that_is_wrong_is_refused(
    _: str, name: str, against: str, way: str, layer: str, part: str, files: tuple[str, ...], problem: str,
    folder: Path, command: Command, tmp_path: Path,
) -> None:  # fmt: skip
    out, source = copy(folder / name, tmp_path / "out"), folder / against if against else None
    if way == "report":
        report_lies(out, f"{layer}.{part}")
    elif way:
        spoil(out, way, f"{layer}.{part}", files)
    code, text, err = said(command, out, source, "--full")
    assert (code, text) == (1, "")
    first, *problems = err.splitlines()
    assert first == f"error: {out}: {len(problems)} tensor(s) are not what they should be"
    assert way == "" or len(problems) == 1
    assert any(re.fullmatch(rf"  {re.escape(layer)}\.\w+: {problem}", found) for found in problems), err


def test_every_line_is_wrong_somewhere() -> None:
    assert {row[0] for row in WRONG} == LINES.keys() - {"no source", "not sampled"}


def test_what_is_not_in_the_sample_is_not_vouched_for(folder: Path, command: Command, tmp_path: Path) -> None:
    """A wrong weight passes where it is not looked at, and the count says that it was not."""
    out = copy(folder / "wint2", tmp_path / "out")
    spoil(out, "one bit", "ernie.layers.1.input_layernorm.weight", WHOLE)
    code, text, _ = said(command, out, folder / "src", "--sample", 1)
    assert (code, text.splitlines()[-1]) == (0, f"  28 {LINES['not sampled']}")
    assert said(command, out, folder / "src", "--full")[0] == 1


def test_a_file_whose_hash_is_another_is_refused(folder: Path, command: Command, tmp_path: Path) -> None:
    out = copy(folder / "pt", tmp_path / "out")
    with open(out / "model.safetensors", "r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"?")
    code, text, err = said(command, out, None)
    assert (code, text) == (1, "")
    assert "model.safetensors: its sha256 is" in err
