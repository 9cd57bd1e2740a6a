"""Quantize a model as llm-compressor (GPTQ) or AutoRound would: int4, symmetric, groups of 64, from the text that comes with
ernie-quant. OUT is then a plain float32 checkpoint of what their weights decode to, for `ernie-quant eval`.

python benchmarks/beside_others.py gptq SRC OUT [--observer memoryless_mse]
python benchmarks/beside_others.py autoround SRC OUT [--iters 50 --lr 5e-3]
ernie-quant wint4 SRC ours --group-size 64 --calibration auto
ernie-quant eval OUT --against SRC --text en-US.txt

These programs want an environment of their own: python -m venv others; others/bin/pip install torch==2.13.0 '.[calibration]'
llmcompressor==0.14.0.1 auto-round==0.15.1 (transformers 5.17, compressed-tensors 0.19). All linears of the layers are
quantized: attention, dense, shared and routed experts. They are shown every window that ours is shown, those for judging too.
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from ernie_quant.calibration.tokenizer import tokenizer_of
from ernie_quant.calibration.windows import AUTO, windows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

BITS, GROUP = 4, 64


def gptq(source: Path, out: Path, ids: torch.Tensor, args: argparse.Namespace) -> None:
    """Quantize with llm-compressor's own settings, but for --observer: damping .01, blocks of 128, ordered by activation."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from llmcompressor.modifiers.gptq import GPTQModifier

    with load_quantizable_moe():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    weights = {"num_bits": BITS, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    weights |= {"observer": args.observer} if args.observer else {}
    recipe = GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
    shown = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    oneshot(model=model, dataset=shown, recipe=recipe, max_seq_length=ids.shape[1], num_calibration_samples=len(ids))
    model.save_pretrained(out, save_compressed=True)


def autoround(source: Path, out: Path, ids: torch.Tensor, args: argparse.Namespace) -> None:
    """Quantize with AutoRound; its own settings are 200 steps of 8 windows for each layer."""
    from auto_round import AutoRound

    shown = [{"input_ids": window[None], "attention_mask": torch.ones_like(window[None])} for window in ids]
    AutoRound(
        str(source),
        tokenizer=AutoTokenizer.from_pretrained(source),
        scheme="W4A16",
        group_size=GROUP,
        sym=True,
        dataset=shown,
        seqlen=ids.shape[1],
        nsamples=len(shown),
        iters=args.iters,
        lr=args.lr,
        batch_size=args.batch_size,
        device_map="cpu",
        enable_torch_compile=False,
    ).quantize_and_save(str(out), format="llm_compressor")


def decode(quantized: Path, source: Path, out: Path) -> None:
    """Write the weights of a compressed-tensors checkpoint in float32, and all else as it is in the source."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    theirs = {name: tensor for file in quantized.glob("*.safetensors") for name, tensor in load_file(file).items()}
    out.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, out)
            continue
        tensors = load_file(file)
        for name in tensors.keys() & {key.removesuffix("_packed") for key in theirs if key.endswith("_packed")}:
            shape, scale = tensors[name].shape, theirs.pop(f"{name}_scale").float()
            codes = unpack_from_int32(theirs.pop(f"{name}_packed"), BITS, shape).float()
            tensors[name] = (codes.view(shape[0], -1, GROUP) * scale[..., None]).view(shape)
        save_file(tensors, out / file.name, metadata={"format": "pt"})
    assert not [name for name in theirs if name.endswith("_packed")]


def main() -> None:
    """Read the command line, quantize, say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=["gptq", "autoround"])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration text, without those for judging")
    parser.add_argument("--observer", help="of GPTQ's scales: memoryless_mse; default: llm-compressor's, by the largest weight")
    parser.add_argument("--iters", type=int, default=200, help="AutoRound's steps")
    parser.add_argument("--lr", type=float, help="AutoRound's learning rate; default: its own")
    parser.add_argument("--batch-size", type=int, default=8, help="AutoRound's windows in a step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ids = windows(tokenizer_of(args.source), AUTO, args.tokens).ids
    began, cpu = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
        {"gptq": gptq, "autoround": autoround}[args.program](args.source, Path(folder), ids, args)
        print(f"{args.program}: {time.monotonic() - began:.0f} s, {time.process_time() - cpu:.0f} s of CPU")
        decode(next(Path(folder).rglob("config.json")).parent, args.source, args.out)


if __name__ == "__main__":
    main()
