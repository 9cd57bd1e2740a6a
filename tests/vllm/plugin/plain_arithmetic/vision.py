"""What a CPU build of vLLM lacks for ERNIE VL, and the vision tower without a processor of images."""

from __future__ import annotations

import contextlib
from typing import Any


def replace() -> None:
    """The rotary embedding and the tower's loading; no weight is touched."""
    from transformers import AutoConfig
    from vllm.model_executor.layers.rotary_embedding.ernie45_vl_rope import Ernie4_5_VLRotaryEmbedding
    from vllm.model_executor.models.ernie45_vl import Ernie4_5_VLMoeForConditionalGeneration

    from plain_arithmetic.flat_config import FlatConfig

    with contextlib.suppress(ValueError):  # registered before, in a process that was forked
        AutoConfig.register(FlatConfig.model_type, FlatConfig)

    # forward_cpu hands an argument over that this class does not take
    native = Ernie4_5_VLRotaryEmbedding.forward_native
    Ernie4_5_VLRotaryEmbedding.forward_cpu = lambda self, positions, query, key=None, *rest, **more: native(
        self, positions, query, key
    )

    # a tower is left out where no images are allowed; here none are, for their processor needs a tokenizer
    @contextlib.contextmanager
    def keep_tower(self: Any, *args: Any, **kwargs: Any) -> Any:
        yield

    Ernie4_5_VLMoeForConditionalGeneration._mark_tower_model = keep_tower
