"""Work done in a thread while the caller uses earlier results."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def made_ahead(make: Callable[[Item], Made], items: Iterable[Item], ahead: int = 1) -> Iterator[Made]:
    """Yield make(item) of each item, in order; up to `ahead` of them are made in a thread before they are requested.

    `make` runs in one thread, for one item at a time, and must enter no collective, since the ranks' threads are not in
    step. An exception in it is raised here in place of the item. Closing the iterator waits for the current item and
    makes no more.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        pending: deque[Future] = deque()
        try:
            for item in items:
                pending.append(thread.submit(make, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
