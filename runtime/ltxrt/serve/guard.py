# SPDX-License-Identifier: Apache-2.0
"""Around every exchange: a cap on the body, a request id, security headers, one log line, one count."""

import asyncio
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


class _BodyRefusedError(Exception):
    """The body is larger than allowed, or takes longer to come."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        # The rest of the body is not read, so that nothing else can come over this connection.
        self.problem = ProblemError(kind, detail, headers={"Connection": "close"})


def request_id(scope: Scope) -> str:
    """The id of the request at hand."""
    return scope.get("ltxrt_request_id", "")


class Guard:
    """ASGI middleware.

    Args:
        app: What it guards.
        max_body_bytes: Cap on every request's body.
        max_body_seconds: Cap on the time from its first byte to its last.
        metrics: Where answers are counted.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_body_seconds: float, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._max_body_bytes, self._max_body_seconds = max_body_bytes, max_body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        wanted = headers.get(b"x-request-id", "")
        scope["ltxrt_request_id"] = wanted if _SANE_ID.fullmatch(wanted) else token_hex(16)
        started, status = time.monotonic(), 0

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
        try:
            if announced.isdigit() and int(announced) > self._max_body_bytes:
                raise self._too_large()
            await self._app(scope, self._counted(receive), answer)
        except _BodyRefusedError as refused:
            if status:  # it is too late to say so
                raise
            await problem_response(scope["path"], refused.problem, request_id(scope))(scope, receive, answer)
        except Exception:
            if not status:
                # The HTTP server, told of the error, hangs up.
                close = {"Connection": "close"}
                problem = ProblemError("internal_error", "the server's log says more under this id", headers=close)
                await problem_response(scope["path"], problem, request_id(scope))(scope, receive, answer)
            raise  # so that its traceback is logged
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

    def _counted(self, receive: Receive) -> Receive:
        """``receive`` that holds the body to its caps; after the body it waits as long as it takes."""
        received, whole, end = 0, False, time.monotonic() + self._max_body_seconds

        async def counted() -> Message:
            nonlocal received, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout(max(0.0, end - time.monotonic())):
                    message = await receive()
            except TimeoutError:
                raise _BodyRefusedError("body_too_slow", f"it has {self._max_body_seconds:g} s to come") from None
            received += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if received > self._max_body_bytes:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> _BodyRefusedError:
        return _BodyRefusedError("body_too_large", f"at most {self._max_body_bytes} bytes are read")
