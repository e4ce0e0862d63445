#!/usr/bin/env python
"""What learning from the dense model costs and recovers, by the project's own commands: the tables of docs/distillation.md.

    python scripts/measure_distill.py memory        # of a small Llama with a vocabulary of 32,000
    python scripts/measure_distill.py time          # of the same
    LORA_DIST_DATA=/path/to/data python scripts/measure_distill.py stories           # stories260K, half of its tiles pruned
    LORA_DIST_DATA=/path/to/data python scripts/measure_distill.py wikitext --base DIR   # from a base that is pruned already

`memory` is the largest resident size of a process that trains two steps, of each way to train; `time` the CPU's time of a step, of all ways
in turn in one process, medians over rounds. The dense model is the pruned one's own directory there: what weights are does not change
the cost.
`stories` and `wikitext` prune (unless a base is given), train by configs/*.yaml without and with the dense model, and evaluate; what is
done already is reused. `--quick` is a few steps of everything, to see that it works.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from measure import ROOT, Measurement, data_folder, subjects
from measure_qlora import call
from random_llama import make

from lora_dist.cli import train as verb
from lora_dist.cli.options import parse
from lora_dist.config import RunConfig
from lora_dist.engine.setup import Parts, build
from lora_dist.monitor.console import Console
from lora_dist.parallel import init_world

QUICK_STEPS = 2
SHAPE = {
    "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    "vocab_size": 32000,
}  # fmt: skip
WAYS: dict[str, list[str]] = {
    "plain": [],
    "plain, whole logits": ["--train.cross_entropy=logits"],
    "live": ["TEACHER"],
    "live, T = 2": ["TEACHER", "--train.distill_temperature=2"],
    "live, whole logits": ["TEACHER", "--train.cross_entropy=logits"],
    "live, last hidden states too": ["TEACHER", "--train.distill_hidden_weight=1"],
    "cached, k = 64": ["TEACHER", "CACHE"],
}
MIXES: dict[str, list[str]] = {
    "plain": [],
    "alpha 0.5, T 1": ["--train.distill_alpha=0.5"],
    "alpha 1, T 1": ["--train.distill_alpha=1"],
    "alpha 0.5, T 2": ["--train.distill_alpha=0.5", "--train.distill_temperature=2"],
    "alpha 0.5, T 1, hidden states 0.5": ["--train.distill_alpha=0.5", "--train.distill_hidden_weight=0.5"],
}


def options_of(way: str, out: Path, run: Path) -> list[str]:
    """`lora-dist train` options of a way to train, on a model that is made where it is missing."""
    model = out / "llama-32k"
    if not model.exists():
        make(model, SHAPE, "float32")
    where = {"TEACHER": f"--train.distill_from={model}", "CACHE": f"--train.distill_cache={out / 'cache'}"}
    return [
        f"--model.name_or_path={model}", f"--data.dataset_name={model / 'text.txt'}", f"--data.cache_dir={out / 'data'}",
        "--data.block_size=512", "--train.per_device_train_batch_size=4", "--train.max_steps=2", "--train.logging_steps=1",
        "--train.eval_strategy=no", "--train.save_strategy=no", "--adapter.lora_dropout=0", "--train.overwrite_output_dir",
        "--tracker.diagnosis=false", f"--train.output_dir={run}", *(where.get(option, option) for option in WAYS[way]),
    ]  # fmt: skip


def memory(out: Path) -> None:
    """Two steps each way, in a process of its own."""
    print("| | largest resident memory, MiB | above plain |\n|---|---|---|")
    plain = 0.0
    for way in WAYS:
        options = options_of(way, out, out / "memory" / way.replace(" ", "-"))
        if "CACHE" in WAYS[way]:  # a run that also computed the cache would count the dense model
            call(["-m", "lora_dist", "distill-cache", *options])
        call(["-m", "lora_dist", "train", *options])
        lines = [json.loads(line) for line in (out / "memory" / way.replace(" ", "-") / "metrics.jsonl").read_text().splitlines()]
        found = max(line["peak_mem_gib"] for line in lines if line["event"] == "train") * 1024
        plain = plain or found
        print(f"| {way} | {found:.0f} | {found - plain:+.0f} |", flush=True)


def cpu_time(out: Path, rounds: int) -> None:
    """All ways in one process of one thread, a step of each in turn, by the CPU's time, which other programs change little."""
    torch.set_num_threads(1)
    world = init_world(device="cpu")
    parts: dict[str, Parts] = {}
    for way in WAYS:
        config = parse(RunConfig, options_of(way, out, out / "time" / way.replace(" ", "-")), verb.VERB)
        with contextlib.redirect_stdout(io.StringIO()):
            parts[way] = build(config, world, Console(enabled=False))
    batches = {way: each.loader.steps_from(0) for way, each in parts.items()}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        for way, each in parts.items():
            each.strategy.module.train()
            batch = next(batches[way])
            start = time.process_time()
            each.stepper.run(batch.micro_batches, batch.label_tokens, rate=1e-4, step=number + 1)
            if number:  # the first warms up
                times[way].append(time.process_time() - start)
    print(
        f"one thread, float32, {rounds} rounds\n\n| | CPU s a step of 2,044 label tokens | tokens/s | against plain |\n|---|---|---|---|"
    )
    for way, each_s in times.items():
        ratio = statistics.median(plain_s / own_s for own_s, plain_s in zip(each_s, times["plain"], strict=True))
        own_s = statistics.median(each_s)
        print(f"| {way} | {own_s:.2f} | {2044 / own_s:.0f} | {ratio:.2f} |")


def recover(m: Measurement, base: Path, mixes: list[str], steps: int | None) -> None:
    """The table of perplexities."""
    extra = [] if steps is None else [f"--train.max_steps={steps}", f"--train.eval_steps={steps}"]
    extra += ["--train.warmup_steps=1"] if steps == QUICK_STEPS else []
    print(f"base: perplexity {m.perplexity(f'base-{base.name}', base):.2f}")
    for name in mixes:
        folder = m.out / f"{base.name}-{''.join(c if c.isalnum() else '-' for c in name)}-{steps or 'all'}"
        if not (folder / "adapter_model.safetensors").exists():
            teacher = [f"--train.distill_from={m.subject.model}"] if name != "plain" else []
            m.command(
                "train", "--config", str(m.config), f"--model.name_or_path={base}", f"--data.dataset_name={m.subject.text}",
                f"--train.output_dir={folder}", "--adapter.mask=block", *teacher, *MIXES[name], *extra, "--resume=auto",
            )  # fmt: skip
        print(f"| {name} | {m.perplexity(folder.name, base, folder):.2f} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "time", "stories", "wikitext"])
    parser.add_argument("--out", type=Path, help="folder to work in (default out/measure-distill)")
    parser.add_argument(
        "--base", type=Path, help="pruned model to start from, such as a reconstructed one; default: prune half of the tiles"
    )
    parser.add_argument("--steps", type=int, help="so many instead of the configuration's, for a coarse comparison")
    parser.add_argument("--mixes", help="some of: " + "; ".join(MIXES) + " (separated by semicolons; default all)")
    parser.add_argument("--rounds", type=int, default=5, help="of time (default 5)")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    args = parser.parse_args()
    out = (args.out or ROOT / "out" / f"measure-distill{'-quick' if args.quick else ''}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.what == "memory":
        memory(out)
        return 0
    if args.what == "time":
        cpu_time(out, 1 if args.quick else args.rounds)
        return 0
    mixes = list(MIXES) if args.mixes is None else [name.strip() for name in args.mixes.split(";")]
    unknown = [name for name in mixes if name not in MIXES]
    if unknown:
        parser.error(f"--mixes: found {unknown[0]}, expected some of {'; '.join(MIXES)}")
    subject = subjects(data_folder("measure_distill"))[args.what]
    config = ROOT / "configs" / ("stories260k.yaml" if args.what == "stories" else "wikitext2_llama.yaml")
    (out / args.what).mkdir(exist_ok=True)
    m = Measurement(subject, config, out / args.what, [])
    recover(m, args.base or m.base(0.5, "matrix"), mixes, QUICK_STEPS if args.quick else args.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
