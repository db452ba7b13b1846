# SPDX-License-Identifier: Apache-2.0
"""Audio in: the files that people have, decoded to exact float32 samples, then cut, padded and resampled.

The first bytes of a file decide what it is, never its name: a small table of signatures picks one FFmpeg
demuxer, and FFmpeg is held to that one. Probing is not done because it is what makes an upload dangerous (a
playlist or an SDP text that passes for media opens local files and sockets). Decoding stops at a sample cap,
whatever the header promises.

A damaged file is accepted as far as it decodes without FFmpeg reporting an error: a WAV, MP3, Ogg or WebM file
that ends early plays what it holds. Where the cut or the damage makes the demuxer or the decoder report one
(FLAC, AAC and MP4 mostly), the file is refused rather than played with a hole in it.

Sample counts are FFmpeg's: encoder delay and padding go where the file declares them (LAME header, Opus
pre-skip, Ogg end position, MP4 edit list). Beyond FFmpeg, sound in an MP4 also ends where its edit list ends,
as in a browser. Raw AAC (ADTS) and MP3 without a LAME header declare nothing and keep the padding of the codec.
The track starts at its first sample, also in a video whose sound starts late.
"""

import math
import os
import stat
from dataclasses import dataclass
from fractions import Fraction
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import av
import numpy as np
import soxr
from av.audio.codeccontext import AudioCodecContext
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.error import FFmpegError
from numpy.typing import NDArray

from .errors import MediaError

__all__ = [
    "AUDIO_ALLOWED",
    "CONDITIONING_RATE",
    "MAX_AUDIO_VALUES",
    "OUTPUT_RATES",
    "AudioTrack",
    "bundled_speech",
    "conditioning_waveform",
    "fit",
    "for_output",
    "open_media_file",
    "read_audio",
]

#: Sample rate in Hz that the audio encoder hears.
CONDITIONING_RATE = 16_000
#: Sample rates in Hz that the result keeps; every other rate becomes the last one.
OUTPUT_RATES = (44_100, 48_000)
#: Samples over all channels at which decoding stops: 30 minutes of 48 kHz stereo, 660 MiB of float32.
MAX_AUDIO_VALUES = 2 * 48_000 * 1800
AUDIO_ALLOWED = "a WAV, MP3, AAC, M4A, FLAC or Ogg file, or an MP4, MOV, MKV or WebM video with sound"

_RATES = range(4_000, 384_001)
_FADE_SECONDS = Fraction(5, 1000)
# Lossy codecs overshoot full scale by a few dB, which players clip and so do we. 24 dB over is no overshoot but
# integers stored as floats, and clipping them would give noise.
_MAX_PEAK = 16.0

_SIGNATURES = (
    (0, b"fLaC", "flac"),
    (0, b"OggS", "ogg"),
    (0, b"\x1a\x45\xdf\xa3", "matroska"),
    # The first box of an MP4; old QuickTime files may start with the data or the index instead.
    *((4, box, "mov") for box in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")),
)
_CODECS = frozenset(("aac", "ac3", "adpcm_ima_wav", "adpcm_ms", "alac", "eac3", "flac", "mp2", "mp3", "opus", "vorbis"))
# Codecs whose last frame in an MP4 is padding in part. Not MP3: FFmpeg's edit list for it ends too early.
_PADDED_CODECS = frozenset(("aac", "opus"))
_DECODE_ERRORS = (FFmpegError, OSError, ValueError)
_SILENT = "holds no sound (its audio track has no samples)"


class _Refuse(Protocol):
    """Makes the error that refuses the file at hand."""

    def __call__(self, problem: str, allowed: str = AUDIO_ALLOWED) -> MediaError: ...


@dataclass(frozen=True, slots=True, eq=False)
class AudioTrack:
    """Decoded sound.

    Attributes:
        samples: ``[channels, samples]`` float32 in [-1, 1]; 1 or 2 channels. Treat as read-only.
        sample_rate: Samples per second and channel.
    """

    samples: NDArray[np.float32]
    sample_rate: int

    def __post_init__(self) -> None:
        if self.samples.dtype != np.float32 or self.samples.ndim != 2 or self.channels not in (1, 2):
            raise ValueError(
                f"samples are {self.samples.dtype}{list(self.samples.shape)}, expected float32 [1 or 2, n]"
            )

    @property
    def channels(self) -> int:
        """1 or 2."""
        return self.samples.shape[0]

    @property
    def sample_count(self) -> int:
        """Samples per channel."""
        return self.samples.shape[1]

    @property
    def duration(self) -> Fraction:
        """Exact length in seconds."""
        return Fraction(self.sample_count, self.sample_rate)


def read_audio(
    source: str | os.PathLike[str], *, field: str = "input_audio", max_seconds: Fraction | None = None
) -> AudioTrack:
    """Decodes the (best) audio track of a file; every sample rate is kept.

    Mono stays mono. More than two channels become stereo by libswresample's matrix (centre and surrounds at
    -3 dB, no LFE), because the voice of film sound sits in the centre and the first two channels alone would
    lose it; where the sum exceeds full scale it is scaled down as a whole.

    Args:
        source: Path of the file.
        field: Request field that errors name.
        max_seconds: Longest track that is accepted.

    Raises:
        MediaError: The file is missing, empty, no audio, silent video, damaged, of zero length, too long, or
            holds samples that are no audio (NaN, infinity, levels far above full scale).
    """

    def refuse(problem: str, allowed: str = AUDIO_ALLOWED) -> MediaError:
        return MediaError(field, os.fspath(source), problem, allowed)

    with open_media_file(source, field, AUDIO_ALLOWED) as file:
        demuxer = sniff_demuxer(file)
        if demuxer is None:
            raise refuse("is not audio")
        try:
            with av.open(
                file,
                "r",
                format=demuxer,
                options={"format_whitelist": demuxer},
                # A tag in a forgotten encoding is no reason to refuse the sound.
                metadata_errors="ignore",
            ) as container:
                return _decode(container, max_seconds, refuse)
        except MediaError:
            raise
        except _DECODE_ERRORS as error:
            reason = error.strerror if isinstance(error, OSError | FFmpegError) else str(error)
            raise refuse(f"is damaged or cut off ({demuxer}: {reason})") from error


def fit(track: AudioTrack, sample_count: int) -> AudioTrack:
    """The track at exactly ``sample_count`` samples per channel.

    A longer track is cut and fades out over its last 5 ms, so that the cut does not click; a shorter one is
    padded with silence; one that fits is returned as it is.
    """
    if track.sample_count == sample_count:
        return track
    samples = _sized(track.samples, sample_count)
    if track.sample_count > sample_count:
        fade = min(sample_count, round(_FADE_SECONDS * track.sample_rate))
        samples[:, sample_count - fade :] *= np.linspace(1.0, 0.0, fade + 1, dtype=np.float32)[1:]
    return AudioTrack(samples, track.sample_rate)


def for_output(track: AudioTrack) -> AudioTrack:
    """The track at a rate that the result is written at: 44.1 and 48 kHz untouched, others at 48 kHz.

    The resampled length is ``round(samples * 48000 / rate)``, half to even.
    """
    if track.sample_rate in OUTPUT_RATES:
        return track
    rate = OUTPUT_RATES[-1]
    samples = _resampled(track, rate, "VHQ")
    # A resampler rings beyond full scale at clipped peaks.
    return AudioTrack(np.clip(samples, -1.0, 1.0, out=samples), rate)


def conditioning_waveform(track: AudioTrack, sample_count: int) -> NDArray[np.float32]:
    """What the audio encoder hears: 16 kHz stereo, mono on both channels, of an exact length.

    Args:
        track: The track, before or after ``for_output``.
        sample_count: Samples at 16 kHz; the track is cut or padded with silence to it.

    Returns:
        ``[1, 2, sample_count]`` float32, C-contiguous.
    """
    samples = track.samples
    if track.sample_rate != CONDITIONING_RATE:
        samples = _resampled(track, CONDITIONING_RATE, "HQ")
    waveform = np.zeros((1, 2, sample_count), np.float32)
    waveform[0] = _sized(samples, sample_count)
    return waveform


def bundled_speech() -> Path:
    """Path of the 4.9 s of speech that ship with ltxrt (``assets/ORIGIN.md`` says how they were made)."""
    return Path(str(resources.files("ltxrt").joinpath("assets", "speech.flac")))


def open_media_file(source: str | os.PathLike[str], field: str, allowed: str) -> BinaryIO:
    """Opens a regular, non-empty file for reading.

    Raises:
        MediaError: There is no such file, it is a folder, a device or a pipe, empty, or not readable.
    """
    name = os.fspath(source)
    try:
        # Asked before opening, because opening a pipe would wait for its writer.
        status = Path(name).stat()
        if stat.S_ISDIR(status.st_mode):
            raise MediaError(field, name, "is a folder", allowed)
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(field, name, "is not a regular file", allowed)
        if status.st_size == 0:
            raise MediaError(field, name, "is empty", allowed)
        return Path(name).open("rb")
    except FileNotFoundError as error:
        raise MediaError(field, name, "does not exist", allowed) from error
    except OSError as error:
        raise MediaError(field, name, f"cannot be read ({error.strerror})", allowed) from error
    except MediaError:
        raise
    except ValueError as error:  # a NUL inside the path
        raise MediaError(field, name, f"is not a path ({error})", allowed) from error


def sniff_demuxer(file: BinaryIO) -> str | None:
    """The FFmpeg demuxer for a file, from its first bytes, or None; leaves the file at its start.

    An ID3 tag may stand before MP3, AAC and FLAC. MPEG layer I, extinct, is left out because its sync word is
    also the byte order mark of UTF-16 text.
    """
    tagged = False
    head = file.read(16)
    while head[:3] == b"ID3" and len(head) == 16:
        tagged = True
        # Size: 28 bits in four 7-bit bytes, without header and footer (flag 0x10) of 10 bytes each.
        size = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
        file.seek(10 + size + (10 if head[5] & 0x10 else 0) - 16, os.SEEK_CUR)
        head = file.read(16)
    file.seek(0)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return "wav"
    for offset, magic, demuxer in _SIGNATURES:
        if head[offset:].startswith(magic):
            return demuxer
    if len(head) > 2 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:
        layer = head[1] & 0x06
        if layer == 0 and head[1] & 0xF0 == 0xF0:
            return "aac"
        version_reserved, rate_reserved = head[1] & 0x18 == 0x08, head[2] & 0x0C == 0x0C
        if layer in (0x02, 0x04) and not version_reserved and not rate_reserved and head[2] < 0xF0:
            return "mp3"
    # What follows an ID3 tag is MPEG audio, even where padding stands in between.
    return "mp3" if tagged else None


def _decode(container: InputContainer, max_seconds: Fraction | None, refuse: _Refuse) -> AudioTrack:
    """Decodes the best audio stream of an open container, up to the cap."""
    stream, codec = _audio_stream(container, refuse)
    frames = container.decode(stream)
    first = next(frames, None)
    if first is None:
        raise refuse(_SILENT)
    rate, channels = first.sample_rate, first.layout.nb_channels
    if rate not in _RATES:
        raise refuse(f"has a sample rate of {rate} Hz", f"{_RATES[0]} to {_RATES[-1]} Hz")
    limit = MAX_AUDIO_VALUES // min(channels, 2)
    if max_seconds is not None:
        limit = min(limit, math.floor(max_seconds * rate))
    too_long = refuse(f"is longer than {math.floor(100 * limit / rate) / 100:.2f} s", "a shorter track")

    # Without a layout the resampler only converts to float: exact for integers of up to 24 bits.
    resampler = av.AudioResampler(format="fltp", layout="stereo" if channels > 2 else None)
    pieces: list[NDArray[np.float32]] = []
    count = longest_frame = 0
    for frame in chain((first,), frames):
        if (frame.sample_rate, frame.layout.nb_channels) != (rate, channels):
            raise refuse("changes its sample rate or its channels on the way")
        pieces += (_floats(piece) for piece in resampler.resample(frame))
        count += frame.samples
        longest_frame = max(longest_frame, frame.samples)
        # Up to a frame over the limit may be padding, which goes below.
        if count > limit + longest_frame:
            raise too_long
    # The filter: a resampler that had nothing to convert answers a flush with None.
    pieces += (_floats(piece) for piece in filter(None, resampler.resample(None)))

    samples = np.concatenate(pieces, axis=1)
    end = _edit_list_end(stream, rate)
    if codec in _PADDED_CODECS and end is not None and 0 < samples.shape[1] - end < longest_frame:
        samples = samples[:, :end]
    if samples.shape[1] > limit:
        raise too_long
    if samples.shape[1] == 0:
        raise refuse(_SILENT)
    return AudioTrack(_levelled(samples, channels, refuse), rate)


def _audio_stream(container: InputContainer, refuse: _Refuse) -> tuple[AudioStream, str]:
    """The container's best audio stream and the name of its codec, which is one that we read."""
    stream = container.streams.best("audio") or next(iter(container.streams.audio), None)
    if not isinstance(stream, AudioStream):
        raise refuse("has no audio track" if len(container.streams) else "is damaged or cut off (no tracks)")
    # PyAV's stubs do not say that a codec without a decoder has no context.
    context = cast("AudioCodecContext | None", stream.codec_context)
    codec = "an unknown codec" if context is None else context.codec.canonical_name
    if codec not in _CODECS and not codec.startswith("pcm_"):
        raise refuse(f"is encoded as {codec}, which is not read")
    return stream, codec


def _edit_list_end(stream: AudioStream, rate: int) -> int | None:
    """Samples that an MP4 declares for a stream; no other container's estimate is that exact."""
    if stream.container.format.name != "mov" or stream.duration is None or stream.time_base is None:
        return None
    return round(stream.duration * stream.time_base * rate)


def _floats(frame: AudioFrame) -> NDArray[np.float32]:
    """A planar float frame as ``[channels, samples]``."""
    return np.asarray(frame.to_ndarray(), np.float32)


def _levelled(samples: NDArray[np.float32], channels: int, refuse: _Refuse) -> NDArray[np.float32]:
    """Samples within [-1, 1]: a mix of ``channels`` is scaled down where it exceeds that, the rest clipped."""
    peak = float(max(samples.max(), -samples.min()))
    if not math.isfinite(peak):
        raise refuse("holds samples that are not finite (NaN or infinity)", "float samples from -1 to 1")
    if peak > _MAX_PEAK:
        raise refuse(f"holds samples as large as {peak:g}", "float samples from -1 to 1")
    if peak <= 1.0:
        return np.ascontiguousarray(samples)
    if channels > 2:
        samples = samples / np.float32(peak)
    return np.clip(samples, -1.0, 1.0)


def _resampled(track: AudioTrack, rate: int, quality: str) -> NDArray[np.float32]:
    """``[channels, round(samples * rate / track rate)]`` at another rate; zero-phase, so events stay in place."""
    interleaved = np.ascontiguousarray(track.samples.T)
    converted = np.asarray(soxr.resample(interleaved, track.sample_rate, rate, quality), np.float32)
    # soxr's own length is that, give or take a sample.
    return _sized(converted.T, round(track.duration * rate))


def _sized(samples: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """A copy with ``count`` samples per channel, cut or padded with zeros at the end."""
    sized = np.zeros((samples.shape[0], count), np.float32)
    kept = min(count, samples.shape[1])
    sized[:, :kept] = samples[:, :kept]
    return sized
