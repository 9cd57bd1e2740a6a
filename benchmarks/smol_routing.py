"""Real top-k routing for smol_ernie.py: neurons become experts by what they do on text, and a router is fitted.

Neurons that are used most form the shared expert. The others are clustered by co-activation into experts of equal
size. The router is a ridge regression of the log of each expert's output norm. Only top-k experts run: perplexity
rises, and experts get uneven load, as in a trained model. The text is the documentation that CPython carries.
"""

from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from smol_source import Dense
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import normalize, silu

TOKENS, WINDOW = 8192, 512
RIDGE = 1e-2
LOGIT_SCALE = 0.5


@dataclass(frozen=True)
class Split:
    """Which neurons of a layer form which expert, and how they are routed."""

    shared: Tensor  # neuron ids
    experts: list[Tensor]  # neuron ids
    router: Tensor  # [experts, hidden]
    bias: Tensor  # [experts], added to the probabilities when choosing, not when weighting
    down_scale: Tensor  # [experts]


@torch.no_grad()
def sparse_splits(
    dense: Dense, layers: range, tokenizer: Path, experts: int, width: int, shared: int, top_k: int, seed: int
) -> dict[int, Split]:
    """Split the given layers for top-k routing."""
    inputs = ffn_inputs(dense, layers, calibration_ids(tokenizer))
    splits = {}
    for i in layers:
        splits[i] = split_layer(dense.layers[i], inputs.pop(i), experts, width, shared * width, top_k, seed + i)
    return splits


def calibration_ids(tokenizer: Path) -> Tensor:
    """Return windows spread evenly over the text, [windows, WINDOW]."""
    text = "\n\n".join(topics[key] for key in sorted(topics))
    ids = Tokenizer.from_file(str(tokenizer)).encode(text).ids
    count = TOKENS // WINDOW
    step = max(1, (len(ids) - WINDOW) // count)
    return torch.tensor([ids[i * step : i * step + WINDOW] for i in range(count)])


def ffn_inputs(dense: Dense, layers: range, ids: Tensor) -> dict[int, Tensor]:
    """Run the dense model on the windows and return what each FFN reads, [tokens, hidden]."""
    model = llama(dense)
    seen: dict[int, list[Tensor]] = {i: [] for i in layers}

    def keep(i: int):
        return lambda module, args: seen[i].append(args[0].reshape(-1, args[0].shape[-1]))

    for i in layers:
        model.layers[i].mlp.register_forward_pre_hook(keep(i))
    for window in ids:
        model(window[None], use_cache=False)
    return {i: torch.cat(parts) for i, parts in seen.items()}


def llama(dense: Dense):
    """Return the dense model as transformers' Llama, in float32."""
    from transformers import LlamaConfig, LlamaModel

    d = dense.dims
    config = LlamaConfig(
        vocab_size=dense.embed.shape[0],
        hidden_size=d.hidden,
        intermediate_size=d.ffn,
        num_hidden_layers=d.layers,
        num_attention_heads=d.heads,
        num_key_value_heads=d.kv_heads,
        head_dim=d.head_dim,
        rms_norm_eps=d.eps,
        max_position_embeddings=d.context,
        rope_parameters={"rope_type": "default", "rope_theta": d.rope_theta},
    )
    model = LlamaModel(config)
    model.load_state_dict(llama_tensors(dense))
    return model.eval()


def llama_tensors(dense: Dense) -> dict[str, Tensor]:
    """Name the tensors as transformers' Llama does, which rotates halves, not adjacent pairs."""
    tensors = {"embed_tokens.weight": dense.embed, "norm.weight": dense.norm}
    for i, layer in enumerate(dense.layers):
        layer = layer | {
            "q": pairs_to_halves(layer["q"], dense.dims.heads),
            "k": pairs_to_halves(layer["k"], dense.dims.kv_heads),
        }
        tensors |= {f"layers.{i}.self_attn.{x}_proj.weight": layer[x] for x in "qkvo"}
        tensors |= {f"layers.{i}.mlp.{x}_proj.weight": layer[x] for x in ("gate", "up", "down")}
        tensors[f"layers.{i}.input_layernorm.weight"] = layer["norm1"]
        tensors[f"layers.{i}.post_attention_layernorm.weight"] = layer["norm2"]
    return tensors


def pairs_to_halves(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head from adjacent rotary pairs to (first halves, second halves)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


def split_layer(layer: dict[str, Tensor], x: Tensor, experts: int, width: int, shared_width: int, top_k: int, seed: int) -> Split:
    """Choose the experts of one layer from its input x [tokens, hidden] and fit their router."""
    active = silu(x @ layer["gate"].T) * (x @ layer["up"].T)  # [tokens, neurons]
    energy = active.abs() * layer["down"].norm(dim=0)
    shared = torch.argsort(energy.pow(2).mean(0), descending=True)[:shared_width]
    rest = torch.tensor(sorted(set(range(active.shape[1])) - set(shared.tolist())))
    label = balanced_clusters(energy[:, rest].T.contiguous(), experts, width, seed)
    groups = [rest[label == e] for e in range(experts)]
    outputs = [active[:, g] @ layer["down"][:, g].T for g in groups]
    router, bias = fit_router(x, outputs)
    routing = routing_weights(x, router, bias, top_k)
    return Split(shared, groups, router, bias, fit_scales(outputs, routing, top_k))


def balanced_clusters(features: Tensor, clusters: int, size: int, seed: int, iterations: int = 15) -> Tensor:
    """Cluster the rows into clusters of exactly `size` rows and return one label per row (greedy k-means)."""
    rows = normalize(features - features.mean(1, keepdim=True), dim=1)
    order = np.random.default_rng(seed).permutation(len(rows))
    centres = rows[torch.from_numpy(order[:clusters])]
    for _ in range(iterations):
        label = assign(rows @ centres.T, size)
        centres = torch.stack([normalize(rows[label == c].mean(0), dim=0) for c in range(clusters)])
    return label


def assign(similarity: Tensor, size: int) -> Tensor:
    """Give each row its most similar cluster with room, surest rows first."""
    label = torch.full((len(similarity),), -1)
    room = [size] * similarity.shape[1]
    preferred = torch.argsort(similarity, dim=1, descending=True)
    for row in torch.argsort(similarity.max(1).values, descending=True).tolist():
        label[row] = cluster = next(c for c in preferred[row].tolist() if room[c])
        room[cluster] -= 1
    return label


def fit_router(x: Tensor, outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Fit router [experts, hidden] and bias [experts] to the log of the experts' output norms."""
    target = torch.log(torch.stack([o.norm(dim=1) for o in outputs], 1) + 1e-4)
    target = target - target.mean(1, keepdim=True)
    gram = x.T @ x
    gram = gram + RIDGE * torch.diag(gram).mean() * torch.eye(len(gram))
    router = torch.linalg.solve(gram, x.T @ target).T
    # probabilities are about (1 + logit) / E, so a constant in the logits is 1/E of it in the probabilities
    bias = (target - x @ router.T).mean(0) * LOGIT_SCALE / len(outputs)
    return router * LOGIT_SCALE, bias


def routing_weights(x: Tensor, router: Tensor, bias: Tensor, top_k: int) -> Tensor:
    """Route as ERNIE does: [tokens, experts], zero for experts that do not run."""
    probability = torch.softmax(x @ router.T, 1)
    chosen = torch.topk(probability + bias, top_k, dim=1).indices
    weight = torch.gather(probability, 1, chosen)
    return torch.zeros_like(probability).scatter(1, chosen, weight / weight.sum(1, keepdim=True))


def fit_scales(outputs: list[Tensor], routing: Tensor, top_k: int) -> Tensor:
    """Fit one factor per expert so that the routed sum comes closest to the sum of all experts."""
    routed = torch.stack([(o * routing[:, e : e + 1]).reshape(-1) for e, o in enumerate(outputs)], 1)
    gram = routed.T @ routed
    gram = gram + 1e-3 * torch.diag(gram.diagonal())
    return torch.linalg.solve(gram, routed.T @ sum(outputs).reshape(-1)).clamp(0.5 * top_k, 2.0 * top_k)
