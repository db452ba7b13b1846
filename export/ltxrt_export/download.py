# SPDX-License-Identifier: Apache-2.0
"""Fetching the published weights: only the files that an export needs, resumed where it stopped, every hash checked.

The files are real files in one folder, since ONNX takes external data from nothing else; the hub's cache keeps
symbolic links. A file gets its name when its size and hash are the hub's; until then it is a ``.partial`` beside it,
which the next run goes on with.

This has been run against a server that imitates the hub, and never against the hub itself.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ltxrt.errors import ExportError, OutputError

from . import published
from .disk import gigabytes, require_room
from .hub import Hub, InterruptedTransferError, RemoteFile
from .published import PublishedRepository

__all__ = ["DownloadPlan", "DownloadStep", "download", "plan_download", "source_paths"]

#: Waits before the further tries after a broken transfer; one that brought bytes begins them anew.
RETRY_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)
_BLOCK_BYTES = 8 * 1024**2
_STEP_BYTES = 1024**2


@dataclass(frozen=True, slots=True)
class DownloadPlan:
    """What is to be fetched, and where to.

    Attributes:
        folder: Gets the LTX files, and the text encoder's folder.
        files: Every file, whether it is there or not.
    """

    folder: Path
    files: tuple[RemoteFile, ...]

    @property
    def total_bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def missing_bytes(self) -> int:
        """That have to be fetched still."""
        return sum(max(0, file.bytes - self.present_bytes(file)) for file in self.files)

    @property
    def repositories(self) -> tuple[PublishedRepository, ...]:
        """Where the files come from, each with its terms."""
        return tuple(dict.fromkeys(file.repository for file in self.files))

    def path(self, file: RemoteFile) -> Path:
        """Where a file goes."""
        return self.folder / file.repository.folder / file.name

    def partial(self, file: RemoteFile) -> Path:
        """Where its bytes are until all of them are there; another content is another name."""
        path = self.path(file)
        return path.with_name(f".{path.name}.{(file.sha256 or file.git_sha1 or '')[:12]}.partial")

    def present_bytes(self, file: RemoteFile) -> int:
        """Bytes of a file that are on this disk already."""
        for path in (self.path(file), self.partial(file)):
            if path.is_file():
                return path.stat().st_size
        return 0


@dataclass(frozen=True, slots=True)
class DownloadStep:
    """Progress: ``done`` bytes of a file are fetched, or for a file that was there already, checked."""

    file: RemoteFile
    done: int


def plan_download(
    folder: Path, hub: Hub, repositories: Sequence[PublishedRepository] = published.SOURCES
) -> DownloadPlan:
    """Ask the hub what there is; fetches nothing.

    Raises:
        ExportError: The hub cannot be asked, or a file is not there.
    """
    return DownloadPlan(folder, tuple(file for repository in repositories for file in hub.files(repository)))


def download(plan: DownloadPlan, hub: Hub) -> Generator[DownloadStep]:
    """Fetch what is missing and check everything, in the order of the plan; finished files are only read.

    A generator: closing it early keeps what was fetched for the next run.

    Raises:
        ExportError: Access is refused, the hub cannot be reached, or a file is not what the hub says.
        OutputError: It does not fit on the disk, cannot be written, or another file has its name.
    """
    require_room(plan.folder, plan.missing_bytes, f"{gigabytes(plan.total_bytes)} of model files")
    for repository in plan.repositories:
        if any(file.repository is repository and not plan.path(file).exists() for file in plan.files):
            hub.check_access(repository)
    for file in plan.files:
        path = plan.path(file)
        if path.exists():
            yield from _checked(plan, file)
            continue
        with _written(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(plan.partial(file)) as partial:
                yield from _fetched(file, partial, hub)
                os.fsync(partial.fileno())
            plan.partial(file).rename(path)


def source_paths(plan: DownloadPlan) -> tuple[Path, Path, Path]:
    """Checkpoint, text encoder and upsampler of a downloaded folder, as the export takes them."""
    folder = plan.folder
    return folder / published.DISTILLED.name, folder / published.GEMMA.folder, folder / published.UPSAMPLER.name


def _checked(plan: DownloadPlan, file: RemoteFile) -> Generator[DownloadStep]:
    """Compare a file that is there with the hub's."""
    path = plan.path(file)
    digest = _digest(file)
    try:
        with path.open("rb") as stream:
            for done in _fed(digest, stream):
                yield DownloadStep(file, done)
            same = stream.tell() == file.bytes and digest.hexdigest() == _expected(file)
    except OSError as error:
        raise OutputError(f"{path}: cannot be read ({error.strerror})") from error
    if not same:
        raise OutputError(f"{path}: is there and is not the published file; move it away, or choose another folder")


def _fetched(file: RemoteFile, stream: BinaryIO, hub: Hub) -> Generator[DownloadStep]:
    """Append what is missing of a file, then compare size and hash."""
    partial = _Partial(file, stream)
    yield from partial.resume()
    waits = RETRY_SECONDS
    while partial.size < file.bytes:
        before = partial.size
        try:
            yield from partial.receive(hub)
        except InterruptedTransferError as error:
            if partial.size > before:
                waits = RETRY_SECONDS
                continue
            if not waits:
                raise ExportError(
                    f"{file.name}: {error}; {gigabytes(before)} of {gigabytes(file.bytes)} are kept, run the command"
                    " again to go on"
                ) from error
            time.sleep(waits[0])
            waits = waits[1:]
    partial.check()


class _Partial:
    """A file of which some bytes are there; their hash is kept up with them."""

    def __init__(self, file: RemoteFile, stream: BinaryIO) -> None:
        self._file = file
        self._stream = stream
        self._digest = _digest(file)

    @property
    def size(self) -> int:
        """Bytes that are there."""
        return self._stream.tell()

    def resume(self) -> Generator[DownloadStep]:
        """Read what an earlier run left."""
        for done in _fed(self._digest, self._stream):
            yield DownloadStep(self._file, done)

    def receive(self, hub: Hub) -> Generator[DownloadStep]:
        """Append what the hub sends in one go.

        Raises:
            InterruptedTransferError: It sent less than everything, or nothing.
        """
        before = self.size
        with hub.stream(self._file, before) as (begin, blocks):
            if begin != before:
                self._restart()  # the server does not seek
            shown = self.size // _STEP_BYTES
            for block in blocks:
                self._stream.write(block)
                self._digest.update(block)
                if self.size > self._file.bytes:
                    return
                if self.size // _STEP_BYTES > shown or self.size == self._file.bytes:
                    shown = self.size // _STEP_BYTES
                    yield DownloadStep(self._file, self.size)
        if self.size < self._file.bytes:
            raise InterruptedTransferError("the hub sent too little")

    def check(self) -> None:
        """Compare with what the hub lists; what differs is not kept.

        Raises:
            ExportError: It differs.
        """
        file, size = self._file, self.size
        if size == file.bytes and self._digest.hexdigest() == _expected(file):
            return
        self._restart()
        raise ExportError(
            f"{file.name}: what arrived ({size} bytes) is not what {file.repository.name} lists ({file.bytes} bytes,"
            f" {_expected(file)[:12]}…); run the command again to fetch it anew"
        )

    def _restart(self) -> None:
        self._stream.seek(0)
        self._stream.truncate()
        self._digest = _digest(self._file)


def _digest(file: RemoteFile) -> Any:
    """The running hash that the hub gives for a file; git's covers a header too."""
    if file.sha256 is not None:
        return hashlib.sha256()
    return hashlib.sha1(f"blob {file.bytes}\0".encode(), usedforsecurity=False)


def _expected(file: RemoteFile) -> str:
    return file.sha256 or file.git_sha1 or ""


def _fed(digest: Any, stream: BinaryIO) -> Generator[int]:
    """Hash a stream from its beginning to its end; yields how far it got."""
    stream.seek(0)
    while block := stream.read(_BLOCK_BYTES):
        digest.update(block)
        yield stream.tell()


@contextmanager
def _locked(path: Path) -> Generator[BinaryIO]:
    """A partial file, open for reading and appending, that no other download is writing."""
    with path.open("a+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"{path}: another download is writing it; wait for it, or stop it") from error
        yield stream


@contextmanager
def _written(path: Path) -> Generator[None]:
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
