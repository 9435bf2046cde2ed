"""Stopping on request: Ctrl-C, SIGTERM, SIGUSR1 or a terminal that is closed let the step in progress end.

Then a checkpoint is written.
"""

import os
import signal
import threading
from types import FrameType, TracebackType

from cvlab.distributed.step_flags import STOP_SIGNALS
from cvlab.errors import StoppedError

EXIT_INTERRUPT = 130
EXIT_TERMINATED = 143
STOP_WITH_INPUT = "CVLAB_STOP_WITH_INPUT"  # set by who holds the other end of our standard input


class StopRequest:
    """A context in which signals set `received` instead of ending the process; a second Ctrl-C ends it at once.

    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    SIGNALS = STOP_SIGNALS

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number

    def __enter__(self) -> "StopRequest":
        for number in self.SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # `nohup`: to outlive the terminal is what it was started for
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def raise_if_set(self, step: int, run: str, unit: str = "step") -> None:
        """Raise the error that ends the run, if it was asked to stop."""
        if self.received is not None:
            raise self.error(step, run, unit)

    def error(self, step: int, run: str, unit: str = "step") -> StoppedError:
        """Build the error that ends a run which was asked to stop, after its checkpoint is on the disk."""
        assert self.received is not None
        code = EXIT_INTERRUPT if self.received == signal.SIGINT else EXIT_TERMINATED
        name = signal.Signals(self.received).name
        return StoppedError(f"stopped by {name} after {unit} {step}, checkpoint saved", f"cvlab resume {run}", code)


def stop_with_input() -> None:
    """Where STOP_WITH_INPUT is set, stop as by SIGTERM when the other end of standard input dies, however it does."""
    if os.environ.pop(STOP_WITH_INPUT, None):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, StopRequest.SIGNALS)  # some who start us have blocked them
        threading.Thread(target=_wait_for_end, daemon=True).start()


def _wait_for_end() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
