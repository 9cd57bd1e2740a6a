"""JSON of strangers, and errors of one line whatever they are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.reading import BF16, refusal
from helpers.synthetic import tiny, write_index, write_model

from ernie_quant import archs, jsonio
from ernie_quant.errors import CheckpointError, ConfigError, PlanError
from ernie_quant.sources import open_source

# --- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[]", "is not a JSON object"),
        (b'{"a": 1, "b": 2, "a": 3}', "is not valid JSON: duplicate key 'a'"),
        (b'{"x": {"a": 1, "a": 1}}', "is not valid JSON: duplicate key 'a'"),
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "is nested too deep"),
        (b'{"a": ' * 100_000, "is nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON: Exceeds the limit"),
        (b'{"a": Infinity}', "is not valid JSON: Infinity is no JSON number"),
        (b'{"a": 1E400}', "is not valid JSON: 1E400 is no JSON number"),
        (b'{"\\udc00": 1}', "is not valid JSON: 'utf-8' codec can't encode"),
        (b'{"a": ["\\ud800"]}', "is not valid JSON: 'utf-8' codec can't encode"),
        (b"\xff", "is not valid JSON: 'utf-8' codec can't decode"),
        (b"[" + b"{}," * 625_000 + b"{}]", "is too large: 1250002 values, 1250000 are allowed"),
        (b'"' + b"x" * (32 << 20), "is too large: more than 33554432 bytes"),
    ],
)  # fmt: skip
def test_json_of_strangers_is_refused(tmp_path: Path, text: bytes, reason: str) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(CheckpointError) as error:
        jsonio.read_object(tmp_path / "a.json")
    assert reason in str(error.value)
    assert len(str(error.value)) < 200


def test_json_that_is_refused_for_nothing() -> None:
    assert jsonio.parse(b'{"a": ' + b"[" * 62 + b"]" * 62 + b"}")  # 63 levels and the number of the last one
    assert jsonio.parse(b'{"a": {"b": 1}, "b": {"b": [1.5, -0.0, null, true, "\\ud83d\\ude00"]}}')["b"]["b"][4] == "😀"
    assert jsonio.parse(b"9" * 4000) == int("9" * 4000)


@pytest.mark.parametrize("total", [2**70, -1, 1e300, None, "x", [], {}])
def test_the_total_size_of_an_index_is_not_believed(tmp_path: Path, total: Any) -> None:
    folder = write_model(tmp_path / "m", {}, {"a": BF16, "b": BF16}, shards=2)
    write_index(folder, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}, total)
    checkpoint = open_source(folder)
    assert (checkpoint.nbytes, checkpoint.anomalies) == (24, ())


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"ONNX")
    assert "not a weight file (.bin, .gguf, .pdparams, .pt, .safetensors)" in refusal(tmp_path / "m.onnx")


def test_a_file_that_vanished_is_refused(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in refusal(tmp_path / "m.safetensors")


# --- errors and config.json --------------------------------------------------------------------------------------------


def test_an_error_of_a_million_problems_shows_50() -> None:
    error = PlanError("m: 1000000 problem(s)", [f"t{i}: is unknown" for i in range(1_000_000)])
    lines = str(error).split("\n")
    assert lines[:2] == ["m: 1000000 problem(s)", "  t0: is unknown"]
    assert lines[50:] == ["  t49: is unknown", "  … and 999950 more"]
    assert len(error.problems) == 1_000_000
    assert len(str(PlanError("m", ["x"] * 50)).split("\n")) == 51


def test_a_line_of_an_error_is_one_line_and_not_a_long_one() -> None:
    assert str(CheckpointError("a\nb\x1b[31m\ud800ü")) == r"a\nb\x1b[31m\ud800ü"
    long = "name " + "x" * 10_000_000 + ": is missing"
    for shown in (str(CheckpointError(long)), str(PlanError("m", [long])).split("\n")[1].strip()):
        assert len(shown) == 500
        assert shown.startswith("name xxx")
        assert " … xxx" in shown
        assert shown.endswith("xxx: is missing")
    assert len(str(CheckpointError("\n" * 10_000))) == 500


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": 2**24}, "num_hidden_layers is 16777216, not a whole number from 1 to 4096"),
        ({"mlp_layer_types": [{}, []]}, "mlp_layer_types is not a list of 2 times 'dense' or 'sparse'"),
    ],
)
def test_a_config_of_unusual_values_is_refused(changes: dict[str, Any], reason: str) -> None:
    config, tensors = tiny(**{"num_hidden_layers": 2, **changes})
    with pytest.raises(ConfigError) as error:
        archs.find(config).name_map(config, list(tensors))
    assert str(error.value) == f"config.json: {reason}"
