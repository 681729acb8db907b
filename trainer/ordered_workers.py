"""Parallel map over several processes, with results in the order of the items."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar


Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerEnded(RuntimeError):
    """A worker process was killed."""


def map_in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    num_workers: int,
    initializer: Callable[..., Any],
    initargs: tuple[Any, ...] = (),
) -> Iterator[tuple[Item, Result]]:
    """
    Yield each item with its result, in the order of the items. Processes are spawned, so `function` and `initializer` must be importable.
    At most `num_workers + 1` items are read ahead. If an item fails, the results of all preceding items are yielded first.

    Workers exit when the iterator is closed or this process ends, even if it is killed.

    Args:
        function: called in a worker with an item.
        items: may raise ValueError.
        num_workers (`int`): number of processes.
        initializer: called once in each worker with `initargs`.

    Raises:
        ValueError: whatever `items` or `function` raise.
        WorkerEnded: a worker was killed.
    """
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        num_workers,
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(initializer, initargs),
    )
    pending: deque[tuple[Item, Future[Result]]] = deque()
    iterator, error, ended = iter(items), None, False
    try:
        while True:
            while not ended and len(pending) <= num_workers:
                try:
                    item = next(iterator)
                except StopIteration:
                    ended = True
                except ValueError as bad:
                    error, ended = bad, True
                else:
                    pending.append((item, pool.submit(function, item)))
            if not pending:
                break
            item, future = pending.popleft()
            yield item, future.result()
        if error is not None:
            raise error
        pool.shutdown()
    except BrokenProcessPool:
        raise WorkerEnded(
            f"One of {num_workers} worker processes was killed, perhaps because the memory is full. Use fewer workers, and resume."
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()


def _start_worker(initializer: Callable[..., Any], initargs: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    initializer(*initargs)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
