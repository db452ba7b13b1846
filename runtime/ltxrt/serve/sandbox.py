# SPDX-License-Identifier: Apache-2.0
"""Media opened in processes of their own, each for one file; the next one is started ahead of time."""

import asyncio
import json
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import MediaError

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
    """Turns files from callers into files of our own making: 32-bit float WAV, 8-bit RGB PNG.

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
        self._folder = folder
        folder.mkdir(exist_ok=True, mode=0o700)
        self._spare: asyncio.Task[Process] | None = None

    async def close(self) -> None:
        """End the waiting process; remove the folder where it is a temporary one."""
        if self._spare is not None:
            await _end(await self._spare)
            self._spare = None
        if self._temporary is not None:
            self._temporary.cleanup()

    def prepare(self) -> None:
        """Start the process that the next file will use."""
        if self._spare is None:
            self._spare = asyncio.create_task(self._start())

    async def read(self, kind: Literal["audio", "image"], source: Path, target: Path, field: str) -> dict[str, Any]:
        """Read a file from a caller and write it anew.

        Returns:
            ``samples`` (per channel) and ``rate`` of audio, ``width`` and ``height`` of an image.

        Raises:
            MediaError: The file is refused, or reading it took more than it may.
        """
        async with self._turn:
            process = await self._taken()
            try:
                answer = await self._order(process, kind, source, target, field)
            finally:
                await _end(process)
        if "problem" in answer:
            target.unlink(missing_ok=True)
            raise MediaError(field, kind, answer["problem"], answer["allowed"])
        return answer

    async def _taken(self) -> Process:
        """The waiting process; another one is started in its place."""
        self.prepare()
        # Taken before it is waited for: whoever reads at the same time gets a process of its own.
        spare, self._spare = self._spare, None
        assert spare is not None
        self.prepare()
        try:
            process = await asyncio.shield(spare)
        except asyncio.CancelledError:
            await _end(await spare)
            raise
        return process if process.returncode is None else await self._start()  # it did not live to see its order

    async def _order(self, process: Process, kind: str, source: Path, target: Path, field: str) -> dict[str, Any]:
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
        talk = process.communicate(json.dumps(order).encode() + b"\n")
        try:
            output, _ = await asyncio.wait_for(talk, self._limits.wall_seconds)
            return json.loads(output)
        except TimeoutError:
            return {"problem": "takes too long to read", "allowed": "a simpler file"}
        except ValueError:  # it said nothing: a limit, or a decoder that crashed
            return {"problem": "cannot be read within the limits of this server", "allowed": "a simpler file"}

    async def _start(self) -> Process:
        # PYTHONPATH alone is kept, without which an unusual installation would not be found.
        environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": _python_path()}
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "ltxrt.serve.sandbox_child"),
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            env=environment,
            cwd=self._folder,
        )


def _python_path() -> str:
    return str(Path(__file__).parents[2])


async def _end(process: Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()
    await process.wait()
