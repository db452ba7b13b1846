# SPDX-License-Identifier: Apache-2.0
"""What a server costs: the same clips back to back in one process, and through a server, in turns."""

import asyncio
import base64
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
from turns import end_turn, in_turns, wait_for_turn

from ltxrt import Pipeline, Request
from ltxrt.media import bundled_speech

from .host import KEY, Host, hosting
from .load import HealthProbe, percentiles

__all__ = ["SIDES", "sound", "take_turns", "throughput"]

#: Who makes the clips: ``Pipeline.generate``, a stream that nobody keeps; ``Pipeline.render``, which is what ``ltxrt
#: generate`` does; a server.
SIDES = ("stream", "files", "served")
CLIP = {"prompt": "a face that speaks", "match_audio_length": False, "num_frames": 121}
LARGEST_LOSS, HEALTH_MS = 0.05, 50.0


def throughput(script: str, folder: Path, clips: int, rounds: int, threads: int) -> dict[str, Any]:
    """One turn of each side after the other, after one that does not count.

    Args:
        script: What runs ``take_turns`` when it is given ``--worker``, ``--url`` and ``--pid``.
        folder: Of the server's data.
        clips: In every turn.
        rounds: Turns of each.
        threads: Of an operator.
    """
    data = folder / "data"
    with hosting(folder, slots=1, threads=threads, warm_up=["high"], max_jobs_per_key=1000) as host:
        (worker,) = host.workers
        given = ["--clips", clips, "--rounds", rounds, "--threads", threads, "--url", host.url, "--pid", worker]
        sides = {side: [script, "--worker", side, *map(str, given)] for side in SIDES}
        turns = {side: found.result["turns"] for side, found in in_turns(sides, rounds + 1).items()}
        health = asyncio.run(health_meanwhile(host, clips))
        between = between_clips(data / "jobs.sqlite", clips)
    losses = {
        "loss": loss(turns, "files", "seconds"),
        "loss_over_streams": loss(turns, "stream", "seconds"),
        "cpu_loss": loss(turns, "files", "cpu_seconds"),
    }
    answers = percentiles(health)
    return {
        "clips_a_turn": clips,
        "clip": CLIP,
        "turns": turns,
        "between_clips_seconds": between,
        **losses,
        "loss_allowed": LARGEST_LOSS,
        "health_ms": answers,
        "passed": losses["loss"] <= LARGEST_LOSS and answers["p99"] < HEALTH_MS,
    }


def loss(turns: Mapping[str, Sequence[Mapping[str, float]]], alone: str, figure: str) -> float:
    """How much more the server takes than another side: the median over the rounds."""
    pairs = zip(turns["served"], turns[alone], strict=True)
    return round(statistics.median(served[figure] / other[figure] - 1 for served, other in pairs), 4)


def take_turns(side: str, clips: int, rounds: int, threads: int, served: tuple[str, int]) -> dict[str, Any]:
    """In a process of its own: seconds of every turn, of the CPU in it, and what other machines took of this one's.

    Args:
        side: One of ``SIDES``.
        clips: In a turn.
        rounds: Turns that count.
        threads: Of an operator.
        served: The server's address, and the process that makes its clips.
    """
    wait_for_turn()
    url, worker = served
    if side == "served":
        make, process_id = (lambda count: through_the_server(url, count)), worker
    else:
        make, process_id = in_this_process(side, threads), os.getpid()
    make(1)
    end_turn()
    turns: list[dict[str, float]] = []
    for _ in range(rounds):
        wait_for_turn()
        started, used, stolen = time.perf_counter(), cpu_seconds(process_id), stolen_seconds()
        names = make(clips)
        seconds, cpu = time.perf_counter() - started, cpu_seconds(process_id) - used
        if side == "served":
            check(url, names)
        taken = {"seconds": seconds, "cpu_seconds": cpu, "stolen_seconds": stolen_seconds() - stolen}
        turns.append({name: round(value, 3) for name, value in taken.items()})
        end_turn()
    return {"turns": turns}


def in_this_process(side: str, threads: int) -> Callable[[int], list[str]]:
    """What makes so many clips here, each with the seed of its number, and names them."""
    pipeline = Pipeline.open(threads=threads)

    def make(clips: int) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            for seed in range(clips):
                request = Request(input_audio=bundled_speech(), seed=seed, **CLIP)
                path = Path(folder) / f"{seed}.mp4"
                if side == "files":
                    pipeline.render(request, path)
                else:
                    with path.open("wb") as file:
                        file.writelines(pipeline.generate(request))
            return sorted(file.name for file in Path(folder).iterdir())

    return make


def through_the_server(url: str, clips: int) -> list[str]:
    """The same clips, queued one after the other, until the last has ended; their names."""
    with client(url) as calls:
        names: list[str] = []
        for seed in range(clips):
            answer = calls.post("/api/ai/queue", json={**CLIP, "input_audio": sound(), "seed": seed})
            names.append(answer.raise_for_status().json()["generations"][0]["generation_id"])
        # The last one's stream of events ends with it: nobody polls, which would take time from what is measured.
        calls.get(f"/v1/videos/{names[-1]}/events").raise_for_status()
    return names


def check(url: str, names: Sequence[str]) -> None:
    """Ask for every clip.

    Raises:
        RuntimeError: One was not made.
    """
    with client(url) as calls:
        videos = [calls.get(f"/v1/videos/{name}").raise_for_status().json() for name in names]
    if failed := [video for video in videos if video["status"] != "completed"]:
        raise RuntimeError(f"not made: {failed}")


def client(url: str) -> httpx2.Client:
    """With the key."""
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx2.Client(base_url=url, headers=headers, timeout=600, trust_env=False)


async def health_meanwhile(host: Host, clips: int) -> list[float]:
    """Seconds of every answer to ``/health`` while clips go through the server once more."""
    async with HealthProbe(host) as probe:
        check(host.url, await asyncio.to_thread(through_the_server, host.url, clips))
    return probe.seconds


def cpu_seconds(process_id: int) -> float:
    """What a process has used of the CPU so far; its own, without what it waited for one."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def stolen_seconds() -> float:
    """What the host has given to other machines although this one had work, of all cores together."""
    return int(Path("/proc/stat").read_text().split()[8]) / os.sysconf("SC_CLK_TCK")


def between_clips(store: Path, clips: int) -> float:
    """Seconds that the worker stood still between the last so many clips, by the store's times."""
    with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as opened:
        query = "SELECT started_at, completed_at FROM jobs ORDER BY started_at DESC LIMIT ?"
        times = sorted(opened.execute(query, (clips,)).fetchall())
    return round(sum(after[0] - before[1] for before, after in pairwise(times)), 3)


def sound() -> str:
    """The bundled speech as a data URI."""
    return f"data:audio/flac;base64,{base64.b64encode(bundled_speech().read_bytes()).decode()}"
