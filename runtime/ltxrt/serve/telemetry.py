# SPDX-License-Identifier: Apache-2.0
"""Traces by OpenTelemetry: a span of every request, and of every job with its wait and its stages.

Off unless the ``otel`` setting is on, and then in need of the ``otel`` extra. Where spans go is said by the standard
environment (``OTEL_EXPORTER_OTLP_ENDPOINT``, ``OTEL_SERVICE_NAME``, ...): OTLP over HTTP. A caller's ``traceparent``
becomes the parent of the request's span. A job outlives its request, and its server perhaps, so it is a trace of its
own with a link to the request that made it, where this server still knows that one. Attributes hold ids, states and
sizes: no prompt, no address, no key.
"""

from collections import OrderedDict
from importlib.metadata import version
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import RequestError
from .guard import request_id
from .job import Job

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import SpanContext

__all__ = ["Telemetry", "Traced", "open_telemetry"]

_REMEMBERED = 10_000
#: Asked for all the time, and worth no span.
_QUIET = frozenset(("/health", "/healthz", "/ping", "/ready", "/metrics"))


def open_telemetry() -> "Telemetry":
    """Spans to where the environment says.

    Raises:
        RequestError: The ``otel`` extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise RequestError(
            "otel", True, "false, or an installation with the extra: pip install 'ltxrt[otel]'"
        ) from error
    ours = Resource({"service.name": "ltxrt", "service.version": version("ltxrt")})
    provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()))  # the environment's words win
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Telemetry(provider)


class Telemetry:
    """Makes the spans of jobs.

    Args:
        provider: Where they go; shut down at the end.

    Attributes:
        tracer: Makes spans.
    """

    def __init__(self, provider: "TracerProvider") -> None:
        self._provider, self.tracer = provider, provider.get_tracer("ltxrt.serve")
        self._requests: OrderedDict[str, SpanContext] = OrderedDict()

    def submitted(self, job_id: str) -> None:
        """The request at hand has made a job."""
        from opentelemetry.trace import get_current_span

        self._requests[job_id] = get_current_span().get_span_context()
        while len(self._requests) > _REMEMBERED:
            self._requests.popitem(last=False)

    def ended(self, job: Job) -> None:
        """A job has ended: its span, with those of its wait and its stages below it.

        Stages are drawn one after the other in the order in which they ran, each as long as it took in all; of a job
        without a clip only wait and run are known.
        """
        from opentelemetry.context import Context
        from opentelemetry.trace import Link, StatusCode, set_span_in_context

        if job.completed_at is None:
            return
        request = self._requests.pop(job.id, None)
        links = [Link(request)] if request is not None and request.is_valid else []
        attributes = {"ltxrt.job.id": job.id, "ltxrt.job.state": job.state, "ltxrt.job.attempts": job.attempts}
        span = self.tracer.start_span(
            "job", Context(), links=links, attributes=attributes, start_time=_ns(job.created_at)
        )
        if job.state == "failed":
            span.set_status(StatusCode.ERROR, job.error_type)
        inside = set_span_in_context(span, Context())

        def part(name: str, start: float, end: float) -> None:
            self.tracer.start_span(name, inside, start_time=_ns(start)).end(_ns(end))

        part("queue wait", job.created_at, job.started_at or job.completed_at)
        if job.started_at is not None:
            part("run", job.started_at, job.completed_at)
            moment = job.started_at
            for stage, seconds in (job.result or {}).get("stage_seconds", {}).items():
                part(stage, moment, moment + seconds)
                moment += seconds
        span.end(_ns(job.completed_at))

    def close(self) -> None:
        """Send what has not been sent."""
        self._provider.shutdown()


class Traced:
    """ASGI middleware within ``Guard``: a span of every request, current while it is answered.

    Args:
        app: What it traces.
        telemetry: Makes the spans.
    """

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app, self._tracer = app, telemetry.tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if scope["type"] != "http" or scope["path"] in _QUIET:
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        parent = TraceContextTextMapPropagator().extract(headers)
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        with self._tracer.start_as_current_span(scope["method"], parent, SpanKind.SERVER) as span:
            try:
                await self._app(scope, receive, answer)
            finally:
                # The route's pattern: what stands in its place in the path may be an id or a result's token.
                route = getattr(scope.get("route"), "path", None)
                shown = {"http.request.method": scope["method"], "http.response.status_code": status}
                span.set_attributes({**shown, "ltxrt.request_id": request_id(scope)})
                if route is not None:
                    span.set_attribute("http.route", route)
                    span.update_name(f"{scope['method']} {route}")
                if not status or status >= 500:
                    span.set_status(StatusCode.ERROR)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
