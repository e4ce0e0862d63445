"""A run in the terminal: where it is, how fast, how long still, its curves and what went wrong; with rich. Called by `cli/watch.py`.

Only the run's files are read, so it works over ssh, on a copy that still grows, and beside a run on other machines.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from lora_dist.monitor.braille import plot
from lora_dist.monitor.console import clock, perplexity_text, short_rate
from lora_dist.monitor.events import events_of
from lora_dist.monitor.liveness import ENDED, quiet, recent, stamps
from lora_dist.monitor.runs import Point, Run, is_number, read_run
from lora_dist.state import METRICS

_WIDE = 100
"""characters from which two curves stand side by side"""
_GPU_EVERY_S, _GPU_TIMEOUT_S = 5.0, 5.0
_COLOURS = {"completed": "green", "running": "cyan", "stopped": "yellow", "failed": "red", "hung": "red", "unknown": "yellow"}


def watch(path: Path, console: Console, *, once: bool, interval_s: float) -> str:
    """Show a run until it ends; its last state.

    Args:
        once: show it once, and do not wait.

    Raises:
        UserError: no run is there, or it is gone.
        KeyboardInterrupt: Ctrl-C, with the terminal as it was.
    """
    run = read_run(path)
    gpus = Gpus()
    if not once and run.state not in ENDED:
        seen = _stamp(path)
        with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
            while run.state not in ENDED:
                live.update(view(run, console, gpu_lines=gpus.lines(run), height=console.height - 1), refresh=True)
                time.sleep(interval_s)
                if (now := _stamp(path)) != seen:
                    run, seen = read_run(path), now
    console.print(view(run, console, gpu_lines=gpus.lines(run) if run.state not in ENDED else []))
    return run.state


def picture(path: Path, *, width: int = 100) -> str:
    """What `watch` shows of a run, as SVG of so many characters a line, in colours and without the fonts that rich would fetch.

    Raises:
        UserError: no run is there.
    """
    run = read_run(path)
    console = Console(record=True, file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), width=width)
    console.print(view(run, console))
    return re.sub(r"@font-face \{.*?\}", "", console.export_svg(title=run.name), flags=re.S)


def _stamp(path: Path) -> list[tuple[int, int] | None]:
    """Changes with the files that a view is made from."""
    return [(stat.st_mtime_ns, stat.st_size) if stat is not None else None for stat in stamps(path)]


def view(run: Run, console: Console, *, gpu_lines: list[str] | None = None, height: int | None = None) -> RenderableType:
    """One picture of a run, no wider than the console.

    Args:
        height: lines there is room for; None: as many as it takes.
    """
    width = min(console.width, 160)
    unicode = (console.encoding or "").lower().startswith("utf")
    parts: list[RenderableType] = [*_head(run, width, unicode)]
    below: list[RenderableType] = [Text(line, style="dim") for line in gpu_lines or []]
    below += list(_news(run, 5 if height is None or height > 24 else 2, cut=height is not None))
    curves = _curves(run)
    side_by_side = width >= _WIDE and len(curves) > 1
    rows = 8
    if height is not None:
        left = height - _lines(console, parts, width) - _lines(console, below, width)
        rows = min(14, left // (1 if side_by_side else max(1, len(curves))) - 1)
    if rows >= 4 and width >= 24:
        each = width // 2 - 2 if side_by_side else width
        drawn = [_titled(title, points, log, each, rows, unicode) for title, points, log in curves]
        parts += [Columns(drawn, padding=(0, 2))] if side_by_side else drawn
    return Group(*parts, *below)


def _lines(console: Console, parts: list[RenderableType], width: int) -> int:
    return sum(len(console.render_lines(part, console.options.update(width=width))) for part in parts)


def _head(run: Run, width: int, unicode: bool) -> Iterator[RenderableType]:
    """State, progress, and the figures of now."""
    colour = _COLOURS.get(run.state, "yellow")
    total, step = run.total_steps, run.step
    title = Text.assemble((run.name, "bold"), "  ", (run.state, f"bold {colour}"), f"  step {step:,}")
    if total:
        title.append(f" of {total:,} ({step / total:.0%})")
    yield title
    if run.status.get("reason") and run.state != "running":
        yield Text(str(run.status["reason"]), style=colour)
    if total:
        done = min(width, width * step // total)
        thick, thin = ("━", "─") if unicode else ("=", "-")
        yield Text.assemble((thick * done, colour), (thin * (width - done), "dim"))
    yield from _packed([Text.assemble((f"{name} ", "dim"), value) for name, value in _figures(run)], width)
    quiet_s = quiet(run)
    if quiet_s is not None:
        yield Text(f"no sign of life for {clock(quiet_s)}: killed, hanging, or a copy that does not grow", style="bold yellow")


def _packed(items: Sequence[Text], width: int) -> Iterator[Text]:
    """As many on a line as fit, none broken."""
    line: list[Text] = []
    for item in items:
        if line and sum(each.cell_len + 2 for each in line) + item.cell_len > width:
            yield Text("  ").join(line)
            line = []
        line.append(item)
    if line:
        yield Text("  ").join(line)


def _figures(run: Run) -> Iterator[tuple[str, str]]:
    for name, key in (("loss", "loss"), ("eval loss", "eval_loss")):
        events = ("train",) if key == "loss" else ("eval", "final")
        if not run.is_finite(key, *events):
            yield name, "not finite"
        elif points := run.series(key, *events):
            yield name, f"{points[-1][1]:.4f}"
    for name in run.figures:
        if not run.is_finite(name, "eval", "final"):
            yield name, "not finite"
            continue
        first, last = (run.series(name, "eval", "final")[i][1] for i in (0, -1))
        text = perplexity_text if name == "perplexity" else "{:.4f}".format
        yield name, f"{text(last)} (from {text(first)})" if first != last else text(last)
    if rates := run.series("learning_rate"):
        yield "rate", short_rate(rates[-1][1])
    if speeds := recent(run.series("tokens_per_s")):
        yield "tokens/s", f"{statistics.median(speeds):,.0f}"
    if mfu := recent(run.series("mfu")):
        yield "MFU", f"{statistics.median(mfu):.1%}"
    if times := recent(run.series("step_time_s")):
        yield "step", f"{statistics.median(times):.3g} s"
    if peaks := run.series("peak_mem_gib"):
        yield "memory", f"{peaks[-1][1]:.3g} GiB"
    left_s = time_left(run)
    if left_s is not None and run.state not in ENDED:
        yield "left", f"~{clock(left_s)}"


def time_left(run: Run) -> float | None:
    """Seconds until the last step: the median of recent steps, and the evaluations still to come as long as the last; None: not known."""
    times = recent(run.series("step_time_s"))
    if run.total_steps is None or not times:
        return None
    left_s = max(0, run.total_steps - run.step) * statistics.median(times)
    evaluations, every = run.series("eval_runtime_s", "eval"), run.setting("train.eval_steps")
    if evaluations and is_number(every) and every >= 1 and run.setting("train.eval_strategy") in (None, "steps"):
        left_s += (run.total_steps // every - run.step // every) * evaluations[-1][1]
    return left_s


def _curves(run: Run) -> list[tuple[str, list[Point], bool]]:
    """Title, points and whether by logarithm: train loss, and the first figure of the evaluations, else their loss."""
    found = [("train loss", run.series("loss"), False)]
    figure = next(iter(run.figures), "eval_loss")
    points = run.series(figure, "eval")
    values = [value for _, value in points]
    log = figure == "perplexity" and bool(values) and max(values) > 10 * min(values) > 0
    found.append((figure.replace("eval_", "evaluation ") + (" (log)" if log else ""), points, log))
    return [each for each in found if len(each[1]) > 1]


def _titled(title: str, points: list[Point], log: bool, width: int, height: int, unicode: bool) -> RenderableType:
    lines = plot(points, width=width, height=height - 1, log=log, unicode=unicode)
    return Group(Text(title, style="bold"), *(Text(line, style="cyan", no_wrap=True, overflow="crop") for line in lines))


def _news(run: Run, most: int, *, cut: bool) -> Iterator[RenderableType]:
    """The last things worth a word, a line each if `cut`, and what is missing of the run's own files."""
    reason = run.status.get("reason") or "none"  # is told above
    events = [
        event for event in events_of(run) if (event.alarming or event.kind == "resumed") and not event.text.endswith(reason)
    ]
    for event in events[-most:]:
        text = Text(no_wrap=cut, overflow="ellipsis")
        text.append(f"step {event.step:,} {event.kind}: ", "bold yellow" if event.alarming else "bold")
        yield text.append(event.text)
    if len(events) > most:
        yield Text(f"and {len(events) - most} earlier", style="dim")
    for gap in run.gaps:
        if METRICS in gap:  # the rest is for the report
            yield Text(gap, style="yellow")


class Gpus:
    """What nvidia-smi says of this machine's GPUs, asked now and then."""

    def __init__(self) -> None:
        self._command = shutil.which("nvidia-smi")
        self._asked_s, self._lines = float("-inf"), list[str]()

    def lines(self, run: Run) -> list[str]:
        """One line a GPU; none where there are none, or the run is at work on another machine."""
        host = run.attempts[-1].get("host") if run.attempts else None
        if self._command is None or host not in (None, socket.gethostname()):
            return []
        if time.monotonic() - self._asked_s > _GPU_EVERY_S:
            self._asked_s, self._lines = time.monotonic(), self._ask(self._command)
        return self._lines

    @staticmethod
    def _ask(command: str) -> list[str]:
        query = "index,name,utilization.gpu,memory.used,memory.total,power.draw"
        try:
            done = subprocess.run(
                [command, f"--query-gpu={query}", "--format=csv,noheader,nounits"],
                capture_output=True, text=True, timeout=_GPU_TIMEOUT_S, check=True,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            return [f"GPUs: nvidia-smi failed ({type(error).__name__})"]
        return gpu_lines(done.stdout)


def gpu_lines(answer: str) -> list[str]:
    """nvidia-smi's CSV as lines to show; what a GPU does not tell is left as it says it ([N/A])."""
    lines = []
    for row in csv.reader(answer.splitlines(), skipinitialspace=True):
        if len(row) == 6:
            index, name, used_percent, used_mib, total_mib, watts = row
            memory = (
                f"{int(used_mib) / 1024:.1f} of {int(total_mib) / 1024:.1f} GiB"
                if used_mib.isdigit() and total_mib.isdigit()
                else used_mib
            )
            lines.append(f"GPU {index} {name}: {used_percent}% busy, {memory}, {watts.split('.')[0]} W")
    return lines
