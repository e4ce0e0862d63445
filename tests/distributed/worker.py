"""A process of a worker group: joins the others once, then runs one training job after another (see `group.py`).

Started by torchrun. Jobs are files `job-N.json` in the folder given; each process answers with `job-N.rank-R.json`.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lora_dist.__main__ import end_with_launcher
from lora_dist.cli.options import parse
from lora_dist.cli.train import VERB
from lora_dist.config import RunConfig
from lora_dist.engine.setup import Parts
from lora_dist.engine.train import train
from lora_dist.log import UserError
from lora_dist.parallel import World, close_world, init_world

POLL_S = 0.005


def wrapped_facts(parts: Parts) -> dict[str, Any]:
    """What the wrapped model itself says of how it is spread; nothing here asks lora_dist."""
    model, strategy = parts.model, parts.strategy
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    facts: dict[str, Any] = {"strategy": type(strategy).__name__, "frozen": len(frozen), "trainable": len(trainable)}
    engine = getattr(strategy, "engine", None)
    if engine is not None:
        zero = engine.optimizer
        facts |= {
            "engine": f"{type(engine).__module__}.{type(engine).__name__}",
            "stage": engine.zero_optimization_stage(),
            "optimizer": type(zero).__name__,
            "gradient_partitions": bool(getattr(zero, "partition_gradients", engine.zero_optimization_stage() == 3)),
            "offload_optimizer": bool(getattr(zero, "offload_optimizer", False) or getattr(zero, "cpu_offload", False)),
            "offload_param": bool(getattr(zero, "offload_param", False)),
            "state_elements": sum(state["exp_avg"].numel() for state in zero.optimizer.state.values() if "exp_avg" in state),
        }
    if engine is not None and engine.zero_optimization_stage() == 3:
        facts["base_elements"] = sum(p.ds_tensor.numel() for p in frozen.values())
        facts["base_bytes"] = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in frozen.values())
        facts["whole_elements"] = sum(p.numel() for p in frozen.values())  # what is gathered right now
        facts["trainable_elements"] = sum(p.ds_tensor.numel() for p in trainable.values())
    else:
        local = {n: p.to_local() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
        facts["placements"] = sorted({str(p.placements) if isinstance(p, DTensor) else "whole" for p in model.parameters()})
        facts["units"] = sum(isinstance(m, FSDPModule) for m in model.modules())
        facts["base_elements"] = sum(local[n].numel() for n in frozen)
        facts["base_bytes"] = sum(local[n].untyped_storage().nbytes() for n in frozen)
        facts["trainable_elements"] = sum(local[n].numel() for n in trainable)
    return facts


def run_job(argv: list[str], world: World) -> dict[str, Any]:
    answer: dict[str, Any] = {"code": None, "error": None, "facts": None, "base_total": None}
    output = io.StringIO()

    def look(parts: Parts) -> None:
        answer["facts"] = wrapped_facts(parts)

    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            config = parse(RunConfig, argv, VERB)
            answer["code"] = train(config, world, look=look)
        except UserError as error:
            answer |= {"code": 2, "error": str(error)}
        except Exception:
            answer |= {"code": 1, "error": traceback.format_exc()}
    gc.collect()
    return {**answer, "output": output.getvalue()}


def main(folder: Path) -> None:
    end_with_launcher()
    world = init_world(device="cpu", always=True)
    number = 0
    while True:
        job = folder / f"job-{number}.json"
        while not job.exists():
            time.sleep(POLL_S)
        argv = json.loads(job.read_text())
        if argv is None:
            break
        answer = run_job(argv, world)
        unfinished = folder / f"job-{number}.rank-{world.rank}.part"
        unfinished.write_text(json.dumps(answer))
        os.rename(unfinished, unfinished.with_suffix(".json"))
        torch.manual_seed(0)
        number += 1
    close_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
