"""The order of events of a run: evaluate the pruned model, step, log, check, evaluate, save, and finish with the best adapter.

Calls injected parts; does no tensor arithmetic. Every decision follows from `TrainState` and the configuration, so a resumed run
takes the same ones. A run may be asked to stop (`engine/stop.py`): it does so before a step or within an evaluation, after a save.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

from lora_dist.adapter import frozen_elements, read_adapter_tensors
from lora_dist.config import steps_of
from lora_dist.data.loader import StepBatch
from lora_dist.engine.checkpoint import ADAPTER, verify
from lora_dist.engine.evaluations import Evaluations
from lora_dist.engine.final import final_folder, next_steps, write_final
from lora_dist.engine.health import Health
from lora_dist.engine.profile import TRACES, Profile
from lora_dist.engine.saver import Saver
from lora_dist.engine.schedule import learning_rate
from lora_dist.engine.setup import Parts
from lora_dist.engine.step import NonFiniteError, StepResult
from lora_dist.engine.stop import TIME_LIMIT, Stop, Stopped, first_reason
from lora_dist.engine.tally import Tally
from lora_dist.engine.task import figures_of
from lora_dist.engine.telemetry import Telemetry
from lora_dist.engine.watch import STACKS, Watch
from lora_dist.evaluation.perplexity import EvalResult
from lora_dist.log import EXIT_HUNG, UserError

EXPECT_AFTER_STEPS = 5
LAUNCHER_GRACE_S = 30
"""torchrun's, between the SIGTERM that it hands on and its SIGKILL"""


@dataclass(frozen=True)
class Ended:
    """How a run ended, on every process."""

    final: EvalResult | None
    """the final evaluation, if there was one"""
    stopped: str | None
    """why it ended before the end, one of `stop.REASONS`"""


class Loop:
    """One run over its parts. `run()` once."""

    def __init__(self, parts: Parts, stop: Stop | None = None):
        self.parts = parts
        self.state = parts.state
        self.stop = stop or Stop()
        self.telemetry = Telemetry(parts)
        self._record = self.telemetry.record
        self.saver = Saver(parts, self._record)
        self.watch = Watch(
            parts.world,
            timeout_s=parts.config.health.hang_timeout_s,
            stacks=parts.output_dir / STACKS / f"attempt-{parts.attempt_number}",
            on_hang=self._hung,
        )
        self.evaluations = Evaluations(parts, self._record, self._stop_if_asked, self.watch.mark)
        self.health = Health(parts, self.saver, self._record)
        self.tally = Tally(parts, self._record)
        self.train = parts.config.train
        traces = parts.output_dir / TRACES / f"attempt-{parts.attempt_number}"
        steps = steps_of(self.train.profile) if self.train.profile is not None else None
        self.profile = Profile(steps, traces, parts.world.rank, parts.world.device)
        self._started_s = time.perf_counter()
        self._time_before_s = parts.state.train_time_s
        self._step_times_s: list[float] = []
        self._told_time_to_stop = False

    # The whole run

    def run(self) -> Ended:
        """Train to the end and write the final adapter, or stop early with a checkpoint. Collective throughout."""
        p, train = self.parts, self.train
        p.console.training_starts(
            examples=len(p.train_rows),
            epochs=train.num_train_epochs if train.max_steps <= 0 else p.total_steps / p.loader.steps_per_epoch,
            micro_batch=p.loader.micro_batch,
            total_batch=p.loader.global_batch,
            accumulation=p.loader.accumulation,
            steps=p.total_steps,
            trainable=sum(shape.numel() for shape in p.strategy.shapes.values()) - frozen_elements(p.model),
        )
        self.stop.training_starts()
        self.watch.start()
        try:
            if train.eval_on_start and p.eval_rows is not None and self.state.first_eval_loss is None:
                self.evaluations.run()
            self._train()
            self._checked_everywhere("at the end", whole=True)
            if train.save_strategy != "no":
                self.watch.mark("saving the last step", self.state.step)
                self.saver.surely()
            p.console.training_done(self._elapsed_s())
            best = self._load_best()
            final = self.evaluations.run_final() if p.eval_rows is not None else None
            self._finish(final, best)
            return Ended(final, None)
        except Stopped as stopped:
            self._stop(stopped.reason)
            return Ended(None, stopped.reason)
        except NonFiniteError:
            self._stop("the next step cannot be taken")
            raise
        finally:
            self.watch.mark("waiting for the last save", self.state.step)
            if self.profile.close():
                self._tell_of_trace()
            self.saver.close()
            self.watch.stop()

    def _train(self) -> None:
        p, state = self.parts, self.state
        self._make_up_evaluation()
        if state.step >= p.total_steps or self._out_of_patience():
            return
        p.strategy.module.train()
        for batch in self._batches():
            total_tokens = self._agree_to_go_on(batch)
            result = self._step(batch, total_tokens)
            if result is None:
                self._make_up_evaluation()
                continue
            self._log(result)
            if state.step % p.config.guard.every == 0:
                self._checked_everywhere(f"at step {state.step}")
            self._evaluate_and_save()
            if state.step >= p.total_steps or self._out_of_patience():
                return

    def _batches(self) -> Iterator[StepBatch]:
        steps = self.parts.loader.steps_from(self.state.cursor)
        while True:
            self.watch.mark("loading data", self.state.step + 1)
            if self.profile.next_step():
                self._tell_of_trace()
            with self.parts.stepper.clock.host("data"):
                batch = next(steps)
            yield batch

    def _tell_of_trace(self) -> None:
        self.parts.console.note(f"traced steps {self.train.profile}: {self.profile.folder}")

    def _make_up_evaluation(self) -> None:
        """Collective: of a checkpoint whose attempt was stopped just before it, or killed before what it found was saved."""
        p, state = self.parts, self.state
        if state.evaluated_step != state.step and state.step > 0:
            p.world.on_main(lambda: p.metrics.drop_after(state.step, evaluated=False))
            self._evaluate_and_save(again=True)

    def _agree_to_go_on(self, batch: StepBatch) -> float:
        """Collective, before every step: hear of saves that have ended, and of requests to stop. Returns the step's label tokens over
        all processes, which are summed in any case.

        Raises:
            Stopped: on every process, if any of them was asked.
        """
        self.watch.mark("agreeing to go on", self.state.step + 1)
        counts = (batch.label_tokens, batch.tokens, batch.computed_tokens, self.saver.news)
        tokens, held, computed, news, *asked = self.parts.world.sum([*map(float, counts), *self.stop.flags(self._needed_s())])
        self.telemetry.batch(held, computed)
        if news:
            self.saver.absorb()
        self._tell_time_to_stop()
        reason = first_reason(asked)
        if reason is not None:
            raise Stopped(reason)
        return tokens

    def _tell_time_to_stop(self) -> None:
        """Once, after a save, where a launcher would not wait for as long as a stop takes."""
        needed_s = self._needed_s()
        if self.saver.saves > 0 and needed_s > LAUNCHER_GRACE_S and not self._told_time_to_stop:
            self._told_time_to_stop = True
            self.parts.console.warning(
                f"stopping takes up to {needed_s:.0f} s (a step and a save), torchrun ends its processes {LAUNCHER_GRACE_S} s after a SIGTERM: "
                "take smaller steps (train.gradient_accumulation_steps), or save often enough (train.save_steps)"
            )

    def _evaluate_and_save(self, *, again: bool = False) -> None:
        """What is due after the step that was taken last. `again`: its checkpoint was written without."""
        state = self.state
        epoch_ends = self.tally.epoch_ends()
        improved = self._evaluation_due(epoch_ends) and self.evaluations.run()
        if self._evaluation_due(epoch_ends):
            self.telemetry.adapter_norms()
        state.evaluated_step = state.step
        due = improved or again or self._due(self.train.save_strategy, self.train.save_steps, epoch_ends)
        if due and self.train.save_strategy != "no":
            self._save()
            if improved and self.parts.console.waits_for_best:
                self.saver.wait()

    def _stop(self, reason: str) -> None:
        """Collective: save what has been trained, unless it is saved, and say how to go on."""
        p, step = self.parts, self.state.step
        where = f"stopped at step {step} of {p.total_steps} ({reason})"
        if reason == TIME_LIMIT and not self._step_times_s:  # another attempt would get no further
            raise UserError(
                f"train.max_runtime, or the Slurm job's time limit: found no time for one step at step {step} of {p.total_steps}, expected a "
                f"limit that leaves more than train.stop_margin_s ({self.train.stop_margin_s:g} s) once the run is loaded"
            )
        if step == 0:
            p.console.note(f"{where}: nothing was trained yet")
        elif self.train.save_strategy == "no":
            p.console.warning(f"{where}: nothing was saved, since train.save_strategy is no")
        else:
            try:
                self._checked_everywhere(f"before saving at step {step}")
                self.watch.mark("saving before the end", step)
                self.saver.surely()
                p.console.note(f"{where}, checkpoint-{step} is whole: go on with --resume auto")
            except UserError as error:
                p.console.warning(f"{where}, but it could not be saved ({error}): --resume auto goes on from the last checkpoint")

    def _step(self, batch: StepBatch, total_tokens: float) -> StepResult | None:
        """Collective: one step, and what becomes of it; None after going back to a checkpoint, from which the next batch goes on."""
        p, state = self.parts, self.state
        rate = self._rate(state.step)
        result = p.stepper.run(
            batch.micro_batches,
            total_tokens,
            rate=rate,
            step=state.step + 1,
            loss_limit=self.health.loss_limit(),
            mark=self.watch.mark,
        )
        state.train_time_s = self._elapsed_s()
        self._step_times_s.append(result.step_time_s)
        self.telemetry.step(result)
        if result.problem is not None:
            self.watch.mark("acting on a step that was not taken", result.problem.step)
            return result if self.health.handle(result.problem, batch, rate) == "skip" else None
        state.step += 1
        state.cursor = batch.cursor_after
        state.tokens += result.label_tokens
        state.loss_window_sum += result.loss
        state.loss_window_steps += 1
        for name, value in result.parts.items():
            state.parts_window[name] = state.parts_window.get(name, 0.0) + value
        state.skipped_steps += not result.applied
        if result.applied:
            self.health.took(result)
        if p.strategy.loss_scale is not None:
            state.loss_scale, state.loss_scale_good_steps = p.strategy.loss_scale.scale, p.strategy.loss_scale.good_steps
        self.tally.add(batch, result, total_tokens)
        if len(self._step_times_s) == min(EXPECT_AFTER_STEPS, p.total_steps):
            p.console.expected_time(self._expected_s())
        return result

    # Logging

    def _log(self, result: StepResult) -> None:
        """Collective, where a line is due."""
        p, state, train = self.parts, self.state, self.train
        last = state.step == p.total_steps
        if not (state.step % train.logging_steps == 0 or last or (state.step == 1 and train.logging_first_step)):
            return
        if state.loss_window_steps == 0:
            return  # every step since the last line was left out
        loss = state.loss_window_sum / state.loss_window_steps
        parts = {name: value / state.loss_window_steps for name, value in state.parts_window.items()}
        state.loss_window_sum, state.loss_window_steps, state.last_train_loss, state.parts_window = 0.0, 0, loss, {}
        accuracy = self.tally.window_accuracy()
        rate, epoch = self._rate(state.step - 1), self.state.cursor / len(p.train_rows)
        p.console.step(step=state.step, total=p.total_steps, loss=loss, rate=rate, epoch=epoch, elapsed_s=self._elapsed_s())
        figures = {"loss": loss, **parts, **accuracy, "learning_rate": rate, "grad_norm": result.grad_norm, "epoch": epoch}
        self.telemetry.log_steps(figures)

    # Guard and checkpoints

    def _checked_everywhere(self, when: str, *, whole: bool = False) -> None:
        """Collective: the guard on every rank; one rank's finding stops all."""
        self.watch.mark("checking the base", self.state.step)
        problem, start = None, time.perf_counter()
        try:
            (self.parts.guard.check_all if whole else self.parts.guard.check)(when)
        except UserError as error:
            problem = error
        self._record("guard", {"check_time_s": time.perf_counter() - start, "whole_base": whole})
        self.parts.world.agree(problem)

    def _save(self) -> None:
        """Collective: guard, snapshot; a thread does the rest."""
        self._checked_everywhere(f"before saving at step {self.state.step}")
        with self.parts.stepper.clock.host("save"):
            self.watch.mark("waiting for the previous save", self.state.step)
            self.saver.wait()
            self.watch.mark("gathering for a save", self.state.step)
            self.saver.start()

    def _stop_if_asked(self) -> None:
        """Collective.

        Raises:
            Stopped: on every process, if any of them was asked.
        """
        reason = first_reason(self.parts.world.sum(self.stop.flags(self._needed_s())))
        if reason is not None:
            raise Stopped(reason)

    def _needed_s(self) -> float:
        """How long the next step and a save took at most, so far."""
        return max(self._step_times_s, default=0.0) + self.saver.longest_save_s

    def _hung(self, reason: str, report: str) -> None:
        """On rank 0, from the watch's thread, before the process ends."""
        p = self.parts
        p.console.log_only(report)
        if p.attempt is not None:
            p.attempt.end("hung", reason, step=self.state.step, exit_code=EXIT_HUNG)

    def _load_best(self) -> str | None:
        """Go back to the best evaluated adapter; the name of its checkpoint, where there is one."""
        p, state = self.parts, self.state
        self.watch.mark("loading the best adapter", state.step)
        if not self.train.load_best_model_at_end or p.eval_rows is None:
            return None
        if state.best_step <= 0:
            p.console.warning("no evaluation was better than the pruned model's: keeping the adapter of the last step")
            return None
        folder = p.output_dir / f"checkpoint-{state.best_step}"
        if state.best_step != state.step:
            problem = p.world.on_main(lambda: verify(folder, run_id=p.run_id))
            if problem is not None:
                p.console.warning(
                    f"the best adapter, {folder.name}, cannot be read ({problem}): keeping the adapter of the last step"
                )
                return None
            p.console.note(f"loading the best adapter, of step {state.best_step}")
            p.strategy.load_trainable(read_adapter_tensors(p.model, folder / ADAPTER, p.strategy.shapes))
        return folder.name

    def _finish(self, final: EvalResult | None, best: str | None) -> None:
        """Collective: the final adapter and tokenizer into the run folder, then the summary."""
        p, state = self.parts, self.state
        self.watch.mark("writing the final adapter", state.step)
        trained, norms = p.strategy.trainable_tensors(), self.saver.live_norms()

        def write() -> None:
            self.saver.ensure_folder()
            write_final(p, trained, norms)

        p.world.on_main(write)
        p.console.summary(
            steps=state.step,
            seconds=self._elapsed_s(),
            train_loss=state.last_train_loss,
            eval_loss=final.loss if final else None,
            perplexity=figures_of(final).get("perplexity") if final else None,
            best_checkpoint=best,
        )
        what = "Sparse full" if self.train.mode == "sparse_full" else "LoRA"
        p.console.complete(final_folder(p), next_steps(p), what)

    # Small facts

    def _rate(self, step: int) -> float:
        p, train = self.parts, self.train
        return learning_rate(step, p.total_steps, peak=train.learning_rate, warmup=p.warmup, kind=train.lr_scheduler_type)

    def _due(self, strategy: str, every: int, epoch_ends: bool) -> bool:
        if strategy == "epoch":
            return epoch_ends
        return strategy == "steps" and self.state.step % every == 0

    def _evaluation_due(self, epoch_ends: bool) -> bool:
        """The last step is always evaluated, so that the best adapter is chosen among all that were trained."""
        last = self.state.step == self.parts.total_steps
        return self.parts.eval_rows is not None and (
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
        one_eval_s = statistics.median(self.evaluations.times_s or [0.0])
        return self._elapsed_s() + remaining * statistics.median(self._step_times_s) + evaluations * one_eval_s
