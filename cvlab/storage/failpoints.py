"""Failpoints: where a test can kill the process, by `CVLAB_FAILPOINT=name:count` (the count-th time kills).

Without the variable, as always outside of tests, `reach` does nothing.
"""

import os
import signal
from collections.abc import Callable

_counts: dict[str, int] = {}


def _reach(name: str) -> None:
    selected, _, count = os.environ.get("CVLAB_FAILPOINT", "").partition(":")
    if name == selected:
        _counts[name] = _counts.get(name, 0) + 1
        if _counts[name] == int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)


def _nothing(_name: str) -> None:
    return


reach: Callable[[str], None] = _reach if os.environ.get("CVLAB_FAILPOINT") else _nothing
