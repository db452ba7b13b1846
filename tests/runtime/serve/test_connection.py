# SPDX-License-Identifier: Apache-2.0
"""Callers who take their time: to ask, and to take what they asked for."""

import socket
import time
from contextlib import suppress

import pytest

HEAD = b"GET /health HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(scope="module")
def brisk(tmp_path_factory, serve_in):
    """A server without patience: its port."""
    folder = tmp_path_factory.mktemp("brisk")
    with serve_in(folder, max_header_seconds=0.6, max_stall_seconds=0.6) as server:
        yield int(server.url.rpartition(":")[2])


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def answer(connection):
    """The next answer, a JSON object."""
    data = b""
    while not data.endswith(b"}"):
        piece = connection.recv(4096)
        assert piece, data
        data += piece
    return data


def hung_up(connection, drip=b""):
    """Seconds until the server ends a connection that is sent one byte now and then."""
    started = time.monotonic()
    connection.settimeout(0.1)
    while time.monotonic() - started < 10:
        try:
            if drip:
                connection.send(drip)
            if not connection.recv(4096):
                break
        except TimeoutError:
            continue
        except ConnectionError:
            break
    else:
        raise AssertionError("it waits for ever")
    return time.monotonic() - started


@pytest.mark.parametrize(
    ("start", "drip"),
    [(b"", b""), (b"G", b""), (HEAD, b"x"), (HEAD + b"X: ", b"x")],
    ids=["silent", "a letter", "a name that goes on", "a value that goes on"],
)
def test_headers_that_never_end(brisk, start, drip):
    with connect(brisk) as connection:
        connection.sendall(start)
        assert hung_up(connection, drip) < 3


def test_headers_after_an_answer(brisk):
    with connect(brisk) as connection:
        connection.sendall(HEAD + b"\r\n")
        answer(connection)
        assert hung_up(connection, b"x") < 3


def test_who_is_slow_within_reason_is_served(brisk):
    with connect(brisk) as connection:
        for _ in range(3):  # together longer than one may take
            connection.sendall(HEAD)
            time.sleep(0.3)
            connection.sendall(b"\r\n")
            assert answer(connection).endswith(b'{"status":"ok"}')
        head = b"POST /v1/uploads HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Length: 2\r\n\r\n"
        connection.sendall(head + b"a")
        time.sleep(1)  # a body has its own time
        connection.sendall(b"b")
        assert answer(connection).startswith(b"HTTP/1.1 201")


def test_an_answer_that_nobody_takes(brisk):
    asked = 200
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(10)
        connection.connect(("127.0.0.1", brisk))
        connection.sendall(b"GET /page/speech.flac HTTP/1.1\r\nHost: x\r\n\r\n" * asked)
        time.sleep(3)
        answers = 0
        with suppress(ConnectionError):
            while piece := connection.recv(1 << 16):
                answers += piece.count(b"HTTP/1.1 200")
        assert answers < asked
