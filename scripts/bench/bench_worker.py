"""One way to train one case, in a process of its own: `run.py` starts it, alone or under torchrun, and reads the JSON it leaves.

    python scripts/bench/bench_worker.py WAY CASE.json FOLDER

FOLDER holds `base/` (`random_llama.py`), `batches.pt` and `adapter.safetensors`, the token windows of every step in order and the factors
that training starts with, written by the way `prepare`. Times are between the ends of optimizer steps, loading and logging included; with
BENCH_SHARED=1 they are the process's own processor time, which other work on the machine does not stretch.
"""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from bench_cases import UNMASKED, Case
from torch import Tensor

SKIPPED = 2
"""first steps, whose times say nothing"""
RATE = 1e-3
CUDA = torch.cuda.is_available()
SHARED = os.environ.get("BENCH_SHARED") == "1"
clock = time.process_time if SHARED else time.perf_counter


def resident_bytes(key: str) -> int:
    """VmRSS (now) or VmHWM (highest since `forget_peak`) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def memory_bytes() -> int:
    return torch.cuda.memory_allocated() if CUDA else resident_bytes("VmRSS")


def peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if CUDA else resident_bytes("VmHWM")


def forget_peak() -> None:
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


class Stopwatch:
    """Ends of steps, and seconds by phase."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.first_end_s = 0.0
        self.phases = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}

    def step_ended(self) -> None:
        if CUDA:
            torch.cuda.synchronize()
        self.ends.append(clock())
        self.first_end_s = self.first_end_s or time.time()
        if len(self.ends) == SKIPPED:
            self.phases = dict.fromkeys(self.phases, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = clock()
        yield
        if CUDA:
            torch.cuda.synchronize()
        self.phases[name] += clock() - start

    def times(self) -> list[float]:
        return [b - a for a, b in zip(self.ends[SKIPPED - 1 :], self.ends[SKIPPED:], strict=False)]


def train_options(case: Case, way: str, folder: Path, out: Path) -> list[str]:
    values: dict[str, Any] = {
        "model.name_or_path": folder / "base", "data.dataset_name": folder / "base" / "text.txt", "data.cache_dir": folder / "cache",
        "data.preprocessing_num_workers": 1, "data.block_size": case.context, "data.holdout_windows": 1,
        "adapter.r": case.rank, "adapter.lora_alpha": 2 * case.rank, "adapter.lora_dropout": 0.0,
        "adapter.target_modules": "[all-linear]", "adapter.mask": "none" if way in UNMASKED else "block",
        "train.output_dir": out, "train.max_steps": case.steps, "train.per_device_train_batch_size": case.rows // case.processes,
        "train.learning_rate": RATE, "train.lr_scheduler_type": "constant", "train.bf16": case.precision == "bf16",
        "train.logging_steps": 1, "train.eval_strategy": "no", "train.eval_on_start": False, "train.save_strategy": "no",
        "train.load_best_model_at_end": False, **case.options,
    }  # fmt: skip
    if way == "masked-triton":
        values["adapter.form"] = "triton"
    if way == "masked-blocks":
        values["model.storage"] = "blocks"
    return [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]


def run_here(case: Case, way: str, folder: Path, out: Path, extra: list[str], look: Any) -> Path:
    """`lora-dist train` with a look at its parts; the run folder."""
    from lora_dist.cli.options import parse
    from lora_dist.cli.train import VERB, joined, resolve_layers
    from lora_dist.config import RunConfig
    from lora_dist.engine.train import train

    config = parse(RunConfig, [*train_options(case, way, folder, out), *extra], VERB)
    with joined(config) as world:
        resolve_layers(config, world)
        code = train(config, world, look=look)
    if code != 0:
        raise SystemExit(code)
    return out


def factors(model: Any) -> dict[str, Tensor]:
    """Trained parameters by layer and factor, PEFT's prefixes and the adapter's name taken off."""
    return {n.replace("base_model.model.", "").replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}


# --- ways ------------------------------------------------------------------------------------------------------------------------


def prepare(case: Case, folder: Path) -> None:
    """Write down what every way is to start from: the windows of each step, and the factors."""
    from dataclasses import replace

    from safetensors.torch import save_file

    def look(parts: Any) -> None:
        steps = parts.loader.steps_from(0)
        windows = [torch.cat([batch.input_ids_BL for batch in next(steps).micro_batches]) for _ in range(case.steps)]
        torch.save(torch.stack(windows), folder / "batches.pt")
        save_file({n: p.detach().clone() for n, p in factors(parts.model).items()}, str(folder / "adapter.safetensors"))

    alone = replace(case, processes=1, options={}, ways=("plain",))
    run_here(alone, "plain", folder, folder / "prepared", ["--train.max_steps=1"], look)


def by_lora_dist(case: Case, way: str, folder: Path, out: Path, watch: Stopwatch, extra: list[str]) -> dict[str, Any]:
    import lora_dist.engine.train  # noqa: F401  all imports before memory is looked at

    found: dict[str, Any] = {"before": memory_bytes()}

    def look(parts: Any) -> None:
        found["loaded"] = memory_bytes()
        if way == "peft-layer":
            _as_pefts(parts.model)
        elif way == "dense-masked":
            _as_dense_masked(parts.model)
        run = parts.stepper.run

        def timed(*args: Any, **kwargs: Any) -> Any:
            result = run(*args, **kwargs)
            watch.step_ended()
            return result

        parts.stepper.run = timed
        gc.collect()
        forget_peak()

    run_here(case, way, folder, out, extra, look)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["event"] == "train"]
    found["losses"] = [r["loss"] for r in steps]
    shares = [r["mfu"] for r in steps[SKIPPED:] if r.get("mfu") is not None]
    found["mfu"] = statistics.median(shares) if shares else None
    for phase in watch.phases:
        # measured by lora_dist itself, in seconds
        watch.phases[phase] = math.nan if SHARED else sum(r[f"{phase}_time_s"] for r in steps[SKIPPED:])
    return found


def _block_layers(model: Any) -> list[Any]:
    from lora_dist.adapter.layer import BlockLoraLinear

    return [module for module in model.modules() if isinstance(module, BlockLoraLinear)]


def _as_pefts(model: Any) -> None:
    """Every adapted linear computed by PEFT's own class."""
    from peft.tuners.lora.layer import Linear

    layers = _block_layers(model)
    assert layers
    for layer in layers:
        layer.__class__ = Linear


def _as_dense_masked(model: Any) -> None:
    """Every adapted linear computed as y = x (W + mask . sBA)^T, all of it under autograd."""

    def forward(layer: Any, x: Tensor) -> Tensor:
        weight_OI, A_RI, B_OR = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
        update_OI = (B_OR.to(x.dtype) @ A_RI.to(x.dtype)) * layer.scaling["default"] * layer.dense_mask_OI
        return F.linear(x, weight_OI + update_OI)

    layers = _block_layers(model)
    assert layers
    for layer in layers:
        weight = layer.base_layer.weight
        layer.dense_mask_OI = layer.lora_mask["default"].expand(weight.device).to(weight.dtype)
        layer.forward = MethodType(forward, layer)


def by_trainer(case: Case, folder: Path, out: Path, watch: Stopwatch, *, resume: bool) -> dict[str, Any]:
    """As most people write it. The model is held in its precision, bf16 also computes under autocast (`bf16=True`)."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    windows_SBL = torch.load(folder / "batches.pt")
    found: dict[str, Any] = {"before": memory_bytes()}
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    config = LoraConfig(
        r=case.rank, lora_alpha=2 * case.rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    ours = factors(model)
    start = load_file(str(folder / "adapter.safetensors"))
    assert ours.keys() == start.keys(), (sorted(ours)[:3], sorted(start)[:3])
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(start[name])
    rows = [{"input_ids": row, "labels": row} for row in windows_SBL.flatten(0, 1)]

    class Timed(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watch.step_ended()

    class InOrder(Trainer):
        """The windows in their order; forward and backward timed apart."""

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            with watch.phase("forward"):
                return super().compute_loss(*args, **kwargs)

    given = TrainingArguments(
        str(out), max_steps=case.steps, per_device_train_batch_size=case.rows, learning_rate=RATE, lr_scheduler_type="constant",
        bf16=case.precision == "bf16", logging_steps=1, save_strategy="steps", save_steps=case.steps // 2 if resume else 10**6,
        report_to=[], use_cpu=not CUDA, disable_tqdm=True, max_grad_norm=1.0, weight_decay=0.0, seed=42, save_only_model=False,
    )  # fmt: skip
    trainer = InOrder(model, given, train_dataset=rows, callbacks=[Timed()])
    backward = trainer.accelerator.backward

    def timed_backward(*args: Any, **kwargs: Any) -> None:
        with watch.phase("backward"):
            backward(*args, **kwargs)

    trainer.accelerator.backward = timed_backward
    found["loaded"] = memory_bytes()
    gc.collect()
    forget_peak()
    trainer.train(resume_from_checkpoint=(resume and any(out.glob("checkpoint-*"))) or None)
    found["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return found


def main() -> int:
    way, case_file, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    values = json.loads(case_file.read_text())
    case = Case(**{**values, "ways": tuple(values["ways"])})
    if way == "prepare":
        prepare(case, folder)
        return 0
    launched = float(os.environ["BENCH_LAUNCHED"])
    out = Path(os.environ["BENCH_OUT"])
    resume = os.environ.get("BENCH_RESUME") == "1"
    watch = Stopwatch()
    if way == "trainer":
        found = by_trainer(case, folder, out, watch, resume=resume)
    else:
        extra = [f"--train.save_strategy=steps --train.save_steps={case.steps // 2}", "--resume=auto"] if resume else []
        found = by_lora_dist(case, way, folder, out, watch, " ".join(extra).split())
    times = watch.times()
    phases = {name: seconds / max(1, len(times)) for name, seconds in watch.phases.items()}
    median = statistics.median(times) if times else 0.0
    if way == "trainer" and times:
        phases["optimizer"] = max(0.0, sum(times) / len(times) - phases["forward"] - phases["backward"])  # and all between steps
    result = {
        "times_s": times, "step_s": median, "tokens_per_s": case.tokens / median if times else None, "phases_s": phases,
        "peak_bytes": peak_bytes() - found["before"], "loaded_bytes": found["loaded"] - found["before"],
        "first_step_s": watch.first_end_s - launched, "losses": found["losses"],
        "mfu": found.get("mfu"),
    }  # fmt: skip
    rank = os.environ.get("RANK", "0")
    (out.parent / f"{out.name}-rank-{rank}.json").write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
