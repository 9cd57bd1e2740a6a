"""Good checkpoints of every kind in a scratch folder, and how each of their files is changed."""

from __future__ import annotations

import ast
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers.in_memory import fused, fused_vl
from helpers.models import random_model
from helpers.synthetic import write_bin, write_model, write_pdparams, write_safetensors
from safetensors.torch import load_file

from ernie_quant import codecs
from ernie_quant.planning import built_in, recipe
from ernie_quant.planning.make import make_plan
from ernie_quant.run.whole import run_plan
from ernie_quant.sources import open_source
from ernie_quant.weights import layouts
from faults import _ggufs, _sidecars
from faults._mutations import BULKS, Archive, boundaries, changed_archive, changed_json, changed_pickle, changed_safetensors

DENSE = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 8,
         "num_hidden_layers": 1}  # fmt: skip
MOE = DENSE | {"moe_intermediate_size": 32, "moe_num_experts": 2, "moe_layer_start_index": 0, "moe_layer_end_index": 0,
               "moe_num_shared_experts": 1, "head_dim": 16}  # fmt: skip
Model = tuple[dict[str, Any], dict[str, torch.Tensor]]
KINDS = ("header", "index", "config", "pdparams", "bin", "beside", "gguf")


@dataclass(frozen=True)
class Variant:
    """A good checkpoint, and how one of its files is changed; a quantized one is dequantized, as `dequantize` does.

    Of what lies `beside` the weights `change` gives edits as text, and `edited` makes them.
    """

    kind: str
    folder: Path
    file: str
    original: bytes
    change: Callable[[random.Random], bytes]
    dequantize: bool = False

    @contextmanager
    def changed(self, data: bytes) -> Iterator[None]:
        """The folder with what `change` gave."""
        if self.kind == "beside":
            with _sidecars.edited(self.folder, ast.literal_eval(data.decode())):
                yield
            return
        path = self.folder / self.file
        path.write_bytes(data)
        try:
            yield
        finally:
            path.write_bytes(self.original)

    def options(self, rng: random.Random) -> dict[str, Any]:
        """Of a plan."""
        return _sidecars.options(rng) if self.kind == "beside" else {}


class Sandbox:
    """Small checkpoints of every kind in a scratch folder, with links that lead out of them, and a canary outside."""

    def __init__(self, root: Path) -> None:
        self.root, self.results = root, root / "results"
        self.results.mkdir()
        self.canary = root / "canary.safetensors"
        write_safetensors(self.canary, {"model.norm.weight": torch.ones(32)})
        self.outside = self.canary.read_bytes()
        (root / "canary").mkdir()
        shutil.copy(self.canary, root / "canary" / "model.safetensors")
        dense, moe = self.model("dense", layouts.PADDLE, DENSE), self.model("moe", layouts.PT, MOE)
        mtp, vl = self.model("moe_mtp", layouts.PADDLE, MOE), self.model("vl", layouts.PADDLE, VL)
        self.variants: dict[str, list[Variant]] = {kind: [] for kind in KINDS}
        for i, (config, tensors) in enumerate((dense, moe)):
            sharded = write_model(root / f"sharded{i}", config, tensors, 2, "U16")
            single = write_model(root / f"single{i}", config, tensors)
            self.add("header", sharded, "model-00001-of-00002.safetensors")
            self.add("header", single, "model.safetensors")
            self.add("index", sharded, "model.safetensors.index.json")
            self.add("config", single, "config.json")
        for i, (config, tensors) in enumerate((mtp, vl)):
            self.add("config", write_model(root / f"other{i}", config, tensors), "config.json")
        self.other_forms(moe, self.model("vl", layouts.PT, VL))
        out = root / "wint4"
        run_plan(make_plan(open_source(root / "single1"), runtime="vllm", recipe=wint4()), out, workers=1)
        self.add("config", out, "config.json", dequantize=True)
        for i, (protocol, split) in enumerate(((2, None), (3, 500), (4, None))):
            folder = self.folder(f"pdparams{i}", mtp[0])
            write_pdparams(folder / "model_state.pdparams", mtp[1], protocol, split)
            self.add("pdparams", folder, "model_state.pdparams")
        shared = torch.cat([t.flatten().view(torch.uint8) for t in moe[1].values()])  # one storage for all
        for i, tensors in enumerate((moe[1], _views(shared, moe[1]))):
            folder = self.folder(f"bin{i}", moe[0])
            write_bin(folder / "pytorch_model.bin", tensors)
            self.add("bin", folder, "pytorch_model.bin")
        for path, file in _ggufs.files(root):
            self.add_gguf(path, file)
        for i, (config, tensors) in enumerate((dense, moe)):
            folder = write_model(root / f"beside{i}", config | {"auto_map": _sidecars.AUTO_MAP}, tensors)
            _sidecars.place_all(folder)
            self.variants["beside"].append(Variant("beside", folder, "", b"", self.edits))
            self.add("config", folder, "config.json")  # it names code
        for variants in self.variants.values():
            for variant in variants:
                self.hostile(variant.folder)

    def add_gguf(self, path: Path, file: _ggufs.Gguf) -> None:
        """One file, or a part."""
        path.write_bytes(file.whole)

        def change(rng: random.Random) -> bytes:
            return _ggufs.bulk(rng) if rng.random() < 0.001 else _ggufs.changed_gguf(rng, file)

        self.variants["gguf"].append(Variant("gguf", path.parent, path.name, file.whole, change))

    def edits(self, rng: random.Random) -> bytes:
        """What is changed beside the weights, as text."""
        return ascii(_sidecars.drawn(rng, str(self.canary))).encode()

    def other_forms(self, moe: Model, vl: Model) -> None:
        """Experts of a layer in one tensor, names in wrappers, buffers, scaled positions, another model_type."""
        in_memory = {"fused": (moe[0], fused(moe[1])), "fused-vl": (vl[0], fused_vl(vl[1], 2))}
        wrapped = {f"_orig_mod.module.{name}": tensor for name, tensor in moe[1].items()}
        wrapped["_orig_mod.module.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        config = moe[0] | {"model_type": "ernie4_5", "compression_ratio": 4.0}
        for name, (settings, tensors) in {**in_memory, "wrapped": (config, wrapped)}.items():
            folder = write_model(self.root / name, settings, tensors)
            self.add("header", folder, "model.safetensors")
            self.add("config", folder, "config.json")
        pickled = self.folder("fused-bin", moe[0])
        write_bin(pickled / "pytorch_model.bin", {f"module.{name}": tensor for name, tensor in fused(moe[1]).items()})
        self.add("bin", pickled, "pytorch_model.bin")

    def model(self, family: str, layout: str, changes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """config.json and random tensors."""
        folder = random_model(self.root / f"random-{family}-{layout.name}", layout, family, **changes)
        return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")

    def folder(self, name: str, config: dict[str, Any]) -> Path:
        """A folder with a config.json."""
        (self.root / name).mkdir()
        (self.root / name / "config.json").write_text(json.dumps(config))
        return self.root / name

    def hostile(self, folder: Path) -> None:
        """Links and pipes that only a changed index or directory would name."""
        links = {"link.safetensors": "../canary.safetensors", "link.pdparams": "../canary.safetensors", "linkdir": "../canary",
                 "loop.safetensors": "loop.safetensors", "absolute.bin": str(self.canary)}  # fmt: skip
        for name, target in links.items():
            if not (folder / name).is_symlink():
                (folder / name).symlink_to(target)
        if not (folder / "pipe.safetensors").exists():
            os.mkfifo(folder / "pipe.safetensors")

    def add(self, kind: str, folder: Path, file: str, dequantize: bool = False) -> None:
        """One more variant of a kind."""
        data, canary = (folder / file).read_bytes(), str(self.canary)
        archive = Archive.of(data) if kind == "bin" else None
        starts = boundaries(data) if kind == "pdparams" else []

        def change(rng: random.Random) -> bytes:
            if rng.random() < 0.001:
                return bulk(rng, kind)
            if archive is not None:
                return changed_archive(rng, archive)
            if kind == "pdparams":
                return changed_pickle(rng, data, starts)
            return (changed_safetensors if kind == "header" else changed_json)(rng, data, canary)

        self.variants[kind].append(Variant(kind, folder, file, data, change, dequantize))


VL = {
    **MOE, "moe_num_experts": [2, 2], "moe_intermediate_size": [32, 32], "moe_layer_start_index": [0, 0],
    "moe_layer_end_index": [0, 0],
}  # fmt: skip


def _views(storage: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors as parts of one storage (each its dtype: torch.save keeps a storage per dtype)."""
    found, at = {}, 0
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16:
            found[name] = storage[at : at + tensor.nbytes].view(torch.bfloat16).view(tensor.shape)
        else:
            found[name] = tensor
        at += tensor.nbytes
    return found


def bulk(rng: random.Random, kind: str) -> bytes:
    """Much of one thing; the hardest bounds have tests of their own."""
    form = {"header": "header", "pdparams": "pickle", "bin": "pickle"}.get(kind, "json")
    data = rng.choice(BULKS[form])(rng.choice((1000, 10_000, 300_000)))
    return len(data).to_bytes(8, "little") + data if kind == "header" else data


def wint4() -> recipe.Recipe:
    """4 bits for every linear."""
    codec = codecs.make("rtn", {"bits": 4, "group_size": 32, "scale": "absmax"})
    return built_in.one_codec("wint4", codec, experts_only=False, mtp=False, keep_unfit=False)
