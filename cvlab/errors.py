"""What can go wrong for a user: one exception class per exit code.

Every refusal is one line that says what, where and what to do. Anything else that is raised is a fault of ours
and ends with exit code 1.
"""

from typing import Any


def _one_line(text: str) -> str:
    """Join lines: what a library says, or the name of a file, may have several."""
    return " ".join(line.strip() for line in text.splitlines()) if len(text.splitlines()) > 1 else text


class CvlabError(Exception):
    """An error with an exit code, a one-line message and a hint of what to do."""

    code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        message, hint = _one_line(message), _one_line(hint)
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.run: str | None = None  # the run directory, where there is one

    def document(self) -> dict[str, Any]:
        """Return what `--json` prints of the error."""
        run = {"run": self.run} if self.run else {}
        return {"code": self.code, "message": self.message, "hint": self.hint, **run}

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class ConfigError(CvlabError):
    """Wrong usage or a wrong configuration; `others` are further errors found in the same reading."""

    code = 2

    def __init__(self, message: str, hint: str = "", others: "tuple[ConfigError, ...]" = ()) -> None:
        super().__init__(message, hint)
        self.others = others

    def document(self) -> dict[str, Any]:
        """Return what `--json` prints of the error, with all that was found."""
        return super().document() | ({"others": [str(other) for other in self.others]} if self.others else {})


class ExpectationError(CvlabError):
    """The run ended, but an expectation of its configuration was not met."""

    code = 3


class DataError(CvlabError):
    """Data, weights or an image are missing or cannot be read."""

    code = 4


class RunDirError(CvlabError):
    """The run directory or its disk: not found, locked, full, read-only."""

    code = 5


class DivergedError(CvlabError):
    """A loss or a weight is no longer finite."""

    code = 6


class CheckpointError(CvlabError):
    """No valid checkpoint, or one of another model."""

    code = 7


class DeviceError(CvlabError):
    """The device that was asked for is not there."""

    code = 8


class StoppedError(CvlabError):
    """The run was stopped by a signal, after it had written a checkpoint."""

    def __init__(self, message: str, hint: str, code: int) -> None:
        super().__init__(message, hint)
        self.code = code
