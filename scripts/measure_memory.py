#!/usr/bin/env python
"""Peak memory a rank of every strategy, on a base of 1.1e9 parameters that is made on the spot: `make measure-memory`.

    python scripts/measure_memory.py                          # all strategies, about 30 minutes on 2 cores
    python scripts/measure_memory.py --only fsdp2,zero3       # these, and one process to compare them with
    python scripts/measure_memory.py --tiny --only fsdp2      # a small base: that everything works, in seconds

Each row is a real `lora-dist train` under torchrun: a few steps with gradient checkpointing, then the checkpoint and the adapter.
Every 5 ms this script reads from /proc what each rank holds: anonymous memory (RssAnon), shared memory (RssShmem) and what of it
was swapped out. Pages that mirror a file are not counted: the kernel drops them when it needs the room. A process cannot make pages
faster than the kernel clears them, so a peak between two readings is missed by some MiB at most. A row's figure is the worst
rank's peak, less what a process holds that has only imported everything and joined the group.

The base is stored in bfloat16 and held in float32. One that is stored in float32 is not held by a whole-base process at all: its
weights are pages of the file (`--stored float32` shows it), and there is nothing to compare with.

Prints a Markdown table, writes it as memory.json, and exits with 1 if a strategy that shards the base holds 0.65 or more of what one
process does. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
INTERVAL_S = 0.005
BOUND = 0.65
SHARDED = ("fsdp2", "zero3")
OFFLOADED = {"optimizer": "optimizer", "param": "parameters"}
LARGE = 10**9
"""parameters from which the bound is checked: what any process holds beside its base counts for little then"""
STEPS, CONTEXT = 2, 128
TRAINING = "***** Running training *****"
"""the line of `lora-dist train` that ends loading"""


@dataclass(frozen=True)
class Row:
    """A strategy to measure."""

    strategy: str
    processes: int = 2
    offload: tuple[str, ...] = ()
    """what is offloaded to the CPU: optimizer, param"""

    @property
    def options(self) -> list[str]:
        return [f"--parallel.strategy={self.strategy}", *(f"--parallel.offload_{what}=cpu" for what in self.offload)]

    @property
    def sharded(self) -> bool:
        return self.strategy in SHARDED


ROWS = {
    "one": Row("ddp", processes=1),
    "ddp": Row("ddp"),
    "fsdp2": Row("fsdp2"),
    "zero1": Row("zero1"),
    "zero2": Row("zero2"),
    "zero3": Row("zero3"),
    "zero1-offload": Row("zero1", offload=("optimizer",)),
    "zero2-offload": Row("zero2", offload=("optimizer",)),
    "zero3-offload": Row("zero3", offload=("optimizer",)),
    "zero3-offload-all": Row("zero3", offload=("optimizer", "param")),
}


def fail(text: str) -> SystemExit:
    print(f"measure_memory: {text}", file=sys.stderr)
    return SystemExit(2)


def check_room(out: Path, rows: list[Row], base_bytes: int, to_write: int) -> None:
    """Refuse to begin what this machine cannot end."""
    per_row = [row.processes * ((0.65 if row.sharded else 1.1) * base_bytes + 0.8 * GIB) for row in rows]
    memory = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    available = int(memory[1]) * 1024 if memory else 0
    if available < max(per_row):
        worst = rows[per_row.index(max(per_row))]
        raise fail(
            f"memory: found {available / GIB:.1f} GiB available, expected {max(per_row) / GIB:.1f} GiB for {worst.strategy} on "
            f"{worst.processes} processes; leave it out with --only, or take --tiny"
        )
    disk, needed = shutil.disk_usage(out).free, to_write + 0.5 * GIB
    if disk < needed:
        raise fail(
            f"disk: found {disk / GIB:.1f} GiB free in {out}, expected {needed / GIB:.1f} GiB; name another folder with --out"
        )


# --- measuring -------------------------------------------------------------------------------------------------------------------


@dataclass
class Peak:
    """The most that one rank held in a phase."""

    anonymous: int = 0
    """bytes, swapped ones included"""
    shared: int = 0
    mapped: int = 0
    """pages of files, not counted"""
    counted: int = 0
    """the most of both together"""
    after: str = ""
    """the last line of output before it"""


@dataclass
class Run:
    """A launched program, and what its ranks held."""

    command: list[str]
    processes: int
    log: Path
    peaks: dict[str, dict[int, Peak]] = field(default_factory=lambda: {"loading": {}, "training": {}})
    """by phase and rank"""
    output: list[str] = field(default_factory=list)
    _phase: str = "loading"
    _files: dict[int, int] = field(default_factory=dict)
    """rank -> open /proc/PID/status"""

    def run(self) -> int:
        """To the end, watching; the exit code."""
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.processes)]
        process = subprocess.Popen(
            [*launcher, *self.command], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        try:
            while process.poll() is None:
                if len(self._files) < self.processes:
                    self._find_ranks(process.pid)
                self._sample()
                time.sleep(INTERVAL_S)
        finally:
            process.terminate()  # of an interrupted measurement; torchrun ends its workers
            code = process.wait()
            for file in self._files.values():
                os.close(file)
        reader.join()
        return code

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with self.log.open("w", encoding="utf-8") as log:
            for line in process.stdout:
                log.write(line)
                self.output.append(line.strip())
                if line.strip() == TRAINING:
                    self._phase = "training"

    def _find_ranks(self, launcher: int) -> None:
        try:
            pids = " ".join(file.read_text() for file in Path(f"/proc/{launcher}/task").glob("*/children")).split()
            for pid in pids:
                rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes())
                if rank is not None and int(rank[1]) not in self._files:
                    self._files[int(rank[1])] = os.open(f"/proc/{pid}/status", os.O_RDONLY)
        except OSError:
            return  # one of them has just ended: the next look finds the others

    def _sample(self) -> None:
        for rank, file in self._files.items():
            try:
                status = os.pread(file, 1 << 14, 0)
            except OSError:
                continue  # it has ended
            kib = {key: int(value) for key, value in re.findall(rb"(RssAnon|RssFile|RssShmem|VmSwap):\s+(\d+) kB", status)}
            anonymous, shared = (kib.get(b"RssAnon", 0) + kib.get(b"VmSwap", 0)) * 1024, kib.get(b"RssShmem", 0) * 1024
            peak = self.peaks[self._phase].setdefault(rank, Peak())
            peak.anonymous, peak.shared = max(peak.anonymous, anonymous), max(peak.shared, shared)
            peak.mapped = max(peak.mapped, kib.get(b"RssFile", 0) * 1024)
            if anonymous + shared > peak.counted:
                peak.counted, peak.after = anonymous + shared, next((line for line in reversed(self.output) if line), "")


def baseline(kind: str, out: Path) -> int:
    """Bytes that a rank holds before it does anything; kind is torch or zero."""
    run = Run([str(Path(__file__).resolve()), "--import_only", kind], 2, out / f"baseline-{kind}.log")
    if run.run() != 0:
        raise fail(f"the baseline failed; see {run.log}")
    return max(peak.counted for peak in run.peaks["loading"].values())


def import_only(kind: str) -> int:
    """What a rank of the baseline does: import what `lora-dist train` will, join the group, leave."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import lora_dist.engine.train
    import lora_dist.parallel.fully_sharded  # noqa: F401
    from lora_dist.parallel import close_world, init_world

    world = init_world(backend="auto", device="auto", timeout_s=600, always=True)
    if kind == "zero":
        from lora_dist.parallel.zero import import_deepspeed

        import_deepspeed(world)
    world.barrier()
    time.sleep(20 * INTERVAL_S)  # long enough to be seen
    close_world()
    return 0


def train_command(base: Path, run_folder: Path, out: Path, row: Row) -> list[str]:
    return [
        "-m", "lora_dist", "train", f"--model.name_or_path={base}", f"--data.dataset_name={base / 'text.txt'}",
        f"--data.block_size={CONTEXT}", "--data.preprocessing_num_workers=1", f"--data.cache_dir={out / 'cache'}",
        "--model.dtype=float32", "--adapter.r=8", "--adapter.mask=block", f"--train.output_dir={run_folder}", f"--train.max_steps={STEPS}",
        "--train.per_device_train_batch_size=1", "--train.gradient_checkpointing=true", "--train.logging_steps=1",
        "--train.eval_strategy=no", "--train.load_best_model_at_end=false", "--train.save_strategy=steps", *row.options,
    ]  # fmt: skip


@dataclass
class Figures:
    """A row of the table. GiB are the worst rank's, less the baseline."""

    name: str
    strategy: str
    processes: int
    peak_gib: float
    loading_gib: float
    training_gib: float
    base_held_gib: float
    step_time_s: float
    baseline_gib: float
    shared_gib: float
    mapped_gib: float
    """pages of files, libraries' among them; not counted"""
    peak_after: str
    """the line of output behind which the peak came"""
    ranks: dict[int, dict[str, float]]
    """peak GiB by rank and phase, less the baseline"""


def measure(name: str, row: Row, base: Path, base_bytes: int, out: Path, import_bytes: int) -> Figures:
    """One run, from its start to its end."""
    folder = out / "runs" / name
    if folder.exists():
        shutil.rmtree(folder)  # an earlier measurement's: an adapter of random weights
    run = Run(train_command(base, folder, out, row), row.processes, out / f"{name}.log")
    if run.run() != 0:
        tail = "\n".join(run.output[-15:])
        raise fail(f"{name} failed: {shlex.join(run.command)}\n{tail}\nThe whole output is in {run.log}")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step_time_s"] for record in records if record["event"] == "train"]
    shutil.rmtree(folder)
    held = next(
        (float(m[1]) for line in run.output if (m := re.search(r"% of the base \(([\d.]+) GiB\)", line))), base_bytes / GIB
    )
    worst = {phase: max(peaks.values(), key=lambda peak: peak.counted) for phase, peaks in run.peaks.items()}
    top = max(worst.values(), key=lambda peak: peak.counted)

    def above(peak: Peak) -> float:
        return (peak.counted - import_bytes) / GIB

    return Figures(
        name=name,
        strategy=row.strategy,
        processes=row.processes,
        peak_gib=above(top),
        loading_gib=above(worst["loading"]),
        training_gib=above(worst["training"]),
        base_held_gib=held,
        step_time_s=median(steps[1:] or steps),
        baseline_gib=import_bytes / GIB,
        shared_gib=max(peak.shared for peaks in run.peaks.values() for peak in peaks.values()) / GIB,
        mapped_gib=max(peak.mapped for peaks in run.peaks.values() for peak in peaks.values()) / GIB,
        peak_after=top.after,
        ranks={rank: {phase: above(run.peaks[phase][rank]) for phase in run.peaks} for rank in sorted(run.peaks["loading"])},
    )


# --- all of it -------------------------------------------------------------------------------------------------------------------


def table(rows: list[Figures]) -> str:
    lines = [
        "| strategy | processes | peak GiB a rank | of one process | base GiB held a rank | peak while loading, training | s a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for f in rows:
        offloaded = " and ".join(OFFLOADED[what] for what in ROWS[f.name].offload)
        lines.append(
            f"| `{f.strategy}`{f', {offloaded} offloaded' if offloaded else ''} | {f.processes} | {f.peak_gib:.2f} "
            f"| {f.peak_gib / rows[0].peak_gib:.2f} | {f.base_held_gib:.2f} | {f.loading_gib:.2f}, {f.training_gib:.2f} | {f.step_time_s:.1f} |"
        )
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "memory", help="folder for base and figures (default out/memory)"
    )
    parser.add_argument("--only", default=",".join(ROWS), help=f"rows to measure beside one process: {','.join(ROWS)}")
    parser.add_argument("--stored", choices=["bfloat16", "float32"], default="bfloat16", help="what the base is stored in")
    parser.add_argument("--tiny", action="store_true", help="a small base, to see that everything works; nothing is checked")
    parser.add_argument("--import_only", help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(args: argparse.Namespace, names: list[str]) -> tuple[Path, int]:
    """The base, made unless it is there, and its number of parameters."""
    import random_llama  # takes seconds: not before the command line is found to be in order

    shape = "tiny" if args.tiny else "1.1b"
    base, parameters = args.out.resolve() / f"llama-{shape}-{args.stored}", random_llama.count_parameters(shape)
    base.parent.mkdir(parents=True, exist_ok=True)
    to_write = 0 if base.exists() else parameters * (2 if args.stored == "bfloat16" else 4)
    check_room(base.parent, [ROWS[name] for name in names], 4 * parameters, to_write)
    verb = "making it" if to_write else "reused"
    print(f"{base}: {parameters:,} parameters, {4 * parameters / GIB:.2f} GiB in float32; {verb}", flush=True)
    if to_write:
        random_llama.make(base, shape, args.stored)
    return base, parameters


def measure_all(names: list[str], base: Path, base_bytes: int) -> list[Figures]:
    """One row after the other, with a line for each."""
    baselines: dict[str, int] = {}
    rows: list[Figures] = []
    for number, name in enumerate(names, start=1):
        row, start = ROWS[name], time.perf_counter()
        kind = "zero" if row.strategy.startswith("zero") else "torch"
        if kind not in baselines:
            baselines[kind] = baseline(kind, base.parent)
        f = measure(name, row, base, base_bytes, base.parent, baselines[kind])
        rows.append(f)
        print(
            f"[{number}/{len(names)}] {name}: peak {f.peak_gib:.2f} GiB a rank, {f.peak_gib / rows[0].peak_gib:.2f} of one process, above "
            f"{f.baseline_gib:.2f} of imports; after '{f.peak_after[:60]}'; {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    return rows


def main() -> int:
    args = parse_arguments()
    if args.import_only:
        return import_only(args.import_only)
    if not Path("/proc/self/status").exists():
        raise fail("found no /proc, expected Linux")
    asked = [name.strip() for name in args.only.split(",") if name.strip()]
    unknown = [name for name in asked if name not in ROWS]
    if unknown:
        raise fail(f"--only: found {', '.join(unknown)}, expected some of {', '.join(ROWS)}")
    names = [name for name in ROWS if name == "one" or name in asked]
    base, parameters = prepare(args, names)
    rows = measure_all(names, base, 4 * parameters)
    report = {
        "parameters": parameters,
        "base_gib": 4 * parameters / GIB,
        "stored": args.stored,
        "steps": STEPS,
        "context": CONTEXT,
    }
    file = base.parent / "memory.json"
    file.write_text(json.dumps({**report, "rows": [asdict(f) for f in rows]}, indent=2) + "\n", encoding="utf-8")
    print(f"\n{table(rows)}\n\nThe base alone: {4 * parameters / GIB:.2f} GiB. Written to {file}")
    if parameters < LARGE or args.stored == "float32":
        print(f"Not checked: the bound of {BOUND} is for a base of {LARGE:,} parameters or more that is stored in bfloat16.")
        return 0
    return verdict(rows)


def verdict(rows: list[Figures]) -> int:
    """0 when every strategy that shards the base holds little enough."""
    ratios = {f.name: f.peak_gib / rows[0].peak_gib for f in rows if ROWS[f.name].sharded}
    over = [f"{name} {ratio:.2f}" for name, ratio in ratios.items() if ratio >= BOUND]
    if over:
        print(f"measure_memory: found {', '.join(over)} of one process's memory, expected under {BOUND}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
