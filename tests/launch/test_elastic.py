"""Elastic torchrun: killed workers, lost machines and cut links lead to a restart on what is left, and back (about 3 minutes).

Two network namespaces are the machines; a third is the switch between them and holds the rendezvous. A machine that is killed closes
its connections, as the kernel does for dead processes; one whose link is cut says nothing at all. Needs root and the `ip` command.
The figures of each fault are printed as JSON.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import pytest

from lora_dist.engine.checkpoint import list_checkpoints
from tests.launch.start import end, script_file, variables
from tests.runs import ROOT, adapter, assert_identical, descendants, largest_relative_difference, losses, options, run

pytestmark = [pytest.mark.distributed, pytest.mark.long]

HUB, PORT = "10.97.5.3", 29400
STEPS, WINDOWS = 60, 48
# Quicker than the launcher's own, so that the test is: a machine is given up after 4 s, a silent connection after 4 s.
QUICK = "keep_alive_interval=1,keep_alive_max_attempt=4,last_call_timeout=3"
RESUMED = re.compile(r"Resuming from \S+ at step (\d+) \((\d+) process")


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@dataclass
class Machine:
    """A namespace with a cable to the switch, and the torchrun that was started in it last."""

    name: str
    address: str
    hub: str
    agent: subprocess.Popen | None = None

    @property
    def port(self) -> str:
        """The switch's end of the cable."""
        return f"to{self.address[-1]}"

    def start(self, argv: list[str], log: Path, **own: str) -> None:
        command = ["ip", "netns", "exec", self.name, script_file("torchrun"), *argv]
        with log.open("a") as file:
            self.agent = subprocess.Popen(command, env=variables(**own), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)

    def kill(self) -> None:
        """Agent and workers at once."""
        if self.agent is not None:
            end(self.agent)

    def cut(self) -> None:
        """Nothing gets through the switch any more; the cable itself stays plugged in."""
        ip("-n", self.hub, "link", "set", self.port, "nomaster")

    def heal(self) -> None:
        ip("-n", self.hub, "link", "set", self.port, "master", "switch")

    def workers(self) -> list[int]:
        """Ranks of the workers that live here."""
        ranks = []
        for pid in descendants(self.agent.pid) if self.agent is not None else []:
            try:
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE and "RANK" in (environ := process.environ()):
                    ranks.append(int(environ["RANK"]))
            except psutil.NoSuchProcess:
                continue
        return sorted(ranks)


@dataclass
class Network:
    machines: list[Machine]
    rendezvous: subprocess.Popen
    starts: int = 0


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None:
        pytest.skip("no ip command (Debian: iproute2)")
    hub = f"lora-hub-{os.getpid()}"
    machines = [Machine(f"lora-el-{os.getpid()}-{i}", f"10.97.5.{i}", hub) for i in (1, 2)]
    made, rendezvous = [], None
    try:
        try:
            for name in (hub, *(m.name for m in machines)):
                ip("netns", "add", name)
                made.append(name)
                ip("-n", name, "link", "set", "lo", "up")
            ip("-n", hub, "link", "add", "switch", "type", "bridge")
            ip("-n", hub, "address", "add", f"{HUB}/24", "dev", "switch")
            ip("-n", hub, "link", "set", "switch", "up")
            for m in machines:
                ip("link", "add", "eth0", "netns", m.name, "type", "veth", "peer", "name", m.port, "netns", hub)
                ip("-n", m.name, "address", "add", f"{m.address}/24", "dev", "eth0")
                ip("-n", m.name, "link", "set", "eth0", "up")
                m.heal()
                ip("-n", hub, "link", "set", m.port, "up")
        except OSError as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        command = ["ip", "netns", "exec", hub, sys.executable, "-m", "lora_dist", "rendezvous", "--port", str(PORT)]
        rendezvous = subprocess.Popen(command, cwd=ROOT, env=variables(), stdout=subprocess.PIPE, text=True)
        assert rendezvous.stdout is not None
        assert f"port {PORT}" in rendezvous.stdout.readline()
        yield Network(machines, rendezvous)
    finally:
        for m in machines:
            m.kill()
        if rendezvous is not None:
            end(rendezvous)
        for name in made:
            ip("netns", "delete", name)


@dataclass
class Fault:
    """What one event cost."""

    what: str
    last_step: int
    resumed_from: int
    processes: int
    steps_lost: int
    pause_s: float
    """from the last step before to the first step after"""


@dataclass
class Elastic:
    """A run on two machines, watched through its run folder."""

    network: Network
    out: Path
    argv: list[str]
    folder: Path
    faults: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.network.starts += 1
        self.own = {
            "NPROC": "1",
            "NNODES": "1:2",
            "MAX_RESTARTS": "3",
            "RDZV_ENDPOINT": f"{HUB}:{PORT}",
            "RDZV_ID": f"run{self.network.starts}",
            "RDZV_CONF": QUICK,
        }

    def start(self, machine: Machine) -> None:
        machine.start(self.argv, self.folder / f"{machine.address}.log", **self.own)

    def step(self) -> int:
        """The last one that was logged."""
        return max(losses(self.out), default=0)

    def resumes(self) -> list[tuple[int, int]]:
        """(step, processes) of each start that went on from a checkpoint."""
        log = self.out / "train.log"
        return [(int(step), int(n)) for step, n in RESUMED.findall(log.read_text())] if log.exists() else []

    def until(self, condition: Callable[[], bool], timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                logs = [f"== {file.name}\n{file.read_text()[-3000:]}" for file in sorted(self.folder.glob("10.*.log"))]
                raise AssertionError("\n".join([f"waited {timeout_s} s at step {self.step()}, {self.resumes()}", *logs]))
            time.sleep(0.05)

    def after(self, what: str, event: Callable[[], object], processes: int) -> Fault:
        """Cause something, and wait for the first step of the workers that are started for it."""
        starts, last = len(self.resumes()), (self.step(), time.monotonic())
        event()

        def started() -> bool:
            nonlocal last
            if (step := self.step()) > last[0]:
                last = step, time.monotonic()
            return len(self.resumes()) > starts

        self.until(started)
        resumed, count = self.resumes()[-1]
        assert count == processes
        self.until(lambda: self.step() > resumed)
        fault = Fault(what, last[0], resumed, count, last[0] - resumed, round(time.monotonic() - last[1], 1))
        print(json.dumps(asdict(fault)))
        self.faults.append(fault)
        return fault

    def finish(self) -> list[int]:
        agents = [m.agent for m in self.network.machines if m.agent is not None]
        self.until(lambda: all(agent.poll() is not None for agent in agents), timeout_s=300)
        return [agent.returncode for agent in agents]


@pytest.fixture
def elastic(network, tiny_base, tiny_text, tmp_path) -> Iterator[Elastic]:
    own: dict[str, object] = {"per_device_train_batch_size": 1, "save_steps": 5, "parallel__peer_timeout_s": 4}
    argv = arguments(tiny_base, tiny_text, tmp_path / "out", **own)
    yield Elastic(network, tmp_path / "out", [*argv, "--resume=auto"], tmp_path)
    for machine in network.machines:
        machine.kill()
        machine.heal()
        machine.agent = None


def arguments(base: Path, text: Path, out: Path, **train: object) -> list[str]:
    values: dict[str, object] = {
        "adapter__lora_dropout": 0,
        "max_steps": STEPS,
        "global_batch_size": WINDOWS,
        "warmup_ratio": 0.1,
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "save_total_limit": 2,
    }
    return options(base, text, out, **{**values, **train})


@pytest.fixture(scope="module")
def uninterrupted(tiny_base, tiny_text, tmp_path_factory) -> Path:
    """The same batches on one process, all windows of a step at once."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    run(1, "train", *arguments(tiny_base, tiny_text, out, per_device_train_batch_size=WINDOWS, save_strategy="no"))
    return out


def assert_equal(reference: Path, other: Path) -> None:
    a, b = losses(reference), losses(other)  # which fails where a step stands twice
    assert list(a) == list(b) == list(range(1, STEPS + 1))
    worst = max(abs(b[step] - a[step]) / a[step] for step in a)
    difference = largest_relative_difference(adapter(reference), adapter(other))
    print(f"losses differ by {worst:.1e} relative at most, adapter tensors by {difference:.1e} of their norm")
    assert worst < 1e-5
    assert difference < 1e-4


@pytest.mark.parametrize(
    ("killed", "cut", "strategy", "waits"),
    [
        (1, 0, "ddp", False),
        *(pytest.param(0, 1, name, name == "ddp", marks=pytest.mark.matrix) for name in ("ddp", "fsdp2", "zero3")),
    ],
)
def test_either_machine_is_lost_and_comes_back(killed, cut, strategy, waits, elastic, uninterrupted):
    """One is killed and started anew, then the other one's link is cut and mended: two processes, one, two, one, two.

    What was cut off is started anew as well, unless it `waits` to join again by itself, for which TCP takes its time.
    """
    machines = elastic.network.machines
    elastic.argv.append(f"--parallel.strategy={strategy}")
    for machine in machines:
        elastic.start(machine)
    elastic.until(lambda: elastic.step() >= 7)
    assert [machine.workers() for machine in machines] == [[0], [1]]  # the first one's process writes

    fault = elastic.after("killed", machines[killed].kill, processes=1)
    assert 0 <= fault.steps_lost <= 5
    elastic.until(lambda: elastic.step() >= fault.resumed_from + 2)
    back = elastic.after("started anew", lambda: elastic.start(machines[killed]), processes=2)
    assert back.steps_lost == 0  # asked to stop for the newcomer, the workers save first
    elastic.until(lambda: elastic.step() >= back.resumed_from + 2)

    fault = elastic.after("cut off", machines[cut].cut, processes=1)
    assert 0 <= fault.steps_lost <= 7  # where the last save was still under way
    assert machines[cut].workers() == []  # no half of the run goes on by itself, though one machine would be enough
    assert machines[1 - cut].workers() == [0]
    elastic.until(lambda: elastic.step() >= fault.resumed_from + 2)
    assert machines[cut].workers() == []
    if waits:
        back = elastic.after("mended", machines[cut].heal, processes=2)
    else:
        machines[cut].kill()
        machines[cut].heal()
        back = elastic.after("mended and started anew", lambda: elastic.start(machines[cut]), processes=2)
    assert back.steps_lost == 0

    assert elastic.finish() == [0, 0]
    assert [n for _, n in elastic.resumes()] == [1, 2, 1, 2]
    assert_equal(uninterrupted, elastic.out)


@pytest.mark.matrix
@pytest.mark.parametrize("asked", [0, 1])
def test_a_machine_that_is_asked_to_end_costs_no_step(asked, elastic, uninterrupted):
    """As before a preemption: SIGTERM to one torchrun. All save; the other machine goes on alone."""
    machines = elastic.network.machines
    for machine in machines:
        elastic.start(machine)
    elastic.until(lambda: elastic.step() >= 7)
    agent = machines[asked].agent
    fault = elastic.after("asked to end", lambda: agent.send_signal(signal.SIGTERM), processes=1)
    assert fault.steps_lost == 0
    assert agent.wait(timeout=60) == 1
    assert elastic.finish()[1 - asked] == 0
    assert_equal(uninterrupted, elastic.out)


@pytest.mark.matrix
def test_a_machine_that_is_lost_while_processes_start(elastic, uninterrupted):
    """The other one has no connection to it yet that could fail, and starts again when it has waited long enough."""
    machines = elastic.network.machines
    elastic.argv.append("--parallel.join_timeout_s=20")
    for machine in machines:
        elastic.start(machine)
    elastic.until(lambda: machines[1].workers() == [1])
    machines[1].kill()
    assert elastic.step() == 0
    elastic.until(lambda: elastic.step() > 0)
    assert machines[0].workers() == [0]
    assert elastic.finish()[0] == 0
    assert_equal(uninterrupted, elastic.out)


@pytest.mark.matrix
def test_a_run_that_loses_its_rendezvous_saves_and_ends(elastic, uninterrupted):
    """No machine can tell whether it is the one that was cut off: each ends, with a checkpoint, and can be started again."""
    for machine in elastic.network.machines:
        elastic.start(machine)
    elastic.until(lambda: elastic.step() >= 7)
    end(elastic.network.rendezvous)
    assert elastic.finish() == [1, 1]
    saved = max(step for step, _ in list_checkpoints(elastic.out))
    assert saved == elastic.step()
    run(1, "train", *elastic.argv, "--train.per_device_train_batch_size", str(WINDOWS))
    assert_equal(uninterrupted, elastic.out)


def test_a_killed_worker_on_one_machine_leads_to_a_restart(tiny_base, tiny_text, tmp_path):
    """Of two, at a random step: the same result bit for bit, with dropout."""
    draw = random.Random(seed := random.randrange(2**31))
    rank, step = draw.randrange(2), draw.randrange(6, 14)
    print(f"seed {seed}: rank {rank} at step {step}")
    own: dict[str, object] = {"max_steps": 20, "global_batch_size": 16, "adapter__lora_dropout": 0.1, "save_steps": 5}
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(2, "train", *arguments(tiny_base, tiny_text, whole, **own))
    command = [script_file("torchrun"), *arguments(tiny_base, tiny_text, out, **own), "--resume=auto"]
    with (tmp_path / "log").open("w") as log:
        agent = subprocess.Popen(
            command, env=variables(NPROC="2", MAX_RESTARTS="3"), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 120
        while max(losses(out), default=0) < step and time.monotonic() < deadline:
            time.sleep(0.005)
        workers = {int(psutil.Process(pid).environ().get("RANK", -1)): pid for pid in descendants(agent.pid)}
        os.kill(workers[rank], signal.SIGKILL)
        assert agent.wait(timeout=120) == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        end(agent)
    assert len(RESUMED.findall((out / "train.log").read_text())) == 1
    assert_identical(whole, out)
