# SPDX-License-Identifier: Apache-2.0
"""A server in a process of its own, started, killed and watched from outside."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

__all__ = ["KEY", "Host", "Usage", "born", "family", "free_port", "hosting", "usage"]

KEY = "benchmark"
_START_SECONDS = 120
_SCRIPT = (
    "import json, sys; from ltxrt.serve.command import serve; from ltxrt.serve.settings import Settings;"
    "factory = sys.argv[2]; serve(Settings(**json.loads(sys.argv[1])), **({'factory': factory} if factory else {}))"
)


@dataclass(frozen=True)
class Usage:
    """What a server and all processes below it take."""

    processes: int
    descriptors: int
    server_descriptors: int
    server_rss_mb: float
    rss_mb: float


@dataclass
class Host:
    """A running server."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def client(self, **options: Any) -> httpx2.Client:
        """A client with the key."""
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=120, trust_env=False, **options)

    @property
    def workers(self) -> list[int]:
        """Living worker processes, as the log names them."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if '"worker_started"' in line]
        return [line["pid"] for line in lines if lives(line["pid"])]

    def until_ready(self) -> None:
        """Wait for every worker.

        Raises:
            RuntimeError: The server ended, or takes too long.
        """
        end = time.monotonic() + _START_SECONDS
        with self.client() as client:
            while True:
                try:
                    if client.get("/ready").status_code == 200:
                        return
                except httpx2.TransportError:
                    pass
                if time.monotonic() > end or self.process.poll() is not None:
                    raise RuntimeError(self.log.read_text()[-2000:])
                time.sleep(0.05)


@contextmanager
def hosting(folder: Path, factory: str = "", **settings: Any) -> Iterator[Host]:
    """Start a server and end it with SIGTERM; one that was killed meanwhile is left alone.

    Raises:
        RuntimeError: It does not start, or does not end as it should.
    """
    port = settings.pop("port", None) or free_port()
    chosen = {"data": str(folder / "data"), "port": port, "api_keys": [KEY], "drain_seconds": 30, **settings}
    log = folder / f"log-{time.monotonic_ns()}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(__file__).parents[1]), *sys.path))}
    command = [sys.executable, "-c", _SCRIPT, json.dumps(chosen), factory]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file, stdout=subprocess.DEVNULL, env=environment)
    host = Host(process, f"http://127.0.0.1:{port}", log)
    try:
        host.until_ready()
        yield host
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the server ended with {code}: {log.read_text()[-2000:]}")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def lives(process_id: int) -> bool:
    """Whether there is such a process, and more of it than its exit code."""
    return born(process_id) is not None


def born(process_id: int) -> int | None:
    """When a living process was started; its number alone says little, since numbers come round again."""
    try:
        fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def family(process_id: int) -> list[int]:
    """A process and all below it."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = [process_id]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    return found


def usage(process_id: int) -> Usage:
    """What a process and all below it take now."""
    rss: dict[int, float] = {}
    descriptors: dict[int, int] = {}
    for each in family(process_id):
        try:
            pages = int(Path(f"/proc/{each}/statm").read_text().split()[1])
            descriptors[each] = len(os.listdir(f"/proc/{each}/fd"))  # noqa: PTH208
            rss[each] = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        except OSError:
            continue
    return Usage(
        processes=len(rss),
        descriptors=sum(descriptors.values()),
        server_descriptors=descriptors.get(process_id, 0),
        server_rss_mb=round(rss.get(process_id, 0.0), 1),
        rss_mb=round(sum(rss.values()), 1),
    )
