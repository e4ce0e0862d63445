"""Keep-alive probes on this process's connections, and only where a launcher would start the run again."""

from __future__ import annotations

import socket

import pytest

from lora_dist.parallel.peers import notice_lost_peers, probe_peers


@pytest.fixture
def connection():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as connection:
        accepted, _ = server.accept()
        with accepted:
            yield connection


def option(connection: socket.socket, level: int, name: int) -> int:
    return connection.getsockopt(level, name)


def test_every_connection_is_probed_and_none_is_closed(connection):
    assert probe_peers(10.0) >= 2  # both ends are this process's; the listening socket is no connection
    assert option(connection, socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
    assert [option(connection, socket.IPPROTO_TCP, name) for name in names] == [5, 1, 5, 10000]
    assert connection.gettimeout() is None
    connection.sendall(b"still open")


def test_without_restarts_a_silent_machine_is_waited_for(connection, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS", raising=False)
    assert notice_lost_peers(10.0) == 0
    assert option(connection, socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert notice_lost_peers(10.0) >= 2
    assert option(connection, socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
