"""How a command line ends that fails: what is printed, and the exit code."""

import errno
import json
import re
import signal
import time
from typing import Any

from cvlab import console
from cvlab.cli.options import Output
from cvlab.distributed import process_group
from cvlab.errors import ConfigError, CvlabError, DataError, RunDirError, StoppedError
from cvlab.storage import atomic

USER_OS_ERRORS: dict[int, tuple[type[CvlabError], str]] = {  # errno -> the error it is reported as, and its hint
    errno.ENAMETOOLONG: (DataError, "give a shorter name"),
    errno.EACCES: (DataError, "change its permissions, or name another"),
    errno.ENOSPC: (RunDirError, atomic.DISK_HINT),
    errno.EDQUOT: (RunDirError, atomic.DISK_HINT),
    errno.EROFS: (RunDirError, atomic.DISK_HINT),
    errno.EIO: (RunDirError, "the disk is damaged; choose another folder with --runs-dir"),
}
MAX_NAME = 200  # characters of a file's name in a message
GRACE_SECONDS = 2.0  # for process 0 to print and write an error that the other processes have too


def from_os_error(error: OSError) -> CvlabError | None:
    """Return the error of the user behind an OSError: too long a name, no permission, no space; None for others."""
    if not error.filename or error.errno not in USER_OS_ERRORS:
        return None
    kind, hint = USER_OS_ERRORS[error.errno]
    name = str(error.filename)
    return kind(f"{name if len(name) < MAX_NAME else f'{name[: MAX_NAME // 2]}...'}: {error.strerror}", hint)


def parser_error(error: Any) -> ConfigError:
    """Return an error of the command line's parser, one of click's UsageErrors, as an error of cvlab."""
    message = " ".join(error.format_message().split()).rstrip(".")
    message = re.sub(r"\.? \(?(Did you mean|Possible options:) ([^)?]*)[)?]*", r"; similar: \2", message)
    message = message[:1].lower() + message[1:]
    command = error.ctx.command_path if getattr(error, "ctx", None) else "cvlab"
    return ConfigError(message, f"see `{command} --help`")


def report_user_error(error: CvlabError, output: Output) -> int:
    """Print an error on one line, further errors of a configuration on a line each; return the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # the process ends in any case; the message must be printed whole
    if not process_group.is_main():
        return _report_of_rank(error)
    if output.debug:
        console.show_traceback(error)
    if output.as_json:
        console.document(json.dumps({"ok": False, "error": error.document()}, indent=2))
    for line in [error, *getattr(error, "further_errors", ())]:
        console.always(str(line) if isinstance(error, StoppedError) else f"error: {line}")
    return error.code


def _report_of_rank(error: CvlabError) -> int:
    """Print what only this rank knows, which excludes a stop and the loss of another rank."""
    if not isinstance(error, (StoppedError, process_group.PeerLostError)):
        console.info(f"error: process {process_group.world().rank}: {error}")
        time.sleep(GRACE_SECONDS)  # the end of this process ends the others, which may have the same error
    return error.code


def report_internal_error(error: Exception, output: Output) -> int:
    """Print the traceback of a fault of cvlab or of the user's own code; return the exit code."""
    console.show_traceback(error)
    message = f"{type(error).__name__}: {error}"
    if output.as_json:
        hint = "the traceback is on stderr"
        console.document(json.dumps({"ok": False, "error": {"code": 1, "message": message, "hint": hint}}, indent=2))
    console.info(f"error: {message}; this is a bug in cvlab, or in your own file if the traceback ends there")
    return 1
