# SPDX-License-Identifier: Apache-2.0
"""Spans of requests and jobs, caught in memory; what they hold and what they must not."""

import sys

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient

from ltxrt.errors import RequestError
from ltxrt.serve.app import create_app
from ltxrt.serve.settings import Settings
from ltxrt.serve.telemetry import Telemetry, open_telemetry

PARENT = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
def caught():
    return InMemorySpanExporter()


@pytest.fixture
def traced(tmp_path, scripted, caught):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(caught))
    settings = Settings(no_auth=True, data=str(tmp_path / "data"), warm_up=(), threads=1)
    app = create_app(settings, factory=scripted, telemetry=Telemetry(provider))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        yield client


def test_a_request_and_its_job(traced, caught, sound):
    body = {"prompt": "a secret face", "input_audio": sound, "resolution": "128x128"}
    headers = {"traceparent": f"00-{PARENT}-00f067aa0ba902b7-01", "X-Request-Id": "mine"}
    assert traced.post("/api/ai/videos/generate", json=body, headers=headers).status_code == 200
    spans = {span.name: span for span in caught.get_finished_spans()}
    request, job = spans["POST /api/ai/videos/generate"], spans["job"]
    assert f"{request.context.trace_id:032x}" == PARENT
    assert request.attributes["ltxrt.request_id"] == "mine"
    assert request.attributes["http.response.status_code"] == 200
    assert [link.context.span_id for link in job.links] == [request.context.span_id]
    assert job.parent is None
    assert (job.attributes["ltxrt.job.state"], job.attributes["ltxrt.job.attempts"]) == ("succeeded", 1)
    stages = ["queue wait", "run", "load", "encode", "denoise_1", "upsample", "denoise_2", "decode"]
    assert set(stages) <= spans.keys()
    for name in stages:
        assert spans[name].parent.span_id == job.context.span_id
        assert job.start_time <= spans[name].start_time <= spans[name].end_time
    assert spans["run"].end_time == job.end_time
    assert not [word for word in ("secret", "base64", "/files/") if word in str([s.to_json() for s in spans.values()])]


def test_failures_and_what_is_quiet(traced, caught, sound):
    traced.get("/health")
    assert caught.get_finished_spans() == ()
    traced.get("/files/an-id/a-token/clip.mp4")
    (missing,) = caught.get_finished_spans()
    assert (missing.name, missing.status.is_ok) == ("GET /files/{job_id}/{token}/clip.mp4", True)
    body = {"prompt": "engine", "input_audio": sound, "resolution": "128x128"}
    assert traced.post("/api/ai/videos/generate", json=body).status_code == 500
    spans = {span.name: span for span in caught.get_finished_spans()}
    assert not spans["POST /api/ai/videos/generate"].status.is_ok
    assert spans["job"].status.description == "engine_error"
    assert "denoise_1" not in spans


def test_it_is_off_unless_asked_for_and_says_what_is_missing(monkeypatch):
    assert not Settings(no_auth=True).otel
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(RequestError, match=r"ltxrt\[otel\]"):
        open_telemetry()


def test_where_spans_go_is_the_environment_s_business(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "clips")
    telemetry = open_telemetry()
    try:
        resource = telemetry.tracer.resource
        assert resource.attributes["service.name"] == "clips"
        assert telemetry.tracer.start_span("x").is_recording()
    finally:
        telemetry.close()
