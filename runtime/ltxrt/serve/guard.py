# SPDX-License-Identifier: Apache-2.0
"""Around every exchange: a cap on the body, a request id, security headers, one log line, one count."""

import logging
import re
import time
from secrets import token_hex

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics
from .problems import ProblemError, problem_response

__all__ = ["Guard", "request_id"]

_LOG = logging.getLogger("ltxrt.serve")
_SANE_ID = re.compile(r"[\w.:-]{1,128}")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
# A result's address is a secret of its own, so its last parts stay out of the logs.
_SECRET_PATH = re.compile(r"^(/files/[^/]+)/.*")


class _TooLargeError(Exception):
    """The body is larger than allowed."""


def request_id(scope: Scope) -> str:
    """The id of the request at hand."""
    return scope.get("ltxrt_request_id", "")


class Guard:
    """ASGI middleware.

    Args:
        app: What it guards.
        max_body_bytes: Cap on every request's body.
        metrics: Where answers are counted.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, metrics: Metrics) -> None:
        self._app, self._max_body_bytes, self._metrics = app, max_body_bytes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        wanted = headers.get(b"x-request-id", "")
        scope["ltxrt_request_id"] = wanted if _SANE_ID.fullmatch(wanted) else token_hex(16)
        started, status, received = time.monotonic(), 0, 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise _TooLargeError
            return message

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["X-Request-Id"] = request_id(scope)
                for name, value in _HEADERS.items():
                    out.setdefault(name, value)
            await send(message)

        announced = headers.get(b"content-length", "0")
        too_large = ProblemError("body_too_large", f"at most {self._max_body_bytes} bytes are read")
        try:
            if announced.isdigit() and int(announced) > self._max_body_bytes:
                raise _TooLargeError
            await self._app(scope, counted, answer)
        except _TooLargeError:
            if status:  # it is too late to say so
                raise
            too_large.headers["Connection"] = "close"
            await problem_response(scope["path"], too_large, request_id(scope))(scope, receive, answer)
        finally:
            self._metrics.answered(scope["method"], status)
            details = {
                "event": "http",
                "method": scope["method"],
                "path": _SECRET_PATH.sub(r"\1/…", scope["path"]),
                "status": status,
                "milliseconds": round(1000 * (time.monotonic() - started), 1),
                "request_id": request_id(scope),
            }
            _LOG.info("request", extra=details)
