"""The command `lora-dist VERB ...`: a table of verbs, each a module that is imported only when it is called."""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_dist.process import end_with_parent

VERBS = {
    "prune": "zero the least important tiles of a model",
    "train": "train a LoRA that keeps the pruned tiles zero; resume, evaluate, save",
    "distill-cache": "compute once what the dense model predicts of a run's data, for train.distill_cache",
    "eval": "perplexity, zero-shot accuracy, speed and memory of a model or several, with or without adapters",
    "report": "one run or several as an HTML page with curves, pattern and events",
    "watch": "follow a run in the terminal: curves, rates, time left, warnings",
    "merge": "add an adapter to its base, every pruned tile still exactly zero",
    "export": "write a model, merged with an adapter, as ONNX, its logits and zeros checked",
    "adapters": "keep several adapters of one base in a folder: list, add, switch, merge-weighted, delete",
    "convert": "turn a pickled model into a directory, without running what is in it",
    "generate": "continue a prompt",
    "classify": "label texts with a classifier",
    "push": "upload an adapter or a model to the Hugging Face Hub, with a model card",
    "recipe": "prune, train, merge and evaluate in stages, by one YAML, resumable at any of them",
    "plan": "will a run fit, how fast, and how is it started: from its configuration alone",
    "submit": "check a training run and queue it under Slurm, to be requeued until it is complete",
    "rendezvous": "hold the meeting point of an elastic run, outside of its machines",
    "doctor": "examine this machine before a run: versions, GPUs, disk, network, collectives, strategies; with remedies",
    "inspect": "show a model's or adapter's pattern, layer by layer, and what is wrong with it",
}


def _usage() -> str:
    rows = "\n".join(f"  {name:<15}{text}" for name, text in VERBS.items())
    return f"usage: lora-dist VERB ...   (lora-dist VERB --help for its options)\n\nverbs:\n{rows}\n\n  --version"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Exit codes: 0 done, 1 failed, 2 bad input (one line a problem on stderr), 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and "LOCAL_RANK" in os.environ and arguments[0].replace("-", "_").startswith("__local_rank="):
        del arguments[0]  # DeepSpeed's launcher puts it before everything else
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("lora_dist"))
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        import difflib

        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f", did you mean {near[0]}?" if near else f", expected one of {', '.join(VERBS)}"
        print(f"lora-dist: unknown verb {verb}{hint}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"lora_dist.cli.{verb.replace('-', '_')}")
    return run_reporting(f"lora-dist {verb}", lambda: module.main(rest))


def end_with_launcher() -> None:
    """Have the kernel end this worker when its launcher dies: one killed by SIGKILL cannot end its workers, which would then go on
    writing, or wait for a dead store. Before any heavy import, so that none is missed. Linux only."""
    if "LOCAL_RANK" not in os.environ or sys.platform != "linux":
        return
    end_with_parent()
    # One that was killed before this line sends no signal: its worker has become a child of init, unless it was init itself.
    if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() == 1 and b"python" not in Path("/proc/1/cmdline").read_bytes():
        raise SystemExit("lora-dist: torchrun has died before this worker began")


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0  # without torch, so that bad input is answered at once


def join_slurm_step() -> None:
    """Under plain `srun`, set the rank variables that launchers set. Elsewhere nothing is imported."""
    if "SLURM_STEP_ID" in os.environ and "RANK" not in os.environ:
        from lora_dist.parallel.slurm import adopt_step

        adopt_step()


def run_reporting(name: str, work: Callable[[], int]) -> int:
    """Run a command's work; a `UserError` becomes one line a problem on stderr, from rank 0 only."""
    from lora_dist.log import UserError

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a sign shows "?" instead of ending the run
    try:
        join_slurm_step()
        end_with_launcher()
        return work()
    except UserError as error:
        if _is_main_process():
            for problem in error.problems:
                print(f"{name}: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if _is_main_process():
            print(f"{name}: interrupted; a run goes on from its last checkpoint with --resume auto", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
