"""Work that is prepared while earlier work is done."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["prepare_ahead"]

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")


def prepare_ahead(
    prepare: Callable[[Item], Prepared], items: Iterable[Item]
) -> Iterator[tuple[Item, Prepared]]:
    """Prepares each item in another thread while the caller works on the one before it.

    Args:
        prepare: called with the items in their order, one at a time. It should release Python's
            lock, as compiling does.
        items: the work.

    Yields:
        Each item and what `prepare` returned. An exception in `prepare` is raised here, where its
        item would come. If the caller stops early, nothing more is prepared.
    """
    remaining = list(items)
    with _leaving_at_once(ThreadPoolExecutor(1, "prepare")) as threads:
        futures = [threads.submit(prepare, item) for item in remaining[:1]]
        for number, item in enumerate(remaining):
            prepared = futures[number].result()
            futures.extend(threads.submit(prepare, later) for later in remaining[number + 1 :][:1])
            yield item, prepared
