"""Whoever reads stdout may stop, or not be there: the work is done, exit code and stderr are those of a run that is read."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ernie_quant.cli.main import COMMANDS, main
from helpers import w4a8
from helpers.disk import no_waiting
from helpers.hub import LoopbackHub
from helpers.models import GOLDEN, copy, write
from helpers.nights import PT, job_file
from helpers.runs import SOURCE
from helpers.synthetic import wide, write_model
from helpers.words import byte_tokenizer

from ernie_quant.check.verify import verify
from ernie_quant.planning.built_in import fastdeploy_container

RULES = '[[rule]]\nrole = "experts"\ncodec = "rtn"\ngroup_size = 64\n'
LINES = {
    "inspect": "SRC",
    "plan": "SRC",
    "convert": "SRC OUT --to pt",
    "gguf": "SRC OUT --type Q4_0 --keep-unfit",
    "wint4": "SRC OUT --experts-only",
    "wint8": "SRC OUT --experts-only",
    "fp8": "SRC OUT --experts-only",
    "mxfp4": "SRC OUT --experts-only",
    "nvfp4": "SRC OUT --experts-only",
    "wint2": "SRC OUT --wint4-layers 0 --effort 1",
    "w4a8": "WIDE OUT --calibration BOOK --calibration-tokens 512",
    "quantize": "SRC OUT --recipe RULES",
    "dequantize": "CONTAINER OUT --to pt",
    "reshard": "CONTAINER OUT --tp 1",
    "merge": "CONTAINER",
    "verify": "CONTAINER",
    "report": "CONTAINER --out PAGE",
    "eval": "SPOKEN --text BOOK --tokens 511",
    "allocate": "SPOKEN -o RULES_MADE --bits 9 --text BOOK --tokens 512",
    "calibrate": "SPOKEN STATS --text BOOK --tokens 512",
    "publish": "CONTAINER me/container",
    "nightly": "JOB --work WORK",
}
WRITING = {name for name, line in LINES.items() if " OUT" in line}
MORE = ["wint4 SRC OUT --experts-only --dry-run", "plan SRC --json", "--help"]
PYTHON = [sys.executable, "-m", "ernie_quant"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """src, its container for FastDeploy, and rules.toml."""
    folder = tmp_path_factory.mktemp("pipes")
    write_model(folder / "src", *wide())
    (folder / "rules.toml").write_text(RULES)
    byte_tokenizer(copy(GOLDEN / "moe_hf/pt", folder / "spoken"))
    w4a8.model(folder / "wide")
    (folder / "book.txt").write_text("".join(f"{n} and {n * n}, " for n in range(200)))
    with no_waiting():
        write(folder / "src", folder / "container", "fastdeploy", recipe=fastdeploy_container("wint2", 0, effort=1))
    return folder


@pytest.fixture
def words(folder: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    """The words of a line, with places for those in capitals."""
    places = {"SRC": folder / "src", "CONTAINER": folder / "container", "RULES": folder / "rules.toml", "OUT": tmp_path / "out"}
    places |= {
        "WIDE": folder / "wide",
        "SPOKEN": folder / "spoken",
        "BOOK": folder / "book.txt",
        "STATS": tmp_path / "stats.safetensors",
        "RULES_MADE": tmp_path / "made.toml",
    }
    places |= {"PAGE": tmp_path / "page.html", "JOB": tmp_path / "job.toml", "WORK": tmp_path / "work"}
    return lambda line: [*PYTHON, *(str(places.get(word, word)) for word in line.split())]


def gone(line: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    """With a pipe as stdout that nobody reads any more, from the first byte on."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]
    finally:
        os.close(writer)


def shell(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", f"set -o pipefail; {script}"], capture_output=True, text=True, check=False)


def test_every_command_is_here() -> None:
    assert LINES.keys() == set(COMMANDS)
    assert len(WRITING) == 12


@pytest.fixture
def gone_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], tuple[int, str]]:
    """The same in this process, whose stdout is such a pipe meanwhile: exit code and stderr."""

    def run(line: list[str]) -> tuple[int, str]:
        reader, writer = os.pipe()
        os.close(reader)
        before = os.dup(1)
        monkeypatch.setattr(sys, "argv", line[len(PYTHON) - 1 :])
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdout", sys.__stdout__)
        os.dup2(writer, 1)
        try:
            with pytest.raises(SystemExit) as stopped:
                main()
            nowhere = os.path.samestat(os.fstat(1), os.stat(os.devnull))  # noqa: PTH116 - of a descriptor
        finally:
            os.dup2(before, 1)
            os.close(before)
            os.close(writer)
        assert nowhere, "nothing was written to the pipe"
        return int(stopped.value.code or 0), capsys.readouterr().err

    return run


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("publish", "nightly")])
def test_a_reader_who_has_gone(
    name: str, words: Callable[[str], list[str]], tmp_path: Path, gone_here: Callable[[list[str]], tuple[int, str]]
) -> None:
    assert gone_here(words(f"{name} {LINES[name]}")) == (0, "")
    assert (tmp_path / "out/ernie-quant.json").exists() == (name in WRITING)
    assert not (tmp_path / "out/.ernie-quant").exists()
    assert (tmp_path / "page.html").exists() == (name == "report")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("publish", "nightly")])
def test_a_reader_of_json_who_has_gone(
    name: str, words: Callable[[str], list[str]], gone_here: Callable[[list[str]], tuple[int, str]]
) -> None:
    """Of what would be written the plan is enough: the other result takes the same way out."""
    assert gone_here(words(f"{name} {LINES[name]} --json" + " --dry-run" * (name in WRITING))) == (0, "")


@pytest.mark.parametrize("name", COMMANDS)
def test_head_of_a_commands_help(name: str) -> None:
    """bash's PIPESTATUS is 0 0, as `set -o pipefail` says too."""
    done = shell(f"{shlex.join([*PYTHON, name, '--help'])} | head -1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: ernie-quant {name} ")


@pytest.mark.parametrize("name", ["convert", "verify"])
def test_the_end_of_a_process_has_nothing_to_say_either(name: str, words: Callable[[str], list[str]], tmp_path: Path) -> None:
    """One that writes a folder and one that reads it; Python flushes stdout once more when it ends."""
    done = gone(words(f"{name} {LINES[name]}"))
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out/ernie-quant.json").exists() == (name == "convert")


@pytest.mark.parametrize("name", ["publish", pytest.param("nightly", marks=pytest.mark.slow)])
def test_a_reader_of_what_goes_to_a_hub(name: str, words: Callable[[str], list[str]], tmp_path: Path) -> None:
    job_file(tmp_path, PT, source=SOURCE)
    with LoopbackHub(tmp_path / "hub") as hub:
        done = gone(words(f"{name} {LINES[name]}"), env=os.environ | hub.environment(tmp_path / "home"))
        assert (done.returncode, done.stderr) == (0, "")
        assert "ernie-quant.json" in hub.repo("me/container" if name == "publish" else "me/tiny-pt").files()


@pytest.mark.parametrize("line", MORE)
def test_other_things_that_are_printed(line: str, words: Callable[[str], list[str]], tmp_path: Path) -> None:
    done = gone(words(line))
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "out").exists()


ENDS = [("| true", 0), ("| head -1", 1), (">&- 2>&- <&-", 0), ("2>&- | head -2", 2)]


@pytest.mark.parametrize(("end", "lines"), ENDS)
def test_in_a_shell(end: str, lines: int, words: Callable[[str], list[str]]) -> None:
    done = shell(f"{shlex.join(words('plan SRC'))} {end}")
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, lines, "")


@pytest.mark.parametrize(("end", "lines"), ENDS[1:3])
def test_in_a_shell_the_work_is_done(end: str, lines: int, words: Callable[[str], list[str]], tmp_path: Path) -> None:
    done = shell(f"{shlex.join(words('convert SRC OUT --to pt'))} {end}")
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, lines, "")
    assert verify(tmp_path / "out").files == 4


@pytest.mark.parametrize(("line", "code"), [("plan nowhere", 1), ("inspect BROKEN", 1), ("wint5", 2)])
@pytest.mark.parametrize("end", ["| true", "2>&1 | true", ">&- 2>&-"])
def test_a_failure_keeps_its_exit_code(line: str, code: int, end: str, words: Callable[[str], list[str]], tmp_path: Path) -> None:
    config, tensors = wide()
    broken = write_model(tmp_path / "broken", config, {n: t for n, t in tensors.items() if n != "model.norm.weight"})
    text = shlex.join(str(broken) if word == "BROKEN" else word for word in words(line))
    done = shell(f"{text} {end}")
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "ignored" not in done.stderr


def test_a_full_disk_is_told_once(words: Callable[[str], list[str]]) -> None:
    done = shell(f"{shlex.join(words('plan SRC'))} > /dev/full")
    line = "error: standard output: No space left on device; the same command goes on where it stopped\n"
    assert (done.returncode, done.stderr) == (75, line)
