"""verify: true results pass, and everything that was changed afterwards is named."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import GOLDEN, copy, random_model, tensors, write
from safetensors.torch import save_file
from test_run import OF_128S

from ernie_quant.check.verify import Verified, verify
from ernie_quant.codecs import Codec
from ernie_quant.codecs.fp8 import Float8Block
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.errors import ErnieQuantError, OutputError, VerifyError
from ernie_quant.plan import built_in, recipe
from ernie_quant.readers.safetensors import read_header
from ernie_quant.result.manifest import sums
from ernie_quant.weights import layouts

FAMILIES = ("dense", "moe", "moe_mtp", "vl")
SOURCE = GOLDEN / "moe/paddle"
EXPERT = "model.layers.1.mlp.experts.3.down_proj"


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def everything(codec: Codec, **options: Any) -> recipe.Recipe:
    return built_in.one_codec("test", codec, **{"experts_only": False, "mtp": True, "keep_unfit": False} | options)


# --- what is true passes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["vllm", "fastdeploy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversion_is_verified(family: str, runtime: str, tmp_path: Path) -> None:
    write(GOLDEN / family / "paddle", tmp_path / "out", runtime, shard_bytes=100_000)
    count = len(tensors(tmp_path / "out"))
    files = len([p for p in (tmp_path / "out").iterdir() if p.name not in ("ernie-quant.json", "SHA256SUMS")])
    assert verify(tmp_path / "out") == Verified(files, count, 0, count, against=False)
    assert verify(tmp_path / "out", GOLDEN / family / "paddle") == Verified(files, count, 0, count, against=True)


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


# widths that blocks of 128 divide; heads stay 4 and 2, in vl 2 and 1
WIDTHS: dict[str, dict[str, Any]] = {
    "dense": {"hidden_size": 128, "head_dim": 64, "intermediate_size": 384, "num_hidden_layers": 2},
    "moe": {"hidden_size": 256, "head_dim": 64, "intermediate_size": 128, "moe_intermediate_size": 128, "moe_num_experts": 3},
    "moe_mtp": {"hidden_size": 128, "head_dim": 64, "intermediate_size": 256, "moe_intermediate_size": 128, "moe_num_experts": 2},
    "vl": {"hidden_size": 256, "intermediate_size": 128, "moe_intermediate_size": [256, 128]},
}


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


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden MoE with int4 experts in groups of 32."""
    out = tmp_path_factory.mktemp("verify") / "int4"
    write(SOURCE, out, recipe=everything(RoundToNearest(4, 32), experts_only=True))
    return out


@pytest.fixture
def out(template: Path, tmp_path: Path) -> Path:
    return copy(template, tmp_path / "out")


def sealed(folder: Path) -> Path:
    """The manifest tells the truth about the bytes again, as a careful forger would have it."""
    file = folder / "ernie-quant.json"
    manifest = json.loads(file.read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    file.write_text(json.dumps(manifest))
    (folder / "SHA256SUMS").write_text(sums(manifest["files"], file.read_bytes()))
    return folder


def refused(folder: Path, against: Path | None = None) -> list[str]:
    with pytest.raises(VerifyError) as error:
        verify(folder, against)
    return error.value.problems


def poke(folder: Path, name: str, data: bytes) -> None:
    """Overwrite the first bytes of a stored tensor."""
    file = folder / "model.safetensors"
    ref = next(r for r in read_header(file) if r.name == name)
    with open(file, "r+b") as opened:
        opened.seek(ref.extents[0].start)
        opened.write(data)


def edit(folder: Path, file: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change a JSON file, and the manifest with it."""
    table = json.loads((folder / file).read_text())
    change(table)
    (folder / file).write_text(json.dumps(table))
    return sealed(folder)


def first_byte(folder: Path, name: str) -> int:
    return int(tensors(folder)[name].view(-1).view(torch.uint8)[0])


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


def quantization(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda config: change(config["quantization_config"])


def only_group(config: dict[str, Any]) -> dict[str, Any]:
    (group,) = config["config_groups"].values()
    return group


def stop_ignoring(config: dict[str, Any], word: str) -> None:
    config["ignore"].remove(next(pattern for pattern in config["ignore"] if word in pattern))


NOBODY, BOTH = " matches 0 of config_groups, and ignore: False", " matches 1 of config_groups, and ignore: True"
IGNORED, NO_DOWN = "re:.*" + re.escape(EXPERT.removeprefix("model")), r"re:.*experts\.\d+\.(?:gate|up)_proj$"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        pytest.param(lambda q: q["ignore"].append(IGNORED), EXPERT + BOTH, id="expert ignored too"),
        pytest.param(lambda q: only_group(q).update(targets=[NO_DOWN]), "down_proj" + NOBODY, id="target lost"),
        pytest.param(lambda q: stop_ignoring(q, "self_attn"), "self_attn.+" + NOBODY, id="attention not ignored"),
        pytest.param(lambda q: stop_ignoring(q, "gate$"), "mlp.gate" + NOBODY, id="router not ignored"),
        pytest.param(lambda q: only_group(q)["targets"].append(r"re:.*mlp\.gate$"), "mlp.gate" + BOTH, id="router targeted"),
        pytest.param(lambda q: only_group(q)["weights"].update(group_size=64), "weight_scale: is .+int4, group 64", id="group"),
        pytest.param(lambda q: only_group(q)["weights"].update(num_bits=8), "weight_packed: is .+int8, group 32", id="bits"),
        pytest.param(lambda q: q.update(quant_method="gptq"), "'gptq' is none that this tool writes", id="method"),
    ],
)
def test_config_json_must_say_what_is_written(change: Callable[[dict[str, Any]], object], line: str, out: Path) -> None:
    edit(out, "config.json", quantization(change))
    with pytest.raises(ErnieQuantError, match=line):
        verify(out)


def test_a_config_that_forgets_the_quantization_is_refused(out: Path) -> None:
    edit(out, "config.json", lambda config: config.pop("quantization_config"))
    assert f"{EXPERT}.weight_packed: is I32 (64, 4), config.json (kept) wants not there" in refused(out)


def test_a_float8_list_of_kept_layers_must_be_true(tmp_path: Path) -> None:
    source, router = random_model(tmp_path / "src", layouts.PT, "moe", **WIDTHS["moe"]), "model.layers.1.mlp.gate"
    write(source, tmp_path / "out", recipe=everything(Float8Block(), experts_only=True))
    edit(tmp_path / "out", "config.json", quantization(lambda q: q["modules_to_not_convert"].remove(router)))
    with pytest.raises(ErnieQuantError, match=re.escape(router)):
        verify(tmp_path / "out")


def test_a_dropped_tensor_is_missed(out: Path) -> None:
    table, name = tensors(out), "model.layers.2.input_layernorm.weight"
    del table[name]
    save_file(table, out / "model.safetensors", metadata={"format": "pt"})
    assert refused(sealed(out)) == [f"{name}: is missing", f"{name}: is in the report, not in the files"]


def test_a_tensor_dropped_from_file_and_index_is_missed(tmp_path: Path) -> None:
    write(SOURCE, tmp_path / "out", shard_bytes=200_000)
    name, index = "model.norm.weight", "model.safetensors.index.json"
    weight_map = json.loads((tmp_path / "out" / index).read_text())["weight_map"]
    file = tmp_path / "out" / weight_map[name]
    table = {ref.name: tensors(tmp_path / "out")[ref.name] for ref in read_header(file) if ref.name != name}
    save_file(table, file, metadata={"format": "pt"})
    edit(tmp_path / "out", index, lambda table: table["weight_map"].pop(name))
    assert refused(tmp_path / "out") == [f"{name}: is missing", f"{name}: is in the report, not in the files"]


def test_a_lost_scale_is_named(out: Path) -> None:
    table = tensors(out)
    del table[f"{EXPERT}.weight_scale"]
    save_file(table, out / "model.safetensors", metadata={"format": "pt"})
    assert f"{EXPERT}.weight_scale: is not there, config.json (int4, group 32, mse) wants BF16 (64, 1)" in refused(sealed(out))


def test_an_index_that_names_the_wrong_file_is_refused(tmp_path: Path) -> None:
    write(SOURCE, tmp_path / "out", shard_bytes=200_000)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    edit(tmp_path / "out", "model.safetensors.index.json", lambda t: t["weight_map"].update({"model.norm.weight": files[0]}))
    assert refused(tmp_path / "out") == [f"model.norm.weight: the index says it is in {files[0]}, it is in {files[-1]}"]


def row_of(report: dict[str, Any], name: str = f"{EXPERT}.weight") -> dict[str, Any]:
    return next(row for row in report["tensors"] if row["name"] == name)


def test_an_edited_report_breaks_its_hash(out: Path) -> None:
    text = (out / "report.json").read_text()
    (out / "report.json").write_text(text.replace("down_proj", "down_prqj", 1))
    (line,) = refused(out)
    assert line.startswith("report.json: its sha256 is ")


@pytest.mark.parametrize(
    "value", [{"codec": "kept"}, {"bytes": 7}, {"shape": [32, 64]}, {"role": "mlp"}, {"bits_per_weight": 2.5}], ids=str
)
def test_a_report_row_must_say_what_is_stored(value: dict[str, Any], out: Path) -> None:
    edit(out, "report.json", lambda report: row_of(report).update(value))
    (line,) = refused(out)
    assert line.startswith(f"{EXPERT}.weight: the report says ")


@pytest.mark.parametrize("key", ["rel_error", "max_abs_error", "squared_error", "squared_norm", "sqnr_db"])
def test_reported_errors_must_be_true(key: str, out: Path) -> None:
    edit(out, "report.json", lambda report: row_of(report).update({key: row_of(report)[key] / 2}))
    (line,) = refused(out, SOURCE)
    assert line.startswith(f"{EXPERT}.weight: its ")


def test_reported_sources_must_be_true(out: Path) -> None:
    edit(out, "report.json", lambda report: row_of(report).update(sources=["ernie.elsewhere"]))
    (line,) = refused(out, SOURCE)
    assert line.startswith(
        f"{EXPERT}.weight: the report says it comes from ernie.elsewhere, it comes from ernie.layers.1.mlp.experts.3"
    )


def test_every_tensor_has_a_row_in_the_report(out: Path) -> None:
    edit(out, "report.json", lambda report: report["tensors"].remove(row_of(report)))
    assert refused(out) == [f"{EXPERT}.weight: is in the files, not in the report"]


@pytest.mark.parametrize("name", ["model-extra.safetensors", "model_state.pdparams", "pytorch_model.bin"])
def test_a_weight_file_that_nobody_listed_is_refused(name: str, out: Path) -> None:
    """FastDeploy would read a stray .pdparams before anything else."""
    (out / name).write_bytes((out / "model.safetensors").read_bytes())
    assert refused(out) == [f"{name}: is not in the manifest"]


def test_the_wrong_source_is_noticed(out: Path, tmp_path: Path) -> None:
    other = random_model(tmp_path / "other", layouts.PADDLE)
    assert "model.norm.weight: should be the source's bytes, and is not" in refused(out, other)


def test_an_unfinished_folder_is_not_verified(out: Path) -> None:
    (out / "ernie-quant.json").unlink()
    (out / ".ernie-quant").mkdir()
    with pytest.raises(OutputError, match="is not finished; run the same command again"):
        verify(out)


@pytest.mark.parametrize("folder", [SOURCE, GOLDEN / "nowhere"])
def test_a_strangers_folder_is_not_verified(folder: Path) -> None:
    with pytest.raises(OutputError, match="was not made by ernie-quant"):
        verify(folder)
