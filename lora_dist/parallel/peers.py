"""Noticing within seconds that another machine has gone without a word.

A process that is killed closes its connections, and the others' collectives fail at once. A machine that loses power, or its network,
closes nothing: a process that waits to receive from it would wait for `parallel.timeout_s`, half an hour. So the kernel is asked to
probe the connections that this process has; one that is not answered fails, and the collective with it. gloo has no such option of its
own. Called by `engine/train.py`.
"""

from __future__ import annotations

import os
import socket
import sys

from lora_dist.parallel.launch import launcher_restarts

PROBES = 5  # sent in the second half of the time, so that one that is lost on its way does no harm


def notice_lost_peers(silent_s: float) -> int:
    """`probe_peers` where a launcher starts the run again on what is left. Elsewhere a run would be lost where it can also wait."""
    return probe_peers(silent_s) if launcher_restarts() else 0


def probe_peers(silent_s: float) -> int:
    """Set keep-alive probes on every TCP connection that this process has now; how many there are. Linux only, elsewhere 0.

    Args:
        silent_s: how long a peer may be silent, whether this process sends or receives.
    """
    if sys.platform != "linux":
        return 0
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                    connection.getpeername()
                    _probe(connection, silent_s)
                    count += 1
        except OSError:  # closed meanwhile, no socket, or one that is not connected
            continue
    return count


def _probe(connection: socket.socket, silent_s: float) -> None:
    tcp = socket.IPPROTO_TCP
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(tcp, socket.TCP_KEEPIDLE, max(1, round(silent_s / 2)))
    connection.setsockopt(tcp, socket.TCP_KEEPINTVL, max(1, round(silent_s / 2 / PROBES)))
    connection.setsockopt(tcp, socket.TCP_KEEPCNT, PROBES)
    connection.setsockopt(tcp, socket.TCP_USER_TIMEOUT, round(1000 * silent_s))  # the same for what was sent and not acknowledged
