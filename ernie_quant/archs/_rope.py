"""RoPE's scaling in every spelling: Paddle divides positions by `compression_ratio`, which others call linear scaling.

`rope_parameters` is transformers 5's word, `rope_scaling` that of transformers 4, vLLM and SGLang.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ernie_quant.archs._config import MAX_COUNT, Config
from ernie_quant.errors import ConfigError

RATIO, SPELLINGS = "compression_ratio", ("rope_scaling", "rope_parameters")
LINEAR = "linear"


@dataclass(frozen=True)
class Scaling:
    """How positions are scaled (by what a Paddle config cannot say, if not linear), and which key says so."""

    kind: str
    factor: float
    key: str

    def __str__(self) -> str:
        if self.key == RATIO:
            return f"{self.key} is {self.factor}"
        return f"{self.key} says {self.kind!r:.80}" + (f" by {self.factor}" if self.kind == LINEAR else "")


def scaling(config: Config) -> Scaling | None:
    """None where positions are as they are. Raises ConfigError, for keys that contradict each other too."""
    found = []
    if config.get(RATIO) is not None:
        found.append(Scaling(LINEAR, _factor(RATIO, config[RATIO], 0.0), RATIO))
    found += [said for key in SPELLINGS if (said := _said(key, config.get(key))) is not None]
    found = [said for said in found if (said.kind, said.factor) != (LINEAR, 1.0)]
    for other in found[1:]:
        if (other.kind, other.factor) != (found[0].kind, found[0].factor):
            raise ConfigError(f"config.json: {found[0]}, {other}; take out the one that does not hold")
    return found[0] if found else None


def in_words_of(layout: str, config: Config, out: dict[str, Any]) -> dict[str, Any]:
    """`out`, a config.json for `layout` of a text model, with the scaling of `config`. Raises ConfigError."""
    said = scaling(config)
    if said is None:
        return out
    if layout == "paddle":
        if said.kind != LINEAR:
            raise ConfigError(f"config.json: {said}: Paddle's code knows linear scaling only (compression_ratio)")
        return {key: value for key, value in out.items() if key not in SPELLINGS} | {RATIO: said.factor}
    if said.kind != LINEAR:
        return out
    if said.factor < 1:
        raise ConfigError(f"config.json: {said}: vLLM and transformers scale by 1 or more")
    words = {"rope_type": LINEAR, "factor": said.factor}
    if "rope_theta" in out:
        words["rope_theta"] = out["rope_theta"]
    return out | dict.fromkeys(SPELLINGS, words)


def unread_by_paddle(config: Config) -> str:
    """A scaling of a config.json that stands beside Paddle weights, whose code does not read that key; empty if there is none."""
    ratio = {key: value for key, value in config.items() if key not in SPELLINGS}
    said, read = scaling(config), scaling(ratio)
    return f"config.json: {said}, which Paddle's code does not read; say it as {RATIO}, or take it out" if said != read else ""


def notes(layout: str, config: Config) -> list[str]:
    """What becomes of the scaling of `config` in a config.json for `layout`."""
    said = scaling(config)
    if said is None or said.kind != LINEAR:
        return []
    if layout == "paddle":
        written = "" if said.key == RATIO else f"written as {RATIO}; "
        return [f"{said}: {written}ERNIEKit divides positions by it, FastDeploy does not"]
    return [f"{said}: written as linear scaling of RoPE ({', '.join(SPELLINGS)})"] if said.key == RATIO else []


def refuse_images(config: Config) -> None:
    """No program that reads PT files scales the positions of VL models. Raises ConfigError."""
    if (said := scaling(config)) is not None:
        raise ConfigError(f"config.json: {said}: neither vLLM nor transformers scales the positions of VL models")


def _said(key: str, value: Any) -> Scaling | None:
    """What `rope_scaling` or `rope_parameters` says; sections of a 3D RoPE are no scaling."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json: {key} is {value!r:.80}, not an object")
    kind = value.get("rope_type", value.get("type", "default"))
    if not isinstance(kind, str):
        raise ConfigError(f"config.json: {key}.rope_type is {kind!r:.80}, not a name")
    if kind == "default" or (kind != LINEAR and "mrope_section" in value):
        return None
    if kind != LINEAR:
        return Scaling(kind, 0.0, key)
    return Scaling(LINEAR, _factor(f"{key}.factor", value.get("factor"), 1.0), key)


def _factor(key: str, value: Any, least: float) -> float:
    number = type(value) in (int, float) and least <= value <= MAX_COUNT and value > 0 and math.isfinite(value)
    if not number:
        raise ConfigError(f"config.json: {key} is {value!r:.80}, not a number above 0 and up to {MAX_COUNT}")
    return float(value)
