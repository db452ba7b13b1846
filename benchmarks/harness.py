# SPDX-License-Identifier: Apache-2.0
"""What every benchmark needs: timing, a process measured from outside, the machine in words, one record a run.

Rules. A timed function runs ``warmup`` times unrecorded; reported are median and 10th and 90th percentile of what
follows. Peak memory is measured in a process of its own, since a process never gets its peak back. A record names
machine, versions and commit, and is written once, whole.
"""

import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "Machine", "Measured", "Timing", "machine", "measured", "missing_compiler", "record", "timed"]

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Machine:
    """Where it ran; without anything that names the computer itself."""

    cpu: str
    cores: int
    memory_gb: float
    gpu: str | None
    system: str
    python: str

    @property
    def slug(self) -> str:
        """For file names: ``intel-xeon-processor-2-cores``, or the GPU's name."""
        words = self.gpu or f"{self.cpu} {self.cores} cores"
        return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((R|TM)\)", "", words).lower()).strip("-")


@dataclass(frozen=True)
class Timing:
    """Seconds of a repeated call."""

    median: float
    p10: float
    p90: float
    repeats: int


@dataclass(frozen=True)
class Measured:
    """A finished process: its own resources, and the JSON object in the last line of its stdout."""

    wall_seconds: float
    cpu_seconds: float
    peak_rss_mb: float
    result: Mapping[str, Any]

    @classmethod
    def of(cls, usage: resource.struct_rusage, wall_seconds: float, result: Mapping[str, Any]) -> "Measured":
        """From what the system says of a process that has ended."""
        scale = 1024 if sys.platform == "linux" else 1
        return cls(
            wall_seconds=round(wall_seconds, 2),
            cpu_seconds=round(usage.ru_utime + usage.ru_stime, 2),
            peak_rss_mb=round(usage.ru_maxrss * scale / 1e6, 1),
            result=result,
        )


def machine() -> Machine:
    """This machine."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", text)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    cpu = " ".join((model[1] if model else platform.processor() or platform.machine()).split())
    return Machine(
        cpu=cpu,
        cores=len(os.sched_getaffinity(0)),
        memory_gb=round(memory, 1),
        gpu=_gpu(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
    )


def timed(function: Callable[[], object], *, repeats: int, warmup: int = 1) -> Timing:
    """Call ``function`` again and again."""
    for _ in range(warmup):
        function()
    seconds: list[float] = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    seconds.sort()
    p10, median, p90 = (seconds[round(fraction * (repeats - 1))] for fraction in (0.1, 0.5, 0.9))
    return Timing(median, p10, p90, repeats)


def measured(arguments: Sequence[str]) -> Measured:
    """Run a Python program to its end and measure it; its stderr is passed on.

    Raises:
        RuntimeError: It failed, or its last line is not a JSON object.
    """
    begin = time.perf_counter()
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None  # it is a pipe
        lines = process.stdout.read().splitlines()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not lines:
        raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}")
    return Measured.of(usage, wall, json.loads(lines[-1]))


def missing_compiler() -> str:
    """Why torch.compile cannot make kernels here, in one line; empty if it can. It looks for the same compiler."""
    name = os.environ.get("CXX") or "g++"
    if shutil.which(name):
        return ""
    return (
        f"torch.compile needs a C++ compiler, and {name} is not found: install it (Debian: apt install g++) or set CXX"
    )


def record(
    name: str,
    packages: Sequence[str],
    results: Mapping[str, Any],
    folder: Path = RESULTS,
    *,
    of_machine: bool = True,
) -> Path:
    """Write ``<name>-<machine>.json`` and return its path; a file of that name is replaced.

    Where ``of_machine`` is false the results do not depend on the machine, and the file is ``<name>.json``.
    """
    here = machine()
    content = {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "machine": asdict(here),
        "versions": {package: _version(package) for package in packages},
        "results": results,
    }
    path = folder / (f"{name}-{here.slug}.json" if of_machine else f"{name}.json")
    partial = path.with_suffix(".partial")
    folder.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)
    return path


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # it is used from a checkout, or not at all
        return None


def _gpu() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return names[0] if names else None


def _commit() -> str | None:
    """The checkout's commit; ``+`` where tracked files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed.stdout else "")
