"""verify: config.json, index, report and folder must say what is stored."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.models import GOLDEN, random_model, tensors, write
from helpers.results import EXPERT, WIDTHS, edit, refused, sealed
from helpers.runs import SOURCE, everything
from safetensors.torch import save_file

from ernie_quant.check.verify import verify
from ernie_quant.codecs import Codec
from ernie_quant.codecs.fp8 import Float8Block
from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.errors import ErnieQuantError, OutputError
from ernie_quant.readers.safetensors import read_header
from ernie_quant.weights import layouts

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


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


@pytest.mark.parametrize(
    ("family", "codec", "change", "line"),
    [
        pytest.param(
            "moe_mtp", Float8Block(),
            lambda q: q.update(modules_to_not_convert=[m for m in q["modules_to_not_convert"] if ".layers.3." not in m]),
            "model.mtp_block.0.self_attn.q_proj.weight: is stored as kept, but of model.layers.3.self_attn.q_proj, as a program"
            " calls the layer, config.json says fp8", id="the draft's layer",
        ),
        pytest.param(
            "vl", RoundToNearest(4, 64), lambda q: stop_ignoring(q, "experts_gate"),
            "model.layers.1.mlp.text_experts_gate matches 0 of config_groups", id="routers of a VL model",
        ),
        pytest.param(
            "vl", Float8Block(), lambda q: stop_ignoring(q, "qkv_proj"),
            "attn.qkv_proj matches 0 of config_groups", id="SGLang's name",
        ),
    ],
)  # fmt: skip
def test_config_json_must_say_it_under_every_programs_name(
    family: str, codec: Codec, change: Callable[[dict[str, Any]], object], line: str, tmp_path: Path
) -> None:
    source = random_model(tmp_path / "src", layouts.PT, family, **WIDTHS[family])
    write(source, tmp_path / "out", recipe=everything(codec, mtp=False))
    verify(tmp_path / "out")
    edit(tmp_path / "out", "config.json", quantization(change))
    with pytest.raises(ErnieQuantError) as error:
        verify(tmp_path / "out")
    assert line in str([str(error.value), *getattr(error.value, "problems", [])])


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
