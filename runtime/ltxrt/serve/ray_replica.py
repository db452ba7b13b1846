# SPDX-License-Identifier: Apache-2.0
"""A worker where Ray puts it: in an actor with a GPU of its own, on any machine that reaches the store and the files.

Knows nothing of Ray; ``RayPool`` makes actors of it.
"""

import logging
import os
import threading
import time

from .heartbeat import beating
from .worker import Worker, WorkerOptions

__all__ = ["ClipReplica"]

_LOG = logging.getLogger("ltxrt.serve")
_WAKE_SECONDS = 1.0  # a lost wake-up costs no more than this
_HANG_GRACE_SECONDS = 60.0


class ClipReplica:
    """Claims jobs from the shared store, under the name in its options, and makes one clip at a time.

    ``run`` is one long call; the others come from other threads meanwhile.

    Args:
        options: What it works with. They name a Redis.

    Raises:
        LtxrtError: The pipeline or the store cannot be opened.
    """

    def __init__(self, options: WorkerOptions) -> None:
        self._options = options
        self._worker = Worker(options)
        self._wake = threading.Event()
        self._leaving = False
        self._busy_since: float | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    def ready(self) -> int:
        """The process id, once the pipeline is open and warm."""
        return os.getpid()

    def wake(self) -> None:
        """There is a new job."""
        self._wake.set()

    def leave(self) -> None:
        """Finish the clip and take no other."""
        self._leaving = True
        self._wake.set()

    def run(self) -> None:
        """Serve jobs until told to leave, or until the pipeline is not to be trusted any more."""
        shared = self._worker.shared
        assert shared is not None  # its options name a Redis
        with beating(shared, self._options.name, self._options.lease_seconds):
            while self._worker.trusted and not self._leaving:
                self._wake.clear()
                if not self._worker.turn(self._options.name, self._claimed):
                    self._wake.wait(_WAKE_SECONDS)
                self._busy_since = None

    def _claimed(self, job_id: str) -> None:
        if self._busy_since is None:
            self._busy_since = time.monotonic()

    def _watch(self) -> None:
        """End a replica that hangs within a step, where it cannot see that its time is over."""
        limit = self._options.timeout_seconds + _HANG_GRACE_SECONDS
        while True:
            time.sleep(_WAKE_SECONDS)
            since = self._busy_since
            if since is not None and time.monotonic() - since > limit:
                _LOG.error("replica hangs", extra={"event": "worker_hangs"})
                os._exit(1)
