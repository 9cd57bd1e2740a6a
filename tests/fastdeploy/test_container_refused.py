"""FastDeploy's container: what it cannot hold is refused with all reasons at once, and its size is known before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import Command
from helpers.containers import LAYERS, WIDTHS, decode_all, read_file, read_folder, report, widened
from helpers.models import invoke, random_model
from helpers.paths import MAKE_GEOMETRY

from ernie_quant import runtimes
from ernie_quant.check.verify import verify
from ernie_quant.errors import PlanError
from ernie_quant.planning import built_in
from ernie_quant.planning.make import make_plan
from ernie_quant.runtimes import Place, Spread
from ernie_quant.sources import open_source
from ernie_quant.weights import layouts

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


# --- refusals --------------------------------------------------------------------------------------------------------


def refusal(command: Command, *arguments: object) -> list[str]:
    """Exit code 1, nothing on stdout, OUT (the third argument) not begun; the lines on stderr."""
    code, out, err = command(*arguments)
    assert (code, out) == (1, ""), (out, err)
    assert not Path(str(arguments[2])).exists()
    assert err.startswith("error: ")
    return err.splitlines()


@pytest.mark.parametrize("arguments", [("wint2",), ("wint2", "--wint4-layers", 0), ("wint4", "--runtime", "fastdeploy")], ids=str)
def test_a_dense_model_is_refused(arguments: tuple[object, ...], command: Command, tmp_path: Path) -> None:
    source = random_model(tmp_path / "src", layouts.PADDLE, "dense", **{k: v for k, v in WIDTHS.items() if "moe" not in k})
    lines = refusal(command, arguments[0], source, tmp_path / "out", *arguments[1:])
    assert lines[1:] == ["  this model has no experts; FastDeploy's container is for those that have"]


@pytest.mark.parametrize("family", ["moe", "moe_mtp", "vl"])
@pytest.mark.parametrize(
    ("layers", "said"), [((), 7), (("--wint4-layers", 1000), 1000), (("--wint4-layers", "LAST"), "LAST")], ids=str
)
def test_wint2_that_leaves_no_layer_in_2_bits_is_refused(
    family: str, layers: tuple[object, ...], said: object, command: Command, tmp_path: Path
) -> None:
    """The golden models have 2 MoE layers, of which the last is layer 2; that of VL models has one, layer 1."""
    widths = VL if family == "vl" else WIDTHS
    source = random_model(tmp_path / "src", layouts.PADDLE, family, **widths)
    last = max(int(name.split(".")[2]) for name in read_file(source / "model.safetensors") if ".experts." in name)
    number, wanted = {"vl": 1}.get(family, 2), last + 1 if said == "LAST" else said
    more = [wanted if word == "LAST" else word for word in layers]
    lines = refusal(command, "wint2", source, tmp_path / "out", *more, "--unsupported")
    assert lines[1:] == [
        f"  wint2: wint4-layers is {wanted}, which leaves no experts for 2 bits: the last of this model's {number} MoE layers is"
        f" layer {last}; give at most {last}, or for all in 4 bits use wint4 --runtime fastdeploy"
    ]
    assert command("wint2", source, tmp_path / "out", "--wint4-layers", last, "--unsupported", "--dry-run")[0] == 0


VL = {k: v for k, v in WIDTHS.items() if "moe" not in k} | {"moe_intermediate_size": [256, 128]}


@pytest.mark.parametrize("arguments", [("wint2", "--wint4-layers", 0), ("wint4", "--runtime", "fastdeploy")], ids=str)
def test_a_vl_model_is_refused_and_written_only_with_unsupported(
    arguments: tuple[object, ...], command: Command, tmp_path: Path
) -> None:
    source = random_model(tmp_path / "src", layouts.PADDLE, "vl", **VL)
    lines = refusal(command, arguments[0], source, tmp_path / "out", *arguments[1:])
    assert len(lines) == 2
    assert (
        "has no loader for a WINT2 or WINT4 VL checkpoint: fp8, and wint2 or wint4 with --runtime vllm, make ones that load"
        in lines[1]
    )
    code, out, _ = command(arguments[0], source, tmp_path / "out", *arguments[1:], "--unsupported")
    assert code == 0
    assert "note: FastDeploy has no loader for a WINT2 or WINT4 VL checkpoint" in out
    last = 1 if arguments[0] == "wint4" else -1
    decoded, kept = decode_all(read_folder(tmp_path / "out"), last)
    # 4 text and 4 vision experts, the shared ones, a dense FFN, two layers of attention
    assert len([name for name in decoded if ".experts." in name]) == 8 * 2
    assert len(decoded) == 8 * 2 + 2 + 2 + 2 * 2
    assert {"ernie.layers.1.mlp.gate.weight", "ernie.layers.1.mlp.gate.weight_1", "vision_model.ln.weight"} <= kept.keys()
    rows = report(tmp_path / "out")
    original = read_file(source / "model.safetensors")
    for name, weight in decoded.items():
        plain = widened(original[name]).astype(np.float64)
        assert rows[name]["rel_error"] == pytest.approx(((weight - plain) ** 2).sum() / (plain**2).sum(), rel=1e-9)
    assert verify(tmp_path / "out", source).quantized == len(decoded)


@pytest.mark.parametrize("name", ["wint2", "wint4"])
def test_experts_only_is_refused(name: str, folder: Path, command: Command, tmp_path: Path) -> None:
    options = ("--runtime", "fastdeploy") if name == "wint4" else ()
    lines = refusal(command, name, folder / "src", tmp_path / "out", "--experts-only", *options)
    assert lines == ["error: --experts-only: FastDeploy's container needs its other linears as WINT8; leave it out"]


def test_widths_that_do_not_fit_are_all_listed_before_anything_is_written(command: Command, tmp_path: Path) -> None:
    source = random_model(
        tmp_path / "src", layouts.PADDLE, "moe_mtp", **WIDTHS | {"hidden_size": 192, "moe_intermediate_size": 68}
    )
    lines = refusal(command, "wint2", source, tmp_path / "out", "--wint4-layers", 0)
    assert lines[1:] == [
        "  ernie.layers.*.mlp.experts.*.down_proj.weight: wint2: 68 inputs are not a multiple of 128, 128 would be (6 tensors)",
        "  ernie.layers.*.mlp.experts.*.up_gate_proj.weight: wint2: 192 inputs are not a multiple of 128, 128 or 256 would be (6 tensors)",  # noqa: E501
    ]
    lines = refusal(command, "wint4", source, tmp_path / "out", "--runtime", "fastdeploy")
    assert lines[1:] == [
        "  ernie.layers.*.mlp.experts.*.down_proj.weight: 192 outputs and 68 inputs are not multiples of 8 and 64, which its kernels want (6 tensors)",  # noqa: E501
    ]


def test_what_is_quantized_already_is_refused(folder: Path, command: Command, tmp_path: Path) -> None:
    invoke("wint8", folder / "src", tmp_path / "int8", "--experts-only")
    for source in (folder / "one-src", tmp_path / "int8"):
        (line,) = refusal(command, "wint2", source, tmp_path / "out")
        assert "is quantized already (config.json has quantization_config); start from the original checkpoint" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("wint4", "--runtime", "fastdeploy", "--group-size", "64"), "--group-size does not go with --runtime fastdeploy"),
        (("wint4", "--runtime", "fastdeploy", "--mtp"), "--mtp does not go with --runtime fastdeploy"),
        (("wint4", "--runtime", "fastdeploy", "--keep-unfit"), "--keep-unfit does not go with --runtime fastdeploy"),
        (("wint4", "--unsupported"), "--unsupported does not go with --runtime vllm"),
        (("wint4", "--runtime", "transformers", "--unsupported"), "--unsupported does not go with --runtime transformers"),
        (("wint2", "--runtime", "llama_cpp"), "'llama_cpp' is not one of 'fastdeploy', 'transformers', 'vllm'"),
        (("wint2", "--group-size", "64"), "--group-size does not go with --runtime fastdeploy"),
        (("wint2", "--runtime", "vllm", "--tp", "2"), "--tp does not go with --runtime vllm"),
        (("wint2", "--wint4-layers", "-1"), "-1 is not in the range"),
        (("wint2", "--effort", "2"), "'2' is not one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_two_for_usage(arguments: tuple[str, ...], words: str, folder: Path, command: Command, tmp_path: Path) -> None:
    code, out, err = command(arguments[0], folder / "src", tmp_path / "out", *arguments[1:])
    assert (code, out) == (2, "")
    assert words in err


def test_the_run_command_says_machete_is_off(folder: Path) -> None:
    for case in LAYERS:
        plain, draft = (folder / f"{case}-src.txt").read_text().splitlines()[-2:]
        assert plain.startswith("  FastDeploy: FD_USE_MACHETE=0 python -m fastdeploy.entrypoints.openai.api_server --model ")
        assert draft.startswith(
            "  FastDeploy with MTP: FD_USE_MACHETE=0 python -m fastdeploy.entrypoints.openai.api_server --model "
        )
        assert draft.endswith(f'"model": "{folder}/{case}-src/mtp"}}\'')
        card = (folder / f"{case}-src/README.md").read_text()
        assert f"\nFD_USE_MACHETE=0 python -m fastdeploy.entrypoints.openai.api_server --model {case}-src " in card
        assert "FD_USE_MACHETE=0 is needed" in card
    assert "FD_USE_MACHETE" not in "".join(c for _, c in runtimes.find("fastdeploy").commands(Place("out"), {}, Spread()))


# --- sizes -----------------------------------------------------------------------------------------------------------


GIB = 2**30


def geometry(model: str, out: Path) -> Path:
    """Sparse files with the true geometry."""
    subprocess.run([sys.executable, MAKE_GEOMETRY, model, out], check=True, capture_output=True)
    return out


def dry_run(command: Command, *arguments: object) -> tuple[float, float]:
    """GiB of tensors without and with the MTP block."""
    code, out, err = command(*arguments, "--dry-run", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["notes"]
    mtp = sum(group["bytes_out"] for group in found["groups"] if group["role"] == "mtp")
    return (found["bytes_out"] - mtp) / GIB, found["bytes_out"] / GIB


def test_sizes_of_the_300b(command: Command, tmp_path: Path) -> None:
    """Published: 87.4 GiB; the arithmetic of the specification for the others."""
    source = geometry("300b", tmp_path / "src")
    assert dry_run(command, "wint2", source, tmp_path / "out") == pytest.approx((87.4, 88.3), rel=0.005)
    assert dry_run(command, "wint4", source, tmp_path / "out", "--runtime", "fastdeploy")[0] == pytest.approx(146.8, rel=0.005)


def test_dry_run_of_the_424b(command: Command, tmp_path: Path) -> None:
    source = geometry("vl-424b", tmp_path / "src")
    without, whole = dry_run(command, "wint2", source, tmp_path / "out", "--unsupported")
    assert without == whole
    # 51 layers, 64 experts of each kind, 3 x 8192 x (3584 + 1536) weights; 47 of the layers in 2.08 bits, 4 in 4 bits
    weights = 64 * 3 * 8192 * (3584 + 1536)
    experts = weights * (47 * 2.08 + 4 * 4) / 8 / GIB
    assert experts < whole < experts + 20
    assert not (tmp_path / "out").exists()


def test_widths_that_do_not_fit_are_listed_at_once_for_all_forms(tmp_path: Path) -> None:
    """96 inputs are no multiple of 128 (WINT2 experts), and no multiple of 64 (the WINT8 dense layer)."""
    random_model(tmp_path / "src", layouts.PADDLE, "moe_mtp", **WIDTHS | {"moe_intermediate_size": 96, "intermediate_size": 96})
    with pytest.raises(PlanError) as refused:
        make_plan(open_source(tmp_path / "src"), runtime="fastdeploy", recipe=built_in.fastdeploy_container("wint2", 0))
    lines = "\n".join(refused.value.problems)
    assert "experts.*.down_proj.weight: wint2: 96 inputs are not a multiple of 128" in lines
    assert "layers.0.mlp.down_proj.weight: " in lines
    assert "256 outputs and 96 inputs are not multiples of 8 and 64" in lines
