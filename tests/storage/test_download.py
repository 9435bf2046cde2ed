"""Downloads: resumed, verified, never slow unless the user waits for them, nothing installed after an error."""

import hashlib
import random
import socket
import time

import pytest

from cvlab.errors import DataError
from cvlab.storage import download
from tests.fake_cifar import send, server

CONTENT = random.Random(0).randbytes(700_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(download, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(download, "MEASURE_SECONDS", 0.1)


def fetch(urls, target, wait=False):
    return download.fetch(urls, target, SHA256, len(CONTENT), wait)


def test_a_file_is_downloaded_completely(tmp_path):
    with server(lambda handler: send(handler, CONTENT)) as (url, _):
        path = fetch([f"{url}/a"], tmp_path / "new" / "file")
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_an_interrupted_download_resumes(tmp_path):
    with (
        server(lambda handler: send(handler, CONTENT, cut=300_000)) as (url, _),
        pytest.raises(DataError, match="cut off after 300000 of 700000"),
    ):
        fetch([f"{url}/a"], tmp_path / "file")
    assert not (tmp_path / "file").exists()
    with server(lambda handler: send(handler, CONTENT)) as (url, requests):
        fetch([f"{url}/a"], tmp_path / "file")
    assert requests == [("/a", "bytes=300000-")]
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_server_without_ranges_works(tmp_path):
    (tmp_path / "file.partial").write_bytes(CONTENT[:100_001])
    with server(lambda handler: send(handler, CONTENT, ranges=False)) as (url, _):
        fetch([f"{url}/a"], tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_the_next_source_resumes_an_interrupted_download(tmp_path):
    def respond(handler):
        send(handler, CONTENT, cut=200_000 if handler.path == "/bad" else None)

    with server(respond) as (url, _):
        fetch([f"{url}/bad", f"{url}/good"], tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_altered_bytes_are_removed(tmp_path):
    with (
        server(lambda handler: send(handler, bytes([CONTENT[0] ^ 1]) + CONTENT[1:])) as (url, _),
        pytest.raises(DataError, match="sha256"),
    ):
        fetch([f"{url}/a"], tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_download_without_responses_is_aborted_at_once(tmp_path):
    silent = socket.create_server(("127.0.0.1", 0))
    start_time = time.monotonic()
    with pytest.raises(DataError, match="none of 1 sources answered"):
        fetch([f"http://127.0.0.1:{silent.getsockname()[1]}/a"], tmp_path / "file")
    assert time.monotonic() - start_time < 5
    silent.close()


def send_slowly(handler):
    handler.send_response(200)
    handler.end_headers()
    try:
        for start in range(0, 20_000, 1000):
            handler.wfile.write(CONTENT[start : start + 1000])
            time.sleep(0.05)
    except OSError:
        pass


def test_a_slow_source_is_replaced_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "LONGEST_SECONDS", 5)

    def respond(handler):
        send_slowly(handler) if handler.path == "/slow" else send(handler, CONTENT)

    with server(respond) as (url, _):
        fetch([f"{url}/slow", f"{url}/fast"], tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_data_from_slow_sources_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "LONGEST_SECONDS", 5)
    with server(send_slowly) as (url, _), pytest.raises(download.SlowError, match=r"minutes in all.*are downloaded"):
        fetch([f"{url}/slow"], tmp_path / "file")
    partial = (tmp_path / "file.partial").read_bytes()
    assert partial
    assert CONTENT.startswith(partial)


def test_an_http_error_is_not_a_response(tmp_path):
    with server(lambda handler: handler.send_error(404)) as (url, _), pytest.raises(DataError, match="answered"):
        fetch([f"{url}/a"], tmp_path / "file")


def test_a_redirect_to_http_is_rejected():
    import urllib.error
    import urllib.request

    handler = download._HttpsOnly()
    request = urllib.request.Request("https://example.org/a")
    with pytest.raises(urllib.error.URLError, match="from https to http"):
        handler.redirect_request(request, None, 302, "", {}, "http://example.org/a")
    assert handler.redirect_request(request, None, 302, "", {}, "https://example.org/b") is not None


def test_concurrent_downloads_do_not_mix(tmp_path):
    import fcntl
    import multiprocessing

    partial = tmp_path / "file.partial"
    partial.touch()

    def hold(ready, release):
        with partial.open("ab") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            ready.set()
            release.wait(30)

    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(ready, release))
    holder.start()
    assert ready.wait(30)
    with (
        server(lambda handler: send(handler, CONTENT)) as (url, _),
        pytest.raises(DataError, match="another process is downloading it"),
    ):
        fetch([f"{url}/a"], tmp_path / "file")
    release.set()
    holder.join()


def test_the_lock_is_held_after_a_source_fails(tmp_path):
    import io
    import multiprocessing

    def is_free(path):
        with path.open("ab") as process:
            raise SystemExit(0 if download.try_lock(process.fileno()) else 1)

    partial = tmp_path / "file.partial"
    with download._exclusive(partial) as file:
        with pytest.raises(OSError, match="cut off after 3 of 10 bytes"):
            download._stream(download._Response("url", io.BytesIO(b"abc"), 0), file, 10, wait=False)
        process = multiprocessing.get_context("fork").Process(target=is_free, args=(partial,))
        process.start()
        process.join()
        assert process.exitcode == 1
    assert partial.read_bytes() == b"abc"


def test_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").touch()
    with server(lambda handler: send(handler, CONTENT)) as (url, _), pytest.raises(DataError, match="CVLAB_DATA"):
        fetch([f"{url}/a"], tmp_path / "file" / "x" / "y")
