"""All sections together, and what one says against another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

from lora_dist.config.data import DataArgs
from lora_dist.config.model import AdapterArgs, ModelArgs
from lora_dist.config.parallel import ParallelArgs
from lora_dist.config.train import TrainArgs
from lora_dist.config.watching import GuardArgs, HealthArgs, TrackerArgs


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

    @property
    def adapter_kind(self) -> str:
        """What is trained: adapter.type, or sparse_full."""
        return self.adapter.type if self.train.mode == "lora" else self.train.mode

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
        start, decay = str(self.adapter.init_lora_weights), self.train.weight_decay
        if decay and start.startswith("pissa"):
            lines.append(
                f"train.weight_decay: found {decay:g} with adapter.init_lora_weights {start}, expected 0: it would shrink frozen factors"
            )
        ratio = self.train.loraplus_lr_ratio
        if ratio is not None and self.adapter.type == "ia3":
            lines.append(
                f"train.loraplus_lr_ratio: found {ratio:g} with adapter.type ia3, which has no lora_B, expected another type"
            )
        if self.train.mode == "sparse_full":
            lines += self._sparse_full_problems()
        classifies, metric = self.model.task_type == "SEQ_CLS", self.train.metric_for_best_model
        if classifies != (self.data.format == "classification"):
            lines.append(
                f"model.task_type, data.format: found {self.model.task_type} and {self.data.format}, expected SEQ_CLS and classification "
                "together, or neither"
            )
        if not classifies and metric not in (None, "eval_loss", "perplexity"):
            lines.append(
                f"train.metric_for_best_model: found {metric} with model.task_type CAUSAL_LM, expected eval_loss or perplexity"
            )
        if classifies and metric == "perplexity":
            lines.append(
                "train.metric_for_best_model: found perplexity with model.task_type SEQ_CLS, expected eval_loss or a metric"
            )
        if classifies and self.train.distill_from is not None:
            lines.append(
                "train.distill_from: found with model.task_type SEQ_CLS, expected CAUSAL_LM: a dense base's new head has nothing to teach"
            )
        if not classifies and self.train.class_weights != "none":
            lines.append("train.class_weights: found with model.task_type CAUSAL_LM, expected SEQ_CLS")
        for key, asked in (("spike_nats", self.health.spike_nats), ("non_finite", self.health.non_finite)):
            if self.train.save_strategy == "no" and asked not in (None, "stop", "skip"):
                lines.append(f"health.{key}: found {asked} with train.save_strategy no, expected checkpoints to go back to")
        return lines

    def without_effect(self) -> list[str]:
        """Keys that are set, and that what is trained does not take."""
        names = ("r", "lora_alpha", "lora_dropout", "use_rslora", "form") if self.train.mode == "sparse_full" else ()
        defaults = AdapterArgs()
        return [f"adapter.{name}" for name in names if getattr(self.adapter, name) != getattr(defaults, name)]

    def _sparse_full_problems(self) -> Iterator[str]:
        """What does not go with training the kept weights themselves."""
        adapter, mode = self.adapter, "train.mode sparse_full"
        if adapter.type != "lora":
            yield f"adapter.type: found {adapter.type} with {mode}, which trains weights and no adapter: leave it out"
        elif adapter.init_lora_weights is not True:
            yield f"adapter.init_lora_weights: found {adapter.init_lora_weights} with {mode}, which starts from the weights: leave it out"
        if adapter.mask == "none":
            yield f"adapter.mask: found none with {mode}, expected auto, block or element"
        for name in ("load_in_4bit", "load_in_8bit"):
            if getattr(self.model, name):
                yield f"model.{name}: found true with {mode}, expected a base whose weights are numbers that can be trained: leave it out"
        if self.train.loraplus_lr_ratio is not None:
            yield f"train.loraplus_lr_ratio: found {self.train.loraplus_lr_ratio:g} with {mode}, which has no lora_B: leave it out"
