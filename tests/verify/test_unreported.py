"""Quantized weights that no report speaks of: whoever chose their codes passes, and what was changed afterwards does not."""

from __future__ import annotations

import re

import pytest
import torch

from ernie_quant import codecs, plugins
from ernie_quant.check import unreported
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.codecs._ggml import Blocks
from ernie_quant.codecs.ccq import ConvolutionalCode
from ernie_quant.codecs.fp8 import Float8Block
from ernie_quant.codecs.keep import Keep
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.dtypes import BLOCKS as BYTES
from ernie_quant.kernels import _ggml_bits as bits
from ernie_quant.runtimes import fastdeploy

SPEC = TensorSpec((256, 512), "BF16")
BLOCKS = 256 * 512 // 64
ABSMAX = RoundToNearest(4, CHANNEL, "absmax", full_range=False)
EXAMPLES = [example for module in plugins.modules(codecs) for example in module.EXAMPLES if not isinstance(example, Keep)]
EXAMPLES += [fastdeploy.WINT4, fastdeploy.WINT8, ABSMAX, RoundToNearest(8, CHANNEL, "absmax", full_range=False)]
every_codec = pytest.mark.parametrize("codec", EXAMPLES, ids=lambda codec: codec.describe())


def gaussian(seed: int = 1) -> torch.Tensor:
    return torch.randn(SPEC.shape, generator=torch.Generator().manual_seed(seed)).mul(0.02).bfloat16()


def problem(codec: Codec, weight: torch.Tensor, encoded: dict[str, torch.Tensor]) -> str:
    return unreported.problem("w", codec, SPEC, unreported.judge_slab("w", codec, weight, encoded))


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "coarse"])
@every_codec
def test_whatever_is_written_here_is_nearest(codec: Codec, kind: str) -> None:
    """Ties and roundings of scales included: coarse weights have many ties, heavy tails large codes."""
    weight = gaussian().float()
    weight = {"gaussian": weight, "heavy": weight * weight.abs(), "coarse": (weight * 400).round() / 512}[kind].bfloat16()
    encoded = codec.encode(weight)
    judged = unreported.judge_slab("w", codec, weight, encoded)
    assert (judged.blocks, judged.far, judged.lost) == (BLOCKS, 0, ())
    assert problem(codec, weight, encoded) == ""


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_at_scales_that_were_rounded_afterwards_pass(bits: int, seed: int) -> None:
    """As other programs have it: float32 scales for the codes, and those in bf16 are stored. Some codes could be nearer."""
    codec, weight, high = RoundToNearest(bits, CHANNEL, "absmax"), gaussian(seed), 2 ** (bits - 1) - 1
    scale = weight.float().abs().amax(1, keepdim=True) / high
    encoded = {"codes": (weight.float() / scale).round().to(torch.int8), "scale": scale.bfloat16()}
    assert unreported.judge_slab("w", codec, weight, encoded).far > 100
    assert problem(codec, weight, encoded) == ""


def few_changed(codec: Codec, count: int, bit: int, columns: slice) -> str:
    """What is said when one bit of some codes of `count` rows is another."""
    weight = gaussian()
    encoded = codec.encode(weight)
    if isinstance(codec, Blocks):
        return problem(codec, weight, {"blocks": in_blocks(codec, encoded["blocks"], count, bit, columns)})
    codes = encoded["codes"].clone().view(torch.uint8)
    codes[:count, columns] ^= bit
    return problem(codec, weight, encoded | {"codes": codes.view(encoded["codes"].dtype)})


def in_blocks(codec: Blocks, blocks: torch.Tensor, count: int, bit: int, columns: slice) -> torch.Tensor:
    """The same, where codes lie in bytes with their scales; those of two bits have no third."""
    made = blocks.clone()
    flat = made.numpy().reshape(-1, BYTES[codec.dtype][1])
    codes = bits.codes_of(codec.dtype, flat)
    most = 1 << sum(piece.width for piece in bits.pieces(codec.dtype))
    codes.reshape(len(blocks), -1)[:count, columns] ^= min(bit, most // 2)
    bits.put_codes(codec.dtype, codes, flat)
    return made


CHANGED = re.compile(
    rf"w: in (\d+) of {BLOCKS} blocks of 64 weights the codes are not the nearest to the source at their scales,"
    r" in all others they are; these were changed"
)


@every_codec
def test_one_changed_code_is_found(codec: Codec) -> None:
    found = CHANGED.fullmatch(few_changed(codec, 1, 2, slice(5, 6)))
    assert found
    assert found[1] == "1"


@every_codec
def test_one_changed_row_is_found(codec: Codec) -> None:
    """By the smallest step that there is."""
    line = few_changed(codec, 1, 1, slice(None))
    found = CHANGED.fullmatch(line)
    assert int(found[1]) == 512 // 64 if found else line == "w: 1 of 256 rows (0) are no nearer to the source than zeros"


@every_codec
def test_a_change_in_a_few_columns_of_every_row_is_found(codec: Codec) -> None:
    """As a page of a file that is stored by columns: a block of eight in each row, which no row would notice by its error."""
    bit = 0x80 if isinstance(codec, Float8Block) else 4  # the sign: another bit may make a NaN
    found = CHANGED.fullmatch(few_changed(codec, 256, bit, slice(0, 4)))
    assert found
    assert BLOCKS // 10 < int(found[1]) <= BLOCKS // 8


@every_codec
def test_another_weight_is_refused(codec: Codec) -> None:
    """That of another expert: as good a weight as any, but not this one."""
    line = problem(codec, gaussian(), codec.encode(gaussian(seed=9)))
    assert line.startswith("w: its relative error to the source is ")
    assert 1.5 < float(line.removeprefix("w: its relative error to the source is ").partition(";")[0]) < 2.2


@pytest.mark.parametrize("strength", [0.005, 0.02, 0.1, 0.3, 1.0])
@every_codec
def test_codes_that_somebody_calibrated_pass(codec: Codec, strength: float) -> None:
    """What is rounded is the weight and the errors of its neighbours: some codes are not the nearest then, everywhere."""
    weight = gaussian()
    encoded = codec.encode(weight)
    error = (weight.float() - codec.decode(encoded).float()).square().mean().sqrt()
    noise = torch.randn(SPEC.shape, generator=torch.Generator().manual_seed(3))
    calibrated = codec.recode(weight.float() + noise * error * strength, encoded)
    judged = unreported.judge_slab("w", codec, weight, calibrated)
    assert judged.far > (0.9 * BLOCKS if strength == 1 else -1)  # of a weak one nothing may be left
    assert problem(codec, weight, calibrated) == ""


def test_a_code_next_to_the_nearest_is_not_gross_in_a_quiet_block() -> None:
    """The first 64 weights of each row are all but zero, and in 60 rows one has the next code: of them that is all the error."""
    codec, weight = RoundToNearest(4, CHANNEL), gaussian()
    weight[:, :64] *= 0.01
    encoded = codec.encode(weight)
    codes = encoded["codes"].clone()
    codes[:60, 5] = 1
    judged = unreported.judge_slab("w", codec, weight, encoded | {"codes": codes})
    assert (judged.far, judged.clear, judged.gross) == (60, 60, 0)
    assert problem(codec, weight, encoded | {"codes": codes}) == ""


@pytest.mark.parametrize(
    ("codec", "limit"),
    [(ConvolutionalCode(effort=1), "0.5"), (RoundToNearest(2, 64), "0.5"), (ABSMAX, "0.25"), (RoundToNearest(8), "0.05"),
     (Float8Block(), "0.05")],
    ids=lambda value: value if isinstance(value, str) else value.describe(),
)  # fmt: skip
def test_codes_that_nothing_could_have_chosen_are_refused(codec: Codec, limit: str) -> None:
    weight = gaussian()
    encoded = codec.encode(weight)
    line = problem(codec, weight, encoded | {"codes": encoded["codes"].flip(0)})
    assert line.endswith(f"; {codec.form} stays below {limit}")


def test_zeros_with_zeros_for_scales_are_no_weight() -> None:
    """No code is nearer at these scales, and the codes are the same again: only what is lost tells."""
    codec, weight = ConvolutionalCode(effort=1), gaussian()
    encoded = codec.encode(weight)
    assert problem(codec, weight, {name: torch.zeros_like(t) for name, t in encoded.items()}) == (
        "w: 256 of 256 rows (0, 1, 2, 3, 4, …) are no nearer to the source than zeros"
    )
    one = {name: torch.cat([t[:7], torch.zeros_like(t[7:8]), t[8:]]) for name, t in encoded.items()}
    assert problem(codec, weight, one) == "w: 1 of 256 rows (7) are no nearer to the source than zeros"


def test_a_row_that_its_block_drowns_is_not_lost() -> None:
    """128 rows of fp8 share a scale: what is far below the others becomes zeros, and nobody could do better."""
    codec, weight = Float8Block(), gaussian()
    weight[3] *= 1e-8
    encoded = codec.encode(weight)
    assert not codec.decode(encoded)[3].any()
    assert problem(codec, weight, encoded) == ""
