"""What FastDeploy's container of WINT4, WINT2 and WINT8 weights holds, and its quantization_config: both ways.

PaddlePaddle/FastDeploy, model_executor/layers/quantization/mix_quant.py and wint2.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ernie_quant.codecs import Codec
from ernie_quant.codecs.ccq import ConvolutionalCode
from ernie_quant.codecs.keep import KEEP
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.errors import ConfigError
from ernie_quant.names import EXPERT_ROLES, QUANTIZABLE
from ernie_quant.runtimes import Linear

WINT2 = ConvolutionalCode()
WINT4 = RoundToNearest(4, CHANNEL, full_range=False)
WINT8 = RoundToNearest(8, CHANNEL, full_range=False)
GROUP = 64  # inputs per local scale
LINEAR = re.compile(r"\.(qkv|o|up_gate|down)_proj\.weight$")
UNSAID_END = 6  # last layer of WINT4 experts where quant_end_layer is missing: the loader's own default


def config(linears: Sequence[Linear]) -> dict[str, Any]:
    """What the loader reads: quantization, moe_quant_type, quant_end_layer and the two quant_types; the rest describes."""
    last = max(_layer(li.name) for li in linears)
    return {
        "quantization": "wint2",
        "dense_quant_type": "wint8",
        "moe_quant_type": "w4w2",
        "dense_quant_config": {"quant_type": "wint8", "quant_granularity": "per_channel"},
        "moe_quant_config": {
            "quant_type": "w4w2",
            "moe_w4_quant_config": {
                "quant_type": "wint4",
                "quant_granularity": "per_channel",
                "quant_start_layer": 0,
                "quant_end_layer": wint4_to(linears),
            },
            "moe_w2_quant_config": {
                "quant_type": "wint2",
                "quant_granularity": "pp_acc",
                "quant_group_size": GROUP,
                "quant_start_layer": wint4_to(linears) + 1,
                "quant_end_layer": last,
            },
        },
    }


def codecs_of(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Codec]:
    """The codec of each linear (Paddle name). Raises ConfigError."""
    try:
        moe = config["moe_quant_config"]
        last_wint4 = moe.get("moe_w4_quant_config", {}).get("quant_end_layer", UNSAID_END)
        known = config["quantization"] == "wint2" and moe.get("quant_type", "w4w2") == "w4w2" and type(last_wint4) is int
    except (KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise ConfigError("config.json: quantization_config is none that this tool writes (wint2 with w4w2 experts)")
    codecs: dict[str, Codec] = {}
    for name in names:
        codec: Codec = WINT8 if LINEAR.search(name) else KEEP
        if ".experts." in name:
            codec = WINT4 if _layer(name) <= last_wint4 else WINT2
        codecs[name] = codec
    return codecs


def alike(name: str, role: str) -> str:
    """All experts of a layer; every other linear is for itself."""
    return re.sub(r"experts\..*$", "experts", name) if role in EXPERT_ROLES else name


def candidates(role: str) -> tuple[Codec, ...]:
    """Experts have two forms, every other linear one."""
    if role in EXPERT_ROLES:
        return (WINT2, WINT4)
    return (WINT8,) if role in QUANTIZABLE else (KEEP,)


def _layer(name: str) -> int:
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def wint2_from(linears: Sequence[Linear]) -> int:
    """The first layer of WINT2 experts; far beyond the last where there are none."""
    return min((_layer(li.name) for li in linears if isinstance(li.codec, ConvolutionalCode)), default=1 << 30)


def wint4_to(linears: Sequence[Linear]) -> int:
    """The last layer of WINT4 experts, -1 where there are none."""
    experts = [li for li in linears if li.role in EXPERT_ROLES and isinstance(li.codec, RoundToNearest)]
    return max((_layer(li.name) for li in experts), default=-1)


def problems(linears: Sequence[Linear]) -> list[str]:
    """What it does not hold: it has one form for each kind of layer, and WINT4 experts come first."""
    misfits = []
    for linear in linears:
        if not LINEAR.search(linear.name):
            continue
        out, width = linear.spec.shape
        if isinstance(linear.codec, RoundToNearest) and (out % 8 or width % GROUP):  # WINT2 says its own widths
            misfits.append(
                f"{linear.name}: {out} outputs and {width} inputs are not multiples of 8 and {GROUP}, which its kernels want"
            )
        wanted = (WINT2, WINT4) if linear.role in EXPERT_ROLES else (WINT8,)
        if not any(linear.codec.form == w.form for w in wanted):
            words = " or ".join(w.describe() for w in wanted)
            misfits.append(f"{linear.name}: FastDeploy's container wants {words}, not {linear.codec.describe()}")
    first, last = wint2_from(linears), wint4_to(linears)
    if first <= last:
        misfits.append(f"experts: WINT4 must come before WINT2, but layer {last} is WINT4 and layer {first} WINT2")
    return misfits
