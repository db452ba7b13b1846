# SPDX-License-Identifier: Apache-2.0
"""What this machine can run, and why not more.

Nothing is imported before it is asked about, so that a package that does not load is a finding and not a crash.
"""

import ctypes
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import Literal, NamedTuple

from .errors import LtxrtError

__all__ = ["Finding", "Status", "examine", "nvidia", "works"]

Status = Literal["ok", "off", "warning", "failed"]

_ENCODERS = ("libx264", "aac")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_SMI_FIELDS = "name,driver_version,memory.total,compute_cap"
_SMI_SECONDS = 20


class Finding(NamedTuple):
    """One fact about the machine; ``off`` is something faster that is not there, ``failed`` breaks the CPU path."""

    name: str
    status: Status
    detail: str


def examine() -> Iterator[Finding]:
    """Every finding, cheap ones first."""
    yield Finding("python", "ok", f"{platform.python_version()} ({platform.python_implementation()})")
    yield Finding("platform", "ok", platform.platform())
    yield Finding("cpu", "ok", f"{len(os.sched_getaffinity(0))} cores")
    yield Finding("memory", "ok", f"{_memory_bytes() / 1024**3:.1f} GiB")
    yield from _packages()
    yield _onnxruntime_conflict()
    yield nvidia()
    yield from _backends()
    yield _encoders()
    yield _tiny_bundle()


def works(findings: tuple[Finding, ...]) -> bool:
    """Whether the CPU path works."""
    return all(finding.status != "failed" for finding in findings)


def nvidia() -> Finding:
    """The NVIDIA GPUs of this machine, as the driver's own tool tells them, without loading CUDA."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return Finding("nvidia", "off", f"no nvidia-smi; {_driver_library()}")
    command = [smi, f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("nvidia", "off", f"nvidia-smi does not answer ({type(error).__name__})")
    lines = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    if answer.returncode or not lines:
        told = (answer.stdout + answer.stderr).strip().splitlines()
        return Finding("nvidia", "off", f"nvidia-smi finds no GPU ({told[0] if told else 'it says nothing'})")
    gpus = [" / ".join(part.strip() for part in line.split(",")) for line in lines]
    return Finding("nvidia", "ok", f"{'; '.join(gpus)} (name / driver / memory / compute capability)")


def _driver_library() -> str:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver (libcuda.so.1) is installed"
    return "a driver library (libcuda.so.1) is installed"


def _memory_bytes() -> int:
    """Memory of the machine, or of the container where that gets less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = _CGROUP_LIMIT.read_text("ascii").strip()
    except OSError:
        return physical
    return min(physical, int(limit)) if limit.isdigit() else physical


def _packages() -> Iterator[Finding]:
    """ltxrt and what it requires, with versions."""
    if not _installed("ltxrt"):
        yield Finding("ltxrt", "warning", "runs from its sources, not installed: what it requires is not checked")
        return
    yield Finding("ltxrt", "ok", metadata.version("ltxrt"))
    for requirement in metadata.requires("ltxrt") or ():
        name = re.match(r"[\w.-]+", requirement)
        if name is None or "extra ==" in requirement:
            continue
        try:
            yield Finding(name[0], "ok", metadata.version(name[0]))
        except metadata.PackageNotFoundError:
            yield Finding(name[0], "failed", f"not installed; ltxrt requires {requirement}")


def _onnxruntime_conflict() -> Finding:
    """The two distributions put different files under the same names; the one installed last wins, half."""
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _installed(name)]
    if len(both) == 2:
        return Finding(
            "onnxruntime files",
            "warning",
            "onnxruntime and onnxruntime-gpu overwrite each other's files: uninstall both, then install one",
        )
    return Finding("onnxruntime files", "ok", f"{both[0]} alone" if both else "neither distribution is installed")


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _backends() -> Iterator[Finding]:
    try:
        store = import_module("ltxrt.engine_store")
    except ImportError as error:
        yield Finding("onnxruntime-cpu", "failed", f"does not load: {_first_line(error)}")
        return
    for backend in store.backends():
        yield Finding(backend.name, "ok" if backend.available else "off", backend.reason)


def _encoders() -> Finding:
    """The encoders of the result, which not every build of FFmpeg has."""
    try:
        codec = import_module("av.codec")
    except ImportError as error:
        return Finding("encoders", "failed", f"PyAV does not load: {_first_line(error)}")
    missing = [name for name in _ENCODERS if name not in codec.codecs_available]
    if missing:
        return Finding("encoders", "failed", f"this build of FFmpeg lacks {', '.join(missing)}")
    return Finding("encoders", "ok", ", ".join(_ENCODERS))


def _tiny_bundle() -> Finding:
    """Hashes every file of the bundle that ships with ltxrt and loads its networks: the whole CPU path but a clip."""
    try:
        bundle = import_module("ltxrt.bundle").Bundle.open(verify=True)
        store = import_module("ltxrt.engine_store").EngineStore(bundle, backend="onnxruntime-cpu")
        for preset in bundle.manifest.presets:
            store.engines(preset)
    except (LtxrtError, ImportError) as error:
        return Finding("tiny bundle", "failed", _first_line(error))
    networks = len(bundle.manifest.networks)
    return Finding("tiny bundle", "ok", f"intact, {networks} networks load on {store.backend.name}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
