"""A codec that needs statistics: inputs that are often large get finer codes, w ~ code * scale / weight_of_input."""

from dataclasses import dataclass

import torch

from ernie_quant.checkpoint import TensorSpec


@dataclass(frozen=True)
class Prepared:
    of_input: torch.Tensor

    @property
    def once(self):
        return {"of_input": self.of_input}

    def encode(self, weight):
        scaled = weight.float() * self.of_input
        scale = scaled.abs().amax(1, keepdim=True) / 127
        return {"codes": (scaled / scale).round().to(torch.int8), "scale": scale[:, 0]}


@dataclass(frozen=True)
class ByInput:
    rows, version, form, decodes_to = 1, 1, "int8 by input", "BF16"
    needs = ("max_input",)

    def describe(self):
        return self.form

    def problem(self, spec):
        return None

    def specs(self, spec):
        return {
            "codes": TensorSpec(spec.shape, "I8"),
            "scale": TensorSpec(spec.shape[:1], "F32"),
            "of_input": TensorSpec(spec.shape[1:], "F32"),
        }

    def bits_per_weight(self, spec):
        return 8 + 32 / spec.shape[1] + 32 / spec.shape[0]

    def prepare(self, spec, statistics):
        assert statistics["max_input"].shape == spec.shape[1:]
        return Prepared(statistics["max_input"].float().sqrt())

    def encode(self, weight):
        raise AssertionError("this codec cannot do without statistics")

    def decode(self, encoded):
        return (encoded["codes"].float() * encoded["scale"][:, None] / encoded["of_input"]).bfloat16()

    def recode(self, weight, encoded):
        return encoded | {"codes": (weight.float() * encoded["of_input"] / encoded["scale"][:, None]).round().to(torch.int8)}


CODEC = ByInput
EXAMPLES = ()
