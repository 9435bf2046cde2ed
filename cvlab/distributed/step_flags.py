"""Requests that a single rank makes and on which all ranks act after the same step."""

from collections.abc import Sequence
from dataclasses import dataclass

from cvlab.portability import STOP_SIGNALS


@dataclass(frozen=True)
class StepFlags:
    """What a rank requests after a step."""

    stop: int = 0  # one of STOP_SIGNALS, the first of those that any rank received; 0 for none
    save: bool = False

    def encode(self) -> list[float]:
        """Return one number for each possible request, 1 if it is made and 0 if not, so that ranks can be added."""
        return [float(self.stop == number) for number in STOP_SIGNALS] + [float(self.save)]

    @classmethod
    def decode(cls, is_requested: Sequence[bool]) -> "StepFlags":
        """Return the flags of all ranks together, from which requests any rank makes, in the order of `encode`."""
        *stops, save = is_requested
        received = [int(number) for number, is_received in zip(STOP_SIGNALS, stops, strict=True) if is_received]
        return cls(received[0] if received else 0, save)
