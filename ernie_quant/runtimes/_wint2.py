"""WINT2 in PT checkpoints: names and bytes of its tensors, and what config.json says of it. P is a layer's name, [N, K] a weight:

    P.weight_packed         uint8 [N, K/4]    four inputs to a byte, in the codec's stored order
    P.weight_scale          uint8 [N, K/128]  two uint4, the first in the high nibble
    P.weight_channel_scale  float32 [N, 3]    super scale (a bf16 number), code scale, code zero

These are FastDeploy's tensors turned round (_container.py). The names hold what vLLM's loader of experts looks for in them:
one without `weight`, `scale`, `zero` or `offset` it drops without a word (vllm-project/vllm, fused_moe/routed_experts.py,
weight_loader). The programs need a plug-in that knows the quant_method: ernie_quant/serving.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs.ccq import GROUP
from ernie_quant.errors import ConfigError
from ernie_quant.runtimes._values import Part

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded

METHOD, VERSION = "ernie-wint2", 1  # quant_method, and the version of what this file says
KEY = "wint2"  # its entry, beside those of compressed-tensors
INPUT_ORDER = "cutlass64"  # of the inputs of a group: kernels/ccq_reference.stored_order
PACKED, LOCAL, CHANNEL = "weight_packed", "weight_scale", "weight_channel_scale"
PARTS = (PACKED, LOCAL, CHANNEL)


def parts(module: str, spec: TensorSpec) -> dict[str, Part]:
    """Stored tensors of a weight [out, in]."""
    out, width = spec.shape
    return {
        f"{module}.{PACKED}": Part(TensorSpec((out, width // 4), "U8"), 0, 1),
        f"{module}.{LOCAL}": Part(TensorSpec((out, width // (2 * GROUP)), "U8"), 0, 1),
        f"{module}.{CHANNEL}": Part(TensorSpec((out, 3), "F32"), 0, None),
    }


def pack(module: str, encoded: Encoded) -> dict[str, torch.Tensor]:
    """Them, of the fields of a slab of rows."""
    import torch

    local = encoded["local_scale"]
    channel = [encoded[field].float() for field in ("super_scale", "code_scale", "code_zp")]
    return {
        f"{module}.{PACKED}": encoded["codes"],
        f"{module}.{LOCAL}": local[:, 0::2] * 16 + local[:, 1::2],
        f"{module}.{CHANNEL}": torch.stack(channel, 1),
    }


def unpack(module: str, stored: Mapping[str, torch.Tensor]) -> Encoded:
    """The fields, of the stored tensors of a slab of rows."""
    return fields(*(stored[f"{module}.{part}"] for part in PARTS))


def fields(packed: torch.Tensor, local: torch.Tensor, channel: torch.Tensor) -> Encoded:
    """What the codec decodes: of uint8 [out, in/4], uint8 [out, in/128] and float32 [out, 3]."""
    import torch

    super_scale, code_scale, code_zp = channel.unbind(1)
    return {
        "codes": packed,
        "local_scale": torch.stack([local >> 4, local & 15], 2).flatten(1),
        "super_scale": super_scale.to(torch.bfloat16),
        "code_scale": code_scale.contiguous(),
        "code_zp": code_zp.contiguous(),
    }


def entry(targets: Sequence[str]) -> dict[str, Any]:
    """What quantization_config says under KEY; `targets` are patterns for names of layers."""
    return {"targets": list(targets), "group_size": GROUP, "input_order": INPUT_ORDER}


def targets_of(config: Mapping[str, Any]) -> list[str]:
    """The way back, of quantization_config. Raises ConfigError for what this version does not know."""
    said = config.get(KEY)
    if config.get("version") != VERSION:
        raise ConfigError(
            f"config.json: quantization_config of version {config.get('version')!r} of {METHOD}, this program knows"
            f" {VERSION}: a newer ernie-quant may read it"
        )
    if not isinstance(said, dict) or not isinstance(targets := said.get("targets"), list):
        raise ConfigError(f"config.json: quantization_config of {METHOD} has no list {KEY}.targets")
    for key, known in {"group_size": GROUP, "input_order": INPUT_ORDER}.items():
        if said.get(key) != known:
            raise ConfigError(f"config.json: {KEY}.{key} is {said.get(key)!r}, this program knows {known!r}")
    if odd := next((target for target in targets if not isinstance(target, str)), None):
        raise ConfigError(f"config.json: {KEY}.targets holds {odd!r:.100}, which is no pattern")
    return targets
