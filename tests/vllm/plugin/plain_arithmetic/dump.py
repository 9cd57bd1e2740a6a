"""Every parameter that a worker holds after loading, for the judge outside."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameters(worker: Any, folder: str) -> list[str]:
    """Write `target-R.safetensors`, and `draft-R.safetensors` if there is one, of this worker's rank R; the files' names."""
    from safetensors.torch import save_file

    runner = worker.model_runner
    models = {"target": runner.model}
    if (drafter := getattr(runner, "drafter", None)) is not None:
        models["draft"] = drafter.model
    written = []
    for kind, model in models.items():
        written.append(f"{folder}/{kind}-{worker.rank}.safetensors")
        save_file(_of(model), written[-1])
    return written


def _of(model: nn.Module) -> dict[str, Any]:
    found = dict(model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        bias = getattr(module, "e_score_correction_bias", None)  # of a VL model's experts: half of another's parameter
        if bias is not None:
            found[f"{name}.e_score_correction_bias"] = bias
    return {name: p.detach().clone().contiguous() for name, p in found.items() if p.numel()}
