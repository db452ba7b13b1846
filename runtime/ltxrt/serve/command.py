# SPDX-License-Identifier: Apache-2.0
"""``ltxrt serve``: the application on a socket, and its orderly end."""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib.util import find_spec

import uvicorn
from fastapi import FastAPI

from ..errors import OutputError, RequestError
from .app import create_app
from .connection import paced
from .logs import set_up_logs
from .service import Service
from .settings import Settings

__all__ = ["serve"]

_LOG = logging.getLogger("ltxrt.serve")
_LAST_ANSWERS_SECONDS = 10
_BACKLOG = 2048


def serve(settings: Settings, *, factory: str = "ltxrt.serve.worker:open_bundle") -> None:
    """Serve until SIGTERM or Ctrl-C, then drain; a second signal ends it at once.

    Raises:
        LtxrtError: The server cannot be set up.
    """
    _check_extras(settings)
    set_up_logs(settings.log_level)
    app = create_app(settings, factory=factory)
    with _listening(settings) as listener:
        asyncio.run(_serve(app, settings, listener))


async def _serve(app: FastAPI, settings: Settings, listener: socket.socket) -> None:
    config = uvicorn.Config(
        app,
        # Here instead: uvicorn tells what fails at the start with a traceback.
        lifespan="off",
        http=paced(settings.max_header_seconds, settings.max_stall_seconds),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_LAST_ANSWERS_SECONDS,
    )
    async with app.router.lifespan_context(app):
        # As JSON like every other line, so that a program that asked for port 0 finds it here.
        details = {"event": "listening", "host": settings.host, "port": listener.getsockname()[1]}
        _LOG.info("listening", extra=details)
        await _Server(config, lambda: app.state.service, settings.drain_seconds).serve(sockets=[listener])


def _check_extras(settings: Settings) -> None:
    for name in ("ray", "redis"):
        if getattr(settings, name) and find_spec(name) is None:
            shown = True if name == "ray" else "(hidden)"
            raise RequestError(name, shown, f"with the {name} extra only: pip install 'ltxrt[{name}]'")


class _Server(uvicorn.Server):
    """Ends in order: no new jobs, then the running ones, then open streams, then the socket."""

    def __init__(self, config: uvicorn.Config, service: Callable[[], Service], drain_seconds: float) -> None:
        super().__init__(config)
        self._service, self._drain_seconds = service, drain_seconds
        self._draining: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """See ``uvicorn.Server``; here the process ends with 0 after a signal, because it was obeyed."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        yield

    def _signalled(self) -> None:
        if not self.started or self._draining is not None:
            self.should_exit = True
        else:
            self._draining = asyncio.create_task(self._drain(self._service()))

    async def _drain(self, service: Service) -> None:
        _LOG.info("draining", extra={"event": "draining"})
        done = await service.jobs.drain(self._drain_seconds)
        _LOG.info("drained", extra={"event": "drained", "all_done": done})
        service.closing = True
        service.jobs.board.ring_all()
        self.should_exit = True


@contextmanager
def _listening(settings: Settings) -> Generator[socket.socket]:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise OutputError(f"{settings.host}:{settings.port}: cannot listen there ({error.strerror})") from error
    # Accepted sockets inherit it. asyncio sets it only on sockets that name their protocol, which this one does not,
    # and without it every answer on a kept connection waits 40 ms for the peer's delayed acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with listener:
        yield listener
