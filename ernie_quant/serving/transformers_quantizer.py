"""Quantizers for transformers: of quant_method ernie-wint2, and in the place of the one for compressed-tensors.

huggingface/transformers: quantizers/base.py (the hooks), conversion_mapping.py (what converters a model has),
core_model_loading.py (what they do). The same code runs in all versions that runtimes/_transformers.py names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from ernie_quant.codecs.keep import Keep
from ernie_quant.codecs.w4a4 import NvFloat4Inputs
from ernie_quant.codecs.w4afp8 import Weight4Float8
from ernie_quant.errors import ConfigError, ErnieQuantError
from ernie_quant.runtimes._transformers import loads_alone
from ernie_quant.runtimes._wint2 import METHOD
from ernie_quant.serving.transformers_decode import Decode
from ernie_quant.serving.transformers_experts import PROJECTIONS, PackedExperts, is_experts
from ernie_quant.serving.transformers_held import Held, checkpoint_of, held, is_expert
from ernie_quant.weights.stored import Stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODELS = ("ernie4_5", "ernie4_5_moe", "ernie4_5_vl_moe")  # model_type
EXPERTS = re.compile(r"^(.*experts\.\*\.\w+)\.weight\$?$")  # a pattern of a converter that merges experts
INPUTS = "ernie_quant: weights for fp8 or fp4 inputs are decoded; the inputs are not rounded, as vLLM would"
UNSAVED = "ernie_quant: packed experts are not saved: copy the checkpoint, or load it without native=True and save it as bf16"
logger = logging.get_logger(__name__)


class Wint2Config(QuantizationConfigMixin):
    """quantization_config of a checkpoint with WINT2 experts.

    `from_pretrained(…, quantization_config=Wint2Config(native=True))` keeps quantized experts in memory as they are stored, those
    in 4 bits too, and decodes one when a token goes to it; without that all is decoded when it is loaded.
    """

    def __init__(self, native: bool = False, **said: Any) -> None:
        self.quant_method: Any = METHOD
        self.native, self.said = native, said

    @property
    def dequantize(self) -> bool:
        """transformers asks whether the model is a plain one after loading."""
        return not self.native

    def to_dict(self) -> dict[str, Any]:
        """What config.json says."""
        return {**self.said, "quant_method": METHOD}

    def get_loading_attributes(self) -> dict[str, Any]:
        """What of a configuration that is given to from_pretrained goes into that of the checkpoint."""
        return {"native": self.native}


class Decoding:
    """The hooks by which a quantizer decodes what a checkpoint `held`; where nothing is, they are those of the next class."""

    held: Held | None = None
    native = False  # experts stay as they are stored

    def look(self, model: PreTrainedModel, files: Sequence[str] | None) -> Held | None:
        """What is to be decoded, None for what the next class shall load. Raises ErnieQuantError."""
        raise NotImplementedError

    def preprocess_model(self, model: PreTrainedModel, dtype: Any = None, **named: Any) -> None:
        """Looks at names, shapes and config.json before anything is loaded. Raises ErnieQuantError."""
        self.held = self.look(model, named.get("checkpoint_files"))
        self.dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        super().preprocess_model(model, dtype=dtype, **named)  # type: ignore[misc]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **named: Any) -> Any:
        if self.held is None:
            return super()._process_model_before_weight_loading(model, **named)  # type: ignore[misc]
        if any(isinstance(stored.codec, Weight4Float8 | NvFloat4Inputs) for stored in self.held.stored()):
            logger.warning_once(INPUTS)
        for name, module in list(model.named_modules()) if self.native else ():
            names = {projection: f"{name}.{projection}" for projection in PROJECTIONS}
            if is_experts(module) and all(map(self.held.packed, names.values())):
                model.set_submodule(name, PackedExperts(module, {key: self.held.of(own) for key, own in names.items()}))
        return model

    def update_weight_conversions(self, conversions: list[Any], model: PreTrainedModel | None = None) -> list[Any]:
        """The model's converters, ours in the place of those that merge experts, and one for linear layers behind them."""
        if self.held is None:  # up to 5.20 there is no model
            named = () if model is None else (model,)
            return super().update_weight_conversions(conversions, *named)  # type: ignore[misc,no-any-return]
        experts = _parts([stored for stored in self.held.stored() if is_expert(stored)])
        others = [s for s in self.held.stored() if not is_expert(s) and not isinstance(s.codec, Keep)]
        return [self._of_experts(converter, experts) for converter in conversions] + self._of_linears(others)

    def _of_experts(self, converter: Any, parts: Sequence[str]) -> Any:
        """The converter with all parts of the weights that it merges; one that merges no experts as it is."""
        heads = [match[1] for pattern in converter.source_patterns if (match := EXPERTS.search(pattern))]
        if not parts or len(heads) != len(converter.source_patterns):
            return converter
        origins = {f"{head}.{part}$": (head.rpartition(".")[2], part) for head in heads for part in parts}
        targets = [*converter.target_patterns]
        ours = WeightConverter([*origins], targets[:1], [Decode(self, origins, targets)])
        ours.scope_prefix, ours.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
        return ours

    def _of_linears(self, quantized: Sequence[Stored]) -> list[Any]:
        """Of the names that parts have, `weight` is one that kept tensors have too: it is taken of layers of these names only."""
        parts = _parts(quantized)
        layers = sorted({stored.name.rsplit(".", 2)[1] for stored in quantized})
        origins = {f"(?<={layer}\\.)weight$": ("", "weight") for layer in layers if "weight" in parts}
        origins |= {f"{part}$": ("", part) for part in parts if part != "weight"}
        return [WeightConverter([*origins], ["weight"], [Decode(self, origins, ["weight"])])] if origins else []

    def postprocess_model(self, model: PreTrainedModel, **named: Any) -> Any:
        """A decoded model is a plain one; it can be saved and trained."""
        found = super().postprocess_model(model, **named)  # type: ignore[misc]
        if self.held is not None:
            _cast(model, self.dtypes)
        if self.held is not None and not self.native:
            self.remove_quantization_config(model)  # type: ignore[attr-defined]
            model.__dict__.pop("_weight_conversions", None)  # up to 5.20 it is left there
        self.held = None
        return found


def _cast(model: PreTrainedModel, dtypes: Mapping[str, Any]) -> None:
    """Up to 5.20 a kept weight whose name is another in the file has the dtype that it has there, whatever was asked for."""
    for name, parameter in model.named_parameters():
        if (
            parameter.is_floating_point()
            and parameter.device.type != "meta"
            and (dtype := dtypes.get(name, parameter.dtype)) != parameter.dtype
        ):
            parameter.data = parameter.data.to(dtype)


def _parts(weights: Sequence[Stored]) -> list[str]:
    """What the names of their stored tensors end with."""
    return sorted({name.rpartition(".")[2] for stored in weights for name in stored.expected})


class CompressedTensors(Decoding, CompressedTensorsHfQuantizer):
    """transformers' own, but for checkpoints of ERNIE models that it decodes wrongly or not at all."""

    def look(self, model: PreTrainedModel, files: Sequence[str] | None) -> Held | None:
        """Only what config.json says decides, as for the commands that a model card has."""
        if model.config.model_type not in MODELS:
            return None
        try:
            checkpoint = checkpoint_of(files)
        except ErnieQuantError:  # whatever it is, it is not ours
            return None
        if loads_alone(checkpoint.config):
            return None
        try:
            return held(checkpoint)
        except ConfigError as error:
            logger.warning(f"ernie_quant: left to transformers, which may load it wrongly: {error}")
            return None


class Wint2(Decoding, HfQuantizer):
    """Of WINT2 experts, and of what else may stand beside them: decoded when it is loaded, or the experts as they are."""

    requires_calibration = True

    def __init__(self, quantization_config: Wint2Config, **named: Any) -> None:
        super().__init__(quantization_config, **named)
        self.native = quantization_config.native

    def look(self, model: PreTrainedModel, files: Sequence[str] | None) -> Held | None:
        """All of it."""
        if model.config.model_type not in MODELS:
            raise ConfigError(f"config.json: {METHOD} is for {', '.join(MODELS)}, not for {model.config.model_type!r}")
        return held(checkpoint_of(files))

    def is_serializable(self) -> bool:
        """Not with packed experts. transformers says then to look at the warnings."""
        logger.warning(UNSAVED)
        return False

    @property
    def is_trainable(self) -> bool:
        """Not with packed experts."""
        return False
