"""What happened to a run, in order: starts, resumes, saves, skips, rollbacks, warnings and how it ended. Called by `monitor/report.py` and
`monitor/watch.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lora_dist.monitor.runs import Record, Run, is_number

ALARMING = ("warning", "skip", "rollback", "save failed", "failed", "hung", "post-mortem")
MARKED = ("resumed", "skip", "rollback")
"""kinds that break a curve, drawn into it"""


@dataclass(frozen=True)
class Event:
    """One thing that happened; `step` is the optimizer step it happened after."""

    step: int
    kind: str
    text: str
    time: str = ""
    """UTC, where it is recorded"""

    @property
    def alarming(self) -> bool:
        return self.kind in ALARMING


def events_of(run: Run) -> list[Event]:
    """All events as they happened: attempt by attempt, within each its start, what came up by step, and how it ended. A killed attempt got
    further than the checkpoint that the next one goes on from, so steps alone do not order them."""
    during = [*_from_records(run), *_post_mortems(run), *_from_log(run)]
    placed = [(_attempt_of(run, event), 1, event.step, event) for event in during]
    placed += [(number, 0, event.step, event) for number, event in enumerate(_starts(run))]
    placed += [(number, 2, event.step, event) for number, event in _ends(run)]
    return [event for *_, event in sorted(placed, key=lambda each: each[:3])]


def _attempt_of(run: Run, event: Event) -> int:
    """Place in `run.attempts`: by the time where the event has one, else the last attempt that went on from before its step, as records of
    those before it behind that step are taken out."""
    started = [readable_time(attempt.get("started")) for attempt in run.attempts]
    if event.time and all(started):
        before = [time <= event.time for time in started]
    else:
        before = [(attempt.get("first_step") or 0) < event.step for attempt in run.attempts]
    return max((number for number, each in enumerate(before) if each), default=0)


def readable_time(value: Any) -> str:
    """2026-11-23 08:03:25 UTC; empty where it cannot be read."""
    try:
        return f"{datetime.fromisoformat(str(value)):%Y-%m-%d %H:%M:%S} UTC"
    except ValueError:
        return ""


def seconds_between(start: Any, end: Any) -> float | None:
    try:
        return (datetime.fromisoformat(str(end)) - datetime.fromisoformat(str(start))).total_seconds()
    except (ValueError, TypeError):  # not recorded, or one with and one without a zone
        return None


def _starts(run: Run) -> Iterator[Event]:
    for attempt in run.attempts:
        step, processes = int(attempt.get("first_step") or 0), attempt.get("processes")
        kind = "resumed" if step else "started"
        text = f"attempt {attempt.get('attempt')} on {attempt.get('host', 'an unknown host')}"
        if is_number(processes):
            text += f", {processes} process{'es' if processes != 1 else ''}"
        if step:
            text += f", from checkpoint-{step}"
        yield Event(step, kind, text, readable_time(attempt.get("started")))


def _ends(run: Run) -> Iterator[tuple[int, Event]]:
    """With the attempt's place in `run.attempts`."""
    for number, attempt in enumerate(run.attempts):
        state, reason = str(attempt.get("state")), attempt.get("reason")
        if state == "running":
            continue
        step = attempt.get("last_step")
        text = f"attempt {attempt.get('attempt')}" + (f": {reason}" if reason else "")
        yield number, Event(int(step) if is_number(step) else run.step, state, text, readable_time(attempt.get("ended")))


def _from_records(run: Run) -> Iterator[Event]:
    for record in run.records:
        event, step = record["event"], record["step"]
        if event == "warning":
            yield Event(step, "warning", str(record.get("text") or record.get("sign") or "without a text"))
        elif event == "skip":
            yield Event(step, "skip", f"batch left out ({_count(record, 'skipped_batches')} so far)")
        elif event == "rollback":
            text = f"from step {_count(record, 'from_step')} back to step {step} ({_count(record, 'rollbacks')} so far)"
            yield Event(step, "rollback", text)
        elif event == "save_failed":
            text = f"checkpoint-{_count(record, 'failed_step')}, {_count(record, 'failed_in_a_row')} in a row"
            yield Event(step, "save failed", text)
        elif event == "save":
            took = record.get("save_time_s")
            text = f"checkpoint-{record.get('saved_step', step)}" + (f" in {took:.2g} s" if is_number(took) else "")
            saved = record.get("saved_step")
            yield Event(int(saved) if is_number(saved) else step, "saved", text)


def _count(record: Record, key: str) -> str:
    return f"{record[key]:.0f}" if is_number(record.get(key)) else "?"


def _post_mortems(run: Run) -> Iterator[Event]:
    for name, content in run.post_mortems.items():
        if is_number(content.get("step")):
            done = content.get("done")
            text = f"{content.get('found', 'a step that was not taken')}" + (f"; done: {done}" if done else "")
            yield Event(int(content["step"]) - 1, "post-mortem", f"{text} ({name})", readable_time(content.get("time")))


def _from_log(run: Run) -> Iterator[Event]:
    """Warnings of the console that are not told by a record or a post-mortem already."""
    told = {str(record.get("text")) for record in run.of("warning")}
    found = [str(content.get("found")) for content in run.post_mortems.values()]
    for step, text in run.log_warnings:
        if text not in told and not any(text.startswith(each) for each in found) and not _save_failure(run, text):
            yield Event(step, "warning", text)


def _save_failure(run: Run, text: str) -> bool:
    return any(text.startswith(f"checkpoint-{_count(r, 'failed_step')} was not saved") for r in run.of("save_failed"))
