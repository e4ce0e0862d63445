"""Worker processes that a module's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.group import WorkerGroup, WorkerGroups


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerGroups]:
    """By number of processes, each started when it is first asked for."""
    made = WorkerGroups(tmp_path_factory.mktemp("groups"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerGroup]:
    group = WorkerGroup(2, tmp_path_factory.mktemp("groups") / "pair")
    yield group
    group.close()
