# SPDX-License-Identifier: Apache-2.0
"""What the boxes of an MP4 file say about its tracks, read without FFmpeg.

A second opinion for the read-back check: FFmpeg wrote the file, so FFmpeg alone must not vouch for it. Only
headers are read (``mdat`` is skipped over), every level is descended by name and none by recursion, and a
count inside a box can never make us read more than the box holds. Box layouts: ISO/IEC 14496-12 (boxes),
14496-14 (the sample entries of MPEG-4 files), 14496-15 (``avc1``).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .errors import MediaError
from .media import open_media_file

__all__ = ["BoxSpan", "ColourBox", "Edit", "MovieBoxes", "TrackBoxes", "read_boxes", "top_level_boxes"]

_ALLOWED = "a readable MP4 file"
#: Largest moov or moof that is read into memory; a nine-second clip needs some 10 KB.
_MAX_HEADER_BYTES = 64 << 20
#: Most boxes followed on one level; a fragment per frame of a day-long clip stays below it.
_MAX_BOXES = 1 << 20
#: Most changes of the sample duration; a constant frame rate has none.
_MAX_RUNS = 1 << 20
_FIRST_BOXES = ("ftyp", "styp", "moov", "free", "skip", "wide", "mdat")
# Sample entries open with fixed fields of these lengths, then hold boxes (14496-12, 12.1.3).
_VISUAL_ENTRY_BYTES = 78


class BoxSpan(NamedTuple):
    """One box: its four-character type, where it starts, and its length, header included."""

    kind: str
    start: int
    size: int
    header: int

    @property
    def end(self) -> int:
        """Offset of the first byte after the box."""
        return self.start + self.size


class Edit(NamedTuple):
    """One entry of an edit list; ``media_time`` -1 is an empty edit, a delay."""

    segment_duration: int
    media_time: int


class ColourBox(NamedTuple):
    """``colr nclx``: code points of ISO/IEC 23091-2 and whether the range is full."""

    primaries: int
    transfer: int
    matrix: int
    full_range: bool


@dataclass(slots=True)
class TrackBoxes:
    """One track, its fragments included.

    Attributes:
        track_id: Number that the fragments refer to.
        handler: ``vide``, ``soun`` or another four-character code.
        timescale: Ticks per second of the durations below, except ``Edit.segment_duration``.
        declared_duration: What ``mdhd`` says; 0 in a fragmented file.
        sample_runs: Run-length list of (sample count, ticks each), in decode order.
        edits: The edit list, empty where there is none.
        colour: Colour tags of the container, None where there are none.
        contiguous: Every fragment starts where the samples before it end.
    """

    track_id: int
    handler: str
    timescale: int
    declared_duration: int
    sample_runs: list[tuple[int, int]]
    edits: tuple[Edit, ...]
    colour: ColourBox | None
    contiguous: bool = True

    @property
    def sample_count(self) -> int:
        """Samples (coded frames) of the track."""
        return sum(count for count, _ in self.sample_runs)

    @property
    def media_duration(self) -> int:
        """Sum of the sample durations, in ticks, before any edit."""
        return sum(count * ticks for count, ticks in self.sample_runs)


@dataclass(frozen=True, slots=True)
class MovieBoxes:
    """A whole file.

    Attributes:
        order: Types of the top-level boxes, in order.
        complete: No top-level box runs past the end of the file.
        timescale: Ticks per second of ``Edit.segment_duration`` and ``declared_duration``.
        declared_duration: What ``mvhd`` says; 0 in a fragmented file.
        tracks: In file order.
    """

    order: tuple[str, ...]
    complete: bool
    timescale: int
    declared_duration: int
    tracks: tuple[TrackBoxes, ...]

    @property
    def is_fragmented(self) -> bool:
        """Samples come in movie fragments."""
        return "moof" in self.order

    @property
    def is_faststart(self) -> bool:
        """One index, ahead of all media: playback can start before the download ends."""
        if self.is_fragmented or "mdat" not in self.order:
            return False
        return self.order.index("moov") < self.order.index("mdat")

    def track(self, handler: str) -> TrackBoxes | None:
        """The first track of that handler, None where there is none."""
        return next((track for track in self.tracks if track.handler == handler), None)


def top_level_boxes(data: bytes | memoryview) -> Iterator[BoxSpan]:
    """The boxes that lie side by side in ``data``; the last one may run past its end.

    Raises:
        MediaError: A size smaller than the box's own header, or more boxes than any clip has.
    """
    offset = 0
    for _ in range(_MAX_BOXES):
        if offset + 8 > len(data):
            return
        span = _span(bytes(data[offset : offset + 16]), offset, len(data))
        yield span
        offset = span.end
    raise _malformed("holds too many boxes")


def read_boxes(path: Path) -> MovieBoxes:
    """Read the headers of the MP4 file at ``path``.

    Raises:
        MediaError: (field ``file``) The file is missing, empty, unreadable, or not a well-formed MP4.
    """
    with open_media_file(path, "file", _ALLOWED) as file:
        try:
            return _read_movie(file)
        except MediaError as error:
            raise MediaError("file", str(path), error.problem, _ALLOWED) from None
        except OSError as error:
            problem = f"cannot be read ({error.strerror or error})"
            raise MediaError("file", str(path), problem, _ALLOWED) from error
        except (struct.error, IndexError) as error:
            raise MediaError("file", str(path), "has a damaged MP4 header", _ALLOWED) from error


def _read_movie(file: BinaryIO) -> MovieBoxes:
    length = file.seek(0, 2)
    order: list[str] = []
    header: memoryview | None = None
    tracks: tuple[TrackBoxes, ...] = ()
    default_ticks: dict[int, int] = {}
    offset = 0
    while offset + 8 <= length and len(order) < _MAX_BOXES:
        file.seek(offset)
        span = _span(file.read(16), offset, length)
        if not order and span.kind not in _FIRST_BOXES:
            raise _malformed("is not an MP4 file")
        order.append(span.kind)
        if span.kind == "moov" and span.end <= length:
            header = _payload(file, span)
            tracks = tuple(_track(trak) for trak in _children(header, "trak"))
            default_ticks = _default_ticks(header)
        elif span.kind == "moof" and span.end <= length:
            _add_fragment(tracks, default_ticks, _payload(file, span))
        offset = span.end
    if header is None:
        raise _malformed("has no movie header (moov): truncated, or not an MP4 file")
    timescale, duration = _timescale_and_duration(_required(header, "mvhd"))
    return MovieBoxes(tuple(order), offset == length, timescale, duration, tracks)


def _payload(file: BinaryIO, span: BoxSpan) -> memoryview:
    if span.size > _MAX_HEADER_BYTES:
        raise _malformed(f"has a {span.kind} box of {span.size} bytes")
    file.seek(span.start + span.header)
    return memoryview(file.read(span.size - span.header))


def _span(head: bytes, offset: int, length: int) -> BoxSpan:
    size, kind, header = int.from_bytes(head[:4], "big"), head[4:8].decode("latin-1"), 8
    if size == 1:  # 64-bit length follows
        size, header = int.from_bytes(head[8:16], "big"), 16
    elif size == 0:  # the box lasts to the end
        size = length - offset
    if size < header:
        raise _malformed("has a box shorter than its own header")
    return BoxSpan(kind, offset, size, header)


def _children(payload: memoryview, kind: str) -> list[memoryview]:
    """Payloads of the direct children of that type."""
    return [
        payload[span.start + span.header : span.end]
        for span in top_level_boxes(payload)
        if span.kind == kind and span.end <= len(payload)
    ]


def _descend(payload: memoryview, *kinds: str) -> memoryview | None:
    """The payload of the first box down that path of types, None where one is missing."""
    for kind in kinds:
        found = _children(payload, kind)
        if not found:
            return None
        payload = found[0]
    return payload


def _required(payload: memoryview, *kinds: str) -> memoryview:
    found = _descend(payload, *kinds)
    if found is None:
        raise _malformed(f"lacks the box {'/'.join(kinds)}")
    return found


def _default_ticks(moov: memoryview) -> dict[int, int]:
    """Duration by track of the fragments' samples that name none themselves."""
    mvex = _descend(moov, "mvex")
    if mvex is None:
        return {}
    fields = (struct.unpack_from(">III", trex, 4) for trex in _children(mvex, "trex"))
    return {track_id: ticks for track_id, _, ticks in fields}


def _timescale_and_duration(box: memoryview) -> tuple[int, int]:
    """Of ``mvhd`` and ``mdhd``, which open alike; version 1 has 64-bit times."""
    if box[0] == 1:
        return struct.unpack_from(">IQ", box, 20)
    return struct.unpack_from(">II", box, 12)


def _track(trak: memoryview) -> TrackBoxes:
    tkhd = _required(trak, "tkhd")
    (track_id,) = struct.unpack_from(">I", tkhd, 20 if tkhd[0] == 1 else 12)
    timescale, duration = _timescale_and_duration(_required(trak, "mdia", "mdhd"))
    if timescale == 0:
        raise _malformed("has a track with time scale 0")
    handler = bytes(_required(trak, "mdia", "hdlr")[8:12]).decode("latin-1")
    table = _required(trak, "mdia", "minf", "stbl")
    runs: list[tuple[int, int]] = []
    _add_runs(runs, _entries(_required(table, "stts"), ">II"))
    edits = _descend(trak, "edts", "elst")
    return TrackBoxes(
        track_id=track_id,
        handler=handler,
        timescale=timescale,
        declared_duration=duration,
        sample_runs=runs,
        edits=() if edits is None else _edits(edits),
        colour=_colour(table) if handler == "vide" else None,
    )


def _entries(box: memoryview, layout: str) -> Iterator[tuple[int, ...]]:
    """Entries of a full box that holds a count and then that many records."""
    (count,) = struct.unpack_from(">I", box, 4)
    size = struct.calcsize(layout)
    present = min(count, (len(box) - 8) // size)
    return struct.iter_unpack(layout, box[8 : 8 + present * size])


def _edits(elst: memoryview) -> tuple[Edit, ...]:
    layout = ">QqI" if elst[0] == 1 else ">IiI"
    return tuple(Edit(duration, time) for duration, time, _ in _entries(elst, layout))


def _colour(table: memoryview) -> ColourBox | None:
    stsd = _required(table, "stsd")
    for span in top_level_boxes(stsd[8:]):
        entry = stsd[8 + span.start + span.header + _VISUAL_ENTRY_BYTES : 8 + span.end]
        for colr in _children(entry, "colr"):
            if bytes(colr[:4]) == b"nclx":
                primaries, transfer, matrix, flags = struct.unpack_from(">HHHB", colr, 4)
                return ColourBox(primaries, transfer, matrix, bool(flags & 0x80))
    return None


def _add_fragment(tracks: tuple[TrackBoxes, ...], default_ticks: dict[int, int], moof: memoryview) -> None:
    by_id = {track.track_id: track for track in tracks}
    for traf in _children(moof, "traf"):
        tfhd = _required(traf, "tfhd")
        flags, track_id = struct.unpack_from(">II", tfhd)
        track = by_id.get(track_id)
        if track is None:
            raise _malformed(f"has a fragment of track {track_id}, which does not exist")
        ticks = default_ticks.get(track_id, 0)
        if flags & 0x08:  # its own default, after the optional base offset (8) and description index (4)
            offset = 8 + (8 if flags & 0x01 else 0) + (4 if flags & 0x02 else 0)
            (ticks,) = struct.unpack_from(">I", tfhd, offset)
        tfdt = _descend(traf, "tfdt")
        if tfdt is not None:
            (start,) = struct.unpack_from(">Q" if tfdt[0] == 1 else ">I", tfdt, 4)
            track.contiguous = track.contiguous and start == track.media_duration
        for trun in _children(traf, "trun"):
            _add_runs(track.sample_runs, _fragment_runs(trun, ticks))


def _fragment_runs(trun: memoryview, default_ticks: int) -> Iterator[tuple[int, ...]]:
    flags, count = struct.unpack_from(">II", trun)
    if not flags & 0x100:  # no durations of their own
        yield count, default_ticks
        return
    offset = 8 + (4 if flags & 0x01 else 0) + (4 if flags & 0x04 else 0)
    stride = 4 * (flags >> 8 & 0xF).bit_count()
    if offset + count * stride > len(trun):
        raise _malformed("has a fragment run longer than its box")
    for index in range(count):
        (ticks,) = struct.unpack_from(">I", trun, offset + index * stride)
        yield 1, ticks


def _add_runs(runs: list[tuple[int, int]], more: Iterator[tuple[int, ...]]) -> None:
    """Append run lengths, joining equal neighbours."""
    for count, ticks in more:
        if runs and runs[-1][1] == ticks:
            runs[-1] = (runs[-1][0] + count, ticks)
        else:
            runs.append((count, ticks))
        if len(runs) > _MAX_RUNS:
            raise _malformed("changes its frame rate too often")


def _malformed(problem: str) -> MediaError:
    return MediaError("file", "", problem, _ALLOWED)
