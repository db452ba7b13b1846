# SPDX-License-Identifier: Apache-2.0
"""A clip on disk: fragments as they come, then one checked faststart file under the wanted name.

The name appears only when the file behind it is whole and has passed its read-back check. Until then the
work lies in hidden files beside it (the same file system, so that the last step is one atomic rename), and
whatever ends the work early removes them.
"""

import math
import os
import secrets
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import av
from av.container import InputContainer, OutputContainer
from av.error import FFmpegError

from .errors import MediaError, OutputError, VerificationError
from .mux import STORED_TAGS
from .readback import ClipReport, Expectation, check_clip, require

__all__ = ["ClipFile", "check_destination", "faststart"]

#: Largest movie time scale that FFmpeg takes.
_MAX_TIMESCALE = 2**31 - 1


class ClipFile:
    """Collects the fragments of one clip and turns them into a finished file; a context manager.

    Leaving it without ``commit`` (an error, an interruption, a generator that is closed) removes everything
    that it wrote. An earlier file of that name stays as it is until the new one replaces it.

    Args:
        destination: Where the finished clip goes. Refused here, before any work, if that cannot be.

    Raises:
        OutputError: The folder does not exist or cannot be written, or the name is taken by something that
            is not a regular file.
    """

    def __init__(self, destination: Path) -> None:
        check_destination(destination)
        self._destination = destination
        self._partial = _beside(destination, "partial")
        self._finished = _beside(destination, "finished")
        try:
            self._file = self._partial.open("xb")
        except OSError as error:
            raise _cannot_write(destination, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, fragment: bytes) -> None:
        """Write the next bytes of the stream.

        Raises:
            OutputError: They cannot be written, for example because the disk is full.
        """
        try:
            self._file.write(fragment)
        except OSError as error:
            raise _cannot_write(self._destination, error) from error

    def commit(self, expected: Expectation | None = None) -> ClipReport:
        """Remux to faststart, read back, check, and give the file its name.

        Raises:
            OutputError: The file cannot be written.
            VerificationError: The file is not what it should be; it is removed.
        """
        try:
            self._file.close()
            _remux(self._partial, self._finished)
            report = check_clip(self._finished, expected)
            require(report)
            self._finished.replace(self._destination)
        except MediaError as error:
            raise VerificationError(f"the clip failed its read-back check: {error.problem}") from error
        except (OSError, FFmpegError) as error:
            raise _cannot_write(self._destination, error) from error
        finally:
            self.close()
        return report

    def close(self) -> None:
        """Remove what was not committed. Calling it again does nothing."""
        # The buffer may not fit on the disk any more; the file is going away, so its last bytes are no loss.
        with suppress(OSError):
            self._file.close()
        self._partial.unlink(missing_ok=True)
        self._finished.unlink(missing_ok=True)


def check_destination(destination: Path) -> None:
    """Refuse a destination that cannot be written, without touching it.

    Raises:
        OutputError: The folder does not exist or cannot be written, or the name is taken by something that
            is not a regular file.
    """
    try:
        obstacle = _obstacle(destination)
    except OSError as error:  # a name that is too long, a folder that may not be searched
        raise _cannot_write(destination, error) from error
    if obstacle is not None:
        raise OutputError(f"{destination}: {obstacle}")


def _obstacle(destination: Path) -> str | None:
    folder = destination.parent
    if destination.is_dir():
        return "is a folder; give the name of a file"
    if not folder.is_dir():
        return f"the folder {folder} does not exist"
    if destination.exists() and not destination.is_file():
        return "is not a regular file"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"the folder {folder} cannot be written (permission denied)"
    return None


def faststart(source: Path, destination: Path) -> None:
    """Remux a clip, without encoding it again, to an MP4 whose index lies ahead of its media.

    Durations stay exact, and tags, colour and the edit list that hides the AAC priming are kept. The file is
    written beside ``destination`` and renamed; after a failure nothing is left.

    Raises:
        OutputError: ``source`` is no clip, or the result cannot be written.
    """
    check_destination(destination)
    finished = _beside(destination, "finished")
    try:
        _remux(source, finished)
        finished.replace(destination)
    except (OSError, FFmpegError) as error:
        raise _cannot_write(destination, error) from error
    finally:
        finished.unlink(missing_ok=True)


def _remux(source: Path, target: Path) -> None:
    # Absolute paths, because FFmpeg reads a relative "a:b.mp4" as a protocol. The target must be a path and no
    # Python file: FFmpeg opens it a second time to move the index.
    with (
        av.open(str(source.resolve()), format="mp4") as reader,
        av.open(
            str(target.resolve()),
            "w",
            format="mp4",
            options={"movflags": "faststart", "movie_timescale": str(_common_timescale(reader))},
        ) as writer,
    ):
        _copy(reader, writer)


def _copy(reader: InputContainer, writer: OutputContainer) -> None:
    if not reader.streams.video:
        raise OutputError("the stream holds no video")
    writer.metadata.update({name: reader.metadata[name] for name in STORED_TAGS if name in reader.metadata})
    copies = {stream.index: writer.add_stream_from_template(stream, opaque=True) for stream in reader.streams}
    for packet in reader.demux():
        if packet.dts is not None:  # the demuxer ends each stream with an empty packet
            packet.stream = copies[packet.stream_index]
            writer.mux_one(packet)


def _common_timescale(reader: InputContainer) -> int:
    """Ticks per second in which every track's times are whole, so that no duration is rounded.

    Where that needs more than 31 bits the first track's serve, and the other's end rounds to one of them.
    """
    scales = [stream.time_base.denominator for stream in reader.streams if stream.time_base is not None]
    common = math.lcm(*scales)
    return common if common <= _MAX_TIMESCALE else scales[0]


def _beside(destination: Path, state: str) -> Path:
    # Random, so that two runs with one destination do not share a file.
    return destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.{state}")


def _cannot_write(destination: Path, error: OSError | FFmpegError) -> OutputError:
    return OutputError(f"{destination}: cannot be written ({error.strerror or error})")
