"""`lora-dist rendezvous` as a process: it can be met at, it says when its port is taken, and it ends when asked to."""

from __future__ import annotations

import re
import signal
import subprocess
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from tests.runs import ROOT, command, environment


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_processes_meet_there_until_it_is_stopped(number):
    held = subprocess.Popen(
        command(1, "rendezvous", "--port", "0"), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert held.stdout is not None
        port = int(re.search(r"listening on port (\d+)", held.stdout.readline())[1])  # type: ignore[index]
        for value in ("", "again"):  # the second client finds what the first one left
            client = TCPStore("localhost", port, is_master=False, timeout=timedelta(seconds=10))
            assert client.compare_set("key", value and "first", value or "first").decode() == (value or "first")
            del client
        if number == signal.SIGTERM:
            taken = subprocess.run(
                command(1, "rendezvous", "--port", str(port)), cwd=ROOT, env=environment(), capture_output=True, text=True
            )
            assert taken.returncode == 2
            assert f"port: found {port}, which cannot be listened on" in taken.stderr.splitlines()[-1]
        held.send_signal(number)
        assert held.wait(timeout=10) == 0
    finally:
        held.kill()
        held.wait()
