"""What a run tells of itself in numbers: every series to metrics.jsonl, the trackers and the diagnosis. Called by `engine/loop.py`.

Rates and times are means a step over the steps since the last line. FLOPs: 4 N a token, N the elements of all weight matrices that
tokens are multiplied with (2 N forward, 2 N for the gradients of the activations; none for those of frozen weights). Recomputing under
gradient checkpointing, attention's own products and the adapter do not count, and pruned tiles count as if they were there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_dist.adapter import update_norms
from lora_dist.engine.clock import PHASES
from lora_dist.engine.memory import memory_gib, peak_memory_gib
from lora_dist.engine.setup import Parts
from lora_dist.engine.step import StepResult
from lora_dist.monitor.diagnosis import Diagnosis, replay
from lora_dist.monitor.flops import peak_tflops
from lora_dist.monitor.remedies import Options


class Telemetry:
    """The numbers of one run, on every process."""

    def __init__(self, parts: Parts):
        self._parts, self._clock = parts, parts.stepper.clock
        self._peak_tflops = peak_tflops(parts.device_name, parts.compute_dtype, parts.config.tracker.peak_tflops)
        self._sparsity = parts.guard.pattern.sparsity if parts.guard.pattern is not None else 0.0
        self._diagnosis = self._make_diagnosis() if parts.world.is_main and parts.config.tracker.diagnosis else None
        self._clear()

    def _make_diagnosis(self) -> Diagnosis:
        """On rank 0: with what was told before, and the curves up to the step the run goes on from."""
        p = self._parts
        gaps = p.guard.pattern.with_gaps() if p.guard.pattern is not None else []
        limit_gib = memory_gib(p.world.device)
        diagnosis = Diagnosis(run_options(p), told=p.state.told_signs, memory_gib=limit_gib, gaps=gaps)
        replay(p.metrics.records(), diagnosis, lambda step, notice: None)
        diagnosis.told = set(p.state.told_signs)
        return diagnosis

    def _clear(self) -> None:
        self._steps, self._time_s, self._label_tokens, self._tokens, self._computed = 0, 0.0, 0, 0.0, 0.0

    def batch(self, tokens: float, computed: float) -> None:
        """Of the step to come, over all processes: tokens of samples, and tokens with padding and filler rows."""
        self._tokens += tokens
        self._computed += computed

    def step(self, result: StepResult) -> None:
        """A step was tried."""
        if self._parts.tracker is not None:
            self._parts.tracker.passed(self._parts.state.step)
        self._steps += 1
        self._time_s += result.step_time_s
        self._label_tokens += result.label_tokens if result.problem is None else 0

    def log_steps(self, figures: Mapping[str, float]) -> None:
        """Collective: the record of the steps since the last one.

        Args:
            figures: what the loop knows of them: loss, learning rate, gradient norm.
        """
        p, steps = self._parts, max(1, self._steps)
        phases_s = {phase: time_s / steps for phase, time_s in self._clock.take().items()}
        busy_s = phases_s["data"] + phases_s["forward"] + phases_s["backward"]
        ranks = self._by_rank([peak_memory_gib(p.world.device), busy_s, phases_s["data"]])
        time_s = max(self._time_s, 1e-9)
        tflops = 4 * p.matrix_elements * self._tokens / time_s / p.world.size / 1e12
        values: dict[str, Any] = {
            **figures,
            "tokens": p.state.tokens,
            "tokens_per_s": self._label_tokens / time_s,
            "padding_share": (self._computed - self._tokens) / max(1.0, self._computed),
            "step_time_s": self._time_s / steps,
            **{f"{phase}_time_s": phases_s[phase] for phase in PHASES},
            "tflops_per_device": tflops,
            **({"mfu": tflops / self._peak_tflops} if self._peak_tflops is not None else {}),
            "peak_mem_gib": max(peak for peak, *_ in ranks),
            "peak_mem_gib_by_rank": [peak for peak, *_ in ranks],
            "busy_time_s_by_rank": [busy for _, busy, _ in ranks],
            "sparsity": self._sparsity,
        }
        scale = p.strategy.loss_scale
        if scale is not None:
            values |= {"loss_scale": float(p.state.loss_scale or 0), "skipped_steps": p.state.skipped_steps}
        self._clear()
        self.record("train", values)

    def _by_rank(self, own: list[float]) -> list[list[float]]:
        """Collective: every rank's numbers; one small sum, where each adds zeros to the others'."""
        world, width = self._parts.world, len(own)
        slots = [0.0] * (width * world.size)
        slots[width * world.rank : width * (world.rank + 1)] = own
        found = world.sum(slots)
        return [found[width * rank : width * (rank + 1)] for rank in range(world.size)]

    def adapter_norms(self) -> None:
        """Collective: Frobenius norms of every module's update, as a record."""
        p = self._parts
        norms = update_norms(p.model, p.strategy.trainable_tensors())
        if norms:
            self.record("adapter_norms", norms)

    def record(self, event: str, values: Mapping[str, Any]) -> None:
        """To metrics.jsonl, the trackers and the diagnosis, on rank 0. `values`: numbers, lists of one number a rank, and texts."""
        p = self._parts
        if not p.world.is_main:
            return
        p.metrics.write(p.state.step, event, values)
        if p.tracker is not None:
            p.tracker.log(p.state.step, event, values)
        if self._diagnosis is None or event == "warning":
            return
        notices = self._diagnosis.see({"step": p.state.step, "event": event, **values})
        p.state.told_signs = sorted(self._diagnosis.told)  # also after a rollback to before it was told
        for notice in notices:
            p.console.warning(notice.text)
            self.record("warning", {"sign": notice.sign, "text": notice.text})


def run_options(parts: Parts) -> Options:
    """What remedies are about."""
    config = parts.config
    return Options(
        learning_rate=config.train.learning_rate,
        r=config.adapter.r,
        lora_dropout=config.adapter.lora_dropout,
        micro_batch=parts.loader.micro_batch,
        accumulation=parts.loader.accumulation,
        num_train_epochs=config.train.num_train_epochs,
        max_steps=config.train.max_steps,
        total_steps=parts.total_steps,
        warmup_steps=parts.warmup,
        max_grad_norm=config.train.max_grad_norm,
        dataloader_num_workers=config.data.dataloader_num_workers,
        block_size=config.data.block_size,
        gradient_checkpointing=config.train.gradient_checkpointing,
        max_train_samples=config.data.max_train_samples,
        early_stopping_patience=config.train.early_stopping_patience,
        target_modules=tuple(config.adapter.target_modules),
        classifies=config.model.task_type == "SEQ_CLS",
    )
