"""config.json of a checkpoint: what Python writes and JSON does not know is named, and refused only where programs use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ernie_quant.errors import CheckpointError, ConfigError, line_of
from ernie_quant.jsonio import not_finite, read_object
from ernie_quant.paths import CONFIG, inside
from ernie_quant.sources.pointers import is_pointer, words

# numbers that programs compute with; the sizes that this one needs are checked where they are read
USED = {"rope_theta", "rope_parameters", "rope_scaling", "rms_norm_eps", "compression_ratio", "moe_norm_min", "freq_allocation"}


def read_config(folder: Path, *, links: bool) -> tuple[dict[str, Any], list[str]]:
    """config.json of `folder`, and notes. Raises CheckpointError or ConfigError."""
    if is_pointer(folder / CONFIG):
        raise CheckpointError(words([CONFIG]))
    config = read_object(inside(folder, CONFIG, "the checkpoint", links=links), finite=False)
    odd = dict(not_finite(config))
    if used := next((path for path in odd if USED & {*path.split(".")}), None):
        raise ConfigError(f"{CONFIG}: {used} is {odd[used]!r:.80}, and programs compute with it; give it its number")
    if not odd:
        return config, []
    said = ", ".join(f"{path} is {value!r:.40}" for path, value in odd.items())
    return config, [line_of(f"{CONFIG}: {said:.300}: JSON has no such numbers and no program needs them; left out")]
