"""TEST ONLY. vLLM loads a checkpoint as it always does, and computes with dequantized weights.

What of vLLM runs as it is: reading config.json, matching layers to schemes, creating parameters, the weight loaders, slicing for
tensor parallelism, routing, attention. What is replaced: the choice of a kernel (none on a CPU takes these formats) and, after
loading, its packing of weights and its products. Every quantized layer becomes an unquantized one: its loaded parameters are
decoded to a plain bf16 `weight` (experts: `w13_weight`, `w2_weight`), and are dropped. Products are F.linear for all, the
unquantized reference included, so that equal weights give equal logprobs to the bit; activations are not quantized.

Nothing happens without PLAIN_ARITHMETIC=1 in the environment.
"""

from __future__ import annotations

import os


def register() -> None:
    """Called by vLLM in every process, before a model is built."""
    if os.environ.get("PLAIN_ARITHMETIC") == "1":
        from plain_arithmetic import experts, linears, vision

        linears.replace()
        experts.replace()
        vision.replace()
