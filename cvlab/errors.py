"""Errors that users can cause or meet: one exception class for each exit code.

Each message is one line: what is wrong, where, and what to do. Any other exception is a bug of cvlab and exits with
code 1.
"""

from pathlib import Path
from typing import Any


def _one_line(text: str) -> str:
    """Join lines: messages of libraries and names of files may have several."""
    return " ".join(line.strip() for line in text.splitlines()) if len(text.splitlines()) > 1 else text


class CvlabError(Exception):
    """An error with an exit code.

    Args:
        message: What is wrong, and where; one line.
        hint: What to do; one line.

    Attributes:
        code: The exit code.
        run: The run directory, if there is one.
    """

    code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        message, hint = _one_line(message), _one_line(hint)
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.run: str | None = None

    def document(self) -> dict[str, Any]:
        """Return the error as `--json` prints it."""
        run = {"run": self.run} if self.run else {}
        return {"code": self.code, "message": self.message, "hint": self.hint, **run}

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class ConfigError(CvlabError):
    """Wrong usage or an invalid configuration; `further_errors` are those of the same configuration."""

    code = 2

    def __init__(self, message: str, hint: str = "", further_errors: "tuple[ConfigError, ...]" = ()) -> None:
        super().__init__(message, hint)
        self.further_errors = further_errors

    def document(self) -> dict[str, Any]:
        """Return the error as `--json` prints it, with the further errors."""
        further = {"others": [str(error) for error in self.further_errors]} if self.further_errors else {}
        return super().document() | further


class ExpectationError(CvlabError):
    """The run ended, but an expectation of its configuration failed."""

    code = 3


class DataError(CvlabError):
    """Data, weights or an image are missing or cannot be read."""

    code = 4


class RunDirError(CvlabError):
    """The run directory or its disk is missing, locked, full or read-only."""

    code = 5


class DivergedError(CvlabError):
    """A loss, a metric or a weight is not finite."""

    code = 6


class CheckpointError(CvlabError):
    """There is no valid checkpoint, or it belongs to another model."""

    code = 7


class DeviceError(CvlabError):
    """The device is not available."""

    code = 8


class StoppedError(CvlabError):
    """The run was stopped on request, after it had written a checkpoint."""

    def __init__(self, message: str, hint: str, code: int) -> None:
        super().__init__(message, hint)
        self.code = code


def install_command(extra: str) -> str:
    """Return the command that installs an extra: from the repository, or by name if it is a package."""
    is_repository = (Path(__file__).parent.parent / "pyproject.toml").is_file()
    return f"pip install -e '.[{extra}]'" if is_repository else f"pip install 'cvlab-runner[{extra}]'"
