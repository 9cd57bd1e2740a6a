"""What text a result is calibrated on: settings that its bytes depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

AUTO = "auto"  # the texts that come with the package
TOKENS, SEED = 16384, 0


@dataclass(frozen=True)
class Calibration:
    """`source`: AUTO or files; `sha256`: of these texts, by name. `fit`: o_proj and shared down_proj may change, too."""

    source: tuple[Path, ...] | str
    sha256: Mapping[str, str]
    tokens: int = TOKENS
    seed: int = SEED
    fit: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As it stands in an identity: texts by their hashes, wherever they lie."""
        return {"texts": dict(self.sha256), "tokens": self.tokens, "seed": self.seed, "fit": self.fit}
