"""`wint2 --runtime vllm`: which weights get which form, by options and by rules, of text and VL models."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import invoke, random_model, tensors
from helpers.ranks import WIDTHS

import ernie_quant
from ernie_quant.check.verify import verify
from ernie_quant.errors import ConfigError
from ernie_quant.runtimes import _wint2 as stored
from ernie_quant.weights import layouts

Command = Callable[..., tuple[int, str, str]]
VL = {k: v for k, v in WIDTHS.items() if "moe" not in k} | {"moe_intermediate_size": [256, 128]}
INT8, INT4, WINT2 = "int8 (-127 to 127), per channel, mse", "int4, group 128, mse", "wint2 (CCQ), effort 1"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("src") / "src", layouts.PT, "moe_mtp", **WIDTHS)


def wint2(source: Path, out: Path, *options: object) -> dict[str, str]:
    """Weight -> its codec, of the report."""
    invoke("wint2", source, out, "--runtime", "vllm", "--effort", 1, "--wint4-layers", 2, *options, "--quiet")
    return {row["name"]: row["codec"] for row in json.loads((out / "report.json").read_text())["tensors"]}


def forms(codecs: dict[str, str], pattern: str) -> set[str]:
    found = {codec for name, codec in codecs.items() if re.search(pattern, name)}
    assert found, pattern
    return found


def test_experts_have_two_bits_from_a_layer_on_and_all_else_eight(source: Path, tmp_path: Path) -> None:
    codecs = wint2(source, tmp_path / "out")
    assert forms(codecs, r"layers\.1\.mlp\.experts") == {INT4}
    assert forms(codecs, r"layers\.2\.mlp\.experts") == {WINT2}
    assert forms(codecs, r"layers\.\d\.self_attn\.\w_proj|layers\.0\.mlp|shared_experts") == {INT8}
    assert forms(codecs, r"mtp|embed|norm|mlp\.gate\.") == {"kept"}
    assert verify(tmp_path / "out", source).against


def test_options_say_what_else_is_quantized(source: Path, tmp_path: Path) -> None:
    only = wint2(source, tmp_path / "only", "--experts-only")
    assert forms(only, "self_attn|shared_experts|mtp") == {"kept"}
    both = wint2(source, tmp_path / "both", "--experts-only", "--mtp")
    assert forms(both, r"mtp_block.*_proj") == {INT8}
    assert forms(both, r"layers\..*(self_attn|shared_experts)") == {"kept"}
    channel = wint2(source, tmp_path / "channel", "--group-size", "channel", "--mtp")
    assert forms(channel, r"layers\.1\.mlp\.experts") == {"int4 (-7 to 7), per channel, mse"}
    assert forms(channel, r"mtp_block.*_proj") == {INT8}


def test_a_vl_model_has_both_kinds_of_experts_in_two_bits(tmp_path: Path) -> None:
    source = random_model(tmp_path / "src", layouts.PT, "vl", **VL)
    invoke("wint2", source, tmp_path / "out", "--runtime", "vllm", "--wint4-layers", 0, "--quiet")
    packed = [name for name in tensors(tmp_path / "out") if name.endswith("weight_channel_scale")]
    kinds = Counter(int(re.search(r"experts\.(\d+)\.", name)[1]) // 4 for name in packed)  # type: ignore[index]
    assert kinds[0] == kinds[1] > 0
    entry = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    layer = re.search(r"layers\.(\d+)\.", packed[0])[1]  # type: ignore[index]
    for name in (f"model.layers.{layer}.mlp.{kind}_experts.0.gate_proj" for kind in ("text", "vision")):  # vLLM's
        assert any(re.match(target.removeprefix("re:"), name) for target in entry["wint2"]["targets"]), name
    assert verify(tmp_path / "out", source).against


def test_any_layer_may_have_any_form_by_rules(source: Path, tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text("""
[[rule]]
match = 'layers\\.1\\.mlp\\.experts'
codec = "ccq"
[[rule]]
role = "experts"
codec = "rtn"
bits = 8
group_size = 64
[[rule]]
role = "attention"
codec = "fp8"
quant_method = "compressed-tensors"
""")
    ernie_quant.quantize(source, tmp_path / "out", tmp_path / "rules.toml")
    entry = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (entry["quant_method"], len(entry["config_groups"])) == ("ernie-wint2", 2)
    ernie_quant.dequantize(tmp_path / "out", tmp_path / "plain", to="pt")
    assert verify(tmp_path / "plain", tmp_path / "out").against


def test_two_bits_are_for_routed_experts(source: Path, command: Command, tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text('[[rule]]\nrole = "attention"\ncodec = "ccq"\n')
    code, _, err = command("quantize", source, tmp_path / "out", "--recipe", tmp_path / "rules.toml")
    assert code == 1
    assert (
        "q_proj.weight: wint2 (CCQ) is for routed experts, which the plug-in for vLLM decodes; another codec, or keep it" in err
    )


def test_float8_in_its_own_words_cannot_stand_beside_it(source: Path, command: Command, tmp_path: Path) -> None:
    rules = '[[rule]]\nrole = "experts"\ncodec = "ccq"\n[[rule]]\nrole = "attention"\ncodec = "fp8"\n'
    (tmp_path / "rules.toml").write_text(rules)
    code, _, err = command("quantize", source, tmp_path / "out", "--recipe", tmp_path / "rules.toml")
    assert code == 1
    assert "fp8 and other codes cannot stand in one checkpoint, unless fp8 has quant_method = 'compressed-tensors'" in err


def test_widths_that_do_not_fit_are_refused_or_kept(command: Command, tmp_path: Path) -> None:
    source = random_model(tmp_path / "src", layouts.PT, "moe", **WIDTHS | {"moe_intermediate_size": 192})
    options = ("--runtime", "vllm", "--wint4-layers", 0)
    code, _, err = command("wint2", source, tmp_path / "out", *options)
    assert code == 1
    assert "down_proj.weight: wint2: 192 inputs are not a multiple of 128, 128 or 256 would be" in err
    assert command("wint2", source, tmp_path / "out", *options, "--keep-unfit")[0] == 0
    assert not any(name.endswith("weight_channel_scale") for name in tensors(tmp_path / "out"))  # a layer has one form


def test_a_dense_model_is_refused(command: Command, tmp_path: Path) -> None:
    source = random_model(tmp_path / "src", layouts.PT, "dense", **{k: v for k, v in WIDTHS.items() if "moe" not in k})
    code, _, err = command("wint2", source, tmp_path / "out", "--runtime", "vllm")
    assert code == 1
    assert "this model has no experts; wint2 is for those that have" in err


ENTRY: dict[str, Any] = {"version": 1, "wint2": {"targets": ["re:x"], "group_size": 64, "input_order": "cutlass64"}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 2 of ernie-wint2, this program knows 1: a newer ernie-quant may read it"),
        ({"wint2": None}, "has no list wint2.targets"),
        ({"wint2": {"targets": "x"}}, "has no list wint2.targets"),
        ({"wint2": ENTRY["wint2"] | {"group_size": 128}}, "wint2.group_size is 128, this program knows 64"),
        ({"wint2": ENTRY["wint2"] | {"input_order": "plain"}}, "wint2.input_order is 'plain', this program knows 'cutlass64'"),
        ({"wint2": ENTRY["wint2"] | {"targets": [7]}}, "wint2.targets holds 7, which is no pattern"),
    ],
)
def test_what_a_newer_version_says_is_refused(change: dict[str, Any], words: str) -> None:
    assert stored.targets_of(ENTRY) == ["re:x"]
    with pytest.raises(ConfigError, match=re.escape(words)):
        stored.targets_of(ENTRY | change)


@pytest.mark.parametrize("part", [stored.LOCAL, stored.CHANNEL])
def test_a_result_without_a_part_is_refused_by_name(part: str, source: Path, command: Command, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    wint2(source, tmp_path / "out")
    kept = tensors(tmp_path / "out")
    name = f"model.layers.2.mlp.experts.0.down_proj.{part}"
    del kept[name]
    save_file(kept, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    code, _, err = command("dequantize", tmp_path / "out", tmp_path / "plain", "--to", "pt")
    assert code == 1
    assert f"{name}: is not there, config.json (wint2 (CCQ)) wants" in err


def test_zeros_and_huge_rows_come_back(tmp_path: Path) -> None:
    """Rows that the codec stores as zeros are zeros in vLLM's form too."""
    from ernie_quant.codecs.ccq import ConvolutionalCode

    weight = torch.randn((8, 256), generator=torch.Generator().manual_seed(1))
    weight[1] = 0
    codec = ConvolutionalCode(effort=1)
    fields = codec.encode(weight)
    back = stored.unpack("m", stored.pack("m", fields))
    assert all(torch.equal(back[key], fields[key]) for key in fields)
    assert not codec.decode(back)[1].any()
