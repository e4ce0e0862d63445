"""What a run's curves say is wrong with it: signs, each told once a run, with the remedy in terms of the run's own options.

Plain floats in, texts out: it is fed the records of metrics.jsonl as they are made, and after a resume those that there are. Noise is
judged by the differences of neighbouring lines, which a trend hardly touches. The figures are measured (docs/diagnosis.md). Used by
`engine/telemetry.py`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lora_dist.monitor.remedies import Options, remedy

MIN_LINES = 20
_TAIL = 5
"""lines in a row that a sign of speed or divergence needs"""


@dataclass(frozen=True)
class Notice:
    """One sign, told once."""

    sign: str
    text: str
    """one line: what was seen, and what to change"""


@dataclass(frozen=True)
class _Line:
    """One line of training."""

    step: int
    loss: float
    rate: float


@dataclass(frozen=True)
class _Evaluation:
    """One evaluation, and the training loss of the lines before it."""

    step: int
    loss: float
    train: float | None


class Diagnosis:
    """Of one run.

    Args:
        told: signs that were told before, by this attempt or an earlier one.
        memory_gib: of the device; None where it is not known.
        gaps: modules of which whole rows or columns of tiles are pruned. What is beside them in the layer, and only works through those,
            gets no gradient: that is the pattern's doing, and no sign as long as the rest of the layer learns.
    """

    def __init__(
        self,
        options: Options,
        *,
        told: Iterable[str] = (),
        memory_gib: float | None = None,
        gaps: Iterable[str] = (),
    ):
        self._options, self._memory_gib = options, memory_gib
        self._gaps = {_parent(name) for name in gaps}
        self.told = set(told)
        self._lines: list[_Line] = []
        self._evaluations: list[_Evaluation] = []
        self._starved = 0
        self._slow: list[int] = []  # the rank that was slow in each of the last lines
        self._norms: tuple[int, dict[str, float]] | None = None

    def see(self, record: Mapping[str, Any]) -> list[Notice]:
        """One record of metrics.jsonl; what it makes known for the first time."""
        event, found = record.get("event"), []
        if event == "train" and record.get("loss") is not None:
            found = self._see_line(record)
        elif event == "eval" and record.get("eval_loss") is not None:
            found = self._see_evaluation(record)
        elif event == "adapter_norms":
            found = [self._dead_gradients(record)]
        new = []
        for sign, seen in filter(None, found):
            if sign not in self.told:
                self.told.add(sign)
                new.append(Notice(sign, f"{seen}: {remedy(sign, self._options)}"))
        return new

    # Records

    def _see_line(self, record: Mapping[str, Any]) -> list[tuple[str, str] | None]:
        if self._lines and record["step"] <= self._lines[-1].step:  # after a rollback
            self._lines = [line for line in self._lines if line.step < record["step"]]
            self._evaluations = [each for each in self._evaluations if each.step < record["step"]]
        self._lines.append(_Line(record["step"], record["loss"], record["learning_rate"]))
        return [
            self._divergence(),
            self._jump(),
            self._oscillation(),
            self._no_fall(),
            self._slow_fall(),
            self._plateau(),
            self._starvation(record),
            self._slow_rank(record),
            self._memory(record),
        ]

    def _see_evaluation(self, record: Mapping[str, Any]) -> list[tuple[str, str] | None]:
        since = self._evaluations[-1].step if self._evaluations else -1
        losses = [line.loss for line in self._lines if line.step > since]
        self._evaluations.append(_Evaluation(record["step"], record["eval_loss"], statistics.fmean(losses) if losses else None))
        return [self._overfitting(), self._evaluations_swing()]

    # Signs of the loss

    def _settled(self) -> list[float]:
        """Losses behind the warm-up."""
        return [line.loss for line in self._lines if line.step > self._options.warmup_steps]

    def _progress(self) -> float:
        return self._lines[-1].step / max(1, self._options.total_steps)

    def _fell(self) -> bool:
        """Whether evaluations say that the run gained anything: they have no noise of batches."""
        losses = [each.loss for each in self._evaluations]
        return len(losses) > 1 and losses[-1] < 0.98 * losses[0]

    def _no_fall(self) -> tuple[str, str] | None:
        losses = self._settled()
        if len(losses) < MIN_LINES or self._progress() < 0.25 or self._fell() or self.told & {"divergence", "overfitting"}:
            return None
        first, _, last = _parts(losses, 3)
        error = _noise(losses) * math.sqrt(2 / len(first))
        fall = _mean(first) - _mean(last)
        if fall > max(2 * error, 0.01 * _mean(first)):
            return None
        start = min(line.loss for line in self._lines[:2])  # a task that is learnt during the warm-up
        if start - _mean(last) > max(5 * _noise(losses), 0.1 * start):
            return None
        return (
            "no_fall",
            f"the loss does not fall ({_mean(first):.3f} in the first third of the lines, {_mean(last):.3f} in the last)",
        )

    def _slow_fall(self) -> tuple[str, str] | None:
        """A rate that fits makes the loss fall fast, then ever slower; one that is too low makes it fall in a straight line."""
        losses = self._settled()
        if len(losses) < MIN_LINES or self._progress() < 0.4 or "no_fall" in self.told:
            return None
        first, middle, last = map(_mean, _parts(losses, 3))
        error = _noise(losses) * math.sqrt(6 / len(losses))
        early, late = first - middle, middle - last
        rates = [line.rate for line in self._lines if line.step > self._options.warmup_steps]
        before, after = map(_mean, _parts(rates, 2))
        decay = (
            after / before if before > 0 else 1.0
        )  # as the rate decays so does the fall; more than that is what decaying is for
        if min(early, late) < 3 * error or not 0.85 <= late / early <= 1.5 * decay:
            return None
        return "slow", f"the loss falls slowly, and no slower now than at first ({first:.3f}, {middle:.3f}, {last:.3f} by thirds)"

    def _plateau(self) -> tuple[str, str] | None:
        if "overfitting" in self.told:
            return None
        losses = self._settled()
        if (
            len(losses) < 2 * MIN_LINES
            or not 0.4 <= self._progress() <= 0.9
            or self._lines[-1].rate < self._options.learning_rate / 2
        ):
            return None
        first, _, third, last = map(_mean, _parts(losses, 4))
        error = _noise(losses) * math.sqrt(8 / len(losses))
        if first - last < 3 * error or abs(third - last) > max(error, 0.002 * last):
            return None
        return "plateau", f"the loss has stopped falling ({third:.3f} and {last:.3f} in the last two quarters of the lines)"

    def _divergence(self) -> tuple[str, str] | None:
        losses = [line.loss for line in self._lines]
        if len(losses) < 2 * _TAIL:
            return None
        best = min(_mean(losses[i : i + _TAIL]) for i in range(len(losses) - _TAIL + 1))
        tail = losses[-_TAIL:]
        if min(tail) < best + max(0.3, 0.15 * best) or _mean(tail) < best + max(0.5, 0.2 * best):
            return None
        return "divergence", f"the loss diverges ({best:.3f} at its best, {_mean(tail):.3f} over the last {_TAIL} lines)"

    def _jump(self) -> tuple[str, str] | None:
        """Far above what it was already, if only for a while: the model was thrown back."""
        losses = [line.loss for line in self._lines]
        low = min(losses)
        since = losses[losses.index(low) :]
        high = [loss for loss in since if loss > 1.25 * low]
        if (len(high) < 2 and max(since) < 1.5 * low) or max(since) < low + 0.5 or "divergence" in self.told:
            return None
        return "oscillation", f"the loss jumps up ({low:.3f} before, then {max(since):.3f})"

    def _oscillation(self) -> tuple[str, str] | None:
        tail = [line.loss for line in self._lines[-MIN_LINES:]]
        if len(tail) < MIN_LINES or self.told & {"divergence", "overfitting"}:
            return None
        # Of a classifier that gets most rows right, one wrong row more is a large share of the loss, and means nothing.
        swing = _noise(tail) / max(_mean(tail), self._lines[0].loss if self._options.classifies else 0.0)
        turns = sum((b - a) * (c - b) < 0 for a, b, c in zip(tail, tail[1:], tail[2:], strict=False))
        if swing < 0.15 or turns < len(tail) / 3:
            return None
        return "oscillation", f"the loss swings by {swing:.0%} from line to line"

    def _evaluations_swing(self) -> tuple[str, str] | None:
        losses = [each.loss for each in self._evaluations][-6:]
        changes = [b / a - 1 for a, b in pairwise(losses)]
        rises = [change for change in changes if change > 0.05]
        falls_between = [
            i for i in range(1, len(changes) - 1) if changes[i] < -0.03 and min(changes[i - 1], changes[i + 1]) > 0.05
        ]
        if not falls_between:
            return None
        return "oscillation", f"the evaluation loss swings (up by as much as {max(rises):.0%} from one to the next)"

    def _overfitting(self) -> tuple[str, str] | None:
        seen = [each for each in self._evaluations if each.train is not None]
        if len(seen) < 3:
            return None
        best = min(seen, key=lambda each: each.loss)
        after = [each for each in seen if each.step > best.step]
        last, trains = seen[-1], (best.train, seen[-1].train)
        assert trains[0] is not None and trains[1] is not None
        rising = len(after) >= 2 and all(each.loss > 1.01 * best.loss for each in after[-2:]) and trains[1] < 0.99 * trains[0]
        rising = rising and trains[1] <= 1.02 * min(each.train or 0.0 for each in seen)
        gaps = [each.loss - (each.train or 0.0) for each in seen]
        apart = len(gaps) >= 4 and min(gaps[-2:]) > max(0.3, 0.2 * last.loss) and gaps[-1] > gaps[0] + 0.2
        if rising:
            return "overfitting", (
                f"over-fitting: evaluation loss {best.loss:.3f} at step {best.step}, {last.loss:.3f} now, while the training loss fell to "
                f"{last.train:.3f}"
            )
        if apart:
            return (
                "overfitting",
                f"over-fitting: evaluation loss {last.loss:.3f}, training loss {last.train:.3f}, ever further apart",
            )
        return None

    # Signs of the machine

    def _starvation(self, record: Mapping[str, Any]) -> tuple[str, str] | None:
        waiting, step = record.get("data_time_s"), record.get("step_time_s")
        if waiting is None or not step:
            return None
        share = waiting / (waiting + step)
        self._starved = self._starved + 1 if share > 0.25 and waiting > 0.005 else 0
        if self._starved < _TAIL:
            return None
        return "data_starvation", f"training waits for its data for {share:.0%} of the time"

    def _slow_rank(self, record: Mapping[str, Any]) -> tuple[str, str] | None:
        busy = record.get("busy_time_s_by_rank") or []
        if len(busy) < 2:
            return None
        slowest = max(range(len(busy)), key=lambda rank: busy[rank])
        others = statistics.median(each for rank, each in enumerate(busy) if rank != slowest)
        slow = busy[slowest] > 1.5 * others and busy[slowest] > others + 0.02
        self._slow = [*self._slow, slowest if slow else -1][-2 * _TAIL :]
        if slowest == -1 or len(self._slow) < 2 * _TAIL or self._slow.count(slowest) < 2 * _TAIL:
            return None
        return "slow_rank", (
            f"rank {slowest} needs {busy[slowest]:.3g} s a step for data, forward and backward pass, the others {others:.3g} s"
        )

    def _memory(self, record: Mapping[str, Any]) -> tuple[str, str] | None:
        peak = record.get("peak_mem_gib")
        if peak is None or self._memory_gib is None or peak < 0.92 * self._memory_gib:
            return None
        return "memory", f"memory is near its limit (peak {peak:.1f} of {self._memory_gib:.1f} GiB)"

    def _dead_gradients(self, record: Mapping[str, Any]) -> tuple[str, str] | None:
        """A module whose update is what it was, to the last bit, got no gradient."""
        step = int(record["step"])
        norms = {name: float(norm) for name, norm in record.items() if name not in ("step", "event") and norm is not None}
        before, self._norms = self._norms, (step, norms)
        if before is None:
            dead = [name for name, norm in norms.items() if norm == 0.0] if step >= _TAIL else []
        else:
            dead = [name for name, norm in norms.items() if step - before[0] >= _TAIL and before[1].get(name) == norm]
        alive = {_parent(_parent(name)) for name in norms.keys() - set(dead)}
        parts: dict[str, set[str]] = {}
        for name in norms:
            parts.setdefault(_parent(_parent(name)), set()).add(_parent(name))
        judged = {layer for layer, inside in parts.items() if layer not in alive and len(inside) > 1}
        dead = [name for name in dead if _parent(name) not in self._gaps or _parent(_parent(name)) in judged]
        if not dead:
            return None
        more = f" and {len(dead) - 3} more" if len(dead) > 3 else ""
        return "dead_gradients", f"no gradient reaches {len(dead)} of {len(norms)} modules ({', '.join(dead[:3])}{more})"


def replay(records: Iterable[Mapping[str, Any]], diagnosis: Diagnosis, tell: Callable[[int, Notice], None]) -> None:
    """Feed recorded curves; `tell` gets the step of each notice as well."""
    for record in records:
        for notice in diagnosis.see(record):
            tell(record["step"], notice)


def _parent(name: str) -> str:
    """The module that a module is in."""
    return name.rpartition(".")[0]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _parts(values: Sequence[float], count: int) -> list[Sequence[float]]:
    """Cut into `count` parts of one length, oldest first; what is left over at the beginning is left out."""
    length = len(values) // count
    start = len(values) - count * length
    return [values[start + i * length : start + (i + 1) * length] for i in range(count)]


def _noise(values: Sequence[float]) -> float:
    """Standard deviation of single values around their trend."""
    return math.sqrt(_mean([(b - a) ** 2 for a, b in pairwise(values)]) / 2)
