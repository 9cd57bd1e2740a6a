"""What can be said of a Ray cluster without one."""

from __future__ import annotations

import _thread
import re
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers.clusters import ray_environment
from helpers.commands import Command
from helpers.runs import SOURCE

from ernie_quant.runners.ray import _import_whole


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:9", r"\[Errno 111\] Connection refused"),
        ("no.such.host.invalid:6379", ".*"),
        ("", "auto, or HOST:PORT of the head, as `ray start --head` says it"),
        ("127.0.0.1", "auto, or HOST:PORT .*"),
    ],
)
def test_an_address_where_no_cluster_answers(address: str, why: str, command: Command, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the package ray is not installed")
    with ray_environment():
        code, out, err = command("convert", SOURCE, tmp_path / "out", "--to", "pt", "--ray", address)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert re.fullmatch(rf"error: --ray {address}: no Ray cluster can be reached there \({why}\).*\n", err)


def test_the_package_is_not_installed(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, out, err = command("convert", SOURCE, tmp_path / "out", "--to", "pt", "--ray", "auto")
    assert (code, out) == (1, "")
    assert err.startswith("error: this needs ray: pip install ")
    assert not (tmp_path / "out").exists()


def test_gpus_of_no_cluster(command: Command, tmp_path: Path) -> None:
    code, _, err = command("convert", SOURCE, tmp_path / "out", "--to", "pt", "--ray-gpus", 1)
    assert (code, err.splitlines()[-1]) == (2, "Error: --ray-gpus is for files that a Ray cluster writes; name it with --ray")


def test_a_device_of_this_machine(command: Command, tmp_path: Path) -> None:
    line = ("wint8", SOURCE, tmp_path / "out", "--group-size", 32, "--ray", "auto", "--device", "cuda:1")
    code, _, err = command(*line)
    said = "Error: --device cuda:1 is one of this machine; for those of a Ray cluster say --ray-gpus 1"
    assert (code, err.splitlines()[-1]) == (2, said)


def test_a_task_that_is_cancelled_leaves_no_half_of_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process goes on with other tasks."""
    done = threading.Event()

    def slow(package: str) -> None:
        _thread.interrupt_main()
        time.sleep(0.3)
        done.set()

    monkeypatch.setattr("ernie_quant.runners.ray.importlib.import_module", slow)
    with pytest.raises(KeyboardInterrupt):
        _import_whole("torch")
    assert done.wait(5)
