#!/usr/bin/env python
"""The plan's memory against the measured peak of real runs: `python scripts/measure_plan.py`.

    python scripts/measure_plan.py                       # all cases, about 15 minutes on 2 cores
    python scripts/measure_plan.py --only 1b-bf16,zero3  # these
    python scripts/measure_plan.py --json out.json

Every case is a real `lora-dist train` of two steps on a base of random weights, in fresh processes. On a GPU the measure is
`torch.cuda.max_memory_allocated`. On a CPU it is the highest resident memory of the process between the first step and the end of
the run (VmHWM, reset through /proc/self/clear_refs), less what the process held before this base was loaded. By then it has imported
everything, joined the others and trained a base of a few kilobytes by the same options, so that libraries and the engine's own objects
are in neither figure; the plan's figure is the sum of its parts but "framework". What glibc keeps of freed memory is kept out by
MALLOC_MMAP_THRESHOLD_ (128 KiB). Of several ranks, the highest counts. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GIB, MIB = 2**30, 2**20
TOLERANCE = 0.10


@dataclass(frozen=True)
class Case:
    """A run. Shapes as in config.json; options as of `lora-dist train`."""

    hidden: int = 512
    layers: int = 4
    vocabulary: int = 8000
    heads: int = 8
    key_value_heads: int = 4
    tied: bool = False
    stored: str = "float32"
    processes: int = 1
    kind: str = "llama"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        if self.options.get("model.load_in_4bit"):
            return "nf4"
        if self.options.get("model.load_in_8bit"):
            return "int8"
        return next((p for p in ("bf16", "fp16") if self.options.get(f"train.{p}")), "fp32")


def _case(rows: int = 2, context: int = 512, *, checkpointing: bool = False, precision: str = "fp32", **more: Any) -> Case:
    options: dict[str, Any] = {
        "data.block_size": context,
        "train.per_device_train_batch_size": rows,
        "train.gradient_checkpointing": checkpointing,
    } | more.pop("options", {})
    if precision in ("bf16", "fp16"):
        options[f"train.{precision}"] = True
    if precision in ("nf4", "int8"):
        options |= {"train.bf16": True, f"model.load_in_{'4' if precision == 'nf4' else '8'}bit": True}
    return Case(options=options, **more)


_BIG = {"hidden": 2048, "layers": 22, "vocabulary": 32000, "heads": 32, "key_value_heads": 4}
CASES: dict[str, Case] = {
    "fp32": _case(),
    "fp32-checkpointing": _case(checkpointing=True),
    "fp32-4-rows": _case(rows=4),
    "fp32-long": _case(rows=1, context=2048),
    "fp32-long-checkpointing": _case(rows=1, context=2048, checkpointing=True),
    "rank-64": _case(options={"adapter.r": 64}),
    "vocabulary-32000": _case(vocabulary=32000, checkpointing=True),
    "tied": _case(vocabulary=32000, tied=True),
    "no-dropout": _case(options={"adapter.lora_dropout": 0}),
    "accumulation": _case(options={"train.gradient_accumulation_steps": 3}),
    "plain-lora": _case(options={"adapter.mask": "none"}),
    "dense-form": _case(options={"adapter.form": "dense"}),
    "attention-only": _case(options={"adapter.target_modules": "q_proj,v_proj"}),
    "bf16": _case(precision="bf16"),
    "bf16-checkpointing": _case(precision="bf16", checkpointing=True, rows=4),
    "fp16": _case(precision="fp16"),
    "evaluation": _case(
        rows=1, checkpointing=True, vocabulary=32000, options={"train.eval_strategy": "steps", "train.per_device_eval_batch_size": 8}
    ),
    "gpt2": _case(kind="gpt2"),
    "ddp-2": _case(processes=2),
    "fsdp2": _case(processes=2, options={"parallel.strategy": "fsdp2"}),
    "fsdp2-checkpointing": _case(processes=2, hidden=1024, checkpointing=True, options={"parallel.strategy": "fsdp2"}),
    "zero2": _case(processes=2, options={"parallel.strategy": "zero2", "adapter.r": 64}),
    "zero3": _case(processes=2, options={"parallel.strategy": "zero3"}),
    "zero3-checkpointing": _case(processes=2, hidden=1024, checkpointing=True, options={"parallel.strategy": "zero3"}),
    "dora": _case(options={"adapter.type": "dora"}),
    "ia3": _case(options={"adapter.type": "ia3"}),
    "adalora": _case(options={"adapter.type": "adalora"}),
    "adamw-8bit": _case(options={"train.optim": "adamw_8bit", "adapter.r": 64}),
    "nf4": _case(hidden=1024, precision="nf4"),
    "int8": _case(hidden=1024, precision="int8"),
    "1b-bf16": _case(rows=1, precision="bf16", **_BIG),
    "1b-bf16-checkpointing": _case(rows=4, precision="bf16", checkpointing=True, **_BIG),
    "1b-fp32-checkpointing": _case(rows=1, checkpointing=True, stored="bfloat16", **_BIG),
    "1b-nf4-checkpointing": _case(rows=1, precision="nf4", checkpointing=True, stored="bfloat16", **_BIG),
    "1b-fsdp2": _case(rows=1, context=256, precision="bf16", checkpointing=True, processes=2, options={"parallel.strategy": "fsdp2"}, **_BIG),
}  # fmt: skip


def make_base(case: Case, folder: Path) -> None:
    """A base of random weights, its mask, a tokenizer and a text, one tensor in memory at a time."""
    import torch
    from random_llama import make_tokenizer
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    from lora_dist.blocks import BlockMask, Pattern, grid
    from lora_dist.models.architecture import prunable_linears

    ids = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": case.vocabulary, "tie_word_embeddings": case.tied}
    config: Any
    if case.kind == "gpt2":
        config = GPT2Config(n_embd=case.hidden, n_layer=case.layers, n_head=case.heads, n_positions=2048, **ids)
    else:
        config = LlamaConfig(
            hidden_size=case.hidden, intermediate_size=case.hidden * 11 // 4, num_hidden_layers=case.layers,
            num_attention_heads=case.heads, num_key_value_heads=case.key_value_heads, max_position_embeddings=2048, **ids,
        )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    dtype = getattr(torch, case.stored)
    config.architectures, config.dtype = [type(model).__name__], case.stored
    folder.mkdir(parents=True)
    model.tie_weights()
    masks, where = {}, {}
    linears = {f"{linear.name}.weight": linear for linear in prunable_linears(model)}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        tensor = (
            torch.empty(parameter.shape, dtype=dtype).normal_(0, 0.02)
            if parameter.ndim > 1
            else torch.ones(parameter.shape, dtype=dtype)
        )
        if name in linears:
            linear = linears[name]
            shape = tuple(linear.weight_OI.shape)
            mask = masks[linear.name] = BlockMask(torch.rand(grid(shape, 16)) < 0.5, shape, 16)
            tensor *= mask.expand().T if linear.transposed else mask.expand()
        file = f"model-{number:05d}.safetensors"
        save_file({name: tensor.contiguous()}, str(folder / file), metadata={"format": "pt"})
        where[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    Pattern(masks).save(folder)
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text((__doc__ or "") * 60, encoding="utf-8")


# --- in a worker -----------------------------------------------------------------------------------------------------------------


def _status(key: str) -> int:
    """A figure of /proc/self/status, bytes."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _train_options(case: Case, base: Path, out: Path) -> list[str]:
    values = {
        "model.name_or_path": base, "data.dataset_name": base / "text.txt", "data.preprocessing_num_workers": 1,
        "data.cache_dir": out / "cache", "train.output_dir": out / "run", "train.max_steps": 2, "train.logging_steps": 1,
        "data.holdout_windows": 8, "train.save_strategy": "no", "train.load_best_model_at_end": False, "train.eval_strategy": "no",
        "train.eval_steps": 1, "train.eval_on_start": False, "health.hang_timeout_s": 0,
    } | case.options  # fmt: skip
    return [f"--{key}={value}" for key, value in values.items()]


def work(name: str, folder: Path) -> int:
    """Train a base of a few kilobytes, then the case's, and write down how high memory went."""
    import torch

    from lora_dist.cli.options import parse
    from lora_dist.cli.train import VERB, joined
    from lora_dist.config import RunConfig
    from lora_dist.engine.train import train

    case = CASES[name]
    rank = int(os.environ.get("RANK", "0"))

    def run(base: Path, out: Path, look: Any, **options: Any) -> None:
        argv = [*_train_options(case, base, out), *(f"--{k.replace('__', '.')}={v}" for k, v in options.items())]
        config = parse(RunConfig, argv, VERB)
        code = train(config, world, look=look)
        if code != 0:
            raise SystemExit(code)

    first = parse(RunConfig, _train_options(case, folder / "warm-up", folder / "out-0"), VERB)
    with joined(first) as world:
        run(folder / "warm-up", folder / "out-0", lambda parts: None, data__block_size=64)
        gc.collect()
        from lora_dist.parallel.heap import trim

        trim()
        cuda = world.device.type == "cuda"
        before = torch.cuda.memory_allocated() if cuda else _status("VmRSS")
        found: dict[str, Any] = {}

        def look(parts: Any) -> None:
            found["loading"] = torch.cuda.max_memory_allocated() if cuda else _status("VmHWM")
            placement = parts.strategy.placement()
            found["base"], found["trainable"] = placement.base_bytes, placement.trainable_elements
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            else:
                Path("/proc/self/clear_refs").write_text("5")

        run(folder / "base", folder / "out-1", look)
        peak = torch.cuda.max_memory_allocated() if cuda else _status("VmHWM")
    figures = {
        "peak": peak - before,
        "loading": found["loading"] - before,
        "base": found["base"],
        "trainable": found["trainable"],
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(figures | {"before": before}))
    return 0


# --- comparing -------------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A line of the table, GiB."""

    name: str
    estimate_gib: float
    measured_gib: float
    parts_gib: dict[str, float]
    base_held_gib: float
    loading_gib: float

    @property
    def ratio(self) -> float:
        return self.estimate_gib / self.measured_gib


def estimate(case: Case, base: Path) -> Any:
    """The plan's figure for exactly this run."""
    import torch

    from lora_dist.cli.options import parse
    from lora_dist.cli.train import VERB
    from lora_dist.config import RunConfig
    from lora_dist.operations.plan.memory import Layout, at_peak
    from lora_dist.operations.plan.rehearse import Rehearsal

    config = parse(RunConfig, _train_options(case, base, base / "out"), VERB)
    cuda = torch.cuda.is_available()
    strategy = config.parallel.strategy if config.parallel.strategy != "auto" else "ddp"
    layout = Layout(strategy, case.processes, optim=config.train.optim, adalora=config.adapter.type == "adalora", cuda=cuda)
    return at_peak(
        Rehearsal(config, cuda=cuda),
        layout,
        case.precision,
        checkpointing=config.train.gradient_checkpointing,
        rows=config.train.per_device_train_batch_size,
        eval_rows=config.train.per_device_eval_batch_size if config.train.eval_strategy != "no" else 0,
        exact=True,
    )


def measure(name: str, malloc: bool) -> Row:
    case = CASES[name]
    with tempfile.TemporaryDirectory(prefix="measure-plan-") as scratch:
        folder = Path(scratch)
        make_base(case, folder / "base")
        small = {"hidden": 64, "layers": 2, "vocabulary": 128, "heads": 4, "key_value_heads": 2}
        make_base(Case(**{**asdict(case), **small, "options": {}}), folder / "warm-up")
        launcher = (
            []
            if case.processes == 1
            else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(case.processes)]
        )
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
        if malloc:
            env |= {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024), "MALLOC_TRIM_THRESHOLD_": str(128 * 1024)}
        command = [sys.executable, *launcher, str(Path(__file__).resolve()), "--worker", name, "--folder", str(folder)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
        ranks = [json.loads(file.read_text()) for file in sorted(folder.glob("rank-*.json"))]
        if done.returncode != 0 or len(ranks) != case.processes:
            raise SystemExit(f"measure_plan: {name} failed\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        worst = max(ranks, key=lambda rank: rank["peak"])
        memory = estimate(case, folder / "base")
    parts = {part: value / GIB for part, value in asdict(memory).items() if value and part != "overhead"}
    return Row(
        name, (memory.total - memory.overhead) / GIB, worst["peak"] / GIB, parts, worst["base"] / GIB, worst["loading"] / GIB
    )


def line(row: Row) -> str:
    flag = "" if abs(row.ratio - 1) <= TOLERANCE else "  <- off"
    return f"| {row.name} | {row.estimate_gib:.3f} | {row.measured_gib:.3f} | {row.ratio:.3f} |{flag}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES), help="cases, comma-separated")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--plain_malloc", action="store_true", help="glibc as it is: what a run without the variable holds")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.folder)
    names = [name for name in args.only.split(",") if name]
    unknown = [name for name in names if name not in CASES]
    if unknown:
        print(f"measure_plan: only: found {', '.join(unknown)}, expected some of {', '.join(CASES)}", file=sys.stderr)
        return 2
    print("| case | estimate GiB | measured GiB | ratio |\n|---|---|---|---|", flush=True)
    rows = []
    for name in names:
        rows.append(measure(name, not args.plain_malloc))
        print(line(rows[-1]), flush=True)
        if args.json:
            args.json.write_text(json.dumps([asdict(row) | {"ratio": row.ratio} for row in rows], indent=1))
    off = [row.name for row in rows if abs(row.ratio - 1) > TOLERANCE]
    print(f"{len(rows) - len(off)} of {len(rows)} within {TOLERANCE:.0%}" + (f"; off: {', '.join(off)}" if off else ""))
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
