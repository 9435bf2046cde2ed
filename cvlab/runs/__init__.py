"""Run directories: records, checkpoints, interrupts.

The only writer to disk. May import `storage`, `config` and the root modules.

In Python the package can be called: `cvlab.runs("status=done")` is `cvlab.api.library.runs`.
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """This package, which a user's program also calls as the function that lists runs."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Return the runs on the disk; see `cvlab.api.library.runs`."""
        from cvlab.registry import import_name

        return import_name("cvlab.api.library:runs")(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
