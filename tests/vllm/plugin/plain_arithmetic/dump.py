"""Every parameter that a worker holds after loading, for the judge outside."""

from __future__ import annotations

from typing import Any

from torch import nn

from plain_arithmetic import decode

WINT2 = ("packed", "scale", "channel_scale")  # experts that the plug-in of ernie-quant holds as they are stored


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
    for last in [
        name.removesuffix("_packed")
        for name in found
        if name.endswith(".w13_weight_packed") or name.endswith(".w2_weight_packed")
    ]:
        found[last] = decode.wint2(*(found.pop(f"{last}_{part}").detach() for part in WINT2))
    return {name: p.detach().clone().contiguous() for name, p in found.items() if p.numel()}
