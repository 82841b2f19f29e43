"""Open items on threads before they are used, in order and with bounded memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Opened = TypeVar("Opened")


def open_ahead(items: Iterable[Item], open_one: Callable[[Item], Opened], workers: int, ahead: int) -> Iterator[Opened]:
    """Yield the result of `open_one` for each item, in the order of the items.

    Decoders of images release Python's lock, so threads are enough, and no data are sent between processes.

    Args:
        items: the items. They are taken from the iterable in the calling thread.
        open_one: opens one item. An error it raises is raised here, at the item's place.
        workers: number of threads. With 0, each item is opened when it is requested.
        ahead: most items that are open or being opened.
    """
    if workers == 0:
        yield from map(open_one, items)
        return
    source = iter(items)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="open_ahead")
    try:
        waiting: deque[Future[Opened]] = deque()
        while True:
            waiting.extend(pool.submit(open_one, item) for item in islice(source, ahead - len(waiting)))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
