#!/usr/bin/env python
"""The measured tables of the README, by the project's own commands: prune, train, evaluate, merge.

    LORA_DIST_DATA=/path/to/data python scripts/measure.py stories      # stories260K on TinyStories
    LORA_DIST_DATA=/path/to/data python scripts/measure.py wikitext     # wikitext2-llama on WikiText-2

The folder holds stories260K/, tinystories/, wikitext2-llama/ and wikitext-2/ (README names their public sources). Each row is a
run of `configs/<name>.yaml` with a few options changed; what is done is reused. Prints a Markdown table beside the figures of an
independent throw-away script, which the project's are to be compared with. `--quick` runs 2 steps, to see that everything works.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ADAPTERS = {
    "plain LoRA on q, v": ["--adapter.mask=none", "--adapter.target_modules=q_proj,v_proj"],
    "plain LoRA on all linears": ["--adapter.mask=none"],
    "block-masked LoRA on all linears": ["--adapter.mask=block"],
    "the same on two processes": ["--adapter.mask=block"],
    "block-masked LoRA, r=32, alpha=64": ["--adapter.mask=block", "--adapter.r=32", "--adapter.lora_alpha=64"],
}


@dataclass(frozen=True)
class Subject:
    """A model, its text, and what another script measured on them."""

    model: str
    text: str
    """of training, as `data.dataset_name`"""
    data: tuple[str, ...]
    """options that `prune` and `eval` share"""
    evaluation: tuple[str, ...]
    """what to evaluate on"""
    context: int
    pruned: tuple[tuple[float, str], ...]
    """(sparsity, selection) of bases that are pruned and evaluated"""
    adapters: tuple[str, ...]
    """trained on the base pruned to half"""
    reference: dict[str, tuple[float, ...]]
    """row -> perplexity, after merging, after merging and re-applying the mask"""
    through_w1: bool = False
    """train through scripts/run_lora_finetune_block.sh instead of lora-dist train"""


def subjects(data: Path, training: tuple[str, ...] = ("tinystories_10k.txt", "tinystories_sample.txt")) -> dict[str, Subject]:
    """What is measured, by name. `training`: the files that stories260K is pruned by and trained on."""
    stories = ",".join(f"{data}/tinystories/{name}" for name in training)
    separator = ("--document_separator=<|endoftext|>", "--special_tokens=bos")
    return {
        "stories": Subject(
            model=f"{data}/stories260K",
            text=stories,
            data=separator,
            evaluation=(f"--dataset_name={stories}", "--holdout_windows=200", *separator),
            context=256,
            pruned=((0.5, "matrix"), (0.2, "matrix"), (0.2, "row")),
            adapters=tuple(ADAPTERS)[:4],
            reference={
                "dense": (4.37,),
                "50% pruned, per matrix": (2339.7,),
                "plain LoRA on q, v": (47.2, 47.2, 1145.7),
                "plain LoRA on all linears": (14.0, 14.0, 55.9),
                "block-masked LoRA on all linears": (16.9, 16.9, 16.9),
                "20% pruned, per matrix": (43.0,),
                "20% pruned, per row": (8.2,),
            },
        ),
        "wikitext": Subject(
            model=f"{data}/wikitext2-llama",
            text=f"{data}/wikitext-2",
            data=(),
            evaluation=(f"--dataset_name={data}/wikitext-2", "--split=validation", "--max_samples=200", "--dtype=bfloat16"),
            context=256,
            pruned=tuple((s, how) for how in ("matrix", "row") for s in (0.2, 0.3, 0.5)),
            adapters=tuple(ADAPTERS),
            through_w1=True,
            reference={
                "dense": (38.0,),
                "20% pruned, per matrix": (53.9,),
                "30% pruned, per matrix": (76.7,),
                "50% pruned, per matrix": (411.4,),
                "20% pruned, per row": (52.0,),
                "30% pruned, per row": (64.6,),
                "50% pruned, per row": (444.5,),
                "plain LoRA on q, v": (85.1, 85.1, 102.7),
                "plain LoRA on all linears": (53.5, 53.5, 73.2),
                "block-masked LoRA on all linears": (56.3, 56.3, 56.3),
                "block-masked LoRA, r=32, alpha=64": (49.4, 49.4, 49.4),
            },
        ),
    }


class Measurement:
    """Runs the commands in one folder and reads back their figures."""

    def __init__(self, subject: Subject, config: Path, out: Path, extra: list[str]):
        self.subject, self.config, self.out, self.extra = subject, config, out, extra

    def command(self, *argv: str, processes: int = 1) -> None:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
        print(
            "$ " + (f"torchrun --nproc_per_node {processes} -m lora_dist " if torchrun else "lora-dist ") + shlex.join(argv),
            flush=True,
        )
        done = subprocess.run([sys.executable, *torchrun, "-m", "lora_dist", *argv], cwd=ROOT)
        if done.returncode != 0:
            raise SystemExit(f"measure: the command above failed (exit {done.returncode})")

    def perplexity(self, name: str, model: Path | str, adapter: Path | None = None) -> float:
        file = self.out / f"{name}.json"
        if not file.exists() or not file.stat().st_size:
            with_adapter = [] if adapter is None else [f"--adapter={adapter}"]
            self.command(
                "eval", str(model), *with_adapter, *self.subject.evaluation, f"--block_size={self.subject.context}",
                f"--output={file}", "--batch_size=16",
            )  # fmt: skip
        return float(json.loads(file.read_text())["perplexity"])

    def base(self, sparsity: float, select: str) -> Path:
        folder = self.out / f"pruned-{sparsity:.0%}-{select}".replace("%", "")
        if not folder.exists():
            self.command(
                "prune", self.subject.model, str(folder), f"--sparsity={sparsity}", f"--select={select}", "--nsamples=128",
                f"--seqlen={self.subject.context}", f"--calibration={self.subject.text}", *self.subject.data,
            )  # fmt: skip
        return folder

    def adapter(self, base: Path, name: str) -> Path:
        folder = self.out / "".join(c if c.isalnum() else "-" for c in name)
        if not (folder / "adapter_model.safetensors").exists():
            processes = 2 if "two processes" in name else 1
            if self.subject.through_w1:
                self.through_w1(base, folder, ADAPTERS[name], processes)
            else:
                self.command(
                    "train", "--config", str(self.config), f"--model.name_or_path={base}", f"--data.dataset_name={self.subject.text}",
                    f"--train.output_dir={folder}", f"--train.per_device_train_batch_size={16 // processes}", *ADAPTERS[name], *self.extra,
                    "--resume=auto", processes=processes,
                )  # fmt: skip
        return folder

    def through_w1(self, base: Path, folder: Path, adapter: list[str], processes: int) -> None:
        """The guide's script; what it has no variable for follows as options of lora-dist train."""
        variables = {
            "PRUNED_MODEL": str(base), "DATASET": self.subject.text, "OUTPUT_DIR": str(folder), "NPROC": str(processes),
            "BLOCK_SIZE": str(self.subject.context), "BATCH_SIZE": str(16 // processes), "EVAL_BATCH_SIZE": "16", "MAX_EVAL_SAMPLES": "200",
            "LEARNING_RATE": "3e-3", "LORA_TARGET_MODULES": "all-linear", "LORA_DROPOUT": "0",
        }  # fmt: skip
        argv = ["scripts/run_lora_finetune_block.sh", "--config", str(self.config), *adapter, *self.extra]
        print("$ " + " ".join(f"{k}={shlex.quote(v)}" for k, v in variables.items()) + " " + shlex.join(argv), flush=True)
        done = subprocess.run(["bash", *argv], cwd=ROOT, env={**os.environ, **variables, "PYTHON": sys.executable})
        if done.returncode != 0:
            raise SystemExit(f"measure: the command above failed (exit {done.returncode})")

    def merged(self, base: Path, adapter: Path, how: str) -> Path:
        folder = self.out / f"{adapter.name}-merged{how}"
        if not folder.exists():
            self.command("merge", str(base), str(adapter), str(folder), *([how] if how else []))
        return folder


def measure(m: Measurement) -> list[tuple[str, list[str]]]:
    """Rows of the table: name, and the project's figures as text."""
    rows = [("dense", [f"{m.perplexity('dense', m.subject.model):.2f}"])]
    for sparsity, select in m.subject.pruned:
        base = m.base(sparsity, select)
        rows.append((f"{sparsity:.0%} pruned, per {select}", [f"{m.perplexity(base.name, base):.2f}"]))
    base = m.base(0.5, "matrix")
    for name in m.subject.adapters:
        adapter = m.adapter(base, name)
        with_adapter = m.perplexity(adapter.name, base, adapter)
        if "plain" in name:
            dense = m.merged(base, adapter, "--densify")
            projected = m.merged(base, adapter, "--project")
            figures = [m.perplexity(dense.name, dense), m.perplexity(projected.name, projected)]
            rows.append((name, [f"{with_adapter:.2f}", f"{figures[0]:.2f}, pattern lost", f"{figures[1]:.2f}"]))
        else:
            merged = m.merged(base, adapter, "")
            figure = m.perplexity(merged.name, merged)
            proof = json.loads((merged / "merge.json").read_text())
            rows.append((name, [f"{with_adapter:.2f}", f"{figure:.2f}, pattern kept", f"{figure:.2f}"]))
            print(
                f"{name}: {proof['zero_tiles']:,} pruned tiles exactly 0.0; perplexity merged / adapter - 1 = {figure / with_adapter - 1:.1e}; "
                f"largest logit difference {proof['logits_error']:.1e} of the largest logit"
            )
    return rows


def data_folder(name: str) -> Path:
    """The folder of real models and texts; ends the script called `name` with exit code 2 where there is none."""
    folder = Path(os.environ.get("LORA_DIST_DATA", ROOT.parent / "shared" / "data")).resolve()
    if not folder.is_dir():
        print(
            f"{name}: found no folder {folder}, expected the real data; set LORA_DIST_DATA (README names its sources)",
            file=sys.stderr,
        )
        raise SystemExit(2)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=["stories", "wikitext"])
    parser.add_argument("--out", type=Path, help="folder to work in (default out/measure-SUBJECT)")
    parser.add_argument("--quick", action="store_true", help="2 training steps, to see that everything works")
    args = parser.parse_args()
    subject = subjects(data_folder("measure"))[args.subject]
    out = (args.out or ROOT / "out" / f"measure-{args.subject}{'-quick' if args.quick else ''}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    config = ROOT / "configs" / ("stories260k.yaml" if args.subject == "stories" else "wikitext2_llama.yaml")
    rows = measure(Measurement(subject, config, out, ["--train.max_steps=2", "--train.warmup_steps=1"] if args.quick else []))
    print("\n| | perplexity | after merging | after merging and re-applying the mask | the same by an independent script |")
    print("|---|---|---|---|---|")
    for name, figures in rows:
        theirs = " / ".join(f"{value:g}" for value in subject.reference.get(name, ()))
        print(f"| {name} | {' | '.join([*figures, '', ''][:3])} | {theirs} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
