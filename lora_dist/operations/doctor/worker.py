"""One of the processes that the doctor starts under torchrun: collectives, run, checked and timed, then each strategy on a tiny model.

Started by `processes.py` as `lora-dist doctor --as-worker FOLDER`, so that it ends with its launcher as every worker does. Reads
FOLDER/job.json and appends to FOLDER/rank-N.jsonl: `{"at": ...}` when it begins something, `{"item": ...}` with what came of it (rank 0,
or whichever process failed).
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dist.operations.doctor.report import one_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lora_dist.parallel import Strategy, World

SIZES = {"4 kB": 1_000, "1 MB": 250_000, "16 MB": 4_000_000}
"""float32 elements; the last is about what an adapter's gradients take"""
REPEATS = 5
HIDDEN, LAYERS, VOCABULARY, BLOCK, RANK = 64, 2, 128, 16, 4
ROWS, LENGTH = 2, 32
"""windows a process, tokens a window"""
STEPS = 3
RATE = 1e-2
LAUNCHER_PID = "launcher.pid"
COLLECTIVES = ("barrier", "all_reduce", "broadcast", "all_gather")


@dataclass(frozen=True)
class Job:
    """What all processes are told; travels as JSON."""

    backend: str
    device: str
    timeout_s: float
    collectives: bool
    strategies: list[str]


class Record:
    """This process's file of events."""

    def __init__(self, file: Path):
        self._file = file.open("a", encoding="utf-8")

    def write(self, **event: Any) -> None:
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()


def main(folder: Path, rank: int) -> int:
    """Do the job; 1 where something failed, which ends the group."""
    if os.getppid() != int((folder / LAUNCHER_PID).read_text()):
        return 1  # the launcher ended before the kernel could be asked to end this process with it
    record = Record(folder / f"rank-{rank}.jsonl")
    job = Job(**json.loads((folder / "job.json").read_text()))
    item = f"{job.backend} join"
    try:
        record.write(at=f"{item}: importing")
        from lora_dist.parallel import close_world, init_world

        record.write(at=item)
        start = time.perf_counter()
        # The one that started this process gives up first, and says who is missing.
        world = init_world(backend=job.backend, device=job.device, timeout_s=job.timeout_s + 60, always=True)
        world.barrier()
        if world.is_main:
            record.write(item=item, time_s=time.perf_counter() - start)
        for item, work in _items(job, world):
            record.write(at=item)
            facts = work()
            if world.is_main:
                record.write(item=item, **facts)
        record.write(at="the end")
        close_world()
    except Exception as error:  # whatever it is, it is told with its item, and not as a traceback
        record.write(item=item, rank=rank, problem=one_line(error))
        return 1
    return 0


def _items(job: Job, world: World) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    if job.collectives:
        for name in COLLECTIVES:
            yield f"{job.backend} {name}", lambda name=name: time_collective(name, world)  # type: ignore[misc]
    for name in job.strategies:
        yield name, lambda name=name: try_strategy(name, world)  # type: ignore[misc]


def time_collective(name: str, world: World) -> dict[str, Any]:
    """Collective. Median seconds by size, the slowest process's, of a collective whose result was right each time."""
    if name == "barrier":
        return {"times_s": {"": _median(world.barrier, world)}}
    times = {}
    for size, elements in SIZES.items():
        times[size] = _median(lambda elements=elements: _exchange(name, elements, world), world)  # type: ignore[misc]
    return {"times_s": times, "bytes": {size: 4 * elements for size, elements in SIZES.items()}}


def _median(work: Callable[[], Any], world: World) -> float:
    work()  # connections are made at first use
    times = []
    for _ in range(REPEATS):
        world.barrier()
        start = time.perf_counter()
        work()
        if world.device.type == "cuda":
            import torch

            torch.cuda.synchronize(world.device)
        times.append(time.perf_counter() - start)
    return world.sum([statistics.median(times)])[0] / world.size


def _exchange(name: str, elements: int, world: World) -> None:
    """Collective. Raises ValueError where the result is not what it has to be."""
    import torch
    import torch.distributed as dist

    mine = torch.full((elements,), float(world.rank + 1), device=world.device)
    if name == "all_reduce":
        dist.all_reduce(mine)
        found, expected = mine, [world.size * (world.size + 1) / 2]
    elif name == "broadcast":
        dist.broadcast(mine, src=0)
        found, expected = mine, [1.0]
    else:
        found = torch.empty(world.size * elements, device=world.device)
        dist.all_gather_into_tensor(found, mine)
        expected = [float(rank + 1) for rank in range(world.size)]
    for part, value in zip(found.chunk(len(expected)), expected, strict=True):
        if not bool((part == value).all()):  # a wait for the device
            wrong = part[part != value]
            raise ValueError(f"{name} of {elements} elements gave {float(wrong[0]):g} where {value:g} was expected")


def try_strategy(name: str, world: World) -> dict[str, Any]:
    """Collective. A few steps on a tiny block-sparse model under a strategy that is in force.

    Raises:
        StrategyError: it is not in force.
        ValueError: losses that are not finite or do not fall, or an update on a pruned tile.
    """
    from lora_dist.models.loss import causal_loss_sum

    strategy, ids_BL = wrapped(name, world)
    strategy.check_in_force()
    tokens = world.size * ROWS * (LENGTH - 1)
    losses, times = [], []
    for _ in range(STEPS):
        world.barrier()
        start = time.perf_counter()
        strategy.zero_grad()
        loss = causal_loss_sum(strategy.module, ids_BL, ids_BL) / tokens
        strategy.backward(loss, last=True)
        strategy.update(RATE)
        losses.append(world.sum([float(loss.detach())])[0])
        times.append(time.perf_counter() - start)
    if not all(math.isfinite(loss) for loss in losses):
        raise ValueError(f"found losses {losses}, expected finite ones")
    if not losses[-1] < losses[0]:
        raise ValueError(f"found losses {losses} on the same windows, expected them to fall")
    held = strategy.placement()
    return {"losses": losses, "step_s": min(times[1:]), "base_share": held.base_elements / held.base_elements_total}


def wrapped(name: str, world: World) -> tuple[Strategy, Tensor]:
    """Collective. The tiny model, the same on all processes, under a strategy; and this process's windows."""
    import torch

    from lora_dist.adapter import attach_adapter
    from lora_dist.models.architecture import decoder_layers
    from lora_dist.parallel import AdamWArgs, Replicated

    root, pattern = tiny_base()
    root.to(world.device)
    torch.manual_seed(0)  # the adapter's first values
    model = attach_adapter(root, pattern, r=RANK, lora_alpha=2 * RANK)
    common: dict[str, Any] = {"adamw": AdamWArgs((0.9, 0.999), 1e-8, 0.0), "max_grad_norm": 1.0}
    strategy: Strategy
    if name == "ddp":
        strategy = Replicated(model, world, **common)
    elif name == "fsdp2":
        from lora_dist.parallel.fully_sharded import FullySharded

        strategy = FullySharded(model, root, list(decoder_layers(root)[1]), world, reader=None, **common)
    else:
        strategy = _zero(int(name[-1]), model, world, common)
    windows = torch.randint(3, VOCABULARY, (world.size * ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    return strategy, windows[world.rank * ROWS :][:ROWS].to(world.device)


def tiny_base() -> tuple[Any, Any]:
    """A Llama of two layers, half of its tiles pruned, and its pattern; always the same."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lora_dist.blocks import BlockMask, Pattern, grid
    from lora_dist.models.architecture import prunable_linears
    from lora_dist.models.loading import quiet_transformers

    torch.manual_seed(0)
    with quiet_transformers():
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=HIDDEN,
                intermediate_size=2 * HIDDEN,
                num_hidden_layers=LAYERS,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=VOCABULARY,
                max_position_embeddings=LENGTH,
                initializer_range=0.1,  # as large as in a trained model, so that layers matter
            )
        )
    masks = {}
    for linear in prunable_linears(model):
        shape = (linear.weight_OI.shape[0], linear.weight_OI.shape[1])
        masks[linear.name] = BlockMask(torch.rand(grid(shape, BLOCK)) > 0.5, shape, BLOCK)
        with torch.no_grad():
            linear.weight_OI.masked_fill_(~masks[linear.name].expand(), 0.0)
    return model, Pattern(masks)


def _zero(stage: int, model: nn.Module, world: World, common: dict[str, Any]) -> Strategy:
    import torch

    from lora_dist.models.loss import causal_loss_sum
    from lora_dist.parallel.ds_config import RunFacts, zero_config
    from lora_dist.parallel.zero import Zero

    facts = RunFacts(
        micro_batch=ROWS, accumulation=1, world_size=world.size, max_grad_norm=1.0, bf16=False, fp16=False, learning_rate=RATE,
        betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, warmup_steps=0, max_steps=STEPS, hidden_size=HIDDEN,
    )  # fmt: skip
    config, _ = zero_config(stage, None, facts, offload_optimizer="auto", offload_param="auto", nvme_path=None)

    def smallest_loss(module: nn.Module) -> Tensor:
        ids_BL = torch.zeros((1, 2), dtype=torch.long, device=world.device)
        return causal_loss_sum(module, ids_BL, ids_BL)

    return Zero(model, world, stage=stage, config=config, reader=None, prime=smallest_loss, **common)
