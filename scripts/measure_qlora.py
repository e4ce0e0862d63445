#!/usr/bin/env python
"""What quantising the base costs and saves, by the project's own commands: the table of docs/quantisation.md.

    LORA_DIST_DATA=/path/to/data python scripts/measure_qlora.py            # wikitext2-llama at 50%, about 5 minutes on 2 cores
    LORA_DIST_DATA=/path/to/data python scripts/measure_qlora.py --quick    # 4 steps, to see that everything works

Prunes wikitext2-llama (in LORA_DIST_DATA) to half of its tiles, then trains the same block-masked LoRA on it held in bfloat16, in
NF4 with double quantisation and in int8, each in a process of its own, and merges. Weights are what the base's tensors take, with
scales; peak is the process's largest resident memory (Linux), which holds Python and its libraries too. Prints a Markdown table and
writes it as qlora.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"bf16": [], "NF4": ["--model.load_in_4bit"], "int8": ["--model.load_in_8bit"]}
MIB = 2**20
TRAIN = """
import json, resource, sys
from lora_dist.cli import train as verb
from lora_dist.cli.options import parse
from lora_dist.config import RunConfig
from lora_dist.engine.base import base_pieces
from lora_dist.engine.train import train
from lora_dist.parallel import init_world, close_world
found = {}
def look(parts):
    pieces = base_pieces(parts.base.model, parts.strategy.piece)
    layers = {n for n in pieces if ".layers." in n}
    size = lambda names: sum(pieces[n].tensor.numel() * pieces[n].tensor.element_size() for n in names)
    found.update(layers=size(layers), whole=size(pieces))
world = init_world(device="cpu")
code = train(parse(RunConfig, sys.argv[2:], verb.VERB), world, look=look)
close_world()
found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
open(sys.argv[1], "w").write(json.dumps(found))
sys.exit(code)
"""


def call(command: list[str]) -> None:
    """Run a command of this checkout to its end; its output is shown where it fails."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def measure(kind: str, base: Path, data: Path, out: Path, *, steps: int, batch_size: int) -> dict[str, float]:
    """Train and merge on a base held as `kind`."""
    run, merged, sizes = out / kind, out / f"{kind}-merged", out / f"{kind}.json"
    options = [
        f"--model.name_or_path={base}", f"--data.dataset_name={data / 'wikitext-2' / 'valid.txt'}", f"--data.cache_dir={out / 'cache'}",
        f"--train.output_dir={run}", "--data.block_size=256", "--data.holdout_windows=32", "--train.bf16=true",
        f"--train.max_steps={steps}", f"--train.per_device_train_batch_size={batch_size}", "--train.learning_rate=1e-3",
        "--train.eval_strategy=steps", f"--train.eval_steps={steps}", "--train.save_strategy=no", "--train.load_best_model_at_end=false",
        "--adapter.lora_dropout=0", "--parallel.device=cpu", *KINDS[kind],
    ]  # fmt: skip
    call(["-c", TRAIN, str(sizes), *options])
    call(["-m", "lora_dist", "merge", str(base), str(run), str(merged)])
    report = json.loads((merged / "merge.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row["eval_loss"] for row in records if row["event"] == "eval"]
    quantised = report["quantised"] or {}
    return {
        **json.loads(sizes.read_text()),
        "eval_loss_before": evaluations[0],
        "eval_loss": evaluations[-1],
        "zero_tiles": report["zero_tiles"],
        "logits_error": quantised.get("logits_error", report["logits_error_fp32"]),
        "logits_error_original": quantised.get("other_logits_difference", 0.0),
    }


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    lines = [
        "| base in | decoder layers MiB | all weights MiB | peak of the process MiB | eval loss before | after | zero tiles after merging "
        "| merged against trained, logits | against the stored weights, logits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, row in rows.items():
        lines.append(
            f"| {kind} | {row['layers'] / MIB:.2f} | {row['whole'] / MIB:.2f} | {row['peak'] / MIB:.0f} | {row['eval_loss_before']:.4f} "
            f"| {row['eval_loss']:.4f} | {row['zero_tiles']:,.0f} | {row['logits_error']:.1e} | {row['logits_error_original']:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", default="out/qlora", help="folder for runs and qlora.json; made anew by name, nothing is removed"
    )
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of each run")
    parser.add_argument("--quick", action="store_true", help="4 steps")
    args = parser.parse_args()
    data, out = Path(os.environ["LORA_DIST_DATA"]).resolve(), Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    base = out / "pruned"
    if not base.exists():
        call(["-m", "lora_dist", "prune", str(data / "wikitext2-llama"), str(base), "--score=magnitude", "--sparsity=0.5"])
    steps = 4 if args.quick else args.steps
    rows = {kind: measure(kind, base, data, out, steps=steps, batch_size=2 if args.quick else 8) for kind in KINDS}
    (out / "qlora.json").write_text(json.dumps({"steps": steps, "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
