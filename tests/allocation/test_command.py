"""`allocate` from the command line to a result: recipes that fit, that are read again, and one line for what cannot be done."""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import Browser
from helpers.commands import Command, refusal
from helpers.models import GOLDEN, config, copy, invoke

from ernie_quant.planning import recipe as recipes
from ernie_quant.planning.make import make_plan
from ernie_quant.planning.units import units_of
from ernie_quant.sources import open_source

RUNTIMES = {"vllm": "vllm", "fastdeploy": "fastdeploy", "llama.cpp": "llama_cpp"}


@pytest.fixture(scope="module")
def kept(wide: Path, book: Path) -> dict[str, Path]:
    """Runtime -> what was measured for it."""
    found = {}
    for runtime in RUNTIMES:
        found[runtime] = wide.with_name(f"{runtime}.json")
        invoke("allocate", wide, "-o", wide.with_name("first.toml"), "--bits", 12, "--runtime", runtime, "--text", book,
               "--tokens", 512, "--sensitivity", found[runtime], "--quiet")  # fmt: skip
    return found


def made(wide: Path, kept: Path, runtime: str, out: Path, *size: object, text: Path) -> Any:
    options = ("--runtime", runtime, "--text", text, "--tokens", 512, "--sensitivity", kept, "--json", "--quiet")
    return json.loads(invoke("allocate", wide, "-o", out, *size, *options))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_from_a_size_to_a_result(runtime: str, wide: Path, book: Path, kept: dict[str, Path], tmp_path: Path) -> None:
    """The files are no larger than was asked for, verify believes them, and the recipe says why."""
    units = units_of(open_source(wide), RUNTIMES[runtime])
    size = (2 * units.least + units.most) // 3
    said = made(wide, kept[runtime], runtime, tmp_path / "recipe.toml", "--size", size, text=book)
    invoke("quantize", wide, tmp_path / "out", "--recipe", tmp_path / "recipe.toml", "--quiet")
    files = [*(tmp_path / "out").glob("*.safetensors"), *(tmp_path / "out").glob("*.gguf")]
    assert 0.5 * size < sum(file.stat().st_size for file in files) <= size
    invoke("verify", tmp_path / "out", "--against", wide, "--quiet")
    text = (tmp_path / "recipe.toml").read_text()
    assert f"Tensors: {said['bytes']} bytes" in text
    assert f"{said['predicted_kl']:.4g} nats per token" in text
    assert tomllib.loads(text)["runtime"] == RUNTIMES[runtime]
    assert said["predicted_kl"] <= min(
        [one["predicted_kl"] for one in said["uniform"].values() if one["bytes"] <= said["bytes"]], default=float("inf")
    )
    curve = said["curve"]
    assert [point["bytes"] for point in curve] == sorted(point["bytes"] for point in curve)
    assert all(a["predicted_kl"] > b["predicted_kl"] for a, b in itertools.pairwise(curve))
    assert (said["without_order_of_layers"] is not None) == (runtime == "fastdeploy")


def test_bits_are_those_of_all_tensors(wide: Path, book: Path, kept: dict[str, Path], tmp_path: Path) -> None:
    said = made(wide, kept["vllm"], "vllm", tmp_path / "recipe.toml", "--bits", 8.5, text=book)
    assert 7 < said["bits_per_weight"] <= 8.5


def test_gpus_have_room_for_it_and_for_a_sequence(wide: Path, book: Path, kept: dict[str, Path], tmp_path: Path) -> None:
    """The reserve of 3 GiB is most of these GPUs; with 1 MiB more or less the choice is another one."""
    units, found = units_of(open_source(wide), "vllm"), []
    for more in (0, 1):
        room = (units.least + units.most) // 2 + (more << 18)
        memory = int((room + (3 << 30)) / 0.9)
        size = ("--gpus", f"1 x {memory}B", "--max-model-len", 16)
        found.append(made(wide, kept["vllm"], "vllm", tmp_path / f"{more}.toml", *size, text=book)["bytes"])
    assert units.least <= found[0] < found[1] <= units.most


def test_gpus_without_room(wide: Path, book: Path, kept: dict[str, Path], tmp_path: Path, command: Command) -> None:
    options = ("--runtime", "vllm", "--text", book, "--tokens", 512, "--sensitivity", kept["vllm"], "--quiet")
    err = refusal(command, "allocate", wide, "-o", tmp_path / "r.toml", "--gpus", "1 x 3GiB", *options)
    assert "1 x 3GiB with a sequence of 32768 tokens (bf16 KV cache) is too little: with the fewest bits everywhere" in err
    assert not (tmp_path / "r.toml").exists()


def test_calibrated_recipes_name_their_text(model: Path, book: Path, tmp_path: Path) -> None:
    """Rules, the text as seen from the recipe, and a result whose codes look at it."""
    out = book.with_name("calibrated.toml")
    invoke("allocate", model, "-o", out, "--bits", 9.6, "--calibration", book, "--calibration-tokens", 512, "--method",
           "feedback", "--quiet")  # fmt: skip
    table = tomllib.loads(out.read_text())
    assert table["calibration"] == {"text": ["book.txt"], "tokens": 512, "seed": 0, "method": "feedback", "fit": False}
    invoke("quantize", model, tmp_path / "out", "--recipe", out, "--quiet")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["calibration"]["method"] == "feedback"
    plan = make_plan(open_source(model), runtime="vllm", recipe=recipes.read(out))
    assert open_source(tmp_path / "out").nbytes == plan.nbytes


def test_vision_experts_cost_what_those_for_text_do(book: Path, tmp_path: Path) -> None:
    from helpers.words import byte_tokenizer

    vl = byte_tokenizer(copy(GOLDEN / "vl/pt", tmp_path / "vl"))
    said = json.loads(invoke("allocate", vl, "-o", tmp_path / "r.toml", "--bits", 11, "--text", book, "--tokens", 512, "--json",
                             "--quiet"))  # fmt: skip
    assert any("experts for images are taken to cost what those for text do" in note for note in said["notes"])
    invoke("quantize", vl, tmp_path / "out", "--recipe", tmp_path / "r.toml", "--quiet")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--size", "1kB"), "1000 bytes of weight files is too little: with the fewest bits everywhere that vLLM takes"),
        (("--bits", "2"), "2 bits per weight is too little"),
        (("--bits", "9", "-o", "recipe.txt"), "recipe.txt: a recipe is a file that ends with .toml"),
        (("--bits", "9", "-o", "nowhere/recipe.toml"), "there is no folder nowhere"),
        (("--bits", "9", "--sensitivity", "nowhere/kept.json"), "nowhere/kept.json: there is no folder nowhere"),
        (("--bits", "9", "--runtime", "llama.cpp", "--calibration", "auto"), "llama.cpp's types look at no text"),
        (("--bits", "9", "--text", "nothing.txt"), "nothing.txt"),
    ],
)  # fmt: skip
def test_one_line_for_what_cannot_be_done(
    options: tuple[str, ...], expected: str, model: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ("allocate", model, *(options if "-o" in options else (*options, "-o", "recipe.toml")), "--quiet")
    assert expected in refusal(command, *line)
    assert list(tmp_path.iterdir()) == []


def test_what_was_evaluated_is_read_before_anything_long(model: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "e.json").write_text("{}")
    line = ("allocate", model, "-o", tmp_path / "r.toml", "--bits", 9, "--page", tmp_path / "p.html", "--achieved")
    assert "is no result of eval" in refusal(command, *line, tmp_path / "e.json", "--quiet")
    assert not (tmp_path / "r.toml").exists()


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--bits 9 --size 1GB",
        "--bits 9 --achieved x.json",
        "--bits 9 --page nowhere/p.html",
        "--bits 9 --calibration auto --text b",
        "--gpus 0xH100",
    ],
)
def test_questions_that_are_none(line: str, model: Path, tmp_path: Path, command: Command) -> None:
    code, out, err = command("allocate", model, "-o", tmp_path / "r.toml", *line.split())
    assert (code, out) == (2, "")
    assert "Traceback" not in err


def test_what_was_measured_is_of_one_model_and_program(
    wide: Path, model: Path, book: Path, kept: dict[str, Path], tmp_path: Path, command: Command
) -> None:
    line = ("-o", tmp_path / "r.toml", "--bits", 9, "--text", book, "--tokens", 512, "--quiet", "--sensitivity")
    assert "has the model" in refusal(command, "allocate", model, *line, kept["vllm"])
    assert "has the runtime vllm, not llama_cpp" in refusal(
        command, "allocate", wide, "--runtime", "llama.cpp", *line, kept["vllm"]
    )
    broken = tmp_path / "broken.json"
    for change in ({"format": "x"}, {"costs": {}}, {"gains": [1]}, {"source": None}):
        broken.write_text(json.dumps(json.loads(kept["vllm"].read_text()) | change))
        assert "broken.json" in refusal(command, "allocate", wide, *line, broken)
    broken.write_text("{")
    assert "broken.json: is not valid JSON" in refusal(command, "allocate", wide, *line, broken)


def test_a_quantized_source_is_refused(model: Path, tmp_path: Path, command: Command) -> None:
    invoke("wint4", model, tmp_path / "out", "--experts-only", "--group-size", 32, "--quiet")
    err = refusal(command, "allocate", tmp_path / "out", "-o", tmp_path / "r.toml", "--bits", 9, "--quiet")
    assert "quantized" in err
    assert not (tmp_path / "r.toml").exists()


def test_recipes_name_their_runtime(model: Path, tmp_path: Path, command: Command) -> None:
    rules = '[[rule]]\nrole = "experts"\ncodec = "q4_0"\n'
    (tmp_path / "r.toml").write_text(f'runtime = "llama_cpp"\n{rules}')
    invoke("quantize", model, tmp_path / "out", "--recipe", tmp_path / "r.toml", "--quiet")
    assert list((tmp_path / "out").glob("*.gguf"))
    (tmp_path / "r.toml").write_text(f'runtime = "tensorrt"\n{rules}')
    _, _, err = command("quantize", model, tmp_path / "out", "--recipe", tmp_path / "r.toml")
    assert "runtime is 'tensorrt', not fastdeploy, llama_cpp, transformers, vllm" in err


def test_a_container_by_rules_for_several_ranks(wide: Path, book: Path, kept: dict[str, Path], tmp_path: Path) -> None:
    """The same weights as those of the short command, from a recipe that allocate has written."""
    units = units_of(open_source(wide), "fastdeploy")
    size = units.least + units.free[0].options[1].nbytes - units.free[0].options[0].nbytes
    made(wide, kept["fastdeploy"], "fastdeploy", tmp_path / "r.toml", "--size", size + 100_000, text=book)
    invoke("quantize", wide, tmp_path / "rules", "--recipe", tmp_path / "r.toml", "--tp", 2, "--quiet")
    invoke("wint2", wide, tmp_path / "short", "--wint4-layers", 2, "--tp", 2, "--quiet")
    assert config(tmp_path / "rules") == config(tmp_path / "short")
    for file in (tmp_path / "short").rglob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "rules" / file.relative_to(tmp_path / "short")).read_bytes()


def test_nightly_takes_the_file(model: Path, book: Path, tmp_path: Path) -> None:
    from ernie_quant.nightly.job import read_job

    (tmp_path / "r.toml").write_text('runtime = "llama_cpp"\n[[rule]]\nrole = "experts"\ncodec = "q4_0"\n')
    target = '[[target]]\nrepo = "me/x"\nrecipe = "r.toml"\n'
    (tmp_path / "job.toml").write_text(f'[source]\nrepo = "{model}"\n{target}')
    (found,) = read_job(tmp_path / "job.toml").targets
    assert (found.runtime, found.recipe.name, len(found.recipe.rules)) == ("llama_cpp", "r", 1)


def test_the_page(wide: Path, book: Path, kept: dict[str, Path], tmp_path: Path, browser: Browser) -> None:
    """A curve, what was evaluated, and the choice; nothing is fetched, and no script fails."""
    units = units_of(open_source(wide), "vllm")
    size = ("--size", (units.least + units.most) // 2)
    made(wide, kept["vllm"], "vllm", tmp_path / "r.toml", *size, text=book)
    invoke("quantize", wide, tmp_path / "out", "--recipe", tmp_path / "r.toml", "--quiet")
    invoke("eval", tmp_path / "out", "--against", wide, "--text", book, "--tokens", 511, "--save", tmp_path / "e.json", "--quiet")
    made(wide, kept["vllm"], "vllm", tmp_path / "r.toml", *size, "--page", tmp_path / "p.html", "--achieved", tmp_path / "e.json",
         text=book)  # fmt: skip
    (found,) = re.findall(
        r'<script id="data" type="application/json">(.*?)</script>', (tmp_path / "p.html").read_text(), re.DOTALL
    )
    data = json.loads(found)
    assert data["rows"][0]["kind"] == "chosen"
    (achieved,) = [row for row in data["rows"] if row["kind"] == "achieved"]
    assert achieved["bytes"] == open_source(tmp_path / "out").nbytes
    browser.open(tmp_path / "p.html")
    assert browser.complaints() == []
    assert browser.js("document.querySelectorAll('svg').length") == 2
    assert browser.js("document.querySelectorAll('#curve .dot').length") == len(data["rows"])
    assert browser.js("document.querySelectorAll('#groups tbody tr').length") == len(data["groups"])
    browser.screenshot("allocation")


def test_the_library_does_the_same(wide: Path, book: Path, kept: dict[str, Path], tmp_path: Path) -> None:
    import ernie_quant

    said = made(wide, kept["vllm"], "vllm", tmp_path / "r.toml", "--bits", 9, text=book)
    asked = {"text": [book], "tokens": 512, "sensitivity": kept["vllm"]}
    found = ernie_quant.allocate(wide, tmp_path / "r.toml", bits=9, **asked)
    assert json.loads(json.dumps(found)) == said
    with pytest.raises(ValueError, match="one of them"):
        ernie_quant.allocate(wide, tmp_path / "r.toml", **asked)
