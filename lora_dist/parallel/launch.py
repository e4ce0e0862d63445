"""Where a process stands among the others, and the few collectives that rooms above need.

Reads the rank variables that `torchrun`, `accelerate launch` and `deepspeed` set. Every method marked "collective" must be called
by all ranks; each waits for the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from lora_dist.log import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among `size` processes. One process: no process group, and the collectives are the identity."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Collective."""
        if self.size > 1:
            dist.barrier()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Collective: element-wise sum over ranks, in float64. Waits for the device."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def add(self, tensor: torch.Tensor) -> None:
        """Collective: the tensor, on this process's device, becomes the sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def any(self, flag: bool) -> bool:
        """Collective: whether the flag is set on any rank."""
        return self.sum([float(flag)])[0] > 0

    def broadcast(self, value: Any) -> Any:
        """Collective: rank 0's value (picklable) on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """Collective: run `work` on rank 0 only; its result (picklable) is returned on every rank.

        Raises:
            UserError: on every rank, if rank 0 raised one; the others would wait for ever otherwise.
        """
        if self.size == 1:
            return work()
        outcome: tuple[T | None, UserError | None] = (None, None)
        if self.is_main:
            try:
                outcome = (work(), None)
            except UserError as error:
                outcome = (None, error)
        result, problem = self.broadcast(outcome)
        if problem is not None:
            raise problem
        return result

    def once_per_machine(self, work: Callable[[], T]) -> list[T]:
        """Collective: run `work` on one process of each machine; the results (picklable) of all machines, on every rank.

        Raises:
            UserError: on every rank, if any of them raised one.
        """
        result: Any = None
        problem = None
        if self.local_rank == 0:
            try:
                result = work()
            except UserError as error:
                problem = error
        self.agree(problem)
        return [r for local_rank, r in self.gather((self.local_rank, result)) if local_rank == 0]

    def agree(self, problem: UserError | None) -> None:
        """Collective: a problem that any rank has found is raised on every rank; the first rank's, if there are several."""
        for found in self.gather(problem):
            if found is not None:
                raise found

    def gather(self, value: T) -> list[T]:
        """Collective: every rank's value (picklable), by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Collective: the body runs on rank 0 first, then on the others; a `UserError` on any rank is raised on all.

        The body must not be collective.
        """
        if self.size == 1:
            yield
            return
        if not self.is_main:
            problem = self.broadcast(None)
            if problem is not None:
                raise problem
            try:
                yield
            except UserError as error:
                problem = error
            self.agree(problem)
            return
        try:
            yield
        except UserError as error:
            self.broadcast(error)
            raise
        self.broadcast(None)
        self.agree(None)


def _device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("parallel.device: found cuda, but torch sees no GPU (install a CUDA build of torch, or set cpu)")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"parallel.device: local rank {local_rank} has no GPU of its own, found {count}: start at most {count} a machine"
        )
    return torch.device("cuda", local_rank)


def init_world(
    *,
    backend: str = "auto",
    device: str = "auto",
    timeout_s: float = 1800.0,
    join_timeout_s: float | None = None,
    always: bool = False,
) -> World:
    """Join the other processes, if a launcher started several.

    Args:
        backend: gloo, nccl or auto (nccl on GPUs, else gloo).
        device: cpu, cuda or auto.
        timeout_s: how long a collective waits.
        join_timeout_s: how long to wait for the others to start, where a launcher starts again what fails; None: as long.
        always: make a process group for a single process too, which sharded strategies want.

    Raises:
        UserError: a device or backend that this machine does not have.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size)
    where = _device(device, local_rank)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if size > 1 or always:
        backend = ("nccl" if where.type == "cuda" else "gloo") if backend == "auto" else backend
        if backend == "nccl" and where.type != "cuda":
            raise UserError("parallel.backend: found nccl on CPU, expected gloo (or parallel.device cuda)")
        store = HashStore() if size == 1 else _meeting(rank, size, timeout_s, join_timeout_s)  # alone, no address is needed
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s), store=store)
    return World(rank, size, local_rank, local_size, where)


def _meeting(rank: int, size: int, timeout_s: float, join_timeout_s: float | None) -> Store | None:
    """The store that the processes meet at, with all of them there; None: torch makes it, and waits for `timeout_s`.

    A machine that is lost while processes start has no connection yet that could fail: only the time tells.
    """
    if join_timeout_s is None or not launcher_restarts() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        rank == 0,
        timedelta(seconds=min(timeout_s, join_timeout_s)),
        multi_tenant=True,
    )
    store.set_timeout(timedelta(seconds=timeout_s))
    return PrefixStore("default_pg", store)


_named: set[str] = set()


def name_ranks(world: World) -> None:
    """Set RANK, WORLD_SIZE and LOCAL_RANK where no launcher did, for libraries that read nothing else; until `close_world`, lest a
    library that comes later in the same process takes them for a launcher's."""
    for name, value in (("LOCAL_RANK", world.local_rank), ("RANK", world.rank), ("WORLD_SIZE", world.size)):
        if name not in os.environ:
            os.environ[name] = str(value)
            _named.add(name)


def close_world() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    while _named:
        os.environ.pop(_named.pop(), None)


class SideStore:
    """Short texts that processes leave for each other, outside collectives: over a connection of its own, to the store at which they met.
    Any thread may use it, one at a time. Every call waits for the store's host."""

    def __init__(self, store: Store):
        self._store = store

    def set(self, key: str, text: str) -> None:
        self._store.set(key, text)

    def get(self, key: str) -> str | None:
        """None where nobody has set it."""
        return self._store.get(key).decode() if self._store.check([key]) else None


def side_store(world: World, prefix: str) -> SideStore | None:
    """For keys below `prefix`; None for a single process. No collective."""
    if world.size == 1:
        return None
    store: Any = dist.distributed_c10d._get_default_store()
    return SideStore(PrefixStore(prefix, store.clone()))


def launcher_restarts() -> bool:
    """Whether a launcher starts workers that end with another code than 0 again (torchrun with --max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) > 0


_GONE = ("closed by peer", "reset by peer", "timed out", "broken pipe", "connection refused")


def lost_process(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone. gloo raises a plain RuntimeError, recognised by its words."""
    text = str(error).lower()
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError) or (
        "gloo" in text and any(words in text for words in _GONE)
    )
