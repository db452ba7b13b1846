# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for tests: a server on this machine that answers as the Hugging Face hub does, as far as downloads ask.

Listing, access check and file addresses with their redirect to another host; ranges; and faults on request: gated or
unknown repositories, refused tokens, connections that break, servers that cannot seek or send something else.
"""

import hashlib
import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["COMMIT", "FakeHub", "serving"]

#: Of every repository.
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """What the server holds, how it misbehaves, and what it was asked.

    Attributes:
        repositories: Content of each file, by repository and name.
        small: Names of files that are stored in git itself, without a SHA-256.
        token: What a request has to carry; None lets everybody in.
        gated: Repositories whose terms the token's owner has not accepted.
        gone: Files that are listed and cannot be fetched.
        break_after: The connection of the next transfers breaks after so many bytes, one entry each.
        statuses: Answers to the next transfers that are not the file, one entry each.
        seeks: Whether ranges are honoured.
        corrupt: Names of files that are sent with a changed byte.
        fetched: Name and first byte of every transfer.
        authorized: Whether each transfer from the second host carried the token.
    """

    repositories: dict[str, dict[str, bytes]]
    small: set[str] = field(default_factory=set[str])
    token: str | None = None
    gated: set[str] = field(default_factory=set[str])
    gone: set[str] = field(default_factory=set[str])
    break_after: list[int] = field(default_factory=list[int])
    statuses: list[int] = field(default_factory=list[int])
    seeks: bool = True
    corrupt: set[str] = field(default_factory=set[str])
    fetched: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    authorized: list[bool] = field(default_factory=list[bool])
    endpoint: str = ""
    cdn: str = ""


@contextmanager
def serving(hub: FakeHub) -> Generator[FakeHub]:
    """Serve ``hub`` while the context lasts; ``endpoint`` is its address."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        port = server.server_address[1]
        # Two names of one server are two hosts to a client.
        hub.endpoint, hub.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/cdn/"):
            _, _, owner, name, file = path.split("/", 4)
            self._file(f"{owner}/{name}", file)
        elif path.startswith("/api/models/"):
            owner, name, *rest = path.removeprefix("/api/models/").split("/")
            self._listed(f"{owner}/{name}", "auth-check" in rest)
        elif "/resolve/" in path:
            owner, name, _, revision, file = path.removeprefix("/").split("/", 4)
            self._address(f"{owner}/{name}", revision, file)
        else:
            self._refuse(404)  # the library asks for more than files

    def _listed(self, repository: str, access: bool) -> None:
        if repository not in self.hub.repositories:
            self._refuse(401, "RepoNotFound")
        elif access:
            if self._allowed(repository):
                self._json({})
        elif self._token_fits():
            files = self.hub.repositories[repository]
            self._json({"id": repository, "sha": COMMIT, "siblings": [self._sibling(n, d) for n, d in files.items()]})

    def _sibling(self, name: str, data: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        sibling: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob}
        if name not in self.hub.small:
            sibling["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return sibling

    def _token_fits(self) -> bool:
        given = self.headers.get("Authorization")
        if given is not None and given != f"Bearer {self.hub.token}":
            self._refuse(401, message="Invalid credentials in Authorization header")
            return False
        return True

    def _allowed(self, repository: str) -> bool:
        if not self._token_fits():
            return False
        if repository in self.hub.gated or (self.hub.token is not None and "Authorization" not in self.headers):
            self._refuse(403 if "Authorization" in self.headers else 401, "GatedRepo")
            return False
        return True

    def _address(self, repository: str, revision: str, file: str) -> None:
        if not self._allowed(repository):
            return
        if file in self.hub.gone or revision != COMMIT:
            self._refuse(404, "EntryNotFound")
            return
        self.send_response(302)
        self.send_header("Location", f"{self.hub.cdn}/cdn/{repository}/{file}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _file(self, repository: str, file: str) -> None:
        hub = self.hub
        hub.authorized.append("Authorization" in self.headers)
        if hub.statuses:
            self._refuse(hub.statuses.pop(0))
            return
        data = hub.repositories[repository][file]
        if file in hub.corrupt:
            data = bytes([data[0] ^ 1]) + data[1:]
        wanted = self.headers.get("Range")
        begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and hub.seeks else 0
        hub.fetched.append((file, begin))
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        sent = data[begin:]
        self.wfile.write(sent[: hub.break_after.pop(0)] if hub.break_after else sent)

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str | None = None, message: str | None = None) -> None:
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        if message is not None:
            self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()
