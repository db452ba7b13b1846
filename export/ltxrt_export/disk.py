# SPDX-License-Identifier: Apache-2.0
"""Room on disk, and weight files that take none: shared with their source where the file system can do it.

ONNX takes external data from real files beside the graph only, neither from a symbolic link nor from another
folder. A clone (shared extents: Btrfs, XFS) or a hard link is such a file; across file systems it has to be a copy.
A hard link is the same file under two names: whoever writes into the source writes into the bundle.
"""

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ltxrt.errors import ExportError, OutputError

if sys.platform == "linux":
    import fcntl

__all__ = ["WeightPlan", "free_bytes", "gigabytes", "hashed", "plan_weights", "require_room", "share"]

#: The Linux request that clones a file (linux/fs.h).
_FICLONE = 0x40049409
#: How a file system says that it does not do this, or not for these two files.
_REFUSALS = frozenset(
    {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS}
)
_BLOCK_BYTES = 8 * 1024**2
#: Left free beside the weights: graphs, tables, manifest.
_MARGIN_BYTES = 256 * 1024**2


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """What the weight files of a bundle will take in a folder.

    Attributes:
        folder: Where they go.
        shared: Size of every file that can be shared with its source.
        copied: Size of every file that has to be copied.
        free_bytes: Free in the folder's file system.
        made_bytes: What FP8 weights, which the export makes, will take besides.
    """

    folder: Path
    shared: Mapping[Path, int]
    copied: Mapping[Path, int]
    free_bytes: int
    made_bytes: int = 0

    def __str__(self) -> str:
        """One line for the user."""
        shared, copied = sum(self.shared.values()), sum(self.copied.values())
        made = f", {gigabytes(self.made_bytes)} made in FP8" if self.made_bytes else ""
        return (
            f"weights: {gigabytes(shared)} shared with their files, {gigabytes(copied)} copied{made};"
            f" {gigabytes(self.free_bytes)} free"
        )

    def check(self) -> None:
        """Refuse a plan that does not fit.

        Raises:
            OutputError: It does not.
        """
        purposes: list[str] = ["FP8 weights"] if self.made_bytes else []
        if self.copied:
            elsewhere = f"a folder on the file system of {next(iter(self.copied))} takes none"
            purposes.append(f"copies of the weights; {elsewhere}")
        if purposes:
            needed = sum(self.copied.values()) + self.made_bytes + _MARGIN_BYTES
            require_room(self.folder, needed, " and ".join(purposes))


def plan_weights(files: Iterable[Path], folder: Path, made_bytes: int = 0) -> WeightPlan:
    """Find out by trying, which of ``files`` can be shared into ``folder``; leaves nothing there.

    Args:
        files: Weight files.
        folder: Where they go.
        made_bytes: Weights that will be made there besides.

    Raises:
        ExportError: A file cannot be read.
        OSError: The folder cannot be written.
    """
    probe = folder / ".probe"
    shared: dict[Path, int] = {}
    copied: dict[Path, int] = {}
    for file in files:
        possible = share(file, probe)
        probe.unlink(missing_ok=True)
        (shared if possible else copied)[file] = file.stat().st_size
    return WeightPlan(folder, shared, copied, shutil.disk_usage(folder).free, made_bytes)


def share(source: Path, target: Path) -> bool:
    """Make ``target`` a clone of ``source``, or a hard link to it; False where the file system does neither.

    Raises:
        ExportError: ``source`` cannot be read.
        OSError: ``target`` cannot be written.
    """
    with _read(source):
        # A link to a symbolic link would be one.
        real = source.resolve(strict=True)
        real.open("rb").close()
    return _cloned(real, target) or _linked(real, target)


def hashed(source: Path, copy: Path | None = None) -> Generator[int, None, str]:
    """Read a file once: yield how many bytes are done, return the hex SHA-256; write a copy on the way if asked to.

    Raises:
        ExportError: The file cannot be read.
        OSError: The copy cannot be written; nothing is left of it.
    """
    digest = hashlib.sha256()
    done = 0
    try:
        with ExitStack() as stack:
            with _read(source):
                file = stack.enter_context(source.open("rb"))
            target = stack.enter_context(copy.open("xb")) if copy is not None else None
            while block := _block(source, file):
                digest.update(block)
                if target is not None:
                    target.write(block)
                done += len(block)
                yield done
    except BaseException:
        if copy is not None:
            copy.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def require_room(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Refuse what does not fit.

    Raises:
        OutputError: Less than ``needed_bytes`` are free where ``folder`` is, or will be made.
    """
    free = free_bytes(folder)
    if free < needed_bytes:
        raise OutputError(
            f"{folder}: {gigabytes(needed_bytes)} are needed and {gigabytes(free)} are free, for {purpose}"
        )


def free_bytes(folder: Path) -> int:
    """Bytes that are free where ``folder`` is, or will be made."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def gigabytes(count: int) -> str:
    """A size as messages show it: 46.1 GB."""
    return f"{count / 1e9:.1f} GB" if count >= 100_000_000 or count == 0 else f"{count / 1e6:.1f} MB"


@contextmanager
def _read(path: Path) -> Generator[None]:
    """Turn what goes wrong with a source into one line."""
    try:
        yield
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror}") from error


def _block(path: Path, file: BinaryIO) -> bytes:
    with _read(path):
        return file.read(_BLOCK_BYTES)


def _cloned(source: Path, target: Path) -> bool:
    if sys.platform != "linux":
        return False
    with source.open("rb") as original, target.open("xb") as clone:
        try:
            fcntl.ioctl(clone.fileno(), _FICLONE, original.fileno())
        except OSError as error:
            target.unlink()
            if error.errno not in _REFUSALS:
                raise
            return False
    return True


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        return False
    return True
