# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels on disk, each under the key of all that it was made from.

A file appears whole or not at all: it is written under another name, flushed, and renamed. What the cache holds may
be deleted at any time, and several processes may share a folder: they write the same bytes.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .nvrtc import Compiled, compile_program, identity
from .program import CompilerIdentity, Program, program
from .spec import Problem

__all__ = ["CubinCache"]

_ELF = b"\x7fELF"


@dataclass(frozen=True)
class CubinCache:
    """A folder of CUBINs.

    Attributes:
        folder: Made when it is first written to.
        compiler: Which compiler it is; asked for its identity before a file is looked for.
        compile: Compiles what is not there.
    """

    folder: Path
    compiler: Callable[[], CompilerIdentity] = identity
    compile: Callable[[Program], Compiled] = compile_program

    def cubin(self, problem: Problem, architecture: str) -> bytes:
        """The CUBIN of a problem, compiled where it is not there yet.

        Args:
            problem: Its sizes count as far as the launch table compiles them in.
            architecture: One of ``ltxrt_kernels.program.ARCHITECTURES``.

        Raises:
            CompilerError: There is no compiler, or it refuses the kernel.
            OSError: The folder cannot be written.
        """
        wanted = program(problem, architecture)
        path = self.path(wanted)
        try:
            found = path.read_bytes()
        except FileNotFoundError:
            found = b""
        if is_whole(found):
            return found
        code = self.compile(wanted).code
        _write(path, code)
        return code

    def path(self, wanted: Program) -> Path:
        """Where a program's CUBIN lies."""
        return self.folder / f"{wanted.entry}-{wanted.architecture}-{wanted.key(self.compiler())[:32]}.cubin"


def is_whole(content: bytes) -> bool:
    """Whether this is an ELF file to its end, where the table of its sections stands."""
    if len(content) < 64 or not content.startswith(_ELF):
        return False
    # ELF64: offset of the section table, then size and number of its entries.
    table = int.from_bytes(content[0x28:0x30], "little")
    size, count = (int.from_bytes(content[place : place + 2], "little") for place in (0x3A, 0x3C))
    return count > 0 and len(content) >= table + size * count


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".", suffix=".cubin", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
