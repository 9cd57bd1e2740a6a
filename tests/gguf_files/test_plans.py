"""GGUF results as every other result: refusals by name, mixes, verify, inspect, dequantize, resume, notes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tensors
from helpers.paths import GOLDEN
from helpers.synthetic import exact

from ernie_quant.names import NameMap
from ernie_quant.planning import mix
from ernie_quant.planning.built_in import GGUF_TYPES
from ernie_quant.planning.gguf import gguf_plan
from ernie_quant.planning.steps import Plan
from ernie_quant.run.whole import run_plan
from ernie_quant.sources import open_source

Command = Callable[..., tuple[int, str, str]]


def planned(source: Path, type_: str = "Q4_0", **settings: Any) -> Plan:
    return gguf_plan(open_source(source), settings={"type": type_, "keep_unfit": True, **settings})


def test_the_types_of_the_command_are_those_of_the_mixes() -> None:
    assert set(GGUF_TYPES) == mix.BASE.keys()


def changed(tmp_path: Path, **config: Any) -> Path:
    shutil.copytree(GOLDEN / "moe/pt", tmp_path / "src")
    file = tmp_path / "src/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return tmp_path / "src"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"moe_layer_interval": 2}, "experts are in the layers"),
        ({"moe_layer_end_index": 1}, "experts are in the layers 1: llama.cpp has them in all from a first one to the last, 2"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "not written into GGUF files"),
        ({"rope_theta": None}, "rope_theta is None, and llama.cpp computes with it"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, and llama.cpp computes with it"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    config: dict[str, Any], said: str, tmp_path: Path, command: Command
) -> None:
    status, _, err = command("gguf", changed(tmp_path, **config), tmp_path / "out", "--type", "F32")
    assert status == 1
    assert said in err or config.keys() & {"moe_layer_interval", "moe_layer_end_index"}
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_biases_are_refused() -> None:
    from ernie_quant.archs import _gguf

    table = NameMap((), {"layer": range(2)}, {}, frozenset({"use_bias"}))
    assert "llama.cpp leaves the biases" in _gguf.problems({}, table)[0]


def test_layers_without_experts_behind_those_with_are_refused() -> None:
    from ernie_quant.archs import _gguf

    for moe in ([1], [0, 2], [0, 1]):
        (line,) = _gguf.problems({}, NameMap((), {"layer": range(3), "moe": moe}, {}))
        assert "to the last, 2" in line
    assert _gguf.problems({}, NameMap((), {"layer": range(3), "moe": [1, 2]}, {})) == []


def test_rows_that_a_block_does_not_divide(tmp_path: Path, command: Command) -> None:
    status, _, err = command("gguf", GOLDEN / "moe/pt", tmp_path / "out")
    assert status == 1
    assert "blocks of 256 weights, as Q4_K has, do not divide its rows of 64; Q8_0, Q5_0, Q4_0, IQ4_NL would" in err
    status, out, _ = command("gguf", GOLDEN / "moe/pt", tmp_path / "out", "--keep-unfit", "--dry-run")
    assert status == 0
    assert "stored as Q5_0" in out


def shapes(layers: int, kv: int = 1, experts: int = 64, *, tied: bool = True) -> mix.Shape:
    return mix.Shape(layers, kv, experts, tied)


def test_more_bits_as_llama_cpp_counts() -> None:
    """use_more_bits of llama-quant.cpp, for 28 layers (21B): 3 + 4 at the ends, every third between."""
    more = [i for i in range(28) if shapes(28).more_bits(i)]
    assert more == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]


def named(type_: str, layer: int, projection: str) -> str:
    """The type of a linear of the 21B."""
    table = NameMap((), {"layer": range(28)}, {"Q": 2560, "KV": 512, "E": 64})
    name = f"model.layers.{layer}.{projection}.weight"
    for found in mix.rules(type_, table):
        if found.match and found._pattern.search(name):
            return found.codec.describe()
    return mix.BASE[type_]


@pytest.mark.parametrize(
    ("type_", "layer", "projection", "expected"),
    [
        ("Q4_K_M", 0, "self_attn.v_proj", "Q6_K"), ("Q4_K_M", 3, "self_attn.v_proj", "Q4_K"),
        ("Q4_K_M", 5, "mlp.experts.3.down_proj", "Q6_K"), ("Q4_K_M", 5, "mlp.experts.3.up_proj", "Q4_K"),
        ("Q5_K_M", 27, "mlp.shared_experts.down_proj", "Q6_K"), ("Q5_K_S", 27, "mlp.shared_experts.down_proj", "Q5_K"),
        ("Q4_K_S", 3, "self_attn.v_proj", "Q5_K"), ("Q4_K_S", 3, "mlp.experts.0.down_proj", "Q4_K"),
        ("Q4_K_S", 2, "mlp.experts.0.down_proj", "Q5_K"),
        ("Q3_K_M", 0, "mlp.down_proj", "Q5_K"), ("Q3_K_M", 1, "mlp.experts.0.down_proj", "Q4_K"),
        ("Q3_K_M", 9, "self_attn.o_proj", "Q4_K"), ("Q3_K_M", 9, "self_attn.q_proj", "Q3_K"),
        ("Q3_K_M", 1, "self_attn.v_proj", "Q5_K"), ("Q3_K_M", 2, "self_attn.v_proj", "Q4_K"),
        ("Q2_K", 9, "self_attn.v_proj", "Q4_K"), ("Q2_K", 9, "self_attn.o_proj", "Q3_K"),
        ("Q2_K", 9, "mlp.experts.63.down_proj", "Q3_K"), ("Q2_K", 9, "mlp.experts.63.gate_proj", "Q2_K"),
        ("IQ4_XS", 9, "self_attn.v_proj", "Q5_K"), ("IQ4_XS", 2, "mlp.experts.63.down_proj", "Q5_K"),
        ("IQ4_XS", 3, "mlp.experts.63.down_proj", "IQ4_XS"), ("Q6_K", 3, "self_attn.v_proj", "Q6_K"),
    ],
)  # fmt: skip
def test_mixes_follow_llama_cpps_table(type_: str, layer: int, projection: str, expected: str) -> None:
    assert named(type_, layer, projection) == expected


def test_eight_experts_are_a_case_of_their_own() -> None:
    table = NameMap((), {"layer": range(28)}, {"Q": 2560, "KV": 512, "E": 8})
    found = [rule for rule in mix.rules("Q4_K_M", table) if rule.match]
    assert [rule.codec.describe() for rule in found][:2] == ["Q8_0", "Q5_K"]


def test_embeddings_that_are_the_head_too_have_its_type() -> None:
    kinds = {s.name: s.codec.describe() for s in planned(GOLDEN / "moe_mtp/pt", "Q4_0", keep_unfit=True).steps}
    assert kinds["lm_head.weight"] == "Q8_0"  # for Q6_K, whose blocks do not fit
    assert kinds["model.embed_tokens.weight"] == "Q4_0"
    tied = {s.name: s.codec.describe() for s in planned(GOLDEN / "moe/pt", "Q4_0").steps}
    assert tied["model.embed_tokens.weight"] == "Q8_0"
    assert "lm_head.weight" not in tied


def test_what_is_left_out_is_said() -> None:
    mtp, vl = (" ".join(planned(GOLDEN / name / "paddle").notes) for name in ("moe_mtp", "vl"))
    assert "left out: the MTP block: llama.cpp has none for ERNIE" in mtp
    assert "this is the text model, it sees no images" in vl


@pytest.mark.parametrize("layout", ["paddle", "pt"])
@pytest.mark.parametrize("model", ["dense", "moe", "moe_mtp", "vl"])
def test_verify_and_inspect(model: str, layout: str, tmp_path: Path, command: Command) -> None:
    source = GOLDEN / model / layout
    assert command("gguf", source, tmp_path / "out", "--type", "Q4_0", "--keep-unfit", "-q")[0] == 0
    status, out, err = command("verify", tmp_path / "out", "--against", source, "--full")
    assert (status, err) == (0, "")
    status, out, _ = command("inspect", tmp_path / "out")
    assert "Q4_0" in out
    assert "no anomalies" in out
    (file,) = (tmp_path / "out").glob("*.gguf")
    assert command("inspect", file)[0] == 0
    raw = bytearray(file.read_bytes())
    raw[-1000] ^= 1
    file.write_bytes(raw)
    assert command("verify", tmp_path / "out")[0] == 1


def test_dequantize_gives_the_weights_that_llama_cpp_computes_with(tmp_path: Path, command: Command) -> None:
    assert command("gguf", GOLDEN / "moe/paddle", tmp_path / "q8", "--type", "Q8_0", "-q")[0] == 0
    status, _, err = command("dequantize", tmp_path / "q8", tmp_path / "back", "--to", "pt", "-q")
    assert (status, err) == (0, "")
    back, before = tensors(tmp_path / "back"), tensors(GOLDEN / "moe/pt")
    assert back.keys() == before.keys() - {"lm_head.weight"}  # tied
    assert {t.dtype for name, t in back.items() if "gate.weight" not in name and "bias" not in name} == {torch.bfloat16}
    name = "model.layers.1.mlp.experts.1.up_proj.weight"
    assert 0 < float((back[name].float() - before[name].float()).norm() / before[name].float().norm()) < 0.01
    norms = {n: t for n, t in before.items() if "layernorm" in n}
    assert exact({n: back[n] for n in norms}) == exact(norms)


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    plan = gguf_plan(open_source(GOLDEN / "moe/pt"), settings={"type": "Q8_0"}, shard_bytes=100_000)
    run_plan(plan, tmp_path / "whole/out")
    seen = 0

    def stop(nbytes: int) -> None:
        nonlocal seen
        seen += nbytes
        if seen > 250_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, tmp_path / "out", progress=stop)
    assert run_plan(plan, tmp_path / "out").files_before > 0
    files = [{f.name: f.read_bytes() for f in (tmp_path / d).iterdir()} for d in ("whole/out", "out")]
    assert files[0] == files[1]
    assert sum(name.endswith(".gguf") for name in files[0]) > 2


def test_another_type_in_the_folder_begins_anew_only_if_asked(tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out"
    assert command("gguf", GOLDEN / "moe/pt", out, "--type", "Q8_0", "-q")[0] == 0
    assert command("gguf", GOLDEN / "moe/pt", out, "--type", "F16", "-q")[0] == 1
    assert command("gguf", GOLDEN / "moe/pt", out, "--type", "F16", "-q", "--restart")[0] == 0
    assert [f.name for f in out.glob("*.gguf")] == ["pt-F16.gguf"]


def test_recipes_know_the_types(tmp_path: Path, command: Command) -> None:
    rules = tmp_path / "mine.toml"
    rules.write_text(
        '[[rule]]\nrole = "experts"\ncodec = "q4_0"\n[[rule]]\nrole = "attention"\ncodec = "q8_0"\n'
        '[[rule]]\nrole = "embeddings"\ncodec = "q8_0"\n'
    )
    status, _, err = command("quantize", GOLDEN / "moe/pt", tmp_path / "out", "--recipe", rules, "--runtime", "llama_cpp", "-q")
    assert (status, err) == (0, "")
    assert [f.name for f in (tmp_path / "out").glob("*.gguf")] == ["pt-Q4_0.gguf"]
    status, _, err = command("quantize", GOLDEN / "moe/pt", tmp_path / "vllm", "--recipe", rules)
    assert status == 1
    assert "q8_0" in err.lower()


def test_quantizing_a_gguf_again_is_refused(tmp_path: Path, command: Command) -> None:
    assert command("gguf", GOLDEN / "moe/pt", tmp_path / "q8", "--type", "Q8_0", "-q")[0] == 0
    status, _, err = command("wint4", tmp_path / "q8", tmp_path / "out")
    assert status == 1
    assert "is quantized already" in err
