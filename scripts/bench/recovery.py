#!/usr/bin/env python
"""How much of a pruned model comes back: sparsity x what is done before training x what is trained x steps, by the project's own commands.

    LORA_DIST_DATA=/path/to/data python scripts/bench/recovery.py out/recovery                       # docs/recovery.md (hours on 2 cores)
    LORA_DIST_DATA=/path/to/data python scripts/bench/recovery.py out/recovery --only stories --sparsity 0.5
    LORA_DIST_DATA=/path/to/data python scripts/bench/recovery.py out/recovery --methods lora-r8 distil-r32 --steps 200 400 --nproc 2
    python scripts/bench/recovery.py out/recovery --list                                             # what there is, and what is done

Every row is prune (once per base), train, merge and an evaluation of the merged model, in which every pruned tile was proven zero. Set-up:
`configs/stories260k.yaml` and `configs/wikitext2_llama.yaml`, as `scripts/measure.py` has them. What is finished is kept (OUT/results.json,
and the run folders), so a run that is ended goes on; a training goes on from its checkpoint. Writes OUT/recovery.md and OUT/recovery.png.

recovery = (ln ppl_pruned - ln ppl) / (ln ppl_pruned - ln ppl_dense), where `pruned` is the base without reconstruction that tiles were
chosen for by wanda, per matrix: so rows of one model and sparsity compare.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import ROOT, Measurement, data_folder, subjects

Results = dict[str, dict[str, Any]]

CONFIGS = {"stories": "stories260k.yaml", "wikitext": "wikitext2_llama.yaml"}
STEPS = {"stories": 300, "wikitext": 200}
FULL_RATE = {"stories": 3e-3, "wikitext": 1e-3}
"""learning rate of sparse full fine-tuning; adapters train at that of the configurations, 3e-3"""
WINDOWS = 16
"""a step, whatever the number of processes"""
BASES: dict[str, tuple[str, ...]] = {
    "wanda": (),
    "solved": ("--score=energy", "--reconstruct", "--target=same"),
    "obs": ("--score=obs", "--reconstruct"),
}
"""how tiles are chosen, and whether what is left is solved for: options of lora-dist prune"""
DISTIL = ("--train.distill_from={dense}",)
METHODS: dict[str, tuple[str, ...] | None] = {
    "none": None,
    "lora-r8": (),
    "lora-r32": ("--adapter.r=32", "--adapter.lora_alpha=64"),
    "lora-r64": ("--adapter.r=64", "--adapter.lora_alpha=128"),
    "distil-r8": DISTIL,
    "distil-r32": ("--adapter.r=32", "--adapter.lora_alpha=64", *DISTIL),
    "distil-r64": ("--adapter.r=64", "--adapter.lora_alpha=128", *DISTIL),
    "sparse-full": ("--train.mode=sparse_full", "--train.learning_rate={full_rate}"),
    "sparse-full-distil": ("--train.mode=sparse_full", "--train.learning_rate={full_rate}", *DISTIL),
}
"""what is trained: options of lora-dist train; None: nothing"""


@dataclass(frozen=True)
class Row:
    """One cell of the grid."""

    subject: str
    sparsity: float
    base: str
    method: str
    steps: int

    @property
    def name(self) -> str:
        return f"{self.subject}-{self.sparsity:.0%}-{self.base}-{self.method}-{self.steps}".replace("%", "")


class Bench:
    """Makes what is missing, and keeps figures by row."""

    def __init__(self, out: Path, nproc: int, quick: bool, fp32: bool = False):
        self.out, self.nproc, self.quick, self.fp32 = out, nproc, quick, fp32
        self.file = out / "results.json"
        self.results: Results = json.loads(self.file.read_text()) if self.file.exists() else {}

    def keep(self, name: str, figures: dict[str, Any]) -> None:
        self.results[name] = figures
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.results, indent=1))
        partial.replace(self.file)

    def measurement(self, subject: str) -> Measurement:
        folder = self.out / subject
        folder.mkdir(parents=True, exist_ok=True)
        found = subjects(data_folder("recovery"))[subject]
        if self.fp32:
            found = replace(
                found, evaluation=tuple(o for o in found.evaluation if o != "--dtype=bfloat16") + ("--dtype=float32",)
            )
        return Measurement(found, ROOT / "configs" / CONFIGS[subject], folder, [])

    def dense(self, subject: str) -> float:
        m = self.measurement(subject)
        return m.perplexity("dense", m.subject.model)

    def base(self, m: Measurement, row: Row) -> Path:
        folder = m.out / f"pruned-{row.sparsity:.0%}-{row.base}".replace("%", "")
        if not folder.exists():
            m.command(
                "prune", m.subject.model, str(folder), f"--sparsity={row.sparsity}", "--nsamples=128", f"--seqlen={m.subject.context}",
                f"--calibration={m.subject.text}", *m.subject.data, *BASES[row.base],
            )  # fmt: skip
        return folder

    def train(self, m: Measurement, row: Row, base: Path) -> Path:
        run = m.out / row.name
        if not (run / "adapter_model.safetensors").exists():
            options = [
                option.format(dense=m.subject.model, full_rate=FULL_RATE[row.subject]) for option in METHODS[row.method] or ()
            ]
            m.command(
                "train", "--config", str(m.config), f"--model.name_or_path={base}", f"--data.dataset_name={m.subject.text}",
                f"--train.output_dir={run}", f"--train.per_device_train_batch_size={WINDOWS // self.nproc}", f"--train.max_steps={row.steps}",
                *(["--train.warmup_steps=1"] if self.quick else []),
                *(["--train.bf16=false", "--model.dtype=float32"] if self.fp32 else []), *options, "--resume=auto", processes=self.nproc,
            )  # fmt: skip
        return run

    def measure(self, row: Row) -> dict[str, Any]:
        """The figures of a row, from the results or by the commands."""
        if row.name in self.results:
            return self.results[row.name]
        m = self.measurement(row.subject)
        base = self.base(m, row)
        figures: dict[str, Any] = {"perplexity": m.perplexity(base.name, base), "parameters": 0, "tokens": 0}
        if METHODS[row.method] is not None:
            run = self.train(m, row, base)
            merged = m.merged(base, run, "")
            figures = {
                "perplexity": m.perplexity(merged.name, merged),
                "zero_tiles": json.loads((merged / "merge.json").read_text())["zero_tiles"],
                "parameters": parameters(run),
                "tokens": row.steps * WINDOWS * m.subject.context,
                "curve": curve(run),
            }
        self.keep(row.name, figures)
        return figures


def parameters(run: Path) -> int:
    """Numbers that were trained: those of the adapter's file."""
    from safetensors import safe_open

    with safe_open(str(run / "adapter_model.safetensors"), framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def curve(run: Path) -> list[tuple[int, float]]:
    """(step, perplexity) of the evaluations while it trained."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["perplexity"]) for r in records if r.get("event") == "eval"]


def recovery(figure: float, pruned: float, dense: float) -> float:
    """Share of the loss in log-perplexity that came back."""
    return (math.log(pruned) - math.log(figure)) / (math.log(pruned) - math.log(dense))


def rows_of(args: argparse.Namespace) -> list[Row]:
    """The grid, plain pruning first, because recovery is counted from it."""
    found = []
    for subject, sparsity in product(args.only, args.sparsity):
        found.append(Row(subject, sparsity, "wanda", "none", 0))
        for base, method in product(args.bases, args.methods):
            for steps in (args.steps or [STEPS[subject]]) if METHODS[method] is not None else [0]:
                found.append(Row(subject, sparsity, base, method, steps))
    return list(dict.fromkeys(found))


def table(rows: list[Row], bench: Bench) -> str:
    """Markdown: a line for each row that has figures."""
    lines = [
        "| model | pruned | before | trained | steps | parameters trained | perplexity, merged | recovery |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        figures = bench.results.get(row.name)
        pruned = bench.results.get(Row(row.subject, row.sparsity, "wanda", "none", 0).name)
        if figures is None or pruned is None:
            continue
        share = recovery(figures["perplexity"], pruned["perplexity"], bench.dense(row.subject))
        trained = f"{figures['parameters']:,}" if figures["parameters"] else ""
        lines.append(
            f"| {row.subject} | {row.sparsity:.0%} | {row.base} | {row.method} | {row.steps or ''} | {trained} "
            f"| {figures['perplexity']:.2f} | {share:.1%} |"
        )
    return "\n".join(lines)


def picture(rows: list[Row], bench: Bench, file: Path) -> None:
    """Recovery against tokens, and against what is trained, a row of charts a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if bench.results.get(row.name, {}).get("curve")]
    names = list(dict.fromkeys((row.subject, row.sparsity) for row in shown))
    if not names:
        return
    figure, axes = plt.subplots(len(names), 2, figsize=(11, 3.6 * len(names)), squeeze=False, sharey="row")
    for (subject, sparsity), (left, right) in zip(names, axes, strict=True):
        dense = bench.dense(subject)
        pruned = bench.results[Row(subject, sparsity, "wanda", "none", 0).name]["perplexity"]
        for number, row in enumerate(r for r in shown if (r.subject, r.sparsity) == (subject, sparsity)):
            figures, colour = bench.results[row.name], plt.get_cmap("tab20")(number % 20)
            label = f"{row.base}, {row.method}" + ("" if row.steps == STEPS[subject] else f", {row.steps} steps")
            tokens = [step * figures["tokens"] / row.steps for step, _ in figures["curve"]]
            shares = [100 * recovery(value, pruned, dense) for _, value in figures["curve"]]
            left.plot(tokens, shares, marker=".", color=colour, label=label)
            right.plot(figures["parameters"], 100 * recovery(figures["perplexity"], pruned, dense), "o", color=colour)
        left.set_title(f"{subject}, {sparsity:.0%} of the tiles pruned", fontsize=10)
        left.set_xlabel("tokens trained on")
        left.set_ylabel("recovery, %")
        left.legend(fontsize=6, loc="lower right")
        right.set_xlabel("parameters trained")
        right.set_xscale("log")
        for axis in (left, right):
            axis.set_ylim(top=102)
            axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to work in")
    parser.add_argument("--only", nargs="+", choices=list(CONFIGS), default=list(CONFIGS), help="models (default: all)")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.3, 0.2], help="shares of the tiles to prune")
    parser.add_argument("--bases", nargs="+", choices=list(BASES), default=list(BASES), help="how they are pruned (default: all)")
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="what is trained (default: all)"
    )
    parser.add_argument("--steps", nargs="+", type=int, help="optimizer steps (default: 300 for stories, 200 for wikitext)")
    parser.add_argument("--nproc", type=int, default=1, help="training processes; the step's 16 windows are shared among them")
    parser.add_argument(
        "--fp32",
        action="store_true",
        help="compute in float32, for CPUs whose bf16 is slow; in a folder of its own, as figures differ a little",
    )
    parser.add_argument("--quick", action="store_true", help="a warm-up of one step, for --steps 2: to see that everything works")
    parser.add_argument("--list", action="store_true", help="only show the rows, and which are done")
    args = parser.parse_args()
    if WINDOWS % args.nproc:
        parser.error(f"--nproc: found {args.nproc}, expected a divisor of {WINDOWS}")
    bench, rows = Bench(args.out.resolve(), args.nproc, args.quick, args.fp32), rows_of(args)
    if args.list:
        print("\n".join(f"{'done ' if row.name in bench.results else '     '}{row.name}" for row in rows))
        return 0
    for number, row in enumerate(rows, 1):
        figures = bench.measure(row)
        print(f"[{number}/{len(rows)}] {row.name}: perplexity {figures['perplexity']:.2f}", flush=True)
        (bench.out / "recovery.md").write_text(table(rows, bench) + "\n", encoding="utf-8")
    picture(rows, bench, bench.out / "recovery.png")
    print(f"\n{table(rows, bench)}\n\nWritten: {bench.out / 'recovery.md'}, {bench.out / 'recovery.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
