#!/usr/bin/env python
"""What a base held as kept tiles (model.storage blocks) costs and saves against the dense one: step time, memory, traffic.

    python scripts/measure_blocks.py out/blocks                   # the table of docs/storage.md (about 15 minutes)
    python scripts/measure_blocks.py out/blocks --widths 512 --rounds 3 --no_traffic
    python scripts/measure_blocks.py out/blocks --shared          # on a machine with other work: one thread's processor time

A Llama of two or more layers with half of its tiles pruned, block-masked LoRA on all linears. Time: whole optimizer steps of both storages
in one process, in turn, the order changing every round; the ratio is the median over rounds of the ratio within a round. Memory: bytes of the
pruned linears as the model holds them, places of tiles included, and beside it the matrix that layers are unpacked into. Traffic: bytes that
each of two processes holds after the all-gathers and broadcasts of one step, counted as they are called; of the whole model, embedding
and adapter included, of which there is little: a vocabulary of 256.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts")]

import random_llama  # noqa: E402
import torch  # noqa: E402

STORAGES = ("dense", "blocks")
TRAFFIC_VOCABULARY = 256
LAYERS = {512: 4, 1024: 3, 2048: 2}
WARM = 2


def sizes(width: int, vocabulary: int) -> dict[str, int]:
    """As LlamaConfig takes them, in Llama-2-7B's proportions."""
    heads = width // 64
    return {
        "hidden_size": width, "intermediate_size": width * 43 // 16 // 16 * 16, "num_hidden_layers": LAYERS.get(width, 2),
        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": vocabulary,
    }  # fmt: skip


def make_base(out: Path, width: int, vocabulary: int, dtype: str) -> Path:
    folder = out / "bases" / f"{width}-v{vocabulary}-{dtype}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        random_llama.make(folder, sizes(width, vocabulary), dtype)
    return folder


def run_config(base: Path, out: Path, args: argparse.Namespace, storage: str, strategy: str = "ddp", processes: int = 1) -> Any:
    from lora_dist.cli.options import parse
    from lora_dist.cli.train import VERB
    from lora_dist.config import RunConfig

    values = {
        "model.name_or_path": base, "model.storage": storage, "data.dataset_name": base / "text.txt", "data.block_size": args.context,
        "data.holdout_windows": 1, "data.cache_dir": out / "cache", "data.preprocessing_num_workers": 1, "adapter.r": args.rank,
        "adapter.lora_dropout": 0, "adapter.target_modules": "[all-linear]", "train.output_dir": out / f"run-{storage}-{strategy}",
        "train.max_steps": 1000, "train.per_device_train_batch_size": max(1, args.tokens // args.context // processes),
        "train.bf16": str(args.dtype == "bfloat16").lower(), "train.eval_strategy": "no", "train.save_strategy": "no",
        "train.load_best_model_at_end": "false", "parallel.strategy": strategy, "train.overwrite_output_dir": "true",
    }  # fmt: skip
    return parse(RunConfig, [f"--{key}={value}" for key, value in values.items()], VERB)


class Run:
    """One storage's run, ready to step."""

    def __init__(self, config: Any, world: Any, *, shared: bool = False):
        from lora_dist.engine.setup import build
        from lora_dist.monitor.console import Console

        self.parts = build(config, world, Console(enabled=False))
        self._steps = self.parts.loader.steps_from(0)
        self._number, self._clock = 0, time.process_time if shared else time.perf_counter
        self.parts.model.train()

    def step(self) -> tuple[float, float]:
        """(seconds, loss) of a whole optimizer step."""
        batch = next(self._steps)
        tokens = sum(float(micro.counts) for micro in batch.micro_batches)
        self._number += 1
        start = self._clock()
        result = self.parts.stepper.run(batch.micro_batches, self.parts.world.sum([tokens])[0], rate=1e-4, step=self._number)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._clock() - start, result.loss

    def linear_bytes(self) -> tuple[int, int]:
        """(of the pruned linears as they are held, of the matrix they are unpacked into)."""
        from lora_dist.blocks import block_layers

        model, held = self.parts.base.model, 0
        for name in self.parts.pattern:
            layer = model.get_submodule(name)
            layer = getattr(layer, "base_layer", layer)
            held += sum(t.numel() * t.element_size() for t in [layer.weight, *layer.buffers(recurse=False)])
        scratch = {layer.scratch for _, layer in block_layers(model)}
        return held, sum(each.held_bytes() for each in scratch)


def measure_time(width: int, args: argparse.Namespace) -> dict[str, Any]:
    from lora_dist.parallel import World

    base = make_base(args.out, width, args.vocabulary, args.dtype)
    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    runs = {storage: Run(run_config(base, args.out, args, storage), world, shared=args.shared) for storage in STORAGES}
    seconds: dict[str, list[float]] = {storage: [] for storage in STORAGES}
    worst = 0.0
    for round_ in range(WARM + args.rounds):
        losses = {}
        for storage in STORAGES if round_ % 2 else STORAGES[::-1]:
            time_s, losses[storage] = runs[storage].step()
            if round_ >= WARM:
                seconds[storage].append(time_s)
        worst = max(worst, abs(losses["blocks"] - losses["dense"]) / abs(losses["dense"]))
    ratios = sorted(b / d for d, b in zip(seconds["dense"], seconds["blocks"], strict=True))
    (dense_bytes, _), (block_bytes, scratch_bytes) = (runs[storage].linear_bytes() for storage in STORAGES)
    return {
        "width": width, "dense_s": statistics.median(seconds["dense"]), "blocks_s": statistics.median(seconds["blocks"]),
        "time_ratio": statistics.median(ratios), "time_quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
        "dense_bytes": dense_bytes, "block_bytes": block_bytes, "scratch_bytes": scratch_bytes, "largest_loss_difference": worst,
    }  # fmt: skip


class Gathered(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes that collectives fill whole tensors with."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if func.namespace == "c10d" and ("allgather" in name or "broadcast" in name):
            filled = args[0]
            for tensor in filled if isinstance(filled, list | tuple) else [filled]:
                for each in tensor if isinstance(tensor, list | tuple) else [tensor]:
                    self.bytes += each.numel() * each.element_size()
        return func(*args, **(kwargs or {}))


def count_traffic(args: argparse.Namespace) -> int:
    """In a process of torchrun: one step's bytes, of each strategy and storage."""
    from lora_dist.parallel import close_world, init_world

    world = init_world(device="cuda" if torch.cuda.is_available() else "cpu", always=True)
    base = args.out / "bases" / f"{args.widths[0]}-v{args.vocabulary}-{args.dtype}"
    run = Run(run_config(base, args.out, args, args.storage, args.strategy, world.size), world)
    run.step()
    with Gathered() as gathered:
        _, loss = run.step()
    if world.is_main:
        (args.out / "traffic.json").write_text(json.dumps({"bytes": gathered.bytes, "loss": loss}))
    close_world()
    return 0


def measure_traffic(width: int, args: argparse.Namespace) -> dict[str, Any]:
    make_base(args.out, width, TRAFFIC_VOCABULARY, args.dtype)
    found: dict[str, Any] = {"width": width}
    for strategy in ("fsdp2", "zero3"):
        for storage in STORAGES:
            asked = {"widths": width, "context": args.context, "tokens": args.tokens, "rank": args.rank, "dtype": args.dtype}
            options = [f"--{key}={value}" for key, value in {**asked, "vocabulary": TRAFFIC_VOCABULARY}.items()]
            command = [
                sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(Path(__file__).resolve()),
                str(args.out), *options, "--strategy", strategy, "--storage", storage,
            ]  # fmt: skip
            path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(
                    f"{strategy}, {storage}: ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
                )
            found[f"{strategy}-{storage}"] = json.loads((args.out / "traffic.json").read_text())
        pair = [found[f"{strategy}-{storage}"] for storage in STORAGES]
        found[f"{strategy}-ratio"] = pair[1]["bytes"] / pair[0]["bytes"]
    return found


def table(times: list[dict[str, Any]], traffic: list[dict[str, Any]]) -> str:
    mib = 2**20
    lines = [
        "| width | step, dense s | blocks s | ratio (quartiles) | pruned linears, dense MiB | blocks MiB | ratio | unpacked into, MiB |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in times:
        low, high = row["time_quartiles"]
        lines.append(
            f"| {row['width']:,} | {row['dense_s']:.3f} | {row['blocks_s']:.3f} | {row['time_ratio']:.3f} ({low:.3f} to {high:.3f}) | "
            f"{row['dense_bytes'] / mib:.1f} | {row['block_bytes'] / mib:.1f} | {row['block_bytes'] / row['dense_bytes']:.3f} | "
            f"{row['scratch_bytes'] / mib:.1f} |"
        )
    lines += ["", "| width | strategy | received a step, dense MiB | blocks MiB | ratio |", "|---|---|---|---|---|"]
    for row in traffic:
        for strategy in ("fsdp2", "zero3"):
            pair = [row[f"{strategy}-{storage}"]["bytes"] / mib for storage in STORAGES]
            lines.append(f"| {row['width']:,} | {strategy} | {pair[0]:.1f} | {pair[1]:.1f} | {row[f'{strategy}-ratio']:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for bases, runs, results.json and table.md")
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=15, help="steps of each storage that are timed (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=2048, help="of a step (default %(default)s)")
    parser.add_argument("--context", type=int, default=512, help="tokens of a row (default %(default)s)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--shared", action="store_true", help="one thread, and its processor time in the place of time")
    parser.add_argument("--no_traffic", action="store_true", help="leave out what needs two processes")
    parser.add_argument("--no_time", action="store_true", help="leave out step time and memory")
    parser.add_argument("--strategy", help=argparse.SUPPRESS)
    parser.add_argument("--storage", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.strategy:
        return count_traffic(args)
    if args.shared:
        torch.set_num_threads(1)
    times = [] if args.no_time else [measure_time(width, args) for width in args.widths]
    traffic = [] if args.no_traffic else [measure_traffic(width, args) for width in args.widths]
    (args.out / "results.json").write_text(
        json.dumps({"options": vars(args), "time": times, "traffic": traffic}, indent=1, default=str)
    )
    text = table(times, traffic)
    (args.out / "table.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
