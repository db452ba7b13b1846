# SPDX-License-Identifier: Apache-2.0
"""Memory that is free, and how networks are shared out to it: whole, or a few layers at a time."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ltxrt_export.disk import gigabytes

__all__ = ["SEGMENT_BYTES", "MemoryPlan", "free_memory_bytes", "plan_memory"]

#: Weights in fp32 of a part of a network that runs in parts: a quarter of a block of the 22B model.
SEGMENT_BYTES = 400_000_000
#: A loaded network takes its weights as they are stored, cast and turned around: at most these many times their size
#: in fp32.
_COPIES = 2.5

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Which networks are loaded whole.

    Attributes:
        free_bytes: What they may take together.
        whole: Size of the weights in fp32 of each network that is loaded whole.
        parts: The same of each that runs a few layers at a time.
    """

    free_bytes: int
    whole: Mapping[str, int]
    parts: Mapping[str, int]

    def __str__(self) -> str:
        """One line for the user."""
        limit = f"within {gigabytes(self.free_bytes)} of memory"
        if not self.parts:
            return f"calibration: every network whole, {gigabytes(sum(self.whole.values()))} in fp32, {limit}"
        sizes = ", ".join(f"{name} ({gigabytes(size)} in fp32)" for name, size in self.parts.items())
        return f"calibration: a few layers at a time of {sizes}, the rest whole, {limit}"


def plan_memory(weight_bytes: Mapping[str, int], free_bytes: int) -> MemoryPlan:
    """Load the smallest networks whole, as many as fit together.

    Args:
        weight_bytes: Weights of each network in fp32.
        free_bytes: What may be taken.
    """
    whole: set[str] = set()
    taken = SEGMENT_BYTES * _COPIES
    for name, size in sorted(weight_bytes.items(), key=lambda item: item[1]):
        taken += size * _COPIES
        if taken <= free_bytes:
            whole.add(name)
    return MemoryPlan(
        free_bytes,
        {name: size for name, size in weight_bytes.items() if name in whole},
        {name: size for name, size in weight_bytes.items() if name not in whole},
    )


def free_memory_bytes() -> int:
    """What a process can still take: of the machine, or of its container where that has less."""
    free = [_machine_bytes()]
    try:
        limit = (_CGROUP / "memory.max").read_text("ascii").strip()
        if limit.isdigit():
            # What the container has read from files gives way.
            cached = int(_field(_CGROUP / "memory.stat", "inactive_file"))
            free.append(int(limit) - int((_CGROUP / "memory.current").read_text("ascii")) + cached)
    except (OSError, ValueError):
        pass  # no container, or one that does not say
    return max(0, min(free))


def _machine_bytes() -> int:
    try:
        return int(_field(_MEMINFO, "MemAvailable:")) * 1024
    except (OSError, ValueError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _field(path: Path, name: str) -> str:
    """The first word after ``name`` in a file of names and numbers; empty where it is not there."""
    words = path.read_text("ascii").split()
    return words[words.index(name) + 1] if name in words else ""
