"""What a user sees without the import, what is said of it before, and what is refused with it."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.in_transformers import CASES, Pair, difference, loaded, other_parameters
from helpers.models import config, invoke, tensors
from helpers.words import byte_tokenizer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from ernie_quant import runtimes
from ernie_quant.errors import ErnieQuantError, NeedsError
from ernie_quant.runtimes import Place, Spread
from ernie_quant.runtimes._transformers import loads_alone
from ernie_quant.serving import transformers_held, transformers_versions

Pairs = Callable[[str], Pair]
EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"
ROOT = Path(__file__).parents[2]


# --- without the import ----------------------------------------------------------------------------------------------


def test_wint2_is_a_warning_and_random_experts(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that it does not know: it says so, names the experts as missing, and goes on."""
    said: list[str] = []
    monkeypatch.setattr(auto.logger, "warning", said.append)
    found, told = AutoModelForCausalLM.from_pretrained(pairs("WINT2").out, dtype=torch.bfloat16, output_loading_info=True)
    assert [line.partition(" - ")[0] for line in said] == ["Unknown quantization type, got ernie-wint2"]
    assert EXPERTS in told["missing_keys"]
    assert EXPERTS in other_parameters(found, loaded(pairs("WINT2").plain))


@pytest.mark.parametrize("case", [case for case in CASES if case != "WINT2"])
def test_it_does_not_load_rightly(case: str, pairs: Pairs) -> None:
    """Wrong values without a word, or an error; if this ever fails, transformers has learned it, and so should we."""
    pair = pairs(case)
    assert not loads_alone(config(pair.out))
    try:
        found = loaded(pair.out)
        found(input_ids=torch.arange(5)[None])  # compressed-tensors decodes some of it now
    except (RuntimeError, ValueError, KeyError):
        return
    if case != "int4 for float8 inputs":  # whose weights are right
        assert other_parameters(found, loaded(pair.plain)) != []


# --- what is said of it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["WINT2", "VL, int4"])
def test_the_commands_of_a_card_work_as_they_stand(
    case: str, pairs: Pairs, ours: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run here, in this process, for speed."""
    folder = byte_tokenizer(shutil.copytree(pairs(case).out, tmp_path / "out"))
    ((title, command),) = runtimes.find("transformers").commands(Place(str(folder)), config(folder), Spread())
    assert title == "transformers 5.18 to 5.24, with ernie-quant"
    python, option, snippet = shlex.split(command)
    assert (python, option) == ("python", "-c")
    assert snippet.startswith("import ernie_quant.transformers; from transformers import ")
    exec(snippet, {})
    assert "Hello" in capsys.readouterr().out


@pytest.mark.parametrize("case", CASES)
def test_the_card_has_the_import_where_it_is_needed(case: str, pairs: Pairs) -> None:
    card, entry = (pairs(case).out / "README.md").read_text(), config(pairs(case).out)
    assert runtimes.find("vllm").library(entry) == "vllm"
    assert "library_name: transformers" not in card
    if case == "int4 for float8 inputs":  # vLLM alone computes what the file asks for
        assert "from transformers import" not in card
    else:
        assert 'python -c "import ernie_quant.transformers; from transformers import' in card


def test_a_flat_config_of_a_vl_model_has_no_command(pairs: Pairs) -> None:
    """transformers does not know its model_type."""
    flat = {"model_type": "ernie4_5_moe_vl", "vision_config": {}}
    assert runtimes.find("transformers").commands(Place("out"), flat, Spread()) == []


def test_what_it_needs_is_said_before_it_is_written(pairs: Pairs, tmp_path: Path) -> None:
    source = pairs("WINT2").source
    said = invoke("wint2", source, tmp_path / "out", "--runtime", "transformers", "--wint4-layers", 2, "--dry-run")
    assert "loads this after `import ernie_quant.transformers` alone" in said
    said = invoke("wint4", source, tmp_path / "out", "--runtime", "transformers", "--dry-run")
    assert "import ernie_quant.transformers" not in said
    said = invoke("wint4", pairs("VL, int4").source, tmp_path / "out", "--runtime", "transformers", "--dry-run")
    assert "--vl-config transformers" in said


# --- with the import -------------------------------------------------------------------------------------------------


def test_it_may_be_imported_twice(ours: Any) -> None:
    assert importlib.reload(ours) is ours
    assert auto.LOADING_ATTRIBUTES_CONFIG_TYPES.count(ours.Wint2Config) == 1


@pytest.mark.parametrize("version", ["5.17.0", "5.25.0", "6.0.0.dev0"])
def test_another_version_is_refused_in_one_line(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    with pytest.raises(NeedsError) as error:
        transformers_versions.check()
    assert str(error.value) == (
        f"import ernie_quant.transformers: was tried with transformers 5.18 to 5.24, not with {version}, whose loader may be"
        " another: pip install 'transformers>=5.18,<5.25'"
    )


@pytest.mark.parametrize("package", ["transformers", "compressed-tensors"])
def test_none_is_refused_in_one_line(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    with pytest.raises(NeedsError, match=f"this needs {package}: pip install '{package}>="):
        transformers_versions.check()


def test_what_transformers_loads_itself_is_left_to_it(pairs: Pairs, ours: Any, tmp_path: Path) -> None:
    """Ours stands in its place, finds nothing to do, and the model is compressed-tensors' as ever."""
    invoke("wint4", pairs("WINT2").source, tmp_path / "out", "--experts-only", "-q")
    assert loads_alone(config(tmp_path / "out"))
    found = loaded(tmp_path / "out")
    assert isinstance(found.hf_quantizer, CompressedTensorsHfQuantizer)
    assert found.config.quantization_config.quant_method == "compressed-tensors"
    invoke("dequantize", tmp_path / "out", tmp_path / "plain", "--to", "pt", "-q")
    assert difference(found, loaded(tmp_path / "plain")) == 0.0


def test_a_checkpoint_that_is_none_of_ours_is_left_to_it_too(
    pairs: Pairs, ours: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ernie_quant.serving import transformers_quantizer

    folder = edited(pairs("VL, int4").out, tmp_path / "out", lambda entry: entry["config_groups"]["group_0"].pop("targets"))
    looked = transformers_quantizer.CompressedTensors.__new__(transformers_quantizer.CompressedTensors)
    said: list[str] = []
    monkeypatch.setattr(transformers_quantizer.logger, "warning", said.append)
    model = loaded(pairs("VL, int4").plain)
    assert looked.look(model, [str(folder / "model.safetensors")]) is None
    assert said[0].startswith("ernie_quant: left to transformers, which may load it wrongly: config.json: ")


def test_inputs_that_are_not_rounded_are_said_once(pairs: Pairs, ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ernie_quant.serving import transformers_quantizer

    said: list[str] = []
    monkeypatch.setattr(transformers_quantizer.logger, "warning_once", said.append)
    loaded(pairs("int4 for float8 inputs").out)
    assert said == ["ernie_quant: weights for fp8 or fp4 inputs are decoded; the inputs are not rounded, as vLLM would"]


# --- bad files -------------------------------------------------------------------------------------------------------


def edited(source: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy with another quantization_config."""
    shutil.copytree(source, folder)
    table = config(folder)
    change(table["quantization_config"])
    (folder / "config.json").write_text(json.dumps(table))
    return folder


ENTRIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "quantization_config of version 2 of ernie-wint2, this program knows 1": lambda entry: entry.update(version=2),
    "wint2.group_size is 32, this program knows 64": lambda entry: entry["wint2"].update(group_size=32),
    "wint2.input_order is 'plain', this program knows 'cutlass64'": lambda entry: entry["wint2"].update(input_order="plain"),
    "has no list wint2.targets": lambda entry: entry.pop("wint2"),
    "matches 0 of": lambda entry: entry["wint2"].update(targets=[]),
}


@pytest.mark.parametrize(("problem", "change"), ENTRIES.items(), ids=ENTRIES)
def test_an_unknown_promise(
    problem: str, change: Callable[[dict[str, Any]], object], pairs: Pairs, ours: Any, tmp_path: Path
) -> None:
    with pytest.raises(ErnieQuantError, match=problem) as error:
        loaded(edited(pairs("WINT2").out, tmp_path / "out", change))
    assert "\n" not in str(error.value)


EXPERT = "model.layers.1.mlp.experts.2.up_proj"
DAMAGES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    f"{EXPERT}.weight_scale: is not there, .*wants U8": lambda table: table.pop(f"{EXPERT}.weight_scale"),
    f"{EXPERT}.weight_packed: is U8 \\(256, 32\\), .*wants U8 \\(256, 64\\)": lambda table: table.update(
        {f"{EXPERT}.weight_packed": table[f"{EXPERT}.weight_packed"][:, :32].contiguous()}
    ),
    f"{EXPERT}.weight_channel_scale: is BF16 .*wants F32": lambda table: table.update(
        {f"{EXPERT}.weight_channel_scale": table[f"{EXPERT}.weight_channel_scale"].bfloat16()}
    ),
    f"{EXPERT}.weight: is missing": lambda table: [table.pop(name) for name in [*table] if name.startswith(EXPERT)],
}


@pytest.mark.parametrize(("problem", "damage"), DAMAGES.items(), ids=DAMAGES)
@pytest.mark.parametrize("native", [False, True], ids=["decoded", "native"])
def test_a_damaged_file(
    problem: str, damage: Callable[[dict[str, torch.Tensor]], object], native: bool, pairs: Pairs, ours: Any, tmp_path: Path
) -> None:
    """Found before anything is loaded, in one line that names the tensor."""
    folder = shutil.copytree(pairs("WINT2").out, tmp_path / "out")
    table = tensors(folder)
    damage(table)
    save_file(table, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ErnieQuantError, match=problem) as error:
        loaded(folder, quantization_config=ours.Wint2Config(native=native))
    assert "\n" not in str(error.value)


def test_a_state_dict_by_itself() -> None:
    """transformers then has no files, and so no config.json that says what is in them."""
    with pytest.raises(ErnieQuantError, match="give from_pretrained the checkpoint"):
        transformers_held.checkpoint_of(None)


def test_a_model_of_another_kind(pairs: Pairs, ours: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    entry = config(pairs("WINT2").out)["quantization_config"]
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    LlamaForCausalLM(LlamaConfig(**small)).save_pretrained(tmp_path / "out")
    table = config(tmp_path / "out") | {"quantization_config": entry}
    (tmp_path / "out/config.json").write_text(json.dumps(table))
    with pytest.raises(ErnieQuantError, match=r"ernie-wint2 is for ernie4_5, .*, not for 'llama'"):
        loaded(tmp_path / "out")


def test_the_example_of_the_document_runs(pairs: Pairs, ours: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/library.md, on a small checkpoint of that name."""
    (tmp_path / "out").symlink_to(pairs("WINT2").out)
    monkeypatch.chdir(tmp_path)
    _, example = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(), re.DOTALL)
    space: dict[str, Any] = {}
    exec(compile(example, "docs/library.md", "exec"), space)
    assert any(type(module).__name__ == "PackedExperts" for module in space["model"].modules())
