"""What is made, and how vLLM is asked to load it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """One start of vLLM."""

    tp: int = 1
    speculate: bool = False

    def __str__(self) -> str:
        return f"TP {self.tp}{', speculation' if self.speculate else ''}"


@dataclass(frozen=True)
class Case:
    """A source of models.py, the command that quantizes it, and the starts of vLLM.

    `recipe` is one of RECIPES, written to a file; `damage` one of damages.py, done to the result, which must be found.
    """

    source: str
    command: tuple[str, ...]
    runs: tuple[Run, ...]
    recipe: str = ""
    damage: str = ""

    @property
    def name(self) -> str:
        """`moe wint4 --experts-only`, `moe quantize --recipe by-layer`, `moe wint4, damaged: …`."""
        return " ".join((self.source, *self.command)) + (f", damaged: {self.damage}" if self.damage else "")


TEXT = (Run(1), Run(2))
MTP = (Run(1), Run(1, speculate=True), Run(2, speculate=True))
SPECULATION = (Run(1, speculate=True),)

RECIPES = {
    # attention int8 per channel; the experts of one layer int8, of the other int4 (of a VL model, its text experts alone)
    "by-layer": """
[[rule]]
match = 'layers\\.1\\.mlp\\.experts'
codec = "rtn"
bits = 8
[[rule]]
role = "experts"
codec = "rtn"
bits = 4
group_size = 64
[[rule]]
role = "attention"
codec = "rtn"
bits = 8
group_size = "channel"
""",
    # the same for both kinds of a VL model's experts
    "by-layer-both": """
[[rule]]
match = 'layers\\.1\\.mlp\\.experts'
codec = "rtn"
bits = 8
[[rule]]
match = 'layers\\.2\\.mlp\\.experts'
codec = "rtn"
bits = 4
group_size = 64
""",
    # the experts of one layer alone
    "one-layer": """
[[rule]]
match = 'layers\\.1\\.mlp\\.experts'
codec = "rtn"
bits = 4
""",
    "one-layer-fp8": """
[[rule]]
match = 'layers\\.1\\.mlp\\.experts'
codec = "fp8"
""",
    # the MTP block int4, the attention of the decoder as it is
    "mtp-alone": """
[[rule]]
role = "mtp"
codec = "rtn"
bits = 4
[[rule]]
role = "experts"
codec = "rtn"
bits = 4
""",
    # text and vision experts in different forms
    "text-and-vision": """
[[rule]]
role = "experts"
codec = "rtn"
bits = 4
[[rule]]
role = "vision_experts"
codec = "rtn"
bits = 8
group_size = 64
""",
    # shared experts in more bits than the routed ones
    "shared-in-8-bits": """
[[rule]]
role = "shared_experts"
codec = "rtn"
bits = 8
[[rule]]
role = "experts"
codec = "rtn"
bits = 4
""",
    # integers and float8 in one checkpoint
    "int4-and-fp8": """
[[rule]]
role = "experts"
codec = "rtn"
bits = 4
[[rule]]
role = "attention"
codec = "fp8"
quant_method = "compressed-tensors"
""",
}


def _cases(source: str, runs: tuple[Run, ...], *commands: str) -> list[Case]:
    return [Case(source, tuple(command.split()), runs) for command in commands]


def _recipe(source: str, runs: tuple[Run, ...], recipe: str) -> Case:
    return Case(source, ("quantize", "--recipe", recipe), runs, recipe)


CASES = [
    *_cases(
        "dense", TEXT, "wint4", "wint4 --group-size 64", "wint4 --group-size 32", "wint4 --group-size channel", "wint8", "fp8"
    ),
    *_cases("moe", TEXT, "wint4 --experts-only", "wint4", "wint4 --group-size 64", "wint4 --group-size 32"),
    *_cases("moe", TEXT, "wint4 --group-size channel", "wint8 --experts-only", "wint8 --group-size channel"),
    *_cases("moe", TEXT, "fp8 --experts-only", "fp8"),
    *(_recipe("moe", TEXT, recipe) for recipe in ("by-layer", "one-layer", "one-layer-fp8", "shared-in-8-bits", "int4-and-fp8")),
    *_cases("dense", TEXT, "nvfp4"),
    *_cases("moe", TEXT, "nvfp4 --experts-only", "nvfp4", "nvfp4 --activations fp4 --calibration auto --calibration-tokens 512"),
    *_cases("mtp", MTP, "nvfp4 --mtp"),
    *_cases("vl", TEXT, "nvfp4"),
    *_cases("mtp", MTP, "wint4 --experts-only", "wint4", "wint4 --mtp", "wint8", "wint8 --mtp --group-size channel"),
    *_cases("mtp", MTP, "wint4 --experts-only --mtp", "fp8 --experts-only", "fp8", "fp8 --mtp"),
    _recipe("mtp", MTP, "mtp-alone"),
    *_cases("vl", TEXT, "wint4 --experts-only", "wint4", "wint4 --group-size 32", "wint4 --group-size channel", "wint8"),
    *(_recipe("vl", TEXT, recipe) for recipe in ("by-layer", "by-layer-both", "one-layer", "text-and-vision", "int4-and-fp8")),
    *_cases("vl", TEXT, "fp8 --experts-only", "fp8"),
    _recipe("vl", TEXT, "one-layer-fp8"),
    Case("moe", ("wint4",), (Run(1),), damage="gate and up swapped in one expert"),
    Case("moe", ("wint4",), (Run(2),), damage="scales of one row in another order"),
    Case("moe", ("wint4",), (Run(1),), damage="router off by a millionth"),
    Case("moe", ("nvfp4",), (Run(1),), damage="a number of its own for all scales of up_proj"),
    Case("vl", ("wint4",), (Run(1),), damage="one code of a vision expert"),
    Case("mtp", ("wint4", "--experts-only"), SPECULATION, damage="one weight of the draft"),
]
