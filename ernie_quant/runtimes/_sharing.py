"""Which tensor-parallel sizes heads, widths, groups and a runtime's kernels allow: the one place that says so.

q, k, v, gate and up are shared along their outputs, o and down along their inputs. Every rank has whole heads; where
there are more ranks than kv heads, several ranks have the same kv head (vllm-project/vllm, QKVParallelLinear;
PaddlePaddle/FastDeploy, QKVParallelLinear).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ernie_quant.names import OUT
from ernie_quant.runtimes import Linear, Runtime

TP_SIZES = (1, 2, 4, 8, 16, 32, 64)


def tp_sizes(runtime: Runtime, linears: Sequence[Linear], dims: Mapping[str, int], heads: int) -> tuple[int, ...]:
    """The sizes, powers of two, for which there are no problems."""
    return tuple(tp for tp in TP_SIZES if next(problems(runtime, linears, dims, heads, tp), None) is None)


def problems(runtime: Runtime, linears: Sequence[Linear], dims: Mapping[str, int], heads: int, of: int) -> Iterator[str]:
    """Why a model cannot be shared by `of` ranks, a line for each reason."""
    kv_heads = dims["kv_heads"]
    if heads % of or (kv_heads % of and of % kv_heads):
        yield f"attention: {heads} heads and {kv_heads} kv heads cannot be shared by {of} ranks"
    if runtime.SPLITS_VOCABULARY and dims["V"] % of:
        yield f"embeddings: {dims['V']} tokens cannot be shared by {of} ranks"
    for linear in linears:
        if not _fits(linear, runtime.share_multiple(linear), kv_heads, of):
            yield _why(linear, runtime.share_multiple(linear), kv_heads, of)


def _fits(linear: Linear, multiple: int, kv_heads: int, of: int) -> bool:
    if linear.ranks is None or not multiple:
        return True
    shares = min(of, kv_heads) if linear.name.endswith(("k_proj.weight", "v_proj.weight")) else of
    return linear.spec.shape[linear.ranks] % (shares * multiple) == 0


def _why(linear: Linear, multiple: int, kv_heads: int, of: int) -> str:
    assert linear.ranks is not None
    kind = "outputs" if linear.ranks == OUT else "inputs"
    fits = ", ".join(str(n) for n in TP_SIZES if _fits(linear, multiple, kv_heads, n)) or "no number"
    size = linear.spec.shape[linear.ranks]
    return f"{linear.name}: {size} {kind} in multiples of {multiple} cannot be shared by {of} ranks; {fits} would do"
