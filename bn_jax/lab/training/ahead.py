"""Work that is prepared while other work is done."""

import collections
import itertools
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["prepare_ahead"]

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")


def prepare_ahead(
    prepare: Callable[[Item], Prepared], items: Iterable[Item]
) -> Generator[tuple[Item, Prepared]]:
    """Prepares each item in another thread, while the caller works on the item before it.

    Args:
        prepare: called with one item after another. What releases Python's lock, as a compiler
            does, leaves the processor to the caller where there are several cores.
        items: the work.

    Yields:
        Each item, and what `prepare` returned for it. An exception in `prepare` is raised here when
        it is the turn of its item. Once the caller stops, no other item is begun.
    """
    remaining = iter(items)
    begun: collections.deque[tuple[Item, Future[Prepared]]] = collections.deque()
    thread = ThreadPoolExecutor(1, "prepare")

    def begin_next() -> None:
        for item in itertools.islice(remaining, 1):
            begun.append((item, thread.submit(prepare, item)))

    try:
        begin_next()
        while begun:
            item, future = begun.popleft()
            prepared = future.result()
            begin_next()
            yield item, prepared
    finally:
        thread.shutdown(wait=False, cancel_futures=True)
