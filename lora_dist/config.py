"""The one declaration of every training option: name, type, default, help line and check.

Names follow transformers' `TrainingArguments` and peft's `LoraConfig` where they have one. Read by `cli/options.py` (defaults <
YAML < dotted command line) and by `engine/setup.py`, which hands plain values on: no room below sees these classes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal


def _positive(section: str, obj: object, *names: str) -> Iterator[str]:
    for name in names:
        value = getattr(obj, name)
        if value is not None and value <= 0:
            yield f"{section}.{name}: found {value}, expected a number above 0"


def _fraction(section: str, obj: object, *names: str) -> Iterator[str]:
    for name in names:
        value = getattr(obj, name)
        if not 0 <= value < 1:
            yield f"{section}.{name}: found {value}, expected a number from 0 up to but not including 1"


def seconds(text: str) -> float | None:
    """A duration: seconds, MM:SS, HH:MM:SS or D-HH:MM:SS (as Slurm writes it); None if it is none, or not above 0."""
    match = re.fullmatch(r"(?:(\d+)-(?=\d+:\d+:))?(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)", text.strip())
    if match is None:
        return None
    days, hours, minutes, rest = (float(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest or None


@dataclass
class ModelArgs:
    """The frozen, block-pruned base."""

    name_or_path: str = ""
    """Directory (or hub name) of the pruned base model, in Hugging Face format."""
    config_name: str | None = None
    """Where to take config and tokenizer from if the model directory has none of its own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision the frozen base is held and computed in; auto: what train.bf16 / train.fp16 say, else float32."""
    attn_implementation: str | None = None
    """Attention kernel, as transformers names it: eager, sdpa, flash_attention_2."""
    trust_remote_code: bool = False
    """Run model code that comes with the model directory."""

    def problems(self) -> Iterator[str]:
        if not self.name_or_path:
            yield "model.name_or_path: found nothing, expected the directory of a pruned model"


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
        yield from _positive("adapter", self, "r", "lora_alpha", "block")
        yield from _fraction("adapter", self, "lora_dropout")
        if not self.target_modules:
            yield "adapter.target_modules: found an empty list, expected module names or all-linear"


@dataclass
class DataArgs:
    """The text that is trained and evaluated on."""

    dataset_name: str = ""
    """Hub name, local directory, or local files (comma-separated .txt .json .jsonl .csv .parquet)."""
    dataset_config_name: str | None = None
    """Configuration of a hub data set, such as wikitext-2-raw-v1."""
    validation_file: str | None = None
    """Local files to evaluate on, where the data set has no validation split of its own."""
    text_column: str = "text"
    """Column that holds the text in JSON, CSV and parquet."""
    document_separator: str | None = None
    """Text that separates documents inside .txt files, such as <|endoftext|>; without one, a file is running text."""
    format: Literal["text", "auto", "alpaca", "chat", "prompt_completion"] = "text"
    """What a row is: text, packed into windows; or an example: alpaca (instruction, input, output), chat (messages, or ShareGPT's
    conversations, through the tokenizer's chat template), prompt_completion; auto: by the columns."""
    prompt_template: str = "alpaca"
    """alpaca: the template instructions are put in: templates/NAME.json in the working directory, else the package's, or a path."""
    train_on_inputs: bool = False
    """Examples: count the loss on the prompt as well, not on the answer only."""
    add_eos_token: bool = True
    """Examples: the tokenizer's end-of-sequence token behind the answer, to be learnt; chat templates have their own."""
    packing: bool = False
    """Examples: several in one row, which do not attend to each other; no padding work."""
    packing_length: int | None = None
    """Tokens of a packed row; default: block_size."""
    max_bad_share: float = 0.1
    """Examples: stop if more than this share of the records cannot be used; fewer are named and left out."""
    special_tokens: Literal["auto", "bos", "eos", "both", "none"] = "auto"
    """Special tokens put around each document; auto: what the tokenizer itself adds."""
    block_size: int = 1024
    """Context length in tokens: of a window of text, or of the longest example (the pruning tile is adapter.block)."""
    max_train_samples: int | None = None
    """Use at most this many windows or examples for training."""
    max_eval_samples: int | None = None
    """Use at most this many windows or examples for evaluation."""
    holdout_windows: int = 128
    """Windows or examples held out at random for evaluation where there is no validation split."""
    preprocessing_num_workers: int | None = None
    """Processes that tokenise; default: the cores, 8 at most."""
    dataloader_num_workers: int = 0
    """Processes that load batches ahead of the step; windows are read from a memory map, so 0 is usually enough."""
    cache_dir: str | None = None
    """Where tokenised text is kept; default: lora_dist/ in the Hugging Face cache."""

    def problems(self) -> Iterator[str]:
        if not self.dataset_name:
            yield "data.dataset_name: found nothing, expected a hub name, a directory or files"
        yield from _positive(
            "data", self, "max_train_samples", "max_eval_samples", "preprocessing_num_workers", "holdout_windows", "packing_length",
        )  # fmt: skip
        yield from _fraction("data", self, "max_bad_share")
        if self.block_size < 2:
            yield f"data.block_size: found {self.block_size}, expected a context of 2 tokens or more"
        if self.dataloader_num_workers < 0:
            yield f"data.dataloader_num_workers: found {self.dataloader_num_workers}, expected 0 or more"
        for key in ("packing", "train_on_inputs"):
            if self.format == "text" and getattr(self, key):
                yield f"data.{key}: found true with data.format text, which is learnt whole, expected auto or a format of examples"
        if self.packing_length is not None and not (self.packing and self.packing_length >= self.block_size):
            yield (
                f"data.packing_length: found {self.packing_length}, expected data.packing, and data.block_size ({self.block_size}) "
                "or more: a row holds the longest example"
            )


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
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
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
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
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
    metric_for_best_model: Literal["eval_loss", "perplexity"] = "eval_loss"
    """Lower is better; both rank alike."""
    early_stopping_patience: int | None = None
    """Stop after so many evaluations without a better one."""
    early_stopping_threshold: float = 0.0
    """Improvement in eval loss that counts as better."""

    def problems(self) -> Iterator[str]:
        if not self.output_dir:
            yield "train.output_dir: found nothing, expected the run's folder"
        if re.search(r"[/\\]|^\.|^checkpoint-", self.adapter_subfolder):
            yield f"train.adapter_subfolder: found {self.adapter_subfolder}, expected a plain name that is no checkpoint's"
        yield from _positive(
            "train", self, "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size",
            "gradient_accumulation_steps", "learning_rate", "logging_steps", "eval_steps", "save_steps", "early_stopping_patience",
            "adam_epsilon", "max_failed_saves", "global_batch_size",
        )  # fmt: skip
        yield from _fraction("train", self, "warmup_ratio", "adam_beta1", "adam_beta2")
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
        if self.seed >= 2**63:
            yield f"train.seed: found {self.seed}, expected a number below 2**63"
        if self.bf16 and self.fp16:
            yield "train.bf16, train.fp16: found both true, expected one at most"
        if self.save_total_limit is not None and self.save_total_limit < 2:
            yield f"train.save_total_limit: found {self.save_total_limit}, expected 2 or more (the newest and one to fall back on)"
        if self.eval_strategy == "no":
            if self.early_stopping_patience is not None:
                yield "train.early_stopping_patience: needs evaluations, but train.eval_strategy is no"
        if self.save_strategy == "no" and self.load_best_model_at_end and self.eval_strategy != "no":
            yield "train.load_best_model_at_end: needs checkpoints, but train.save_strategy is no (set one of the two)"


@dataclass
class GuardArgs:
    """What watches that base and pattern stay what they were."""

    every: int = 100
    """Check pruned tiles and a sample of kept chunks every so many steps; the whole base is checked at start and end."""
    sample_chunks: int = 8
    """Kept chunks compared with their digests at each check, rotating through the base."""

    def problems(self) -> Iterator[str]:
        yield from _positive("guard", self, "every", "sample_chunks")


@dataclass
class HealthArgs:
    """What to do when numbers go wrong or a process hangs."""

    non_finite: Literal["stop", "skip", "rollback"] = "stop"
    """A step whose loss or gradients are not finite: stop (saved at the step before), skip (leave its batch out) or rollback (go back to
    the newest checkpoint and on behind the batch). Every time, what was found is written to post-mortem/ in the run folder."""
    max_skips: int = 10
    """Batches left out in the whole run before it stops."""
    max_rollbacks: int = 3
    """Rollbacks in the whole run before it stops."""
    spike_nats: float | None = None
    """Roll back a step whose loss is so many nats above the median of the last 32 (16 at least); default: never."""
    hang_timeout_s: float = 600.0
    """End the run, saying which process hangs and where, when none has made progress for so long (a micro-batch, an evaluation batch, a
    save); 0: wait for ever."""

    def problems(self) -> Iterator[str]:
        yield from _positive("health", self, "spike_nats")
        for name in ("max_skips", "max_rollbacks", "hang_timeout_s"):
            if getattr(self, name) < 0:
                yield f"health.{name}: found {getattr(self, name)}, expected 0 or more"


@dataclass
class ParallelArgs:
    """How the run is spread over processes."""

    strategy: Literal["auto", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "auto"
    """ddp: the base on every process; zero1, zero2: the same, but optimizer (and gradients) sharded; fsdp2, zero3: base sharded too; auto:
    the stage of ds_config, else ddp."""
    ds_config: str | None = None
    """DeepSpeed's JSON for a zero strategy (configs/ds has one of each); its "auto" values are filled in from these options."""
    offload_optimizer: Literal["auto", "none", "cpu", "nvme"] = "auto"
    """zero strategies: where optimizer state is kept; auto: what ds_config says, else none (with the parameters)."""
    offload_param: Literal["auto", "none", "cpu"] = "auto"
    """zero3: where the shards of the base are kept; auto: what ds_config says, else none (on the device)."""
    nvme_path: str | None = None
    """Folder on a fast local disk for what is offloaded to nvme."""
    hybrid_shard: bool = False
    """fsdp2: shard inside a machine only, and keep a copy on each; less traffic between machines, more memory."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Collectives: nccl on GPUs, gloo on CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: GPUs if there are any."""
    timeout_s: float = 1800.0
    """How long a collective waits for the other processes."""
    join_timeout_s: float = 300.0
    """Under torchrun with restarts: how long a process waits for the others to start, before torchrun starts those that are left."""
    peer_timeout_s: float = 15.0
    """Under torchrun with restarts: how long another machine may be silent before the run goes on without it (no power, no network)."""

    def problems(self) -> Iterator[str]:
        yield from _positive("parallel", self, "timeout_s", "join_timeout_s", "peer_timeout_s")
        zero = self.strategy in ("auto", "zero1", "zero2", "zero3")
        if self.ds_config is not None and not zero:
            yield f"parallel.ds_config: found {self.ds_config} with strategy {self.strategy}, expected zero1, zero2, zero3 or auto"
        if self.offload_optimizer in ("cpu", "nvme") and (not zero or (self.strategy == "auto" and self.ds_config is None)):
            yield (
                f"parallel.offload_optimizer: found {self.offload_optimizer} with strategy {self.strategy}, "
                "expected zero1, zero2 or zero3"
            )
        if self.offload_param == "cpu" and (
            self.strategy not in ("auto", "zero3") or (self.strategy == "auto" and self.ds_config is None)
        ):
            yield f"parallel.offload_param: found {self.offload_param} with strategy {self.strategy}, expected zero3"
        if self.offload_optimizer == "nvme":
            if self.strategy in ("zero1", "zero2"):
                yield (
                    f"parallel.offload_optimizer: found nvme with strategy {self.strategy}, "
                    "expected zero3 (DeepSpeed has it there only)"
                )
            if self.nvme_path is None and self.ds_config is None:
                yield "parallel.nvme_path: found nothing, expected a folder on a fast local disk for nvme"
        if self.hybrid_shard and self.strategy != "fsdp2":
            yield f"parallel.hybrid_shard: found true with strategy {self.strategy}, expected fsdp2"


@dataclass
class TrackerArgs:
    """Where curves go besides the console, train.log and metrics.jsonl."""

    report_to: list[Literal["wandb"]] = field(default_factory=list)
    """Trackers; wandb needs the extra lora-dist[trackers]."""
    wandb_project: str = "lora_dist"
    """Project of the wandb run."""
    run_name: str | None = None
    """Name of the tracker's run; default: the name of the run folder."""
    wandb_mode: Literal["online", "offline"] | None = None
    """offline writes a folder that `wandb sync` uploads later; default: what wandb's own settings say."""

    def problems(self) -> Iterator[str]:
        return iter(())


@dataclass
class RunConfig:
    """All options of `lora-dist train`."""

    model: ModelArgs = field(default_factory=ModelArgs)
    adapter: AdapterArgs = field(default_factory=AdapterArgs)
    data: DataArgs = field(default_factory=DataArgs)
    train: TrainArgs = field(default_factory=TrainArgs)
    guard: GuardArgs = field(default_factory=GuardArgs)
    health: HealthArgs = field(default_factory=HealthArgs)
    parallel: ParallelArgs = field(default_factory=ParallelArgs)
    tracker: TrackerArgs = field(default_factory=TrackerArgs)

    def problems(self) -> list[str]:
        """Every value that is out of range or contradicts another, one line each: found, expected, key."""
        lines = [line for f in dataclasses.fields(self) for line in getattr(self, f.name).problems()]
        if self.health.hang_timeout_s >= self.parallel.timeout_s > 0:
            lines.append(
                f"health.hang_timeout_s: found {self.health.hang_timeout_s:g} with parallel.timeout_s {self.parallel.timeout_s:g}, "
                "expected less (0: off), or a collective gives up before it can be said which process hangs"
            )
        if self.train.group_by_length and (self.data.packing or self.data.format == "text"):
            other = "data.packing true" if self.data.packing else "data.format text"
            lines.append(
                f"train.group_by_length: found true with {other}, whose rows are all of one length, expected one of the two"
            )
        for key, asked in (("spike_nats", self.health.spike_nats), ("non_finite", self.health.non_finite)):
            if self.train.save_strategy == "no" and asked not in (None, "stop", "skip"):
                lines.append(f"health.{key}: found {asked} with train.save_strategy no, expected checkpoints to go back to")
        return lines
