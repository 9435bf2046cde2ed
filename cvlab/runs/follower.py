"""A run directory as the other processes of a training see it: process 0 writes, they read."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cvlab.runs.run_dir import RunDir


class Follower(RunDir):
    """The same directory for another process of a training that process 0 writes about: it is only read."""

    @contextlib.contextmanager
    def locked(self) -> Iterator["RunDir"]:
        """Hold nothing: process 0 has the lock."""
        yield self

    def folder(self, name: str) -> Path:
        """Return a folder, made or not."""
        return self.path / name

    def write_text(self, name: str, text: str) -> None:
        """Write nothing."""

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write nothing."""

    def set_status(self, state: str, **more: Any) -> None:
        """Write nothing."""

    def log(self, line: str) -> None:
        """Say nothing."""

    def append(self, row: Mapping[str, Any]) -> None:
        """Write nothing."""

    def sync_metrics(self) -> int:
        """Return nothing: process 0 knows it."""
        return 0

    def truncate_metrics(self, length: int) -> None:
        """Leave it to process 0."""
