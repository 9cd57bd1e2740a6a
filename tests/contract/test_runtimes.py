"""Every runtime keeps every promise of `runtimes`: what it writes, it can read back, and config.json tells the truth."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.hessians import once_of
from helpers.models import GOLDEN

from ernie_quant import codecs, names, plugins, runtimes
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import Codec, of_text
from ernie_quant.codecs.ccq import ConvolutionalCode
from ernie_quant.codecs.keep import KEEP
from ernie_quant.dtypes import dtype_name
from ernie_quant.errors import ErnieQuantError, PlanError
from ernie_quant.planning import built_in, recipe
from ernie_quant.planning.make import make_plan
from ernie_quant.planning.steps import Plan
from ernie_quant.runtimes import Linear, Part, Place, Spread, fastdeploy, llama_cpp
from ernie_quant.sources import open_source
from ernie_quant.weights import layouts

RUNTIMES = plugins.modules(runtimes)
# the forms of FastDeploy's container stand beside every codec's own examples
CODECS = [example for module in plugins.modules(codecs) for example in module.EXAMPLES] + [fastdeploy.WINT4, fastdeploy.WINT8]
MAKE_GEOMETRY = Path(__file__).parents[2] / "benchmarks/make_geometry.py"
FAMILIES = ("dense", "moe", "moe_mtp", "vl")
SPEC = TensorSpec((256, 768), "BF16")

# an expert, and a linear that is none: FastDeploy's container has different forms for the two
NAMES = {
    layouts.PT.name: {
        names.EXPERT: "model.layers.1.mlp.experts.0.up_proj.weight",
        names.ATTENTION: "model.layers.1.self_attn.o_proj.weight",
    },
    layouts.GGUF.name: {
        names.EXPERT: "model.layers.1.mlp.experts.0.up_proj.weight",
        names.ATTENTION: "model.layers.1.self_attn.o_proj.weight",
    },
    layouts.PADDLE.name: {
        names.EXPERT: "ernie.layers.1.mlp.experts.0.up_gate_proj.weight",
        names.ATTENTION: "ernie.layers.1.self_attn.o_proj.weight",
    },
}


@pytest.fixture(params=RUNTIMES, ids=lambda module: module.__name__.rpartition(".")[2])
def runtime(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


def linears(runtime: ModuleType, codec: Codec) -> list[Linear]:
    """One of each role."""
    return [Linear(name, SPEC, role, codec, names.OUT) for role, name in NAMES[runtime.LAYOUT].items()]


def taken(runtime: ModuleType, codec: Codec) -> list[str]:
    """Names of the linears that the runtime loads in this form."""
    return [li.name for li in linears(runtime, codec) if isinstance(codec, runtime.CODECS) and not runtime.problems([li])]


def takes(runtime: ModuleType, codec: Codec) -> bool:
    return bool(taken(runtime, codec))


def form(codec: Codec) -> str:
    """What a file shows of a codec: not which codes it does without."""
    return re.sub(r" \(-\d+ to \d+\)", "", codec.form)


def short(value: ModuleType | Codec) -> str:
    return value.__name__.rpartition(".")[2] if isinstance(value, ModuleType) else value.describe()


TAKEN = [(runtime, codec) for runtime in RUNTIMES for codec in CODECS if takes(runtime, codec)]
every_pair = pytest.mark.parametrize(("runtime", "codec"), TAKEN, ids=short)


def test_it_has_every_function_of_the_contract(runtime: ModuleType) -> None:
    assert runtime.LAYOUT in layouts.LAYOUTS
    promised = [name for name in vars(runtimes.Runtime) if not name.startswith("_")]
    assert len(promised) > 20
    assert [name for name in promised if not hasattr(runtime, name)] == []


def test_it_takes_kept_weights(runtime: ModuleType) -> None:
    assert takes(runtime, KEEP)
    name = "output_norm.weight" if runtime is llama_cpp else "model.norm.weight"
    assert runtime.parts("model.norm.weight", KEEP, TensorSpec((64,), "F32")) == {name: Part(TensorSpec((64,), "F32"))}
    assert runtime.quantization_config(linears(runtime, KEEP)) is None


@every_pair
def test_parts_constants_and_pack_agree(runtime: ModuleType, codec: Codec) -> None:
    weight = torch.randn(SPEC.shape, generator=torch.Generator().manual_seed(4)).mul(0.02).bfloat16()
    encoded = codec.encode(weight)
    name = taken(runtime, codec)[0]
    once = once_of(codec, SPEC)
    packed, constants = runtime.pack(name, codec, encoded), runtime.constants(name, codec, SPEC, once)
    assert packed.keys() & constants.keys() == set()
    stored = packed | constants
    specs = {part: TensorSpec(tuple(t.shape), dtype_name(t.dtype)) for part, t in stored.items()}
    assert specs == {n: part.spec.held for n, part in runtime.parts(name, codec, SPEC).items()}
    back = codec.decode(runtime.unpack(name, codec, stored))
    assert torch.equal(back.view(torch.int16), codec.decode(once | encoded).view(torch.int16))


@every_pair
def test_slabs_of_rows_pack_as_the_whole_does(runtime: ModuleType, codec: Codec) -> None:
    """A slab is a part of every stored tensor along its `out_axis`."""
    weight = torch.randn(SPEC.shape, generator=torch.Generator().manual_seed(4)).mul(0.02).bfloat16()
    name = taken(runtime, codec)[0]
    whole = runtime.pack(name, codec, codec.encode(weight))
    slabs = [runtime.pack(name, codec, codec.encode(weight[i : i + 128])) for i in (0, 128)]
    parts = runtime.parts(name, codec, SPEC)
    for part, tensor in whole.items():
        joined = torch.cat([s[part] for s in slabs], parts[part].out_axis)
        assert torch.equal(joined.view(torch.uint8), tensor.view(torch.uint8)), part


@every_pair
def test_parts_grow_along_the_axes_that_they_name(runtime: ModuleType, codec: Codec) -> None:
    """Twice the outputs or inputs: twice the tensor along that axis, and nothing else."""
    name = taken(runtime, codec)[0]
    once = runtime.parts(name, codec, SPEC)
    for axis, where in ((0, "out_axis"), (1, "in_axis")):
        shape = tuple(n * (2 if i == axis else 1) for i, n in enumerate(SPEC.shape))
        for part, more in runtime.parts(name, codec, TensorSpec(shape, SPEC.dtype)).items():
            grown = [i for i, (a, b) in enumerate(zip(once[part].spec.shape, more.spec.shape, strict=True)) if a != b]
            assert grown == ([] if getattr(once[part], where) is None else [getattr(once[part], where)]), (part, where)
            assert all(more.spec.shape[i] == 2 * once[part].spec.shape[i] for i in grown)


@every_pair
def test_every_part_belongs_to_one_weight(runtime: ModuleType, codec: Codec) -> None:
    name = taken(runtime, codec)[0]
    parts = list(runtime.parts(name, codec, SPEC))
    assert {runtime.weight_of(part)[0] for part in parts} <= {name, names.starred(name)}
    assert len({runtime.weight_of(part)[1] for part in parts}) == len(parts)


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.q_proj.bias", "model.layers.1.mlp.gate.weight_1", "lm_head.weight", "vision_model.ln.bias"]
)
def test_what_is_no_part_is_a_weight_of_its_own(runtime: ModuleType, name: str) -> None:
    assert runtime.weight_of(name)[0] == name


@pytest.mark.parametrize("codec", CODECS, ids=short)
def test_a_codec_it_cannot_load_is_refused_by_name_and_form(runtime: ModuleType, codec: Codec) -> None:
    for linear in linears(runtime, codec):
        problems = runtime.problems([linear])
        assert len(problems) == (linear.name not in taken(runtime, codec))
        assert all(line.startswith(f"{linear.name}: ") and codec.describe() in line for line in problems)


def plan_of(folder: Path, runtime: ModuleType, codec: Codec, *, experts_only: bool = False) -> Plan:
    rules = built_in.one_codec("test", codec, experts_only=experts_only, mtp=True, keep_unfit=False)
    if isinstance(codec, ConvolutionalCode):  # of experts, with other codecs beside them
        rules = built_in.make("wint2", "vllm", wint4_layers=0, experts_only=experts_only, effort=codec.effort).recipe
    return planned(folder, runtime, recipe.KEEP_ALL if codec == KEEP else rules)


def planned(folder: Path, runtime: ModuleType, rules: recipe.Recipe) -> Plan:
    name, source, known = runtime.__name__.rpartition(".")[2], open_source(folder), {}
    if needs := {need for rule in rules.rules for need in of_text(rule.codec)}:  # nobody reads what it says
        steps = make_plan(source, runtime=name, recipe=recipe.KEEP_ALL, unsupported=True).steps
        known = {step.name: dict.fromkeys(needs, step.view) for step in steps}
    return make_plan(source, runtime=name, recipe=rules, unsupported=True, statistics=known)


@pytest.fixture(scope="module", params=["0.3b", "21b", "vl-28b"])
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with the true widths, which every codec divides; sparse files."""
    out = tmp_path_factory.mktemp("geometry") / request.param
    subprocess.run([sys.executable, MAKE_GEOMETRY, request.param, out, "--layers", "2"], check=True, capture_output=True)
    return out


NOT_TAKEN = [(runtime, codec) for runtime in RUNTIMES for codec in CODECS if not takes(runtime, codec)]


@pytest.mark.parametrize(("runtime", "codec"), NOT_TAKEN, ids=short)
def test_the_plan_refuses_a_codec_that_the_runtime_cannot_load(runtime: ModuleType, codec: Codec) -> None:
    with pytest.raises(PlanError):
        plan_of(GOLDEN / "moe/paddle", runtime, codec)


@every_pair
def test_config_json_promises_what_is_written(runtime: ModuleType, codec: Codec, release: Path) -> None:
    dense = "0.3b" in release.name
    if of_text(codec) and "vl" in release.name and runtime is not fastdeploy:
        with pytest.raises(PlanError, match="fp4 inputs are for text models"):
            plan_of(release, runtime, codec)
        return
    if runtime is not fastdeploy or codec == KEEP:
        for experts_only in (False,) if dense else (False, True):
            if dense and isinstance(codec, ConvolutionalCode):
                with pytest.raises(PlanError, match="this model has no experts"):
                    plan_of(release, runtime, codec)
                continue
            plan = plan_of(release, runtime, codec, experts_only=experts_only)
            assert ("quantization_config" in plan.config) == (codec != KEEP)
            if codec != KEEP:
                assert_promise(runtime, plan)
        return
    for wint4_layers in (0, 1, 2, None):  # FastDeploy's container has several codecs
        effort = codec.effort if isinstance(codec, ConvolutionalCode) else 16
        rules = built_in.fastdeploy_container("test", wint4_layers, effort=effort)
        if dense:
            with pytest.raises(PlanError, match="cannot be done as asked"):
                planned(release, runtime, rules)
        else:
            assert_promise(runtime, planned(release, runtime, rules))


def assert_promise(runtime: ModuleType, plan: Plan) -> None:
    """What config.json says of every layer, read back from its JSON, is what the plan stores."""
    entry = json.loads(json.dumps(plan.config))["quantization_config"]
    assert runtime.CONFIG.items() <= plan.config.items()
    layers = [s for s in plan.steps if names.is_layer(s.name, s.role, s.spec.shape)]
    promised = runtime.codecs_of(entry, [(s.name, s.spec) for s in layers])
    assert {n: form(c) for n, c in promised.items()} == {s.name: form(s.codec) for s in layers}


def test_config_of_another_program_is_refused(runtime: ModuleType) -> None:
    with pytest.raises(ErnieQuantError, match="none that this tool writes"):
        runtime.codecs_of({"quant_method": "gptq"}, [(li.name, li.spec) for li in linears(runtime, KEEP)])


@pytest.mark.parametrize("family", FAMILIES)
def test_commands_name_the_folder(runtime: ModuleType, family: str) -> None:
    plan = plan_of(GOLDEN / family / "paddle", runtime, KEEP)
    commands = runtime.commands(Place("some/folder"), plan.config, Spread(2))
    if runtime is runtimes.find("transformers") and family == "vl":
        assert commands == []  # no one-line command runs a VL model there
        return
    assert commands
    assert all(title and "some/folder" in command for title, command in commands)


@pytest.mark.parametrize("name", ["my models/out", "o'clock", 'a "b"', "$HOME", "a;b", "`x`", "模型", "a\\b", "it's $5 (new)!"])
def test_a_shell_gives_commands_the_folder_in_one_word(runtime: ModuleType, name: str) -> None:
    """With an MTP block the draft's folder stands in a JSON text; in Python's it is a text too."""
    config = {"quantization_config": {}, "num_nextn_predict_layers": 1}
    for _, command in runtime.commands(Place(name), config, Spread(2)):
        words = shlex.split(command)
        if "-c" in words:
            (path,) = re.findall(r"pipeline\('text-generation', (.*)\)\('Hello'", words[words.index("-c") + 1])
            assert ast.literal_eval(path) == name
            continue
        assert any(word == name or word.startswith(f"{name}/") for word in words)
        if "--speculative-config" in words:
            assert json.loads(words[words.index("--speculative-config") + 1])["model"] == f"{name}/mtp"


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_parallel_sizes_divide_heads_and_begin_with_one(runtime: ModuleType, family: str) -> None:
    plan = plan_of(GOLDEN / family / "paddle", runtime, KEEP)
    if "tensor" not in runtime.PARALLEL:
        assert plan.tp_sizes == ()
        return
    heads = 2 if family == "vl" else 4
    assert plan.tp_sizes[0] == 1
    assert list(plan.tp_sizes) == sorted(set(plan.tp_sizes))
    assert all(heads % tp == 0 for tp in plan.tp_sizes)
