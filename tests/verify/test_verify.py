"""verify: true results pass, and bytes that were changed afterwards are named."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.models import FAMILIES, GOLDEN, copy, random_model, tensors, write
from helpers.results import EXPERT, WIDTHS, edit, first_byte, poke, refused, sealed
from helpers.runs import OF_128S, SOURCE, everything
from safetensors.torch import save_file

from ernie_quant.check.compared import Compared
from ernie_quant.check.verify import Verified, verify
from ernie_quant.codecs import Codec
from ernie_quant.codecs.fp8 import Float8Block
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.errors import VerifyError
from ernie_quant.planning import built_in
from ernie_quant.weights import layouts

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


# --- what is true passes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["vllm", "fastdeploy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversion_is_verified(family: str, runtime: str, tmp_path: Path) -> None:
    write(GOLDEN / family / "paddle", tmp_path / "out", runtime, shard_bytes=100_000)
    count = len(tensors(tmp_path / "out"))
    files = len([p for p in (tmp_path / "out").iterdir() if p.name not in ("ernie-quant.json", "SHA256SUMS")])
    assert verify(tmp_path / "out") == Verified(files, count, 0, count, 0, against=False, not_compared={"no source": count})
    compared = Verified(files, count, 0, count, 0, against=True, compared=Compared(kept=count))
    assert verify(tmp_path / "out", GOLDEN / family / "paddle") == compared


@pytest.mark.parametrize(
    ("family", "linears"),
    [
        ("dense", 3 * 7),  # q, k, v, o, gate, up, down
        ("moe", 3 * 4 + 3 + 2 * (8 + 1) * 3),  # one dense layer, two with 8 experts and the shared ones
        ("moe_mtp", 3 * 4 + 3 + 2 * 8 * 3 + 7),  # no shared experts; the MTP block, but not its mtp_linear_proj
        ("vl", 2 * 4 + 3 + (8 + 1) * 3),
    ],
)
@pytest.mark.parametrize(
    "codec", [RoundToNearest(4, CHANNEL), RoundToNearest(8, CHANNEL, "absmax")], ids=lambda codec: codec.describe()
)
def test_an_integer_result_is_verified(codec: Codec, family: str, linears: int, tmp_path: Path) -> None:
    write(GOLDEN / family / "paddle", tmp_path / "out", recipe=everything(codec))
    assert verify(tmp_path / "out").quantized == linears
    assert verify(tmp_path / "out", GOLDEN / family / "paddle").quantized == linears


@pytest.mark.parametrize("family", FAMILIES)
def test_a_float8_result_is_verified(family: str, tmp_path: Path) -> None:
    source = random_model(tmp_path / "src", layouts.PADDLE, family, **WIDTHS[family])
    write(source, tmp_path / "out", recipe=everything(Float8Block()))
    assert verify(tmp_path / "out").quantized > 0
    assert verify(tmp_path / "out", source).quantized == verify(tmp_path / "out").quantized


def test_a_result_with_unfit_tensors_is_verified(tmp_path: Path) -> None:
    """Groups of 128 fit down_proj (128 inputs) and o_proj (128) of the dense model, not the others (64)."""
    write(GOLDEN / "dense/pt", tmp_path / "out", recipe=everything(RoundToNearest(4, 128), keep_unfit=True))
    assert verify(tmp_path / "out", GOLDEN / "dense/pt").quantized == 3 * 2


def test_a_repaired_tensor_agrees_with_the_source_it_was_repaired_from(tmp_path: Path) -> None:
    source, name = copy(GOLDEN / "moe_mtp/pt", tmp_path / "src"), "model.mtp_linear_proj.0.weight"
    table = tensors(source)
    save_file(table | {name: table[name].t().contiguous()}, source / "model.safetensors", metadata={"format": "pt"})
    write(source, tmp_path / "out", fixes=frozenset({"mtp_linear_proj"}))
    assert verify(tmp_path / "out", source).against


# --- what was changed is named ---------------------------------------------------------------------------------------


def test_a_flipped_byte_breaks_the_hash(out: Path) -> None:
    poke(out, f"{EXPERT}.weight_packed", bytes([first_byte(out, f"{EXPERT}.weight_packed") ^ 1]))
    file, weight = refused(out)
    assert re.fullmatch(r"model\.safetensors: its sha256 is [0-9a-f]{16}…, the manifest says [0-9a-f]{16}…", file)
    said = "its stored bytes are not those that were written (crc32 [0-9a-f]{8}, the report says [0-9a-f]{8})"
    assert re.fullmatch(re.escape(f"{EXPERT}.weight: {said}").replace(re.escape("[0-9a-f]{8}"), "[0-9a-f]{8}"), weight)


def test_of_many_weights_the_changed_ones_are_named_and_no_others(out: Path) -> None:
    names = [f"model.layers.{layer}.mlp.experts.{e}.{p}_proj" for layer, e, p in ((1, 0, "gate"), (1, 2, "up"), (2, 1, "down"))]
    for name in names:
        poke(out, f"{name}.weight_packed", bytes([first_byte(out, f"{name}.weight_packed") ^ 0x10]))
    poke(out, "model.norm.weight", bytes([first_byte(out, "model.norm.weight") ^ 1]))
    named = {line.partition(":")[0] for line in refused(out)[1:]}
    assert named == {*(f"{name}.weight" for name in names), "model.norm.weight"}


def test_a_damaged_header_is_named_by_its_file(out: Path) -> None:
    with open(out / "model.safetensors", "r+b") as opened:
        opened.seek(9)
        opened.write(b"!")
    file, why = refused(out)
    assert file.startswith("model.safetensors: its sha256 is ")
    assert why.startswith("which weights are damaged cannot be said: model.safetensors: header is not valid JSON")


def test_a_changed_list_of_hashes_is_noticed(out: Path) -> None:
    lines = (out / "SHA256SUMS").read_text().splitlines()
    (out / "SHA256SUMS").write_text("\n".join(["0" * 64 + lines[0][64:], *lines[1:]]) + "\n")
    assert refused(out) == [f"SHA256SUMS: disagrees with the manifest about {lines[0][66:]}"]
    (out / "SHA256SUMS").unlink()
    assert refused(out) == ["SHA256SUMS: named by the result, but is not there"]


def test_a_changed_manifest_is_noticed(out: Path) -> None:
    text = (out / "ernie-quant.json").read_text()
    (out / "ernie-quant.json").write_text(text.replace('"version"', '"version" '))
    assert refused(out) == ["SHA256SUMS: disagrees with the manifest about ernie-quant.json"]


def test_codes_that_no_codec_writes_are_found_without_the_source(tmp_path: Path) -> None:
    """FastDeploy's WINT4 has no code -8: a file with one decodes, but nothing that encodes made it."""
    source = random_model(tmp_path / "src", layouts.PADDLE, **OF_128S)
    out = tmp_path / "out"
    write(source, out, "fastdeploy", recipe=built_in.fastdeploy_container("wint4", None))
    verify(out)
    name = next(n for n in sorted(tensors(out)) if "experts" in n and n.endswith("quant_weight"))
    poke(out, name, bytes(4))  # codes are stored 8 higher
    sealed(out)
    (line,) = refused(out)
    said = "decode to weights whose codes are others; no codec wrote these"
    assert re.fullmatch(rf".*experts.*\.weight: rows 0 to \d+ {said}", line)


# --- a sample --------------------------------------------------------------------------------------------------------


def test_a_sample_has_weights_of_every_role_and_codec(out: Path) -> None:
    few, every = verify(out, sample=10), verify(out)
    assert every.sampled == every.tensors == few.tensors
    assert 10 <= few.sampled < every.tensors / 2
    assert verify(out, sample=10**6) == every


def test_the_weight_that_lost_most_is_in_every_sample(out: Path) -> None:
    rows = json.loads((out / "report.json").read_text())["tensors"]
    worst = max(rows, key=lambda row: row["rel_error"])
    edit(out, "report.json", lambda table: next(r for r in table["tensors"] if r["name"] == worst["name"]).update(rel_error=0.5))
    with pytest.raises(VerifyError, match=f"{worst['name']}: its relative error is"):
        verify(out, SOURCE, sample=1)


def test_a_sample_of_all_is_a_contradiction(out: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = command("verify", out, "--full", "--sample", 5)
    assert code == 2
    assert "--sample does not go with --full" in err


def test_without_values_looked_at_a_changed_byte_is_still_found(out: Path) -> None:
    poke(out, f"{EXPERT}.weight_packed", bytes([first_byte(out, f"{EXPERT}.weight_packed") ^ 1]))
    with pytest.raises(VerifyError, match=f"{EXPERT}.weight: its stored bytes"):
        verify(out, sample=1)


def test_a_file_cut_short_is_named_with_both_sizes(out: Path) -> None:
    size = (out / "model.safetensors").stat().st_size
    os.truncate(out / "model.safetensors", size - 1)
    assert refused(out) == [f"model.safetensors: has {size - 1} bytes, the manifest says {size}"]


def test_a_missing_file_is_named(out: Path) -> None:
    (out / "README.md").unlink()
    assert refused(out) == ["README.md: named by ernie-quant.json, but is not there"]


def test_one_changed_code_shows_in_the_error_against_the_source(out: Path) -> None:
    poke(out, f"{EXPERT}.weight_packed", bytes([first_byte(out, f"{EXPERT}.weight_packed") ^ 1]))
    sealed(out)
    verify(out)  # nothing but the source can tell
    (line,) = refused(out, SOURCE)
    found = re.fullmatch(re.escape(EXPERT) + r"\.weight: its relative error is ([\d.e-]+), the report says ([\d.e-]+)", line)
    assert found
    assert float(found[1]) != float(found[2])


def test_a_changed_kept_weight_is_not_the_sources(out: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    poke(out, name, bytes([first_byte(out, name) ^ 1]))
    assert refused(sealed(out), SOURCE) == [f"{name}: should be the source's bytes, and is not"]


@pytest.mark.parametrize("bits", [b"\xc0\x7f", b"\x80\x7f", b"\x80\xff"], ids=["nan", "inf", "-inf"])
def test_a_scale_that_is_no_number_is_found_without_the_source(bits: bytes, out: Path) -> None:
    poke(out, f"{EXPERT}.weight_scale", bits)
    assert refused(sealed(out)) == [f"{EXPERT}.weight: rows 0 to 64 decode to NaN or infinity"]


def test_a_float8_scale_that_is_no_number_is_found(tmp_path: Path) -> None:
    source = random_model(tmp_path / "src", layouts.PT, "dense", **WIDTHS["dense"])
    write(source, tmp_path / "out", recipe=everything(Float8Block()))
    poke(tmp_path / "out", "model.layers.1.mlp.up_proj.weight_scale_inv", b"\0\0\xc0\x7f")
    assert refused(sealed(tmp_path / "out")) == ["model.layers.1.mlp.up_proj.weight: rows 0 to 384 decode to NaN or infinity"]
