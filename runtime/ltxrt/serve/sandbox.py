# SPDX-License-Identifier: Apache-2.0
"""Media opened in processes of their own, each for one file, forked from one that waits with the decoders loaded."""

import asyncio
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import MediaError
from .sandbox_link import SandboxLink

__all__ = ["Sandbox", "SandboxLimits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """What reading one file may take.

    Attributes:
        memory_bytes: Address space of the process, libraries included.
        cpu_seconds: Processor time.
        wall_seconds: Time on the clock.
        output_bytes: Size of what it writes.
        audio_seconds: Longest track.
        at_once: Processes that read at the same time.
    """

    memory_bytes: int = 4 << 30
    cpu_seconds: int = 60
    wall_seconds: float = 90.0
    output_bytes: int = 1 << 30
    audio_seconds: int = 600
    at_once: int = 4


class Sandbox:
    """Turns files from callers into files of our own making: 32-bit float WAV, 8-bit RGB PNG. For one event loop.

    Args:
        limits: What reading one file may take.
        folder: An empty folder in which the processes start, made where it is missing; a temporary one by default,
            which a killed server would leave behind.
    """

    def __init__(self, limits: SandboxLimits, folder: Path | None = None) -> None:
        self._limits = limits
        self._turn = asyncio.Semaphore(limits.at_once)
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="ltxrt-")
            folder = Path(self._temporary.name)
        folder.mkdir(exist_ok=True, mode=0o700)
        self._link = SandboxLink(folder)

    async def close(self) -> None:
        """End every process; remove the folder where it is a temporary one."""
        await self._link.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def prepare(self) -> None:
        """Start what the first file would wait for."""
        self._link.start()

    @property
    def process_id(self) -> int | None:
        """Of the process that forks one for each file, while there is one."""
        return self._link.process_id

    async def read(self, kind: Literal["audio", "image"], source: Path, target: Path, field: str) -> dict[str, Any]:
        """Read a file from a caller and write it anew.

        Returns:
            ``samples`` (per channel) and ``rate`` of audio, ``width`` and ``height`` of an image.

        Raises:
            MediaError: The file is refused, or reading it took more than it may.
        """
        order = {
            "kind": kind,
            "source": str(source.resolve()),
            "target": str(target.resolve()),
            "field": field,
            "max_seconds": self._limits.audio_seconds,
            "memory_bytes": self._limits.memory_bytes,
            "cpu_seconds": self._limits.cpu_seconds,
            "output_bytes": self._limits.output_bytes,
        }
        async with self._turn:
            answer = await self._answer(json.dumps(order).encode())
        if "problem" in answer:
            target.unlink(missing_ok=True)
            raise MediaError(field, kind, answer["problem"], answer["allowed"])
        return answer

    async def _answer(self, order: bytes) -> dict[str, Any]:
        try:
            return json.loads(await self._link.ask(order, self._limits.wall_seconds))
        except TimeoutError:
            return {"problem": "takes too long to read", "allowed": "a simpler file"}
        except ValueError:  # it said nothing: a limit, or a decoder that crashed
            return {"problem": "cannot be read within the limits of this server", "allowed": "a simpler file"}
