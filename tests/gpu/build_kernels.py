"""Builds every kernel for a GPU of compute capability 9.0 (H100), on a machine without one, and looks at what came of it.

python tests/gpu/build_kernels.py     # TRITON_INTERPRET must not be 1

Codecs run on tensors that have no contents but lie on a device of their own (torch's FakeTensor and PrivateUse1): where one is
left on the CPU, torch raises. A kernel is compiled instead of launched, for the arguments that it has. Its PTX may hold
arithmetic that rounds once, to the nearest, and nothing that is contracted or approximate. Prints a line for every kernel.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ernie_quant import codecs, kernels
from ernie_quant.codecs.ccq import ConvolutionalCode
from ernie_quant.codecs.fp8 import Float8Block
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.kernels import _triton, ccq_search_triton, ccq_triton, difference_triton, fp8_triton, packing_triton, rtn_triton
from ernie_quant.measure import squares
from ernie_quant.runtimes import Runtime, fastdeploy, vllm

DEVICE, TARGET = "made_up", GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64", torch.int8: "*i8", torch.uint8: "*u8",
    torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
ARITHMETIC = re.compile(r"^\s*(?:@\S+\s+)?((?:add|sub|mul|fma|mad|div|rcp|sqrt|rsqrt|ex2|lg2)\S*\.f(?:32|64))\b", re.MULTILINE)
EXACT = re.compile(r"(add|sub|mul|div|sqrt)(\.rn)?\.f(32|64)")
built: dict[tuple[str, ...], str] = {}


def build(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4) -> None:
    """In place of `_triton.launch`."""
    signature, constants = {}, {}
    for parameter, value in zip(kernel.params, args, strict=True):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            assert value.device.type == DEVICE, f"{kernel.__name__}: {name} lies on {value.device}"
            assert value.is_contiguous(), f"{kernel.__name__}: {name} is not contiguous"
            signature[name] = POINTERS[value.dtype]
        elif value == 1 and isinstance(value, int):  # Triton makes a constant of it
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    key = (kernel.__name__, str(signature), str(constants))
    if key in built or 0 in grid:
        return
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    ptx = triton.compile(source, target=TARGET, options={**_triton.OPTIONS, "num_warps": num_warps}).asm["ptx"]
    built[key] = ", ".join(sorted(set(ARITHMETIC.findall(ptx))))
    wrong = [found for found in ARITHMETIC.findall(ptx) if not EXACT.fullmatch(found)]
    assert not wrong, f"{kernel.__name__}: {sorted(set(wrong))}"
    print(f"{kernel.__name__} {constants}: {built[key]}", flush=True)


def totals(sums: torch.Tensor, largest: torch.Tensor) -> tuple[float, float, float]:
    """In place of `_triton.totals`, which needs numbers."""
    assert (sums.device.type, largest.device.type) == (DEVICE, DEVICE)
    return 0.0, 0.0, 0.0


def there_and_back(codec: codecs.Codec, runtime: Runtime, weight: torch.Tensor) -> None:
    """All that a run does with a slab."""
    encoded, _ = codec.measured(weight)
    decoded = codec.decode(encoded)
    parts = runtime.pack("layer.weight", codec, encoded)
    assert {tensor.device.type for tensor in (decoded, *encoded.values(), *parts.values())} == {DEVICE}, codec.describe()
    codec.recode(weight, encoded)
    squares(weight, decoded)
    if runtime is fastdeploy:
        assert runtime.unpack("layer.weight", codec, parts).keys() == encoded.keys()


def main() -> int:
    """0 where all is well."""
    assert ARITHMETIC.findall("\tfma.rn.f32 a;\n@%p1 div.full.f32 b;\n") == ["fma.rn.f32", "div.full.f32"]
    assert not any(EXACT.fullmatch(found) for found in ("fma.rn.f32", "div.full.f32", "sqrt.approx.f32", "add.rn.ftz.f32"))
    from torch.utils import backend_registration

    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        print(f"PyTorch {torch.__version__} has no devices that are made up; 2.10 has")
        return 2
    backend_registration._setup_privateuseone_for_python_backend(DEVICE)
    kernels.DEVICES[DEVICE] = kernels.DEVICES["cuda"]
    for module in (_triton, ccq_search_triton, ccq_triton, difference_triton, fp8_triton, packing_triton, rtn_triton):
        module.launch = build
    for module in (difference_triton, fp8_triton, rtn_triton):
        module.totals = totals
    every: list[tuple[codecs.Codec, Any, tuple[int, int]]] = [
        (RoundToNearest(4, 128), vllm, (256, 8192)),
        (RoundToNearest(4, CHANNEL, full_range=False), fastdeploy, (256, 8192)),
        (RoundToNearest(8, CHANNEL, "absmax", full_range=False), fastdeploy, (256, 8192)),
        (RoundToNearest(2, CHANNEL), vllm, (1, 16)),
        (Float8Block(), vllm, (256, 8192)),
        (ConvolutionalCode(), fastdeploy, (256, 8192)),
        (ConvolutionalCode(1), fastdeploy, (8, 128)),
    ]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for codec, runtime, shape in every:
            there_and_back(codec, runtime, torch.empty(shape, dtype=torch.bfloat16, device=DEVICE))
    print(f"{len(built)} kernels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
