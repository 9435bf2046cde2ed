"""Failpoints: where a test can kill the process, by `CVLAB_FAILPOINT=name:count` (the count-th time kills).

Without the variable, as always outside of tests, `reach` does nothing.
"""

import os
from collections.abc import Callable

from cvlab import portability

_counts: dict[str, int] = {}


def _reach(name: str) -> None:
    selected, _, count = os.environ.get("CVLAB_FAILPOINT", "").partition(":")
    if name == selected:
        _counts[name] = _counts.get(name, 0) + 1
        if _counts[name] == int(count or 1):
            portability.kill_self()


def _nothing(_name: str) -> None:
    return


reach: Callable[[str], None] = _reach if os.environ.get("CVLAB_FAILPOINT") else _nothing
