# SPDX-License-Identifier: Apache-2.0
"""The box walker on files put together box by box, whole and hostile."""

import struct
import time
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ltxrt.errors import MediaError
from ltxrt.mp4_boxes import BoxSpan, MovieBoxes, read_boxes, top_level_boxes


def box(kind: str, *payload: bytes) -> bytes:
    body = b"".join(payload)
    return struct.pack(">I4s", 8 + len(body), kind.encode("latin-1")) + body


def full(kind: str, *payload: bytes, version: int = 0, flags: int = 0) -> bytes:
    return box(kind, struct.pack(">I", version << 24 | flags), *payload)


def table(layout: str, *rows: tuple[int, ...]) -> bytes:
    return struct.pack(">I", len(rows)) + b"".join(struct.pack(layout, *row) for row in rows)


def times(kind: str, timescale: int, duration: int, version: int = 0) -> bytes:
    """``mvhd`` or ``mdhd``."""
    layout = ">QQIQ" if version else ">IIII"
    return full(kind, struct.pack(layout, 0, 0, timescale, duration), bytes(80), version=version)


def track(
    number: int,
    handler: str,
    *rows: tuple[int, int],
    edits: bytes = b"",
    version: int = 0,
    entry: bytes = b"",
    timescale: int = 12_800,
) -> bytes:
    identity = struct.pack(">QQI" if version else ">III", 0, 0, number)
    tables = box(
        "stbl", full("stsd", struct.pack(">I", 1), entry or box("avc1", bytes(78))), full("stts", table(">II", *rows))
    )
    return box(
        "trak",
        full("tkhd", identity, bytes(60), version=version),
        *([box("edts", edits)] if edits else []),
        box(
            "mdia",
            times("mdhd", timescale, sum(count * ticks for count, ticks in rows), version),
            full("hdlr", bytes(4), handler.encode(), bytes(12)),
            box("minf", tables),
        ),
    )


def movie(*tracks: bytes, version: int = 0) -> bytes:
    return box("moov", times("mvhd", 1000, 2000, version), *tracks)


FTYP = box("ftyp", b"isom", bytes(4))


@pytest.fixture
def read(tmp_path: Path):
    def parse(*parts: bytes) -> MovieBoxes:
        (tmp_path / "file.mp4").write_bytes(b"".join(parts))
        return read_boxes(tmp_path / "file.mp4")

    return parse


@pytest.mark.parametrize("version", [0, 1])
def test_a_track_is_read_in_both_versions(read, version: int) -> None:
    edits = full(
        "elst",
        table(">QqI" if version else ">IiI", (0, -1, 1 << 16), (2000, 1024, 1 << 16)),
        version=version,
    )
    found = read(FTYP, movie(track(7, "vide", (49, 512), (1, 256), edits=edits, version=version), version=version))
    video = found.track("vide")
    assert video is not None
    assert (video.track_id, video.handler, video.timescale) == (7, "vide", 12_800)
    assert video.sample_runs == [(49, 512), (1, 256)]
    assert (video.sample_count, video.media_duration) == (50, 49 * 512 + 256)
    assert video.declared_duration == video.media_duration
    assert video.edits == ((0, -1), (2000, 1024))
    assert (found.timescale, found.declared_duration) == (1000, 2000)
    assert found.track("soun") is None


def test_the_order_of_index_and_media_decides_faststart(read) -> None:
    header, media = movie(track(1, "vide", (1, 512))), box("mdat", bytes(100))
    assert read(FTYP, header, media).is_faststart
    assert not read(FTYP, media, header).is_faststart
    assert not read(FTYP, header).is_faststart
    assert read(FTYP, media, header).order == ("ftyp", "mdat", "moov")


def test_a_file_that_ends_inside_a_box_is_not_complete(read) -> None:
    whole = FTYP + movie(track(1, "vide", (1, 512))) + box("mdat", bytes(100))
    assert read(whole).complete
    assert not read(whole[:-1]).complete
    assert not read(whole, b"\0\0\0").complete


def test_long_and_open_ended_boxes(read) -> None:
    header = movie(track(1, "vide", (1, 512)))
    long = struct.pack(">I4sQ", 1, b"mdat", 116) + bytes(100)
    endless = struct.pack(">I4s", 0, b"mdat") + bytes(100)
    assert read(FTYP, long, header).order == ("ftyp", "mdat", "moov")
    found = read(FTYP, header, endless)
    assert found.order == ("ftyp", "moov", "mdat")
    assert found.complete


@pytest.mark.parametrize(("flags", "full_range"), [(0x80, True), (0, False)])
def test_colour_is_read_from_the_sample_entry(read, flags: int, full_range: bool) -> None:
    colr = box("colr", b"nclx", struct.pack(">HHHB", 1, 2, 9, flags))
    found = read(FTYP, movie(track(1, "vide", (1, 512), entry=box("avc1", bytes(78), box("avcC"), colr))))
    assert found.tracks[0].colour == (1, 2, 9, full_range)
    icc = box("avc1", bytes(78), box("colr", b"prof", bytes(8)))
    assert read(FTYP, movie(track(1, "vide", (1, 512), entry=icc))).tracks[0].colour is None


def fragment(number: int, start: int, *runs: bytes, default: int | None = None, version: int = 1) -> bytes:
    flags, fields = 0x20000, struct.pack(">I", number)
    if default is not None:  # with a base offset and a description index before it
        flags, fields = flags | 0x0B, fields + struct.pack(">QII", 0, 1, default)
    tfdt = full("tfdt", struct.pack(">Q" if version else ">I", start), version=version)
    return box("moof", full("mfhd", bytes(4)), box("traf", full("tfhd", fields, flags=flags), tfdt, *runs))


def test_fragments_add_their_samples(read) -> None:
    mvex = box("mvex", full("trex", struct.pack(">IIIII", 3, 1, 512, 0, 0)))
    header = box("moov", times("mvhd", 1000, 0), track(3, "vide"), mvex)
    by_header = full("trun", struct.pack(">I", 4))
    by_sample = full("trun", struct.pack(">IIIIII", 2, 0, 500, 9, 524, 9), flags=0x301)
    media = box("mdat", bytes(9))
    found = read(
        FTYP,
        header,
        *(fragment(3, 0, by_header, version=0), media),
        *(fragment(3, 4 * 512, by_header, default=256), media),
        *(fragment(3, 4 * 768, by_sample), media),
    )
    (video,) = found.tracks
    assert video.sample_runs == [(4, 512), (4, 256), (1, 500), (1, 524)]
    assert video.contiguous
    assert found.is_fragmented
    assert not found.is_faststart
    assert not read(FTYP, header, fragment(3, 1, by_header), media).tracks[0].contiguous


def test_equal_neighbours_share_a_run(read) -> None:
    assert read(FTYP, movie(track(1, "vide", (2, 512), (3, 512)))).tracks[0].sample_runs == [(5, 512)]


def test_ffmpeg_writes_what_we_read(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w", options={"movie_timescale": "48000"}) as writer:
        audio = writer.add_stream("aac", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 5000), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 48_000, 0
        writer.mux([*audio.encode(frame), *audio.encode(None)])
    found = read_boxes(path).track("soun")
    assert found is not None
    assert found.timescale == 48_000
    assert found.edits == ((5000, 1024),)
    assert found.media_duration == 5000 + 1024
    assert found.sample_count == 6


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "is not an MP4 file"),
        (FTYP + struct.pack(">I4s", 7, b"moov"), "shorter than its own header"),
        (FTYP + struct.pack(">I4sQ", 1, b"mdat", 8), "shorter than its own header"),
        (FTYP, "has no movie header"),
        (FTYP + movie()[:-4], "has no movie header"),
        (FTYP + box("moov", b""), "lacks the box mvhd"),
        (FTYP + movie(box("trak")), "lacks the box tkhd"),
        (FTYP + box("moov", box("mvhd")), "damaged MP4 header"),
        (FTYP + box("moov", full("mvhd")), "damaged MP4 header"),
        (FTYP + movie(track(1, "vide", timescale=0)), "time scale 0"),
        (FTYP + movie(track(1, "vide")) + fragment(2, 0), "a fragment of track 2, which does not exist"),
        (
            FTYP + movie(track(1, "vide")) + fragment(1, 0, full("trun", b"\xff\xff\xff\xff", flags=0x100)),
            "run longer than its box",
        ),
    ],
)
def test_malformed_files_are_refused_in_one_line(tmp_path: Path, data: bytes, problem: str) -> None:
    (tmp_path / "file.mp4").write_bytes(data)
    with pytest.raises(MediaError, match=problem) as refused:
        read_boxes(tmp_path / "file.mp4")
    assert refused.value.field == "file"
    assert "file.mp4" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_counts_beyond_their_box_cost_nothing(read) -> None:
    lying = full("stts", struct.pack(">III", 0xFFFFFFFF, 2, 512))
    honest = full("stts", table(">II", (2, 512)))
    header = movie(track(1, "vide", (2, 512)))
    assert read(FTYP, header.replace(honest, lying)).tracks[0].sample_runs == [(2, 512)]
    huge = fragment(1, 0, full("trun", b"\xff\xff\xff\xff"), default=512)
    assert read(FTYP, movie(track(1, "vide")), huge).tracks[0].sample_count == 0xFFFFFFFF


def test_boxes_within_boxes_without_end_are_not_followed(read) -> None:
    nested = b""
    for _ in range(20_000):
        nested = struct.pack(">I4s", 8 + len(nested), b"trak") + nested
        if len(nested) > 160_000:
            break
    start = time.perf_counter()
    with pytest.raises(MediaError, match="lacks the box tkhd"):
        read(FTYP, movie(nested))
    assert time.perf_counter() - start < 1


def test_boxes_side_by_side_are_listed() -> None:
    data = box("moof", bytes(4)) + box("mdat")
    assert list(top_level_boxes(data)) == [BoxSpan("moof", 0, 12, 8), BoxSpan("mdat", 12, 8, 8)]
    assert list(top_level_boxes(data + b"\0\0")) == list(top_level_boxes(data))


_WHOLE = (
    FTYP
    + movie(
        track(1, "vide", (2, 512), edits=full("elst", table(">IiI", (1, 0, 1)))),
        box("mvex", full("trex", bytes(20))),
    )
    + fragment(1, 1024, full("trun", struct.pack(">II", 1, 512), flags=0x100), default=512)
)


@settings(max_examples=300, deadline=None)
@given(where=st.integers(0, len(_WHOLE) - 1), damage=st.binary(min_size=1, max_size=8))
def test_damage_ends_in_a_result_or_a_media_error(
    tmp_path_factory: pytest.TempPathFactory, where: int, damage: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.mp4"
    path.write_bytes(_WHOLE[:where] + damage + _WHOLE[where + len(damage) :])
    with suppress(MediaError):
        assert all(track.timescale for track in read_boxes(path).tracks)
