"""Machines that lack something: a cache, fsync of folders, free space that is told, descriptors, UTF-8."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.commands import Command
from helpers.models import copy, random_model, tensors, write
from helpers.paths import ROOT
from safetensors.torch import save_file

from ernie_quant import disk
from ernie_quant.errors import CheckpointError, OutputError, RetryError
from ernie_quant.planning.make import make_plan
from ernie_quant.run.whole import run_plan
from ernie_quant.sources import cache, open_source
from ernie_quant.views.files import Files
from ernie_quant.weights import layouts

SMALL = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64, "moe_intermediate_size": 64, "moe_num_experts": 4}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("machines") / "src", layouts.PT, "moe", **SMALL)


def one_file_each(source: Path, out: Path) -> Path:
    """Every tensor in a file of its own."""
    table = tensors(source)
    out.mkdir()
    shutil.copy(source / "config.json", out)
    places = {name: f"model-{i:05d}-of-{len(table):05d}.safetensors" for i, name in enumerate(table, 1)}
    for name, place in places.items():
        save_file({name: table[name].contiguous()}, out / place, metadata={"format": "pt"})
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return out


# --- no cache for compiled code ----------------------------------------------------------------------------------------

KERNELS = """
import os
from pathlib import Path
import torch
os.access = lambda place, how: False  # the package cannot be written
import tempfile
real = tempfile.TemporaryFile
def TemporaryFile(*, dir=None, **how):
    if dir is not None and "__pycache__" in str(dir):
        raise PermissionError(13, "Permission denied")
    return real(dir=dir, **how)
tempfile.TemporaryFile = TemporaryFile
from ernie_quant.kernels import packing
codes = torch.tensor([[-8, 7, 0, 1, 0, 0, 0, 0]], dtype=torch.int8)
print(packing.pack(codes, 4).view(torch.uint8).tolist())
print(sorted(p.name for p in Path.cwd().iterdir()))
"""


def kernels(cwd: Path, script: str = KERNELS, **env: str) -> list[str]:
    fixed = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-B", "-c", script], cwd=cwd, env=fixed | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


PACKED = "[[240, 152, 136, 136]]"  # -8 and 7 are nibbles 0 and 15, 0 is 8, 1 is 9


def test_kernels_are_compiled_where_no_folder_takes_them(tmp_path: Path) -> None:
    """HOME=/dev/null: no folder can be made there."""
    assert kernels(tmp_path, HOME="/dev/null") == [PACKED, "[]"]


def test_a_user_without_a_home_gets_no_folder_named_tilde(tmp_path: Path) -> None:
    script = "import pathlib\ndef home(): raise RuntimeError\npathlib.Path.home = home\n" + KERNELS
    assert kernels(tmp_path, script, HOME="~") == [PACKED, "[]"]


@pytest.fixture(scope="module")
def cache_of_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    assert kernels(folder, NUMBA_CACHE_DIR=str(folder / "cache")) == [PACKED, "['cache']"]
    return folder / "cache"


@pytest.mark.parametrize("way", ["damaged", "unreadable", "full"])
def test_a_cache_that_fails_is_none(way: str, cache_of_kernels: Path, tmp_path: Path) -> None:
    home = copy(cache_of_kernels, tmp_path / "cache")
    indexes = list(home.rglob("*.nbi"))
    assert indexes
    for index in indexes:
        if way == "damaged":
            index.write_bytes(index.read_bytes()[:20])
        else:
            index.unlink()
            if way == "unreadable":
                index.mkdir()
    full = "import numba.core.caching as c\ndef save(*_): raise OSError(28, 'No space')\nc.IndexDataCacheFile._save_data = save\n"
    assert kernels(tmp_path, (full if way == "full" else "") + KERNELS, NUMBA_CACHE_DIR=str(home)) == [PACKED, "['cache']"]


def test_who_has_no_home_is_told_where_hubs_files_could_go(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.delenv("ERNIE_QUANT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(OutputError, match="no home folder; set ERNIE_QUANT_CACHE"):
        cache.cache_folder()


# --- fsync -------------------------------------------------------------------------------------------------------------

FOLDERS = [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM, errno.EBADF]


def refuse(monkeypatch: pytest.MonkeyPatch, code: int, folders: bool) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode) == folders:
            raise OSError(code, os.strerror(code))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("code", FOLDERS)
def test_folders_that_cannot_be_made_durable(code: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, code, folders=True)
    write(source, tmp_path / "out")
    assert (tmp_path / "out/ernie-quant.json").is_file()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_files_that_cannot_be_made_durable(code: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, code, folders=False)
    write(source, tmp_path / "out")
    assert (tmp_path / "out/ernie-quant.json").is_file()


@pytest.mark.parametrize("folders", [True, False])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_what_a_disk_has_lost_is_an_error(code: int, folders: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, code, folders)
    with pytest.raises(OSError, match=os.strerror(code)):
        disk.write_file(tmp_path / "file", b"data")


def test_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    disk.fsync_folder(tmp_path)


# --- descriptors -------------------------------------------------------------------------------------------------------


def test_few_files_are_open_at_a_time(source: Path, tmp_path: Path) -> None:
    many = sorted(one_file_each(source, tmp_path / "many").glob("*.safetensors"))
    assert len(many) > 40
    with Files(most=8) as files:
        for path in many * 2:
            with files.opened(path) as fd:
                assert os.pread(fd, 2, 0)
            assert len(files._open) <= 8
        with files.opened(many[0]) as fd, ThreadPoolExecutor(8) as pool:  # one that is read stays, whatever others do
            assert set(pool.map(lambda path: head(files, path), many * 20)) == {8}
            assert os.pread(fd, 8, 0)
    assert not files._open


def head(files: Files, path: Path) -> int:
    with files.opened(path) as fd:
        return len(os.pread(fd, 8, 0))


def test_a_limit_below_the_number_of_files(source: Path, tmp_path: Path) -> None:
    """Files of the source and of the result: run and verify."""
    many = one_file_each(source, tmp_path / "many")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\nimport ernie_quant.views.files as f\n"
    limit += "f.Files.__init__.__defaults__ = (*f.Files.__init__.__defaults__[:2], 8)\n"
    limit += "from ernie_quant.cli.main import main\nimport sys\nsys.argv = sys.argv[:1] + sys.argv[1:]\nmain()\n"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    size = ["--max-shard-size", "20KB"]
    for line in (
        ["convert", many, tmp_path / "out", "--to", "pt", *size],
        ["verify", tmp_path / "out", "--against", many, "--full"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", limit, *map(str, line)], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 8


# --- space, names ------------------------------------------------------------------------------------------------------


def says(monkeypatch: pytest.MonkeyPatch, free: int, total: int = 10**12) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=total, used=total - free, free=free))


@pytest.mark.parametrize("total", [0, 10**12])
def test_a_disk_that_reports_no_free_space(
    total: int, source: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(monkeypatch, 0, total)
    code, _, err = command("convert", source, tmp_path / "out", "--to", "pt")
    assert (code, err.count("\n")) == (0, 1)
    assert err.startswith(f"note: {tmp_path}: the disk reports no free space; whether the result fits is not known; --no-space")
    assert command("convert", source, tmp_path / "other", "--to", "pt", "--no-space-check")[::2] == (0, "")


def test_too_little_space_may_be_ignored(source: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, 1)
    code, _, err = command("convert", source, tmp_path / "out", "--to", "pt")
    assert (code, "more than the disk has free; --no-space-check begins all the same" in err) == (75, True)
    assert not (tmp_path / "out").exists()
    assert command("convert", source, tmp_path / "out", "--to", "pt", "--no-space-check")[0] == 0


@pytest.mark.parametrize(("files", "left", "good"), [(100, 3, False), (100, 90, True), (0, 0, True), (100, 0, True)])
def test_names_that_a_disk_has_left(
    files: int, left: int, good: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0 files in all: a disk that does not count them, as btrfs; 0 left: full, or it does not tell, which the first one shows."""
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_files=files, f_favail=left))
    says(monkeypatch, 10**12)
    plan = make_plan(open_source(source), runtime="vllm")
    if good:
        run_plan(plan, tmp_path / "out")
        assert (tmp_path / "out/ernie-quant.json").is_file()
    else:
        with pytest.raises(RetryError, match=r"needs \d+ files, the disk has room for the names of 3 \(inodes\)"):
            run_plan(plan, tmp_path / "out")


@pytest.mark.parametrize("name", ["config.json", "README.md", "report.json", "SHA256SUMS", "config.json.partial"])
def test_a_folder_in_the_place_of_a_file_is_found_before_the_work(name: str, source: Path, tmp_path: Path) -> None:
    """It can get there while a run is interrupted."""
    plan, out = make_plan(open_source(source), runtime="vllm"), tmp_path / "out"
    with pytest.raises(ZeroDivisionError):
        run_plan(plan, out, progress=lambda _: 1 // 0)  # type: ignore[arg-type, return-value]
    (out / name).mkdir()
    with pytest.raises(OutputError, match=rf"{name}: is a folder, and the result has a file there; move it away"):
        run_plan(plan, out)


def test_a_small_file_that_cannot_be_read_is_found_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """root may read everything, so the answer is made up."""
    folder = Path(shutil.copytree(source, tmp_path / "src"))
    (folder / "tokenizer.model").write_bytes(b"words")
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, how: "tokenizer" not in str(path) and real(path, how))
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: would be carried along, but may not be read"):
        make_plan(open_source(folder), runtime="vllm")


# --- locales -----------------------------------------------------------------------------------------------------------

LOCALES = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "GBK": {"PYTHONIOENCODING": "gbk"},
    "strict": {"PYTHONIOENCODING": "ascii:strict"},
    "UTF-8": {"PYTHONIOENCODING": "utf-8"},
}


@pytest.mark.parametrize("locale", LOCALES)
def test_names_that_a_locale_does_not_have(locale: str, source: Path, tmp_path: Path) -> None:
    """Of folders, as an archive from another system leaves them: said with escapes, and what is written is UTF-8 all the same.

    Through the real program, as its streams are what fails. The name has all at once: UTF-8, GBK and latin-1.
    """
    raw = "模型-😀-".encode() + b"\xc4\xa3\xd0\xcd-caf\xe9"
    folder, out = (os.fsencode(tmp_path) + b"/" + name for name in (raw, b"out-" + raw))
    shutil.copytree(source, os.fsdecode(folder))
    env = os.environ | LOCALES[locale] | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    convert = [b"convert", folder, out, b"--to", b"pt"]
    verify = [b"verify", out, b"--against", folder, b"--json"]
    found = {}
    for line in (convert, [*convert, b"--json"], verify, [b"report", out], [b"inspect", folder], [b"plan", folder]):
        done = subprocess.run([sys.executable, "-m", "ernie_quant", *line], env=env, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        found |= json.loads(done.stdout.decode("ascii")) if line[-1] == b"--json" else {}
    assert (os.fsencode(found["out"]), found["against"]) == (out, True)
    for name in (b"README.md", b"ernie-quant.json", b"report.json", b"report.html"):
        assert (Path(os.fsdecode(out)) / os.fsdecode(name)).read_text(encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "ernie_quant", "inspect", folder + b"x"], env=env, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr.count(b"\n"), b"Traceback" in done.stderr) == (1, 1, False)
