"""The nearest codes at the scales that blocks of ggml have already.

The steps are not computed from the scales: the decoder says what a block is worth with all codes 0, and with all codes 1.
"""

from __future__ import annotations

import importlib

import numpy as np
import torch

from ernie_quant.dtypes import BLOCKS
from ernie_quant.kernels import _ggml_bits as bits
from ernie_quant.kernels._ggml import Array, Kind
from ernie_quant.kernels._ggml_search import UNEVEN


def recode(dtype: str, weight: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, bytes]: the codes nearest to `weight` [rows, in]; those that are there where a step is no number or 0."""
    module = importlib.import_module(f"ernie_quant.kernels.ggml_{dtype.lower()}")
    kind: Kind = module.KIND
    elements, nbytes = BLOCKS[dtype]
    flat, wanted = blocks.contiguous().numpy().reshape(-1, nbytes), weight.float().contiguous().numpy().reshape(-1, elements)

    def worth(code: int) -> Array:
        made = flat.copy()
        bits.put_codes(dtype, np.full(wanted.shape, code, np.uint8), made)
        decoded: Array = module.decode(torch.from_numpy(made)).numpy()
        return decoded

    old, lowest = bits.codes_of(dtype, flat), worth(0)
    with np.errstate(all="ignore"):
        if kind.table:
            step = lowest / UNEVEN[0]
            codes = np.searchsorted((UNEVEN[1:] + UNEVEN[:-1]) / 2, wanted / step)
        else:
            step = worth(1) - lowest
            codes = np.nan_to_num(np.rint((wanted - lowest) / step)).clip(0, kind.most)
    made = flat.copy()
    bits.put_codes(dtype, np.where((step != 0) & np.isfinite(step), codes, old).astype(np.uint8), made)
    return torch.from_numpy(made.reshape(blocks.shape))
