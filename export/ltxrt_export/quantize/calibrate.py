# SPDX-License-Identifier: Apache-2.0
"""Calibration: the runtime's own stages over the whole schedule, with engines that record what passes through.

Every clip goes the way of a request: text, sound and first frame encoded, stage 1, upsampling, stage 2, a first chunk
decoded. Nothing of the sampling is restated here, so the ranges are those of real requests.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx

from ltxrt.bundle import Bundle
from ltxrt.decode import VideoDecoder
from ltxrt.denoise import DenoiseStage
from ltxrt.encoders import Conditioning, encode_audio, encode_image, encode_text
from ltxrt.engine import Array
from ltxrt.engine_store import Engines
from ltxrt.errors import ExportError
from ltxrt.latent import to_grid
from ltxrt.manifest import NETWORK_NAMES, NetworkEntry
from ltxrt.preset import load_preset
from ltxrt.shapes import PixelShape
from ltxrt.tokenizer import PromptTokenizer
from ltxrt.upsample import upsample

from .calibration import PERCENTILE, Calibration, LayerRange, NetworkRanges, Origin, rounded
from .clips import CLIPS, IMAGES, SOUNDS, CalibrationClip
from .graph import linears
from .magnitudes import Magnitudes
from .ranges import FP16_MAX
from .recording import GraphTap, ObservedEngine, Tap

__all__ = ["CalibrationOptions", "CalibrationStep", "TapFactory", "calibrate", "fp32_entry", "run_clip"]

#: Tensors within this factor of FP16's limit are kept in the file.
_LARGE = FP16_MAX / 8
#: The complete schedule: shorter ones are subsets of it.
_PRESET = "high"

#: Makes the tap of a network from its graph's path and the tensors to watch.
TapFactory = Callable[[Path, Sequence[str]], Tap]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """What a calibration runs.

    Attributes:
        width: Canvas of a landscape clip, a multiple of 64; a portrait clip has the sides exchanged.
        height: The other side.
        frames: Frames a clip, 8k + 1.
        rate: Frames a second.
        clips: The clips.
        seed: Seed of the first clip's noise; the next clips count up.
        tap: How networks are run; None is ONNX Runtime on the CPU, a whole graph at a time.
    """

    width: int = 192
    height: int = 128
    frames: int = 33
    rate: Fraction = Fraction(24)
    clips: tuple[CalibrationClip, ...] = CLIPS
    seed: int = 1
    tap: TapFactory | None = None


@dataclass(frozen=True, slots=True)
class CalibrationStep:
    """Progress: clip ``index`` of ``total`` begins; ``calibration`` comes with the last step, index = total."""

    index: int
    total: int
    description: str
    calibration: Calibration | None = None


@dataclass(slots=True)
class _Recorder:
    """Counts the linear layers' inputs and every tensor's largest magnitude of one network."""

    network: str
    tap: Tap
    layers: Mapping[str, str]
    inputs: dict[str, Magnitudes] = field(default_factory=dict[str, Magnitudes])
    amax: dict[str, float] = field(default_factory=dict[str, float])

    def observe(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        outputs, taps = self.tap.run(feeds)
        for name, values in taps.values.items():
            try:
                self.inputs.setdefault(name, Magnitudes()).update(values)
            except ValueError as error:
                raise ExportError(f"{self.network}: {name} is {error} in fp32; the model itself is broken") from error
        for name, largest in taps.amax.items():
            self.amax[name] = max(largest, self.amax.get(name, 0.0))
        return outputs

    def ranges(self) -> NetworkRanges:
        layers = {
            key: LayerRange(amax=rounded(counted.amax), percentile=rounded(counted.percentile(PERCENTILE)))
            for key, name in sorted(self.layers.items())
            if (counted := self.inputs.get(name)) is not None
        }
        large = {name: rounded(value) for name, value in sorted(self.amax.items()) if value > _LARGE}
        return NetworkRanges(layers=layers, large=large)


def calibrate(bundle: Bundle, options: CalibrationOptions | None = None) -> Iterator[CalibrationStep]:
    """Run the clips through a bundle of fp32 networks; the last step carries the calibration.

    A generator: nothing runs until it is consumed.

    Raises:
        ExportError: A network of the bundle is not fp32, or gives infinities.
        EngineError: A network does not load or run.
    """
    options = options or CalibrationOptions()
    recorders = {name: _recorder(bundle, name, options.tap or _graph_tap) for name in NETWORK_NAMES}
    engines = Engines(**{name: _engine(bundle, recorder) for name, recorder in recorders.items()})
    for index, clip in enumerate(options.clips):
        yield CalibrationStep(index, len(options.clips), clip.describe())
        run_clip(bundle, engines, clip, options, options.seed + index)
    preset = load_preset(_PRESET)
    model = bundle.manifest.model
    size = f"{options.width}x{options.height}, {options.frames} frames"
    origin = Origin(
        model=model.name,
        checkpoint_sha256=model.checkpoint_sha256,
        semantics=model.semantics,
        stage_1_sigmas=preset.stage_1_sigmas,
        stage_2_sigmas=preset.stage_2_sigmas,
        clips=tuple(f"{size}, {clip.describe()}" for clip in options.clips),
    )
    networks = {name: recorder.ranges() for name, recorder in recorders.items()}
    calibration = Calibration(made_from=origin, networks=networks)
    yield CalibrationStep(len(options.clips), len(options.clips), "done", calibration)


def run_clip(
    bundle: Bundle, engines: Engines, clip: CalibrationClip, options: CalibrationOptions, seed: int
) -> tuple[Array, Array]:
    """One clip by the runtime's stages: the final latent [1, C, f, h, w] and its frames [n, 3/2 h, w] uint8."""
    model, preset = bundle.manifest.model, load_preset(_PRESET)
    sides = (options.width, options.height) if clip.portrait else (options.height, options.width)
    canvas = PixelShape(options.frames, *sides)
    tokenizer = PromptTokenizer.open(bundle.file("tokenizer.json"), model.context_tokens)
    image = None if clip.image is None else IMAGES[clip.image]()
    conditioning = Conditioning(
        text=encode_text(engines.text_encoder, tokenizer.encode(clip.prompt)),
        audio_tokens=encode_audio(engines.audio_encoder, SOUNDS[clip.sound](), canvas.frames, options.rate),
        first_frames=None if image is None else encode_image(engines.image_encoder, image, canvas, model.image_crf),
        image_strength=clip.strength,
    )
    latent: Array | None = None
    for number, size, sigmas in (
        (1, canvas.halved(), preset.stage_1_sigmas),
        (2, canvas, preset.stage_2_sigmas),
    ):
        if latent is not None:
            latent = upsample(engines.upsampler, latent, canvas.halved().to_latent())
        stage = DenoiseStage(
            number=number,
            engine=engines.denoiser,
            rope=bundle.rope,
            shape=size.to_latent(),
            channels=model.latent_channels,
            rate=options.rate,
            sigmas=sigmas,
        )
        for step in stage.run(conditioning, latent, seed):
            latent = step.latent
    assert latent is not None  # both stages ran
    grid = to_grid(latent, canvas.to_latent())
    decoder = VideoDecoder(engines.video_decoder, model.stream, preset.decode_chunk_latents)
    chunks = [chunk.frames for chunk in decoder.chunks(grid, canvas.frames, options.rate)]
    return grid, np.concatenate(chunks)


def _recorder(bundle: Bundle, name: str, tap: TapFactory) -> _Recorder:
    entry = fp32_entry(bundle, name)
    path = bundle.file(entry.file)
    layers = {linear.key: linear.activation for linear in linears(onnx.load(path, load_external_data=False).graph)}
    return _Recorder(name, tap(path, sorted(set(layers.values()))), layers)


def _engine(bundle: Bundle, recorder: _Recorder) -> ObservedEngine:
    entry = fp32_entry(bundle, recorder.network)
    inputs, outputs = (tuple(tensor.spec() for tensor in ports) for ports in (entry.inputs, entry.outputs))
    return ObservedEngine(recorder.network, inputs, outputs, recorder.observe)


def fp32_entry(bundle: Bundle, name: str) -> NetworkEntry:
    """The bundle's fp32 graph of a network.

    Raises:
        ExportError: It has none.
    """
    for entry in bundle.manifest.networks.values():
        if entry.network == name and entry.precision == "fp32":
            return entry
    raise ExportError(f"{bundle.path}: {name} is not there in fp32, which this needs: export with --precision fp32")


def _graph_tap(path: Path, watched: Sequence[str]) -> Tap:
    return GraphTap(path, watched)
