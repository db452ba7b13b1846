# SPDX-License-Identifier: Apache-2.0
"""Who waits for news of which job, within the server's event loop."""

import asyncio
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager, suppress

__all__ = ["Board", "Watch"]

# News comes through a pipe that a dying worker may not reach; whoever waits looks again after this time anyway.
_LOOK_AGAIN_SECONDS = 1.0


class Watch:
    """One waiting party; made by ``Board.watch``."""

    def __init__(self) -> None:
        self._news = asyncio.Event()

    def ring(self) -> None:
        """There is news."""
        self._news.set()

    async def wait(self, seconds: float = _LOOK_AGAIN_SECONDS) -> None:
        """Return at the next news since the last call, or after some time without any."""
        # Not ``wait_for``: in Python 3.11 it forgets that it was cancelled where news come at the same time.
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()
        self._news.clear()


class Board:
    """Rings those who watch a job, or all jobs, when it changes. For one event loop; not safe across threads."""

    def __init__(self) -> None:
        self._watches: defaultdict[str | None, set[Watch]] = defaultdict(set)

    def changed(self, job_id: str) -> None:
        """A job changed."""
        for watch in (*self._watches.get(job_id, ()), *self._watches.get(None, ())):
            watch.ring()

    def ring_all(self) -> None:
        """Wake everyone, because the server is about to end."""
        for watches in self._watches.values():
            for watch in watches:
                watch.ring()

    @contextmanager
    def watch(self, job_id: str | None) -> Generator[Watch]:
        """Watch a job, or every job for None. Look at the job only after this, so that nothing is missed."""
        watch = Watch()
        self._watches[job_id].add(watch)
        try:
            yield watch
        finally:
            self._watches[job_id].discard(watch)
            if not self._watches[job_id]:
                del self._watches[job_id]
