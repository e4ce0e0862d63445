"""A process of a worker group: joins the others once, then runs one job after another (see `group.py`).

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
from unittest.mock import patch

from lora_dist.process import heavy_imports

with heavy_imports():
    import torch
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    from lora_dist.__main__ import end_with_launcher
    from lora_dist.arguments import EvalArgs, GenerateArgs, MergeArgs, PruneArgs
    from lora_dist.cli.options import Verb, parse
    from lora_dist.cli.train import VERB as TRAIN
    from lora_dist.config import RunConfig
    from lora_dist.engine.base import base_pieces
    from lora_dist.engine.evaluate import evaluate
    from lora_dist.engine.merge import merge
    from lora_dist.engine.open_model import open_model
    from lora_dist.engine.prune import prune_model
    from lora_dist.engine.report import evaluate_models
    from lora_dist.engine.setup import Parts
    from lora_dist.engine.train import train
    from lora_dist.generation import generate
    from lora_dist.log import UserError
    from lora_dist.parallel import World, close_world, init_world
    from tests.distributed.faults import inject

POLL_S = 0.005


def wrapped_facts(parts: Parts) -> dict[str, Any]:
    """What the wrapped model itself says of how it is spread; nothing here asks lora_dist."""
    model, strategy = parts.model, parts.strategy
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    facts: dict[str, Any] = {"strategy": type(strategy).__name__, "frozen": len(frozen), "trainable": len(trainable)}
    teacher = getattr(getattr(parts.task, "lessons", None), "teacher", None)
    if teacher is not None:
        pieces = [p.to_local() if isinstance(p, DTensor) else p for p in teacher.model.parameters()]
        facts["teacher_elements"] = sum(piece.numel() for piece in pieces)
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


def tamper(parts: Parts, how: dict[str, Any]) -> None:
    """Break something on one rank, as hardware or a bug would.

    `weight`: after so many forward passes, write 3.0 into a pruned tile of this rank's own part of a layer.
    `value`: then, add 1 to the last value of this rank's own part of a layer's kept tiles.
    `gradient`: from so many backward passes on, make the gradient behind a layer's output NaN, the loss staying finite.
    """
    if how["rank"] != parts.world.rank:
        return
    module = dict(parts.base.model.named_modules())[how["layer"]]
    passes = 0

    def after_forward(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        nonlocal passes
        passes += 1
        if how["what"] == "gradient" and passes >= how["after"] and output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("nan"))
        if how["what"] == "value" and passes == how["after"]:
            pieces[f"{how['layer']}.values"].tensor.data.view(-1)[-1] += 1.0
        if how["what"] == "weight" and passes == how["after"]:
            piece, mask = pieces[f"{how['layer']}.weight"], parts.guard.pattern[how["layer"]]  # type: ignore[index]
            pruned = ~mask.expand().flatten()[piece.start : piece.start + piece.tensor.numel()]
            piece.tensor.data.view(-1)[int(pruned.nonzero()[how.get("index", 0)])] = 3.0

    pieces = base_pieces(parts.base.model, parts.strategy.piece)
    module.register_forward_hook(after_forward)


def run_train(argv: list[str], job: dict[str, Any], world: World, answer: dict[str, Any]) -> None:
    strategies = []

    def look(parts: Parts) -> None:
        answer["facts"] = wrapped_facts(parts)
        strategies.append(parts.strategy)
        if job.get("tamper"):
            tamper(parts, job["tamper"])
        if job.get("faults"):
            inject(parts, job["faults"])

    answer["code"] = train(parse(RunConfig, argv, TRAIN), world, look=look)
    answer["facts"]["norms"] = strategies[0].trainable_norms()


def run_eval(argv: list[str], job: dict[str, Any], world: World, answer: dict[str, Any]) -> None:
    args = parse(EvalArgs, argv, Verb("eval", "", positionals=("model",)))
    report = evaluate(args, world, lambda batches: lambda: None)
    answer |= {"code": 0, "facts": {"loss": report.result.loss, "tokens": report.result.tokens}}


def run_report(argv: list[str], job: dict[str, Any], world: World, answer: dict[str, Any]) -> None:
    with contextlib.ExitStack() as stack:
        for fault in job.get("faults") or ():  # a function, by its full name, that fails on one rank
            if fault["rank"] == world.rank:
                stack.enter_context(patch(fault["where"], side_effect=OSError("gone here")))
        _report(argv, world, answer)


def _report(argv: list[str], world: World, answer: dict[str, Any]) -> None:
    outcome = evaluate_models(parse(EvalArgs, argv, Verb("eval", "", positionals=("model",))), world)
    answer |= {"code": 0, "facts": {"report": outcome.report, "failed": outcome.failed}}


def run_merge(argv: list[str], job: dict[str, Any], world: World, answer: dict[str, Any]) -> None:
    report = merge(parse(MergeArgs, argv, Verb("merge", "", positionals=("base", "adapter", "out"))), world)
    answer |= {"code": 0, "facts": {"zero_tiles": report.zero_tiles, "errors": [report.logits_error_fp32, report.logits_error]}}


def run_generate(argv: list[str], job: dict[str, Any], world: World, answer: dict[str, Any]) -> None:
    args = parse(GenerateArgs, argv, Verb("generate", "", positionals=("model",)))
    opened = open_model(args.model, args.adapter, world=world, strategy=args.strategy)
    placed = {str(p.placements) if isinstance(p, DTensor) else "whole" for p in opened.base.model.parameters()}
    text = generate(opened.model, opened.base.tokenizer, [args.prompt or ""], args)[0].text
    answer |= {"code": 0, "facts": {"text": text, "placements": sorted(placed)}}


def run_prune(argv: list[str], job: dict[str, Any], world: World, answer: dict[str, Any]) -> None:
    result = prune_model(parse(PruneArgs, argv, Verb("prune", "", positionals=("model", "out"))), world, progress=False)
    answer |= {"code": 0, "facts": {"digest": result.pattern.digest, "windows": result.windows}}


VERBS = {
    "train": run_train,
    "eval": run_eval,
    "report": run_report,
    "merge": run_merge,
    "generate": run_generate,
    "prune": run_prune,
}


def run_job(job: dict[str, Any], world: World) -> dict[str, Any]:
    answer: dict[str, Any] = {"code": None, "error": None, "facts": None}
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            VERBS[job["verb"]](job["argv"], job, world, answer)
        except UserError as error:
            answer |= {"code": 2, "error": str(error)}
        except Exception:
            answer |= {"code": 1, "error": traceback.format_exc()}
    gc.collect()
    gc.freeze()  # modules, and what they keep: the next collection is to look at the next job only
    return {**answer, "output": output.getvalue()}


def main(folder: Path) -> None:
    end_with_launcher()
    world = init_world(device="cpu", always=True)
    number = 0
    while True:
        file = folder / f"job-{number}.json"
        while not file.exists():
            time.sleep(POLL_S)
        job = json.loads(file.read_text())
        if job is None:
            break
        answer = run_job(job, world)
        unfinished = folder / f"job-{number}.rank-{world.rank}.part"
        unfinished.write_text(json.dumps(answer))
        os.rename(unfinished, unfinished.with_suffix(".json"))
        number += 1
    close_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
