# SPDX-License-Identifier: Apache-2.0
"""A folder that grows under a hidden name beside its destination and gets its own by a rename.

One run at a time works for a destination: the names are fixed, and a lock that dies with its process guards them. So
whatever a killed run left is found by the next one to the same destination, which puts back the bundle that was being
replaced, takes over what is finished and removes the rest.
"""

import fcntl
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from ltxrt.errors import OutputError

__all__ = ["Staging"]


class Staging:
    """The folder on its way to ``destination``.

    Attributes:
        folder: The hidden folder; empty but for what a killed run had finished.

    Args:
        destination: The folder that it will become. Folders above it are made.
        check: Raises where the destination may not be replaced.
        reusable: Whether a file of a killed run is taken over.

    Raises:
        OutputError: Another run works for this destination, or ``check`` raised it.
        OSError: The place cannot be written.
    """

    def __init__(
        self, destination: Path, check: Callable[[], None], reusable: Callable[[Path], bool] = lambda _: False
    ) -> None:
        check()
        self._target = destination.absolute()
        if not self._target.name:
            raise OutputError(f"{destination}: cannot be a bundle; choose another folder")
        self.folder = self._beside("partial")
        self._old = self._beside("old")
        # Outermost last; what this run did not make is not its to remove.
        self._made = [parent for parent in self._target.parents if not parent.exists()]
        self._lock: TextIO | None = None
        try:
            if self._made:
                self._target.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self._beside("lock"), destination)
            self._recover()
            check()
            _clear(self.folder, reusable)
            self.folder.mkdir(exist_ok=True)
        except BaseException:
            self._release()
            raise

    def commit(self) -> None:
        """Swap the folder in, by renames alone: at no time is a part of it under the destination's name.

        Raises:
            OSError: It cannot be renamed; what was to be replaced is still there.
        """
        if self._target.exists():
            self._target.rename(self._old)
        try:
            self.folder.rename(self._target)
        except BaseException:
            if self._old.exists():
                self._old.rename(self._target)
            raise
        shutil.rmtree(self._old, ignore_errors=True)

    def close(self) -> None:
        """Remove what was not committed. Calling it again does nothing."""
        if self._lock is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._release()

    def _recover(self) -> None:
        """Finish or undo the swap that a killed run was in."""
        if self._target.exists():
            shutil.rmtree(self._old, ignore_errors=True)
        elif self._old.exists():
            self._old.rename(self._target)

    def _release(self) -> None:
        if self._lock is not None:
            self._beside("lock").unlink(missing_ok=True)
            self._lock.close()
            self._lock = None
        for parent in self._made:
            with suppress(OSError):  # holds the bundle, or something of somebody else's
                parent.rmdir()

    def _beside(self, suffix: str) -> Path:
        return self._target.with_name(f".{self._target.name}.export-{suffix}")


def _locked(path: Path, destination: Path) -> TextIO:
    """The lock file, held until it is closed or its process ends."""
    while True:
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its holder removes it on leaving: what was locked here may no longer be the file of that name.
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError as error:
            file.close()
            raise OutputError(f"{destination}: another export is writing to it") from error
        except FileNotFoundError:
            pass
        file.close()


def _clear(folder: Path, reusable: Callable[[Path], bool]) -> None:
    """Remove everything but the files that are taken over, and the folders that hold them."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_symlink() or not path.is_dir():
            if not reusable(path):
                path.unlink()
        else:
            with suppress(OSError):  # not empty
                path.rmdir()
