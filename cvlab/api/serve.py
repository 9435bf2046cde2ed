"""`cvlab ui`: serve the pages about runs to this machine, rendered anew for each request.

The server is read-only. A name in an address is only compared with those of the existing runs, so that no path leaves
the folder; a request that names another host, as one from a foreign page would, is rejected.
"""

import contextlib
import http
import http.server
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cvlab import __version__, console
from cvlab.errors import CvlabError, RunDirError
from cvlab.reports import compare, html, index
from cvlab.runs.find import list_runs
from cvlab.runs.records import read_status

HOST = "127.0.0.1"
REFRESH_SECONDS = 3
COMPARE = "compare"
LOCAL_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?")
MAX_THREADS = 16  # requests at a time
IDLE_SECONDS = 10  # after which a connection without a request is closed
LIST_SECONDS = 1.0  # for which the list of runs is kept
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


class Server(http.server.ThreadingHTTPServer):
    """Serves the runs below a folder to this machine."""

    daemon_threads = True
    request_queue_size = 4 * MAX_THREADS  # the default of 5 delays a burst of connections by seconds

    def __init__(self, root: Path, port: int, query: str = "") -> None:
        self.root = root
        self.query = query
        self._free_threads = threading.BoundedSemaphore(MAX_THREADS)
        self._list_lock = threading.Lock()
        self._list: tuple[float, str] | None = None
        super().__init__((HOST, port), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Handle a request in a thread of its own; reject it if MAX_THREADS are at work."""
        if not self._free_threads.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Handle a request."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free_threads.release()

    def list_page(self) -> str:
        """Return the list of runs, which is built at most once in LIST_SECONDS."""
        with self._list_lock:
            if self._list is None or time.monotonic() - self._list[0] >= LIST_SECONDS:
                rows, links = index.runs(self.root, self.query), {"link": "/{name}/", "compare_link": f"/{COMPARE}"}
                page = html.index_page(rows, refresh=REFRESH_SECONDS, root=self.root, **links)
                self._list = (time.monotonic(), page)
            return self._list[1]

    @property
    def address(self) -> str:
        """Return the address of the list of runs."""
        return f"http://{HOST}:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `/`, the list of runs, `/RUN/`, the page of a run, and `/compare?run=A&run=B`.

    Trials of a sweep are at `/RUN/trials/TRIAL/`.
    """

    server: Server
    timeout = IDLE_SECONDS
    server_version = f"cvlab/{__version__}"

    def do_GET(self) -> None:
        """Send a page."""
        if not LOCAL_HOST.fullmatch(self.headers.get("Host", "")):
            self._send(http.HTTPStatus.FORBIDDEN, "this server answers to this machine only\n", "text/plain")
            return
        address = urllib.parse.urlsplit(self.path)
        name = urllib.parse.unquote(address.path, errors="surrogateescape").strip("/")
        try:
            query = urllib.parse.parse_qs(address.query, errors="surrogateescape")
            page = self.server.list_page() if name == "" else _page(self.server.root, name, query.get("run", []))
        except Exception as error:  # of the files of a run; the server stays
            message = str(error) if isinstance(error, CvlabError) else f"{type(error).__name__}: {error}"
            self._send(http.HTTPStatus.INTERNAL_SERVER_ERROR, f"{console.printable(message)}\n", "text/plain")
            return
        if page is None:
            self._send(http.HTTPStatus.NOT_FOUND, "no such run\n", "text/plain")
        else:
            self._send(http.HTTPStatus.OK, page, "text/html")

    do_HEAD = do_GET  # noqa: N815

    def _send(self, status: http.HTTPStatus, text: str, kind: str) -> None:
        content = text.encode(errors="backslashreplace")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        for key, value in HEADERS.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing."""


def _page(root: Path, name: str, compared: Sequence[str]) -> str | None:
    """Return the page of a run or of a comparison, or None if there is no such run."""
    runs = {path.name: path for path in list_runs(root)}
    if name == COMPARE:
        paths = [path for run, path in runs.items() if run in compared]
        links = html.Links(home="/", run="/{name}/")
        return html.comparison_page(compare.labels(paths), links) if paths else None
    run, _, trial = name.partition("/trials/")
    path, home = runs.get(run), ("/", "all runs")
    if trial and path is not None:
        trials = {child.name: child for child in list_runs(path / "trials")}
        path, home = trials.get(trial), (f"/{html.quote(run)}/", "sweep")
    if path is None:
        return None
    links = html.Links(*home, trial=f"/{html.quote(run)}/trials/{{name}}/")
    is_running = read_status(path).get("status") == "running"
    return html.run_page(path, links, refresh=REFRESH_SECONDS if is_running else None)


def serve(root: Path, port: int, ready: Callable[[str], None], query: str = "") -> None:
    """Serve pages about runs until Ctrl-C.

    Args:
        root: The folder of the runs.
        port: The port; 0 for any free one.
        ready: Called with the server's address when it listens.
        query: Which runs the list shows; empty for all.

    Raises:
        ConfigError: The query is not valid.
        RunDirError: The port is taken.
    """
    index.runs(root, query)
    try:
        server = Server(root, port, query)
    except (OSError, OverflowError) as error:
        raise RunDirError(f"port {port}: {error}", "choose another one with --port; 0 takes any free one") from error
    with server:
        ready(server.address)
        server.serve_forever()
