"""From what somebody asks for to a `Calibration`, before a byte of a weight is read: the options of a command, the table of a
recipe and that of a nightly job come here."""

from __future__ import annotations

from ernie_quant.calibration.model import geometry_of
from ernie_quant.calibration.tokenizer import check_tokenizer
from ernie_quant.calibration.windows import hashes

from ernie_quant.checkpoint import Checkpoint
from ernie_quant.planning.calibration import Asked, Calibration
from ernie_quant.weights.plain import FIXES, resolve


def calibration_of(asked: Asked) -> Calibration:
    """What is asked for, and which bytes its texts have. Raises TextError."""
    return Calibration(asked.text, hashes(asked.text), asked.tokens, asked.seed, asked.fit, asked.method)


def check_source(source: Checkpoint) -> None:
    """Has it a tokenizer, and can text run through it? Raises TextError or ConfigError."""
    check_tokenizer(source.folder)
    table = resolve(source, frozenset(FIXES))
    if not table.problems:  # a plan lists them
        geometry_of(table)
