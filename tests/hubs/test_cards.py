"""Model cards: hubs can read what stands at their top, and a shell what they say to type."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Command
from helpers.hub import LoopbackHub
from helpers.hubs import NAME, SOURCE, uploads
from helpers.models import copy, random_model
from helpers.nights import Night, manifest
from helpers.publishing import REPO, publish_to

from ernie_quant import runtimes
from ernie_quant.reporting import tables
from ernie_quant.result import card, front_matter
from ernie_quant.runtimes import Place, Spread

uploading = [uploads, pytest.mark.usefixtures("no_pictures", "waits")]


def loaded(hub: LoopbackHub, repo: str, folder: Path) -> Any:
    """The card of a repository, as the hub's own client reads it."""
    from huggingface_hub import ModelCard

    (folder / "card.md").write_bytes(hub.repo(repo).read("README.md"))
    return ModelCard.load(folder / "card.md")


# --- front matter ----------------------------------------------------------------------------------------------------


SPELLINGS = {
    "license: apache-2.0": "apache-2.0",
    "license: Apache-2.0": "apache-2.0",
    "license: 'apache-2.0' # free": "apache-2.0",
    'license: "Apache 2.0"': "apache-2.0",
    "licence: apache-2.0": "apache-2.0",
    "license:   apache-2.0   ": "apache-2.0",
    "license:\n- apache-2.0\n- MIT": ["apache-2.0", "mit"],
    "{license: apache-2.0}": "apache-2.0",
    "license: >-\n  apache-2.0": "apache-2.0",
}


@pytest.mark.parametrize("text", SPELLINGS)
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_licences_in_every_spelling(text: str, ends: str, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_bytes(f"---\n{text}\n---\n\n# Model\n".replace("\n", ends).encode())
    assert front_matter.of_source(readme) == {"license": SPELLINGS[text]}


def test_what_a_card_says_of_the_model_is_taken_over(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(
        "---\nlicense: other\nlicense_name: ernie\nlicense_link: LICENSE\nlanguage:\n- en\n- zh\npipeline_tag: text-generation\n"
        "tags: [ERNIE4.5, chat]\nlibrary_name: PaddlePaddle\nwidget: [{text: hi}]\n---\n# X\n"
    )
    assert front_matter.of_source(readme) == {
        "language": ["en", "zh"], "license": "other", "license_link": "LICENSE", "license_name": "ernie",
        "pipeline_tag": "text-generation", "tags": ["ERNIE4.5", "chat"],
    }  # fmt: skip


HOSTILE = [
    "no front matter at all", "---\nlicense: [\n---\n", "---\nlicense: {a: 1}\n---\n", "---\n- a\n- b\n---\n",
    "---\nlicense: 1\n---\n",
    "---\nlicense: !!python/object/apply:os.system ['true']\n---\n", "---\nlicense: \"a\\u0007b\"\n---\n", "---\n\x00\n---\n",
    f"---\nlicense: {'a' * 1000}\n---\n", "---\na: &a [x, x]\nb: &b [*a, *a]\nlicense: *b\n---\n",
    "---\n" + "[" * 5000 + "\n---\n",
    "---\nlicense: 2024-01-01\n---\n", "\xff\xfe", "",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_strangers_card_says_text_or_nothing(text: str, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert front_matter.of_source(readme) in ({}, {"license": []})


def test_a_source_with_a_card_passes_on_its_licence(tmp_path: Path, command: Command) -> None:
    from huggingface_hub import metadata_load

    source = copy(SOURCE, tmp_path / "src")
    (source / "README.md").write_text("---\nlicense: Apache-2.0\nlanguage: [en, zh]\n---\n# S\n")
    assert command("wint4", source, tmp_path / "out", "--group-size", 32)[0] == 0
    found = metadata_load(tmp_path / "out/README.md")
    assert found == {
        "language": ["en", "zh"], "license": "apache-2.0", "library_name": "transformers",
        "tags": ["ernie4.5", "ernie-quant", "wint4", "compressed-tensors", "vllm"],
    }  # fmt: skip


class TestPublished:
    pytestmark = uploading

    def test_a_nightly_card_shows_licence_base_model_and_library(self, hub: LoopbackHub, night: Night, tmp_path: Path) -> None:
        hub.put(NAME, {"README.md": b"---\nlicense: Apache-2.0\nlanguage:\n- en\n---\n# ERNIE\n"})
        wanted = '[[target]]\nrepo = "me/four"\nrecipe = "wint4"\ngroup_size = 32\nname = "ERNIE, 4 bits"\n'
        assert night(wanted).status == "published"
        data = loaded(hub, "me/four", tmp_path).data
        assert (data.license, data.language, data.library_name) == ("apache-2.0", ["en"], "transformers")
        assert (data.base_model, data.base_model_relation, data.model_name) == (NAME, "quantized", "ERNIE, 4 bits")
        assert {"ernie4.5", "vllm", "wint4"} <= set(data.tags)
        text = hub.repo("me/four").read("README.md").decode()
        assert "\n# ERNIE, 4 bits\n" in text
        assert f"\nernie-quant wint4 hf://{NAME} OUT --group-size 32\n" in text
        assert manifest(hub, "me/four")["command"] == f"ernie-quant wint4 hf://{NAME} OUT --group-size 32"
        assert night(wanted).status == "up-to-date"

    def test_a_folders_base_model_is_told(self, hub: LoopbackHub, out: Path, tmp_path: Path) -> None:
        publish_to(out)
        assert loaded(hub, REPO, tmp_path).data.base_model is None
        assert publish_to(out, base_model="baidu/ERNIE-4.5-21B-A3B-Paddle").status == "published"
        assert loaded(hub, REPO, tmp_path).data.base_model == "baidu/ERNIE-4.5-21B-A3B-Paddle"
        assert publish_to(out).status == "up-to-date"  # it belongs to the result now

    def test_the_command_line_tells_it_too(self, hub: LoopbackHub, out: Path, command: Command, tmp_path: Path) -> None:
        assert command("publish", out, REPO, "-q", "--base-model", "baidu/X", "--name", "A name: with 'signs'")[0] == 0
        data = loaded(hub, REPO, tmp_path).data
        assert (data.base_model, data.model_name) == ("baidu/X", "A name: with 'signs'")
        assert command("verify", out)[0] == 0


# --- what it says ----------------------------------------------------------------------------------------------------


def test_every_table_is_markdown(tmp_path: Path, command: Command) -> None:
    assert command("wint4", SOURCE, tmp_path / "out", "--group-size", 32)[0] == 0
    text = (tmp_path / "out/README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 20
    for block in re.split(r"\n(?!\|)", text):
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines() if line.startswith("|")}
        assert len(cells) <= 1, block
    assert {"## Error", "## Made from"} <= set(text.splitlines())
    assert "ernie-quant wint4 paddle OUT --group-size 32" in text


def test_names_of_strangers_stay_in_their_cells() -> None:
    line = tables.markdown(("a", "b"), [("x|y\n<script>[z](http://a)`*_", "1")]).splitlines()[-1]
    assert len(re.findall(r"(?<!\\)\|", line)) == 3
    assert not re.search(r"(?<!\\)[<>\[`*_]", line)


SAID = {"bytes_in": 1, "bytes_out": 1, "bits_per_weight": 4, "notes": [], "front_matter": {}, "tp_sizes": [1, 2, 4, 8]}
MADE = {
    "summary": SAID, "version": "1", "layout": "pt", "runtime": "vllm", "source_address": "", "source_name": "E",
    "source": {"revision": ""}, "recipe": {"name": "fp8", "rules": []}, "libraries": {}, "fingerprint": "f",
}  # fmt: skip


def test_commands_take_a_size_that_holds_the_model() -> None:
    gpus = {"24GiB": {"tensor": 16}, "80GiB": {"tensor": 8, "experts_whole": True}, "141GiB": {"tensor": 4}}
    text = card.readme({**MADE, "summary": {**SAID, "gpus": gpus}}, {}, (), Place("o/r", "hf"))
    assert "\nvllm serve o/r --tensor-parallel-size 8 --enable-expert-parallel\n" in text
    assert "## vLLM >= 0.13 on 8 x 80GiB" in text
    assert "| 80GiB | 8 | TP 8, EP |" in text


def test_a_model_for_larger_gpus_names_those() -> None:
    text = card.readme({**MADE, "summary": {**SAID, "gpus": {"141GiB": {"tensor": 4, "stages": 3}}}}, {}, (), Place("o/r", "hf"))
    assert "vllm serve o/r --tensor-parallel-size 4 --pipeline-parallel-size 3\n" in text
    assert "on 12 x 141GiB" in text


def test_a_manifest_of_an_earlier_release_has_numbers_only() -> None:
    old = {"80GiB": 4, "141GiB": 2}
    assert card.spreads_of({"gpus": old}) == {"80GiB": Spread(4), "141GiB": Spread(2)}
    assert "--tensor-parallel-size 4" in card.readme({**MADE, "summary": {**SAID, "gpus": old}}, {}, (), Place("o/r", "hf"))


# --- commands --------------------------------------------------------------------------------------------------------


QUANTIZED = {"quantization_config": {}, "num_nextn_predict_layers": 1, "gguf_file": "E-Q4_K_M-00001-of-00002.gguf"}


@pytest.mark.parametrize("hub", ["", "hf", "modelscope", "aistudio"])
@pytest.mark.parametrize("runtime", ["vllm", "transformers", "fastdeploy", "llama_cpp"])
def test_commands_name_the_hub_and_no_more_words_than_they_mean(runtime: str, hub: str) -> None:
    """Nothing after `#`, which an interactive zsh takes for arguments."""
    found = runtimes.find(runtime).commands(Place("org/it's", hub), QUANTIZED, Spread(2))
    assert found
    for _, line in found:
        words = shlex.split(line)
        assert "#" not in line
        assert any("org/it's" in word or "it's" in word for word in words)
        if hub and "--local-dir" not in words and "--local_dir" not in words:
            told = {"hf": True, "modelscope": "VLLM_USE_MODELSCOPE=True" in words or "FD_MODEL_SOURCE=MODELSCOPE" in words}
            assert told.get(hub, "FD_MODEL_SOURCE=AISTUDIO" in words), line


def test_fastdeploy_is_told_the_hub_and_a_path_of_the_draft_that_exists() -> None:
    plain, draft = runtimes.find("fastdeploy").commands(Place("org/model", "hf"), QUANTIZED, Spread(2))
    assert plain[1].startswith("FD_MODEL_SOURCE=HUGGINGFACE FD_USE_MACHETE=0 python -m fastdeploy")
    fetch, _, run = draft[1].partition(" && ")
    assert fetch == "hf download org/model --local-dir model"
    words = shlex.split(run)
    assert words[words.index("--model") + 1] == "model"
    assert json.loads(words[words.index("--speculative-config") + 1])["model"] == "model/mtp"


def test_llama_cpp_fetches_the_type_from_the_hub() -> None:
    ((_, line),) = runtimes.find("llama_cpp").commands(Place("org/model", "hf"), QUANTIZED, Spread())
    assert line == "llama-server -hf org/model:Q4_K_M --jinja"


# --- the command that made it ----------------------------------------------------------------------------------------


MAKERS = {
    "wint4": ("--experts-only", "--group-size", "32"),
    "wint8": ("--group-size", "channel", "--scale", "absmax", "--keep-unfit"),
    "fp8": ("--keep-unfit",),
    "gguf": ("--type", "Q8_0", "--pure", "--keep-unfit"),
    "convert": ("--to", "pt", "--max-shard-size", "100kB"),
}  # fmt: skip


@pytest.mark.parametrize("name", MAKERS)
def test_the_command_makes_the_same_bytes(name: str, tmp_path: Path, command: Command) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert command(name, SOURCE, first, *MAKERS[name])[0] == 0
    said = json.loads((first / "ernie-quant.json").read_text())
    words = shlex.split(said["command"])
    assert words[:4] == ["ernie-quant", name, "paddle", "OUT"]
    assert command(name, SOURCE, second, *words[4:])[0] == 0
    again = json.loads((second / "ernie-quant.json").read_text())
    assert again["files"].keys() == said["files"].keys()
    assert {n: e["sha256"] for n, e in again["files"].items()} | {"README.md": ""} == {
        n: e["sha256"] for n, e in said["files"].items()
    } | {"README.md": ""}
    assert again["command"] == said["command"]


def test_ranks_and_rules_of_ones_own_have_commands_too(tmp_path: Path, command: Command) -> None:
    source = random_model(
        tmp_path / "src", "paddle", "moe", hidden_size=256, head_dim=64, intermediate_size=256, moe_intermediate_size=256,
        moe_num_experts=4,
    )  # fmt: skip
    rules = tmp_path / "my rules.toml"
    rules.write_text('[[rule]]\nrole = "experts"\ncodec = "rtn"\nbits = 4\n')
    assert command("wint4", source, tmp_path / "tp", "--runtime", "fastdeploy", "--tp", 2)[0] == 0
    assert command("reshard", tmp_path / "tp", tmp_path / "one", "--tp", 1)[0] == 0
    assert command("dequantize", tmp_path / "one", tmp_path / "plain", "--to", "pt")[0] == 0
    assert command("quantize", source, tmp_path / "own", "--recipe", rules)[0] == 0

    def said(folder: str) -> str:
        return str(json.loads((tmp_path / folder / "ernie-quant.json").read_text())["command"])

    assert said("tp") == "ernie-quant wint4 src OUT --runtime fastdeploy --tp 2"
    assert said("one") == "ernie-quant reshard tp OUT --tp 1"
    assert said("plain") == "ernie-quant dequantize one OUT --to pt"
    assert said("own") == "ernie-quant quantize src OUT --recipe 'my rules.toml'"
