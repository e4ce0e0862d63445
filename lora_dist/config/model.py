"""`model.*` and `adapter.*`: the frozen base and what is trained on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from lora_dist.config.checks import fraction, positive


@dataclass
class ModelArgs:
    """The frozen, block-pruned base."""

    name_or_path: str = ""
    """Directory (or hub name) of the pruned base model, in Hugging Face format."""
    config_name: str | None = None
    """Where to take config and tokenizer from if the model directory has none of its own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision the frozen base is held and computed in; auto: what train.bf16 / train.fp16 say, else float32."""
    load_in_4bit: bool = False
    """Hold the linears of the decoder layers in 4 bits (QLoRA; bitsandbytes); the rest in dtype. Pruned tiles stay exactly zero."""
    load_in_8bit: bool = False
    """Hold them in int8 (LLM.int8(); bitsandbytes)."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """Numbers that 4 bits stand for."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the scales of the blocks of 4-bit weights too: 0.37 bits a weight less."""
    attn_implementation: str | None = None
    """Attention kernel, as transformers names it: eager, sdpa, flash_attention_2."""
    trust_remote_code: bool = False
    """Run model code that comes with the model directory."""

    def problems(self) -> Iterator[str]:
        if not self.name_or_path:
            yield "model.name_or_path: found nothing, expected the directory of a pruned model"
        if self.load_in_4bit and self.load_in_8bit:
            yield "model.load_in_4bit, model.load_in_8bit: found both true, expected one at most"


@dataclass
class AdapterArgs:
    """The LoRA that is trained."""

    r: int = 8
    """Rank."""
    lora_alpha: float = 16
    """Scale: the update is multiplied by lora_alpha / r (lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: float = 0.05
    """Dropout on the adapter's input."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the linears that get an adapter, or all-linear."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r)."""
    mask: Literal["auto", "block", "element", "none"] = "auto"
    """What the update respects: block (16x16 tiles; refused on a base without them), element, none (plain LoRA), auto (what the base has)."""
    block: int = 16
    """Side of a tile, where the pattern has to be found in the weights."""
    form: Literal["auto", "factorised", "dense"] = "auto"
    """How the masked update is computed; both are exact, auto picks the cheaper."""

    def problems(self) -> Iterator[str]:
        yield from positive("adapter", self, "r", "lora_alpha", "block")
        yield from fraction("adapter", self, "lora_dropout")
        if not self.target_modules:
            yield "adapter.target_modules: found an empty list, expected module names or all-linear"
