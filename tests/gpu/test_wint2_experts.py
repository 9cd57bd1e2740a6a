"""WINT2 experts on a GPU, here in Triton's interpreter, against weights that are decoded and multiplied with F.linear."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.gpu import kernels_of_the_cpu
from helpers.paths import ROOT

from ernie_quant.codecs.ccq import ConvolutionalCode
from ernie_quant.runtimes import _wint2
from ernie_quant.serving import experts, grouping
from ernie_quant.serving.experts import Stored

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::DeprecationWarning:triton")


def stored(count: int, rows: int, width: int, seed: int, device: str) -> Stored:
    """Random bytes and scales, as a file may hold them; every pair of code scale and zero is of another row."""
    random = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (count, rows, width // 4), dtype=torch.uint8, generator=random)
    local = torch.randint(0, 256, (count, rows, width // 128), dtype=torch.uint8, generator=random)
    super_scale = (torch.rand((count, rows), generator=random) / (100 * width**0.5)).bfloat16().float()
    code = 119 + 2 * torch.rand((count, rows), generator=random)  # float32 of any bits: a sum that is rounded twice is another
    zero = 700 + 600 * torch.rand((count, rows), generator=random)
    return Stored(packed.to(device), local.to(device), torch.stack([super_scale, code, zero], 2).to(device))


def inputs(tokens: int, hidden: int, top: int, ids: list[int], device: str) -> tuple[torch.Tensor, ...]:
    """x, weights of the chosen experts, and these: each token's are `ids` in turn."""
    random = torch.Generator().manual_seed(tokens)
    x = torch.randn((tokens, hidden), generator=random).bfloat16()
    chosen = torch.tensor([[ids[(t + i * (t % 3 + 1)) % len(ids)] for i in range(top)] for t in range(tokens)], dtype=torch.int32)
    return x.to(device), torch.rand((tokens, top), generator=random).to(device), chosen.to(device)


def weight(weights: Stored, expert: int) -> torch.Tensor:
    """By the decoder of the CPU, which is compiled."""
    with kernels_of_the_cpu():
        return experts.weight(Stored(*(part.cpu() for part in weights)), expert).to(weights.packed.device)


def layer(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """`experts.products`."""
    with kernels_of_the_cpu():
        return experts.products(x, *rest)


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """A step of bf16, which is 2^-8, of the largest in a row; sums have another order."""
    step = wanted.float().abs().amax(-1, keepdim=True) / 256
    return bool(((found.float() - wanted.float()).abs() <= step).all())


@pytest.mark.parametrize("tile", ["FEW", "MANY"])
@pytest.mark.parametrize(
    ("tokens", "rows", "width", "ids"),
    [(1, 64, 128, [3]), (7, 72, 384, [0, 4]), (21, 200, 128, [1, 2, 4]), (70, 8, 256, [0])],
    ids=["one token", "two experts of five", "columns that fill no tile", "more tokens than a block"],
)
def test_a_product(tokens: int, rows: int, width: int, ids: list[int], tile: str, device: str) -> None:
    from ernie_quant.serving import experts_triton

    weights = stored(5, rows, width, 1, device)
    x, _, chosen = inputs(tokens, width, 1, ids, device)
    taken = getattr(experts_triton, tile)
    blocks = grouping.aligned(chosen, taken.tokens, 5)
    found = experts_triton.multiplied(experts_triton.planes(x), weights, blocks, tokens, 1, taken)
    wanted = torch.stack([F.linear(x[t].float(), weight(weights, int(chosen[t])).float()) for t in range(tokens)])
    assert (found.float() - wanted).abs().max() <= wanted.abs().max() / 256
    assert close(found, wanted.bfloat16())


def test_the_weights_are_those_of_the_decoder_to_the_bit(device: str) -> None:
    """Inputs that are rows of a unit matrix: sums of one product."""
    from ernie_quant.serving import experts_triton

    weights = stored(2, 40, 384, 5, device)
    x = torch.eye(384, dtype=torch.bfloat16, device=device)
    chosen = torch.ones((384, 1), dtype=torch.int32, device=device)
    blocks = grouping.aligned(chosen, experts_triton.MANY.tokens, 2)
    found = experts_triton.multiplied(experts_triton.planes(x), weights, blocks, 384, 1, experts_triton.MANY)
    assert torch.equal(found.T, weight(weights, 1))
    assert len(found.unique()) > 1000


@pytest.mark.parametrize(
    ("tokens", "hidden", "width", "top", "count"), [(1, 128, 128, 2, 4), (5, 384, 128, 3, 6), (40, 128, 384, 2, 3)], ids=str
)
def test_a_layer(tokens: int, hidden: int, width: int, top: int, count: int, device: str) -> None:
    """Both products, the activation between and the weighted sum; the last expert has no tokens."""
    from ernie_quant.serving import experts_triton

    gate_up, down = stored(count, 2 * width, hidden, 2, device), stored(count, hidden, width, 3, device)
    x, weights, chosen = inputs(tokens, hidden, top, list(range(count - 1)), device)
    found = experts_triton.products(x, gate_up, down, weights, chosen, lambda ids, block: grouping.aligned(ids, block, count))
    assert close(found, layer(x, gate_up, down, weights, chosen))
    assert found.abs().min() > 0 or found.abs().max() > 0.1


def test_experts_of_other_ranks_add_nothing(device: str) -> None:
    from ernie_quant.serving import experts_triton

    gate_up, down = stored(2, 256, 128, 2, device), stored(2, 128, 128, 3, device)
    x, weights, chosen = inputs(9, 128, 2, [0, 1, 2, 3], device)
    here = torch.tensor([-1, 1, -1, 0], dtype=torch.int32, device=device)

    def align(ids: torch.Tensor, block: int) -> tuple[torch.Tensor, ...]:
        sorted_ids, blocks, used = grouping.aligned(ids, block, 4)
        return sorted_ids, here[blocks.long()], used

    found = experts_triton.products(x, gate_up, down, weights, chosen, align, here)
    assert close(found, layer(x, gate_up, down, weights, here[chosen.long()]))


def test_what_the_codec_writes(device: str) -> None:
    """Not random bytes: a weight, its bytes as they lie in a file, and the product with what they decode to."""
    from ernie_quant.serving import experts_triton

    codec, gaussian = ConvolutionalCode(1), torch.randn((64, 128), generator=torch.Generator().manual_seed(4))
    with kernels_of_the_cpu():
        encoded = codec.encode(gaussian.mul(0.02).bfloat16())
        decoded = codec.decode(encoded)
    parts = _wint2.pack("w", encoded)
    weights = Stored(*(parts[f"w.{kind}"][None].to(device) for kind in ("weight_packed", "weight_scale", "weight_channel_scale")))
    x, _, chosen = inputs(3, 128, 1, [0], device)
    blocks = grouping.aligned(chosen, 16, 1)
    found = experts_triton.multiplied(experts_triton.planes(x), weights, blocks, 3, 1, experts_triton.FEW)
    assert close(found, F.linear(x, decoded.to(device)))


def test_tokens_are_grouped_by_their_experts() -> None:
    """The example in vLLM's documentation of the layout, with experts counted from 0."""
    ids = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]]) - 1
    sorted_ids, expert_ids, used = grouping.aligned(ids, 4, 4)
    assert sorted_ids[:16].tolist() == [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
    assert (expert_ids[:4].tolist(), used.tolist()) == ([0, 1, 2, 3], [16])


@pytest.mark.parametrize("choices", [1, 3, 40])
def test_blocks_are_enough_whatever_the_experts(choices: int) -> None:
    random = torch.Generator().manual_seed(choices)
    for count in (1, 7, 50):
        ids = torch.randint(0, count, (choices, 1), generator=random)
        sorted_ids, expert_ids, used = grouping.aligned(ids, 16, count)
        assert int(used) <= len(sorted_ids) == 16 * len(expert_ids)
        found = sorted_ids[: int(used)].view(-1, 16)
        assert sorted(found[found < choices].tolist()) == list(range(choices))
        for block, expert in zip(found, expert_ids, strict=False):
            assert {int(ids[c]) for c in block[block < choices]} == {int(expert)}
        assert (sorted_ids[int(used) :] == choices).all()


@pytest.mark.slow
def test_it_is_built_without_spills(tmp_path: Path) -> None:
    """For compute capability 8.0 and 9.0, on a machine without a GPU."""
    pytest.importorskip("triton", reason="Triton is not installed; there is none for this system")
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    line = [sys.executable, ROOT / "tests/gpu/build_wint2_experts.py"]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 12


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    """A small layer, in the interpreter, to the table."""
    pytest.importorskip("triton", reason="Triton is not installed; there is none for this system")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, ROOT / "benchmarks/wint2_moe.py", "--tiny", "--tokens", "1", "33", "--table", tmp_path / "table.md"]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    cells = [row.split(" | ") for row in (tmp_path / "table.md").read_text().splitlines()[4:]]
    assert [row[:2] for row in cells] == [["| tiny", "1"], ["| tiny", "33"]]
    assert all("eager" in cell for row in cells for cell in row[3:])
