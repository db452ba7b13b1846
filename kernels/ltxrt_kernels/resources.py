# SPDX-License-Identifier: Apache-2.0
"""What a compiled kernel uses, from the assembler's own report, and how much of a processor that lets it fill."""

import re
from dataclasses import dataclass

__all__ = ["PROCESSORS", "Processor", "Resources", "resources_of"]

_WARP = 32
_REGISTER_STEP = 256
#: Shared memory that the driver keeps of every block, from Ampere on.
_RESERVED_SHARED_BYTES = 1024
_SHARED_STEP_BYTES = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """What one multiprocessor holds (CUDA C++ Programming Guide, compute capabilities)."""

    threads: int
    blocks: int
    shared_bytes: int
    registers: int = 65536


#: By architecture; compute capability 10.3 and 12.1 are no smaller than 10.0 and 12.0.
PROCESSORS = {
    "sm_80": Processor(threads=2048, blocks=32, shared_bytes=164 * 1024),
    "sm_89": Processor(threads=1536, blocks=24, shared_bytes=100 * 1024),
    "sm_90a": Processor(threads=2048, blocks=32, shared_bytes=228 * 1024),
    "sm_100": Processor(threads=2048, blocks=32, shared_bytes=228 * 1024),
    "sm_120": Processor(threads=1536, blocks=24, shared_bytes=100 * 1024),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a kernel uses.

    Attributes:
        registers: Of a thread.
        spilled_bytes: Stored and loaded again for want of registers, of a thread.
        stack_bytes: Local memory, of a thread.
        shared_bytes: Static shared memory, of a block.
    """

    registers: int
    spilled_bytes: int
    stack_bytes: int
    shared_bytes: int

    def occupancy(self, architecture: str, block: int) -> float:
        """Share of a multiprocessor's threads that can be resident at once.

        Args:
            architecture: One of ``PROCESSORS``.
            block: Threads of a block.
        """
        processor = PROCESSORS[architecture]
        warps = -(-block // _WARP)
        registers = -(-self.registers * _WARP // _REGISTER_STEP) * _REGISTER_STEP * warps
        shared = -(-(self.shared_bytes + _RESERVED_SHARED_BYTES) // _SHARED_STEP_BYTES) * _SHARED_STEP_BYTES
        blocks = min(
            processor.blocks,
            processor.threads // (warps * _WARP),
            processor.registers // registers,
            processor.shared_bytes // shared,
        )
        return blocks * warps * _WARP / processor.threads


def resources_of(log: str, entry: str) -> Resources:
    """The assembler's report on a kernel.

    Args:
        log: Of a compilation with ``--ptxas-options=-v``.
        entry: Name of the kernel.

    Raises:
        ValueError: The log does not speak of it.
    """
    own = re.search(rf"Function properties for {re.escape(entry)}\n(?P<report>.*?registers.*?)(?:\n|$)", log, re.DOTALL)
    if own is None:
        raise ValueError(f"the compiler's log says nothing about {entry!r}")

    def number(pattern: str) -> int:
        found = re.search(pattern, own["report"])
        return int(found[1]) if found else 0

    return Resources(
        registers=number(r"Used (\d+) registers"),
        spilled_bytes=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        stack_bytes=number(r"(\d+) bytes stack frame"),
        shared_bytes=number(r"(\d+) bytes smem"),
    )
