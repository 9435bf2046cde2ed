"""Reading ahead in a thread."""

import threading
import time

import pytest

from cvlab.data import prefetch
from cvlab.errors import DataError


class TestReadAhead:
    def test_items_in_order(self):
        assert list(prefetch.read_ahead((k for k in range(50)), 4, lambda: None)) == list(range(50))

    def test_at_most_the_queue_size_is_computed_ahead(self):
        computed = []
        items = (computed.append(k) or k for k in range(100))
        ahead = prefetch.read_ahead(items, 3, lambda: None)
        assert next(ahead) == 0
        deadline = time.monotonic() + 10
        while len(computed) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(computed) == 5  # one consumed, three in the queue, one that the thread holds
        ahead.close()
        assert len(computed) == 5

    def test_an_error_is_raised_in_the_consumer(self):
        def items():
            yield 1
            raise DataError("broken")

        ahead = prefetch.read_ahead(items(), 3, lambda: None)
        assert next(ahead) == 1
        with pytest.raises(DataError, match="broken"):
            next(ahead)

    def test_waiting_can_be_interrupted(self):
        released = threading.Event()

        def items():
            released.wait(10)
            yield 1

        def interrupt():
            released.set()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            next(prefetch.read_ahead(items(), 3, interrupt))
