#!/usr/bin/env python
"""What the diagnosis says of real runs: of healthy ones nothing, of runs made sick on purpose what is wrong with them.

    LORA_DIST_DATA=/path/to/data python scripts/measure_diagnosis.py OUT                  # makes the runs, about 20 s each
    LORA_DIST_DATA=/path/to/data python scripts/measure_diagnosis.py OUT --replay         # judges what is there again
    ... --record tests/golden/diagnosis.json                                              # and keeps their curves for the tests

The runs recover stories260K, pruned in several ways, on TinyStories; those held out, which the thresholds were not set on, also
wikitext2-llama on WikiText-2, with other adapters, precisions and strategies. A fault that no option brings about (a slow disk, a slow rank, a
graph that is cut) is put into the run's parts before its first step. Prints a Markdown table; exits with 1 where a healthy run was
told anything, or a sick one was not told of its sign.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dist.blocks import Pattern
from lora_dist.monitor.diagnosis import Diagnosis, Notice, replay
from lora_dist.monitor.remedies import Options

ROOT = Path(__file__).resolve().parents[1]
COMMON = {
    "adapter.target_modules": "[all-linear]", "adapter.lora_dropout": 0.0, "data.document_separator": "<|endoftext|>",
    "data.special_tokens": "bos", "data.block_size": 64, "data.holdout_windows": 64, "data.max_train_samples": 4000,
    "train.max_steps": 120, "train.per_device_train_batch_size": 8, "train.learning_rate": 3e-3, "train.lr_scheduler_type": "cosine",
    "train.warmup_steps": 10, "train.eval_steps": 15, "train.save_strategy": "no", "train.load_best_model_at_end": False,
    "train.logging_steps": 3, "train.per_device_eval_batch_size": 32,
}  # fmt: skip
STEADY = {"train.lr_scheduler_type": "constant"}


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        options: beside the common ones.
        expected: any of these signs has to be told; none of a healthy run.
        fault: put into the parts, one of `FAULTS`.
        held_out: the thresholds were not set on it.
    """

    name: str
    options: dict[str, Any]
    base: str = "0.5-matrix"
    expected: tuple[str, ...] = ()
    processes: int = 1
    fault: str | None = None
    held_out: bool = False


def healthy() -> Iterator[Run]:
    for base in ("0.3-matrix", "0.5-matrix", "0.7-matrix"):
        for rate in (1e-3, 3e-3):
            yield Run(f"sparsity {base}, rate {rate:g}", {"train.learning_rate": rate}, base)
    yield Run("pruned by row", {}, "0.2-row")
    for rank in (2, 16, 32):
        yield Run(f"rank {rank}", {"adapter.r": rank, "adapter.lora_alpha": 2 * rank})
    for seed in (1, 2, 3):
        yield Run(f"seed {seed}", {"train.seed": seed})
    yield Run("constant rate", STEADY)
    yield Run("linear rate, no warm-up", {"train.lr_scheduler_type": "linear", "train.warmup_steps": 0})
    yield Run("batch 2", {"train.per_device_train_batch_size": 2})
    yield Run(
        "batch 1, a line every 10 steps",
        {"train.per_device_train_batch_size": 1, "train.logging_steps": 10, "train.max_steps": 300},
    )
    yield Run("batch 2, accumulated 4", {"train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 4})
    yield Run("every step a line", {"train.logging_steps": 1})
    yield Run("q and v only", {"adapter.target_modules": "[q_proj,v_proj]"})
    yield Run("plain LoRA", {"adapter.mask": "none"})
    yield Run("dropout 0.1", {"adapter.lora_dropout": 0.1})
    yield Run("bfloat16", {"train.bf16": True})
    yield Run("300 steps", {"train.max_steps": 300, "train.eval_steps": 50})
    for strategy in ("ddp", "fsdp2", "zero2"):
        options = {"parallel.strategy": strategy, "train.per_device_train_batch_size": 4, "train.max_steps": 75}
        yield Run(f"{strategy} on two processes", options, processes=2)


def held_out() -> Iterator[Run]:
    """Healthy as well, made after the thresholds were set."""
    wikitext = {
        "data.document_separator": "null", "data.special_tokens": "auto", "data.block_size": 128, "train.per_device_train_batch_size": 4,
        "train.bf16": True,
    }  # fmt: skip
    for rate in (3e-4, 1e-3, 3e-3):
        yield Run(f"wikitext2-llama, rate {rate:g}", {**wikitext, "train.learning_rate": rate}, "wikitext", held_out=True)
    yield Run("wikitext2-llama, rank 32", {**wikitext, "adapter.r": 32, "adapter.lora_alpha": 64}, "wikitext", held_out=True)
    packed = {**wikitext, "train.gradient_checkpointing": True, "train.logging_steps": 5, "train.warmup_steps": 30}
    yield Run("wikitext2-llama, checkpointed, long warm-up", packed, "wikitext", held_out=True)
    yield Run("seed 4, rate 5e-4", {"train.seed": 4, "train.learning_rate": 5e-4}, held_out=True)
    yield Run("DoRA", {"adapter.type": "dora"}, held_out=True)
    yield Run("principal factors", {"adapter.init_lora_weights": "pissa", "train.learning_rate": 1e-3}, held_out=True)
    yield Run("NF4", {"model.load_in_4bit": True}, held_out=True)
    yield Run("rsLoRA, rank 16", {"adapter.use_rslora": True, "adapter.r": 16, "train.learning_rate": 1e-3}, held_out=True)
    for strategy in ("zero1", "zero3"):
        options = {"parallel.strategy": strategy, "train.per_device_train_batch_size": 4, "train.max_steps": 75}
        yield Run(f"{strategy} on two processes", options, processes=2, held_out=True)


def sick() -> Iterator[Run]:
    for rate in (1e-7, 1e-6):
        yield Run(f"rate {rate:g}", {"train.learning_rate": rate, **STEADY}, expected=("no_fall", "slow"))
    for rate in (1e-5, 3e-5):
        yield Run(f"rate {rate:g}", {"train.learning_rate": rate, **STEADY}, expected=("slow", "no_fall"))
    small = {
        "adapter.r": 1,
        "adapter.lora_alpha": 2,
        "adapter.target_modules": "[q_proj]",
        "train.max_steps": 400,
        "train.eval_steps": 50,
    }
    yield Run("rank 1 on q only, 400 steps", {**small, "train.learning_rate": 1e-2, **STEADY}, expected=("plateau",))
    for rate in (0.1, 0.2):
        yield Run(f"rate {rate:g}", {"train.learning_rate": rate, **STEADY}, expected=("oscillation", "divergence"))
    yield Run(
        "rate 1, no clipping",
        {"train.learning_rate": 1.0, "train.max_grad_norm": 0, **STEADY},
        expected=("divergence", "oscillation"),
    )
    ramp = {"train.learning_rate": 0.3, "train.warmup_steps": 120}
    yield Run("a rate that grows to 0.3", ramp, expected=("divergence", "oscillation"))
    few = {"data.max_train_samples": 24, "train.learning_rate": 1e-2, "adapter.r": 32, "adapter.lora_alpha": 64, **STEADY}
    yield Run("24 windows, many epochs", {**few, "train.max_steps": 200}, expected=("overfitting",))
    yield Run("8 windows, many epochs", {**few, "data.max_train_samples": 8}, expected=("overfitting",))
    yield Run("slow loader", {"train.max_steps": 60}, expected=("data_starvation",), fault="slow_loader")
    two = {"train.per_device_train_batch_size": 4, "train.max_steps": 75}
    yield Run("slow rank", two, expected=("slow_rank",), processes=2, fault="slow_rank")
    yield Run("graph cut below layer 3", {"train.max_steps": 60}, expected=("dead_gradients",), fault="cut_graph")


# Faults


class _SlowLoader:
    """A loader whose disk takes its time."""

    def __init__(self, loader: Any):
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def steps_from(self, cursor: int) -> Iterator[Any]:
        for batch in self._loader.steps_from(cursor):
            time.sleep(0.5)
            yield batch


def slow_loader(parts: Any) -> None:
    parts.loader = _SlowLoader(parts.loader)


def slow_rank(parts: Any) -> None:
    if parts.world.rank == 1:
        parts.strategy.module.register_forward_pre_hook(lambda module, args: time.sleep(0.2))


def cut_graph(parts: Any) -> None:
    layer = parts.base.model.model.layers[3]
    layer.register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))


FAULTS = {"slow_loader": slow_loader, "slow_rank": slow_rank, "cut_graph": cut_graph}


def train_here(fault: str | None, argv: list[str]) -> int:
    """`lora-dist train argv`, in this process, with a fault in its parts."""
    from lora_dist.cli.options import parse
    from lora_dist.cli.train import VERB, joined
    from lora_dist.config import RunConfig
    from lora_dist.engine.train import train

    config = parse(RunConfig, argv, VERB)
    with joined(config) as world:
        return train(config, world, look=FAULTS[fault] if fault is not None else lambda parts: None)


# Making and judging


def bases(data: Path, out: Path) -> None:
    for name in ("0.3-matrix", "0.5-matrix", "0.7-matrix", "0.2-row"):
        sparsity, how = name.split("-")
        folder = out / "bases" / name
        if not folder.exists():
            argv = [f"--sparsity={sparsity}", f"--select={how}", f"--calibration={texts(data)}", "--nsamples=32", "--block=16"]
            _call([sys.executable, "-m", "lora_dist", "prune", f"{data}/stories260K", str(folder), *argv, *SEPARATE])
    folder = out / "bases" / "wikitext"
    if not folder.exists():
        argv = ["--sparsity=0.5", f"--calibration={data}/wikitext-2/train.txt", "--nsamples=32", "--block=16"]
        _call([sys.executable, "-m", "lora_dist", "prune", f"{data}/wikitext2-llama", str(folder), *argv])


SEPARATE = ("--document_separator=<|endoftext|>", "--special_tokens=bos")


def texts(data: Path) -> str:
    return ",".join(f"{data}/tinystories/{name}" for name in ("tinystories_10k.txt", "tinystories_sample.txt"))


def _call(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode != 0:
        print(f"ended with {done.returncode}: {' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}", file=sys.stderr)


def folder_of(run: Run, out: Path) -> Path:
    return out / "runs" / "".join(c if c.isalnum() or c in ".-" else "_" for c in run.name)


def make(run: Run, data: Path, out: Path) -> None:
    folder = folder_of(run, out)
    if (folder / "status.json").exists():
        return
    text = f"{data}/wikitext-2/train.txt" if run.base == "wikitext" else texts(data)
    options = {
        **COMMON, "model.name_or_path": out / "bases" / run.base, "data.dataset_name": text, "data.cache_dir": out / "cache",
        "train.output_dir": folder, **run.options,
    }  # fmt: skip
    argv = [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in options.items()]
    print(f"{time.strftime('%H:%M:%S')} {run.name}", flush=True)
    if run.processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(run.processes)]
        _call([sys.executable, *launcher, str(Path(__file__).resolve()), "--train", run.fault or "", *argv])
        return
    log = out / "console.log"
    with log.open("a") as handle, contextlib.redirect_stdout(handle), contextlib.redirect_stderr(handle):
        try:
            train_here(run.fault, argv)
        except ValueError as error:  # a loss that is not finite ends the run, and that is told
            print(error)


def judge(runs: list[Run], out: Path, record: Path | None) -> int:
    """Replay every run's records; the exit code."""
    wrong, kept = 0, []
    print("| run | told at step | what |\n|---|---|---|")
    for run in runs:
        folder = folder_of(run, out)
        if not (folder / "metrics.jsonl").exists():
            print(f"| {run.name} | | was not made |")
            wrong += 1
            continue
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        curve = [slim(each) for each in records if each["event"] in ("train", "eval", "adapter_norms")]
        options = options_of(run)
        norms = [each for each in curve if each["event"] == "adapter_norms"]
        curve = [each for each in curve if each["event"] != "adapter_norms" or each in norms[:2]]
        gaps = Pattern.load(out / "bases" / run.base).with_gaps()
        told: list[tuple[int, Notice]] = []
        replay(curve, Diagnosis(Options(**options), gaps=gaps), lambda step, notice, told=told: told.append((step, notice)))
        signs = {notice.sign for _, notice in told}
        right = bool(signs & set(run.expected)) if run.expected else not signs
        wrong += not right
        for step, notice in told:
            print(f"| {run.name} | {step} | **{notice.sign}** {notice.text} |")
        if not told or not right:
            expected = f", expected {' or '.join(run.expected)}" if not right and run.expected else ""
            print(f"| {run.name} | | nothing{expected} |" if not told else f"| {run.name} | | WRONG{expected} |")
        kept.append({"name": run.name, "expected": run.expected, "options": options, "gaps": gaps, "records": curve})
    if record is not None:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text("[\n" + ",\n".join(json.dumps(each, separators=(",", ":")) for each in kept) + "\n]\n")
    fresh = sum(run.held_out for run in runs)
    print(
        f"{len(runs)} runs, {sum(not run.expected for run in runs)} of them healthy ({fresh} held out); {wrong} not as expected"
    )
    return int(wrong > 0)


KEPT = (
    "step",
    "event",
    "loss",
    "learning_rate",
    "eval_loss",
    "data_time_s",
    "step_time_s",
    "busy_time_s_by_rank",
    "peak_mem_gib",
)


def slim(record: dict[str, Any]) -> dict[str, Any]:
    """What the diagnosis looks at; norms with all their digits, since it asks whether they are the same."""
    if record["event"] == "adapter_norms":
        return record
    values = {key: record[key] for key in KEPT if key in record}
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in values.items()}


def options_of(run: Run) -> dict[str, Any]:
    """As `engine/telemetry.py` takes them from the configuration."""
    found = {**COMMON, **run.options}
    return {
        "learning_rate": found["train.learning_rate"], "r": found.get("adapter.r", 8), "lora_dropout": found["adapter.lora_dropout"],
        "micro_batch": found["train.per_device_train_batch_size"], "accumulation": found.get("train.gradient_accumulation_steps", 1),
        "num_train_epochs": 1.0, "max_steps": found["train.max_steps"], "total_steps": found["train.max_steps"],
        "warmup_steps": found["train.warmup_steps"], "max_grad_norm": found.get("train.max_grad_norm", 1.0),
        "dataloader_num_workers": 0, "block_size": found["data.block_size"], "gradient_checkpointing": False,
        "max_train_samples": found["data.max_train_samples"], "early_stopping_patience": None,
        "target_modules": found["adapter.target_modules"].strip("[]").split(","),
    }  # fmt: skip


def main() -> int:
    if sys.argv[1:2] == ["--train"]:
        return train_here(sys.argv[2] or None, sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--replay", action="store_true", help="make no run, judge those that are there")
    parser.add_argument("--record", type=Path, help="write the curves to this file")
    args = parser.parse_args()
    data, out = Path(os.environ["LORA_DIST_DATA"]), args.out.resolve()
    runs = [*healthy(), *held_out(), *sick()]
    if not args.replay:
        bases(data, out)
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            done = [pool.submit(make, run, data, out) for run in sorted(runs, key=lambda run: run.processes)]
            for each in done:
                each.result()
    return judge(runs, out, args.record)


if __name__ == "__main__":
    raise SystemExit(main())
