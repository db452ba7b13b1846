# SPDX-License-Identifier: Apache-2.0
"""Fetching: an own server plays every trick, and what is inside stays out of reach."""

import io
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_network

import pytest

from ltxrt.serve.fetch import FetchError, FetchRules, fetch, shown_url

LOCAL = FetchRules(schemes=("http", "https"), networks=(ip_network("127.0.0.1/32"),), timeout_seconds=5)


class Tricks(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.seen.append((self.path, dict(self.headers)))
        trick = self.path.partition("?")[0].strip("/").split("/")
        answers = {
            "file": lambda: self.answer(b"x" * 100_000),
            "redirect": lambda: self.answer(b"", 302, Location="/".join(trick[1:])),
            "loop": lambda: self.answer(b"", 302, Location="/loop"),
            "missing": lambda: self.answer(b"", 404),
            "zipped": lambda: self.answer(b"x", **{"Content-Encoding": "gzip"}),
            "cut": lambda: self.head("1000") or self.wfile.write(b"x"),
            "endless": lambda: self.head() or self.pour(b"x" * 10_000, 0),
            "drip": lambda: self.head() or self.pour(b"x", 0.02),
            "slow-headers": lambda: self.pour(b"X", 0.02),
        }
        answers[trick[0]]()

    def head(self, length=None):
        self.send_response(200)
        if length:
            self.send_header("Content-Length", length)
        self.end_headers()

    def pour(self, piece, pause):
        while not self.server.over.wait(pause):
            self.wfile.write(piece)
            self.wfile.flush()

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        pass


@pytest.fixture(scope="module")
def server():
    served = QuietServer(("127.0.0.1", 0), Tricks)
    served.seen, served.over = [], threading.Event()
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    yield served
    served.over.set()
    served.shutdown()
    served.server_close()
    thread.join()


def got(server, path, rules=LOCAL, max_bytes=200_000, **options):
    target = io.BytesIO()
    fetch(f"http://127.0.0.1:{server.server_port}/{path}", target, max_bytes, rules, **options)
    return target.getvalue()


def test_a_file_arrives(server):
    assert got(server, "file?a=b") == b"x" * 100_000
    path, headers = server.seen[-1]
    assert path == "/file?a=b"
    assert headers["Accept-Encoding"] == "identity"
    assert not {"Authorization", "Cookie"} & headers.keys()


def test_redirects_are_followed_and_checked_again(server):
    assert got(server, "redirect//file") == b"x" * 100_000
    for inside in (f"http://127.0.0.2:{server.server_port}/file", "http://[::1]/", "http://169.254.169.254/latest"):
        with pytest.raises(FetchError, match="not public"):
            got(server, f"redirect/{inside}")
    with pytest.raises(FetchError, match="scheme 'file'"):
        got(server, "redirect/file:///etc/passwd")
    with pytest.raises(FetchError, match="more than 5 times"):
        got(server, "loop")


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("missing", "status 404"),
        ("zipped", "compressed"),
        ("endless", "larger than 200000 bytes"),
        ("cut", "cut off|IncompleteRead"),
    ],
)
def test_bodies_that_are_refused(server, path, problem):
    with pytest.raises(FetchError, match=problem):
        got(server, path)


def test_announced_size_is_refused_before_it_comes(server):
    with pytest.raises(FetchError, match="larger than 99999 bytes"):
        got(server, "file", max_bytes=99_999)
    assert got(server, "file", max_bytes=100_000)


@pytest.mark.parametrize("path", ["drip", "slow-headers"])
def test_time_is_capped_however_slowly_it_comes(server, path):
    started = time.monotonic()
    with pytest.raises(FetchError, match=r"took longer than 0\.4 s"):
        got(server, path, FetchRules(schemes=("http",), networks=LOCAL.networks, timeout_seconds=0.4))
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://localhost/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://0/",
        "http://0177.0.0.1/",
        "http://127.1/",
        "http://0x7f000001/",
        "http://017700000001/",
        "http://[::]/",
        "http://[::ffff:a9fe:a9fe]/",
        "http://[::ffff:0:127.0.0.1]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[2002:7f00:1::]/",
        "http://[2001:0:7f00:1::]/",
        "http://[fe80::1]/",
        "http://[fe80::1%25eth0]/",
        "http://100.64.0.1/",
        "http://224.0.0.1/",
        "http://240.0.0.1/",
        "http://255.255.255.255/",
        "http://①②⑦.⓪.⓪.①/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[fd00:ec2::254]/",
        "http://169.254.169.254/latest/meta-data",
        "http://10.0.0.1/",
        "http://no-such-host.invalid/",
        "https://user:secret@127.0.0.1/",
        "https://127.0.0.1@93.184.216.34/",
        "https://93.184.216.34:22/",
        "https://93.184.216.34:99999/",
        "https:///path",
        "https://[::1/",
        "ftp://93.184.216.34/",
        "file:///etc/passwd",
        "gopher://93.184.216.34/",
        "https://exa mple.com/",
        "https://example.com\\@127.0.0.1/",
        "https://example.com/\r\nHost: inside",
        "https://exämple.com/",
        "https://example.com/" + "a" * 9000,
    ],
)
def test_addresses_that_nothing_is_asked_of(url, monkeypatch):
    def unreachable(*arguments, **options):
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    with pytest.raises(FetchError) as error:
        fetch(url, io.BytesIO(), 100, FetchRules(schemes=("https", "http")))
    assert "secret" not in str(error.value)


def test_http_only_where_allowed():
    with pytest.raises(FetchError, match=r"scheme 'http' \(fetched: https\)"):
        fetch("http://93.184.216.34/", io.BytesIO(), 1, FetchRules())


def test_domains():
    def public(host, port):
        raise OSError

    rules = FetchRules(domains=("example.com",))
    for url in ("https://example.com.evil.org/", "https://badexample.com/"):
        with pytest.raises(FetchError, match="does not fetch from"):
            fetch(url, io.BytesIO(), 1, rules, public)
    for url in ("https://example.com/", "https://cdn.example.com/"):
        with pytest.raises(FetchError, match="not known"):
            fetch(url, io.BytesIO(), 1, rules, public)


def test_one_private_address_among_many_refuses_the_host():
    with pytest.raises(FetchError, match="not public"):
        fetch("https://two.example/", io.BytesIO(), 1, FetchRules(), lambda host, port: ["8.8.8.8", "127.0.0.1"])


def test_a_second_answer_of_the_resolver_changes_nothing(server):
    answers = [["127.0.0.1"], ["127.0.0.2"]]

    def rebinding(host, port):
        return answers.pop(0)

    target = io.BytesIO()
    fetch(f"http://rebind.example:{server.server_port}/file", target, 200_000, LOCAL, rebinding)
    assert target.tell() == 100_000
    assert len(answers) == 1
    assert server.seen[-1][1]["Host"] == f"rebind.example:{server.server_port}"


def test_rebinding_between_a_redirect_and_its_target(server):
    answers = [["127.0.0.1"], ["127.0.0.2"]]
    target = f"redirect/http://rebind.example:{server.server_port}/file"
    with pytest.raises(FetchError, match="not public"):
        fetch(f"http://rebind.example:{server.server_port}/{target}", io.BytesIO(), 9, LOCAL, lambda *_: answers.pop(0))
    assert answers == []
    assert server.seen[-1][0] == f"/{target}"


def test_an_own_resolver_that_names_what_is_inside(monkeypatch):
    """A name of the attacker's own, with addresses of every form that facts know of."""
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("a connection was made"))
    inside = (
        *(
            "127.0.0.1",
            "10.0.0.1",
            "172.16.0.1",
            "192.168.0.1",
            "169.254.169.254",
            "100.64.0.1",
            "224.0.0.1",
            "0.0.0.0",
        ),
        *(
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "fe80::1",
            "fe80::1%eth0",
            "fc00::1",
            "fd00:ec2::254",
            "ff02::1",
        ),
        *("::ffff:127.0.0.1", "::ffff:8.8.8.8", "2002:7f00:1::", "2001:0:7f00:1::", "64:ff9b::7f00:1", "::127.0.0.1"),
    )
    for address in inside:
        for answer in ([address], ["8.8.8.8", address], [address, "2606:4700::1111"]):
            with pytest.raises(FetchError, match="not public"):
                fetch("https://attacker.example/", io.BytesIO(), 9, FetchRules(), lambda *_, answer=answer: answer)


def test_a_host_with_many_silent_addresses_takes_no_longer_than_any(monkeypatch):
    asked = []

    def silent(address, timeout):
        asked.append(timeout)
        time.sleep(timeout)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", silent)
    rules = FetchRules(timeout_seconds=0.4)
    started = time.monotonic()
    with pytest.raises(FetchError, match=r"took longer|cannot be fetched"):
        fetch("https://many.example/", io.BytesIO(), 9, rules, lambda *_: [f"8.8.{n}.8" for n in range(200)])
    assert len(asked) == 4
    assert time.monotonic() - started < 2


def test_a_handshake_that_never_comes_is_cut_off():
    rules = FetchRules(networks=LOCAL.networks, timeout_seconds=0.3)
    with listening(keep=0.8) as (port, _), pytest.raises(FetchError, match=r"took longer than 0\.3 s"):
        fetch(f"https://silent.example:{port}/", io.BytesIO(), 9, rules, lambda *_: ["127.0.0.1"])


def test_other_addresses_of_a_host_are_tried(server):
    rules = FetchRules(schemes=("http",), networks=(ip_network("127.0.0.0/8"),), timeout_seconds=5)
    target = io.BytesIO()
    fetch(
        f"http://two.example:{server.server_port}/file", target, 200_000, rules, lambda *_: ["127.0.0.9", "127.0.0.1"]
    )
    assert target.tell() == 100_000


@contextmanager
def listening(keep=0.0):
    """A socket that takes one connection, keeps what it says first, and says nothing for so long."""
    said = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def take():
            connection, _ = listener.accept()
            with connection:
                said.append(connection.recv(4096))
                time.sleep(keep)

        thread = threading.Thread(target=take)
        thread.start()
        yield listener.getsockname()[1], said
        thread.join()


def test_tls_asks_for_the_name_and_not_for_the_pinned_address():
    with listening() as (port, said), pytest.raises(FetchError, match="cannot be fetched"):
        fetch(f"https://named.example:{port}/", io.BytesIO(), 1, LOCAL, lambda *_: ["127.0.0.1"])
    assert b"named.example" in said[0]


def test_proxies_of_the_environment_are_not_used(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.2:9")
    monkeypatch.setenv("all_proxy", "http://127.0.0.2:9")
    assert got(server, "file")


def test_logs_see_the_host_alone():
    assert shown_url("https://user:pw@host.example/a?X-Signature=s#f") == "address at host.example"
    assert shown_url("nonsense") == "address"
