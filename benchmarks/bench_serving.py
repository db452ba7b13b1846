# SPDX-License-Identifier: Apache-2.0
"""What serving costs, how it answers under load, and whether anything is lost when processes die.

    python benchmarks/bench_serving.py [--parts soak load throughput] [--clips N] [--rates R ...] [--soak N] [--out DIR]

- ``throughput``: the same clips of the real tiny bundle, back to back in one process, then through the server, in
  turns. Target: within 5 % of what ``ltxrt generate`` does, which like the server makes each clip a file, reads it back
  and checks it; how far from ``Pipeline.generate``, which gives a stream that nobody checks, is recorded too.
  ``/health`` is asked for all through one more round, whose time does not count: who asks takes CPU time from the
  clips on a small machine, and nobody asks in the other process. Target: p99 below 50 ms.
- ``load``: Poisson arrivals of every kind of call, on scripted pipelines that take as long as the prompt says.
- ``soak``: calls of every kind, a worker killed every so many, the server killed once. Target: nothing lost, wrong or
  left, nothing grows.

Figures come on stdout, JSON last; ``serving.json`` goes into the results, unless ``--out`` says where. The exit code is
1 where a target is missed. The machine's load before and after is part of the record: on a busy one the figures of
throughput and latency say little.
"""

import argparse
import asyncio
import base64
import json
import os
import sqlite3
import sys
import tempfile
import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

from harness import RESULTS, measured, record
from serving.host import hosting
from serving.load import HealthProbe, arrivals, percentiles
from serving.soak import soak
from serving.worlds import FACTORY

from ltxrt.media import bundled_speech

PACKAGES = ("ltxrt", "numpy", "onnxruntime", "av", "fastapi", "uvicorn")
PARTS = ("soak", "load", "throughput")
CLIP = {"prompt": "a face that speaks", "match_audio_length": False, "num_frames": 121}
LARGEST_LOSS, HEALTH_MS = 0.05, 50.0
_ARRIVAL_SECONDS = 15.0


def main() -> int:
    """Run the parts, print, write; 0 if every target is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--clips", type=int, default=12, help="clips of a round of the throughput")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the throughput")
    parser.add_argument("--rates", type=float, nargs="*", default=[0.5, 1.0, 2.0, 4.0], help="calls a second")
    parser.add_argument("--soak", type=int, default=1000, help="calls of the soak")
    parser.add_argument("--kill-every", type=int, default=50, help="calls between two killed workers")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads within one operator")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--worker", choices=("bare",), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(bare(options.clips, options.threads)))
        return 0
    results: dict[str, Any] = {"load_average_before": os.getloadavg()}
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts:
            place = Path(folder) / part
            place.mkdir()
            results[part] = {"throughput": throughput, "load": load, "soak": soaked}[part](options, place)
            print(f"{part}: {json.dumps({k: v for k, v in results[part].items() if k != 'samples'})}", file=sys.stderr)
    results["load_average_after"] = os.getloadavg()
    passed = all(results[part]["passed"] for part in options.parts)
    path = record("serving", PACKAGES, results, options.out)
    path = path.replace(options.out / "serving.json")
    print(path, file=sys.stderr)
    print(json.dumps({"passed": passed, **results}))
    return 0 if passed else 1


# --- throughput ---


def bare(clips: int, threads: int) -> dict[str, Any]:
    """Clips back to back in this process: as a stream that nobody keeps, then as files."""
    from ltxrt import Pipeline, Request

    pipeline = Pipeline.open(threads=threads)
    requests = [Request(input_audio=bundled_speech(), seed=seed, **CLIP) for seed in range(clips)]
    generated(pipeline, requests[0])
    started, used = time.perf_counter(), time.process_time()
    for request in requests:
        generated(pipeline, request)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - used
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for request in requests:
            pipeline.render(request, Path(folder) / f"{request.seed}.mp4")
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "files_seconds": time.perf_counter() - started}


def generated(pipeline: Any, request: Any) -> None:
    """A clip into a file that nobody keeps."""
    with tempfile.TemporaryFile() as file:
        file.writelines(pipeline.generate(request))


def throughput(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rounds of both, in turns, so that a machine that changes its pace changes it for both."""
    count = ["--clips", str(options.clips), "--threads", str(options.threads)]
    rounds: list[dict[str, float]] = []
    with hosting(folder, slots=1, threads=options.threads, warm_up=["high"], max_jobs_per_key=1000) as host:
        for number in range(options.rounds):
            alone = measured([__file__, "--worker", "bare", *count]).result
            (worker,) = host.workers
            used = cpu_seconds(worker)
            served = asyncio.run(through_the_server(host, options.clips, number))
            figures = {
                "bare_seconds": alone["seconds"],
                "bare_files_seconds": alone["files_seconds"],
                "served_seconds": served,
                "bare_cpu_seconds": alone["cpu_seconds"],
                "worker_cpu_seconds": cpu_seconds(worker) - used,
                "between_clips_seconds": between_clips(folder / "data" / "jobs.sqlite", options.clips),
            }
            rounds.append({name: round(seconds, 2) for name, seconds in figures.items()})
        health = asyncio.run(health_meanwhile(host, options.clips, options.rounds))
    losses = {
        name: sorted(each[served] / each[alone] - 1 for each in rounds)[len(rounds) // 2]
        for name, alone, served in (
            ("loss", "bare_files_seconds", "served_seconds"),
            ("loss_over_streams", "bare_seconds", "served_seconds"),
            ("cpu_loss", "bare_cpu_seconds", "worker_cpu_seconds"),
        )
    }
    answers = percentiles(health)
    return {
        "clips_a_round": options.clips,
        "clip": CLIP,
        "rounds": rounds,
        **{name: round(loss, 4) for name, loss in losses.items()},
        "loss_allowed": LARGEST_LOSS,
        "health_ms": answers,
        "passed": losses["loss"] <= LARGEST_LOSS and answers["p99"] < HEALTH_MS,
    }


def cpu_seconds(process_id: int) -> float:
    """What a process has used of the CPU so far; its own, without what it waited for one."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def between_clips(store: Path, clips: int) -> float:
    """Seconds that the worker stood still between the last so many clips, by the store's times."""
    with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as opened:
        query = "SELECT started_at, completed_at FROM jobs ORDER BY started_at DESC LIMIT ?"
        times = sorted(opened.execute(query, (clips,)).fetchall())
    return sum(after[0] - before[1] for before, after in pairwise(times))


async def health_meanwhile(host: Any, clips: int, number: int) -> list[float]:
    """Seconds of every answer to ``/health`` while the same clips go through the server once more."""
    async with HealthProbe(host) as probe:
        await through_the_server(host, clips, number)
    return probe.seconds


async def through_the_server(host: Any, clips: int, number: int) -> float:
    """The same clips, queued one after the other; seconds from the first call to the last clip."""
    import httpx2
    from serving.host import KEY

    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx2.AsyncClient(base_url=host.url, headers=headers, timeout=600, trust_env=False) as client:
        started = time.perf_counter()
        names: list[str] = []
        for seed in range(clips):
            body = {**CLIP, "input_audio": sound(), "seed": seed}
            answer = (await client.post("/api/ai/queue", json=body)).raise_for_status()
            names.append(answer.json()["generations"][0]["generation_id"])
        # The last one's stream of events ends with it: nobody polls, which would take time from what is measured.
        await client.get(f"/v1/videos/{names[-1]}/events")
        seconds = time.perf_counter() - started
        videos = [(await client.get(f"/v1/videos/{name}")).json() for name in names]
    if failed := [video for video in videos if video["status"] != "completed"]:
        raise RuntimeError(f"round {number}: {failed}")
    return seconds


def sound() -> str:
    """The bundled speech as a data URI."""
    return f"data:audio/flac;base64,{base64.b64encode(bundled_speech().read_bytes()).decode()}"


# --- load and soak ---


def load(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every rate in turn, on one server with two slots; a job takes about a fifth of a second."""
    body = {
        "prompt": "steps=8 pause=0.02",
        "input_audio": sound(),
        "resolution": "128x128",
        "match_audio_length": False,
        "num_frames": 25,
    }
    caps = {"max_queued": 1000, "max_jobs_per_key": 1000}
    with hosting(folder, FACTORY, slots=2, threads=1, warm_up=[], **caps) as host:
        rates = [asyncio.run(arrivals(host, rate, _ARRIVAL_SECONDS, body)) for rate in options.rates]
    return {"slots": 2, "rates": rates, "passed": not any(rate["problems"] for rate in rates)}


def soaked(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """See ``serving/soak.py``."""
    started = time.monotonic()
    found = soak(folder, options.soak, options.kill_every, sound())
    return {"seconds": round(time.monotonic() - started, 1), **found}


if __name__ == "__main__":
    sys.exit(main())
