"""`lora-dist rendezvous`: hold the meeting point of elastic runs until SIGTERM or Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from lora_dist.arguments import RendezvousArgs
from lora_dist.cli.options import Verb, parse


def main(argv: Sequence[str]) -> int:
    args = parse(RendezvousArgs, argv, Verb("lora-dist rendezvous", RendezvousArgs.__doc__ or ""))
    from lora_dist.parallel.meeting import hold_meeting

    signals = (signal.SIGTERM, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # before the server's threads are started, which inherit it
    with hold_meeting(args.port) as port:
        print(f"rendezvous: listening on port {port}; RDZV_ENDPOINT=HOST:{port} launch/torchrun.sh meets here", flush=True)
        signal.sigwait(signals)
    return 0
