"""`model.*` and `adapter.*`: the frozen base and what is trained on it."""

from __future__ import annotations

import re
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
    task_type: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM"
    """CAUSAL_LM: predict the next token; SEQ_CLS: labels of sentences or pairs, by a head on an encoder or decoder that is trained whole."""
    num_labels: int | None = None
    """SEQ_CLS: classes; 1: predict a number. Default: the GLUE subset's, else what the model's configuration says."""
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
    storage: Literal["dense", "blocks"] = "dense"
    """blocks: hold only the kept tiles of the pruned linears; memory, and what fsdp2 and zero3 send, shrink with the sparsity."""
    attn_implementation: str | None = None
    """Attention kernel, as transformers names it: eager, sdpa, flash_attention_2."""
    trust_remote_code: bool = False
    """Run model code that comes with the model directory."""

    def problems(self) -> Iterator[str]:
        if not self.name_or_path:
            yield "model.name_or_path: found nothing, expected the directory of a pruned model"
        if self.num_labels is not None and (self.num_labels < 1 or self.task_type != "SEQ_CLS"):
            yield f"model.num_labels: found {self.num_labels} with model.task_type {self.task_type}, expected 1 or more with SEQ_CLS"
        if self.load_in_4bit and self.load_in_8bit:
            yield "model.load_in_4bit, model.load_in_8bit: found both true, expected one at most"
        if self.storage == "blocks" and self.load_in_8bit:
            yield "model.storage: found blocks with model.load_in_8bit, expected dense: int8 has a scale a row, which tiles cut"
        if not self.load_in_4bit and (self.bnb_4bit_quant_type, self.bnb_4bit_use_double_quant) != ("nf4", True):
            yield "model.bnb_4bit_quant_type, model.bnb_4bit_use_double_quant: found without model.load_in_4bit, expected it too"


@dataclass
class AdapterArgs:
    """The adapter that is trained."""

    type: Literal["lora", "dora", "adalora", "ia3"] = "lora"
    """Kind of adapter, as PEFT names it; each can respect a pattern."""
    r: int = 8
    """Rank; of lora and dora."""
    lora_alpha: float = 16
    """Scale: the update is multiplied by lora_alpha / r (lora_alpha / sqrt(r) with use_rslora; lora_alpha / init_r for adalora)."""
    lora_dropout: float = 0.05
    """Dropout on the adapter's input; not for ia3."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the linears that get an adapter, or all-linear."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r); of lora and dora."""
    init_lora_weights: bool | str = True
    """Start: true (lora_A uniform) or gaussian, lora_B zero; of lora also pissa, pissa_niter_N (principal factors, base unchanged)."""
    target_r: int | None = None
    """adalora: average rank to end with (default 8)."""
    init_r: int | None = None
    """adalora: rank to start with (default 12)."""
    tinit: int | None = None
    """adalora: steps before the ranks are reduced (default 0)."""
    tfinal: int | None = None
    """adalora: last steps, with the ranks fixed (default 0)."""
    deltaT: int | None = None
    """adalora: steps between two allocations (default 1)."""
    beta1: float | None = None
    """adalora: smoothing of the importance (default 0.85)."""
    beta2: float | None = None
    """adalora: smoothing of its uncertainty (default 0.85)."""
    orth_reg_weight: float | None = None
    """adalora: weight of the orthogonal regularisation (default 0.5)."""
    feedforward_modules: list[str] = field(default_factory=list)
    """ia3: targets whose input is scaled instead of the output; empty: PEFT's choice for the architecture; none."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules that are trained whole beside it and saved with it, by name: embed_tokens, lm_head, norm, ...; all-norm: every norm."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Biases that are trained beside it: none, those of the target_modules, or all of the model's."""
    mask: Literal["auto", "block", "element", "none"] = "auto"
    """What the update respects: block (16x16 tiles; refused on a base without them), element, none (plain), auto (what the base has)."""
    block: int = 16
    """Side of a tile, where the pattern has to be found in the weights."""
    form: Literal["auto", "factorised", "dense", "triton"] = "auto"
    """How the masked update is computed; all are exact, auto picks the cheaper of the first two. triton: factorised, in one kernel on a GPU."""

    @property
    def adalora(self) -> dict[str, float]:
        """What is set of adalora's own options, under PEFT's names."""
        return {name: value for name in ADALORA if (value := getattr(self, name)) is not None}

    def problems(self) -> Iterator[str]:
        yield from positive("adapter", self, "r", "lora_alpha", "block")
        yield from fraction("adapter", self, "lora_dropout")
        if not self.target_modules:
            yield "adapter.target_modules: found an empty list, expected module names or all-linear"
        principal = re.fullmatch(r"pissa(_niter_[0-9]+)?", str(self.init_lora_weights))
        if self.init_lora_weights not in (True, "gaussian") and not principal:
            yield (
                f"adapter.init_lora_weights: found {self.init_lora_weights}, expected true, gaussian, pissa or pissa_niter_N (others change "
                "the frozen base, or do not start from it)"
            )
        if principal and self.type == "dora":
            yield f"adapter.init_lora_weights: found {self.init_lora_weights} with adapter.type dora, expected true or gaussian"
        beside = [key for key, asked in (("modules_to_save", self.modules_to_save), ("bias", self.bias != "none")) if asked]
        if beside and (self.type == "ia3" or self.mask == "none"):
            other = f"type {self.type}" if self.type == "ia3" else "mask none"
            yield f"adapter.{beside[0]}: found with adapter.{other}, whose files are plain PEFT, expected a masked adapter: leave it out"
        yield from self._of_other_types()
        yield from self._adalora_problems()
        targets = self.target_modules
        strange = [n for n in self.feedforward_modules if n != "none" and targets != ["all-linear"] and n not in targets]
        if strange:
            yield f"adapter.feedforward_modules: found {', '.join(strange)}, expected some of adapter.target_modules"

    def _of_other_types(self) -> Iterator[str]:
        """Options that the type would ignore."""
        defaults = type(self).__dataclass_fields__
        for types, names in OPTIONS_OF_TYPES:
            for name in names if self.type not in types else ():
                default = [] if name == "feedforward_modules" else defaults[name].default
                if getattr(self, name) != default:
                    remedy = "; adalora's rank is init_r and target_r" if name == "r" and self.type == "adalora" else ""
                    yield f"adapter.{name}: found with adapter.type {self.type}, expected {' or '.join(types)}{remedy}: leave it out"

    def _adalora_problems(self) -> Iterator[str]:
        if self.type != "adalora":
            return
        set_ = {name: getattr(self, name) for name in self.adalora}
        for name, low in (("target_r", 1), ("init_r", 2), ("tinit", 0), ("tfinal", 0), ("deltaT", 1), ("orth_reg_weight", 0)):
            if name in set_ and set_[name] < low:
                yield f"adapter.{name}: found {set_[name]}, expected {low} or more"
        for name in ("beta1", "beta2"):
            if name in set_ and not 0 < set_[name] < 1:
                yield f"adapter.{name}: found {set_[name]}, expected more than 0 and less than 1"
        target_r, init_r = set_.get("target_r", 8), set_.get("init_r", 12)
        if target_r >= init_r:
            yield f"adapter.target_r, adapter.init_r: found {target_r} and {init_r}, expected a target below the rank to start with"


ADALORA = ("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")
OPTIONS_OF_TYPES = (
    (("lora", "dora"), ("r", "use_rslora", "init_lora_weights")),
    (("lora", "dora", "adalora"), ("lora_alpha", "lora_dropout", "form")),
    (("adalora",), ADALORA),
    (("ia3",), ("feedforward_modules",)),
)
"""which types take an option; for the others it is an error when it is set"""
