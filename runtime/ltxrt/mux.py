# SPDX-License-Identifier: Apache-2.0
"""Frames and sound into the bytes of a fragmented MP4 (H.264, AAC) that plays while later frames still arrive.

Every ``write`` gives one whole fragment, so the first frames can play before the second chunk is decoded.
FFmpeg ends a fragment only when the next one's first packet arrives, or at the trailer, and PyAV cannot
flush in between. So each fragment is a short FFmpeg mux of its own, whose trailer closes it, and the repeated
header is dropped. The header (delayed until the first packets are known)
carries the edit list that hides the AAC encoder's 1024 priming samples, so that sound starts at exactly 0.

x264's zero-latency tuning gives every frame back at once. It also turns B-frames off, which would shift the
video's start for readers that ignore edit lists in fragments. Bytes are reproducible: neither dates nor the
machine's core count enter the file.
"""

import io
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from types import TracebackType
from typing import Self

import av
import numpy as np
from av.container import OutputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray

from .audio_feed import AudioFeed
from .errors import OutputError
from .media import AudioTrack
from .mp4_boxes import top_level_boxes
from .readback import AI_DISCLOSURE

__all__ = [
    "AI_DISCLOSURE",
    "STORED_TAGS",
    "TAG_NAMES",
    "FragmentMuxer",
    "MuxOptions",
]

#: Tags that a caller may set; ``comment`` and ``description`` are ours and carry the AI disclosure.
TAG_NAMES = ("artist", "copyright", "date", "model", "synopsis", "title")
#: Tags that an MP4 of ours can hold.
STORED_TAGS = ("artist", "comment", "copyright", "date", "description", "synopsis", "title")

# x264 cuts a frame into one slice per thread, so the count reaches the bytes: fixed, never the machine's own.
# 8 slices cost 0.8 % of the size at 1280x720 (CRF 19, veryfast); below 512 rows x264 itself takes fewer.
_VIDEO_THREADS = 8
_KEYFRAME_SECONDS = 2
_AUDIO_INDEX = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MuxOptions:
    """What a clip is encoded to.

    Attributes:
        width: Pixels, even.
        height: Pixels, even.
        frame_rate: Frames per second.
        crf: x264 constant rate factor, 1 to 51.
        x264_preset: x264 speed preset, ``ultrafast`` to ``placebo``.
        audio_bitrate: AAC bits per second, capped at what the format can hold.
        tags: MP4 tags by name, from ``TAG_NAMES``; ``model`` is named in the AI disclosure.

    Raises:
        ValueError: A value outside its range, or an unknown tag.
    """

    width: int
    height: int
    frame_rate: Fraction
    crf: int
    x264_preset: str
    audio_bitrate: int
    tags: Mapping[str, str]

    def __post_init__(self) -> None:
        if min(self.width, self.height) < 2 or self.width % 2 or self.height % 2:
            raise ValueError(f"size {self.width}x{self.height}: both sides must be even and at least 2")
        if self.frame_rate <= 0:
            raise ValueError(f"frame_rate {self.frame_rate}: must be above 0")
        if not 1 <= self.crf <= 51:
            raise ValueError(f"crf {self.crf}: must be 1 to 51")
        if self.audio_bitrate <= 0:
            raise ValueError(f"audio_bitrate {self.audio_bitrate}: must be above 0")
        if unknown := sorted(set(self.tags) - set(TAG_NAMES)):
            raise ValueError(f"tags {unknown}: allowed are {', '.join(TAG_NAMES)}")


class FragmentMuxer:
    """Encodes frames and the audio that goes with them into the bytes of a fragmented MP4.

    A context manager: leaving it releases the encoders, whatever happened. Not safe to share between threads.

    Args:
        options: What to encode to.
        audio: The whole sound, already cut to the clip's exact length, at 44.1 or 48 kHz; None for no track.

    Raises:
        ValueError: Audio of a rate or shape that is not muxed.

    Attributes:
        frames_written: Video frames encoded so far.
        seconds_encoding: Wall time spent in x264, AAC and the muxer.
    """

    def __init__(self, options: MuxOptions, audio: AudioTrack | None) -> None:
        self.frames_written = 0
        self.seconds_encoding = 0.0
        self._options = options
        self._fragments = 0
        self._closed = False
        # The first fragment's container also owns the encoders, which outlive its trailer.
        self._buffer, self._container = self._open_container()
        self._container.metadata.update(_tags(options.tags))
        self._video = _video_stream(self._container, options)
        self._audio = None if audio is None else AudioFeed(self._container, audio, options.audio_bitrate)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def encode_audio_ahead(self) -> None:
        """Begin to encode the whole sound in a thread, rather than piece by piece in ``write``.

        Optional; the first ``write`` waits for it. It takes 15 to 40 ms per second of sound on one core, and the sound
        is known before the first frame is: called before the frames are computed, it takes that time out of the way of
        the fragments.
        """
        if self._audio is not None:
            self._audio.encode_ahead()

    def write(self, frames: NDArray[np.uint8]) -> bytes:
        """Encode frames, and the audio up to their end, to one fragment.

        Args:
            frames: ``[n, height * 3 // 2, width]`` uint8, planar I420 in BT.709 limited range: the rows of Y,
                then U packed, then V packed. Encoded as they are.

        Returns:
            A whole fragment, on the first call behind the file's header; ``b""`` for no frames.

        Raises:
            ValueError: Frames of another dtype or shape, or the muxer is closed.
            OutputError: The encoder failed.
        """
        expected = (self._options.height * 3 // 2, self._options.width)
        if frames.dtype != np.uint8 or frames.ndim != 3 or frames.shape[1:] != expected:
            raise ValueError(
                f"frames are {frames.dtype}{list(frames.shape)}, expected uint8[n, {expected[0]}, {expected[1]}]"
            )
        with self._encoding():
            packets = [packet for pixels in frames for packet in self._encode(pixels)]
            if packets and self._audio is not None:
                packets += self._audio.until(self.frames_written / self._options.frame_rate)
            return self._fragment(packets)

    def finish(self) -> bytes:
        """Encode what the encoders still hold, close, and return the last fragment (``b""`` if there is none).

        Calling it again returns ``b""``.

        Raises:
            OutputError: The encoder failed.
        """
        if self._closed:
            return b""
        with self._encoding():
            last = b""
            if self.frames_written:
                packets: list[Packet] = list(self._video.encode(None))
                if self._audio is not None:
                    packets += self._audio.until(None)
                last = self._fragment(packets)
            self.close()
            return last

    def close(self) -> None:
        """Release the encoders; what was not returned yet is dropped. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        with suppress(FFmpegError):  # a mux that failed halfway may not end well either; nobody reads it
            if self._audio is not None:
                self._audio.stop()
            self._container.close()
        del self._video, self._audio, self._container, self._buffer

    def _encode(self, pixels: NDArray[np.uint8]) -> list[Packet]:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="yuv420p")
        frame.pts = self.frames_written
        frame.time_base = 1 / self._options.frame_rate
        packets = self._video.encode(frame)
        self.frames_written += 1
        return list(packets)

    def _fragment(self, packets: list[Packet]) -> bytes:
        if not packets:
            return b""
        buffer, container = self._buffer, self._container
        if self._fragments:
            buffer, container = self._open_container()
            container.add_stream_from_template(self._video)
            if self._audio is not None:
                container.add_stream_from_template(self._audio.stream)
        for packet in packets:
            if self._fragments and self._audio is not None and packet.stream_index == _AUDIO_INDEX:
                self._audio.to_media_time(packet)
            container.mux_one(packet)
        container.close()
        self._fragments += 1
        return buffer.getvalue() if self._fragments == 1 else _without_header(buffer.getbuffer())

    def _open_container(self) -> tuple[io.BytesIO, OutputContainer]:
        flags = "frag_custom+delay_moov+default_base_moof+skip_trailer"
        if self._fragments:
            flags += "+frag_discont"  # keep the time stamps, which do not start at 0
        options = {"movflags": flags, "fragment_index": str(self._fragments + 1)}
        buffer = io.BytesIO()
        return buffer, av.open(buffer, "w", format="mp4", options=options)

    @contextmanager
    def _encoding(self) -> Generator[None]:
        """Times the block and gives FFmpeg's errors our name."""
        if self._closed:
            raise ValueError("the muxer is closed")
        start = time.perf_counter()
        try:
            yield
        except FFmpegError as error:
            raise OutputError(f"encoding failed after {self.frames_written} frames: {error.strerror}") from error
        finally:
            self.seconds_encoding += time.perf_counter() - start


def _video_stream(container: OutputContainer, options: MuxOptions) -> VideoStream:
    keyframe_interval = max(1, round(_KEYFRAME_SECONDS * options.frame_rate))
    stream = container.add_stream(
        "libx264",
        rate=options.frame_rate,
        options={
            "preset": options.x264_preset,
            "crf": str(options.crf),
            "tune": "zerolatency",
            "profile": "high",
            "g": str(keyframe_interval),
            # Chroma is averaged over 2x2 luma samples, so it sits in their centre, not on H.264's default left.
            "x264-params": "chromaloc=1",
        },
    )
    codec = stream.codec_context
    codec.width, codec.height, codec.pix_fmt = options.width, options.height, "yuv420p"
    codec.time_base = 1 / options.frame_rate
    codec.thread_count = _VIDEO_THREADS
    # BT.709 in limited range (ISO/IEC 23091-2); FFmpeg copies it into the stream and the container's colr box.
    codec.color_range = codec.color_primaries = codec.color_trc = codec.colorspace = 1
    return stream


def _tags(tags: Mapping[str, str]) -> dict[str, str]:
    shown = {name: value for name, value in tags.items() if name != "model"}
    model = f" Model: {tags['model']}." if "model" in tags else ""
    return {**shown, "comment": AI_DISCLOSURE, "description": AI_DISCLOSURE + model}


def _without_header(data: memoryview) -> bytes:
    return b"".join(data[span.start : span.end] for span in top_level_boxes(data) if span.kind in ("moof", "mdat"))
