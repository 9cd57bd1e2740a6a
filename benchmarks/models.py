"""Load any checkpoint with transformers, as plain weights, in silence."""

import os
import warnings
from pathlib import Path

# before the imports: they read it once
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def silence() -> None:
    """Turn off warnings and progress bars; errors still come."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def load_model(folder: Path, dtype: torch.dtype):
    """Load a model whose parameters are all plain `dtype`; quantized weights are dequantized while loading.

    transformers decodes compressed-tensors to the type of the scales (bf16), fp8 blocks to float32.
    """
    config = AutoConfig.from_pretrained(folder)
    # honoured for compressed-tensors and for fp8 blocks alike
    if hasattr(config, "quantization_config"):
        config.quantization_config["dequantize"] = True
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype).to(dtype).eval()


def load_tokenizer(folder: Path):
    """Load the tokenizer of a checkpoint."""
    return AutoTokenizer.from_pretrained(folder)
