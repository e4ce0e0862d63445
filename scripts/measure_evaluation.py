#!/usr/bin/env python
"""The table of whole evaluations in docs/measurements.md: stories260K dense, pruned, with plain and block-masked LoRA, and merged, side by side.

    LORA_DIST_DATA=/path/to/data python scripts/measure_evaluation.py

Prunes half of the 16x16 tiles, trains both adapters on one of the two TinyStories files (`configs/stories260k.yaml`), merges, and
hands all of them to one `lora-dist eval --compare`: perplexity on WikiText-2's test text and on the other TinyStories file, the local
zero-shot sets, speed and memory. What is done is reused; the report is written anew. `--quick` trains 2 steps and asks 8 questions.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from measure import ROOT, Measurement, data_folder, subjects

LIMIT = 500
"""questions of each zero-shot set; BoolQ's and HellaSwag's take most of the time"""


def compare(data: Path, out: Path, extra: list[str], limit: int) -> None:
    """Make what is missing, and the report `evaluation.json` and `.md` in `out`."""
    stories = subjects(data, training=("tinystories_sample.txt",))["stories"]
    m = Measurement(stories, ROOT / "configs" / "stories260k.yaml", out, extra)
    base = m.base(0.5, "matrix")
    plain, masked = (m.adapter(base, f"{kind} LoRA on all linears") for kind in ("plain", "block-masked"))
    merged = m.merged(base, masked, "")
    rows = {
        "dense": stories.model,
        "pruned": str(base),
        "plain LoRA": f"{base}+{plain}",
        "masked LoRA": f"{base}+{masked}",
        "merged": str(merged),
    }
    m.command(
        "eval", "--compare", ",".join(f"{name}={where}" for name, where in rows.items()), "--metrics=all",
        f"--texts=wikitext2={data}/wikitext-2/test.txt,tinystories={data}/tinystories/tinystories_10k.txt",
        "--document_separator=<|endoftext|>", f"--task_data={data}/multiple-choice", f"--limit={limit}", "--batch_size=32",
        f"--output={out}/evaluation.json",
        *(["--max_samples=20"] if limit < LIMIT else []),
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder to work in (default out/measure-evaluation)")
    parser.add_argument("--limit", type=int, default=LIMIT, help=f"questions of each zero-shot set (default {LIMIT})")
    parser.add_argument("--quick", action="store_true", help="2 training steps and 8 questions, to see that everything works")
    args = parser.parse_args()
    out = (args.out or ROOT / "out" / f"measure-evaluation{'-quick' if args.quick else ''}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    extra = ["--train.max_steps=2", "--train.warmup_steps=1"] if args.quick else []
    compare(data_folder("measure_evaluation"), out, extra, 8 if args.quick else args.limit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
