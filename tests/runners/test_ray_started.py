"""A Ray cluster that was started by `ray start`, with a node that joined it, and the command as it is typed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from faults._process import widths
from helpers.clusters import at_work, ray_environment
from helpers.disk import contents
from helpers.models import random_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="the package ray is not installed"),
]
RAY = Path(sys.executable).with_name("ray")
WIDTH = 1024


@dataclass(frozen=True)
class Started:
    """The address of a head, and what starts a node, by a command before it if need be."""

    address: str
    node: Callable[..., subprocess.Popen[str]]


def ended(process: subprocess.Popen[str]) -> None:
    """It, and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout:
        process.stdout.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Started]:
    with ray_environment(), socket.socket() as free, contextlib.ExitStack() as stack:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()

        def node(*options: str, by: tuple[str, ...] = ()) -> subprocess.Popen[str]:
            line = [*by, str(RAY), "start", *options, "--block"]
            process = subprocess.Popen(line, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            stack.callback(ended, process)
            assert process.stdout
            for said in process.stdout:
                if "Ray runtime started" in said:
                    return process
            raise AssertionError("it has ended")

        node("--head", f"--port={port}", "--num-cpus=1", "--include-dashboard=false")
        node(f"--address=127.0.0.1:{port}", "--num-cpus=1")
        yield Started(f"127.0.0.1:{port}", node)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command, but for the folder that it writes."""
    source = random_model(tmp_path_factory.mktemp("src") / "src", "pt", "moe_mtp", **widths(WIDTH))
    return [sys.executable, "-m", "ernie_quant", "wint4", str(source), "--mtp", "--max-shard-size", "4000000", "--quiet"]


@pytest.fixture(scope="module")
def wanted(line: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("wanted") / "out"
    subprocess.run([*line, str(out)], check=True)
    return contents(out)


def started(line: list[str], out: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*line, str(out), *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def in_the_middle(out: Path) -> Path:
    """A weight file that is half written just now."""
    patience = time.monotonic() + 60
    while time.monotonic() < patience:
        if (found := next(out.glob("*.partial"), None)) is not None:
            return found
    raise AssertionError("nothing is written")


def test_nothing_happens(cluster: Started, line: list[str], wanted: dict[str, bytes], tmp_path: Path) -> None:
    for address in (cluster.address, "auto"):
        out = tmp_path / address.replace(":", "-") / "out"
        process = started(line, out, "--ray", address)
        assert (*process.communicate(), process.returncode) == ("", "", 0)
        assert contents(out) == wanted


def test_a_worker_is_killed_in_the_middle_of_a_file(
    cluster: Started, line: list[str], wanted: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = started(line, out, "--ray", cluster.address)
    in_the_middle(out)
    killed = at_work()
    assert killed
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    said, _ = process.communicate()
    assert (process.returncode, said) == (0, "")
    assert contents(out) == wanted


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_asked_to_stop(
    number: signal.Signals, code: int, cluster: Started, line: list[str], wanted: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = started(line, out, "--ray", cluster.address)
    in_the_middle(out)
    process.send_signal(number)
    said, err = process.communicate()
    assert (process.returncode, said) == (code, ""), err
    assert err.removeprefix("\n") == "interrupted; the same command goes on where it stopped\n"  # ^C stands there
    assert not list(out.rglob("*.partial"))
    assert subprocess.run([*line, str(out)], check=False).returncode == 0
    assert contents(out) == wanted


@pytest.mark.parametrize("ray", [True, False])
def test_the_command_is_killed_and_comes_again_at_once(
    ray: bool, cluster: Started, line: list[str], wanted: dict[str, bytes], tmp_path: Path
) -> None:
    """While the workers of the first have not heard of it."""
    out = tmp_path / "out"
    process = started(line, out, "--ray", cluster.address)
    in_the_middle(out)
    process.kill()
    process.communicate()
    assert at_work()
    again = started(line, out, *(("--ray", cluster.address) if ray else ()))
    assert (again.communicate()[0], again.returncode) == ("", 0)
    time.sleep(2)
    assert contents(out) == wanted


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root, to hide a folder from a node")
def test_a_node_that_does_not_share_the_folder(cluster: Started, line: list[str], tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    hidden = f'mount -t tmpfs none {tmp_path / "shared"} && exec "$@"'
    node = cluster.node(f"--address={cluster.address}", "--num-cpus=1", by=("unshare", "-m", "bash", "-c", hidden, "-"))
    process = started(line, tmp_path / "shared/out", "--ray", cluster.address)
    said, err = process.communicate()
    assert (process.returncode, said, err.count("\n")) == (1, "", 1)
    assert "does not see it; all nodes must share the output folder" in err
    ended(node)


def test_a_node_is_gone_in_the_middle(cluster: Started, line: list[str], wanted: dict[str, bytes], tmp_path: Path) -> None:
    """With all that ran on it, at once; another one has joined before."""
    out = tmp_path / "out"
    node = cluster.node(f"--address={cluster.address}", "--num-cpus=2")
    process = started(line, out, "--ray", cluster.address, "--workers", "2")  # no other node has two
    in_the_middle(out)
    cluster.node(f"--address={cluster.address}", "--num-cpus=2")
    ended(node)
    said, _ = process.communicate()
    assert (process.returncode, said) == (0, "")
    assert contents(out) == wanted
