"""The flat config.json of Baidu's VL repositories, which otherwise comes with code of its own."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class FlatConfig(PretrainedConfig):
    """All keys as they are; vision_config is one of its own, as vLLM expects it."""

    model_type = "ernie4_5_moe_vl"

    def __init__(self, vision_config: dict[str, Any] | None = None, **settings: Any) -> None:
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        super().__init__(**settings)
