# SPDX-License-Identifier: Apache-2.0
"""Clips in lockstep: one network runs for all of them before any goes on, so that its weights are read once for all.

A clip is a plain function that asks for networks to be run, in a thread of its own; everything that computes runs in
the caller's thread, a round at a time. So nothing has to be safe for threads, and Ctrl-C interrupts the work itself.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue

from ltxrt.engine import Array

__all__ = ["Ask", "Round", "in_lockstep"]

Arrays = Mapping[str, Array]
#: Called by a clip with a network's name and its feeds; gives the outputs.
Ask = Callable[[str, Arrays], dict[str, Array]]


class _Abandoned(BaseException):
    """Unwinds the clips that are still waiting when one has failed, or the caller has given up."""


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """A clip waits for a network."""

    clip: int
    network: str
    feeds: Arrays
    reply: "Future[dict[str, Array]]" = field(default_factory=lambda: Future[dict[str, Array]]())


@dataclass(frozen=True, slots=True)
class Round:
    """One network is about to run for these many clips."""

    network: str
    clips: int


def in_lockstep(
    clips: Sequence[Callable[[Ask], object]],
    order: Sequence[str],
    run: Callable[[str, Sequence[Arrays]], Sequence[dict[str, Array]]],
) -> Iterator[Round]:
    """Run all clips to their ends; yields before every round.

    Of the networks that clips wait for, the first one in ``order`` runs, so that whoever is behind catches up.

    Args:
        clips: Each is called once, in a thread.
        order: Every network that a clip asks for, as a request runs through them.
        run: Called in this thread with a network's name and the feeds of every clip that waits for it, by the clips'
            order; gives their outputs.

    Raises:
        Exception: Whatever a clip or ``run`` raised; the other clips are unwound first.
    """
    asked: SimpleQueue[_Call | Future[object]] = SimpleQueue()
    given_up = threading.Event()
    waiting: list[_Call] = []
    running = 0

    def ask(clip: int, network: str, feeds: Arrays) -> dict[str, Array]:
        call = _Call(clip, network, feeds)
        asked.put(call)
        if given_up.is_set():
            raise _Abandoned
        return call.reply.result()

    with ThreadPoolExecutor(max(1, len(clips))) as pool:
        try:
            for index, clip in enumerate(clips):
                pool.submit(clip, partial(ask, index)).add_done_callback(asked.put)
                running += 1
            while running:
                found = asked.get()
                if isinstance(found, _Call):
                    waiting.append(found)
                else:
                    running -= 1
                    found.result()  # raises what ended the clip
                if not waiting or len(waiting) < running:
                    continue
                network = min((call.network for call in waiting), key=order.index)
                calls = sorted((call for call in waiting if call.network == network), key=lambda call: call.clip)
                yield Round(network, len(calls))
                for call, outputs in zip(calls, run(network, [call.feeds for call in calls]), strict=True):
                    waiting.remove(call)
                    call.reply.set_result(outputs)
        finally:
            given_up.set()
            _unwind(asked, waiting, running)


def _unwind(asked: "SimpleQueue[_Call | Future[object]]", waiting: Sequence[_Call], running: int) -> None:
    """Give up every call, made or still to come, until all clips have ended."""
    for call in waiting:
        call.reply.set_exception(_Abandoned())
    while running:
        found = asked.get()
        if isinstance(found, _Call):
            found.reply.set_exception(_Abandoned())
        else:
            running -= 1
