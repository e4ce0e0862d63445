"""`parallel.*`: how a run is spread over processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lora_dist.config.checks import positive


@dataclass
class ParallelArgs:
    """How the run is spread over processes."""

    strategy: Literal["auto", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "auto"
    """ddp: the base on every process; zero1, zero2: the same, but optimizer (and gradients) sharded; fsdp2, zero3: base sharded too; auto:
    the stage of ds_config, else ddp."""
    ds_config: str | None = None
    """DeepSpeed's JSON for a zero strategy (configs/ds has one of each); its "auto" values are filled in from these options."""
    offload_optimizer: Literal["auto", "none", "cpu", "nvme"] = "auto"
    """zero strategies: where optimizer state is kept; auto: what ds_config says, else none (with the parameters)."""
    offload_param: Literal["auto", "none", "cpu"] = "auto"
    """zero3: where the shards of the base are kept; auto: what ds_config says, else none (on the device)."""
    nvme_path: str | None = None
    """Folder on a fast local disk for what is offloaded to nvme."""
    hybrid_shard: bool = False
    """fsdp2: shard inside a machine only, and keep a copy on each; less traffic between machines, more memory."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Collectives: nccl on GPUs, gloo on CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: GPUs if there are any."""
    timeout_s: float = 1800.0
    """How long a collective waits for the other processes."""
    join_timeout_s: float = 300.0
    """Under torchrun with restarts: how long a process waits for the others to start, before torchrun starts those that are left."""
    peer_timeout_s: float = 15.0
    """Under torchrun with restarts: how long another machine may be silent before the run goes on without it (no power, no network)."""

    def problems(self) -> Iterator[str]:
        yield from positive("parallel", self, "timeout_s", "join_timeout_s", "peer_timeout_s")
        zero = self.strategy in ("auto", "zero1", "zero2", "zero3")
        if self.ds_config is not None and not zero:
            yield f"parallel.ds_config: found {self.ds_config} with strategy {self.strategy}, expected zero1, zero2, zero3 or auto"
        if self.offload_optimizer in ("cpu", "nvme") and (not zero or (self.strategy == "auto" and self.ds_config is None)):
            yield (
                f"parallel.offload_optimizer: found {self.offload_optimizer} with strategy {self.strategy}, "
                "expected zero1, zero2 or zero3"
            )
        if self.offload_param == "cpu" and (
            self.strategy not in ("auto", "zero3") or (self.strategy == "auto" and self.ds_config is None)
        ):
            yield f"parallel.offload_param: found {self.offload_param} with strategy {self.strategy}, expected zero3"
        if self.offload_optimizer == "nvme":
            if self.strategy in ("zero1", "zero2"):
                yield (
                    f"parallel.offload_optimizer: found nvme with strategy {self.strategy}, "
                    "expected zero3 (DeepSpeed has it there only)"
                )
            if self.nvme_path is None and self.ds_config is None:
                yield "parallel.nvme_path: found nothing, expected a folder on a fast local disk for nvme"
        if self.hybrid_shard and self.strategy != "fsdp2":
            yield f"parallel.hybrid_shard: found true with strategy {self.strategy}, expected fsdp2"
