"""What lies beside the weights: what of it a result has, what is left out, and that none of it stops a run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Command
from helpers.disk import contents, stamps
from helpers.models import copy, random_model
from helpers.runs import INT4, OF_128S, SMALL, SOURCE, Killed, stop_in_second_shard

from ernie_quant import disk
from ernie_quant.check.verify import verify
from ernie_quant.errors import CheckpointError, OutputError, PlanError
from ernie_quant.planning import built_in
from ernie_quant.planning.identity import fingerprint
from ernie_quant.planning.make import make_plan
from ernie_quant.planning.steps import Plan
from ernie_quant.run.shared import run_shared
from ernie_quant.run.whole import run_plan
from ernie_quant.sources import beside, open_source

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return copy(SOURCE, tmp_path / "src")


def put(folder: Path, *names: str, data: bytes = b"x") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def plan_of(source: Path, *patterns: str, **options: Any) -> Plan:
    return make_plan(open_source(source), runtime="vllm", recipe=INT4, shard_bytes=SMALL, copy=patterns, **options)


def note(plan: Plan, beginning: str) -> str:
    (found,) = [n for n in plan.notes if n.startswith(beginning)]
    return found


# --- which files -----------------------------------------------------------------------------------------------------

MODEL = (
    "LICENSE", "License.txt", "NOTICE", "README_zh.md", "added_tokens.json", "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja", "chat_template.json", "configuration.json", "generation_config.json", "image_processor_config.json",
    "merges.txt", "preprocessor_config.json", "processor_config.json", "special_tokens_map.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "video_preprocessor_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
OTHERS = (
    "LICENSE.zip", "core.1234", "events.out.tfevents.1", "hf_quant_config.json", "model.tar.gz",
    "nohup.out", "params.json", "quant.log", "recipe.yaml", "requirements.txt", "results.json", "tokenizer.json.aria2",
    "tokenizer.json.bak", "trainer_state.json", "zeugnis.pdf",
)  # fmt: skip


def test_files_of_the_model_are_carried_along_and_all_others_are_named(source: Path, tmp_path: Path) -> None:
    put(source, *MODEL, *OTHERS, "runs/1/events", "additional_chat_templates/old.bak", data=b"{}")
    plan = plan_of(source)
    assert set(plan.copied) == set(MODEL)
    left = sorted([*OTHERS, "additional_chat_templates/old.bak", "runs/"])
    assert note(plan, "not carried along") == f"not carried along: {', '.join(left)}; --copy PATTERN takes them"
    run_plan(plan, tmp_path / "out")
    assert set(MODEL) <= contents(tmp_path / "out").keys()
    assert not set(OTHERS) & contents(tmp_path / "out").keys()
    assert "not carried along: LICENSE.zip, " in (tmp_path / "out/README.md").read_text()
    assert verify(tmp_path / "out").files == len(json.loads((tmp_path / "out/ernie-quant.json").read_text())["files"])


def test_an_adapter_beside_the_weights_is_left_as_a_whole(source: Path) -> None:
    put(source, "adapter_config.json", "adapter_model.safetensors")
    plan = plan_of(source)
    assert set(plan.copied) == {"generation_config.json"}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(
        " ".join(plan.notes).replace(",", "").replace(";", "").split()
    )


def test_a_file_of_the_model_that_is_far_too_large_is_left_out_with_its_size(source: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "core.77"):
        with open(source / name, "wb") as file:
            file.truncate(12_300_000_000)
    plan = plan_of(source)
    assert note(plan, "not carried along").startswith("not carried along: core.77 (12.3 GB), tokenizer.json (12.3 GB); ")
    assert plan.disk_bytes < 1e9


def test_a_hundred_thousand_names_are_a_short_note(source: Path) -> None:
    put(source, *(f"rank-{i:03d}.log" for i in range(60)))
    assert note(plan_of(source), "not carried along").endswith("rank-049.log and 10 more; --copy PATTERN takes them")


def test_only_known_subfolders_are_looked_into() -> None:
    assert [name for name in ("mtp/tokenizer.json", "rank0/a.md", "x/README.md", "LICENSES/MIT.txt") if beside.belongs(name)] == [
        "LICENSES/MIT.txt"
    ]


@pytest.mark.parametrize(
    ("patterns", "taken"),
    [
        (["*.pdf"], ["a.pdf"]),
        (["a.*", "b.log"], ["a.pdf", "b.log"]),
        (["figures/*.png"], ["figures/1.png", "figures/deep/2.png"]),
        (["figures"], ["figures/1.png", "figures/deep/2.png", "figures/x.txt"]),
        (["figures/"], ["figures/1.png", "figures/deep/2.png", "figures/x.txt"]),
        (["*/x.txt"], ["figures/x.txt", "runs/x.txt"]),
        (["*"], ["a.pdf", "b.log"]),
    ],
)
def test_patterns_take_more(patterns: list[str], taken: list[str], source: Path, tmp_path: Path) -> None:
    put(source, "a.pdf", "b.log", "code.py", "figures/1.png", "figures/deep/2.png", "figures/x.txt", "runs/x.txt", "old.gguf")
    plan = plan_of(source, *patterns)
    assert set(plan.copied) == {"generation_config.json", *taken}
    run_plan(plan, tmp_path / "out")
    assert set(taken) <= json.loads((tmp_path / "out/ernie-quant.json").read_text())["files"].keys()
    assert verify(tmp_path / "out").files


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("*.pdf", "'*.pdf': no file of the folder is called so"),
        ("config.json", "'config.json': no file of the folder is called so"),
        ("*.py", "'*.py': code.py is carried along with --copy-code"),
        ("adapter_*", "'adapter_*': adapter_config.json is never carried along, as a program would load it, or for its name"),
        ("*.bin", "'*.bin': old.bin is never carried along, as a program would load it, or for its name"),
        ("../*", "'../*': is no pattern of names inside the folder"),
        ("/etc/passwd", "'/etc/passwd': is no pattern of names inside the folder"),
        ("", "'': is no pattern of names inside the folder"),
    ],
)
def test_a_pattern_that_takes_nothing_is_refused_with_the_reason(pattern: str, why: str, source: Path) -> None:
    put(source, "code.py", "adapter_config.json", "adapter_model.safetensors", "old.bin")
    with pytest.raises(PlanError) as error:
        plan_of(source, "gener*", pattern)
    assert error.value.problems == [why]


def test_every_command_that_writes_takes_patterns(command: Command, tmp_path: Path) -> None:
    source = random_model(tmp_path / "wide", "paddle", **OF_128S)
    put(source, "a.pdf", "code.py")
    commands = (("wint4", "--group-size", "32"), ("convert", "--to", "pt"), ("wint4", "--runtime", "fastdeploy"))
    for number, words in enumerate(commands):
        code, _, err = command(words[0], source, tmp_path / f"{number}", *words[1:], "--copy", "*.pdf", "--copy-code")
        assert (code, err) == (0, "")
        assert (tmp_path / f"{number}/a.pdf").exists()
    code, _, _ = command("reshard", tmp_path / "2", tmp_path / "two", "--tp", "2", "--copy", "a.pdf")
    assert code == 0
    assert (tmp_path / "two/a.pdf").exists()
    assert not (tmp_path / "two/code.py").exists()  # with --copy-code only, as everywhere
    assert "'b.pdf': no file of the folder is called so" in command("fp8", source, tmp_path / "3", "--copy", "b.pdf")[2]


def test_ranks_have_what_a_whole_result_has(tmp_path: Path) -> None:
    source = random_model(tmp_path / "wide", "paddle", **OF_128S)
    put(source, "a.pdf", "tokenizer.model", "additional_chat_templates/a.jinja", "README.md")
    made = built_in.make("wint4", "fastdeploy")
    plan = make_plan(open_source(source), runtime=made.runtime, recipe=made.recipe, copy=["a.pdf"])
    how: dict[str, Any] = {"workers": 1, "restart": False, "progress": lambda _: None}
    run_shared(plan, tmp_path / "out", 2, **how)
    assert set(plan.copied) <= contents(tmp_path / "out").keys()
    assert (tmp_path / "out/README.source.md").read_bytes() == b"x"
    assert verify(tmp_path / "out").files
    assert run_shared(plan, tmp_path / "out", 2, **how).complete_before


@pytest.mark.parametrize("stopped", ["while it quantizes", "while it shares"])
def test_ranks_go_on_beside_a_log_with_the_tokenizer_of_the_end(stopped: str, tmp_path: Path) -> None:
    source = random_model(tmp_path / "wide", "paddle", **OF_128S)
    put(source, "quant.log", "tokenizer_config.json", data=b"{}")
    made = built_in.make("wint4", "fastdeploy")

    def run(out: Path, progress: Callable[[int], None] = lambda _: None) -> None:
        plan = make_plan(open_source(source), runtime=made.runtime, recipe=made.recipe, shard_bytes=100_000)
        run_shared(plan, out, 2, workers=1, restart=False, progress=progress)

    whole = make_plan(open_source(source), runtime=made.runtime, recipe=made.recipe).nbytes_in
    left = whole // 2 if stopped == "while it quantizes" else whole + 1000

    def stop(done: int) -> None:
        nonlocal left
        left -= done
        if left < 0:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "out", stop)
    change_log(source)
    change_tokenizer(source)
    run(tmp_path / "out")
    assert (tmp_path / "out/tokenizer_config.json").read_bytes() == b'{"model_max_length": 131072}'
    run(tmp_path / "fresh/out")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh/out")


def test_names_that_no_manifest_can_hold_are_left_out(source: Path, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(source) + b"/\xc4\xa3\xd0\xcd.md"))
    odd.write_text("x")
    plan = plan_of(source)
    assert note(plan, "not carried along") == "not carried along, with --copy neither: ģ\\udcd0\\udccd.md"
    run_plan(plan, tmp_path / "out")
    assert verify(tmp_path / "out").files


def test_the_card_of_a_result_of_ours_gives_way_to_that_of_its_source(source: Path, tmp_path: Path) -> None:
    put(source, "README.md", data=b"of this program")
    put(source, "README.source.md", data=b"of the source")
    plan = plan_of(source)
    assert plan.copied == {name: source / name for name in ("README.source.md", "generation_config.json")}
    assert not [n for n in plan.notes if "carried" in n]
    run_plan(plan, tmp_path / "out")
    assert (tmp_path / "out/README.source.md").read_bytes() == b"of the source"


def test_a_log_that_is_rotated_while_the_folder_is_read_was_not_there(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(source, "quant.log")
    real, is_file = Path.lstat, Path.is_file

    def lstat(path: Path) -> os.stat_result:
        if path.name == "quant.log":
            raise FileNotFoundError
        return real(path)

    monkeypatch.setattr(Path, "is_file", lambda path: path.name != "quant.log" and is_file(path))
    monkeypatch.setattr(Path, "lstat", lstat)
    assert not [n for n in plan_of(source).notes if "quant.log" in n]


def test_pipes_links_and_what_may_not_be_read(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe is left; a link out of the folder is named only where it would be carried along."""
    os.mkfifo(source / "a.pipe")
    (source / "b.log").symlink_to("/etc/passwd")
    (source / "c.log").symlink_to("/nowhere")
    (source / "data").symlink_to("/etc")
    assert set(plan_of(source).copied) == {"generation_config.json"}
    with pytest.raises(PlanError):
        plan_of(source, "a.pipe")
    for pattern in ("b.log", "data"):
        with pytest.raises(CheckpointError, match="outside the folder"):
            plan_of(source, pattern)
    monkeypatch.setattr(os, "access", lambda path, _: path.name != "generation_config.json")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: would be carried along, but may not be read"):
        plan_of(source)


# --- nothing of it stops a run ---------------------------------------------------------------------------------------


def change_log(source: Path) -> None:
    put(source, "quant.log", data=b"xx")


def change_tokenizer(source: Path) -> None:
    put(source, "tokenizer_config.json", data=b'{"model_max_length": 131072}')


def new_file(source: Path) -> None:
    put(source, "chat_template.jinja", "core.1")


def gone_file(source: Path) -> None:
    (source / "tokenizer_config.json").unlink()


CHANGES = [change_log, change_tokenizer, new_file, gone_file]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_two_runs_is_as_it_is_at_the_end(
    change: Callable[[Path], None], source: Path, tmp_path: Path
) -> None:
    put(source, "quant.log", "tokenizer_config.json", data=b"{}")
    plan = plan_of(source)
    with pytest.raises(Killed):
        run_plan(plan, tmp_path / "out", progress=stop_in_second_shard(plan))
    change(source)
    again = plan_of(source)
    assert fingerprint(again.identity) == fingerprint(plan.identity)
    assert run_plan(again, tmp_path / "out").files_before == 1
    run_plan(plan_of(source), tmp_path / "fresh/out")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh/out")


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_during_a_run_stops_nothing(change: Callable[[Path], None], source: Path, tmp_path: Path) -> None:
    put(source, "quant.log", "tokenizer_config.json", data=b"{}")
    plan = plan_of(source)
    change(source)
    result = run_plan(plan, tmp_path / "out")
    verify(tmp_path / "out")
    found = tmp_path / "out/tokenizer_config.json"
    if change is gone_file:
        assert result.plan.notes[-1] == "not carried along, as gone before the end: tokenizer_config.json"
        assert result.plan.notes[-1] in (tmp_path / "out/README.md").read_text()
        assert not found.exists()
    else:
        assert found.read_bytes() == (source / "tokenizer_config.json").read_bytes()


def test_what_an_interrupted_end_has_copied_goes_when_the_source_has_it_no_more(source: Path, tmp_path: Path) -> None:
    put(source, "a.md", "additional_chat_templates/a.jinja")
    plan = plan_of(source)
    with pytest.raises(Killed):
        run_plan(plan, tmp_path / "out", progress=stop_in_second_shard(plan))
    put(tmp_path / "out", "a.md", "additional_chat_templates/a.jinja")  # the run was killed while it copied
    shutil.rmtree(source / "additional_chat_templates")
    (source / "a.md").unlink()
    run_plan(plan_of(source), tmp_path / "out")
    assert not {"a.md", "additional_chat_templates"} & {p.name for p in (tmp_path / "out").iterdir()}


def test_restart_sweeps_carried_subfolders(source: Path, tmp_path: Path) -> None:
    put(source, "figures/deep/a.png")
    run_plan(plan_of(source, "figures"), tmp_path / "out")
    put(tmp_path / "out", "figures/mine.txt")
    run_plan(plan_of(source), tmp_path / "out", restart=True)
    assert list(contents(tmp_path / "out/figures")) == ["mine.txt"]


def test_a_finished_result_stays_and_says_what_the_source_has_otherwise(source: Path, tmp_path: Path) -> None:
    put(source, "tokenizer_config.json", data=b'{"auto_map": {"AutoTokenizer": ["a.B", null]}}')
    run_plan(plan_of(source), tmp_path / "out")
    before = stamps(tmp_path / "out")
    assert run_plan(plan_of(source), tmp_path / "out").changed == ()
    change_tokenizer(source)
    result = run_plan(plan_of(source), tmp_path / "out")
    assert result.complete_before
    assert result.changed[0].startswith("tokenizer_config.json: of the source changed after the result was finished")
    assert stamps(tmp_path / "out") == before


def test_patterns_are_part_of_what_is_made(source: Path) -> None:
    put(source, "a.pdf", "b.pdf")
    one, other, none = plan_of(source, "a.pdf"), plan_of(source, "b.pdf"), plan_of(source)
    assert len({fingerprint(plan.identity) for plan in (one, other, none)}) == 3
    assert "copy" not in none.identity["options"]


def test_a_file_that_is_written_to_while_it_is_copied_has_the_hash_of_its_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "a.log", tmp_path / "b.log"
    source.write_bytes(b"0123456789")
    monkeypatch.setattr(disk, "CHUNK", 4)
    grown = 0

    class Growing:
        def __init__(self, file: Any) -> None:
            self.file = file

        def read(self, most: int) -> bytes:
            nonlocal grown
            grown += 1
            with open(source, "ab") as more:
                more.write(b"more")
            return bytes(self.file.read(most))

    real = disk.steadily
    monkeypatch.setattr(disk, "steadily", lambda path, work: real(path, lambda file, size: work(Growing(file), size)))
    nbytes, digest = disk.copy_file(source, target)
    assert target.read_bytes() == source.read_bytes()[:nbytes]
    assert hashlib.sha256(target.read_bytes()).hexdigest() == digest
    assert grown < 50


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_stays_small_beside_a_large_file(tmp_path: Path) -> None:
    with open(tmp_path / "core", "wb") as file:
        file.truncate(300 << 20)
    program = (
        "from pathlib import Path; from ernie_quant.disk import copy_file\n"
        f"print(copy_file(Path({str(tmp_path / 'core')!r}), Path({str(tmp_path / 'copy')!r})))\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert int(run.stdout.split()[-1]) < 100_000  # kB
    (tmp_path / "copy").unlink()


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_name_of_255_bytes_is_carried_along(source: Path, tmp_path: Path) -> None:
    name = "模型" * 42 + ".md"
    assert len(name.encode()) == 255
    put(source, name)
    run_plan(plan_of(source), tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == b"x"
    assert verify(tmp_path / "out").files
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.endswith(".partial")]


def test_a_name_too_long_for_the_disk_of_the_result_is_refused_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(source, "a" * 150 + ".md")
    monkeypatch.setattr(os, "pathconf", lambda *_: 143)  # as eCryptfs says
    with pytest.raises(OutputError, match=r"takes names of 143 bytes, which a+\.md has not; rename it in the source"):
        run_plan(plan_of(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- names of code ---------------------------------------------------------------------------------------------------

AUTO = {"AutoTokenizer": ["tok.Slow", None], "AutoConfig": "conf.Config"}


def test_names_of_code_are_dropped_everywhere_where_the_code_is_not_carried(source: Path, tmp_path: Path) -> None:
    files = {
        "tokenizer_config.json": {"auto_map": AUTO, "a": [1], "模型": "名"},
        "processor_config.json": {"image_processor": {"auto_map": AUTO, "size": 3}},
        "video_preprocessor_config.json": {"auto_map": AUTO},
        "generation_config.json": {"auto_map": AUTO, "top_p": 0.7},
        "chat_template.json": {"chat_template": "x", "auto_map": AUTO},
    }
    for name, table in files.items():
        put(source, name, data=json.dumps(table).encode())
    put(source, "tokenizer.json", data=json.dumps({"model": {"vocab": {"auto_map": 7}}}).encode())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"auto_map": AUTO, "custom_pipelines": {"a": {"impl": "p.P"}}}))
    plan = plan_of(source)
    run_plan(plan, tmp_path / "out")
    read = {name: json.loads((tmp_path / "out" / name).read_text()) for name in (*files, "config.json")}
    assert "auto_map" not in json.dumps(read)
    assert "custom_pipelines" not in read["config.json"]
    assert read["tokenizer_config.json"] == {"a": [1], "模型": "名"}
    assert read["processor_config.json"] == {"image_processor": {"size": 3}}
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    losers = ", ".join(["config.json", *sorted(files)])
    assert note(plan, "names of code") == (
        f"names of code that is not carried along are dropped from {losers} (auto_map, custom_pipelines)"
    )
    verify(tmp_path / "out")


def test_with_the_code_only_names_of_code_that_is_elsewhere_are_dropped(source: Path, tmp_path: Path) -> None:
    table = {
        "auto_map": {"AutoTokenizer": ["tok.Slow", "missing.Fast"], "AutoConfig": "org/repo--conf.Config", "AutoModel": "m.M"}
    }
    put(source, "tokenizer_config.json", data=json.dumps(table).encode())
    put(source, "preprocessor_config.json", data=b'{"auto_map":  {"AutoProcessor": "tok.P"}}')
    put(source, "tok.py", "m.py")
    plan = plan_of(source, copy_code=True)
    run_plan(plan, tmp_path / "out")
    found = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert found == {"auto_map": {"AutoTokenizer": ["tok.Slow", None], "AutoModel": "m.M"}}
    kept = (tmp_path / "out/preprocessor_config.json").read_bytes()
    assert kept == (source / "preprocessor_config.json").read_bytes()  # not a byte is touched
    assert note(plan, "names of code").endswith("dropped from tokenizer_config.json (auto_map, custom_pipelines)")


@pytest.mark.parametrize("data", [b"{", b'\xff{"auto_map": {}}', b"[" * 100_000, b"", b"null", b'{"a": NaN}', b'{"auto_map": 7}'])
def test_a_config_that_is_not_one_is_copied_as_it_is(data: bytes, source: Path, tmp_path: Path) -> None:
    put(source, "tokenizer_config.json", data=data)
    run_plan(plan_of(source), tmp_path / "out")
    assert (tmp_path / "out/tokenizer_config.json").read_bytes() == data


def test_a_byte_order_mark_hides_no_names_of_code(source: Path, tmp_path: Path) -> None:
    put(source, "tokenizer_config.json", data=b"\xef\xbb\xbf" + json.dumps({"auto_map": AUTO, "a": "\ud800"}).encode())
    run_plan(plan_of(source), tmp_path / "out")
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_bytes()) == {"a": "\ud800"}
