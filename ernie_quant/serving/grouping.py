"""Tokens in the order of their experts, in blocks of one expert each, as vLLM's `moe_align_block_size` lays them out.

vllm-project/vllm, fused_moe/moe_align_block_size.py. The plug-in calls vLLM's own; this one is for those who have none.
"""

from __future__ import annotations

import torch


def aligned(ids: torch.Tensor, block: int, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of ids [T, n], each below `experts`: int32 sorted choices, the expert of each block, and how many choices are used, [1].

    A choice is a place in the flattened ids; T * n stands for none, and fills up blocks. Shapes depend on those of `ids` alone,
    and nothing is read back: a CUDA graph can hold it.
    """
    flat = ids.flatten().long()
    choices = len(flat)
    most = choices * block if choices < experts else choices + experts * (block - 1)
    blocks = -(-most // block)
    counts = torch.zeros(experts, dtype=torch.int64, device=ids.device).scatter_add_(0, flat, torch.ones_like(flat))
    ends = ((counts + block - 1) // block * block).cumsum(0)
    order = flat.argsort(stable=True)
    of_sorted = flat[order]
    # of its expert's choices the how manieth, behind all blocks of the experts before
    begin = ends - (counts + block - 1) // block * block
    place = begin[of_sorted] + torch.arange(choices, device=ids.device) - (counts.cumsum(0) - counts)[of_sorted]
    sorted_ids = torch.full((blocks * block,), choices, dtype=torch.int32, device=ids.device)
    sorted_ids[place] = order.to(torch.int32)
    expert_ids = torch.searchsorted(ends, torch.arange(0, blocks * block, block, device=ids.device), right=True)
    return sorted_ids, expert_ids.clamp_(max=experts - 1).to(torch.int32), ends[-1:].to(torch.int32)
