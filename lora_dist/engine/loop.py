"""The order of events of a run: evaluate the pruned model, step, log, check, evaluate, save, and finish with the best adapter.

Calls injected parts; does no tensor arithmetic. Every decision follows from `TrainState` and the configuration, so a resumed run
takes the same ones.
"""

from __future__ import annotations

import math
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch

from lora_dist.adapter import adapter_tensors, read_adapter_tensors, save_adapter
from lora_dist.data.loader import StepBatch, eval_batches
from lora_dist.engine.checkpoint import ADAPTER, list_checkpoints, retain, save_checkpoint, tensor_norms
from lora_dist.engine.folder import publish_files
from lora_dist.engine.schedule import learning_rate
from lora_dist.engine.setup import Parts
from lora_dist.engine.step import StepResult
from lora_dist.evaluation.perplexity import EvalResult, evaluate_loss
from lora_dist.log import UserError

EXPECT_AFTER_STEPS = 5


class Loop:
    """One run over its parts. `run()` once."""

    def __init__(self, parts: Parts):
        self.parts = parts
        self.state = parts.state
        self.train = parts.config.train
        self._started_s = time.perf_counter()
        self._time_before_s = parts.state.train_time_s
        self._step_times_s: list[float] = []
        self._eval_times_s: list[float] = []
        self._since_log_tokens = 0
        self._since_log_s = 0.0

    # The whole run

    def run(self) -> EvalResult | None:
        """Train to the end and write the final adapter. Collective throughout. Returns the final evaluation, if there is one."""
        p, train = self.parts, self.train
        p.console.training_starts(
            examples=len(p.train_windows),
            epochs=train.num_train_epochs if train.max_steps <= 0 else p.total_steps / p.loader.steps_per_epoch,
            micro_batch=train.per_device_train_batch_size,
            total_batch=p.loader.global_batch,
            accumulation=train.gradient_accumulation_steps,
            steps=p.total_steps,
            trainable=sum(shape.numel() for shape in p.strategy.shapes.values()),
        )
        if train.eval_on_start and p.eval_windows is not None and self.state.first_eval_loss is None:
            self._evaluate()
        self._train()
        self._checked_everywhere("at the end", whole=True)
        if train.save_strategy != "no" and not self._saved(self.state.step):
            self._save()
        p.console.training_done(self._elapsed_s())
        best = self._load_best()
        final = self._final_evaluation() if p.eval_windows is not None else None
        self._finish(final, best)
        return final

    def _train(self) -> None:
        p, state = self.parts, self.state
        if state.step >= p.total_steps or self._out_of_patience():
            return
        p.strategy.module.train()
        for batch in p.loader.steps_from(state.cursor):
            result = self._step(batch)
            self._log(result)
            if state.step % p.config.guard.every == 0:
                self._checked_everywhere(f"at step {state.step}")
            epoch_ends = batch.cursor_after % len(p.train_windows) == 0
            improved = self._evaluation_due(epoch_ends) and self._evaluate()
            if improved or self._due(self.train.save_strategy, self.train.save_steps, epoch_ends):
                if self.train.save_strategy != "no":
                    self._save()
            if state.step >= p.total_steps or self._out_of_patience():
                return

    def _step(self, batch: StepBatch) -> StepResult:
        p, state = self.parts, self.state
        rate = self._rate(state.step)
        result = p.stepper.run(batch.micro_batches, batch.label_tokens, rate=rate, step=state.step + 1)
        state.step += 1
        state.cursor = batch.cursor_after
        state.tokens += result.label_tokens
        state.loss_window_sum += result.loss
        state.loss_window_steps += 1
        state.skipped_steps += not result.applied
        state.train_time_s = self._elapsed_s()
        if p.strategy.loss_scale is not None:
            state.loss_scale, state.loss_scale_good_steps = p.strategy.loss_scale.scale, p.strategy.loss_scale.good_steps
        self._step_times_s.append(result.step_time_s)
        self._since_log_tokens += result.label_tokens
        self._since_log_s += result.step_time_s
        if len(self._step_times_s) == min(EXPECT_AFTER_STEPS, p.total_steps):
            p.console.expected_time(self._expected_s())
        return result

    # Logging

    def _log(self, result: StepResult) -> None:
        p, state, train = self.parts, self.state, self.train
        last = state.step == p.total_steps
        if not (state.step % train.logging_steps == 0 or last or (state.step == 1 and train.logging_first_step)):
            return
        loss = state.loss_window_sum / state.loss_window_steps
        state.loss_window_sum, state.loss_window_steps, state.last_train_loss = 0.0, 0, loss
        rate, epoch = self._rate(state.step - 1), self._epoch()
        p.console.step(step=state.step, total=p.total_steps, loss=loss, rate=rate, epoch=epoch, elapsed_s=self._elapsed_s())
        tokens_per_s = self._since_log_tokens / self._since_log_s
        self._since_log_tokens, self._since_log_s = 0, 0.0
        values: dict[str, float] = {
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": result.grad_norm,
            "epoch": epoch,
            "tokens": state.tokens,
            "tokens_per_s": tokens_per_s,
            "step_time_s": result.step_time_s,
            "peak_mem_gib": peak_memory_gib(p.world.device),
        }
        if p.strategy.loss_scale is not None:
            values |= {"loss_scale": float(state.loss_scale or 0), "skipped_steps": state.skipped_steps}
        self._record("train", values)

    def _record(self, event: str, values: Mapping[str, float]) -> None:
        """To metrics.jsonl and the tracker, on rank 0."""
        p = self.parts
        if p.world.is_main:
            p.metrics.write(self.state.step, event, values)
        if p.tracker is not None:
            p.tracker.log(self.state.step, {f"{event}/{name}": value for name, value in values.items()})

    # Evaluation

    def _evaluate(self) -> bool:
        """Evaluate now; whether it is the best so far. The first evaluation (of the pruned model) is best, but nothing to save."""
        p, state = self.parts, self.state
        result = self._run_evaluation(final=False)
        if state.step == 0 and not math.isfinite(result.loss):
            raise UserError(f"evaluation at step 0: found a loss of {result.loss} before any training: the base itself is broken")
        first = state.best_metric is None
        before = state.best_metric
        better = first or result.loss < before - self.train.early_stopping_threshold  # type: ignore[operator]
        if state.step == 0:
            state.first_eval_loss = result.loss
        if better:
            state.best_metric, state.best_step, state.evals_without_improvement = result.loss, state.step, 0
        else:
            state.evals_without_improvement += 1
        p.console.evaluated(
            step=state.step,
            **self._figures(result),
            better=better,
            before=None if before is None else math.exp(min(before, 700)),
        )
        self._record_evaluation("eval", result)
        return better and state.step > 0

    def _run_evaluation(self, *, final: bool) -> EvalResult:
        p, train = self.parts, self.train
        assert p.eval_windows is not None
        p.console.evaluation_starts(len(p.eval_windows), train.per_device_eval_batch_size, final=final)
        batch_size = train.per_device_eval_batch_size
        bar = p.console.bar(math.ceil(len(p.eval_windows) / (batch_size * p.world.size)), "Evaluating")
        batches = eval_batches(p.eval_windows, batch_size=batch_size, rank=p.world.rank, world=p.world.size)
        result = evaluate_loss(p.strategy.module, batches, world=p.world, samples=len(p.eval_windows), on_batch=bar.update)
        bar.close()
        self._eval_times_s.append(result.runtime_s)
        return result

    def _figures(self, result: EvalResult) -> dict[str, Any]:
        """What the console shows of an evaluation."""
        return {
            "loss": result.loss,
            "perplexity": result.perplexity,
            "runtime_s": result.runtime_s,
            "samples": result.samples,
            "steps": result.steps,
            "epoch": self._epoch(),
        }

    def _record_evaluation(self, event: str, result: EvalResult) -> None:
        self._record(
            event,
            {
                "eval_loss": result.loss,
                "perplexity": result.perplexity,
                "eval_runtime_s": result.runtime_s,
                "eval_tokens": result.tokens,
                "epoch": self._epoch(),
            },
        )

    def _final_evaluation(self) -> EvalResult:
        p, state = self.parts, self.state
        result = self._run_evaluation(final=True)
        first = None if state.first_eval_loss is None else math.exp(min(state.first_eval_loss, 700))
        p.console.final_results(**self._figures(result), first=first)
        self._record_evaluation("final", result)
        return result

    # Guard and checkpoints

    def _checked_everywhere(self, when: str, *, whole: bool = False) -> None:
        """Collective: the guard on every rank; one rank's finding stops all."""
        problem, start = None, time.perf_counter()
        try:
            (self.parts.guard.check_all if whole else self.parts.guard.check)(when)
        except UserError as error:
            problem = error
        self._record("guard", {"check_time_s": time.perf_counter() - start, "whole_base": whole})
        self.parts.world.agree(problem)

    def _saved(self, step: int) -> bool:
        return bool(self.parts.world.on_main(lambda: any(n == step for n, _ in list_checkpoints(self.parts.output_dir))))

    def _save(self) -> None:
        """Collective: guard, gather, publish on rank 0, retire old ones."""
        p, state = self.parts, self.state
        self._checked_everywhere(f"before saving at step {state.step}")
        start = time.perf_counter()
        trained, optimizer = p.strategy.trainable_tensors(), p.strategy.optimizer_tensors()

        def publish() -> None:
            p.console.saving(p.output_dir / f"checkpoint-{state.step}")
            tensors = adapter_tensors(p.model, trained)
            final = save_checkpoint(
                p.output_dir,
                write_adapter=lambda folder: save_adapter(p.model, folder, tensors),
                optimizer=optimizer,
                state=state,
                identity=p.identity,
                versions=p.versions,
                norms=tensor_norms(tensors),
                run_id=None,
            )
            retain(p.output_dir, self.train.save_total_limit, state.best_step)
            p.console.saved_files(final / ADAPTER / "adapter_config.json", final / ADAPTER / "adapter_model.safetensors")
            p.console.checkpoint_saved(state.step)

        p.world.on_main(publish)
        self._record("save", {"save_time_s": time.perf_counter() - start})

    def _load_best(self) -> str | None:
        """Go back to the best evaluated adapter; the name of its checkpoint, where there is one."""
        p, state = self.parts, self.state
        if not self.train.load_best_model_at_end or p.eval_windows is None:
            return None
        if state.best_step <= 0:
            p.console.warning("no evaluation was better than the pruned model's: keeping the adapter of the last step")
            return None
        folder = p.output_dir / f"checkpoint-{state.best_step}"
        if state.best_step != state.step:
            p.console.note(f"loading the best adapter, of step {state.best_step}")
            p.strategy.load_trainable(read_adapter_tensors(p.model, folder / ADAPTER, p.strategy.shapes))
        return folder.name

    def _finish(self, final: EvalResult | None, best: str | None) -> None:
        """Collective: the final adapter and tokenizer into the run folder, then the summary."""
        p, state = self.parts, self.state
        trained = p.strategy.trainable_tensors()

        def write() -> None:
            p.console.saving(p.output_dir)
            publish_files(p.output_dir, lambda folder: save_adapter(p.model, folder, adapter_tensors(p.model, trained)))
            p.console.saved_files(p.output_dir / "adapter_config.json", p.output_dir / "adapter_model.safetensors")
            publish_files(p.output_dir, lambda folder: p.base.tokenizer.save_pretrained(str(folder)))
            p.console.tokenizer_saved(p.output_dir / "tokenizer_config.json")

        p.world.on_main(write)
        p.console.summary(
            steps=state.step,
            seconds=self._elapsed_s(),
            train_loss=state.last_train_loss,
            eval_loss=final.loss if final else None,
            perplexity=final.perplexity if final else None,
            best_checkpoint=best,
        )
        base, out = shlex.quote(p.config.model.name_or_path), shlex.quote(str(p.output_dir))
        merged = shlex.quote(str(p.output_dir / "merged"))
        p.console.complete(
            p.output_dir,
            [
                "1. Evaluate the fine-tuned model:",
                f"   LORA_WEIGHTS={out} PRUNED_MODEL={base} ./scripts/evaluate_lora_block.sh",
                f"2. Merge it, pattern kept:  lora-dist merge {base} {out} {merged}"
                + (" --densify   (plain LoRA: the pattern is lost)" if p.pattern is None and p.guard.pattern is not None else ""),
            ],
        )

    # Small facts

    def _rate(self, step: int) -> float:
        p, train = self.parts, self.train
        return learning_rate(step, p.total_steps, peak=train.learning_rate, warmup=p.warmup, kind=train.lr_scheduler_type)

    def _epoch(self) -> float:
        return self.state.cursor / len(self.parts.train_windows)

    def _due(self, strategy: str, every: int, epoch_ends: bool) -> bool:
        if strategy == "epoch":
            return epoch_ends
        return strategy == "steps" and self.state.step % every == 0

    def _evaluation_due(self, epoch_ends: bool) -> bool:
        """The last step is always evaluated, so that the best adapter is chosen among all that were trained."""
        last = self.state.step == self.parts.total_steps
        return self.parts.eval_windows is not None and (
            last or self._due(self.train.eval_strategy, self.train.eval_steps, epoch_ends)
        )

    def _out_of_patience(self) -> bool:
        patience = self.train.early_stopping_patience
        return patience is not None and self.state.evals_without_improvement >= patience

    def _elapsed_s(self) -> float:
        return self._time_before_s + time.perf_counter() - self._started_s

    def _expected_s(self) -> float:
        """Whole run, from the first steps and the evaluations seen so far."""
        remaining = self.parts.total_steps - self.state.step
        evaluations = 1 + (remaining // self.train.eval_steps if self.train.eval_strategy == "steps" else 0)
        one_eval_s = statistics.median(self._eval_times_s) if self._eval_times_s else 0.0
        return self._elapsed_s() + remaining * statistics.median(self._step_times_s) + evaluations * one_eval_s


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: of the GPU's allocator, or resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
