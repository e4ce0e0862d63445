"""`train.*`: optimisation, evaluation, logging and checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lora_dist.config.checks import fraction, positive, seconds
from lora_dist.config.distill import distill_problems


@dataclass
class TrainArgs:
    """Optimisation, evaluation, logging and checkpoints."""

    output_dir: str = ""
    """Run folder: final adapter, checkpoints, train.log, metrics.jsonl."""
    adapter_subfolder: str = ""
    """Name of a folder in output_dir to write the final adapter and the tokenizer to, such as lora_adapter; default: output_dir itself."""
    overwrite_output_dir: bool = False
    """Move an older run in output_dir aside (never deleted) and start anew."""
    resume_from_checkpoint: str | None = None
    """Checkpoint folder to go on from, or auto: the newest in output_dir that verifies (none there: start anew)."""
    lock_timeout_s: float = 60.0
    """Resuming: how long to wait for the attempt before to let go of output_dir; a fresh start waits for nobody."""
    num_train_epochs: float = 1.0
    """Passes over the training windows or examples."""
    max_steps: int = -1
    """If above 0, optimizer steps in all, instead of num_train_epochs."""
    per_device_train_batch_size: int = 1
    """Windows or examples a process holds at once in training."""
    per_device_eval_batch_size: int = 8
    """Windows or examples a process holds at once in evaluation."""
    gradient_accumulation_steps: int = 1
    """Micro-batches a process sums into one optimizer step."""
    global_batch_size: int | None = None
    """Windows or examples in one optimizer step over all processes, whatever their number; gradient_accumulation_steps
    then follows from it."""
    dataloader_drop_last: bool = False
    """Leave out the incomplete step at the end of an epoch."""
    group_by_length: bool = False
    """Examples: steps of similar lengths, in random order; less padding, and gradients of a step less alike those of another."""
    mode: Literal["lora", "sparse_full"] = "lora"
    """lora: an adapter (adapter.type) beside the frozen base; sparse_full: the kept weights themselves, of all adapter.target_modules;
    pruned ones stay exactly zero, and have no gradient and no optimizer state."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = "adamw_torch"
    """Which AdamW. 8bit and paged (state moves out of a full GPU's memory) are bitsandbytes', with parallel.strategy ddp."""
    loraplus_lr_ratio: float | None = None
    """LoRA+: train lora_B (and biases) with so many times the rate of lora_A; default: one rate. 16 is usual, with a lower learning_rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay; with mode sparse_full towards the weights that training began with, not towards zero."""
    adam_beta1: float = 0.9
    """AdamW beta1."""
    adam_beta2: float = 0.999
    """AdamW beta2."""
    adam_epsilon: float = 1e-8
    """AdamW epsilon."""
    max_grad_norm: float = 1.0
    """Clip the gradient's global norm to this; 0 turns clipping off."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """Learning-rate schedule after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    warmup_ratio: float = 0.0
    """Warm-up as a share of all steps, used where warmup_steps is 0."""
    seed: int = 42
    """Seed of adapter initialisation, data order and dropout."""
    bf16: bool = False
    """Compute in bfloat16; adapter, gradients' sum and optimizer stay float32."""
    fp16: bool = False
    """Compute in float16 with a dynamic loss scale."""
    cross_entropy: Literal["auto", "chunked", "logits"] = "auto"
    """chunked: losses without logits, a few hundred tokens at a time, which saves memory and time that grow with the vocabulary; auto: where
    the model gives the same loss so (a trained head or capped logits do not allow it); logits: never."""
    distill_from: str | None = None
    """Directory (or hub name) of the dense model, to learn from its predictions as well: the loss becomes
    (1 - distill_alpha) CE + distill_alpha T^2 KL(dense || pruned) (docs/distillation.md). Same tokenizer and vocabulary."""
    distill_alpha: float = 0.5
    """Share of the dense model's predictions in the loss, 0 to 1; the rest is the text's own."""
    distill_temperature: float = 1.0
    """T: both models' logits are divided by it in KL."""
    distill_hidden_weight: float = 0.0
    """Add so many times the squared distance of hidden states to the dense model's, over their squared norm, a label token."""
    distill_hidden: Literal["last", "layers"] = "last"
    """Which hidden states: those that the head is given, or the mean over the outputs of all decoder layers."""
    distill_load_in_4bit: bool = False
    """Hold the dense model's linears in NF4 (bitsandbytes); the rest as the pruned model's."""
    distill_cache: str | None = None
    """Folder to keep the dense model's largest probabilities in: computed once (lora-dist distill-cache, or at the start of the run), then
    the dense model is not loaded."""
    distill_top_k: int = 64
    """distill_cache: how many of a token's probabilities are kept; the others count as one more outcome."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    gradient_checkpointing_layers: str = "all"
    """Which decoder layers gradient_checkpointing recomputes: all, the first so many, or auto: as few of the first as fit this machine's
    memory by `lora-dist plan`."""
    torch_compile: bool = False
    """Compile each decoder layer (torch.compile): starting takes half a minute to minutes longer; worth trying on GPUs, slower on CPUs
    (docs/log.md)."""
    use_liger_kernel: bool = False
    """Norms, rotation of positions and the feed-forward's product by Liger's Triton kernels (pip install 'lora-dist[liger]'): on GPUs, for the
    families it has. The loss stays train.cross_entropy's."""
    logging_steps: int = 10
    """Log the mean loss every so many steps."""
    logging_first_step: bool = True
    """Log step 1 as well."""
    eval_strategy: Literal["steps", "epoch", "no"] = "steps"
    """When to evaluate."""
    eval_steps: int = 200
    """Evaluate every so many steps (eval_strategy steps)."""
    eval_on_start: bool = True
    """Evaluate the pruned model before the first step."""
    save_strategy: Literal["steps", "epoch", "no"] = "steps"
    """When to write checkpoints; a new best evaluation and the last step are always written, except with no."""
    save_steps: int = 500
    """Write a checkpoint every so many steps (save_strategy steps)."""
    save_total_limit: int | None = 3
    """Checkpoints kept, 2 or more; the newest and the best are never removed."""
    max_failed_saves: int = 3
    """Checkpoints that may fail in a row (full disk, ...) before the run stops; until then it goes on with the last good one."""
    max_runtime: str | None = None
    """Stop in time, with a checkpoint, before the process has run this long: seconds or [D-]HH:MM:SS. A Slurm job's own end counts too."""
    stop_margin_s: float = 30.0
    """How long before a time limit to stop, besides the time of the longest step and save so far."""
    load_best_model_at_end: bool = True
    """Go back to the best evaluated adapter after the last step."""
    metric_for_best_model: (
        Literal["eval_loss", "perplexity", "accuracy", "f1", "matthews_correlation", "pearson", "spearmanr"] | None
    ) = None
    """eval_loss and perplexity (lower is better; both rank alike), or a classifier's metric; default: the task's own, else eval_loss."""
    class_weights: str = "none"
    """Classification: what each label counts in the loss: none (alike), balanced (by rarity), or comma-separated numbers in label order."""
    push_to_hub: bool = False
    """Upload the final adapter to the Hugging Face Hub, with a model card; that it can be written to is found out before training."""
    hub_model_id: str | None = None
    """Repository on the hub, OWNER/NAME; default: the name of output_dir, under the token's owner."""
    hub_private: bool = False
    """Make a new repository private, and refuse one that is public."""
    profile: str | None = None
    """FIRST:LAST: trace these steps of the attempt, counted from 1, with torch's profiler; every process writes profile/attempt-N/rank-R.json.gz
    (for ui.perfetto.dev) and .txt (operations by time) into output_dir. Traced steps are slower."""
    early_stopping_patience: int | None = None
    """Stop after so many evaluations without a better one."""
    early_stopping_threshold: float = 0.0
    """Improvement in eval loss that counts as better."""

    def problems(self) -> Iterator[str]:
        if not self.output_dir:
            yield "train.output_dir: found nothing, expected the run's folder"
        if re.search(r"[/\\]|^\.|^checkpoint-", self.adapter_subfolder):
            yield f"train.adapter_subfolder: found {self.adapter_subfolder}, expected a plain name that is no checkpoint's"
        yield from positive(
            "train", self, "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size",
            "gradient_accumulation_steps", "learning_rate", "logging_steps", "eval_steps", "save_steps", "early_stopping_patience",
            "adam_epsilon", "max_failed_saves", "global_batch_size", "loraplus_lr_ratio",
        )  # fmt: skip
        yield from fraction("train", self, "warmup_ratio", "adam_beta1", "adam_beta2")
        yield from distill_problems(self)
        if self.max_runtime is not None and seconds(self.max_runtime) is None:
            yield f"train.max_runtime: found {self.max_runtime}, expected seconds or [D-]HH:MM:SS, above 0"
        elif self.max_runtime is not None and (seconds(self.max_runtime) or 0) <= self.stop_margin_s:
            yield (
                f"train.max_runtime: found {self.max_runtime}, expected more than train.stop_margin_s ({self.stop_margin_s:g} s), "
                "which is kept free before it"
            )
        for name in (
            "warmup_steps", "weight_decay", "max_grad_norm", "seed", "early_stopping_threshold", "stop_margin_s", "lock_timeout_s"
        ):  # fmt: skip
            if getattr(self, name) < 0:
                yield f"train.{name}: found {getattr(self, name)}, expected 0 or more"
        if self.profile is not None and steps_of(self.profile) is None:
            yield f"train.profile: found {self.profile}, expected FIRST:LAST, such as 3:5, the first step being 1"
        if self.seed >= 2**63:
            yield f"train.seed: found {self.seed}, expected a number below 2**63"
        layers = self.gradient_checkpointing_layers
        if layers != "all" and not (self.gradient_checkpointing and re.fullmatch(r"auto|\d+", layers)):
            yield (
                f"train.gradient_checkpointing_layers: found {layers} with train.gradient_checkpointing "
                f"{str(self.gradient_checkpointing).lower()}, expected all, auto or a number, with train.gradient_checkpointing true"
            )
        if self.bf16 and self.fp16:
            yield "train.bf16, train.fp16: found both true, expected one at most"
        if self.save_total_limit is not None and self.save_total_limit < 2:
            yield f"train.save_total_limit: found {self.save_total_limit}, expected 2 or more (the newest and one to fall back on)"
        if not self.push_to_hub and (self.hub_model_id is not None or self.hub_private):
            yield "train.hub_model_id, train.hub_private: found without train.push_to_hub, expected train.push_to_hub true"
        if self.class_weights not in ("none", "balanced") and weights_of(self.class_weights) is None:
            yield f"train.class_weights: found {self.class_weights}, expected none, balanced, or comma-separated numbers, not all 0"
        if self.eval_strategy == "no":
            if self.early_stopping_patience is not None:
                yield "train.early_stopping_patience: needs evaluations, but train.eval_strategy is no"
        if self.save_strategy == "no" and self.load_best_model_at_end and self.eval_strategy != "no":
            yield "train.load_best_model_at_end: needs checkpoints, but train.save_strategy is no (set one of the two)"


def steps_of(text: str) -> tuple[int, int] | None:
    """First and last step of `profile`; None where it is no such thing."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = map(int, found.groups()) if found is not None else (0, 0)
    return (first, last) if 1 <= first <= last else None


def weights_of(text: str) -> list[float] | None:
    """The numbers of `class_weights`; None where it is no list of any."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    return found if all(0 <= each < float("inf") for each in found) and any(found) else None
