# SPDX-License-Identifier: Apache-2.0
"""The OpenAPI document holds: whatever it allows or forbids, each answer is one that it names, and none is a 5xx.

Schemathesis derives the requests from the document, with a seed of its own that never changes. ``/api/events`` alone
is asked by hand, because its answer has no end.
"""

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from ltxrt.serve.app import create_app
from ltxrt.serve.contract import OPERATIONS
from ltxrt.serve.settings import Settings

EXAMPLES = 5
#: Other names for bodies that are tried at length elsewhere.
TWINS = (
    "/api/ai/videos/generate",
    "/v1/videos/sync",
    "/v1/videos/stream",
    "/fal/run/fal-ai/ltx-2.3-quality/audio-to-video",
)
DOCUMENT = create_app(Settings(no_auth=True)).openapi()
CONFIG = schemathesis.Config.from_dict(
    {
        "seed": 1,
        "generation": {
            "deterministic": True,
            "max-examples": EXAMPLES,
            "database": "none",
            "with-security-parameters": False,
            "allow-extra-parameters": False,  # parameters that nobody reads are nobody's business
        },
        # A valid address is not yet a sound: what is valid is shown by the tests of each API.
        "checks": {"positive_data_acceptance": {"enabled": False}},
        "operations": [{"include-path": path, "phases": {"coverage": {"enabled": False}}} for path in TWINS],
    }
)
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT, config=CONFIG).exclude(path="/api/events")


@pytest.fixture(scope="module")
def contracted(tmp_path_factory, serve_in):
    """A server that fetches nothing and never runs out of room."""
    with serve_in(
        tmp_path_factory.mktemp("contract"),
        fetch_domains=["nothing.invalid"],
        max_queued=10_000,
        max_jobs_per_key=10_000,
        max_uploads=10_000,
        drain_seconds=0.1,
    ) as server:
        yield server


def test_every_route_is_described():
    assert {(method, path) for path, item in DOCUMENT["paths"].items() for method in item} == set(OPERATIONS)


@SCHEMA.parametrize()
@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
def test_answers(case, contracted):
    case.call_and_validate(base_url=contracted.url, headers={"Authorization": "Bearer secret"}, timeout=20)


def test_the_stream_of_events(contracted):
    (described,) = (each for path, item in DOCUMENT["paths"].items() for each in item.values() if path == "/api/events")
    assert described["responses"].keys() == {"200", "400", "401", "403", "503"}
    with contracted.client() as client:
        with client.stream("GET", "/api/events", headers={"Last-Event-ID": "3"}) as answer:
            assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
            assert next(answer.iter_lines()).startswith(":")
        for wrong in ("-1", "1e3", "", "9" * 19):
            assert client.get("/api/events", headers={"Last-Event-ID": wrong}).status_code == 400


def test_methods_of_a_path_are_all_allowed(contracted):
    with contracted.client() as client:
        assert client.put("/api/ai/queue").headers["allow"] == "GET, POST"
        assert client.put("/v1/videos/x").headers["allow"] == "DELETE, GET"
