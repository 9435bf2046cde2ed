"""How cvlab's commands run inside another program: quiet, and without changing its random numbers and threads."""

import contextlib
from collections.abc import Iterator

from cvlab import console


@contextlib.contextmanager
def library_call(progress: bool) -> Iterator[None]:
    """Show warnings, and with `progress` also messages and the progress bar; restore the caller's state at the end.

    A run seeds the global random number generators and may set the number of threads; both are as before afterwards.
    """
    import torch

    from cvlab.engine.device import get_rng_state, set_rng_state

    threads, generators = torch.get_num_threads(), get_rng_state()
    try:
        with console.shown(progress):
            yield
    finally:
        torch.set_num_threads(threads)
        set_rng_state(generators)
