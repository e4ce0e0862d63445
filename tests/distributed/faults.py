"""What hardware, data or a bug may do to a run, done on purpose to the parts of one (`train(..., look=...)`): see `inject`.

As a program, under torchrun: a training run with a fault, as the command would do it. `faults.py FAULT_JSON TRAIN_OPTIONS...`
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from lora_dist.data.loader import StepBatch
from lora_dist.engine.setup import Parts

FOREVER_S = 10_000


class SteppingLoader:
    """The run's loader, which also says which step its caller takes, by its cursor, and can leave batches out or hang."""

    def __init__(self, loader: Any, left_out: set[int], hang_at: int | None):
        self._loader, self._left_out, self._hang_at = loader, left_out, hang_at
        self.cursor, self.forwards = -1, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def steps_from(self, cursor: int) -> Iterator[StepBatch]:
        for batch in self._loader.steps_from(cursor):
            if batch.cursor_after in self._left_out:
                continue
            if batch.cursor_after == self._hang_at:
                time.sleep(FOREVER_S)
            self.cursor, self.forwards = batch.cursor_after, 0
            yield batch


class _LossOnly(torch.autograd.Function):
    """NaN forward, small finite gradients backward: a loss that is not finite over gradients that are."""

    @staticmethod
    def forward(_context: Any, values: torch.Tensor) -> torch.Tensor:
        return values * float("nan")

    @staticmethod
    def backward(_context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gradient, 1e-3)


def inject(parts: Parts, faults: list[dict[str, Any]]) -> None:
    """Each fault: `what`; on which `rank` (default: all); at which `cursors` (`StepBatch.cursor_after`); in which `micro_batch` (0).

    `left_out`: these batches are not in the data. `loss`: activations are NaN. `gradient`: the gradient is NaN, the loss finite.
    `loss only`: the loss is NaN, the gradients finite. `spike`: the logits are much too large. `hang in loading`, `hang in forward`:
    the process sleeps for ever. `stopped`: SIGSTOP. `slow`: every forward pass takes `seconds` more.
    """
    mine = [fault for fault in faults if fault.get("rank", parts.world.rank) == parts.world.rank]
    left_out = {cursor for fault in mine if fault["what"] == "left_out" for cursor in fault["cursors"]}
    hangs = [fault["cursors"][0] for fault in mine if fault["what"] == "hang in loading"]
    loader = SteppingLoader(parts.loader, left_out, hangs[0] if hangs else None)
    parts.loader = loader  # type: ignore[assignment]
    modules = dict(parts.base.model.named_modules())

    def after_forward(module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        if not module.training:
            return None
        forward, loader.forwards = loader.forwards, loader.forwards + 1
        for fault in mine:
            if fault["what"] == "slow":
                time.sleep(fault["seconds"])
            elif loader.cursor in fault.get("cursors", ()) and forward == fault.get("micro_batch", 0):
                return broken(fault["what"], output)
        return None

    modules["lm_head"].register_forward_hook(after_forward)


def broken(what: str, logits: torch.Tensor) -> torch.Tensor | None:
    if what == "loss":
        return logits * float("nan")
    if what == "loss only":
        return _LossOnly.apply(logits)  # type: ignore[no-any-return]
    if what == "gradient":
        logits.register_hook(lambda gradient: gradient * float("nan"))
    if what == "spike":
        return logits * 20
    if what == "hang in forward":
        time.sleep(FOREVER_S)
    if what == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    return None


def main(faults: str, argv: list[str]) -> int:
    from lora_dist.cli.options import parse
    from lora_dist.cli.train import VERB
    from lora_dist.config import RunConfig
    from lora_dist.engine.train import train
    from lora_dist.parallel import close_world, init_world

    world = init_world(device="cpu", always=True)
    try:
        return train(parse(RunConfig, argv, VERB), world, look=lambda parts: inject(parts, json.loads(faults)))
    finally:
        close_world()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
