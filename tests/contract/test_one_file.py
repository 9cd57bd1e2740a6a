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
from ernie_quant.plan import recipe
from ernie_quant.plan.make import make_plan
from ernie_quant.readers import read_header
from ernie_quant.run.whole import run_plan
from ernie_quant.runtimes import _sharing
from ernie_quant.sources import open_source
from ernie_quant.views.build import leaf
from ernie_quant.weights import layouts

Add = Callable[[ModuleType, str, str], ModuleType]
WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_hidden_layers": 2, "moe_num_experts": 3}
WIDTHS |= {"moe_layer_end_index": 1, "moe_num_shared_experts": 0}


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Add]:
    """`add(codecs, "tenth", source)`: a file in a folder of its own, which the package looks into as well."""
    loaded: list[str] = []

    def put(package: ModuleType, name: str, source: str) -> ModuleType:
        folder = tmp_path / "plugins" / package.__name__
        path = folder / Path(*name.split("."))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".py").write_text(source)
        if path.parent != folder:
            (path.parent / "__init__.py").touch()
        if str(folder) not in package.__path__:
            monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        plugins.names.cache_clear()
        loaded.append(f"{package.__name__}.{name}")
        return plugins.load(package, name)

    yield put
    for name in [n for n in sys.modules if any(n == m or m.startswith(f"{n}.") for m in loaded) and n in loaded]:
        package, _, last = name.rpartition(".")
        sys.modules.pop(name)
        if package in sys.modules and hasattr(sys.modules[package], last):
            delattr(sys.modules[package], last)
    monkeypatch.undo()
    plugins.names.cache_clear()


# A codec that needs statistics: inputs that are often large get finer codes, w ~ code * scale / weight_of_input.
CODEC = """
from dataclasses import dataclass

import torch

from ernie_quant.checkpoint import TensorSpec

@dataclass(frozen=True)
class Prepared:
    of_input: torch.Tensor

    @property
    def once(self):
        return {"of_input": self.of_input}

    def encode(self, weight):
        scaled = weight.float() * self.of_input
        scale = scaled.abs().amax(1, keepdim=True) / 127
        return {"codes": (scaled / scale).round().to(torch.int8), "scale": scale[:, 0]}

@dataclass(frozen=True)
class ByInput:
    rows, version, form = 1, 1, "int8 by input"

    def describe(self):
        return self.form

    def problem(self, spec):
        return None

    def specs(self, spec):
        return {"codes": TensorSpec(spec.shape, "I8"), "scale": TensorSpec(spec.shape[:1], "F32"),
                "of_input": TensorSpec(spec.shape[1:], "F32")}

    def bits_per_weight(self, spec):
        return 8 + 32 / spec.shape[1] + 32 / spec.shape[0]

    def prepare(self, spec, statistics):
        assert statistics["max_input"].shape == spec.shape[1:]
        return Prepared(statistics["max_input"].float().sqrt())

    def encode(self, weight):
        raise AssertionError("this codec cannot do without statistics")

    def decode(self, encoded):
        return (encoded["codes"].float() * encoded["scale"][:, None] / encoded["of_input"]).bfloat16()

    def recode(self, weight, encoded):
        return encoded | {"codes": (weight.float() * encoded["of_input"] / encoded["scale"][:, None]).round().to(torch.int8)}

CODEC = ByInput
EXAMPLES = ()
"""

# A runtime that wants all experts of a layer in one tensor, in a file format of its own
RUNTIME = """
import re
from collections.abc import Sequence

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs.keep import Keep
from ernie_quant.runtimes import Part, kept, vllm

LAYOUT, FORMAT, ROWS, CONFIG, RECIPES, PER_RANK, SPLITS_VOCABULARY = "pt", "box", 1, {}, ("pt",), False, False
CODECS = (Keep,)
EXPERT = re.compile(r"experts\\.(\\d+)\\.(\\w+)\\.weight$")
folder, layer_of, share_multiple, metadata = vllm.folder, vllm.layer_of, vllm.share_multiple, vllm.metadata

def recognizes(config):
    return config.get("quant_method") == "by input"

def where(name):
    found = EXPERT.search(name)
    return EXPERT.sub(rf"experts.{found[2]}", name), int(found[1])

def parts(name, codec, spec):
    if isinstance(codec, Keep):
        return {name: kept(spec)}
    (stack, number), (out, width) = where(name), spec.shape
    return {
        f"{stack}.codes": Part(TensorSpec((width, out), "I8"), 1, 0, index=number),
        f"{stack}.scale": Part(TensorSpec((out,), "F32"), 0, None, index=number),
        f"{stack}.of_input": Part(TensorSpec((width,), "F32"), None, 0, index=number),
    }

def constants(name, codec, spec, once):
    return {} if isinstance(codec, Keep) else {f"{where(name)[0]}.of_input": once["of_input"]}

def pack(name, codec, encoded):
    if isinstance(codec, Keep):
        return {name: encoded["weight"]}
    stack, _ = where(name)
    return {f"{stack}.codes": encoded["codes"].t().contiguous(), f"{stack}.scale": encoded["scale"]}

def problems(linears):
    return []

unsupported = notes = problems

def quantization_config(linears):
    return {"quant_method": "by input"} if any(not isinstance(li.codec, Keep) for li in linears) else None

def codecs_of(config, linears):
    from ernie_quant.codecs import make
    from ernie_quant.codecs.keep import KEEP
    return {name: make("byinput", {}) if EXPERT.search(name) else KEEP for name, _ in linears}

def commands(out, config, tp):
    return [("boxer", f"boxer {out}")]
"""

# A file format whose tensors begin at multiples of 32, behind a header of lines
FORMAT = """
from ernie_quant.writers import FileLayout

EXTENSION, INDEX = ".box", ""

def order(specs):
    return dict(sorted(specs.items()))

def lay_out(specs, metadata):
    lines = [f"{name} {spec.dtype} {','.join(map(str, spec.shape))}" for name, spec in specs.items()]
    head = "\\n".join(["BOX", *lines, "", ""]).encode()
    starts, at = {}, len(head)
    for name, spec in specs.items():
        at += -at % 32
        starts[name], at = at, at + spec.nbytes
    return FileLayout(head, starts, at + -at % 32)
"""

# A runner that begins with the last file
RUNNER = """
def map_jobs(work, jobs, progress, download):
    results = {}
    for number, job in reversed(list(enumerate(jobs))):
        results[number] = work(job, progress=progress, download=download)
        download.done(number)
    for number in range(len(jobs)):
        yield results[number]
"""


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
    add(codecs, "byinput", CODEC)
    add(runtimes, "boxer", RUNTIME)
    add(writers, "box", FORMAT)
    add(runners, "backwards", RUNNER)
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
    result = run_plan(plan, tmp_path / "out", runner="backwards", workers=3)

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

    run_plan(plan, tmp_path / "again", runner="local", workers=1)
    assert [f.read_bytes() for f in files] == [(tmp_path / "again" / f.name).read_bytes() for f in files]


def converted(source: Path, out: Path) -> Path:
    """The same weights under their PT names."""
    run_plan(make_plan(open_source(source), runtime="vllm"), out)
    return out


def test_a_runtime_is_a_choice_of_the_commands_whose_recipes_it_stores(add: Add) -> None:
    add(runtimes, "boxer", RUNTIME.replace('("pt",)', '("pt", "wint4")'))
    from ernie_quant.plan import built_in

    assert built_in.known_runtimes("wint4") == ("vllm", "boxer", "fastdeploy", "transformers")
    assert "boxer" not in built_in.known_runtimes("wint8")
    assert runtimes.name_of(runtimes.recognize({"quant_method": "by input"})) == "boxer"


ARCH = """
from ernie_quant.archs import ernie4_5
from ernie_quant.names import COPY, EMBED, HEAD, IN, MLP, NORM, OUT, TRANSPOSE, NameMap, Op, Rule

MODEL_TYPES = ("ernie_next",)
RULES = (
    Rule("ernie.embed.weight", COPY, ("model.embed.weight",), ("V", "H"), EMBED, OUT),
    Rule("ernie.layers.{layer}.mix.up_gate_proj.weight", Op(True, ("I", "I")),
         ("model.layers.{layer}.mix.gate_proj.weight", "model.layers.{layer}.mix.up_proj.weight"), ("I", "H"), MLP, OUT),
    Rule("ernie.layers.{layer}.mix.down_proj.weight", TRANSPOSE,
         ("model.layers.{layer}.mix.down_proj.weight",), ("H", "I"), MLP, IN),
    Rule("ernie.norm.weight", COPY, ("model.norm.weight",), ("H",), NORM),
)

def flat(config):
    return config

def name_map(config, names):
    dims = {"H": config["hidden_size"], "I": config["intermediate_size"], "V": config["vocab_size"], "Q": 64, "kv_heads": 2}
    return NameMap(RULES, {"layer": range(config["num_hidden_layers"])}, dims)

config_for = ernie4_5.config_for
"""


def test_an_architecture(add: Add, tmp_path: Path) -> None:
    """A decoder of MLPs alone: known by its model_type, converted there and back, quantized, shared."""
    add(archs, "next", ARCH)
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
    assert plan.tp_sizes == (1, 2, 4)  # 4 heads; 256 inputs in groups of 64
    assert plan.config["quantization_config"]["config_groups"]["group_0"]["targets"]


# A hub that is a folder: HUB/ORG/NAME/COMMIT/files; the branch is the file HUB/ORG/NAME/main
READ = """
import hashlib, os
from contextlib import contextmanager
from pathlib import Path

from ernie_quant.hubs import Listing, RemoteFile

def root():
    return Path(os.environ["SHELF"])

def files_of(repo, commit):
    folder = root() / repo / commit
    paths = [p for p in folder.rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): RemoteFile(p.relative_to(folder).as_posix(), p.stat().st_size,
            hashlib.sha256(p.read_bytes()).hexdigest()) for p in paths}

class Shelf:
    def listing(self, repo, revision):
        commit = (root() / repo / (revision or "main")).read_text()
        return Listing(f"shelf://{repo}", repo, commit, files_of(repo, commit))

    @contextmanager
    def read(self, listing, name, start, stop):
        yield iter([(root() / listing.repo / listing.commit / name).read_bytes()[start:stop]])

connect = Shelf
"""
PUBLISH = """
import shutil

from ernie_quant.hubs import Head
from ernie_quant.hubs.shelf.read import files_of, root

DEFAULT_BRANCH = "main"

class Publisher:
    default_branch, pull_requests = DEFAULT_BRANCH, False

    def is_private(self, repo):
        return True if (root() / repo).is_dir() else None

    def create(self, repo, *, private):
        (root() / repo / "0").mkdir(parents=True)
        (root() / repo / "main").write_text("0")

    def head(self, repo, revision):
        place = root() / repo / revision
        if place.is_dir():
            return Head(revision, files_of(repo, revision))
        return Head(place.read_text(), files_of(repo, place.read_text())) if place.is_file() else None

    def fetch(self, repo, commit, name):
        return (root() / repo / commit / name).read_bytes()

    def upload(self, repo, revision, file):
        return False

    def commit(self, repo, revision, parent, files, drop, message, pr):
        new = str(int(parent) + 1)
        shutil.copytree(root() / repo / parent, root() / repo / new)
        for file in files:
            target = root() / repo / new / file.name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file.path, target)
        (root() / repo / revision).write_text(new)
        return new

    def tag(self, repo, name, commit):
        (root() / repo / name).write_text(commit)

connect = Publisher
"""


def test_a_hub(add: Add, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source by its address, and a place to publish to; from one to the other and back."""
    add(hubs, "shelf.read", READ)
    add(hubs, "shelf.publish", PUBLISH)
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
