#!/usr/bin/env python
"""`make demo`: the whole way from a dense model to a recovered, merged one, on two processes, with nothing from anywhere.

A small Llama is trained on the English text that every Python carries, half of its 16x16 tiles are pruned, block-masked LoRA
brings it back under torchrun, and the adapter is merged with every pruned tile still exactly zero. Ends with one table.
Running it again reuses what is done; `--fresh` moves it aside first. Each step prints the command that does the same by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
SEPARATOR = "<|endoftext|>"
CONTEXT = 256


def say(text: str = "") -> None:
    print(text, flush=True)


def step(folder: Path, name: str, settings: list[str], work: Callable[[], None]) -> float:
    """Do `work` unless a stamp says that it was done with the same settings; seconds it took, then or now."""
    stamp = folder / f".{name}.done"
    if stamp.exists():
        done = json.loads(stamp.read_text())
        if done["settings"] == settings:
            say(f"▶ {name}: done before ({done['seconds']:.0f} s), reused")
            return float(done["seconds"])
    say(f"▶ {name}")
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    stamp.write_text(json.dumps({"settings": settings, "seconds": seconds}))
    say(f"  {name} took {seconds:.0f} s\n")
    return seconds


def command(argv: list[str], **env: str) -> None:
    """Run a command, showing it and its output; ends the demo if it fails."""
    shown = [Path(argv[0]).name, *argv[1:]]
    say("  $ " + " ".join(shlex.quote(a) for a in shown))
    done = subprocess.run(argv, env={**os.environ, **env}, check=False)
    if done.returncode != 0:
        raise SystemExit(f"demo: the command above failed (exit {done.returncode})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to work in (default out/demo)")
    parser.add_argument("--processes", type=int, default=2, help="training processes (default 2)")
    parser.add_argument("--steps", type=int, default=120, help="recovery steps (default 120)")
    parser.add_argument(
        "--dense_steps", type=int, default=None, help="training steps of the dense model (default: the tiny model's own)"
    )
    parser.add_argument("--fresh", action="store_true", help="move an earlier demo aside and start anew")
    args = parser.parse_args()
    out: Path = args.out
    if args.fresh and out.exists():
        aside = out.with_name(f"{out.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
        out.rename(aside)
        say(f"moved the earlier demo to {aside}")
    out.mkdir(parents=True, exist_ok=True)
    say(f"lora_dist demo in {out}: make a small model, prune half of it, bring it back on {args.processes} processes, merge.\n")
    seconds = run_steps(args, out)
    figures = evaluate_all(out)
    table(args, out, figures, seconds)
    report(out)
    return 0


def run_steps(args: argparse.Namespace, out: Path) -> dict[str, float]:
    """The four steps; seconds of each."""
    python, module = sys.executable, [sys.executable, "-m", "lora_dist"]
    dense, pruned, run, merged = (out / name for name in ("dense", "pruned", "recovered", "merged"))
    make = [python, str(SCRIPTS / "tiny_model.py"), str(dense)]
    if args.dense_steps:
        make += ["--steps", str(args.dense_steps)]
    prune = [
        *module, "prune", str(dense), str(pruned), "--sparsity", "0.5", "--block", "16", "--score", "wanda", "--nsamples", "64",
        "--seqlen", str(CONTEXT), "--calibration", str(dense / "train.txt"), "--document_separator", SEPARATOR, "--special_tokens", "both",
    ]  # fmt: skip
    launcher = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.processes), "-m", "lora_dist"]
    threads = max(1, (os.cpu_count() or 1) // args.processes)
    accumulation = max(1, 4 // args.processes)
    train = [
        *(launcher if args.processes > 1 else module), "train", "--model.name_or_path", str(pruned), "--adapter.mask", "block",
        "--adapter.r", "16", "--adapter.lora_alpha", "32", "--adapter.lora_dropout", "0", "--adapter.target_modules", "all-linear",
        "--data.dataset_name", str(dense / "train.txt"), "--data.validation_file", str(dense / "valid.txt"),
        "--data.document_separator", SEPARATOR, "--data.special_tokens", "both", "--data.block_size", str(CONTEXT),
        "--data.cache_dir", str(out / "cache"),
        "--train.output_dir", str(run), "--train.max_steps", str(args.steps), "--train.per_device_train_batch_size", "4",
        "--train.gradient_accumulation_steps", str(accumulation), "--train.learning_rate", "3e-3", "--train.lr_scheduler_type", "cosine",
        "--train.warmup_steps", "10", "--train.eval_steps", "60", "--train.save_steps", "60", "--resume", "auto",
    ]  # fmt: skip
    merge = [*module, "merge", str(pruned), str(run), str(merged)]
    seconds = {"dense": step(out, "train a dense model", make, lambda: command(make))}

    def again(folder: Path) -> None:
        """A step that is done anew (other settings, or cut off) must find its place free."""
        if folder.exists():
            folder.rename(folder.with_name(f"{folder.name}.old-{time.strftime('%Y%m%d-%H%M%S')}"))

    def prune_step() -> None:
        again(pruned)
        command(prune)

    def train_step() -> None:
        """Goes on where an interrupted demo stopped, if it was the same one."""
        begun, settings = out / ".recovery.begun", shlex.join([*make, *prune, *train])
        if not begun.exists() or begun.read_text() != settings:
            again(run)
            begun.write_text(settings)
        command(train, OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="PASSIVE")

    def merge_step() -> None:
        again(merged)
        command(merge)

    seconds["prune"] = step(out, "prune half of its 16x16 tiles", make + prune, prune_step)
    seconds["train"] = step(out, "recover it with block-masked LoRA", make + prune + train, train_step)
    seconds["merge"] = step(out, "merge", make + prune + train + merge, merge_step)
    return seconds


def evaluate_all(out: Path) -> dict[str, float]:
    """Perplexity of the four models on the held-out test text, in one process; kept in figures.json."""
    file = out / "figures.json"
    if file.exists() and file.stat().st_mtime > (out / ".merge.done").stat().st_mtime:
        return json.loads(file.read_text())
    from lora_dist.arguments import EvalArgs
    from lora_dist.engine.evaluate import evaluate
    from lora_dist.parallel import World

    say("▶ evaluate all four on text that none has seen")
    figures = {}
    pruned = str(out / "pruned")
    for name, model, adapter in (
        ("dense", str(out / "dense"), None),
        ("pruned", pruned, None),
        ("adapter", pruned, str(out / "recovered")),
        ("merged", str(out / "merged"), None),
    ):
        arguments = EvalArgs(
            model=model, adapter=adapter, dataset_name=str(out / "dense" / "test.txt"), document_separator=SEPARATOR, special_tokens="both",
            block_size=CONTEXT, cache_dir=str(out / "cache"),
        )  # fmt: skip
        figures[name] = evaluate(arguments, World(), lambda batches: lambda: None).result.perplexity
        say(f"  {name}: perplexity {figures[name]:.2f}")
    file.write_text(json.dumps(figures, indent=1))
    return figures


def report(out: Path) -> None:
    """The recovery as an HTML page, with the four perplexities in it."""
    argv = [
        sys.executable, "-m", "lora_dist", "report", str(out / "recovered"), "--output", str(out / "report.html"), "--evaluation",
        str(out / "figures.json"), "--title", "Recovery of a pruned model", "--bands", "[]",
    ]  # fmt: skip
    say()
    command(argv)


def table(args: argparse.Namespace, out: Path, figures: dict[str, float], seconds: dict[str, float]) -> None:
    """The one table."""
    from lora_dist.blocks import Pattern
    from lora_dist.engine.pattern import base_pattern
    from lora_dist.models.loading import load_base

    pattern = Pattern.load(out / "pruned")
    merged = load_base(str(out / "merged"), progress=False)
    found = base_pattern(merged.model, None, block=16)  # from the written weights, not from the stored mask
    assert found.pattern is not None
    violations = sum(bool((mask.kept_PQ != found.pattern[name].kept_PQ).any()) for name, mask in pattern.items())
    report: dict[str, Any] = json.loads((out / "merged" / "merge.json").read_text())
    rates = [
        r["tokens_per_s"] for line in (out / "recovered" / "metrics.jsonl").open() if (r := json.loads(line))["event"] == "train"
    ]
    rate = sorted(rates)[len(rates) // 2] if rates else float("nan")
    kept = "kept" if not violations else f"changed in {violations} layers"
    rows = [
        ("dense model", figures["dense"], "-", f"{seconds['dense']:.0f} s", out / "dense"),
        (f"pruned, {pattern.sparsity:.0%} of its tiles", figures["pruned"], "made", f"{seconds['prune']:.0f} s", out / "pruned"),
        ("+ block-masked LoRA", figures["adapter"], "kept", f"{seconds['train']:.0f} s", out / "recovered"),
        ("merged", figures["merged"], kept, f"{seconds['merge']:.0f} s", out / "merged"),
    ]
    say()
    say(f"{'':<28}{'perplexity':>11}  {'pattern':<9}{'time':>7}  where")
    say("-" * 84)
    for name, perplexity, state, took, where in rows:
        say(f"{name:<28}{perplexity:>11.2f}  {state:<9}{took:>7}  {where}")
    say("-" * 84)
    say(
        f"{report['zero_tiles']:,} pruned tiles are exactly 0.0 in the merged model; "
        f"merged logits differ from the adapter's by {report['logits_error']:.0e}."
    )
    say(
        f"Recovery ran on {args.processes} processes at {rate:,.0f} tokens/s. Whole demo: {sum(seconds.values()) / 60:.1f} minutes."
    )
    say(f"Curves: {out / 'recovered' / 'metrics.jsonl'}; console: {out / 'recovered' / 'train.log'}")
    say("""
The same with a real model (8 GPUs, Llama-2-7B, WikiText-2):

  lora-dist prune meta-llama/Llama-2-7b-hf out/pruned --sparsity 0.5 --block 16 --calibration c4 --dtype bfloat16
  torchrun --nproc_per_node 8 -m lora_dist train --model.name_or_path out/pruned --data.dataset_name wikitext \\
      --train.output_dir out/recovered --train.bf16 --train.gradient_checkpointing --train.learning_rate 1e-4
  lora-dist merge out/pruned out/recovered out/merged""")


if __name__ == "__main__":
    sys.exit(main())
