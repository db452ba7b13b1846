# SPDX-License-Identifier: Apache-2.0
"""Calls of every kind while workers are killed and the server dies once: what is lost, left over, or grows."""

import asyncio
import os
import random
import signal
import sqlite3
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx2

from .calls import Call, Outcome, made
from .host import KEY, Host, Usage, born, family, free_port, hosting, usage
from .worlds import FACTORY

__all__ = ["soak"]

SHARES = {"queue": 40, "sync": 14, "stream": 10, "cancel": 12, "leave_sync": 6, "leave_stream": 6, "bad": 12}
AT_ONCE = 8
SLOTS = 2
#: Growth of the server's memory that is still called flat; caches of libraries take some in the first minutes.
FLAT_MB = 20
#: Jobs may end so; a failed one only where its worker was killed.
_ENDS = {"succeeded", "cancelled", "failed"}


class Soak:
    """One run; see ``soak``."""

    def __init__(self, folder: Path, calls: int, kill_every: int, sound: str) -> None:
        self._folder, self._calls, self._kill_every, self._sound = folder, calls, kill_every, sound
        self._chance = random.Random(7)
        self._port = free_port()
        self._stack = ExitStack()
        self._host: Host
        self._client: httpx2.AsyncClient
        self.outcomes: list[Outcome] = []
        self.samples: list[dict[str, Any]] = []
        self.kills = 0
        self.seen: set[tuple[int, int]] = set()

    def run(self) -> dict[str, Any]:
        """Do it all; what was found."""
        before = _temporary()
        with self._stack:
            self._start()
            asyncio.run(self._traffic())
            with self._host.client() as client:
                self._until_idle(client)
            end = usage(self._host.process.pid)
            self._note()
            verdict = self._verdict()
        left = [pid for pid, started in self.seen if born(pid) == started]
        return {
            "calls": dict(Counter(outcome.kind for outcome in self.outcomes)),
            "killed_workers": self.kills,
            "server_restarts": 1,
            **verdict,
            "calls_made_again": sum(outcome.retries for outcome in self.outcomes),
            "processes_left": len(left),
            "temporary_left": sorted(_temporary() - before),
            "server": self._growth(end),
            "samples": self.samples[:: max(1, len(self.samples) // 40)],
        }

    def _start(self) -> None:
        settings = {"slots": SLOTS, "warm_up": [], "threads": 1, "max_queued": 200, "max_jobs_per_key": 200}
        self._host = self._stack.enter_context(hosting(self._folder, FACTORY, port=self._port, **settings))

    async def _traffic(self) -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        self._client = httpx2.AsyncClient(base_url=self._host.url, headers=headers, timeout=120, trust_env=False)
        kinds = self._chance.choices(list(SHARES), list(SHARES.values()), k=self._calls)
        turns = asyncio.Semaphore(AT_ONCE)
        sampling = asyncio.create_task(self._sample())
        running: list[asyncio.Task[None]] = []
        for number, kind in enumerate(kinds):
            await turns.acquire()
            if number and number % self._kill_every == 0:
                self._kill_worker()
            if number == self._calls // 2:
                await self._restart()
            running.append(asyncio.create_task(self._one(number, kind, turns)))
        await asyncio.gather(*running)
        sampling.cancel()
        with suppress(asyncio.CancelledError):
            await sampling
        await self._client.aclose()

    async def _one(self, number: int, kind: str, turns: asyncio.Semaphore) -> None:
        body = {
            "prompt": f"steps={self._chance.randrange(4)} pause=0.02",
            "input_audio": self._sound,
            "resolution": "128x128",
            "match_audio_length": False,
            "num_frames": 9,
            "seed": number,
        }
        call = Call(number, kind, body, self._chance.uniform(0.0, 0.4), lambda: self._client)
        try:
            self.outcomes.append(await made(call))
        finally:
            turns.release()

    def _note(self) -> None:
        """Remember the server's processes, to ask in the end whether one of them still lives."""
        self.seen |= {(pid, started) for pid in family(self._host.process.pid) if (started := born(pid)) is not None}

    def _kill_worker(self) -> None:
        workers = self._host.workers
        self._note()
        if workers:
            with suppress(ProcessLookupError):
                os.kill(workers[self.kills % len(workers)], signal.SIGKILL)
                self.kills += 1

    async def _restart(self) -> None:
        """Kill the server as the kernel would, and start it on the same folder and port."""
        self._note()
        self._host.process.kill()
        self._host.process.wait()
        await asyncio.to_thread(self._start)
        self.samples.append({"restarted": True})

    async def _sample(self) -> None:
        started = time.monotonic()
        while True:
            await asyncio.sleep(0.5)
            taken = usage(self._host.process.pid)
            if taken.processes:
                self._note()
                done = len(self.outcomes)
                self.samples.append({"seconds": round(time.monotonic() - started, 1), "calls": done, **asdict(taken)})

    def _until_idle(self, client: httpx2.Client) -> None:
        end = time.monotonic() + 120
        while client.get("/api/ai/queue").json()["count"]:
            if time.monotonic() > end:
                raise RuntimeError("jobs that never end")
            time.sleep(0.1)
        self._host.until_ready()
        time.sleep(1)  # the last fragments' files are unlinked after the last state

    def _verdict(self) -> dict[str, Any]:
        """The store and the files against what callers saw."""
        data = self._folder / "data"
        with closing(sqlite3.connect(f"file:{data / 'jobs.sqlite'}?mode=ro", uri=True)) as store:
            rows = store.execute("SELECT id, state, idempotency_key, error_type, attempts FROM jobs").fetchall()
        known = {key: (name, state) for name, state, key, _, _ in rows}
        wrong = [f"{row[0]} is {row[1]}: {row[3]}" for row in rows if row[1] not in _ENDS]
        wrong += [f"{row[0]} failed: {row[3]}" for row in rows if row[1] == "failed" and row[3] != "worker_died"]
        wrong += [f"{outcome.kind}: {outcome.problem}" for outcome in self.outcomes if outcome.problem]
        seen = {outcome.job: outcome.state for outcome in self.outcomes if outcome.job}
        states = {row[0]: row[1] for row in rows}
        lost = [name for name in seen if name not in states]
        wrong += [
            f"{name} was {state} and is {states[name]}"
            for name, state in seen.items()
            if name in states and states[name] != state
        ]
        folders = {path.name: sorted(file.name for file in path.iterdir()) for path in (data / "jobs").iterdir()}
        files = [
            name
            for name, state in states.items()
            if folders.get(name) != (["clip.mp4"] if state == "succeeded" else [])
        ]
        incoming = [path.name for part in ("incoming", "uploads") for path in (data / part).iterdir()]
        return {
            "jobs": dict(Counter(row[1] for row in rows)),
            "made_twice": sum(row[4] > 1 for row in rows),
            "jobs_with_one_key_twice": len(rows) - len(known),
            "lost": lost,
            "wrong": wrong,
            "folders_without_a_job": sorted(folders.keys() - states.keys()),
            "jobs_with_other_files": files,
            "incoming_left": incoming,
        }

    def _growth(self, end: Usage) -> dict[str, Any]:
        """The second server: from its first quarter to its end."""
        restart = next((index for index, sample in enumerate(self.samples) if "restarted" in sample), 0)
        life = [sample for sample in self.samples[restart + 1 :] if "calls" in sample]
        early = life[len(life) // 4] if life else asdict(end)
        return {
            "early": {name: early[name] for name in ("server_rss_mb", "server_descriptors", "processes")},
            "idle_at_the_end": asdict(end),
            "server_rss_grew_mb": round(end.server_rss_mb - early["server_rss_mb"], 1),
        }


def soak(folder: Path, calls: int, kill_every: int, sound: str) -> dict[str, Any]:
    """Make so many calls, kill a worker now and then, and the server once.

    Args:
        folder: Empty; for the server's data and logs.
        calls: How many.
        kill_every: A worker is killed every so many calls.
        sound: The audio of every call, as a data URI.

    Returns:
        What was found, as JSON; ``passed`` says whether anything was lost, wrong or left.
    """
    found = Soak(folder, calls, kill_every, sound).run()
    empty = ("lost", "wrong", "folders_without_a_job", "jobs_with_other_files", "incoming_left", "temporary_left")
    server = found["server"]
    flat = server["server_rss_grew_mb"] < FLAT_MB
    # Idle, it holds no more than while it was busy early on; the workers and the sandbox's process that forks wait.
    few = server["idle_at_the_end"]["server_descriptors"] <= server["early"]["server_descriptors"]
    idle = few and server["idle_at_the_end"]["processes"] == 1 + SLOTS + 1
    clean = not found["processes_left"] and not found["jobs_with_one_key_twice"]
    found["passed"] = clean and flat and idle and not any(found[name] for name in empty)
    return found


def _temporary() -> set[str]:
    """What servers may have left in the folder for temporary files."""
    return {path.name for path in Path(tempfile.gettempdir()).glob("ltxrt-*")}
