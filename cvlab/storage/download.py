"""Downloads from several mirrors: resumable, verified, complete or not at all, and never slow without being asked for.

All sources are contacted at once; if none answers within 5 s the download is given up. A source that would take longer
than 10 minutes is left for the next one; all sources have the same bytes, so the next one resumes at the same offset.
With `wait` a slow source is waited for.
"""

import contextlib
import hashlib
import http.client
import os
import queue
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from cvlab import __version__, console
from cvlab.errors import DataError
from cvlab.portability import replace, try_lock
from cvlab.storage import atomic

ANSWER_SECONDS = 5.0
STALL_SECONDS = 30.0  # longest pause of a source with `wait`, else ANSWER_SECONDS
MEASURE_SECONDS = 4.0
LONGEST_SECONDS = 600.0
REPORT_SECONDS = 2.0
CHUNK_BYTES = 128 * 1024
HINT = "try again later, or get a copy elsewhere and give it with `--from FILE`"
FAILURES = (OSError, http.client.HTTPException, ValueError)


class SlowError(DataError):
    """No source is fast enough, and `wait` is not set."""


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not from https to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise urllib.error.URLError(f"redirected from https to {newurl[:80]}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@dataclass
class _Response:
    """An open connection; `offset` is where its bytes start in the file."""

    url: str
    body: Any
    offset: int


def fetch(urls: Sequence[str], target: Path, checksum: str, size: int, wait: bool) -> Path:
    """Download a file unless it exists.

    Args:
        urls: Sources of the same file.
        target: Where to put it.
        checksum: Its checksum, as `verify` takes it.
        size: Its size in bytes.
        wait: Wait for slow sources.

    Returns:
        `target`.

    Raises:
        SlowError: No source is fast enough.
        DataError: No source has it, or it differs from the checksum.
    """
    if target.is_file():
        verify(target, checksum)
        return target
    partial = target.with_name(f"{target.name}.partial")
    _receive(urls, partial, size, wait)
    try:
        verify(partial, checksum)
    except DataError:
        partial.unlink()
        raise
    replace(partial, target)
    atomic.sync_directory(target.parent)
    return target


def _receive(urls: Sequence[str], partial: Path, size: int, wait: bool) -> None:
    have = partial.stat().st_size if partial.exists() else 0
    if have >= size:
        return
    responses = _connect(urls, have)
    if not responses:
        raise DataError(f"none of {len(urls)} sources answered within {ANSWER_SECONDS:.0f} s", HINT)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        hint = "set CVLAB_DATA to a folder that can be written"
        raise DataError(f"{partial.parent}: {error.strerror}", hint) from error
    reason = ""
    with _exclusive(partial) as file, contextlib.ExitStack() as bodies:
        for response in responses:
            bodies.enter_context(response.body)
        for response in responses:
            try:
                _stream(response, file, size, wait)
                return
            except SlowError as error:
                reason = error.message
            except FAILURES as error:
                reason = f"{response.url}: {error}"
            console.info(f"warning: {reason}")
        have = file.seek(0, os.SEEK_END)
    raise SlowError(
        f"{reason}; {console.format_bytes(have)} are downloaded", "--download continues, no matter how long it takes"
    )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Stops at a redirect, whose headers describe the file."""

    def redirect_request(self, *_args: Any) -> None:
        return None


def published_size_and_sha256(url: str) -> tuple[int, str | None]:
    """Return the size of a file and, if its server publishes it, its SHA-256; DataError if there is no size."""
    request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": f"cvlab/{__version__}"})
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=ANSWER_SECONDS) as response:
            headers = response.headers
    except urllib.error.HTTPError as error:
        if not 300 <= error.code < 400:
            raise DataError(f"{url}: {error}", HINT) from error
        headers = error.headers
    except FAILURES as error:
        raise DataError(f"{url}: {error}", HINT) from error
    size = headers.get("X-Linked-Size") or headers.get("Content-Length") or ""
    digest = (headers.get("X-Linked-ETag") or "").strip('"')
    if not size.isdecimal():
        raise DataError(f"{url}: the server does not give its size", HINT)
    return int(size), digest if re.fullmatch(r"[0-9a-f]{64}", digest) else None


@contextlib.contextmanager
def _exclusive(partial: Path) -> Iterator[FileIO]:
    """Open a partial file to append to it; DataError while another process does.

    The file may not be opened again meanwhile: closing any of its descriptors ends a record lock.
    """
    with partial.open("ab", buffering=0) as file:  # closing flushes nothing that could fail
        try:
            is_locked = try_lock(file.fileno())
        except OSError as error:
            reason = f"its file system has no file locks ({error.strerror or error})"
            raise DataError(f"{partial}: {reason}", "choose a folder on a local disk with CVLAB_DATA") from error
        if not is_locked:
            raise DataError(f"{partial}: another process is downloading it", "wait until it has finished")
        yield file


def _connect(urls: Sequence[str], offset: int) -> list[_Response]:
    """Open all sources at once; return those that answered in time, in the order of `urls`."""
    responses: queue.Queue[_Response | None] = queue.Queue()
    for url in urls:  # daemon threads, because a name that does not resolve can hang for minutes
        threading.Thread(target=_open, args=(url, offset, responses), daemon=True).start()
    deadline = time.monotonic() + ANSWER_SECONDS
    opened: list[_Response] = []
    for _ in urls:
        try:
            response = responses.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        if response is not None:
            opened.append(response)
    return sorted(opened, key=lambda response: list(urls).index(response.url))


def _open(url: str, offset: int, responses: "queue.Queue[_Response | None]") -> None:
    headers = {"User-Agent": f"cvlab/{__version__}"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    try:
        opener = urllib.request.build_opener(_HttpsOnly)
        body = opener.open(urllib.request.Request(url, headers=headers), timeout=ANSWER_SECONDS)
        responses.put(_Response(url, body, offset if body.status == 206 else 0))
    except FAILURES as error:
        console.debug(f"{url}: {error}")
        responses.put(None)


def _stream(response: _Response, file: FileIO, size: int, wait: bool) -> None:
    """Append what a source sends; SlowError if it would take more than LONGEST_SECONDS."""
    if wait:
        _allow_stalls(response.body)
    have = file.seek(0, os.SEEK_END)
    skip = have - response.offset  # another source has appended since this one was opened, or it ignores ranges
    start = shown = time.monotonic()
    received = 0
    for chunk in _chunks(response.body):
        received += len(chunk)
        data = memoryview(chunk)[max(0, skip) :]
        while data:  # a write may be partial
            data = data[file.write(data) :]
        skip = max(0, skip - len(chunk))
        now = time.monotonic()
        rate = received / max(now - start, 1e-6)
        left = (size - max(response.offset + received, have)) / max(rate, 1.0)
        if now - shown > REPORT_SECONDS:
            shown = now
            done = console.format_bytes(min(size, response.offset + received))
            console.info(
                f"{Path(file.name).stem}: {done} of {console.format_bytes(size)}, {console.format_bytes(rate)}/s, "
                f"{console.format_seconds(left)} left"
            )
        if not wait and now - start > MEASURE_SECONDS and left > LONGEST_SECONDS:
            raise SlowError(f"{response.url} sends {console.format_bytes(rate)}/s, {left / 60:.0f} minutes in all")
    if file.tell() < size:
        raise OSError(f"cut off after {file.tell()} of {size} bytes")


def _allow_stalls(body: Any) -> None:
    """Allow a source that has answered longer pauses than it had for answering."""
    raw = getattr(getattr(body, "fp", None), "raw", None)
    connection = getattr(raw, "_sock", None)
    if connection is not None:
        connection.settimeout(STALL_SECONDS)


def _chunks(body: Any) -> Iterator[bytes]:
    while chunk := body.read1(CHUNK_BYTES):
        yield chunk


def algorithm_of(checksum: str) -> str:
    """Return the algorithm of a checksum: that before a colon, else sha256."""
    return checksum.rpartition(":")[0] or "sha256"


def matches(chunks: Iterable[bytes], checksum: str) -> bool:
    """Return whether a content has a checksum: hexadecimal digits of its SHA-256, or `md5:` and those of its MD5.

    The first digits are enough.
    """
    digest = hashlib.new(algorithm_of(checksum), usedforsecurity=False)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest().startswith(checksum.rpartition(":")[2])


def verify(path: Path, checksum: str) -> None:
    """Raise DataError unless a file has the published checksum, see `matches`."""
    try:
        with path.open("rb") as file:
            is_intact = matches(iter(lambda: file.read(1024**2), b""), checksum)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", "name a file that can be read") from error
    if not is_intact:
        raise DataError(f"{path}: differs from the published file ({algorithm_of(checksum)})", "get it again")


def is_online() -> bool:
    """Return whether sockets may be opened, which CVLAB_OFFLINE forbids."""
    return os.environ.get("CVLAB_OFFLINE", "") in ("", "0")
