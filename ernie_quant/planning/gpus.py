"""GPUs by name and by size, and how much of one there is for a model.

Memory and bandwidth are what their makers state; makers' GB are taken for GiB, which is about what drivers report.
"""

from __future__ import annotations

from dataclasses import dataclass

from ernie_quant.settings import parse_size

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """One GPU: memory in bytes; memory bandwidth in bytes per second, 0 where it is not known."""

    name: str
    memory: int
    bandwidth: float = 0.0


@dataclass(frozen=True)
class Limits:
    """The constants of the estimate; `reserve` in bytes per GPU, for activations and the like."""

    utilization: float = 0.9
    reserve: int = 3 * GIB
    max_model_len: int = 32768
    max_num_seqs: int = 32
    kv_dtype: str = "bf16"

    def usable(self, gpu: Gpu) -> float:
        """Bytes of a GPU for weights and KV cache."""
        return self.utilization * gpu.memory - self.reserve


# GiB, and GB per second
_KNOWN = {
    "L4": (24, 300), "A10": (24, 600), "A30": (24, 933), "RTX 3090": (24, 936), "RTX 4090": (24, 1008),
    "RTX 5090": (32, 1792), "V100": (32, 900),
    "A6000": (48, 768), "L20": (48, 864), "L40S": (48, 864),
    "A100": (80, 2039), "A800": (80, 2039), "H800": (80, 3350), "H100": (80, 3350),
    "RTX PRO 6000": (96, 1792), "H20": (96, 4000),
    "H200": (141, 4800),
    "B200": (180, 8000), "MI300X": (192, 5300),
    "B300": (288, 8000), "MI355X": (288, 8000),
}  # fmt: skip
KNOWN = {name: Gpu(name, memory * GIB, speed * 1e9) for name, (memory, speed) in _KNOWN.items()}
USUAL = "80GiB"
OF_CARDS = (24, 48, 80, 141)  # GiB: what a card of a result tells


def find(text: str) -> Gpu:
    """A GPU by its name (`H100`, `rtx4090`) or memory (`80GiB`; a plain 80 is GiB too). Raises ValueError."""
    key = _plain(text)
    if known := {_plain(name): gpu for name, gpu in KNOWN.items()}.get(key):
        return known
    try:
        memory = int(text) * GIB if text.isdecimal() and int(text) < 1000 else parse_size(text)
    except ValueError:
        raise ValueError(f"{text!r} is no size such as 80GiB and none of {', '.join(KNOWN)}") from None
    return of_memory(memory)


def of_memory(memory: int) -> Gpu:
    """A GPU of so many bytes, as fast as the fastest that is known to have them."""
    alike = [gpu.bandwidth for gpu in KNOWN.values() if gpu.memory == memory]
    return Gpu(f"{memory / GIB:.4g}GiB", memory, max(alike, default=0.0))


def _plain(name: str) -> str:
    return "".join(name.split()).replace("-", "").upper()
