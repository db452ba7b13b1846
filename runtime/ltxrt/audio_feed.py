# SPDX-License-Identifier: Apache-2.0
"""The AAC encoder: a whole sound in, its packets out as far as the pictures have come, encoded ahead if asked to."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.packet import Packet

from .media import OUTPUT_RATES, AudioTrack
from .readback import AAC_FRAME_SAMPLES

__all__ = ["AudioFeed"]


class AudioFeed:
    """The AAC encoder of one clip and how far it has come. Not safe to share between threads.

    Args:
        container: Gets the stream; it owns the encoder.
        audio: The whole sound, at a rate that is muxed.
        bitrate: Bits per second, capped at what the format can hold.

    Raises:
        ValueError: Audio of a rate or length that is not muxed.

    Attributes:
        stream: Of the container.
    """

    def __init__(self, container: OutputContainer, audio: AudioTrack, bitrate: int) -> None:
        channels, count = audio.samples.shape
        if audio.sample_rate not in OUTPUT_RATES or not count:
            raise ValueError(f"audio of {count} samples at {audio.sample_rate} Hz: allowed rates are {OUTPUT_RATES}")
        self._samples = audio.samples
        self._rate = audio.sample_rate
        self._layout = "mono" if channels == 1 else "stereo"
        self._fed = 0  # samples that the encoder has taken
        self._end = 0  # end of the last packet handed out, in samples
        self._priming = 0
        self._flushed = False
        self._stopped = False
        self._ready: deque[Packet] = deque()
        self._ahead: Future[None] | None = None
        # Half the time of the default search, and nearer to the sound: 48 against 40 dB at 192 kbit/s mono, 35 against
        # 23 dB at 96 kbit/s stereo (signal to error, the bundled speech).
        options = {"aac_coder": "fast"}
        self.stream: AudioStream = container.add_stream("aac", rate=audio.sample_rate, options=options)
        self.stream.codec_context.layout = self._layout
        self.stream.codec_context.bit_rate = bitrate  # FFmpeg lowers what the format cannot hold

    def encode_ahead(self) -> None:
        """Begin to encode all of it in a thread; ``until`` waits for that."""
        if self._ahead is None:
            executor = ThreadPoolExecutor(1, thread_name_prefix="ltxrt-aac")
            self._ahead = executor.submit(self._encode_all)
            executor.shutdown(wait=False)

    def until(self, end_seconds: Fraction | None) -> list[Packet]:
        """The next packets, up to the first that reaches ``end_seconds``; all that are left for None.

        Raises:
            FFmpegError: The encoder failed.
        """
        if self._ahead is not None:
            self._ahead.result()
        packets: list[Packet] = []
        while end_seconds is None or self._end < end_seconds * self._rate:
            while not self._ready and not self._flushed:
                self._encode_next()
            if not self._ready:
                break
            packet = self._ready.popleft()
            self._end = (packet.pts or 0) + (packet.duration or 0)
            packets.append(packet)
        return packets

    def stop(self) -> None:
        """End encoding ahead, so that the encoder can be closed; what it met does not matter any more."""
        self._stopped = True
        if self._ahead is not None:
            self._ahead.exception()

    def to_media_time(self, packet: Packet) -> None:
        """Shift a packet by the priming, as the header's edit list expects of all fragments but the first."""
        if packet.pts is not None:
            packet.pts += self._priming
            packet.dts = packet.pts

    def _encode_all(self) -> None:
        while not (self._flushed or self._stopped):
            self._encode_next()

    def _encode_next(self) -> None:
        block = self._samples[:, self._fed : self._fed + AAC_FRAME_SAMPLES]
        frame = None
        if block.shape[1]:
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), format="fltp", layout=self._layout)
            frame.sample_rate = self._rate
            frame.pts = self._fed
            frame.time_base = Fraction(1, self._rate)
            self._fed += block.shape[1]
        self._flushed = frame is None
        for packet in self.stream.encode(frame):
            if packet.pts is not None and packet.pts < 0:  # the first one
                self._priming = -packet.pts
            self._ready.append(packet)
