"""What is made, and how vLLM is asked to load it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """One start of vLLM."""

    tp: int = 1
    speculate: bool = False
    ep: bool = False  # ranks have whole experts, not shares of each
    refused: str = ""  # vLLM must not start, and say this
    stock: bool = False  # as users start it: nothing replaced, compiled, workers spawned

    def __str__(self) -> str:
        return f"TP {self.tp}{', speculation' * self.speculate}{', whole experts' * self.ep}{', as users do' * self.stock}"

    @property
    def folder(self) -> str:
        """A name for what it leaves."""
        return f"tp{self.tp}{'-speculation' * self.speculate}{'-ep' * self.ep}{'-stock' * self.stock}"


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
EXPERTS = (*TEXT, Run(2, ep=True))
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
    # WINT2 before int4, and none of the other linears
    "wint2-first": """
[[rule]]
match = 'layers\\.1\\.mlp\\.experts'
codec = "ccq"
effort = 1
[[rule]]
role = "experts"
codec = "rtn"
bits = 4
""",
    # text experts in 2 bits, vision experts in 8, but for one layer
    "wint2-of-text": """
[[rule]]
match = 'layers\\.1\\.mlp\\.experts'
codec = "ccq"
effort = 1
[[rule]]
role = "experts"
codec = "ccq"
effort = 1
[[rule]]
role = "vision_experts"
codec = "rtn"
bits = 8
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


WINT2 = "wint2 --runtime vllm --effort 1"
ALL_WINT2 = f"{WINT2} --wint4-layers 0 --experts-only"
# damages.py -> how it must be found
WINT2_DAMAGES = {
    "one code of WINT2": (Run(2),),
    "local scales of one group swapped": (Run(1),),
    "code zero of one row": (Run(2, ep=True),),
    "a version that is not known": (Run(1, refused="version 2 of ernie-wint2"),),
    "a local scale is lost": (Run(2, refused="1 of 72 tensors of its experts are not in the checkpoint"),),
    "a tensor is too short": (Run(1, refused="config.json asks for U8 (256, 64)"),),
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
    *_cases("moe", TEXT, "mxfp4 --experts-only", "mxfp4"),
    *_cases("mtp", MTP, "mxfp4 --mtp"),
    *_cases("vl", TEXT, "mxfp4 --experts-only", "mxfp4"),
    *_cases("wide", TEXT, "wint4 --activations fp8 --experts-only", "wint4 --activations fp8"),
    *_cases("vl", (Run(1),), "wint4 --activations fp8"),
    *_cases("moe", EXPERTS, ALL_WINT2, f"{WINT2} --wint4-layers 2"),
    *_cases("mtp", (Run(2, stock=True),), ALL_WINT2),  # minutes: vLLM compiles
    _recipe("moe", TEXT, "wint2-first"),
    *_cases("mtp", MTP, f"{WINT2} --wint4-layers 0 --mtp"),
    *_cases("vl", EXPERTS, f"{WINT2} --wint4-layers 2"),
    _recipe("vl", TEXT, "wint2-of-text"),
    *_cases("narrow", (Run(1), Run(2, refused="a rank of 2 has 192 of 384 in down_proj"), Run(2, ep=True)), ALL_WINT2),
    *(Case("moe", tuple(ALL_WINT2.split()), runs, damage=damage) for damage, runs in WINT2_DAMAGES.items()),
    Case("moe", ("wint4",), (Run(1),), damage="gate and up swapped in one expert"),
    Case("moe", ("wint4",), (Run(2),), damage="scales of one row in another order"),
    Case("moe", ("wint4",), (Run(1),), damage="router off by a millionth"),
    Case("moe", ("nvfp4",), (Run(1),), damage="a number of its own for all scales of up_proj"),
    Case("vl", ("wint4",), (Run(1),), damage="one code of a vision expert"),
    Case("mtp", ("wint4", "--experts-only"), SPECULATION, damage="one weight of the draft"),
]
