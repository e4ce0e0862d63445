"""Zero-shot accuracy through lm-eval, on its own hub data or on local files, quietly and over all processes.

    acc          share of the questions whose right answer has the highest log-probability
    acc_norm     the same with the log-probability divided by the answer's length in characters

Both with lm-eval's standard error. Any task of lm-eval, or YAML file of a task, may be named; those in `TASKS` also take local files
(`tasks/*.yaml`). Called by `engine/report.py`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dist.data.choices import file_sha256, question_file
from lora_dist.data.files import EXTENSIONS
from lora_dist.data.hub import require_reachable
from lora_dist.evaluation.together import say, together
from lora_dist.log import UserError
from lora_dist.parallel import World

TASKS = {
    "boolq": "super_glue", "piqa": "piqa", "hellaswag": "hellaswag", "winogrande": "winogrande", "arc_easy": "arc",
    "arc_challenge": "arc", "openbookqa": "openbookqa",
}  # fmt: skip
"""the tasks of the published tables, and where lm-eval keeps them"""
LOCAL_TASKS = Path(__file__).parent / "tasks"
FEWSHOT_SEED = 1234
"""lm-eval's default"""
_NOISE = (
    "Custom kwargs can be passed",
    "Overwriting default num_fewshot",
    "`pretrained` model kwarg is not of type",
    "Passed an already-initialized model",
)
_MAX_WARNINGS = 10

Progress = Callable[[int, str], Callable[[], None]]


@dataclass(frozen=True)
class ZeroShotArgs:
    """What is asked, and how."""

    tasks: tuple[str, ...]
    task_data: str | None = None
    """folder of local files; None: the hub"""
    limit: int | None = None
    """questions of each task at most"""
    num_fewshot: int = 0
    batch_size: int = 8
    context: int = 2048


def require_lm_eval() -> None:
    """Raises:
    UserError: lm-eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("zeroshot: found no lm-eval, expected it installed: pip install 'lora-dist[evaluation]'")


def zero_shot(
    model: Any, tokenizer: Any, args: ZeroShotArgs, *, world: World, sharded: bool = False, progress: Progress
) -> dict[str, Any]:
    """Collective. Accuracy of every task, their mean, and how they were obtained; a task that fails has an `error` instead.

    Args:
        sharded: every forward pass is a collective.
        progress: given the number of batches and the task, returns what to call after each.

    Raises:
        UserError: lm-eval is not installed.
    """
    together(world, require_lm_eval)
    from lora_dist.evaluation.harness import WorldLM

    current = [""]
    stderr = sys.stderr

    def batches(count: int) -> Callable[[], None]:
        with contextlib.redirect_stderr(stderr):  # out of the quiet that lm-eval is kept in
            return progress(count, current[0])

    notes: list[str] = []
    with _quiet(notes):
        lm = WorldLM(
            model, tokenizer, world=world, batch_size=args.batch_size, context=args.context, sharded=sharded, progress=batches
        )
    tasks: dict[str, Any] = {}
    for name in args.tasks:
        current[0] = name
        try:
            tasks[name] = _run_task(lm, name, args, world, notes)
        except Exception as error:  # the hub, a file, a task's own code: the other tasks go on
            tasks[name] = {"error": say(error)}
    return {
        "tasks": tasks,
        **means(tasks),
        "num_fewshot": args.num_fewshot,
        "limit": args.limit,
        "context": args.context,
        "batch_size": args.batch_size,
        "lm_eval": importlib.metadata.version("lm_eval"),
        **({"warnings": notes[:_MAX_WARNINGS]} if notes else {}),
    }


def means(tasks: Mapping[str, Any]) -> dict[str, float | None]:
    """Over the tasks: of acc, and of acc_norm (acc where a task has no acc_norm). None unless every task has a figure."""

    def mean(*metrics: str) -> float | None:
        values = [next((task[m] for m in metrics if m in task), None) for task in tasks.values()]
        found = [value for value in values if value is not None]
        return sum(found) / len(found) if found and len(found) == len(values) else None

    return {"mean_acc": mean("acc"), "mean_acc_norm": mean("acc_norm", "acc")}


def _run_task(lm: Any, name: str, args: ZeroShotArgs, world: World, notes: list[str]) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    start, lm.truncated, lm.failed_on_all = time.perf_counter(), 0, False
    with _quiet(notes):
        loaded = together(world, lambda: _load(name, args))
        assert loaded is not None
        with _unseen_bars(notes):
            outcome = _evaluated(lm, world, lambda: evaluate(lm=lm, task_dict=loaded, limit=args.limit, log_samples=False))
    results = outcome["results"]
    figures = _plain(results[_own_name(name, args) if _own_name(name, args) in results else next(iter(results))])
    asked = [counts["effective"] for counts in outcome["n-samples"].values()]
    report = {**figures, "questions": sum(asked), "truncated": lm.truncated, **_source(name, args, outcome)}
    if len(results) > 1:
        report["subtasks"] = {task: _plain(values) for task, values in results.items()}
    return {**report, "runtime_s": time.perf_counter() - start}


def _evaluated(lm: Any, world: World, evaluate: Callable[[], Any]) -> Any:
    """Collective: a task that fails on one process outside of the model (its questions, its metrics) fails on all.

    Such a process comes to the question here, while the others may still ask theirs within the model: the two meet.
    """
    outcome, problem = None, None
    try:
        outcome = evaluate()
    except Exception as error:
        if lm.failed_on_all:
            raise
        problem = error

    def result() -> Any:
        if problem is not None:
            raise problem
        return outcome

    return together(world, result)


def _own_name(name: str, args: ZeroShotArgs) -> str:
    return f"local_{name}" if _is_local(name, args) else name


def _is_local(name: str, args: ZeroShotArgs) -> bool:
    return args.task_data is not None and name in TASKS


def _load(name: str, args: ZeroShotArgs) -> Any:
    import lm_eval.tasks

    own = Path(lm_eval.tasks.__file__).parent
    if _is_local(name, args):
        question_file(args.task_data or "", name)
        folders, metadata = [LOCAL_TASKS], {"task_data": args.task_data}
    else:  # reading all of lm-eval's definitions takes ten seconds: those of a known task lie in one folder
        folders, metadata = [own / TASKS[name]] if name in TASKS and (own / TASKS[name]).is_dir() else [], {}
    is_file = name.endswith((".yaml", ".yml"))
    manager = lm_eval.tasks.TaskManager(
        include_defaults=not folders and not is_file, include_path=[str(folder) for folder in folders] or None, metadata=metadata
    )
    entry = manager.task_index.get(name)
    if name in TASKS and not _is_local(name, args) and entry is not None and entry.cfg:
        _require_reachable(str(entry.cfg["dataset_path"]))
    try:
        loaded = manager.load([_own_name(name, args)])
    except KeyError as error:
        expected = f"a task of lm-eval or a YAML file, such as {', '.join(TASKS)}"
        raise UserError(f"tasks: found {name}, expected {expected}") from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") != 0:  # as lm-eval's `--num_fewshot`: a task that is made for none keeps to it
            task.set_config(key="num_fewshot", value=args.num_fewshot)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def _require_reachable(repo: str) -> None:
    """Where the hub cannot be reached, `datasets` would try for half a minute before it says so less clearly."""
    try:
        require_reachable(repo)
    except UserError as error:
        names = {
            "data.dataset_name: found no local file or directory": "task_data: found none, nor the data set",
            f"set data.dataset_name to local files ({EXTENSIONS}) or a directory": "set task_data to a folder of local files",
        }
        raise error.renamed(names) from error


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """`acc,none` -> `acc`; a metric of another filter keeps its name."""
    plain = {}
    for key, value in values.items():
        if isinstance(value, int | float) and "," in key:
            plain[key.removesuffix(",none")] = float(value)
    return plain


def _source(name: str, args: ZeroShotArgs, outcome: Mapping[str, Any]) -> dict[str, Any]:
    """Where the questions came from, and whose prompts they were put in."""
    if not _is_local(name, args):
        config = next(iter(outcome["configs"].values()))
        data = "/".join(str(part) for part in (config.get("dataset_path"), config.get("dataset_name")) if part)
        return {"data": data, "prompt": "lm-eval's own", "version": next(iter(outcome["versions"].values()))}
    path = question_file(args.task_data or "", name)
    note = "; its hub data puts the article's title before the passage" if name == "boolq" else ""
    return {"data": path.name, "data_sha256": file_sha256(path), "prompt": f"as lm-eval's own{note}"}


# --- quiet ----------------------------------------------------------------------------------------------------------------


class _Collector(logging.Handler):
    def __init__(self, notes: list[str]):
        super().__init__(logging.WARNING)
        self._notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        _note(self._notes, record.getMessage())


def _note(notes: list[str], text: str) -> None:
    line = " ".join(text.split())
    if line and line not in notes and not any(noise in line for noise in _NOISE):
        notes.append(line)


@contextlib.contextmanager
def _quiet(notes: list[str]) -> Iterator[None]:
    """lm-eval's warnings are collected, each once and without those that say nothing; what it tells beside them is dropped."""
    log, collector = logging.getLogger("lm_eval"), _Collector(notes)
    before = log.propagate
    log.addHandler(collector)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(collector)
        log.propagate = before


@contextlib.contextmanager
def _unseen_bars(notes: list[str]) -> Iterator[None]:
    """lm-eval's own progress bars are not shown; anything else that it writes to stderr is collected."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            yield
    finally:
        for line in shown.getvalue().replace("\r", "\n").split("\n"):
            if "it/s" not in line and "%|" not in line and "?it" not in line:
                _note(notes, line)
