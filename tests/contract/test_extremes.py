"""Finite weights that no model should have: stored as finite numbers with a finite error, or refused by name."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from helpers.hessians import once_of

from ernie_quant import codecs, plugins, runtimes
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs.keep import KEEP
from ernie_quant.codecs.rtn import CHANNEL, SCALES, RoundToNearest
from ernie_quant.errors import CheckpointError
from ernie_quant.measure import LARGEST, compare
from ernie_quant.names import ATTENTION, EXPERT, IN
from ernie_quant.planning.steps import Step
from ernie_quant.run.shard import encode_slab
from ernie_quant.runtimes import fastdeploy
from ernie_quant.views.kinds import Cat
from ernie_quant.weights.layouts import PADDLE

SPEC = TensorSpec((128, 768), "BF16")
BF16, F32 = torch.bfloat16, torch.float32
EVERY_RTN = [
    RoundToNearest(bits, group, scale, full_range)
    for bits in (2, 4, 8)
    for group in (32, 64, 128, CHANNEL)
    for scale in SCALES
    for full_range in (True, False)
]
EXAMPLES = [example for module in plugins.modules(codecs) for example in module.EXAMPLES]
REFUSED = r"holds -?[\d.]+e\+3\d; weights are quantized up to 1\.329e\+36 .*: get the file again, or keep this tensor .*"
CODECS = list(dict.fromkeys([*EXAMPLES, *EVERY_RTN, fastdeploy.WINT4, fastdeploy.WINT8]))


def noise(magnitude: float = 0.02) -> torch.Tensor:
    return torch.randn(SPEC.shape, generator=torch.Generator().manual_seed(3)).mul(magnitude)


def with_one(*values: float) -> torch.Tensor:
    weight = noise()
    weight[5, 7 : 7 + len(values)] = torch.tensor(values)
    return weight


def mixed(small: float, large: float) -> torch.Tensor:
    weight = torch.full(SPEC.shape, small)
    weight[::3, ::7] = large
    weight[1::3, ::5] = -large
    return weight


def most(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max


def extremes(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """By what they hold; in the order of their magnitude."""
    big, info = most(dtype), torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps
    weights = {
        "zeros": torch.zeros(SPEC.shape),
        "the smallest denormal": torch.full(SPEC.shape, tiny),
        "denormals and normal ones": mixed(tiny, 0.02),
        "1e-38": torch.full(SPEC.shape, 1e-38),
        "all 2^120": torch.full(SPEC.shape, LARGEST),
        "2^120 in noise": with_one(LARGEST, -LARGEST),
        "1e-38 and 2^120": mixed(1e-38, LARGEST),
        "much below 2^120": noise(2.0**116),
        "above 2^120": with_one(2 * LARGEST),
        "3.39e38": with_one(3.389e38),
        "-3.39e38": with_one(-3.389e38),
        "the largest, both signs": with_one(big, -big),
        "all the largest": torch.full(SPEC.shape, big),
        "all minus the largest": torch.full(SPEC.shape, -big),
        "1e-38 and 3e38": mixed(1e-38, 3e38),
        "large noise": noise(1e38).clamp(-big, big),
    }
    return {name: weight.to(dtype) for name, weight in weights.items()}


def step(name: str, codec: codecs.Codec) -> Step:
    return Step(name, EXPERT, Cat((), 0), SPEC, codec, {}, ())


def is_too_large(weight: torch.Tensor) -> bool:
    return float(weight.float().abs().max()) > LARGEST


def stores(runtime: ModuleType, codec: codecs.Codec, name: str) -> bool:
    linears = [runtimes.Linear(name, SPEC, role, codec, IN) for role in (EXPERT, ATTENTION)]
    return isinstance(codec, runtime.CODECS) and any(not runtime.problems([linear]) for linear in linears)


def name_for(runtime: ModuleType) -> str:
    return f"{'ernie' if PADDLE.name == runtime.LAYOUT else 'model'}.layers.1.mlp.down_proj.weight"


STORED = [(r, c) for r in plugins.modules(runtimes) for c in CODECS if stores(r, c, name_for(r))]


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.describe())
def test_a_finite_weight_decodes_to_finite_ones_or_is_refused_with_name_and_value(
    codec: codecs.Codec, dtype: torch.dtype
) -> None:
    for case, weight in extremes(dtype).items():
        decoded = codec.decode(codec.encode(weight))
        if is_too_large(weight) and codec != KEEP:
            with pytest.raises(CheckpointError, match=rf"^a\.weight: {REFUSED}$"):
                compare("a.weight", weight, decoded)
            continue
        assert bool(decoded.isfinite().all()), case
        if not is_too_large(weight):
            found = compare("a.weight", weight, decoded)
            assert all(map(math.isfinite, (found.error, found.total, found.largest, found.rel_error))), case
            assert found.rel_error <= 1.01, case


@pytest.mark.parametrize(
    ("runtime", "codec"), STORED, ids=[f"{r.__name__.rpartition('.')[2]}: {c.describe()}" for r, c in STORED]
)
def test_no_runtime_stores_infinity(runtime: ModuleType, codec: codecs.Codec) -> None:
    """What a run packs decodes to finite numbers; scales are finite too."""
    name, stored = name_for(runtime), 0
    for case, weight in extremes(BF16).items():
        if is_too_large(weight) and codec != KEEP:
            with pytest.raises(CheckpointError, match=REFUSED):
                encode_slab(step(name, codec), runtime, weight)
            continue
        slab = encode_slab(step(name, codec), runtime, weight)
        parts = {**slab.parts, **runtime.constants(name, codec, SPEC, once_of(codec, SPEC))}
        stored += 1
        for part, tensor in parts.items():
            assert not tensor.is_floating_point() or bool(tensor.float().isfinite().all()), (case, part)
        assert bool(codec.decode(runtime.unpack(name, codec, parts)).isfinite().all()), case
    assert stored >= 8


def test_many_weights_just_below_the_bound_are_taken() -> None:
    """Their squares add up to more than the square of the bound."""
    weight = torch.full(SPEC.shape, LARGEST, dtype=BF16)
    assert compare("w", weight, weight).total == SPEC.numel * LARGEST**2


def test_a_codec_that_makes_infinity_of_sound_weights_is_refused() -> None:
    """Whoever adds one is told with the first such weight, not by a reader of the file."""
    weight = noise().bfloat16()
    decoded = weight.clone()
    decoded[0, 0] = float("inf")
    with pytest.raises(CheckpointError, match=r"w: its codes decode to NaN or infinity"):
        compare("w", weight, decoded)
