# SPDX-License-Identifier: Apache-2.0
"""Calibration: the runtime's own stages over the whole schedule, with engines that record what passes through.

Every clip goes the way of a request: text, sound and first frame encoded, stage 1, upsampling, stage 2, all of it
decoded. Nothing of the sampling is restated here, so the ranges are those of real requests. The clips run in lockstep:
a network too large for the memory is run a few layers at a time, and those for all clips, so that its weights are read
once a step and not once a step and clip.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial

import numpy as np
import onnx
from onnx import ModelProto

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
from .lockstep import Ask, in_lockstep
from .magnitudes import Magnitudes
from .memory import SEGMENT_BYTES, free_memory_bytes, plan_memory
from .ranges import FP16_MAX
from .recording import Device, GraphTap, ObservedEngine, SegmentTap, Tap, Taps
from .segments import weight_bytes

__all__ = ["CalibrationOptions", "CalibrationStep", "calibrate", "fp32_entry", "run_clip"]

#: Tensors within this factor of FP16's limit are kept in the file.
_LARGE = FP16_MAX / 8
#: What is kept whole on a GPU, whose memory is not looked at: the four networks that are small even at full size.
_GPU_BYTES = 8_000_000_000
#: The complete schedule: shorter ones are subsets of it.
_PRESET = "high"


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
        memory_bytes: What networks may take that are loaded whole; the others run a few layers at a time. None is the
            memory that is free; on a GPU, whose memory is not looked at, nothing but the small ones.
        segment_bytes: Weights in fp32 of a network that are in memory at a time where it does not run whole.
        device: Where networks run. On ``cuda`` this has not run yet.
    """

    width: int = 192
    height: int = 128
    frames: int = 33
    rate: Fraction = Fraction(24)
    clips: tuple[CalibrationClip, ...] = CLIPS
    seed: int = 1
    memory_bytes: int | None = None
    segment_bytes: int = SEGMENT_BYTES
    device: Device = "cpu"


@dataclass(frozen=True, slots=True)
class CalibrationStep:
    """Progress: denoising step ``index`` of ``total`` begins, of all clips.

    Attributes:
        note: With the first step, which networks run whole: a line for the user.
        calibration: With the last one, index = total.
    """

    index: int
    total: int
    note: str = ""
    calibration: Calibration | None = None


@dataclass(slots=True)
class _Recorder:
    """Counts the linear layers' inputs and every tensor's largest magnitude of one network."""

    network: str
    tap: Tap
    layers: Mapping[str, str]
    inputs: dict[str, Magnitudes] = field(default_factory=dict[str, Magnitudes])
    amax: dict[str, float] = field(default_factory=dict[str, float])

    def run(self, batches: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
        """Run the network and count what passes."""
        return self.tap.run(batches, self._see)

    def _see(self, taps: Taps) -> None:
        for name, values in taps.values.items():
            try:
                self.inputs.setdefault(name, Magnitudes()).update(values)
            except ValueError as error:
                raise ExportError(f"{self.network}: {name} is {error} in fp32; the model itself is broken") from error
        for name, largest in taps.amax.items():
            self.amax[name] = max(largest, self.amax.get(name, 0.0))

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
    recorders, note = _recorders(bundle, options)
    preset = load_preset(_PRESET)
    rounds = len(preset.stage_1_sigmas) + len(preset.stage_2_sigmas) - 2
    yield CalibrationStep(0, rounds, note)
    done = 0
    clips = [partial(_run_clip, bundle, index, options) for index in range(len(options.clips))]
    for step in in_lockstep(clips, NETWORK_NAMES, lambda network, batches: recorders[network].run(batches)):
        if step.network == "denoiser":
            yield CalibrationStep(done, rounds)
            done += 1
    networks = {name: recorder.ranges() for name, recorder in recorders.items()}
    calibration = Calibration(made_from=_origin(bundle, options), networks=networks)
    yield CalibrationStep(rounds, rounds, calibration=calibration)


def _run_clip(bundle: Bundle, index: int, options: CalibrationOptions, ask: Ask) -> None:
    """One of the clips, by engines that ask for every run."""
    engines: dict[str, ObservedEngine] = {}
    for name in NETWORK_NAMES:
        entry = fp32_entry(bundle, name)
        inputs, outputs = (tuple(tensor.spec() for tensor in ports) for ports in (entry.inputs, entry.outputs))
        engines[name] = ObservedEngine(name, inputs, outputs, partial(ask, name))
    run_clip(bundle, Engines(**engines), options.clips[index], options, options.seed + index)


def _origin(bundle: Bundle, options: CalibrationOptions) -> Origin:
    model, preset = bundle.manifest.model, load_preset(_PRESET)
    size = f"{options.width}x{options.height}, {options.frames} frames"
    return Origin(
        model=model.name,
        checkpoint_sha256=model.checkpoint_sha256,
        semantics=model.semantics,
        stage_1_sigmas=preset.stage_1_sigmas,
        stage_2_sigmas=preset.stage_2_sigmas,
        clips=tuple(f"{size}, {clip.describe()}" for clip in options.clips),
        loras=model.loras,
    )


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
            latent = np.asarray(upsample(engines.upsampler, latent, canvas.halved().to_latent()))
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
            latent = np.asarray(step.latent)
    assert latent is not None  # both stages ran
    grid = to_grid(latent, canvas.to_latent())
    decoder = VideoDecoder(engines.video_decoder, model.stream, preset.decode_chunk_latents)
    chunks = [chunk.frames for chunk in decoder.chunks(grid, canvas.frames, options.rate)]
    return grid, np.concatenate(chunks)


def _recorders(bundle: Bundle, options: CalibrationOptions) -> tuple[dict[str, _Recorder], str]:
    """A recorder for each network, and a line that says which of them run whole."""
    graphs = {
        name: onnx.load(bundle.file(fp32_entry(bundle, name).file), load_external_data=False) for name in NETWORK_NAMES
    }
    free = options.memory_bytes
    if free is None:
        free = free_memory_bytes() if options.device == "cpu" else _GPU_BYTES
    plan = plan_memory({name: weight_bytes(model.graph) for name, model in graphs.items()}, free)
    recorders = {
        name: _recorder(bundle, name, model, options, whole=name in plan.whole) for name, model in graphs.items()
    }
    return recorders, str(plan)


def _recorder(bundle: Bundle, name: str, model: ModelProto, options: CalibrationOptions, *, whole: bool) -> _Recorder:
    folder = bundle.file(fp32_entry(bundle, name).file).parent
    layers = {linear.key: linear.activation for linear in linears(model.graph)}
    watched = sorted(set(layers.values()))
    tap = (
        GraphTap(model, folder, watched, device=options.device)
        if whole
        else SegmentTap(model, folder, watched, options.segment_bytes, device=options.device)
    )
    return _Recorder(name, tap, layers)


def fp32_entry(bundle: Bundle, name: str) -> NetworkEntry:
    """The bundle's fp32 graph of a network.

    Raises:
        ExportError: It has none.
    """
    for entry in bundle.manifest.networks.values():
        if entry.network == name and entry.precision == "fp32":
            return entry
    raise ExportError(f"{bundle.path}: {name} is not there in fp32, which this needs: export with --precision fp32")
