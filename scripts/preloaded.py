#!/usr/bin/env python
"""Training processes that start in a moment: forked from one that has imported everything, each a rank of its own.

Importing torch, transformers and peft takes most of the time that a small run lives; a program that starts hundreds of them
(scripts/fuzz_kills.py) pays for it once. `Parent` starts this file as a process that imports and then forks a child a rank at each
request; the child sets the variables of a launcher and runs the command `lora-dist`, to its real exit code. What is forked is a
single thread without process group, GPU or open file of a run: `serve` refuses to go on otherwise. Linux only.

The protocol is one JSON object a line, requests on stdin, answers on stdout: {"id", "rank", "env", "argv", "output", "aim"} is
answered by {"id", "pid"} at once and {"id", "exit"} at the end; exit is negative for a signal. Nothing outlives the caller: the kernel
ends this process with its caller, and the ranks with this process.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dist.process import end_with_parent

ALWAYS = ("lora_dist.cli.train", "lora_dist.engine.train", "transformers.models.llama.modeling_llama", "jsonargparse")
START_S = 180
QUIET = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's allocator starts one as it is imported
    "TOKENIZERS_PARALLELISM": "false",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DS_ACCELERATOR": "cpu",
}
"""what keeps the imports to one thread, for ranks that are forked and for those that a launcher starts"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- the caller's side --------------------------------------------------------------------------------------------------------


@dataclass
class Rank:
    """A process that was forked. Its session has its own id, so that its children can be found."""

    number: int
    pid: int
    code: int | None = None
    """exit code once it ended; negative: the signal"""


class Parent:
    """The process that ranks are forked from.

    Args:
        modules: what it imports besides `ALWAYS`.

    Raises:
        RuntimeError: it ended or said nothing for `START_S` seconds.
    """

    def __init__(self, modules: Sequence[str] = ()):
        self._ranks: dict[int, Rank] = {}
        self._buffer = b""
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *ALWAYS, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **QUIET},
        )
        self._next(START_S)  # ready

    def fileno(self) -> int:
        """For `select`: readable when a rank has ended (`collect`)."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def start(
        self, rank: int, argv: Sequence[str], *, env: Mapping[str, str], output: Path, aim: Mapping[str, Any] | None = None
    ) -> Rank:
        """Fork one rank that runs `lora-dist argv`, its stdout and stderr appended to `output`. `aim`: see `kill_moments.arm`."""
        assert self._process.stdin is not None
        number = len(self._ranks)
        request = {"id": number, "env": dict(env), "argv": list(argv), "output": str(output), "aim": aim}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        self._ranks[number] = Rank(rank, 0)
        while not self._ranks[number].pid:
            self._take(self._next(START_S))
        return self._ranks[number]

    def collect(self) -> None:
        """Take note of the ranks that have ended. Does not wait."""
        while b"\n" in self._buffer or select.select([self], [], [], 0)[0]:
            self._take(self._next(START_S))

    def _take(self, answer: Mapping[str, Any]) -> None:
        rank = self._ranks[answer["id"]]
        rank.pid, rank.code = answer.get("pid", rank.pid), answer.get("exit", rank.code)

    def _next(self, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            ready = select.select([self], [], [], max(0.0, deadline - time.monotonic()))[0]
            data = os.read(self.fileno(), 65536) if ready else b""
            if not data:
                raise RuntimeError(
                    f"the process that ranks are forked from {'ended' if ready else f'is silent for {timeout_s} s'}"
                )
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    def close(self) -> None:
        """End it, and with it every rank that still runs."""
        self._process.kill()
        self._process.wait()


# --- the process's own side ---------------------------------------------------------------------------------------------------


def require_one_thread() -> None:
    """A thread that holds a lock while the process forks would leave it locked in the child for ever."""
    names = [(Path("/proc/self/task") / task / "comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    if len(names) != 1:
        raise SystemExit(f"preloaded: found threads {', '.join(names)} before the fork, expected one")


def serve(modules: Sequence[str]) -> int:
    """Import, then fork at each request until stdin ends. In the child: the command's exit code."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for name in modules:
        importlib.import_module(name)
    require_one_thread()
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    running: dict[int, tuple[int, int]] = {}
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    answer(ready=True)
    while True:
        watched: list[Any] = [requests, *running]
        ready = select.select(watched, [], [])[0]
        for ended in running.keys() & set(ready):
            number, pid = running.pop(ended)
            os.close(ended)
            answer(id=number, exit=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        if requests in ready:
            line = requests.readline()
            if not line:
                return 0
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                for handle in (answers, requests, *map(os.fdopen, running)):
                    handle.close()
                return become_rank(request)
            running[os.pidfd_open(pid)] = (request["id"], pid)
            answer(id=request["id"], pid=pid)


def become_rank(request: Mapping[str, Any]) -> int:
    """In the forked child: leave what belongs to the parent, and run the command."""
    os.setsid()
    end_with_parent()
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.update(request["env"])
    if request["aim"] is not None:
        import kill_moments

        kill_moments.arm(**request["aim"])
    from lora_dist.__main__ import main

    return main(request["argv"])


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:]))
