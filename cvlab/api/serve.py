"""`cvlab ui`: the pages about runs, served to this machine only, made anew each time they are asked for.

Read-only. Names in an address are only looked up among the runs there are, so that no path leaves the folder; a request
that names another host, as a page of somebody else's would, is refused.
"""

import http
import http.server
import urllib.parse
from collections.abc import Callable
from pathlib import Path

from cvlab import __version__
from cvlab.errors import CvlabError, RunDirError
from cvlab.reports import html, index
from cvlab.runs.find import list_runs
from cvlab.runs.records import read_status

HOST = "127.0.0.1"
REFRESH_SECONDS = 3
LOCAL = ("127.0.0.1", "localhost", "[::1]")


class Server(http.server.ThreadingHTTPServer):
    """A server of the runs below a folder."""

    daemon_threads = True

    def __init__(self, root: Path, port: int) -> None:
        self.root = root
        super().__init__((HOST, port), Handler)

    @property
    def address(self) -> str:
        """Return where it can be visited."""
        return f"http://{HOST}:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers for `/`, the list of runs, and `/RUN/`, the page of one."""

    server: Server
    server_version = f"cvlab/{__version__}"

    def do_GET(self) -> None:
        """Answer with a page."""
        name = self.headers.get("Host", "")
        if name.rpartition(":")[0] not in LOCAL and name not in LOCAL:
            self._send(http.HTTPStatus.FORBIDDEN, "this server answers to this machine only\n", "text/plain")
            return
        asked = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/")
        try:
            page = _page(self.server.root, asked)
        except CvlabError as error:
            self._send(http.HTTPStatus.INTERNAL_SERVER_ERROR, f"{error}\n", "text/plain")
            return
        if page is None:
            self._send(http.HTTPStatus.NOT_FOUND, "no such run\n", "text/plain")
        else:
            self._send(http.HTTPStatus.OK, page, "text/html")

    do_HEAD = do_GET  # noqa: N815

    def _send(self, status: http.HTTPStatus, text: str, kind: str) -> None:
        content = text.encode("utf-8", "replace")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        for key, value in (("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store")):
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing: the page itself shows that it came."""


def _page(root: Path, name: str) -> str | None:
    """Return the page that is asked for; None where there is no such run."""
    if name == "":
        return html.index_page(index.runs(root), link="/{name}/", refresh=REFRESH_SECONDS)
    for path in list_runs(root):
        if path.name == name:
            is_running = read_status(path).get("status") == "running"
            return html.run_page(path, home="/", refresh=REFRESH_SECONDS if is_running else None)
    return None


def serve(root: Path, port: int, ready: Callable[[str], None]) -> None:
    """Serve until Ctrl-C. RunDirError where the port is taken."""
    try:
        server = Server(root, port)
    except (OSError, OverflowError) as error:
        raise RunDirError(f"port {port}: {error}", "give another one with --port; 0 takes any") from error
    with server:
        ready(server.address)
        server.serve_forever()
