# SPDX-License-Identifier: Apache-2.0
"""What serving costs, how it answers under load, and whether anything is lost when processes die.

    python benchmarks/bench_serving.py [--parts soak load throughput] [--clips N] [--rates R ...] [--soak N] [--out DIR]

- ``throughput``: the same clips of the real tiny bundle, back to back in one process and through the server, in turns,
  so that a machine that changes its pace changes it for both; the median over the turns. Target: within 5 % of what
  ``ltxrt generate`` does, which like the server makes each clip a file, reads it back and checks it; how far from
  ``Pipeline.generate``, which gives a stream that nobody checks, is recorded too. ``/health`` is asked for all through
  one more turn, whose time does not count: who asks takes CPU time from the clips on a small machine, and nobody asks
  in the other process. Target: p99 below 50 ms.
- ``load``: Poisson arrivals of every kind of call, on scripted pipelines that take as long as the prompt says.
- ``soak``: calls of every kind, a worker killed every so many, the server killed once. Target: nothing lost, wrong or
  left, nothing grows.

Figures come on stdout, JSON last; ``serving-PARTS.json`` goes into the results, unless ``--out`` says where. The exit
code is 1 where a target is missed. The machine's load before and after is part of the record, and what other machines
on the same host took: on a busy one the figures of throughput and latency say little.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import RESULTS, record
from serving.host import hosting
from serving.load import arrivals
from serving.soak import soak
from serving.throughput import SIDES, sound, take_turns, throughput
from serving.worlds import FACTORY

PACKAGES = ("ltxrt", "numpy", "onnxruntime", "av", "fastapi", "uvicorn")
PARTS = ("soak", "load", "throughput")
_ARRIVAL_SECONDS = 15.0


def main() -> int:
    """Run the parts, print, write; 0 if every target is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--clips", type=int, default=12, help="clips of a turn of the throughput")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side of it")
    parser.add_argument("--rates", type=float, nargs="*", default=[0.5, 1.0, 2.0, 4.0], help="calls a second")
    parser.add_argument("--soak", type=int, default=1000, help="calls of the soak")
    parser.add_argument("--kill-every", type=int, default=50, help="calls between two killed workers")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads within one operator")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--pid", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        served = options.url, options.pid
        print(json.dumps(take_turns(options.worker, options.clips, options.rounds, options.threads, served)))
        return 0
    results: dict[str, Any] = {"load_average_before": os.getloadavg()}
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts:
            place = Path(folder) / part
            place.mkdir()
            results[part] = {"throughput": bare_and_served, "load": load, "soak": soaked}[part](options, place)
            print(f"{part}: {json.dumps({k: v for k, v in results[part].items() if k != 'samples'})}", file=sys.stderr)
    results["load_average_after"] = os.getloadavg()
    passed = all(results[part]["passed"] for part in options.parts)
    path = record("serving", PACKAGES, results, options.out)
    path = path.replace(options.out / f"serving-{'-'.join(options.parts)}.json")
    print(path, file=sys.stderr)
    print(json.dumps({"passed": passed, **results}))
    return 0 if passed else 1


def bare_and_served(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """See ``serving/throughput.py``."""
    return throughput(__file__, folder, options.clips, options.rounds, options.threads)


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
