"""Is a checkpoint quantized? Its tensors say so; config.json may have kept an entry of another time."""

from __future__ import annotations

from typing import Any

from ernie_quant.checkpoint import Checkpoint
from ernie_quant.dtypes import FLOATS
from ernie_quant.errors import PlanError, line_of

QUANTIZED_PARTS = (".weight_packed", ".weight_scale", ".weight_scale_inv", ".quant_weight", ".qweight", ".super_scales")
CLAIMS = ("quantization_config", "compression_config", "is_quantized")  # keys of config.json


def evidence(source: Checkpoint) -> str:
    """What shows that it is: a part of a quantized weight, or config.json where not every tensor is plain."""
    part = next((name for name in source.refs if name.endswith(QUANTIZED_PARTS)), None)
    claim = _claim(source)
    if claim and not (part or _odd(source)):
        return ""
    return f"config.json has {claim}" if claim else f"it holds {part}" if part else ""


def leftover(source: Checkpoint) -> str:
    """A note on what config.json says of quantization although every tensor is plain; empty where it says nothing."""
    claim = _claim(source)
    if not claim or evidence(source):
        return ""
    entry = next(part[claim] for part in _sections(source) if claim in part)
    method = entry.get("quant_method") if isinstance(entry, dict) else None
    dtypes = ", ".join(sorted({ref.spec.dtype for ref in source.refs.values()}))
    said = f"{claim} ({method!r:.40})" if method else claim
    return line_of(
        f"config.json: {said} is left over, as every tensor is plain ({dtypes}): they are taken as they are, it is dropped"
    )


def notes_of(source: Checkpoint) -> list[str]:
    """All that is worth a line, and no error."""
    left = leftover(source)
    return [*source.notes, *([left] if left else [])]


def refuse_quantized(source: Checkpoint) -> None:
    """Quantizing twice multiplies the errors. Raises PlanError."""
    if found := evidence(source):
        raise PlanError(f"{source.folder}: is quantized already ({found}); start from the original checkpoint", [])


def _claim(source: Checkpoint) -> str:
    """The key by which config.json says so."""
    said = (key for part in _sections(source) for key in CLAIMS if part.get(key) not in (None, False))
    return next(said, "")


def _sections(source: Checkpoint) -> list[dict[str, Any]]:
    """config.json, and the part of it that speaks of the text model."""
    text = source.config.get("text_config")
    return [source.config, *([text] if isinstance(text, dict) else [])]


def _odd(source: Checkpoint) -> bool:
    return any(ref.spec.dtype not in FLOATS for ref in source.refs.values())
