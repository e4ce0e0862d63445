#!/usr/bin/env python
"""Training speed and memory, side by side with what people use today, in one run: fresh processes in turn, equal work proven by equal losses.

    python scripts/bench/run.py out/bench --preset cpu            # what docs/bench.md shows (about 20 minutes)
    python scripts/bench/run.py out/bench --preset quick          # a minute; exits with 1 where a ratio is far off, also when measured again
    python scripts/bench/run.py out/bench --preset cpu --only "vocabulary 32,000" --repeats 5
    python scripts/bench/run.py out/bench --preset h200           # on a machine with one GPU

Ways: trainer (transformers' Trainer with PEFT), dense-masked (as SQFT and MaskLoRA compute it), plain and masked (lora_dist),
peft-layer (PEFT's own layer in lora_dist's loop), masked-blocks (the base stored as kept tiles). Every round runs each way once, so that
a machine that slows down slows all; ratios are medians over rounds of the ratio within a round. What is finished is kept
(OUT/results.json), so a run that is ended goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent)]

from bench_cases import MASKED, PRESETS, UNMASKED, Case  # noqa: E402
from bench_table import failures, picture, table  # noqa: E402

LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""relative, between ways that do the same work"""


class Bench:
    """The cases of a preset, and what was measured of them so far."""

    def __init__(self, out: Path, preset: str, *, shared: bool = False):
        self.out, self.file, self.shared = out, out / "results.json", shared
        out.mkdir(parents=True, exist_ok=True)
        self.results: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.preset = self.results.setdefault(preset, {})

    def keep(self) -> None:
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.results, indent=1))
        partial.replace(self.file)

    def folder(self, case: Case) -> Path:
        """The case's base, windows and factors, made where they are missing."""
        import random_llama

        key = f"{case.model}-{case.context}x{case.rows}-r{case.rank}-s{case.steps}"
        folder = self.out / "cases" / key
        base = self.out / "bases" / case.model
        if not base.exists():
            base.parent.mkdir(parents=True, exist_ok=True)
            random_llama.make(base, case.sizes, "bfloat16" if case.precision == "bf16" else "float32")
        if not (folder / "batches.pt").exists():
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "base").exists():
                (folder / "base").symlink_to(base.resolve(), target_is_directory=True)
            self._call("prepare", case, folder, folder / "prepared-run")
        return folder

    def measure(self, case: Case, way: str, round_: int, *, resume: bool = False) -> dict[str, Any]:
        """One process, or as many as the case has, start to end."""
        folder = self.folder(case)
        out = folder / f"run-{way}-{round_}"
        shutil.rmtree(out, ignore_errors=True)
        if resume:
            self._call(way, case, folder, out, BENCH_RESUME="1")  # leaves a checkpoint halfway, and is gone on from there
            for newer in sorted(out.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))[1:]:
                shutil.rmtree(newer)
        found = self._call(way, case, folder, out, **({"BENCH_RESUME": "1"} if resume else {}))
        shutil.rmtree(out, ignore_errors=True)
        return found

    def _call(self, way: str, case: Case, folder: Path, out: Path, **more: str) -> dict[str, Any]:
        case_file = folder / "case.json"
        case_file.write_text(json.dumps(case.as_dict()))
        worker = [str(HERE / "bench_worker.py"), way, str(case_file), str(folder)]
        processes = 1 if way == "prepare" else case.processes
        command = [sys.executable, *worker]
        if processes > 1:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *worker]
        threads = "1" if self.shared else str(max(1, (os.cpu_count() or 1) // processes))
        env = {
            **os.environ, "OMP_NUM_THREADS": threads, "BENCH_LAUNCHED": str(time.time()), "BENCH_OUT": str(out),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]),
            "TOKENIZERS_PARALLELISM": "false", "BENCH_SHARED": str(int(self.shared)), **more,
        }  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{case.name}, {way}: ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        if way == "prepare":
            return {}
        ranks = [json.loads((out.parent / f"{out.name}-rank-{rank}.json").read_text()) for rank in range(processes)]
        return ranks[0] | {"peak_bytes": max(rank["peak_bytes"] for rank in ranks)}

    def run(self, case: Case, repeats: int) -> None:
        """Rounds of all ways, as many as are missing."""
        kept = self.preset.setdefault(case.name, {"case": case.as_dict(), "rounds": [], "shared": self.shared})
        if kept["rounds"] and kept["shared"] != self.shared:
            raise SystemExit(f"--shared: {self.file} has rounds of {case.name} measured otherwise; use another folder")
        kept["case"], kept["shared"] = case.as_dict(), self.shared
        for round_ in range(len(kept["rounds"]), repeats):
            found = {}
            for way in case.ways:
                found[way] = self.measure(case, way, round_)
                speed = found[way]["tokens_per_s"]
                print(
                    f"{case.name}, round {round_ + 1}, {way}: {speed:,.0f} tokens/s, peak {found[way]['peak_bytes'] / 2**20:,.0f} MiB",
                    flush=True,
                )
            kept["rounds"].append(found)
            check_equal_work(case, found)
            self.keep()


def check_equal_work(case: Case, found: dict[str, Any]) -> None:
    """Ways that do the same work reach the same losses, step by step."""
    for group in (UNMASKED, MASKED):
        ways = [way for way in case.ways if way in group]
        for way in ways[1:]:
            pairs = zip(found[ways[0]]["losses"], found[way]["losses"], strict=True)
            worst = max(abs(a - b) / abs(a) for a, b in pairs)
            if not worst <= LOSS_TOLERANCE[case.precision] or math.isnan(worst):
                raise SystemExit(
                    f"{case.name}: {ways[0]} and {way} did not do the same work: losses {found[ways[0]]['losses']} and "
                    f"{found[way]['losses']}, expected them equal to {LOSS_TOLERANCE[case.precision]}"
                )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "out", type=Path, help="folder for bases, results.json, table.md and plot.png; an earlier run in it goes on"
    )
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu", help="which cases (default %(default)s)")
    parser.add_argument("--only", help="the case of this name, or else the cases whose names contain it")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default %(default)s)")
    parser.add_argument(
        "--startup", action="store_true", help="also time from launch, and from resume, to the end of the first step"
    )
    parser.add_argument(
        "--shared",
        action="store_true",
        help="for a machine with other work: one thread a process, and its processor time in place of seconds (always so in quick)",
    )
    parser.add_argument("--table", action="store_true", help="measure nothing, show what is there")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats: found {args.repeats}, expected 1 or more")
    if args.table and not (args.out / "results.json").is_file():
        parser.error(f"--table: found no results.json in {args.out}, expected the folder of an earlier run")
    known = PRESETS[args.preset]()
    cases = [case for case in known if case.name == args.only] or [
        case for case in known if not args.only or args.only in case.name
    ]
    if not cases:
        parser.error(f"--only: found {args.only!r}, expected part of one of: {'; '.join(c.name for c in known)}")
    bench = Bench(args.out.resolve(), args.preset, shared=args.shared or args.preset == "quick")
    if not args.table:
        for case in cases:
            bench.run(case, args.repeats)
        if args.startup:
            case = cases[0]
            kept = bench.results.setdefault("startup", {}).setdefault(case.name, {"case": case.as_dict(), "rounds": []})
            while len(kept["rounds"]) < args.repeats:
                ways = [way for way in case.ways if way in ("trainer", "masked")]
                kept["rounds"].append({way: bench.measure(case, way, 0, resume=True) for way in ways})
                bench.keep()
    wrong = failures(bench.results) if args.preset == "quick" else []
    if wrong and not args.table:
        print("bench: once more, since a ratio is off", flush=True)
        for case in cases:
            bench.run(case, 2 * args.repeats)
        wrong = failures(bench.results)
    text = table(bench.results)
    (bench.out / "table.md").write_text(text)
    print(text)
    picture(bench.results, bench.out / "plot.png")
    for line in wrong:
        print(f"bench: {line}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
