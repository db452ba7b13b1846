# SPDX-License-Identifier: Apache-2.0
"""The page as it is sent: whole, without a key, under a policy that it keeps, with every field and no limit of its own.

What it does in a browser is in ``test_page_browser``.
"""

import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from ltxrt.media import bundled_speech
from ltxrt.request import DEFAULT_NEGATIVE_PROMPT, MAX_FRAMES, MAX_SEED, NAMED_SIZES, Request
from ltxrt.result import STAGES
from ltxrt.serve.model import json_request_schema

ROOT = Path(__file__).parents[3]
PAGE = resources.files("ltxrt.serve") / "page"
FILES = {item.name: item.read_text("utf-8") for item in PAGE.iterdir()}
INDEX = FILES["index.html"]
SCRIPTS = {name: text for name, text in FILES.items() if name.endswith(".js")}


class Elements(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self):
        super().__init__()
        self.found = []
        self.feed(INDEX)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


ELEMENTS = Elements().found


@pytest.fixture
def anyone(server):
    """A client without a key."""
    with server.client(key=None) as opened:
        yield opened


def test_page_needs_no_key(anyone):
    answer = anyone.get("/")
    assert (answer.status_code, answer.text) == (200, INDEX)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-length"] == anyone.head("/").headers["content-length"]
    assert anyone.get("/v1/models").status_code == 401


def test_policy_lets_nothing_in_from_elsewhere(anyone):
    headers = anyone.get("/").headers
    policy = dict(rule.strip().split(" ", 1) for rule in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["img-src"] == policy["media-src"] == "'self' blob:"
    assert (policy["require-trusted-types-for"], policy["trusted-types"]) == ("'script'", "'none'")
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["permissions-policy"] == "camera=(), geolocation=(), microphone=(self)"
    assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY")
    # The rest of the server keeps its own, which is stricter still.
    assert anyone.get("/health").headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"


def test_page_keeps_the_policy():
    assert not [tag for tag, attributes in ELEMENTS if tag == "style" or "style" in attributes]
    assert not [name for _, attributes in ELEMENTS for name in attributes if name.startswith("on")]
    assert all("src" in attributes for tag, attributes in ELEMENTS if tag == "script")
    for name, text in SCRIPTS.items():
        assert not re.search(r"\b(innerHTML|outerHTML|insertAdjacentHTML|eval|document\.write)\b", text), name
    addresses = {address for text in FILES.values() for address in re.findall(r"https?://[^\s\"']+", text)}
    assert addresses == {"http://www.w3.org/2000/svg"}


def test_everything_that_is_loaded_is_there_and_used(anyone):
    types = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml", "flac": "audio/flac"}
    loaded = {attributes[name] for _, attributes in ELEMENTS for name in ("src", "href") if attributes.get(name)}
    loaded = {address for address in loaded if not address.startswith("#")}
    loaded |= {f"page/{name}" for text in SCRIPTS.values() for name in re.findall(r'from "\./(.+)";', text)}
    for address in (*loaded, "page/speech.flac"):
        answer = anyone.get(f"/{address}")
        assert answer.status_code == 200, address
        assert answer.headers["content-type"].split(";")[0] == types[address.rpartition(".")[2]]
    assert loaded == {f"page/{name}" for name in FILES if name != "index.html"}
    assert anyone.get("/page/speech.flac").content == bundled_speech().read_bytes()


def test_what_has_not_changed_is_not_sent_again(anyone):
    tag = anyone.get("/page/main.js").headers["etag"]
    again = anyone.get("/page/main.js", headers={"If-None-Match": f'"other", W/{tag}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert again.headers["cache-control"] == "no-cache"
    assert anyone.get("/page/main.js", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize("name", ["nothing.js", "index.html", "..%2froutes_page.py", "%2e%2e/app.py", ""])
def test_nothing_else_is_sent(anyone, name):
    answer = anyone.get(f"/page/{name}")
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
    assert anyone.post("/").status_code == 405


def test_wheel_holds_the_page():
    included = {Path(file.distribution_path) for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    assert {Path("ltxrt/serve/page", name) for name in FILES} <= included


# --- the form ---


def test_every_field_has_a_place():
    shown = [attributes["data-field"] for _, attributes in ELEMENTS if "data-field" in attributes]
    assert sorted(shown) == sorted(Request.model_fields)
    ids = [attributes["id"] for _, attributes in ELEMENTS if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(Request.model_fields) | {"width", "height"} <= set(ids)


def test_what_scripts_look_for_is_on_the_page():
    ids = {attributes["id"] for _, attributes in ELEMENTS if "id" in attributes}
    wanted = {name for text in SCRIPTS.values() for name in re.findall(r'byId\("([\w-]+)"\)', text)}
    assert len(wanted) > 60
    assert wanted <= ids
    icons = {name for text in SCRIPTS.values() for name in re.findall(r'setIcon\([^;]*"(\w+)" : "(\w+)"', text)}
    assert {f"i-{name}" for pair in icons for name in pair} <= ids


def test_no_limit_or_default_is_repeated():
    """They come from ``json_request_schema`` alone."""
    named = [
        attributes for tag, attributes in ELEMENTS if tag in ("input", "select", "textarea") and "name" in attributes
    ]
    fields = [attributes for attributes in named if attributes["name"] in Request.model_fields]
    assert len(fields) == len(Request.model_fields) - 2  # but for the two files
    for attributes in fields:
        assert not {"min", "max", "maxlength", "pattern", "value", "checked", "required"} & attributes.keys()
    assert not [tag for tag, _ in ELEMENTS if tag == "option"]
    size = json_request_schema()["$defs"]["Size"]["properties"]["width"]["maximum"]
    frames = Request.model_fields["num_frames"].default
    numbers = {str(number) for number in (MAX_FRAMES, MAX_SEED, size, frames, 10_000)}
    for name, text in {**SCRIPTS, "index.html": INDEX}.items():
        assert not numbers & set(re.findall(r"\d+", text)), name
        assert not [word for word in (*NAMED_SIZES, DEFAULT_NEGATIVE_PROMPT[:20]) if f'"{word}"' in text], name


def test_stages_are_those_of_the_pipeline():
    block = re.search(r"const STAGES = \{(.*?)\};", SCRIPTS["progress.js"], re.DOTALL)[1]
    assert tuple(re.findall(r"^  (\w+):", block, re.MULTILINE)) == STAGES


def test_page_is_no_part_of_the_api(client):
    assert not [path for path in client.get("/openapi.json").json()["paths"] if path == "/" or "page" in path]
