# SPDX-License-Identifier: Apache-2.0
"""Files from addresses that callers name, without lending them the server's place in the network.

Each hop is resolved once; where any address is not public the hop is refused; the connection goes to the address that
was checked, under the name that was asked for (Host, SNI, certificate), so that a second answer of the resolver changes
nothing. Redirects are followed by hand under the same rules. Proxies from the environment are not used, no credentials
or cookies are sent, and time and bytes are capped over the whole of it, headers and drip-fed bodies included.
"""

import http.client
import re
import socket
import ssl
import threading
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import BinaryIO
from urllib.parse import SplitResult, urljoin, urlsplit

from .addresses import Network, Resolver, is_public, resolve

__all__ = ["FetchError", "FetchRules", "fetch", "shown_url"]

_PORTS = {"https": 443, "http": 80}
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_CHUNK_BYTES = 1 << 16
_LONGEST_URL = 8192
_MOST_ADDRESSES = 4  # of a host; one with a thousand that never answer would keep a thread for hours


class FetchError(Exception):
    """What is wrong with an address, in words that follow the field's name and hold nothing of the address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchRules:
    """What may be fetched.

    Attributes:
        schemes: ``https``, and ``http`` where the operator wants it.
        networks: Networks that are not public and yet allowed, for an object store next door; on any port.
        domains: Host names, with all below them, that are allowed; empty for all.
        timeout_seconds: For everything, from the first look-up to the last byte.
        max_redirects: Hops after the first.
    """

    schemes: tuple[str, ...] = ("https",)
    networks: tuple[Network, ...] = ()
    domains: tuple[str, ...] = ()
    timeout_seconds: float = 30.0
    max_redirects: int = 5


def fetch(url: str, target: BinaryIO, max_bytes: int, rules: FetchRules, resolver: Resolver = resolve) -> None:
    """Write what an address serves to a file. Blocks; call it in a thread.

    Raises:
        FetchError: The address is not allowed, or does not serve a file within the caps.
    """
    clock = _Clock(rules.timeout_seconds)
    with closing(clock):
        for _ in range(rules.max_redirects + 1):
            parts = _checked(url, rules)
            connection = _connection(parts, rules, resolver, clock)
            try:
                location = _receive(connection, parts, target, max_bytes, clock)
            finally:
                connection.release()
            if location is None:
                return
            url = urljoin(url, location)
    raise FetchError(f"redirects more than {rules.max_redirects} times")


def shown_url(url: str) -> str:
    """An address as logs may show it: the rest may be a signature or a secret."""
    parts = re.match(r"(?:https?)://(?:[^/?#@]*@)?([\w.:-]{1,100})", url)
    return f"address at {parts[1]}" if parts else "address"


class _Clock:
    """Ends the connection at hand when the time is over, whatever it is waiting for."""

    def __init__(self, seconds: float) -> None:
        self.over = False
        self.seconds = seconds
        self._end_at = time.monotonic() + seconds
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    @property
    def left(self) -> float:
        """Seconds until then; never 0, which a socket would take for something else."""
        return max(0.001, self._end_at - time.monotonic())

    def guard(self, connected: socket.socket) -> None:
        """Watch this socket from now on."""
        self._socket = connected
        if self.over:
            self._end()

    def close(self) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        self.over = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


class _PinnedConnection(http.client.HTTPConnection):
    """A connection to an address that has been checked, under another name."""

    def __init__(self, parts: SplitResult, addresses: list[str], clock: _Clock) -> None:
        assert parts.hostname is not None  # checked before
        super().__init__(parts.hostname, parts.port or _PORTS[parts.scheme], timeout=clock.seconds)
        self._addresses, self._clock, self._tls = addresses, clock, parts.scheme == "https"
        self._watched: socket.socket | None = None

    def connect(self) -> None:
        raw = self._reach()
        self.sock = raw
        # A duplicate, because TLS takes the file descriptor away from the socket that it wraps.
        self._watched = raw.dup()
        self._clock.guard(self._watched)
        if self._tls:
            self.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=self.host)

    def release(self) -> None:
        """Close everything. Not ``close``, which ``http.client`` calls once the headers are read."""
        self.close()
        if self._watched is not None:
            self._watched.close()

    def _reach(self) -> socket.socket:
        """A connection to the first address that takes one."""
        *others, last = self._addresses[:_MOST_ADDRESSES]
        for address in others:
            with suppress(OSError):
                patience = min(self._clock.seconds / _MOST_ADDRESSES, self._clock.left)
                return socket.create_connection((address, self.port), timeout=patience)
        return socket.create_connection((last, self.port), timeout=self._clock.left)


def _checked(url: str, rules: FetchRules) -> SplitResult:
    """The parts of an address that keeps the rules, all but those about its host's addresses."""
    if len(url) > _LONGEST_URL or not re.fullmatch(r"[!-~]+", url) or "\\" in url:
        raise FetchError("is not an address (characters outside ASCII are to be percent-encoded)")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise FetchError("is not an address") from error
    if parts.scheme not in rules.schemes:
        raise FetchError(f"has the scheme {parts.scheme[:20]!r} (fetched: {', '.join(rules.schemes)})")
    host = (parts.hostname or "").rstrip(".")
    if not host:
        raise FetchError("names no host")
    if "@" in parts.netloc:
        raise FetchError("holds a user name or a password")
    if port not in (None, _PORTS[parts.scheme]) and not rules.networks:
        raise FetchError(f"has the port {port} (fetched: {_PORTS[parts.scheme]})")
    if rules.domains and not any(host == domain or host.endswith(f".{domain}") for domain in rules.domains):
        raise FetchError("is at a host that this server does not fetch from")
    return parts


def _connection(parts: SplitResult, rules: FetchRules, resolver: Resolver, clock: _Clock) -> _PinnedConnection:
    assert parts.hostname is not None
    port = parts.port or _PORTS[parts.scheme]
    try:
        addresses = resolver(parts.hostname, port)
    except (OSError, UnicodeError) as error:
        raise FetchError("is at a host that is not known") from error
    private = [address for address in addresses if not is_public(address, rules.networks)]
    if private or not addresses:
        raise FetchError("is at a host whose address is not public")
    if port != _PORTS[parts.scheme] and any(is_public(address) for address in addresses):
        raise FetchError(f"has the port {port} (fetched: {_PORTS[parts.scheme]})")
    if clock.over:
        raise FetchError(f"took longer than {clock.seconds:g} s")
    return _PinnedConnection(parts, addresses, clock)


def _receive(
    connection: _PinnedConnection, parts: SplitResult, target: BinaryIO, max_bytes: int, clock: _Clock
) -> str | None:
    """Write the body of one answer to the file; where it is a redirect, return where to instead."""
    path = f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
    headers = {"Accept-Encoding": "identity", "Accept": "*/*", "User-Agent": "ltxrt", "Connection": "close"}
    try:
        connection.request("GET", path, headers=headers)
        with closing(connection.getresponse()) as answer:
            if answer.status in _REDIRECTS and (location := answer.getheader("Location")):
                return location
            _copy(answer, target, max_bytes)
        if clock.over:
            raise FetchError(f"took longer than {clock.seconds:g} s")
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = f"took longer than {clock.seconds:g} s" if clock.over else _reason(error)
        raise FetchError(reason) from error
    return None


def _copy(answer: http.client.HTTPResponse, target: BinaryIO, max_bytes: int) -> None:
    too_large = FetchError(f"is larger than {max_bytes} bytes")
    if answer.status != http.client.OK:
        raise FetchError(f"answers with status {answer.status}")
    if answer.getheader("Content-Encoding", "identity").lower() != "identity":
        raise FetchError("is served compressed, which was not asked for")
    if (answer.length or 0) > max_bytes:
        raise too_large
    received = 0
    # One read of the socket at a time, so that neither cap waits for the other.
    while piece := answer.read1(_CHUNK_BYTES):
        received += len(piece)
        if received > max_bytes:
            raise too_large
        target.write(piece)
    if answer.length:
        raise FetchError("was cut off")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return "is at a host whose certificate does not hold"
    return f"cannot be fetched ({type(error).__name__})"
