"""`cvlab ui`: who it answers, how often it builds the list, how many requests it handles at a time."""

import contextlib
import http.client
import socket
import threading
import time

import pytest

from cvlab.api import serve
from cvlab.reports import index
from tests.test_hostile_runs import write


@pytest.fixture
def server(tmp_path):
    write(tmp_path / "20261126-120000-x-0001")
    with serve.Server(tmp_path, 0) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def get(server, address="/", host=None):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)) as connection:
        connection.request("GET", address, headers={} if host is None else {"Host": host})
        response = connection.getresponse()
        return response, response.read().decode()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "localhost:8123", "127.0.0.1:1", "[::1]:80"])
def test_local_hosts_are_answered(server, host):
    assert get(server, host=host)[0].status == 200


@pytest.mark.parametrize(
    "host",
    [
        *(
            "evil.com",
            "evil.com:80",
            "127.0.0.1@evil.com",
            "127.0.0.1:80@evil.com",
            "localhost:x@evil.com",
            "localhost:",
        ),
        *(
            "user@localhost",
            "user:pw@localhost:80",
            "localhost.evil.com",
            "127.0.0.1.evil.com:80",
            "",
            "[::1]x",
            "0.0.0.0",
        ),
        *("localhost:80:80", "127.0.0.1:123456", "localhost/", "LOCALHOST evil"),
    ],
)
def test_other_hosts_are_rejected(server, host):
    assert get(server, host=host)[0].status == 403


@pytest.mark.parametrize("address", ["/", "/missing/", "/20261126-120000-x-0001/"])
def test_no_page_can_be_framed_or_kept(server, address):
    response, _ = get(server, address)
    assert response.headers["X-Frame-Options"] == "DENY"
    assert "frame-ancestors 'none'" in response.headers["Content-Security-Policy"]
    assert response.headers["Cache-Control"] == "no-store"


def test_the_list_is_built_once_a_second(server, monkeypatch):
    calls = []
    runs = index.runs
    monkeypatch.setattr(index, "runs", lambda root: (calls.append(1), runs(root))[1])
    monkeypatch.setattr(serve, "LIST_SECONDS", 1000.0)
    for _ in range(5):
        assert get(server)[0].status == 200
    assert len(calls) == 1
    monkeypatch.setattr(serve, "LIST_SECONDS", 0.0)
    get(server)
    assert len(calls) == 2


def test_requests_beyond_the_limit_are_rejected_at_once_and_idle_ones_end(server, monkeypatch):
    monkeypatch.setattr(serve.Handler, "timeout", 2)
    before = threading.active_count()
    with contextlib.ExitStack() as stack:
        for _ in range(3 * serve.MAX_THREADS):
            stack.enter_context(contextlib.closing(socket.create_connection(("127.0.0.1", server.server_port))))
        time.sleep(0.5)
        assert threading.active_count() - before <= serve.MAX_THREADS
        assert get(server)[0].status == 503
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and get(server)[0].status == 503:
            time.sleep(0.2)
        assert get(server)[0].status == 200


def test_a_fault_of_a_page_is_an_answer(server, monkeypatch):
    monkeypatch.setattr(index, "runs", lambda root: 1 / 0)
    response, text = get(server)
    assert response.status == 500
    assert "ZeroDivisionError" in text
