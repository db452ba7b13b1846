# SPDX-License-Identifier: Apache-2.0
"""Where everything goes in one block of device memory, worked out without a device.

A request is so many bytes from one step of the work to another. Two requests whose steps overlap get places that do
not; all others may share. Largest first, each at the lowest place that is free for all of its steps: the offset
assignment of Pisarchyk and Lee, "Efficient memory management for deep neural net inference" (2020), greedy by size.
"""

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["ALIGNMENT_BYTES", "ArenaPlan", "MemoryRequest", "Placement", "plan_arena"]

#: TensorRT asks it of scratch memory, and every access of a kernel is satisfied by it.
ALIGNMENT_BYTES = 256


@dataclass(frozen=True, slots=True)
class MemoryRequest:
    """Memory that is needed for a while.

    Attributes:
        name: Unique within a plan.
        size_bytes: How much; 0 takes no place.
        first: First step that needs it.
        last: Last step that needs it.
    """

    name: str
    size_bytes: int
    first: int
    last: int

    def meets(self, other: "MemoryRequest") -> bool:
        """Whether both are needed in some step."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True, slots=True)
class Placement:
    """A request and where it goes."""

    request: MemoryRequest
    offset: int

    @property
    def end(self) -> int:
        """First byte after it."""
        return self.offset + self.request.size_bytes


@dataclass(frozen=True, slots=True)
class ArenaPlan:
    """All placements.

    Attributes:
        placements: In the order of the requests.
        peak_bytes: Size of the block.
    """

    placements: tuple[Placement, ...]
    peak_bytes: int

    @property
    def unshared_bytes(self) -> int:
        """What the same would take with a place of its own for each."""
        return sum(_aligned(placement.request.size_bytes) for placement in self.placements)

    def live_bytes(self, step: int) -> int:
        """What is needed in a step."""
        return sum(p.request.size_bytes for p in self.placements if p.request.first <= step <= p.request.last)

    def sharing(self, name: str) -> tuple[str, ...]:
        """Names of the other requests whose place overlaps that of ``name``."""
        own = next(p for p in self.placements if p.request.name == name)
        return tuple(
            p.request.name
            for p in self.placements
            if p.request.name != name and p.offset < own.end and own.offset < p.end
        )


def plan_arena(requests: Iterable[MemoryRequest]) -> ArenaPlan:
    """Place every request.

    Raises:
        ValueError: A name recurs, a size is negative, or a request ends before it begins.
    """
    wanted = tuple(requests)
    if len({request.name for request in wanted}) < len(wanted):
        raise ValueError("two requests have one name")
    for request in wanted:
        if request.size_bytes < 0 or request.last < request.first:
            raise ValueError(f"{request.name}: {request.size_bytes} bytes in steps {request.first} to {request.last}")
    placed: dict[str, Placement] = {}
    for request in sorted(wanted, key=lambda r: (-r.size_bytes, r.first, r.name)):
        taken = sorted((p for p in placed.values() if p.request.meets(request)), key=lambda p: p.offset)
        placed[request.name] = Placement(request, _lowest_gap(taken, request.size_bytes))
    placements = tuple(placed[request.name] for request in wanted)
    return ArenaPlan(placements, max((placement.end for placement in placements), default=0))


def _lowest_gap(taken: Iterable[Placement], size_bytes: int) -> int:
    """The lowest aligned offset at which ``size_bytes`` overlap none of ``taken``, which are sorted by offset."""
    offset = 0
    for placement in taken:
        if offset + size_bytes <= placement.offset:
            break
        offset = max(offset, _aligned(placement.end))
    return offset


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
