"""Small files in CIFAR-10's format, and a local HTTP server that sends files correctly or truncated."""

import hashlib
import http.server
import io
import pickle
import tarfile
import threading
from contextlib import contextmanager

import numpy as np

from cvlab.experiments.classification.data.cifar import CIFAR10_FILES


def batch(count, seed):
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
    return {b"data": pixels, b"labels": generator.integers(0, 10, count).tolist()}


def write(folder, count=40):
    """Write all files of a small CIFAR-10; return their checksums."""
    folder.mkdir(parents=True)
    sums = {}
    for seed, name in enumerate(CIFAR10_FILES.checksums):
        raw = pickle.dumps(batch(count, seed), protocol=3)
        (folder / name).write_bytes(raw)
        sums[name] = f"md5:{hashlib.md5(raw, usedforsecurity=False).hexdigest()}"
    return sums


def tar_of(folder):
    """Pack a folder as the official archive does; return its bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(folder, CIFAR10_FILES.folder)
    return buffer.getvalue()


@contextmanager
def server(answer):
    """Serve `answer(handler)` for each GET on a free local port; yields the base URL and the list of requests."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append((self.path, self.headers.get("Range")))
            answer(self)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *arguments):
            pass

    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http_server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http_server.server_address[1]}", requests
    finally:
        http_server.shutdown()
        http_server.server_close()
        thread.join()


def send(handler, content, cut=None, ranges=True):
    """Send a file, from the start of the requested range; `cut` ends the connection after that number of bytes."""
    requested_range = handler.headers.get("Range")
    start = int(requested_range.removeprefix("bytes=").rstrip("-")) if requested_range and ranges else 0
    handler.send_response(206 if start else 200)
    handler.send_header("Content-Length", str(len(content) - start))
    handler.end_headers()
    body = content[start:]
    handler.wfile.write(body if cut is None else body[:cut])
