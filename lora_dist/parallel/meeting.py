"""The store at which the machines of an elastic run meet, held by a process of its own.

torchrun's machines agree through one key-value store on who takes part in a round. Held by one of them, it dies with that machine,
and the run with it; held outside, any of them may be lost. All that the store keeps is small and of the current rounds; runs are
told apart by `--rdzv-id`. Called by `cli/rendezvous.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch._C._distributed_c10d import TCPStore

from lora_dist.log import UserError


@contextmanager
def hold_meeting(port: int) -> Iterator[int]:
    """Listen on all addresses of this machine within the block; gives the port.

    Args:
        port: 0 for one that is free.

    Raises:
        UserError: the port is taken or not allowed.
    """
    try:
        store = TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"port: found {port}, which cannot be listened on ({reason}), expected a free one") from error
    yield store.port
    del store
