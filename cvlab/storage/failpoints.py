"""Places where a test can make the process die, named by `CVLAB_FAILPOINT=name:count` (the count-th passing kills).

Where the variable is unset, as always outside tests, `reach` is a function that does nothing.
"""

import os
import signal
from collections.abc import Callable

_passed: dict[str, int] = {}


def _reach(name: str) -> None:
    wanted, _, count = os.environ.get("CVLAB_FAILPOINT", "").partition(":")
    if name == wanted:
        _passed[name] = _passed.get(name, 0) + 1
        if _passed[name] == int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)


def _nothing(_name: str) -> None:
    return


reach: Callable[[str], None] = _reach if os.environ.get("CVLAB_FAILPOINT") else _nothing
