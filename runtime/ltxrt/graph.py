# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs: captured once, checked, replayed, and kept in a bounded number.

A graph is a recording of launches with their addresses: replaying it costs one call however many kernels it has.
Checked against the interface of cuda-core 1.2; it has never run on a GPU.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable
from contextlib import contextmanager, suppress
from typing import Any, Generic, Protocol, TypeVar

from .errors import EngineError
from .stream import Device, Stream

__all__ = ["CapturedGraph", "IdlePool", "capture_graph"]


class CapturedGraph:
    """An executable graph.

    Attributes:
        nodes: Kernels, copies and other operations in it.
    """

    def __init__(self, raw: Any, nodes: int) -> None:
        self._raw = raw
        self.nodes = nodes

    def launch(self, stream: Stream) -> None:
        """Hand it over; nothing waits."""
        self._raw.launch(stream.raw)

    def close(self) -> None:
        """Destroy it; launches that are under way end as they should."""
        self._raw.close()


def capture_graph(device: Device, work: Callable[[Stream], None], what: str) -> CapturedGraph:
    """Run ``work`` once as it is, then capture it.

    The plain run comes first because the first run of an engine allocates and loads kernels, which a capture forbids.
    It is waited for, so that its errors are its own.

    Args:
        device: Current in this thread.
        work: Hands work over to the stream that it is given, the same each time, and waits for nothing.
        what: Name for messages.

    Raises:
        EngineError: The work fails, or the capture holds nothing: replaying it would leave the old results in place.
    """
    with device.errors(f"running {what}"):
        work(device.compute)
        device.compute.sync()
    builder = device.graph_builder()
    try:
        with _told(what), device.errors(f"capturing {what}"):
            # Other threads may allocate meanwhile; only this one's calls count.
            builder.begin_building(mode="thread_local")
            work(device.inside(builder.stream))
            builder.end_building()
            nodes = device.node_count(builder.graph_definition)
            if nodes == 0:
                raise EngineError(f"{what}: the captured CUDA graph is empty")
            graph = builder.complete()
            graph.upload(device.compute.raw)
    except EngineError:
        # What ends a capture that has been spoiled fails as well; the reason is what was told first.
        with suppress(EngineError), device.errors(f"ending the capture of {what}"):
            builder.close()
        raise
    builder.close()
    return CapturedGraph(graph, nodes)


@contextmanager
def _told(what: str) -> Generator[None]:
    """Errors of cuda-core's own that are not CUDA's, of a capture that was spoiled or a graph that is none."""
    try:
        yield
    except EngineError:
        raise
    except RuntimeError as error:
        raise EngineError(f"{what} cannot be captured: {' '.join(str(error).split())}") from error


class Closable(Protocol):
    """What a pool can drop."""

    def close(self) -> None:
        """Give back what it holds."""
        ...


Item = TypeVar("Item", bound=Closable)


class IdlePool(Generic[Item]):
    """Things that are costly to make, kept while nobody uses them, the least recently used dropped first.

    Who takes one has it alone. Safe to share between threads.

    Args:
        limit: Most that are kept.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"limit: {limit} is not allowed; allowed: 0 and more")
        self._limit = limit
        # The end of a loop that nobody goes on with gives its capture back, and the collector may end it anywhere.
        self._lock = threading.RLock()
        self._idle: OrderedDict[tuple[Hashable, int], Item] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return len(self._idle)

    def take(self, key: Hashable) -> Item | None:
        """The most recently used one of that key, which leaves the pool; None where there is none."""
        with self._lock:
            found = next((entry for entry in reversed(list(self._idle)) if entry[0] == key), None)
            return None if found is None else self._idle.pop(found)

    def give_back(self, key: Hashable, item: Item) -> None:
        """Keep one, and drop what is too much."""
        with self._lock:
            self._count += 1
            self._idle[key, self._count] = item
            dropped = [self._idle.popitem(last=False)[1] for _ in range(len(self._idle) - self._limit)]
        for old in dropped:
            old.close()

    def drop(self, which: Callable[[Hashable], bool]) -> None:
        """Drop those whose key ``which`` says yes to."""
        with self._lock:
            keys = [entry for entry in list(self._idle) if which(entry[0])]
            dropped = [self._idle.pop(entry) for entry in keys]
        for old in dropped:
            old.close()
