"""What the real llama.cpp computes with files from every layout, against the golden logits of Baidu's own code."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.llama_cpp import Llama, Refused, needs_llama_cpp
from helpers.paths import GOLDEN

from ernie_quant.checkpoint import Checkpoint
from ernie_quant.planning.gguf import gguf_plan
from ernie_quant.run.whole import run_plan
from ernie_quant.runtimes import _gguf_file, llama_cpp
from ernie_quant.sources import open_source
from ernie_quant.views.files import Files
from ernie_quant.weights import text
from ernie_quant.weights.stored import resolve_quantized

pytestmark = needs_llama_cpp

MODELS = {"dense": 5e-5, "moe": 5e-5, "moe_mtp": 5e-5, "moe_hf": 5e-5, "vl": 3e-4}
FOLDERS = [(model, layout) for model in MODELS for layout in ("paddle", "pt") if (GOLDEN / model / layout).is_dir()]


def written(source: Path | Checkpoint, out: Path, type_: str = "F32", **settings: Any) -> Path:
    checkpoint = source if isinstance(source, Checkpoint) else open_source(source)
    run_plan(gguf_plan(checkpoint, settings={"type": type_, **settings}), out)
    (file,) = out.glob("*.gguf")
    return file


def difference(file: Path, model: str) -> float:
    """Largest difference to the golden logits."""
    ids, expected = (np.load(GOLDEN / model / name) for name in ("input_ids.npy", "expected_logits_fp32.npy"))
    with Llama(file) as llama:
        found = np.stack([llama.logits(row) for row in ids])
    return float(np.abs(found - expected.reshape(found.shape)).max())


@pytest.mark.parametrize(("model", "layout"), FOLDERS, ids=["-".join(pair) for pair in FOLDERS])
def test_golden_logits(model: str, layout: str, tmp_path: Path) -> None:
    assert difference(written(GOLDEN / model / layout, tmp_path / "out"), model) <= MODELS[model]


@pytest.mark.parametrize("type_", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_types_that_fit_the_small_model(type_: str, tmp_path: Path) -> None:
    most = {"F16": 0.02, "BF16": 0.2, "Q8_0": 1.0, "Q4_0": 6.0}[type_]
    assert 0 < difference(written(GOLDEN / "moe/paddle", tmp_path / "out", type_, keep_unfit=True), "moe") < most


def test_k_types_fall_back_where_their_blocks_do_not_fit(tmp_path: Path) -> None:
    assert difference(written(GOLDEN / "moe/pt", tmp_path / "out", "Q4_K_M", keep_unfit=True), "moe") < 6


def without_bias(weights: Any, **options: Any) -> Any:
    return [w for w in original(weights, **options) if "e_score_correction_bias" not in w.name]


original = text.only_text
SWAPPED = {"mlp.gate_proj.weight": "ffn_up.weight", "mlp.up_proj.weight": "ffn_gate.weight"}


def other_keys(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Any], Any]:
    def metadata(about: Any) -> Any:
        keys, notes = _gguf_file.metadata(about)
        return change(keys), notes

    return metadata


def no_freq_base(keys: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if not key.endswith("freq_base")}


@pytest.mark.parametrize(
    ("target", "name", "value", "least"),
    [
        (text, "only_text", without_bias, 0.1),
        (llama_cpp, "INSIDE", llama_cpp.INSIDE | SWAPPED, 1.0),
        (llama_cpp, "metadata", other_keys(no_freq_base), 0.5),
    ],
    ids=["no bias", "gate and up swapped", "no freq_base"],
)
def test_negative_controls(
    target: Any, name: str, value: Any, least: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that load without a word, and compute something else."""
    monkeypatch.setattr(target, name, value)
    assert difference(written(GOLDEN / "moe/paddle", tmp_path / "out"), "moe") > least


def test_a_file_without_its_eps_is_refused_by_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge can say no."""
    monkeypatch.setattr(llama_cpp, "metadata", other_keys(lambda k: {key: v for key, v in k.items() if "epsilon" not in key}))
    with pytest.raises(Refused, match="layer_norm_rms_epsilon"):
        Llama(written(GOLDEN / "moe/paddle", tmp_path / "out"))


def test_the_same_bytes_from_paddle_and_pt(tmp_path: Path) -> None:
    files = []
    for layout, name in (("paddle", "ERNIE-X-Paddle"), ("pt", "ERNIE-X-PT")):
        shutil.copytree(GOLDEN / "moe_mtp" / layout, tmp_path / name)
        files.append(written(tmp_path / name, tmp_path / f"out-{layout}", "Q8_0"))
    assert [file.name for file in files] == ["ERNIE-X-Q8_0.gguf"] * 2
    assert files[0].read_bytes() == files[1].read_bytes()


def test_split_files_are_loaded_by_the_first(tmp_path: Path) -> None:
    plan = gguf_plan(open_source(GOLDEN / "moe/paddle"), settings={"type": "F32"}, shard_bytes=300_000)
    run_plan(plan, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.gguf"))
    assert len(files) > 2
    assert files[0].name.endswith(f"-F32-00001-of-{len(files):05d}.gguf")
    assert difference(files[0], "moe") <= 5e-5
    assert any("Ollama pulls no split files" in note for note in plan.notes)


def test_codes_of_wint4_and_wint8_are_taken_over(tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    """llama.cpp computes with the very codes of the quantized source: as transformers would, but for its 8-bit activations."""
    for kind, type_, group in (("wint4", "Q4_0", "32"), ("wint8", "Q8_0", "channel")):
        assert command(kind, GOLDEN / "moe/pt", tmp_path / kind, "--group-size", group, "-q")[0] == 0
        status, out, _ = command("gguf", tmp_path / kind, tmp_path / f"{kind}-gguf", "--keep-unfit")
        assert status == 0
        assert "have the codes of the source" in out
        assert (tmp_path / f"{kind}-gguf" / f"{kind}-{type_}.gguf").is_file()
        name = "model.layers.1.mlp.experts.1.up_proj.weight"
        before, after = (next(w.view.source for w in _weights(tmp_path / f) if w.name == name) for f in (kind, f"{kind}-gguf"))
        with Files({}) as files:
            encoded, found = before.encoded(files, (0, 32)), after.read(files, (0, 32))
        codes, scale = encoded["codes"].float(), encoded["scale"].float()
        assert torch.equal(found, codes * scale.repeat_interleave(codes.shape[1] // scale.shape[1], 1))


def _weights(folder: Path) -> Any:
    table = resolve_quantized(open_source(folder))
    assert table.problems == []
    return table.weights
