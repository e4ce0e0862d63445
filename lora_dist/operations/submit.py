"""A training run as a Slurm job: its folder, its script, and queueing it.

The job folder holds all that the job reads of its configuration, so that a later edit of the YAML file or of the launch scripts does
not change a job that waits in the queue: the whole configuration as YAML, the scripts of `launch/`, DeepSpeed's JSON and the sweep's list.
Beside it, for the record: code revision with uncommitted changes, and the versions of all packages. Called by `cli/submit.py`.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lora_dist.arguments import SubmitArgs
from lora_dist.log import UserError

TASK = "{task}"
SCRIPTS = ("slurm.sbatch", "common.sh", "torchrun.sh")
MAX_DIFF_BYTES = 2**20
_PACKAGE = Path(__file__).resolve().parents[1]
_GIT_TIMEOUT_S = 30

Config = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Job:
    """A job that has been written."""

    folder: Path
    script: Path
    output: str
    """where Slurm puts the console of all attempts, with Slurm's %-names"""
    run_folder: str
    """with {task} for an array"""


def folder_problems(config: Config, args: SubmitArgs) -> Iterator[str]:
    """What a job that goes on by itself cannot have, one line each."""
    train = config["train"]
    array = args.array is not None or args.sweep is not None
    if array and TASK not in train["output_dir"]:
        yield f"train.output_dir: found {train['output_dir']} with an array, expected {TASK} in it: a run folder for each task"
    if not array:
        for key, value in _with_task(config):
            yield f"{key}: found {value} without an array, expected no {TASK} in it"
    if train["overwrite_output_dir"]:
        yield "train.overwrite_output_dir: found true, expected false: the job goes on with what its run folder holds after each requeue"
    if train["resume_from_checkpoint"] not in (None, "auto"):
        yield f"train.resume_from_checkpoint: found {train['resume_from_checkpoint']}, expected auto: the newest after each requeue"


def read_sweep(file: Path) -> list[list[str]]:
    """Each line's options.

    Raises:
        UserError: no such file, an empty line, or quotes that do not close.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"sweep: {file} cannot be read ({error.strerror})") from error
    words, problems = [], []
    for number, line in enumerate(lines, start=1):
        try:
            words.append(shlex.split(line))
        except ValueError as error:
            problems.append(f"sweep: line {number} of {file}: {error}")
            continue
        if not words[-1]:
            problems.append(f"sweep: line {number} of {file} is empty, expected options of one task on each line")
    if problems or not lines:
        raise UserError(problems or f"sweep: {file} is empty, expected options of one task on each line")
    return words


def write_job(args: SubmitArgs, config: Config, *, python: str, directory: Path, tasks: int | None, argv: Sequence[str]) -> Job:
    """Write a job's folder into the run folder (an array's: beside its tasks', with `array` for {task}).

    Args:
        config: all options of `lora-dist train`, section by section.
        python: the interpreter that runs it, on all nodes.
        directory: the caller's, where relative paths begin.
        tasks: lines of `args.sweep`.
        argv: the command line, for the record.

    Raises:
        UserError: the folder cannot be written, or the launch scripts are not there.
    """
    scripts = _scripts()
    run_folder = str(config["train"]["output_dir"])
    base = directory / run_folder.replace(TASK, "array") / "jobs"
    try:
        folder = _new_folder(base)
        for script in scripts:
            Path(shutil.copy(script, folder / script.name)).chmod(0o755)
        (folder / "config.yaml").write_text(yaml.safe_dump(_own_files(config, folder, directory), sort_keys=False))
        (folder / "versions.txt").write_text("".join(f"{line}\n" for line in _versions()))
        (folder / "code.json").write_text(json.dumps(_code(folder), indent=1) + "\n")
        (folder / "submit.json").write_text(json.dumps({"argv": list(argv), "directory": str(directory)}, indent=1) + "\n")
        sweep = None
        if args.sweep is not None:
            sweep = Path(shutil.copy(directory / args.sweep, folder / "sweep.txt"))
        array = args.array or (f"1-{tasks}" if tasks else None)
        output = str(folder / ("slurm-%A_%a.out" if array else "slurm-%j.out"))
        lines = [
            "#!/usr/bin/env bash",
            "# Written by lora-dist submit. To queue it again: sbatch and this file; it goes on from the newest checkpoint.",
            *(f"#SBATCH {line}" for line in _directives(args, run_folder, array, output, directory)),
            *(f"export {name}={shlex.quote(value)}" for name, value in _variables(args, python, folder, sweep).items()),
            shlex.join(["exec", "bash", str(folder / "slurm.sbatch"), "train", "--config", str(folder / "config.yaml")])
            + "".join(f" {shlex.quote(f'--{key}={value}')}" for key, value in _with_task(config)),
        ]
        (folder / "job.sbatch").write_text("\n".join(lines) + "\n")
    except OSError as error:
        raise UserError(f"train.output_dir: {base} cannot be written ({error}); choose another folder or free space") from error
    return Job(folder, folder / "job.sbatch", output, run_folder)


def queue(job: Job) -> str:
    """Hand the job to Slurm; its number.

    Raises:
        UserError: there is no sbatch, or it refuses; what it said.
    """
    if shutil.which("sbatch") is None:
        raise UserError(f"sbatch: found no such command, expected a machine of a Slurm cluster; the job is written: {job.script}")
    done = subprocess.run(["sbatch", "--parsable", str(job.script)], capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError([line for line in done.stderr.splitlines() if line] or [f"sbatch: exit {done.returncode}"])
    number = done.stdout.strip().partition(";")[0]
    (job.folder / "job_id").write_text(number + "\n")
    return number


def describe(job: Job, number: str, *, array: bool) -> list[str]:
    """What to know of a job, and the commands that follow, one line each."""
    name = f"{number}_N" if array else number
    output = job.output.replace("%A", number).replace("%a", "N").replace("%j", number)
    run_folder = job.run_folder.replace(TASK, "N")
    return [
        f"job {number} is queued; its folder: {job.folder}" + ("; N stands for a task's number" if array else ""),
        f"  console   {run_folder}/attempts/slurm-{name}-R.out of attempt R = 0, 1, ...; all of them: {output}",
        f"  state     squeue --job={number}; cat {run_folder}/status.json",
        f"  watch     tail -F {output}",
        f"  give way  scancel --batch --signal=USR1 {name}    (saves, and is queued again)",
        f"  cancel    scancel {name}    (saves, and ends)",
        f"  go on     sbatch {job.script}",
    ]


def _scripts() -> list[Path]:
    for folder in (_PACKAGE.parent / "launch", _PACKAGE / "operations" / "launch"):
        if all((folder / name).is_file() for name in SCRIPTS):
            return [folder / name for name in SCRIPTS]
    raise UserError(f"lora-dist submit: found no launch/slurm.sbatch beside {_PACKAGE}, expected a checkout or a whole package")


def _new_folder(base: Path) -> Path:
    stamp, n = datetime.datetime.now().strftime("%Y%m%d-%H%M%S"), 1
    base.mkdir(parents=True, exist_ok=True)
    while True:
        folder = base / (stamp if n == 1 else f"{stamp}-{n}")
        try:
            folder.mkdir()
            return folder.resolve()
        except FileExistsError:
            n += 1


def _own_files(config: Config, folder: Path, directory: Path) -> dict[str, dict[str, Any]]:
    """The configuration with a copy of DeepSpeed's file in place of the file."""
    values = {section: dict(content) for section, content in config.items()}
    named = values["parallel"].get("ds_config")
    if named and (directory / named).is_file():
        values["parallel"]["ds_config"] = str(shutil.copy(directory / named, folder / "ds_config.json"))
    return values


def _with_task(config: Config) -> list[tuple[str, str]]:
    """Options whose value has {task} in it; they go onto the command line, where the script fills it in."""
    return [
        (f"{section}.{key}", value)
        for section, content in config.items()
        for key, value in content.items()
        if isinstance(value, str) and TASK in value
    ]


def _processes(args: SubmitArgs) -> int:
    """On each node."""
    return args.ntasks_per_node or args.gpus_per_node or 1


def _directives(args: SubmitArgs, run_folder: str, array: str | None, output: str, directory: Path) -> Iterator[str]:
    yield f"--job-name={args.job_name or re.sub(r'[^A-Za-z0-9_.-]', '-', Path(run_folder).name)}"
    yield f"--nodes={args.nodes}"
    processes, cpus = _processes(args), args.cpus_per_task
    if "-" in args.nodes:
        # With --ntasks-per-node Slurm takes the least number of nodes; with --ntasks as many as there are, and waits for all of them unless
        # tasks may share. So: one task stands for a node.
        yield f"--ntasks={args.nodes.partition('-')[2]}"
        yield "--overcommit"
        cpus = processes * (cpus or 1)
    else:
        yield f"--ntasks-per-node={processes}"
    if cpus is not None:
        yield f"--cpus-per-task={cpus}"
    for key in ("gpus_per_node", "mem", "time", "partition", "account", "qos"):
        value = getattr(args, key)
        if value is not None:
            yield f"--{key.replace('_', '-')}={value}"
    if array is not None:
        yield f"--array={array}"
    yield f"--chdir={shlex.quote(str(directory))}"
    yield f"--output={shlex.quote(output)}"
    yield "--open-mode=append"
    yield f"--signal=B:USR1@{args.signal_s}"
    yield "--requeue" if args.requeue else "--no-requeue"
    if args.sbatch_args:
        yield args.sbatch_args


def _variables(args: SubmitArgs, python: str, folder: Path, sweep: Path | None) -> dict[str, str]:
    """What the copied script is told; of the caller's environment, Slurm hands on the rest."""
    return {
        "PYTHON": python,
        "LAUNCHER": args.launcher,
        "NPROC": str(_processes(args)),
        "LAUNCH_DIR": str(folder),
        "MAX_REQUEUES": str(args.max_requeues if args.requeue else 0),
        **({"SWEEP": str(sweep)} if sweep is not None else {}),
    }


def _versions() -> list[str]:
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return [f"{name}=={version}" for name, version in sorted(found.items(), key=lambda item: item[0].lower())]


def _code(folder: Path) -> dict[str, Any]:
    """Revision of the checkout that the package runs from, and whether it has changes; the changes themselves go into code.diff."""
    revision = _git("rev-parse", "HEAD") if (_PACKAGE.parent / ".git").exists() else None
    if revision is None:
        return {"revision": None, "dirty": None, "untracked": []}
    changes = _git("status", "--porcelain", "--", ".") or ""
    diff = _git("diff", "HEAD", "--binary", "--", ".") or ""
    if diff and len(diff.encode()) <= MAX_DIFF_BYTES:
        (folder / "code.diff").write_text(diff)
    untracked = re.findall(r"^\?\? (.*)$", changes, flags=re.MULTILINE)
    return {"revision": revision.strip(), "dirty": bool(changes), "untracked": untracked}


def _git(*argv: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(_PACKAGE), *argv], capture_output=True, text=True, timeout=_GIT_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
