"""Items that a thread computes while the caller works on those before."""

import contextlib
import queue
import threading
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
POLL_SECONDS = 0.1  # in which a thread that waits looks whether it is to stop
JOIN_SECONDS = 5.0  # in which reading an item may block its thread


def read_ahead(
    items: Generator[T, None, None], count: int, check_interrupt: Callable[[], None]
) -> Generator[T, None, None]:
    """Yield items that a thread computes, up to `count` of them ahead.

    Args:
        items: A generator; it is advanced and closed in the thread only.
        count: Number of items that wait to be taken.
        check_interrupt: Called while there is no item to be taken.
    """
    results: queue.Queue[T | BaseException | None] = queue.Queue(count)
    is_stopped = threading.Event()
    thread = threading.Thread(target=_fill, args=(results, items, is_stopped), daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = results.get(timeout=POLL_SECONDS)
            except queue.Empty:
                check_interrupt()
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        is_stopped.set()
        thread.join(JOIN_SECONDS)


def _fill(
    results: "queue.Queue[T | BaseException | None]", items: Generator[T, None, None], is_stopped: threading.Event
) -> None:
    """Put items into a queue, at last the error that ended them, or None."""
    last: BaseException | None = None
    try:
        with contextlib.closing(items):
            for item in items:
                if not _put(results, item, is_stopped):
                    return
    except BaseException as error:
        last = error
    _put(results, last, is_stopped)


def _put(
    results: "queue.Queue[T | BaseException | None]", item: T | BaseException | None, is_stopped: threading.Event
) -> bool:
    """Put an item into a queue as soon as it has room; return False if the thread is to stop."""
    while not is_stopped.is_set():
        with contextlib.suppress(queue.Full):
            results.put(item, timeout=POLL_SECONDS)
            return True
    return False
