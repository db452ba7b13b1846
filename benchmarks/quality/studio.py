# SPDX-License-Identifier: Apache-2.0
"""Clips to measure: made by the runtime from a bundle, or drawn as they should be."""

import io
import tempfile
import wave
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ltxrt.bundle import Bundle
from ltxrt.engine import Array, Engine
from ltxrt.engine_store import Engines, EngineStore
from ltxrt.mux import FragmentMuxer, MuxOptions
from ltxrt.pipeline import Pipeline
from ltxrt.preset import load_preset
from ltxrt.request import Request
from ltxrt.shapes import chunk_lengths, frame_rate, samples_for_frames
from ltxrt_export.quantize.recording import ObservedEngine
from ltxrt_export.tiny.measure import Pictures, energy_envelope, mouth_opening, rgb_pictures
from ltxrt_export.tiny.mouth import SAMPLE_RATE, Floats, frame_times, mouth_track
from ltxrt_export.tiny.world import Scene, render
from ltxrt_kernels.rgb_to_yuv420.reference import rgb_to_yuv420

__all__ = ["Camera", "Clip", "DrawnStudio", "Shot", "Studio", "file_frames"]

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """What a clip is made from.

    Attributes:
        prompt: Text.
        names: The colours that it names, by part.
        sound: Mono at 16 kHz, cut or padded to the clip's end.
        seed: Of the noise.
        preset: Quality preset.
        frames: Length.
        frames_per_second: Frame rate.
        size: Width and height.
        scene: Who the first frame shows; None is no first frame.
        strength: Of the first frame.
    """

    prompt: str
    names: Mapping[str, str]
    sound: Floats
    seed: int
    preset: str = "high"
    frames: int = 73
    frames_per_second: float = 24.0
    size: tuple[int, int] = (128, 128)
    scene: Scene | None = None
    strength: float = 1.0

    def heard(self) -> Floats:
        """The sound, as long as the clip."""
        count = samples_for_frames(self.frames, frame_rate(self.frames_per_second), SAMPLE_RATE)
        return np.pad(self.sound[:count], (0, max(0, count - len(self.sound))))

    def energy(self) -> Floats:
        """What the mouth should do, [frames] in [0, 1]."""
        return energy_envelope(self.heard(), self.frames, self.frames_per_second)

    def drawn(self, scene: Scene, frames: int) -> Pictures:
        """The first frames as they should be with that face, [frames, H, W, 3]."""
        times = frame_times(frames, self.frames_per_second)
        width, height = self.size
        return render(scene, mouth_track(self.heard(), times), times, height, width)


@dataclass(frozen=True, slots=True)
class Clip:
    """A finished clip.

    Attributes:
        shot: What it was made from.
        frames: As they left the decoder, [n, 3/2 H, W] uint8, planar YUV 4:2:0.
        borders: Index of the first frame of every decoder chunk but the first.
        mp4: The file that a caller gets.
    """

    shot: Shot
    frames: Bytes
    borders: tuple[int, ...]
    mp4: bytes

    def pictures(self) -> Pictures:
        """The frames as pictures, [n, H, W, 3]."""
        return rgb_pictures(self.frames)

    def mouth(self) -> Floats:
        """Measured opening of the mouth, [n]."""
        return mouth_opening(self.pictures())

    def played(self) -> "Clip":
        """The same clip with the frames that its file decodes to."""
        return replace(self, frames=file_frames(io.BytesIO(self.mp4)))


def file_frames(source: Path | io.BytesIO) -> Bytes:
    """What a video file decodes to, [n, 3/2 H, W] uint8, planar YUV 4:2:0."""
    with av.open(source, "r") as container:
        frames = [frame.to_ndarray(format="yuv420p") for frame in container.decode(video=0)]
    return np.stack(frames, dtype=np.uint8)


class Camera(Protocol):
    """Makes clips."""

    def film(self, shot: Shot) -> Clip:
        """The clip of a shot."""
        ...


class Studio:
    """Makes clips by the runtime, from files as a caller gives them; sessions are loaded once.

    Args:
        bundle: Folder of the bundle; None is the one that ships.
        threads: CPU threads within one operator; 0 uses every core.
    """

    def __init__(self, bundle: Path | None, threads: int = 0) -> None:
        pipeline = Pipeline.open(bundle, threads=threads)
        self._store = _WatchedStore(pipeline.bundle, threads=threads)
        self._pipeline = replace(pipeline, store=self._store)

    @property
    def bundle(self) -> Bundle:
        """The bundle."""
        return self._pipeline.bundle

    def film(self, shot: Shot) -> Clip:
        """See ``Camera.film``."""
        self._store.chunks.clear()
        with tempfile.TemporaryDirectory() as folder:
            mp4 = b"".join(self._pipeline.generate(_request(shot, Path(folder))))
        chunks = self._store.chunks
        starts = np.cumsum([len(chunk) for chunk in chunks])
        frames = np.concatenate(chunks)[: shot.frames]
        return Clip(shot, frames, tuple(int(start) for start in starts if start < shot.frames), mp4)


class DrawnStudio:
    """Draws clips as a model should make them: what measuring, chroma and H.264 leave of the best figures."""

    def film(self, shot: Shot) -> Clip:
        """See ``Camera.film``."""
        scene = shot.scene or Scene.draw(np.random.default_rng(shot.seed), dict(shot.names))
        frames = rgb_to_yuv420(shot.drawn(scene, shot.frames).transpose(0, 3, 1, 2) / 127.5 - 1)
        preset = load_preset(shot.preset)
        options = MuxOptions(
            width=shot.size[0],
            height=shot.size[1],
            frame_rate=frame_rate(shot.frames_per_second),
            crf=preset.crf,
            x264_preset=preset.x264_preset,
            audio_bitrate=preset.audio_bitrate,
            tags={},
        )
        with FragmentMuxer(options, None) as muxer:
            mp4 = muxer.write(frames) + muxer.finish()
        lengths = chunk_lengths(-(-shot.frames // 8), 8, preset.decode_chunk_latents)
        return Clip(shot, frames, tuple(8 * int(start) for start in np.cumsum(lengths)[:-1]), mp4)


class _WatchedStore(EngineStore):
    """An engine store that keeps what the video decoder gives."""

    def __init__(self, bundle: Bundle, *, threads: int) -> None:
        super().__init__(bundle, threads=threads)
        self.chunks: list[Bytes] = []

    def engines(self, preset: str) -> Engines:
        found = super().engines(preset)
        return replace(found, video_decoder=self._watched(found.video_decoder))

    def _watched(self, decoder: Engine) -> ObservedEngine:
        def observe(feeds: Mapping[str, Array]) -> dict[str, Array]:
            outputs = decoder.run(feeds)
            self.chunks.append(np.asarray(outputs["frames"], np.uint8))
            return outputs

        return ObservedEngine(decoder.name, decoder.inputs, decoder.outputs, observe)


def _request(shot: Shot, folder: Path) -> Request:
    """The request of a shot, its media written as files."""
    sound, picture = folder / "sound.wav", folder / "first.png"
    with wave.open(str(sound), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes(np.rint(np.clip(shot.heard(), -1, 1) * 32767).astype("<i2").tobytes())
    if shot.scene is not None:
        Image.fromarray(shot.drawn(shot.scene, 1)[0]).save(picture)
    return Request(
        prompt=shot.prompt,
        input_audio=sound,
        input_image=None if shot.scene is None else picture,
        image_strength=shot.strength,
        match_audio_length=False,
        num_frames=shot.frames,
        resolution=f"{shot.size[0]}x{shot.size[1]}",
        frames_per_second=shot.frames_per_second,
        video_quality=shot.preset,
        seed=shot.seed,
    )
