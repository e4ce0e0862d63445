"""What `run.py` measures: sizes, ways to train, and presets of both. Plain values; imports neither torch nor lora_dist."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

WAYS = {
    "trainer": "transformers' Trainer with PEFT's LoRA",
    "dense-masked": "W + mask . BA built in every forward pass, under autograd, as SQFT and MaskLoRA compute it",
    "plain": "lora_dist, plain LoRA",
    "masked": "lora_dist, block-masked LoRA",
    "peft-layer": "PEFT's own LoRA layer in lora_dist's loop",
    "masked-triton": "lora_dist, block-masked LoRA by its kernel for GPUs (adapter.form triton)",
    "masked-blocks": "lora_dist, block-masked LoRA, base stored as kept tiles (model.storage blocks)",
}
"""What is compared, in the order in which each round runs them."""

UNMASKED = ("trainer", "plain", "peft-layer")
MASKED = ("dense-masked", "masked", "masked-triton", "masked-blocks")
"""Ways of which each pair has to reach the same losses."""


@dataclass(frozen=True)
class Case:
    """A model, a batch and the ways to train it on them."""

    name: str
    hidden: int
    layers: int
    vocabulary: int
    context: int = 512
    rows: int = 1
    rank: int = 16
    precision: str = "fp32"
    ways: tuple[str, ...] = ("trainer", "plain", "masked")
    steps: int = 8
    """of which the first two are not timed"""
    processes: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    """of `lora-dist train`, for its ways"""

    @property
    def sizes(self) -> dict[str, int]:
        """As LlamaConfig takes them, in Llama-2-7B's proportions."""
        heads = max(1, self.hidden // (128 if self.hidden >= 4096 else 64))
        return {
            "hidden_size": self.hidden, "intermediate_size": self.hidden * 43 // 16 // 16 * 16, "num_hidden_layers": self.layers,
            "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": self.vocabulary,
        }  # fmt: skip

    @property
    def model(self) -> str:
        """Name of the folder of its base."""
        return f"llama-{self.hidden}x{self.layers}-v{self.vocabulary}-{self.precision}"

    @property
    def tokens(self) -> int:
        """of an optimizer step, over all processes"""
        return self.rows * self.context

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


_ALL = ("trainer", "dense-masked", "plain", "masked", "peft-layer")
_LAYERS = ("dense-masked", "plain", "masked", "peft-layer")


def _quick() -> list[Case]:
    """Small enough for CI, so only ratios far from one tell anything."""
    return [Case("vocabulary 16,384", 128, 2, 16384, context=256, rows=2, rank=8, steps=8)]


def _cpu() -> list[Case]:
    """The CPU rows of docs/bench.md."""
    return [
        Case("vocabulary 32,000", 512, 4, 32000, rows=4, ways=_ALL),
        Case("vocabulary 4,096", 512, 4, 4096, rows=4, ways=_ALL),
        Case("vocabulary 32,000, width 256", 256, 4, 32000, rows=4, ways=_ALL),
        Case("vocabulary 32,000, bf16", 512, 4, 32000, rows=4, precision="bf16", ways=_ALL),
        Case("vocabulary 4,096, bf16", 512, 4, 4096, rows=4, precision="bf16", ways=_ALL),
        Case("width 1,024", 1024, 3, 4096, rows=2, ways=_LAYERS),
        Case("width 2,048", 2048, 2, 4096, rows=2, ways=_LAYERS),
        Case("width 4,096", 4096, 1, 4096, rows=1, ways=_LAYERS, steps=6),
        Case("width 1,024, bf16", 1024, 3, 4096, rows=2, precision="bf16", ways=_LAYERS),
        Case("width 2,048, bf16", 2048, 2, 4096, rows=2, precision="bf16", ways=_LAYERS),
        Case("context 2,048, rank 8", 512, 4, 32000, context=2048, rank=8),
        Case("rank 64", 512, 4, 4096, rows=4, rank=64, ways=_LAYERS),
    ]


def _storage() -> list[Case]:
    """Kept tiles against dense weights, both half pruned."""
    ways = ("masked", "masked-blocks")
    return [
        Case("width 512", 512, 4, 4096, rows=4, ways=ways),
        Case("width 1,024", 1024, 3, 4096, rows=2, ways=ways),
        Case("width 2,048", 2048, 2, 4096, rows=2, ways=ways),
        Case("width 2,048, bf16", 2048, 2, 4096, rows=2, precision="bf16", ways=ways),
    ]


def _scaling() -> list[Case]:
    """The same global batch on one process and on two."""
    common: dict[str, Any] = {"rows": 4, "ways": ("plain", "masked")}
    cases = [Case("one process", 512, 4, 4096, **common)]
    for strategy in ("ddp", "fsdp2", "zero2", "zero3"):
        options = {"parallel.strategy": strategy}
        cases.append(Case(f"two processes, {strategy}", 512, 4, 4096, processes=2, options=options, **common))
    return cases


def _with(case: dict[str, Any], option: str) -> dict[str, Any]:
    return {**case, "options": {**case["options"], option: True}}


def _h200() -> list[Case]:
    """One GPU of 141 GB: the shape of Llama-2-7B at context 4,096, checkpointing as far as memory asks for it."""
    options = {"train.gradient_checkpointing": True, "train.gradient_checkpointing_layers": "auto", "train.bf16": True}
    big: dict[str, Any] = {"context": 4096, "rows": 4, "rank": 16, "precision": "bf16", "steps": 12, "options": options}
    nf4 = {"model.load_in_4bit": True, "model.storage": "blocks"}
    return [
        Case("width 4,096", 4096, 4, 32000, ways=(*_ALL, "masked-triton"), context=2048, rows=4, precision="bf16", steps=20),
        Case("7B", 4096, 32, 32000, ways=("plain", "masked", "masked-triton"), **big),
        Case("7B, NF4 blocks", 4096, 32, 32000, context=1024, precision="bf16", ways=("masked",), options=nf4),
        Case("7B, Liger", 4096, 32, 32000, ways=("plain", "masked", "masked-triton"), **_with(big, "train.use_liger_kernel")),
        Case("7B, compiled", 4096, 32, 32000, ways=("plain", "masked"), **_with(big, "train.torch_compile")),
    ]


PRESETS = {"quick": _quick, "cpu": _cpu, "storage": _storage, "scaling": _scaling, "h200": _h200}
