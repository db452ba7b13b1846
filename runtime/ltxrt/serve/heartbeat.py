# SPDX-License-Identifier: Apache-2.0
"""A worker's sign of life to a store that cannot see its process."""

import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress

from .store import StoreUnavailableError
from .store_protocol import SharedStore

__all__ = ["beating"]

_BEATS = 3  # in a lease: two may be lost


@contextmanager
def beating(store: SharedStore, worker: str, lease_seconds: float) -> Generator[None]:
    """Renew a worker's lease until the end of the ``with`` block, from a thread of its own."""
    done = threading.Event()
    thread = threading.Thread(target=_beat, args=(store, worker, lease_seconds / _BEATS, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _beat(store: SharedStore, worker: str, pause_seconds: float, done: threading.Event) -> None:
    while True:
        # A store that is gone for longer than the lease gives the job to another, and tells this worker so later.
        with suppress(StoreUnavailableError):
            store.renew(worker)
        if done.wait(pause_seconds):
            return
