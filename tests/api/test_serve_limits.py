"""`cvlab ui`: the hosts that it accepts, how often it builds the index, how many requests it handles at a time."""

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
    with serve.Server(tmp_path, 0) as instance:
        threading.Thread(target=instance.serve_forever, args=(0.01,), daemon=True).start()
        yield instance
        instance.shutdown()


def get(server, address="/", host=None):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)) as connection:
        connection.request("GET", address, headers={} if host is None else {"Host": host})
        response = connection.getresponse()
        return response, response.read().decode()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "localhost:8123", "127.0.0.1:1", "[::1]:80"])
def test_local_hosts_are_accepted(server, host):
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
def test_no_page_can_be_framed_or_cached(server, address):
    response, _ = get(server, address)
    assert response.headers["X-Frame-Options"] == "DENY"
    assert "frame-ancestors 'none'" in response.headers["Content-Security-Policy"]
    assert response.headers["Cache-Control"] == "no-store"


def test_the_index_is_built_once_a_second(server, monkeypatch):
    calls = []
    runs = index.runs
    monkeypatch.setattr(index, "runs", lambda *args: (calls.append(1), runs(*args))[1])
    monkeypatch.setattr(serve, "LIST_SECONDS", 1000.0)
    for _ in range(5):
        assert get(server)[0].status == 200
    assert len(calls) == 1
    monkeypatch.setattr(serve, "LIST_SECONDS", 0.0)
    get(server)
    assert len(calls) == 2


def connect(server, stack, count):
    for _ in range(count):
        stack.enter_context(contextlib.closing(socket.create_connection(("127.0.0.1", server.server_port))))


def test_requests_beyond_the_limit_are_rejected(server, monkeypatch):
    monkeypatch.setattr(serve.Handler, "timeout", 600)  # no idle connection ends within this test
    before = threading.active_count()
    with contextlib.ExitStack() as stack:
        connect(server, stack, 3 * serve.MAX_THREADS)
        # Connections are accepted in order, so the server holds all of the above when it answers this request.
        assert get(server)[0].status == 503
        assert threading.active_count() - before <= serve.MAX_THREADS


def test_idle_connections_are_closed(server, monkeypatch):
    monkeypatch.setattr(serve.Handler, "timeout", 0.5)
    with contextlib.ExitStack() as stack:
        connect(server, stack, serve.MAX_THREADS)
        deadline = time.monotonic() + 60
        while get(server)[0].status == 503:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_an_exception_in_a_page_is_a_500_response(server, monkeypatch):
    monkeypatch.setattr(index, "runs", lambda *_: 1 / 0)
    response, text = get(server)
    assert response.status == 500
    assert "ZeroDivisionError" in text
