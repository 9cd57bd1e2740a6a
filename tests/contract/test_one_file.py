"""A plug-in is one file: each kind is added here from a temporary folder, and used as a user would use it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.models import random_model, same, tensors
from helpers.synthetic import golden, write_model, write_safetensors

from ernie_quant import archs, codecs, hubs, plugins, publish, readers, runners, runtimes, writers
from ernie_quant.planning import recipe
from ernie_quant.planning.make import make_plan
from ernie_quant.readers import read_header
from ernie_quant.run.whole import run_plan
from ernie_quant.runtimes import _sharing
from ernie_quant.sources import open_source
from ernie_quant.views.build import leaf
from ernie_quant.weights import layouts

EXAMPLES = Path(__file__).parent / "examples"
Add = Callable[..., ModuleType]
WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_hidden_layers": 2, "moe_num_experts": 3}
WIDTHS |= {"moe_layer_end_index": 1, "moe_num_shared_experts": 0}


def example(name: str) -> str:
    """The text of a plug-in in examples/."""
    return (EXAMPLES / Path(*name.split("."))).with_suffix(".py").read_text()


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Add]:
    """`add(codecs, "byinput")`: the example of that name in a folder of its own, which the package looks into as well."""
    loaded: list[str] = []

    def put(package: ModuleType, name: str, source: str = "") -> ModuleType:
        folder = tmp_path / "plugins" / package.__name__
        path = folder / Path(*name.split("."))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".py").write_text(source or example(name))
        if path.parent != folder:
            (path.parent / "__init__.py").touch()
        if str(folder) not in package.__path__:
            monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        plugins.known.cache_clear()
        loaded.append(f"{package.__name__}.{name}")
        return plugins.load(package, name)

    yield put
    for name in [n for n in sys.modules if any(n == m or m.startswith(f"{n}.") for m in loaded) and n in loaded]:
        package, _, last = name.rpartition(".")
        sys.modules.pop(name)
        if package in sys.modules and hasattr(sys.modules[package], last):
            delattr(sys.modules[package], last)
    monkeypatch.undo()
    plugins.known.cache_clear()


def boxes(path: Path) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """What a .box file holds: name -> shape and bytes."""
    raw = path.read_bytes()
    head = raw[: raw.index(b"\n\n") + 2]
    found, at = {}, len(head)
    for line in head.decode().splitlines()[1:-1]:
        name, dtype, shape = line.split(" ")
        dims = tuple(map(int, filter(None, shape.split(","))))
        at += -at % 32
        nbytes = torch.Size(dims).numel() * {"I8": 1, "BF16": 2, "F32": 4}[dtype]
        found[name], at = (dims, raw[at : at + nbytes]), at + nbytes
    assert len(raw) == at + -at % 32
    return found


def test_a_codec_with_statistics_a_runtime_of_stacks_a_format_and_a_runner(
    add: Add, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four new files and a recipe: experts that are weighed by their inputs, all of a layer in one tensor of a new format."""
    add(codecs, "byinput")
    add(runtimes, "boxer")
    add(writers, "box")
    add(runners, "backwards")
    monkeypatch.setattr("ernie_quant.views.read.SLAB_BYTES", 1000)  # many slabs of one weight
    source = open_source(random_model(tmp_path / "src", layouts.PADDLE, **WIDTHS))
    plain = {name: t.float() for name, t in tensors(converted(tmp_path / "src", tmp_path / "pt")).items()}
    experts = sorted(name for name in plain if ".experts." in name)
    assert len(experts) == 9

    generator = torch.Generator().manual_seed(3)
    inputs = {name: torch.rand(plain[name].shape[1], generator=generator) + 0.5 for name in experts}
    statistics_file = write_safetensors(tmp_path / "statistics.safetensors", inputs)
    statistics = {ref.name: {"max_input": leaf(ref)} for ref in read_header(statistics_file)}
    rules = recipe.of_rules("weighed", [{"role": "experts", "codec": "byinput"}])
    plan = make_plan(source, runtime="boxer", recipe=rules, statistics=statistics, shard_bytes=40_000)
    assert len(plan.shards) > 2
    assert plan.tp_sizes == (1, 2, 4)
    result = run_plan(plan, tmp_path / "out", runner=runners.find("backwards"), workers=3)

    files = sorted((tmp_path / "out").glob("*.box"))
    assert [f.name for f in files] == [shard.filename for shard in plan.shards]
    stored = {name: value for file in files for name, value in boxes(file).items()}
    reports = {row.name: row for row in result.reports}
    for projection in ("gate_proj", "up_proj", "down_proj"):
        stack = f"model.layers.1.mlp.experts.{projection}"
        for number in range(3):
            name = f"model.layers.1.mlp.experts.{number}.{projection}.weight"
            weight, of_input = plain[name], inputs[name].sqrt()
            scale = (weight * of_input).abs().amax(1) / 127
            codes = (weight * of_input / scale[:, None]).round().to(torch.int8)
            for part, expected in (("codes", codes.t()), ("scale", scale), ("of_input", of_input)):
                shape, data = stored[f"{stack}.{part}"]
                size = len(data) // 3
                assert shape == (3, *expected.shape)
                assert data[number * size :][:size] == expected.contiguous().view(torch.uint8).numpy().tobytes(), (name, part)
            decoded = (codes.float() * scale[:, None] / of_input).bfloat16().float()
            error = float((weight - decoded).square().sum() / weight.square().sum())
            assert reports[name].rel_error == pytest.approx(error, rel=1e-6)
            assert reports[name].bytes == weight.numel() + 4 * sum(weight.shape)  # its own share of the stack
    assert {name for name in stored if ".experts." not in name} == plain.keys() - set(experts)

    run_plan(plan, tmp_path / "again", workers=1)
    assert [f.read_bytes() for f in files] == [(tmp_path / "again" / f.name).read_bytes() for f in files]


def converted(source: Path, out: Path) -> Path:
    """The same weights under their PT names."""
    run_plan(make_plan(open_source(source), runtime="vllm"), out)
    return out


def test_a_runtime_is_a_choice_of_the_commands_whose_recipes_it_stores(add: Add) -> None:
    add(runtimes, "boxer", example("boxer").replace('("pt",)', '("pt", "wint4")'))
    from ernie_quant.planning import built_in

    assert built_in.known_runtimes("wint4") == ("vllm", "boxer", "fastdeploy", "transformers")
    assert "boxer" not in built_in.known_runtimes("wint8")
    assert plugins.name_of(runtimes.recognize({"quant_method": "by input"}), runtimes) == "boxer"


def test_an_architecture(add: Add, tmp_path: Path) -> None:
    """A decoder of MLPs alone: known by its model_type, converted there and back, quantized, shared."""
    add(archs, "next")
    sizes = {"hidden_size": 64, "intermediate_size": 256, "vocab_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    stored = {"ernie.embed.weight": (32, 64), "ernie.norm.weight": (64,)}
    for i in range(2):
        stored |= {f"ernie.layers.{i}.mix.up_gate_proj.weight": (64, 512), f"ernie.layers.{i}.mix.down_proj.weight": (256, 64)}
    torch.manual_seed(5)
    weights = {name: torch.randn(shape).mul(0.02).bfloat16() for name, shape in stored.items()}
    source = write_model(tmp_path / "src", {"model_type": "ernie_next", **sizes}, weights)
    pt = tensors(converted(source, tmp_path / "pt"))
    assert torch.equal(pt["model.layers.1.mix.up_proj.weight"], weights["ernie.layers.1.mix.up_gate_proj.weight"].t()[256:])
    run_plan(make_plan(open_source(tmp_path / "pt"), runtime="fastdeploy"), tmp_path / "back")
    assert same(tensors(tmp_path / "back"), weights) == []
    rules = recipe.of_rules("w4", [{"role": "mlp", "codec": "rtn", "group_size": 64}])
    plan = make_plan(open_source(source), runtime="vllm", recipe=rules)
    assert plan.tp_sizes == (1, 2)  # 4 heads; 256 inputs, of which a rank must have a multiple of 128
    assert plan.config["quantization_config"]["config_groups"]["group_0"]["targets"]


def test_a_hub(add: Add, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source by its address, and a place to publish to; from one to the other and back."""
    add(hubs, "shelf.read")
    add(hubs, "shelf.publish")
    monkeypatch.setenv("SHELF", str(tmp_path / "shelf"))
    monkeypatch.setenv("ERNIE_QUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ernie_quant.publish.files._pictures", lambda report: {})
    config, weights = golden("moe", "pt")
    write_model(tmp_path / "shelf/org/moe/abc", config, weights, shards=3)
    (tmp_path / "shelf/org/moe/main").write_text("abc")

    source = open_source("shelf://org/moe")
    assert (source.revision, source.title) == ("abc", "moe")
    rules = recipe.of_rules("w4", [{"role": "experts", "codec": "rtn", "group_size": 32}])
    run_plan(make_plan(source, runtime="vllm", recipe=rules), tmp_path / "out")
    done = publish.publish(tmp_path / "out", hubs.publisher("shelf"), publish.Destination("me/moe-w4", tag="v1"))
    assert (done.status, done.commit) == ("published", "1")
    again = open_source("shelf://me/moe-w4@v1")
    assert again.config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert json.loads((tmp_path / "shelf/me/moe-w4/1/ernie-quant.json").read_text())["source_address"] == "shelf://org/moe"


def test_a_reader(add: Add, tmp_path: Path) -> None:
    """A weight file of another ending: its reader says where the tensors lie."""
    add(
        readers,
        "raw",
        "from ernie_quant.checkpoint import Extent, TensorRef, TensorSpec\n"
        "SUFFIXES = ('.raw',)\n"
        "def read_header(path):\n"
        "    return [TensorRef('t', TensorSpec((2,), 'F32'), path, (Extent(0, 8),))]\n",
    )
    readers.by_suffix.cache_clear()
    (tmp_path / "x.raw").write_bytes(bytes(8))
    try:
        assert [ref.name for ref in read_header(tmp_path / "x.raw")] == ["t"]
    finally:
        readers.by_suffix.cache_clear()


def test_without_the_file_nothing_of_it_is_left() -> None:
    assert "boxer" not in plugins.names(runtimes)
    assert "shelf" not in hubs.schemes()
    assert _sharing.TP_SIZES[0] == 1
