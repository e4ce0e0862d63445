"""Worker processes that all modules of a pytest process share: starting them costs more than most of their jobs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.group import WorkerGroup, WorkerGroups


@pytest.fixture(scope="session")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerGroups]:
    """By number of processes, each started when it is first asked for."""
    made = WorkerGroups(tmp_path_factory.mktemp("groups"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def pair(groups: WorkerGroups) -> WorkerGroup:
    return groups[2]
