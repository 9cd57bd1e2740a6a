"""Builds the kernels of serving/experts_triton.py for compute capability 8.0 and 9.0, on a machine without a GPU.

python tests/gpu/build_wint2_experts.py     # TRITON_INTERPRET must not be 1

As a launch would: pointers and widths are multiples of 16. Prints a line for each: registers of a thread, bytes that it
spills, what multiplies, instructions of the inner loop. Ends with code 1 where one spills, where a product is not one of tensor
cores, or where arithmetic is rounded otherwise than it must be: only codes are fused multiply-adds, and bf16 is rounded to the
nearest.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ernie_quant.kernels import _triton
from ernie_quant.serving import experts_triton
from ernie_quant.serving.experts_triton import FEW, INPUTS, LANES, MANY

TYPES = {
    "x": "*bf16", "packed": "*u8", "local": "*u8", "channel": "*fp32", "sorted_ids": "*i32", "expert_ids": "*i32", "used": "*i32",
    "out": "*bf16", "hidden": "*bf16", "total": "*bf16", "topk_weights": "*fp32", "topk_ids": "*i32",
}  # fmt: skip
NUMBERS = ("choices", "columns", "width", "hidden")  # of a launch
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
PRODUCT = re.compile(r"\b(mma\.sync\S*m16n8k16\S*bf16|wgmma\.mma_async\S*bf16)")


def build(kernel: Any, capability: int, warps: int, numbers: tuple[str, ...], constants: dict[str, Any]) -> Any:
    """What Triton makes of it."""
    names = [parameter.name for parameter in kernel.params]
    signature = {n: "constexpr" if n in constants else "i32" if n in numbers else TYPES[n] for n in names}
    whole = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants and n != "choices"}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=whole)
    options = {**_triton.OPTIONS, "num_warps": warps}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(built: Any) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        said = subprocess.check_output([CUOBJDUMP, "--dump-resource-usage", file.name], text=True)
    registers, stack, local = (re.search(rf"\b{word}:(\d+)", said) for word in ("REG", "STACK", "LOCAL"))
    assert registers, said
    assert stack, said
    assert local, said
    return int(registers[1]), int(stack[1]) + int(local[1])


def instructions(built: Any) -> int:
    """Of the loop over inputs, for a thread: from a label to the branch that leads back to it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP.with_name("nvdisasm"), "-c", file.name]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    labels: dict[str, int] = {}
    count, loops = 0, [0]
    for line in lines:
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif re.search(r"/\*[0-9a-f]{4,}\*/\s+[@A-Z]", line):
            count += 1
            if (back := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)) and back[1] in labels:
                loops.append(count - labels[back[1]])
    return max(loops[:-1])  # the last is where a program stands still


def wrong(ptx: str, product: bool) -> str:
    """What is not as it must be."""
    found = set(re.findall(r"\bcvt\.\S*bf16x?2?\.f32", ptx))
    if odd := sorted(name for name in found if not name.startswith("cvt.rn.bf16")):
        return f"rounds by {odd}"
    fused = len(re.findall(r"\bfma\.", ptx))
    if not product:
        return "fuses" if fused else ""
    if not PRODUCT.search(ptx):
        return "no tensor cores"
    return "" if fused and not re.search(r"\bfma\.(?!rn\.f32)", ptx) else "codes are not fused"


def main() -> int:
    """0 where all is well."""
    bad = 0
    for capability in (80, 90):
        kernels: list[tuple[Any, str, int, tuple[str, ...], dict[str, Any]]] = [
            (experts_triton._product, f"{tile.tokens} x {tile.columns}, {tile.warps} warps, {top} experts of a token", tile.warps,
             ("choices", "columns", "width"),
             {"TOP": top, "TOKENS": tile.tokens, "COLUMNS": tile.columns, "INTERPRETED": False})
            for tile in (FEW, MANY) for top in (8, 1)
        ]  # fmt: skip
        kernels += [
            (experts_triton._gated, "", 4, ("width",), {"LANES": LANES, "INTERPRETED": False}),
            (experts_triton._summed, "", 4, ("hidden",), {"TOP": 8, "LANES": LANES, "INTERPRETED": False}),
        ]
        for kernel, what, warps, numbers, constants in kernels:
            built = build(kernel, capability, warps, numbers, constants)
            ptx = built.asm["ptx"]
            registers, spilled = resources(built)
            product = kernel is experts_triton._product
            by = sorted({found.split(".")[0] for found in PRODUCT.findall(ptx)})
            if product:
                tile = FEW if warps == FEW.warps else MANY
                by.append(
                    f"{instructions(built) / (INPUTS * tile.columns / (32 * warps)):.1f} instructions of a thread for a weight,"
                )
            problem = "spills" if spilled else wrong(ptx, product)
            print(
                f"sm{capability} {kernel.__name__} {what}: {registers} registers, {spilled} B spilled {' '.join(by)} {problem}",
                flush=True,
            )
            bad += bool(problem)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
