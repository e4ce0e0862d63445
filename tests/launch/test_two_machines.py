"""Two network namespaces as two machines: own addresses, own ports, own loopback, a cable between them.

Their common host name resolves to the loopback of either, as on many machines with several networks: whatever finds the other by
name instead of by MASTER_ADDR fails here. Needs root and the `ip` command; the ssh tests need an ssh server and pdsh or Open MPI.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch.start import end, largest_difference, run_together, script_file
from tests.runs import adapter, largest_relative_difference

pytestmark = [pytest.mark.distributed, pytest.mark.long]

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
SSH_PORT = 2222


@dataclass(frozen=True)
class Machine:
    name: str
    address: str

    def command(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *words]


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def machines() -> Iterator[list[Machine]]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None:
        pytest.skip("no ip command (Debian: iproute2)")
    both = [Machine(f"lora-{os.getpid()}-{i}", f"10.97.3.{i}") for i in (1, 2)]
    made = []
    try:
        try:
            for machine in both:
                ip("netns", "add", machine.name)
                made.append(machine)
            a, b = both
            ip("link", "add", "eth0", "netns", a.name, "type", "veth", "peer", "name", "eth0", "netns", b.name)
            for machine in both:
                ip("-n", machine.name, "address", "add", f"{machine.address}/24", "dev", "eth0")
                for link in ("lo", "eth0"):
                    ip("-n", machine.name, "link", "set", link, "up")
        except OSError as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield both
    finally:
        for machine in made:
            ip("netns", "delete", machine.name)


@pytest.mark.parametrize("script", ["torchrun", "deepspeed", "accelerate"])
def test_one_launcher_on_each_machine(script, machines, config, one_process, tmp_path):
    """Nothing but the first machine's address is given: which interface leads there is found."""
    own = {"NPROC": "1", "NNODES": "2", "MASTER_ADDR": machines[0].address}
    command = [script_file(script), "--config", str(config), "--train.output_dir", str(tmp_path / "out")]
    run_together([(m.command(*command), {**own, "NODE_RANK": str(i)}) for i, m in enumerate(machines)], tmp_path)
    assert_same(one_process, tmp_path / "out")


def assert_same(reference: Path, out: Path) -> None:
    losses, tensors = largest_difference(reference, out), largest_relative_difference(adapter(reference), adapter(out))
    print(f"losses differ from one process's by {losses:.1e} relative at most, adapter tensors by {tensors:.1e} of their norm")
    assert losses < 1e-5
    assert tensors < 1e-4


@pytest.fixture(scope="module")
def ssh_config(machines: list[Machine], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An ssh server on each machine, with keys and settings of its own; the client's configuration that leads there."""
    if SSHD is None or shutil.which("ssh") is None:
        pytest.skip("no ssh server (Debian: openssh-server)")
    folder = tmp_path_factory.mktemp("ssh")
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    (folder / "sshd_config").write_text(
        f"Port {SSH_PORT}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nPidFile none\nUsePAM no\n"
        "StrictModes no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
    )
    client = folder / "config"
    client.write_text(
        f"Port {SSH_PORT}\nIdentityFile {folder}/user\nIdentitiesOnly yes\nBatchMode yes\nLogLevel ERROR\n"
        f"StrictHostKeyChecking no\nUserKnownHostsFile {folder}/known_hosts\n"
    )
    # sshd wants a folder under /run: it gets a /run of its own, in the mount namespace that `ip netns exec` makes.
    server = f"mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd && exec {SSHD} -D -e -f {folder}/sshd_config"
    servers = []
    try:
        for machine in machines:
            with (folder / f"{machine.name}.log").open("w") as log:
                servers.append(subprocess.Popen(machine.command("sh", "-c", server), stderr=log))
        for machine in machines:
            wait_for_ssh(machine, client)
        yield client
    finally:
        for process in servers:
            end(process)


def wait_for_ssh(machine: Machine, client: Path) -> None:
    deadline = time.monotonic() + 20
    while True:
        done = subprocess.run(machine.command("ssh", "-F", str(client), machine.address, "true"), capture_output=True, text=True)
        if done.returncode == 0:
            return
        if time.monotonic() > deadline:
            pytest.skip(f"no login over ssh here: {done.stderr.strip()}")
        time.sleep(0.2)


@pytest.mark.parametrize("launcher,program", [("pdsh", "pdsh"), pytest.param("openmpi", "mpirun", marks=pytest.mark.matrix)])
def test_deepspeed_starts_both_machines_from_one(launcher, program, machines, ssh_config, config, one_process, tmp_path):
    """From a hostfile over ssh; signs that a shell would take for its own reach the other machine as they are."""
    if shutil.which(program) is None:
        pytest.skip(f"no {program}")
    hosts, out = tmp_path / "hosts", tmp_path / 'out 50%h $HOME "it\'s" \\ `x`'
    hosts.write_text("".join(f"{machine.address} slots=1\n" for machine in machines))
    own = {"HOSTFILE": str(hosts), "DS_LAUNCHER": launcher, "GLOO_SOCKET_IFNAME": "eth0"}
    if launcher == "pdsh":
        own["PDSH_SSH_ARGS_APPEND"] = f"-F {ssh_config}"
    else:
        own |= {"DS_LAUNCHER_ARGS": f'--allow-run-as-root --mca plm_rsh_agent "ssh -F {ssh_config}"'}
    command = machines[0].command(script_file("deepspeed"), "--config", str(config), "--train.output_dir", str(out))
    (output,) = run_together([(command, own)], tmp_path)
    if launcher == "pdsh":
        assert f"{machines[1].address}: " in output
    assert_same(one_process, out)
