"""What srun's variables are read as. Real srun: tests/cluster."""

from __future__ import annotations

import pytest

from lora_dist.log import UserError
from lora_dist.parallel.slurm import adopt_step, first_host, job_end_time_s, job_ids, port, tasks_here

# As Slurm 22.05 sets them for the third of three tasks on two nodes.
STEP = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "localhost,other",
}


def test_a_task_learns_its_place() -> None:
    environ = dict(STEP)
    assert adopt_step(environ)
    assert {name: environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")} == {
        "RANK": "2",
        "WORLD_SIZE": "3",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
    }
    assert int(environ["MASTER_PORT"]) == port(STEP)
    assert environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_what_is_given_stays() -> None:
    environ = {**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4711", "GLOO_SOCKET_IFNAME": "eth7"}
    assert adopt_step(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"], environ["GLOO_SOCKET_IFNAME"]) == ("10.0.0.1", "4711", "eth7")


@pytest.mark.parametrize(
    "change",
    [
        {"RANK": "0"},  # torchrun inside srun
        {"SLURM_STEP_ID": None},  # a batch script
        {"SLURM_STEP_NUM_TASKS": "1"},  # the shell of salloc, in an allocation of several tasks
        {"SLURM_PROCID": None},
    ],
)
def test_what_is_no_task_of_several_stays_as_it_is(change: dict[str, str | None]) -> None:
    environ = {name: value for name, value in {**STEP, **change}.items() if value is not None}
    before = dict(environ)
    assert not adopt_step(environ)
    assert environ == before


def test_a_first_node_without_an_address_is_said() -> None:
    with pytest.raises(
        UserError, match=r"MASTER_ADDR: found nothing, and SLURM_STEP_NODELIST begins with 'no-such-node07\.invalid'"
    ):
        adopt_step({**STEP, "SLURM_STEP_NODELIST": "no-such-node[07-09].invalid"})


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("login,gpu[1-2]", "login"),
        ("rack[2,4]-node[10-19]", "rack2-node10"),
        ("node[3-4].cluster.example", "node3.cluster.example"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_list(nodelist: str, first: str) -> None:
    assert first_host(nodelist) == first


@pytest.mark.parametrize(("text", "counts"), [("4(x2),3", [4, 4, 3]), ("2", [2]), ("1,8(x3)", [1, 8, 8, 8])])
def test_tasks_on_each_node(text: str, counts: list[int]) -> None:
    for node, count in enumerate(counts):
        assert tasks_here({"SLURM_STEP_TASKS_PER_NODE": text, "SLURM_NODEID": str(node)}, 99) == count


def test_jobs_and_steps_differ_in_their_port() -> None:
    ports = {port({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}) for job in range(900, 1000) for step in range(7)}
    assert len(ports) == 700
    assert all(1024 < p < 32768 for p in ports)


def test_ids_and_end_time_are_of_a_job_only() -> None:
    inside = {"SLURM_JOB_ID": "41", "SLURM_RESTART_COUNT": "2", "SLURM_JOB_END_TIME": "1700000000"}
    assert job_ids(inside) == {"SLURM_JOB_ID": "41", "SLURM_RESTART_COUNT": "2"}
    assert job_end_time_s(inside) == 1.7e9
    assert job_end_time_s({**inside, "SLURM_JOB_END_TIME": "0"}) is None  # no limit
    assert job_end_time_s({"SLURM_JOB_END_TIME": "1700000000"}) is None
    assert job_ids({"SLURM_RESTART_COUNT": "2"}) == {}
