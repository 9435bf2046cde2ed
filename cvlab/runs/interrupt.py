"""Stop on request: Ctrl-C, SIGTERM, SIGUSR1 or a closed terminal end a run after its current step and a checkpoint."""

import os
import signal
import threading
from types import FrameType, TracebackType

from cvlab import portability
from cvlab.errors import StoppedError

EXIT_INTERRUPT = 130
EXIT_TERMINATED = 143
STOP_WITH_INPUT = "CVLAB_STOP_WITH_INPUT"  # set by a parent that holds the other end of standard input


class StopRequest:
    """A context in which signals set `received` instead of ending the process; a second Ctrl-C ends it at once.

    Outside the main thread, where Python allows no signal handlers, it has no effect.
    """

    SIGNALS = portability.STOP_SIGNALS

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number

    def __enter__(self) -> "StopRequest":
        for number in self.SIGNALS:
            if number in portability.IGNORED_BY_NOHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # started by `nohup`, in order to outlive the terminal
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
        """Raise StoppedError if a signal was received.

        Args:
            step: Number of steps done.
            run: Name of the run.
            unit: What is counted in place of steps.
        """
        if self.received is not None:
            raise self.error(step, run, unit)

    def error(self, step: int, run: str, unit: str = "step") -> StoppedError:
        """Return the error that ends the run, to be raised when its checkpoint has been written."""
        assert self.received is not None
        code = EXIT_INTERRUPT if self.received == signal.SIGINT else EXIT_TERMINATED
        by = "" if self.received == signal.SIGINT else f" by {signal.Signals(self.received).name}"
        done = f"at step {step}, checkpoint saved" if unit == "step" else f"after {step} {unit}{'s' * (step != 1)}"
        return StoppedError(f"interrupted{by} {done}", f"continue with `cvlab resume {run}`", code)


def stop_with_input() -> None:
    """If STOP_WITH_INPUT is set, stop as after SIGTERM when the process at the other end of standard input dies."""
    if os.environ.pop(STOP_WITH_INPUT, None):
        portability.unblock_signals(StopRequest.SIGNALS)  # the parent may have blocked them
        threading.Thread(target=_wait_for_end, daemon=True).start()


def _wait_for_end() -> None:
    while os.read(0, 1024):
        pass
    portability.terminate_self()
