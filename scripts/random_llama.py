#!/usr/bin/env python
"""A Llama of any size with random weights, half of its 16x16 tiles pruned, made with one layer in memory at a time.

    python scripts/random_llama.py out/llama-1.1b --dtype bfloat16

For measuring memory and time, which do not depend on what the weights are. Beside the weights, one file a decoder layer, lie the
mask, a tokenizer of one token a character and a little text to train on (text.txt). Called by scripts/measure_memory.py.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_dist.blocks import BlockMask, Mask, Pattern, grid

CONTEXT = 4096
SHAPES: dict[str, dict[str, int]] = {
    "1.1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 256,
    },
}  # fmt: skip


def make_config(shape: str | dict[str, int], dtype: str = "float32") -> LlamaConfig:
    sizes = SHAPES[shape] if isinstance(shape, str) else shape
    return LlamaConfig(
        **sizes, max_position_embeddings=CONTEXT, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, dtype=dtype,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def parameter_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape by name, in the model's order; none of them is made."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}


def count_parameters(shape: str) -> int:
    return sum(map(math.prod, parameter_shapes(make_config(shape)).values()))


def make(folder: Path, shape: str | dict[str, int], dtype: str) -> None:
    """Write the model's directory, which appears whole or not at all.

    Args:
        shape: one of `SHAPES`, or what `LlamaConfig` takes.
        dtype: precision that the weights are stored in.
    """
    config = make_config(shape, dtype)
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, size in parameter_shapes(config).items():
        layer = re.match(r"model\.layers\.\d+", name)
        parts.setdefault(layer.group() if layer else name, {})[name] = size
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)  # of a run that was killed while writing
    partial.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    masks: dict[str, Mask] = {}
    where: dict[str, str] = {}
    for number, part in enumerate(parts.values(), start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {name: _weight(name, size, generator, masks).to(getattr(torch, dtype)) for name, size in part.items()}
        save_file(tensors, str(partial / file), metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (partial / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}, indent=1))
    Pattern(masks).save(partial)
    config.save_pretrained(partial)
    make_tokenizer().save_pretrained(partial)
    (partial / "text.txt").write_text((__doc__ or "") * 40, encoding="utf-8")
    partial.rename(folder)


def _weight(name: str, size: tuple[int, ...], generator: torch.Generator, masks: dict[str, Mask]) -> torch.Tensor:
    """A norm's ones, or small random numbers; a layer's linear also gets a mask."""
    if len(size) == 1:
        return torch.ones(size)
    weight_OI = torch.randn(size, generator=generator) * 0.02
    if name.endswith("_proj.weight"):
        shape = (size[0], size[1])
        mask = masks[name.removesuffix(".weight")] = BlockMask(torch.rand(grid(shape, 16), generator=generator) < 0.5, shape, 16)
        weight_OI *= mask.expand()
    return weight_OI


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable ASCII character."""
    tokens = ["<unk>", "<s>", "</s>", "\n", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=CONTEXT
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--shape", choices=list(SHAPES), default="1.1b", help="size (default %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16", help="to store weights in")
    args = parser.parse_args()
    if args.out.exists():
        print(f"random_llama: {args.out} exists already, expected a new folder", file=sys.stderr)
        return 2
    make(args.out, args.shape, args.dtype)
    print(f"{args.out}: {count_parameters(args.shape):,} parameters in {args.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
