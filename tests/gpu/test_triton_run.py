"""Whole runs: the folder that a GPU makes is the one that the CPU makes, byte for byte; and what is no device is refused."""

from __future__ import annotations

import hashlib
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import Command, refusal
from helpers.gpu import kernels_of_the_cpu
from helpers.models import random_model
from helpers.runs import OF_128S, SOURCE

from ernie_quant import devices, library, needs
from ernie_quant.errors import ErnieQuantError, NeedsError

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::DeprecationWarning:triton"),
    pytest.mark.usefixtures("no_waiting_for_the_disk"),
]


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


ONE_EXPERT = OF_128S | {"moe_num_experts": 1, "moe_k": 1, "vocab_size": 40}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "wint4": ("wint4", {"group_size": 32, "experts_only": True}),
    "fp8": ("fp8", {"experts_only": True}),
    "gguf": ("gguf", {"type": "Q4_0", "experts_only": True}),
    "wint8": ("wint8", {"group_size": "channel", "scale": "absmax"}),
    "wint4 for FastDeploy": ("wint4", {"runtime": "fastdeploy"}),
    "wint2": ("wint2", {"effort": 1, "wint4_layers": 0}),
}
QUICK = ("wint4", "fp8", "gguf")  # in the interpreter: the others take a minute each


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in RUNS])
def test_a_run_on_a_gpu_writes_the_files_of_a_run_on_the_cpu(name: str, device: str, tmp_path: Path) -> None:
    recipe, options = RUNS[name]
    changes = ONE_EXPERT | ({"moe_intermediate_size": 32} if name == "wint4" else {})
    source = random_model(tmp_path / "src", "paddle", **changes)
    library.quantize(source, tmp_path / "gpu/out", recipe, device=device, workers=3, **options)
    with kernels_of_the_cpu():
        library.quantize(source, tmp_path / "cpu/out", recipe, workers=2, **options)
    found, wanted = hashes(tmp_path / "gpu/out"), hashes(tmp_path / "cpu/out")
    assert len(wanted) > 3
    assert [file for file in wanted if found.get(file) != wanted[file]] == []
    assert found.keys() == wanted.keys()


# --- which device ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:-1", "cuda:01", "cuda:1,2", "CUDA", ""])
def test_what_is_no_device_is_refused_before_anything_is_read(text: str, command: Command, tmp_path: Path) -> None:
    code, out, err = command("wint4", SOURCE, tmp_path / "out", "--device", text, "--dry-run")
    assert (code, out) == (2, "")
    assert f"'{text}' is no device; there are cpu, cuda (all GPUs) and cuda:0, cuda:1 and so on" in " ".join(err.split())
    with pytest.raises(ValueError, match="is no device"):
        library.quantize(SOURCE, tmp_path / "out", "wint4", device=text, dry_run=True)


def test_a_pytorch_without_cuda(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    err = refusal(command, "wint4", SOURCE, tmp_path / "out", "--group-size", "32", "--device", "cuda")
    assert err.startswith(f"error: --device cuda: PyTorch {torch.__version__} was built without CUDA; --device cpu works")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    err = refusal(command, "gguf", SOURCE, tmp_path / "out", "--keep-unfit", "--device", "cuda:0")
    assert err == "error: --device cuda:0: PyTorch finds no GPU that it can use; --device cpu works without\n"
    assert not (tmp_path / "out").exists()


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device == "cuda:0" else (8, 0))
    monkeypatch.setattr(devices, "require", lambda *_: None)
    monkeypatch.setenv("CC", "cc")


@pytest.mark.usefixtures("two_gpus")
def test_gpus_by_number() -> None:
    assert devices.found("cuda") == ("cuda:0", "cuda:1")
    assert devices.found("cuda:1") == ("cuda:1",)
    with pytest.raises(ErnieQuantError, match=r"^--device cuda:7: there is no such GPU; PyTorch sees cuda:0, cuda:1$"):
        devices.found("cuda:7")


def test_gpus_that_are_too_old(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device == "cuda:0" else (7, 5))
    assert devices.found("cuda:0") == ("cuda:0",)
    with pytest.raises(ErnieQuantError, match=r"^--device cuda: cuda:1 has compute capability 7\.5, and kernels need 8\.0: name"):
        devices.found("cuda")


def test_a_machine_without_a_c_compiler(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ErnieQuantError, match=r"^--device cuda: Triton needs a C compiler .*: install gcc or clang$"):
        devices.found("cuda")


def test_a_missing_triton(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "require", needs.require)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(NeedsError, match=r"^this needs Triton: pip install "):
        devices.found("cuda")


class Nothing:
    """In place of a stream, and of what makes one torch's own."""

    def __init__(self, *_: object) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def crew(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> devices.Crew:
    for name in ("device", "stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    return devices.Crew("cuda")


def test_threads_take_devices_in_turn_and_keep_them(crew: devices.Crew) -> None:
    seen: list[tuple[str, str]] = []

    def work() -> None:
        with crew.at_work() as first:
            pass
        with crew.at_work() as second:
            seen.append((first, second))

    for _ in range(4):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [(f"cuda:{i % 2}", f"cuda:{i % 2}") for i in range(4)]
    assert (crew.workers(1), crew.workers(8)) == (2, 8)


def test_a_full_device_is_one_line(crew: devices.Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 80 << 30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    message = "^cuda:0: its 80 GiB are full, of other programs too; fewer --workers need less$"
    with pytest.raises(ErnieQuantError, match=message), crew.at_work():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate …")
