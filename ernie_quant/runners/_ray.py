"""A connection to a Ray cluster, and a look at its nodes before anything is written."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from ernie_quant.errors import ClusterError, line_of
from ernie_quant.needs import require
from ernie_quant.paths import STATE
from ernie_quant.planning.identity import libraries
from ernie_quant.runners import Common
from ernie_quant.version import __version__

AUTO = "auto"
TOKENS = "RAY_AUTH_MODE and the token must be the same here as on the nodes"
LOOK = 60.0  # seconds in which a node must answer
KNOCK = 10.0  # seconds in which the head must take a connection


@contextmanager
def connected(address: str) -> Iterator[ModuleType]:
    """Ray, with a connection that is closed at the end if it was opened here. Raises NeedsError or ClusterError."""
    require("ray")
    import ray

    if ray.is_initialized():  # by a program that uses the library
        yield ray
        return
    try:
        _knock(os.environ.get("RAY_ADDRESS", address) if address == AUTO else address)
        with _own_signals():
            ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        said = line_of(str(error).strip().partition("\n")[0])
        hint = f"; {TOKENS}" if "oken" in str(error) or "Failed to connect" in said else ""
        raise ClusterError(f"--ray {address}: no Ray cluster can be reached there ({said}){hint}") from None
    with redirect_stdout(sys.stderr):  # what Ray says of nodes that die is not our result
        try:
            yield ray
        except SystemError as error:  # so Ray hands on what the handler of a signal has raised
            raise error.__cause__ or error from None
        finally:
            ray.shutdown()


def _knock(address: str) -> None:
    """Does anything listen there? Ray asks for minutes. Raises OSError or ValueError."""
    if address in (AUTO, "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("auto, or HOST:PORT of the head, as `ray start --head` says it")
    socket.create_connection((host.strip("[]"), int(port)), KNOCK).close()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself; whoever had it gets it back."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


# --- one folder for all nodes ----------------------------------------------------------------------------------------


@contextmanager
def token_in(folder: Path) -> Iterator[Path]:
    """A file in the private state of the output folder, with a text that nobody can guess."""
    token = folder / STATE / f"seen-{secrets.token_hex(8)}"
    token.write_text(secrets.token_hex(16))
    try:
        yield token
    finally:
        for path in token.parent.glob(f"{token.name}*"):
            path.unlink(missing_ok=True)


def look_around(ray: ModuleType, nodes: Sequence[Mapping[str, Any]], token: Path, common: Common) -> None:
    """Does every node see and write the output folder, see the source, and have the same programs? Raises ClusterError."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    source = None if common.source.downloader else common.source.folder
    look = ray.remote(num_cpus=0, max_retries=1)(_seen_from_a_node)
    refs = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            Path.cwd(), token, source
        ): node
        for node in nodes
    }
    done, late = ray.wait(list(refs), num_returns=len(refs), timeout=LOOK)
    for ref in late:
        raise ClusterError(f"{_name(refs[ref])}: a node of the Ray cluster that did not answer in {LOOK:.0f} s")
    own = (token.read_text(), True, _programs())
    for ref in done:
        who, out = f"node {_name(refs[ref])}", token.parent.parent
        try:
            seen, there, programs = ray.get(ref)
        except (ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError):
            continue  # it has just died, and Ray knows it by now
        except ray.exceptions.RayError as error:
            raise ClusterError(f"{who}: cannot run ernie-quant: {why(error)}") from None
        if seen != own[0]:
            raise ClusterError(
                f"{out}: {who} {seen or 'has another folder of this name'}; all nodes must share the output folder"
            )
        if not there:
            raise ClusterError(f"{source}: is not there on {who}; all nodes must see the source in the same place")
        if differ := [
            f"{name} {programs.get(name)}, here {version}" for name, version in own[2].items() if programs.get(name) != version
        ]:
            raise ClusterError(f"{who} has {'; '.join(differ)}; all nodes must have the same versions, for the same bytes")


def stand_in(folder: Path) -> None:
    """On a node: relative paths are those of the machine where the command was typed, if the folder is there."""
    with suppress(OSError):
        os.chdir(folder)


def _seen_from_a_node(here: Path, token: Path, source: Path | None) -> tuple[str, bool, dict[str, str]]:
    """On a node: the text of the token or what is wrong with the folder, whether the source is there, and versions."""
    stand_in(here)
    there = source is None or source.is_dir()
    try:
        text = token.read_text()
        token.with_name(f"{token.name}-{secrets.token_hex(4)}").touch()
    except FileNotFoundError:
        return "does not see it", there, _programs()
    except OSError as error:
        return f"cannot write to it ({error.strerror})", there, _programs()
    return text, there, _programs()


def _programs() -> dict[str, str]:
    return {"ernie-quant": __version__, **libraries()}


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def why(error: Exception) -> str:
    """The last line of what Ray says, which is the reason."""
    return line_of(next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__))
