"""WINT2's search and decoder, compiled, as functions of tensors; the formulas and the reasons are in ccq_reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ernie_quant.kernels.ccq_bytes import decode_rows, nearest_rows
from ernie_quant.kernels.ccq_lists import tables
from ernie_quant.kernels.ccq_reference import (
    FACTORS,
    GROUP,
    MAX_PEAK,
    MIN_PEAK,
    PER_PEAK,
    PER_RMS,
    Pair,
    fields,
    score_tables,
    stored_order,
)
from ernie_quant.kernels.ccq_search import search

LIMITS = np.array([MIN_PEAK, MAX_PEAK], np.float32)


def encode(weight: torch.Tensor, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
    """The fields of a bf16 or f32 weight [out, in], in logical order, with the best of `pairs` for each row.

    codes uint8 [out, in/4] in stored order, local_scale uint8 [out, in/64] in [0, 15], super_scale bf16 [out], code_scale
    and code_zp f32 [out]. Rows that hold NaN, infinity or more than 2^120, or whose largest magnitude is below 2^-104, get
    zero scales. No GIL is held and no threads are started: the caller encodes slabs of rows in parallel.
    """
    if weight.dtype not in (torch.bfloat16, torch.float32):
        weight = weight.float()
    half = weight.dtype == torch.bfloat16
    rows, width = weight.shape
    codes = torch.empty((rows, width // 4), dtype=torch.uint8)
    local_scale = torch.empty((rows, width // GROUP), dtype=torch.uint8)
    super_scale, pair = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
    search(
        weight.detach().contiguous().view(torch.uint16 if half else torch.uint32).numpy(),
        np.uint32(16 if half else 0),
        stored_order().view(16, 2, 2).transpose(0, 1).reshape(2, 32).numpy(),
        LIMITS,
        PER_RMS,
        PER_PEAK,
        np.array(FACTORS),
        tuple(table.numpy() for table in tables(tuple(pairs))),
        codes.numpy(),
        local_scale.numpy(),
        super_scale.numpy(),
        pair.numpy(),
    )
    return fields(codes, local_scale, super_scale, pair, pairs)


def decode(encoded: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weights that the kernel multiplies by: bf16 [out, in], in logical order."""
    codes, local_scale = encoded["codes"].contiguous(), encoded["local_scale"].contiguous()
    out = torch.empty((codes.shape[0], 4 * codes.shape[1]), dtype=torch.bfloat16)
    decode_rows(
        codes.numpy(),
        local_scale.numpy(),
        encoded["super_scale"].float().numpy(),
        encoded["code_scale"].contiguous().numpy(),
        encoded["code_zp"].contiguous().numpy(),
        out.view(torch.uint32).numpy(),
    )
    return out


def recode(weight: torch.Tensor, encoded: dict[str, torch.Tensor]) -> torch.Tensor:
    """The bytes nearest to a weight [out, in] in logical order, at the scales of `encoded`: uint8 [out, in/4]."""
    stored = weight.float().reshape(len(weight), -1, GROUP)[:, :, stored_order()].flatten(1)
    scales = np.stack([encoded["code_scale"].numpy(), encoded["code_zp"].numpy()], 1)
    pairs, pair = np.unique(scales, axis=0, return_inverse=True)
    codes = torch.empty((stored.shape[0], stored.shape[1] // 4), dtype=torch.uint8)
    tables = score_tables([(float(scale), float(zp)) for scale, zp in pairs]).numpy()
    local, top = encoded["local_scale"].contiguous().numpy(), encoded["super_scale"].float().numpy()
    nearest_rows(stored.numpy(), tables, pair.reshape(-1), local, top, codes.numpy())
    return codes
