# SPDX-License-Identifier: Apache-2.0
"""Calls that arrive at a rate of their own, whether or not earlier ones are done; and who asks after the health."""

import asyncio
import random
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import httpx2

from .calls import Call, Outcome, made
from .host import KEY, Host

__all__ = ["HealthProbe", "arrivals", "percentiles"]

SHARES = {"queue": 35, "sync": 25, "stream": 25, "cancel": 5, "leave_sync": 3, "leave_stream": 2, "bad": 5}
_PROBE_SECONDS = 0.05


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 and the largest, in milliseconds."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    points = {f"p{part}": ordered[min(len(ordered) - 1, len(ordered) * part // 100)] for part in (50, 95, 99)}
    shown = {**points, "max": ordered[-1], "mean": statistics.fmean(ordered)}
    return {name: round(1000 * value, 1) for name, value in shown.items()} | {"count": len(ordered)}


class HealthProbe:
    """Asks for ``/health`` all the time, on a connection of its own."""

    def __init__(self, host: Host) -> None:
        self._host, self.seconds = host, list[float]()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "HealthProbe":
        self._task = asyncio.create_task(self._ask())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _ask(self) -> None:
        async with httpx2.AsyncClient(base_url=self._host.url, timeout=30, trust_env=False) as client:
            while True:
                started = time.perf_counter()
                (await client.get("/health")).raise_for_status()
                self.seconds.append(time.perf_counter() - started)
                await asyncio.sleep(_PROBE_SECONDS)


async def arrivals(host: Host, rate: float, seconds: float, body: dict[str, Any]) -> dict[str, Any]:
    """Poisson arrivals for some time, then whatever is still under way.

    Args:
        host: Whom to call.
        rate: Calls a second.
        seconds: How long they come.
        body: Of every call; its prompt says how long a job takes.
    """
    chance = random.Random(round(rate * 1000))
    headers = {"Authorization": f"Bearer {KEY}"}
    limits = httpx2.Limits(max_connections=1000, max_keepalive_connections=100)
    async with httpx2.AsyncClient(
        base_url=host.url, headers=headers, timeout=120, trust_env=False, limits=limits
    ) as client:
        tasks: list[asyncio.Task[Outcome]] = []
        started, planned = time.monotonic(), 0.0
        async with HealthProbe(host) as probe:
            while (planned := planned + chance.expovariate(rate)) < seconds:
                await asyncio.sleep(max(0.0, started + planned - time.monotonic()))
                (kind,) = chance.choices(list(SHARES), list(SHARES.values()))
                number = round(1e6 * rate) * 10_000 + len(tasks)
                call = Call(number, kind, {**body, "seed": len(tasks)}, chance.uniform(0, 0.5), lambda: client)
                tasks.append(asyncio.create_task(made(call)))
            outcomes = await asyncio.gather(*tasks)
        wall = time.monotonic() - started
    return {"rate": rate, **_summary(outcomes), "wall_seconds": round(wall, 1), "health_ms": percentiles(probe.seconds)}


def _summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    by_kind: defaultdict[str, list[float]] = defaultdict(list)
    for outcome in outcomes:
        by_kind[outcome.kind].append(outcome.seconds)
    first = [outcome.first_seconds for outcome in outcomes if outcome.first_seconds is not None]
    return {
        "calls": len(outcomes),
        "latency_ms": {kind: percentiles(seconds) for kind, seconds in sorted(by_kind.items())},
        "first_fragment_ms": percentiles(first),
        "states": dict(Counter(outcome.state for outcome in outcomes if outcome.state)),
        "problems": [outcome.problem for outcome in outcomes if outcome.problem],
    }
