"""Job files: judged as a whole before anything starts."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from helpers.commands import Command
from helpers.hub import LoopbackHub
from helpers.hubs import ADDRESS, uploads
from helpers.nights import PT, WINT4, job_file

from ernie_quant.errors import PlanError
from ernie_quant.nightly.job import Job, read_job
from ernie_quant.planning.built_in import KINDS

pytestmark = [uploads, pytest.mark.usefixtures("no_pictures")]


def mistakes(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "job.toml"
    path.write_text(text)
    with pytest.raises(PlanError) as refused:
        read_job(path)
    return refused.value.problems or [str(refused.value)]


def test_every_mistake_is_listed_at_once(tmp_path: Path) -> None:
    text = """
        nightly = true
        [source]
        repo = "hf://baidu"
        branch = "main"
        [[target]]
        repo = "tiny"
        recipe = "wint5"
        group_size = 32
        privat = true
        [[target]]
        repo = "ftp://me/tiny"
        recipe = "wint4"
        group_size = 0
        experts_only = "yes"
        wint4_layers = 7
        tp = 2
        max_shard_size = "5 bananas"
        [[target]]
        repo = "me/tiny"
        private = 1
        tag = "v1"
        [[target.rule]]
        codec = "rtn"
        [[target.rule]]
        role = "router"
        codec = "rtn"
        [[target]]
        repo = "hf://me/tiny"
        recipe = "pt"
        effort = 3
        [limits]
        disk_budget = -1
        max_hours = 0
        memory = "1GB"
    """
    found = mistakes(tmp_path, text)
    expected = [
        "[source]: branch: unknown",
        "[source]: hf://baidu: is not SCHEME://ORG/NAME or SCHEME://ORG/NAME@REVISION",
        "[[target]] 1: repo 'tiny' is not ORG/NAME or SCHEME://ORG/NAME",
        "[[target]] 1: recipe 'wint5' is none of pt, paddle, wint4, wint8, fp8, mxfp4, nvfp4, gguf, wint2, w4a8; for others na",
        "[[target]] 1: privat: unknown",
        "[[target]] 2: repo 'ftp://me/tiny': nothing can be published there; there is ",
        "[[target]] 2: experts_only is 'yes', not true or false",
        "[[target]] 2: codec rtn: group_size",
        "[[target]] 2: max_shard_size: '5 bananas' is not a size such as 5GB or 500MB",
        "[[target]] 2: wint4_layers: unknown",
        "[[target]] 2: tp is 2, not 1, or up to 16 with runtime fastdeploy",
        "[[target]] 3: private is 1, not true or false",
        "[[target]] 3: tag is 'v1', not true or false",
        "[[target]] 3: rule 1: needs one of role, match and names",
        "[[target]] 3: rule 2: role 'router' is not one that can be quantized (experts, ",
        "[[target]] 4: effort: unknown",
        "[limits]: memory: unknown",
        "[limits]: max_hours is 0.0, not a number above 0",
        "[limits]: disk_budget: -1 is not a size such as 5GB or 500MB",
        "nightly: unknown; a job has [source], [[target]] and [limits]",
    ]
    assert found.pop().endswith(": is the place of more than one [[target]]")
    assert len(found) == len(expected)
    assert [one for one, begin in zip(found, expected, strict=True) if not one.startswith(begin)] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "[source]: is missing"),
        ("source = 1", "[source]: is not a table"),
        ("target = 3", "has no [[target]]"),
        ('target = ["a"]', "[[target]] 1: is not a table"),
        ("[source]", "[source]: repo is missing"),
        ("[source]\nrepo = 5", "[source]: repo is 5, not a text"),
        ('[source]\nrepo = "folder"\nrevision = "main"', "[source]: revision: folder is a folder and has none"),
        ('[source]\nrepo = "ftp://a/b"', "[source]: ftp://a/b: there is no ftp://; there is "),
        (
            '[source]\nrepo = "hf://a/b@c"\nrevision = "d"',
            "[source]: revision 'd' is no name of a branch, tag or commit, or not the only one",
        ),
        ("[[target]]", "[[target]] 1: repo is missing"),
        ("[[target]]", "[[target]] 1: recipe is missing"),
        ('[[target]]\nrepo = "a/b"\nrule = []', "[[target]] 1: rule: has no [[rule]]"),
        ('[[target]]\nrepo = "a/b"\nrule = ["x"]', "[[target]] 1: rule 1: "),
        (
            '[[target]]\nrepo = "a/b"\nrecipe = "fp8"\nruntime = "fastdeploy"',
            "runtime is 'fastdeploy', not vllm or",
        ),
        (
            '[[target]]\nrepo = "a/b"\nrecipe = "wint2"\nwint4_layers = -1',
            "wint4_layers is -1, not a number of",
        ),
        ('[[target]]\nrepo = "a/b"\nrecipe = "wint2"\ntp = 17', "[[target]] 1: tp is 17"),
        ('[[target]]\nrepo = "a/b"\nrecipe = "wint2"\ntp = true', "[[target]] 1: tp is True, not a whole number"),
        (
            '[[target]]\nrepo = "a/b"\nrecipe = "wint4"\nscale = "best"',
            "codec rtn: scale is 'best', not mse or absmax",
        ),
        ('[[target]]\nrepo = "a/b"\nrecipe = "pt"\ncopy = "*.pdf"', "[[target]] 1: copy is '*.pdf', not a list of patterns"),
        ('[[target]]\nrepo = "a/b"\nrecipe = "pt"\ncopy = [1]', "[[target]] 1: copy is [1], not a list of patterns"),
        ('[[target]]\nrepo = "a/b"\nrecipe = "pt"\nrevision = "a b"', "[[target]] 1: revision 'a b' is no name of a branch"),
        ("[limits]\nmax_hours = nan", "[limits]: max_hours is nan, not a number above 0"),
        ('[limits]\ndisk_budget = "1e999GB"', "[limits]: disk_budget: '1e999GB' is not a size"),
        (
            '[source]\nrepo = "folder"\n[limits]\ndisk_budget = "5GB"',
            "[limits]: disk_budget is for a source on a hub; folder is a folder, leave it out",
        ),
        ('[source]\nrepo = "hf://a/b"\nfollow_links = true', "[source]: follow_links is for a folder; hf://a/b is on a hub"),
        ('[source]\nrepo = "folder"\nfollow_links = "yes"', "[source]: follow_links is 'yes', not true or false"),
        ("[limits]\nno_space_check = 1", "[limits]: no_space_check is 1, not true or false"),
        ('[[target]]\nrepo = "a/b"\nrecipe = "pt"\nallow_odd_values = 1', "allow_odd_values is 1, not true or false"),
        ("limits = 5", "[limits]: is not a table"),
        ("[source", "is not valid TOML"),
    ],
)
def test_mistakes_are_named(text: str, expected: str, tmp_path: Path) -> None:
    assert any(expected in mistake for mistake in mistakes(tmp_path, text))


def test_a_job_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read: No such file"):
        read_job(tmp_path / "none.toml")


OPTIONS = {
    "pt": "",
    "paddle": "",
    "wint4": 'group_size = "channel"\nscale = "absmax"\nmtp = true\nkeep_unfit = true\nruntime = "transformers"',
    "wint8": "group_size = 64",
    "fp8": "experts_only = true",
    "mxfp4": "experts_only = true",
    "nvfp4": 'activations = "fp4"\n[target.calibration]\ntext = "auto"',
    "gguf": 'type = "Q8_0"\npure = true',
    "wint2": 'wint4_layers = 0\neffort = 1\nscale = "absmax"\ntp = 2',
    "w4a8": 'hadamard_block_size = 256\ntp = 2\n[target.calibration]\ntext = "auto"',
}


@pytest.mark.parametrize("name", KINDS)
def test_every_recipe_can_be_asked_for_with_its_options(name: str, tmp_path: Path) -> None:
    target = f'[[target]]\nrepo = "me/tiny"\nrecipe = "{name}"\n{OPTIONS[name]}\n'
    (found,) = read_job(job_file(tmp_path, target)).targets
    assert (found.scheme, found.repo, found.private, found.tag) == ("hf", "me/tiny", None, False)
    assert found.runtime == {
        "paddle": "fastdeploy",
        "wint2": "fastdeploy",
        "w4a8": "fastdeploy",
        "wint4": "transformers",
        "gguf": "llama_cpp",
    }.get(name, "vllm")
    assert found.recipe.name == {"pt": "keep", "paddle": "keep", "gguf": "Q8_0"}.get(name, name)
    codecs = [rule.codec.describe() for rule in found.recipe.rules]
    assert codecs[0:1] == {
        "wint4": ["int4, per channel, absmax"],
        "wint8": ["int8, group 64, mse"],
        "fp8": ["fp8, blocks 128x128"],
        "mxfp4": ["mxfp4, group 32"],
        "nvfp4": ["nvfp4, group 16, fp4 inputs"],
        "wint2": ["wint2 (CCQ), effort 1"],
    }.get(name, [])


@pytest.mark.parametrize(("runtime", "expected"), [("vllm", ""), ("transformers", "[[target]] 1: activations: unknown")])
def test_int4_for_inputs_in_float8_is_asked_for_as_on_the_command_line(runtime: str, expected: str, tmp_path: Path) -> None:
    target = f'[[target]]\nrepo = "me/tiny"\nrecipe = "wint4"\nactivations = "fp8"\nruntime = "{runtime}"\n'
    if expected:
        assert any(expected in mistake for mistake in mistakes(tmp_path, target))
        return
    (found,) = read_job(job_file(tmp_path, target)).targets
    assert found.recipe.rules[0].codec.describe() == "int4, group 128, fp8 inputs, mse"


def test_all_the_rest_of_a_job_file(tmp_path: Path) -> None:
    rules = '[[target.rule]]\nrole = "experts"\ncodec = "rtn"\nbits = 4\n[[target.rule]]\nmatch = "mlp"\ncodec = "fp8"\n'
    target = f'[[target]]\nrepo = "hf://me/tiny"\nrevision = "next"\nprivate = false\ntag = true\nkeep_unfit = true\n{rules}'
    container = '[[target]]\nrepo = "me/fd"\nrecipe = "wint4"\nruntime = "fastdeploy"\ntp = 4\nmax_shard_size = "2GiB"\n'
    container += 'copy = ["figures", "*.pdf"]\n'
    more = '[limits]\ndisk_budget = "60GB"\nmax_hours = 7.5\n'
    job = read_job(job_file(tmp_path, target, container, source=f'{ADDRESS}"\nrevision = "v1', more=more))
    first, second = job.targets
    assert (job.source, job.disk_budget, job.max_hours) == (f"{ADDRESS}@v1", 60 * 10**9, 7.5)
    assert (first.revision, first.private, first.tag, first.recipe.keep_unfit) == ("next", False, True, True)
    assert first.folder.endswith("me--tiny@next")
    assert [r.codec.describe() for r in first.recipe.rules] == ["int4, group 128, mse", "fp8, blocks 128x128"]
    assert (second.runtime, second.tp, second.shard_bytes) == ("fastdeploy", 4, 2 << 30)
    assert (first.copy, second.copy) == ((), ("figures", "*.pdf"))
    assert read_job(job_file(tmp_path, PT)) == Job(ADDRESS, read_job(job_file(tmp_path, PT)).targets, None, None)


def test_the_example_of_the_documentation_is_one(tmp_path: Path) -> None:
    from ernie_quant.nightly import job

    assert job.__doc__
    text = job.__doc__.partition("\n\n")[2]
    assert tomllib.loads(text)
    (tmp_path / "job.toml").write_text(text)
    assert read_job(tmp_path / "job.toml").targets[0].recipe.name == "wint4"


def test_check_only_looks(hub: LoopbackHub, command: Command, tmp_path: Path) -> None:
    hub.requests.clear()
    path = job_file(tmp_path, WINT4, PT)
    assert command("nightly", path, "--check", "--work", tmp_path / "work") == (0, f"{path}: 2 target(s), no mistakes\n", "")
    path.write_text("[source]")
    code, _, err = command("nightly", path, "--check")
    assert (code, len(err.splitlines())) == (1, 3)
    assert hub.requests == []
    assert not (tmp_path / "work").exists()
