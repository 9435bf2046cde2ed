"""`cvlab ui`: serve the pages about runs to this machine, rendered anew for each request.

The server is read-only. A name in an address is only compared with those of the existing runs, so that no path leaves
the folder; a request that names another host, as one from a foreign page would, is rejected.
"""

import http
import http.server
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path

from cvlab import __version__
from cvlab.errors import CvlabError, RunDirError
from cvlab.reports import compare, html, index
from cvlab.runs.find import list_runs
from cvlab.runs.records import read_status

HOST = "127.0.0.1"
REFRESH_SECONDS = 3
COMPARE = "compare"
LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")


class Server(http.server.ThreadingHTTPServer):
    """Serves the runs below a folder to this machine."""

    daemon_threads = True

    def __init__(self, root: Path, port: int) -> None:
        self.root = root
        super().__init__((HOST, port), Handler)

    @property
    def address(self) -> str:
        """Return the address of the list of runs."""
        return f"http://{HOST}:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `/`, the list of runs, `/RUN/`, the page of a run, and `/compare?run=A&run=B`.

    Trials of a sweep are at `/RUN/trials/TRIAL/`.
    """

    server: Server
    server_version = f"cvlab/{__version__}"

    def do_GET(self) -> None:
        """Send a page."""
        host = self.headers.get("Host", "")
        if host.rpartition(":")[0] not in LOCAL_HOSTS and host not in LOCAL_HOSTS:
            self._send(http.HTTPStatus.FORBIDDEN, "this server answers to this machine only\n", "text/plain")
            return
        address = urllib.parse.urlsplit(self.path)
        name = urllib.parse.unquote(address.path, errors="surrogateescape").strip("/")
        try:
            query = urllib.parse.parse_qs(address.query, errors="surrogateescape")
            page = _page(self.server.root, name, query.get("run", []))
        except CvlabError as error:
            self._send(http.HTTPStatus.INTERNAL_SERVER_ERROR, f"{error}\n", "text/plain")
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
        for key, value in (("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store")):
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing."""


def _page(root: Path, name: str, compared: Sequence[str]) -> str | None:
    """Return the page of a run, the list of runs for an empty name, or None if there is no such run."""
    if name == "":
        return html.index_page(
            index.runs(root), link="/{name}/", refresh=REFRESH_SECONDS, root=root, compare_link=f"/{COMPARE}"
        )
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


def serve(root: Path, port: int, ready: Callable[[str], None]) -> None:
    """Serve pages about all runs until Ctrl-C.

    Args:
        root: The folder of the runs.
        port: The port; 0 for any free one.
        ready: Called with the server's address when it listens.

    Raises:
        RunDirError: If the port is taken.
    """
    try:
        server = Server(root, port)
    except (OSError, OverflowError) as error:
        raise RunDirError(f"port {port}: {error}", "choose another one with --port; 0 takes any free one") from error
    with server:
        ready(server.address)
        server.serve_forever()
