# SPDX-License-Identifier: Apache-2.0
"""What Prometheus reads."""

from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .job import Job
from .jobs import JobLayer

__all__ = ["Metrics"]

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_FACTORS = (0.25, 0.5, 1, 2, 4, 8, 16, 32)
_PAGE_BYTES = 4096


class Metrics:
    """One server's counters, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self._jobs = Counter("ltxrt_jobs", "Jobs that ended, by outcome.", ["outcome"], registry=registry)
        self._wait = Histogram(
            "ltxrt_queue_wait_seconds", "From queued to claimed.", buckets=_SECONDS, registry=registry
        )
        self._total = Histogram(
            "ltxrt_job_seconds", "From claimed to ended.", ["outcome"], buckets=_SECONDS, registry=registry
        )
        self._stages = Histogram(
            "ltxrt_stage_seconds", "Stages of finished clips.", ["stage"], buckets=_SECONDS, registry=registry
        )
        self._factor = Histogram(
            "ltxrt_real_time_factor", "Seconds of work per second of video.", buckets=_FACTORS, registry=registry
        )
        self._requests = Counter("ltxrt_http_requests", "Answers, by status.", ["method", "status"], registry=registry)
        self._queued = Gauge("ltxrt_jobs_queued", "Jobs that wait.", registry=registry)
        self._running = Gauge("ltxrt_jobs_running", "Jobs that run.", registry=registry)
        self._ready = Gauge("ltxrt_workers_ready", "Workers that are ready.", registry=registry)
        self._starts = Gauge("ltxrt_worker_starts", "Worker processes started so far.", registry=registry)
        self._memory = Gauge("ltxrt_worker_memory_bytes", "Resident memory of all workers.", registry=registry)

    def ended(self, job: Job) -> None:
        """A job has ended."""
        self._jobs.labels(job.state).inc()
        if job.started_at is not None and job.completed_at is not None:
            self._wait.observe(max(0.0, job.started_at - job.created_at))
            self._total.labels(job.state).observe(job.completed_at - job.started_at)
        if job.result is not None:
            self._factor.observe(job.result["real_time_factor"])
            for stage, seconds in job.result["stage_seconds"].items():
                self._stages.labels(stage).observe(seconds)

    def answered(self, method: str, status: int) -> None:
        """A request has been answered."""
        known = method if method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS") else "other"
        self._requests.labels(known, str(status)).inc()

    def exposition(self, jobs: JobLayer) -> bytes:
        """Everything in Prometheus' text format."""
        self._queued.set(jobs.store.count("queued"))
        self._running.set(jobs.store.count("processing"))
        self._ready.set(sum(slot.ready for slot in jobs.pool.slots))
        self._starts.set(sum(slot.starts for slot in jobs.pool.slots))
        self._memory.set(sum(map(_resident_bytes, jobs.pool.process_ids)))
        return generate_latest(self._registry)


def _resident_bytes(process_id: int) -> int:
    try:
        return int(Path(f"/proc/{process_id}/statm").read_text("utf-8").split()[1]) * _PAGE_BYTES
    except OSError:  # it has just ended
        return 0
