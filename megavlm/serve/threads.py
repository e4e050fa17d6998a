"""Work beside the event loop."""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


class Threads:
    """So many threads, for work that nobody can end once it is begun.

    Nothing waits in the pool's own queue, which would hold on to what has been cancelled.
    """

    def __init__(self, count: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(count, name)
        self._free = asyncio.Semaphore(count)
        self._begun: set[Future[Any]] = set()

    async def run(self, work: Callable[[], Result]) -> Result:
        """Cancelled while it waits, work is not begun; later, its thread is taken until it ends."""
        await self._free.acquire()
        loop = asyncio.get_running_loop()
        begun = self._pool.submit(work)
        self._begun.add(begun)

        def end(ended: Future[Any]) -> None:  # not `begun`, which would hold itself, and its result
            self._begun.discard(ended)
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._free.release)

        begun.add_done_callback(end)
        return await asyncio.wrap_future(begun)

    def close(self) -> bool:
        """Take nothing more; whether nothing runs any more, for which an interpreter waits."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        return not self._begun
