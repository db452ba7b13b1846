# SPDX-License-Identifier: Apache-2.0
"""Connections that are held to a pace: uvicorn waits for ever for headers to come, and for an answer to be taken.

h11 is asked for by name, because httptools, which uvicorn prefers where it is installed, sets no limit to the size of
headers, and answers HTTP/1.0 in chunks.
"""

import asyncio
from collections.abc import Callable
from typing import cast

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

__all__ = ["paced"]


def paced(header_seconds: float, stall_seconds: float) -> type[asyncio.Protocol]:
    """A protocol for ``uvicorn.Config(http=...)``.

    Args:
        header_seconds: Longest that a request's headers may take, from the connection's or their own first byte.
        stall_seconds: Longest that an answer may lie in a full buffer.
    """

    class Paced(_Paced):
        longest_header_seconds, longest_stall_seconds = header_seconds, stall_seconds

    return Paced


class _Paced(H11Protocol):
    longest_header_seconds: float
    longest_stall_seconds: float
    _headers: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self._later(self.longest_stall_seconds)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall = _ended(self._stall)

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers, self._stall = _ended(self._headers), _ended(self._stall)
        super().connection_lost(exc)

    def _watch_headers(self) -> None:
        """Between requests: bytes have come, and no whole headers. Without any, uvicorn's own time runs."""
        cycle = cast("RequestResponseCycle | None", self.cycle)  # none before the first request
        if cycle is not None and not cycle.response_complete:
            self._headers = _ended(self._headers)
        elif self._headers is None and not self.transport.is_closing():
            self._headers = self._later(self.longest_header_seconds)

    def _later(self, seconds: float) -> asyncio.TimerHandle:
        # Not ``close``, which waits until the peer has taken what is in the buffer.
        hang_up: Callable[[], None] = self.transport.abort
        return self.loop.call_later(seconds, hang_up)


def _ended(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
