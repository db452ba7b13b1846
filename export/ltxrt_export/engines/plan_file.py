# SPDX-License-Identifier: Apache-2.0
"""The compiled plan on its way to disk: in pieces, hashed as they come, and named only when it is whole."""

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ltxrt.errors import OutputError
from ltxrt.manifest import FileEntry

__all__ = ["PARTIAL_SUFFIX", "PlanFile", "plan_writer", "write_whole"]

PARTIAL_SUFFIX = ".partial"


class PlanFile:
    """A file that is written under another name and gets its own with ``commit``; a context manager.

    Args:
        path: Where the plan will be.

    Raises:
        OutputError: The folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(path.name + PARTIAL_SUFFIX)
        self._digest = hashlib.sha256()
        #: Bytes written so far.
        self.size = 0
        #: What went wrong while writing: the compiler only learns that it did.
        self.error: OSError | None = None
        try:
            self._file = self._partial.open("wb")
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def write(self, data: bytes) -> int:
        """Append a piece; returns how much of it was taken, 0 after an error."""
        if self.error is not None:
            return 0
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            return 0
        self._digest.update(data)
        self.size += len(data)
        return len(data)

    def commit(self) -> FileEntry:
        """Bring everything to disk and give the file its name.

        Raises:
            OutputError: Nothing was written, or not all of it could be.
        """
        try:
            if self.error is not None:
                raise self.error
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.replace(self.path)
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror}") from error
        return FileEntry(sha256=self._digest.hexdigest(), bytes=self.size)


def plan_writer(tensorrt: Any, plan: PlanFile) -> Any:
    """TensorRT's ``IStreamWriter`` on ``plan``: with it a plan is never held in memory as a whole."""

    class Writer(tensorrt.IStreamWriter):
        def __init__(self) -> None:
            tensorrt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            return plan.write(data)

    return Writer()


def write_whole(path: Path, data: bytes) -> FileEntry:
    """Write a small file so that it is there as a whole or not at all.

    Raises:
        OutputError: It cannot be written.
    """
    with PlanFile(path) as file:
        file.write(data)
        return file.commit()
