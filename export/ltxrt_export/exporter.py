# SPDX-License-Identifier: Apache-2.0
"""Checkpoint to bundle: every network traced, checked against its torch class, and written with its manifest.

Each network is traced once, in fp32. The precisions that the presets ask for are made from that graph.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensorMode

from ltxrt.bundle import Bundle
from ltxrt.manifest import NETWORK_NAMES, LoraEntry, ModelEntry, StateEntry, StreamEntry
from ltxrt.preset import PRESET_NAMES, load_preset

from .bundle_writer import BundleWriter
from .changed_weights import ChangedWeights
from .denoiser_graph import export_denoiser
from .disk import gigabytes
from .networks import audio_encoder, denoiser, image_encoder, text_encoder, upsampler, video_decoder
from .networks.denoiser import Semantics
from .networks.spec import NetworkSpec
from .networks.video_decoder import VideoDecoder
from .networks.video_decoder_framewise import FramewiseVideoDecoder
from .onnx_export import export_model
from .parity import ParityRow, check_network
from .preset_networks import Backend, PresetNetworks, preset_fp8_bytes, record_trials
from .quantize.calibrate import CalibrationOptions, calibrate
from .quantize.calibration import Calibration
from .sources import Sources

__all__ = [
    "ExportOptions",
    "ExportStep",
    "Sources",
    "calibrate_model",
    "calibration_stages",
    "export_bundle",
    "stages",
]

#: What networks are traced in.
_TRACED = "fp32"
#: The preset whose networks calibrate; in fp32 all presets have the same.
_PRESET = "high"
_PROGRESS_BYTES = 1024**3
#: CRF of the first frame's re-compression for models before 2.4 (ltx_pipelines/utils/constants.py).
_IMAGE_CRF = 33
_TOOLS = ("diffusers", "onnx", "onnx-ir", "onnxscript", "torch", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What may be chosen.

    Attributes:
        semantics: Modulation rules.
        auto_pixels: Upper bound of the pixel budget of ``resolution: auto``; None leaves it to the presets.
        licence: Terms of the weights, in one line.
        check: Run every graph before it is kept: in fp32 against its torch class, in a lower precision against fp32.
        overwrite: Replace a bundle that is there.
        precisions: ``fp32`` alone, or what each preset asks for.
        backend: What the networks will run on: how the decoder is traced, and which types the presets may take.
        calibration: Ranges for the networks of the presets; None makes one on the way.
        other_loras: Take a calibration that was made with other LoRAs, or with none.
        calibrating: How one is made, and the size of the clip that checks variants.
    """

    semantics: Semantics = Semantics.R3
    auto_pixels: int | None = None
    licence: str = "LTX-2 Community License; text encoder: Gemma Terms of Use"
    check: bool = True
    overwrite: bool = False
    precisions: Literal["fp32", "presets"] = "fp32"
    backend: Backend = "gpu"
    calibration: Calibration | None = None
    other_loras: bool = False
    calibrating: CalibrationOptions = field(default_factory=CalibrationOptions)

    @property
    def framewise(self) -> bool:
        """Whether the decoder is traced frame by frame: for CPUs, and in fp32 alone.

        In FP16 three partial sums are rounded in place of one: the tiny model's frames at ``maximum`` were then 38 dB
        from those in fp32, and are 69 dB from them in the form of volumes.
        """
        return self.backend == "cpu" and self.precisions == "fp32"


@dataclass(frozen=True, slots=True)
class ExportStep:
    """Progress: step ``index`` of ``total`` begins, or has got as far as ``done`` of ``size``.

    Attributes:
        rows: Parity figures of what was made before, if any.
        note: A line for the user: before the first step, what the bundle will take on the disk.
    """

    index: int
    total: int
    description: str
    rows: tuple[ParityRow, ...] = ()
    note: str = ""
    done: int = 0
    size: int = 1


def stages(options: ExportOptions) -> tuple[str, ...]:
    """The steps of an export, in order; ``ExportStep.description`` is one of them, or at the end ``done``."""
    if options.precisions == "fp32":
        return ("weights", *NETWORK_NAMES, "manifest")
    calibration = ("calibration",) if options.calibration is None else ()
    return ("weights", *NETWORK_NAMES, *calibration, "presets", "manifest")


def calibration_stages() -> tuple[str, ...]:
    """The steps of ``calibrate_model``, likewise."""
    return ("weights", *NETWORK_NAMES, "calibration")


def export_bundle(sources: Sources, destination: Path, options: ExportOptions) -> Generator[ExportStep]:
    """Export all networks into a bundle at ``destination``.

    A generator: nothing runs until it is consumed, and closing it early leaves nothing behind. What a run leaves that
    was killed, the next one to the same destination takes over or removes.

    Raises:
        ExportError: A network cannot be exported, is not valid ONNX or misses its parity limit, or the calibration is
            one of another model.
        OutputError: The bundle cannot be written.
    """
    with BundleWriter(destination, overwrite=options.overwrite) as writer:
        sources, changes = sources.with_changes(writer.weights_folder)
        run = _Run(sources, writer, options, stages(options), changes)
        specs, stream = network_specs(sources, options.semantics, framewise=options.framewise)
        yield from run.weights(specs)
        model = _model_entry(writer, sources, options, stream)
        if options.calibration is not None:
            options.calibration.check_model(model, other_loras=options.other_loras)
        keys, rows = yield from run.fp32_networks(specs)
        presets = {preset: keys for preset in PRESET_NAMES}
        if options.precisions == "presets":
            presets, rows = yield from run.preset_networks(specs, keys, writer.draft(model, presets), rows)
        yield run.step("manifest", rows=rows)
        writer.commit(model, presets, {name: metadata.version(name) for name in _TOOLS})
        yield run.step("done")


def calibrate_model(sources: Sources, out: Path, options: ExportOptions) -> Generator[ExportStep]:
    """Calibrate the networks of a model and write the ranges to ``out``, replacing what is there.

    A generator, as ``export_bundle``. The networks lie beside ``out`` meanwhile, their weights shared with their
    source where the disk can do it.

    Raises:
        ExportError: A network cannot be exported, misses its parity limit or gives infinities.
        OutputError: ``out`` cannot be written.
    """
    with BundleWriter(out.with_name(f"{out.name}-networks")) as writer:
        sources, changes = sources.with_changes(writer.weights_folder)
        run = _Run(sources, writer, options, calibration_stages(), changes)
        specs, stream = network_specs(sources, options.semantics)
        yield from run.weights(specs)
        keys, rows = yield from run.fp32_networks(specs)
        bundle = writer.draft(_model_entry(writer, sources, options, stream), {_PRESET: keys})
        calibration = yield from run.calibrated(bundle, rows)
        calibration.save(out)
        yield run.step("done")


@dataclass(frozen=True, slots=True)
class _Run:
    """The phases that an export consists of; each yields its steps."""

    sources: Sources
    writer: BundleWriter
    options: ExportOptions
    stages: tuple[str, ...]
    changes: ChangedWeights | None

    def step(
        self, stage: str, *, rows: Sequence[ParityRow] = (), note: str = "", done: int = 0, size: int = 1
    ) -> ExportStep:
        """A step of this run."""
        total = len(self.stages)
        index = total if stage == "done" else self.stages.index(stage)
        return ExportStep(index, total, stage, tuple(rows), note, done, size)

    def weights(self, specs: Mapping[str, NetworkSpec]) -> Generator[ExportStep]:
        """Put the weight files beside the graphs: megabytes done and in all, every gigabyte."""
        yield from self._changed_weights()
        files = sorted({ref.path for spec in specs.values() for ref in spec.weights.values()})
        made_bytes = preset_fp8_bytes(specs) if "presets" in self.stages else 0
        plan = self.writer.plan_weights(files, made_bytes)
        plan.check()
        yield self.step("weights", note=str(plan))
        sizes = [file.stat().st_size for file in files]
        total, before = max(1, sum(sizes) // 10**6), 0
        for file, size in zip(files, sizes, strict=True):
            for done in self.writer.add_weights(file):
                if done == size or done % _PROGRESS_BYTES == 0:
                    yield self.step("weights", done=(before + done) // 10**6, size=total)
            before += size

    def _changed_weights(self) -> Generator[ExportStep]:
        """Write what differs from the checkpoint, likewise."""
        if self.changes is None:
            return
        what = f"{len(self.changes.changes)} weights are changed, {gigabytes(self.changes.bytes)}"
        yield self.step("weights", note=f"{what}: {len(self.sources.loras)} LoRAs, FP8 to 16 bits where it is stored")
        shown = 0
        for done in self.changes.write():
            if done - shown >= _PROGRESS_BYTES:
                shown = done
                yield self.step("weights", done=done // 10**6, size=max(1, self.changes.bytes // 10**6))

    def fp32_networks(
        self, specs: Mapping[str, NetworkSpec]
    ) -> Generator[ExportStep, None, tuple[dict[str, str], Sequence[ParityRow]]]:
        """Trace, write and check every network, then tokenizer and tables; keys, and the figures of the last one."""
        keys: dict[str, str] = {}
        rows: Sequence[ParityRow] = ()
        for name in NETWORK_NAMES:
            yield self.step(name, rows=rows)
            spec = specs[name]
            export = export_denoiser if name == "denoiser" else export_model
            keys[name] = self.writer.add_network(spec, export(spec, self.writer.location), _TRACED)
            path = self.writer.path_of(keys[name])
            rows = tuple(check_network(self.sources, spec, path)) if self.options.check else ()
        self.writer.add_tokenizer(self.sources.text_encoder.tokenizer_path)
        self.writer.add_tables(tables(self.sources))
        return keys, rows

    def calibrated(self, bundle: Bundle, rows: Sequence[ParityRow]) -> Generator[ExportStep, None, Calibration]:
        """Run the clips through the fp32 networks."""
        yield self.step("calibration", rows=rows)
        calibration: Calibration | None = None
        for step in calibrate(bundle, self.options.calibrating):
            yield self.step("calibration", note=step.note, done=step.index, size=step.total)
            calibration = step.calibration
        assert calibration is not None  # the last step carries it
        return calibration

    def preset_networks(
        self,
        specs: Mapping[str, NetworkSpec],
        keys: Mapping[str, str],
        bundle: Bundle,
        rows: Sequence[ParityRow],
    ) -> Generator[ExportStep, None, tuple[dict[str, dict[str, str]], Sequence[ParityRow]]]:
        """Make what the presets ask for from the fp32 networks; the keys of each preset, and the last figure."""
        calibration = self.options.calibration
        if calibration is None:
            calibration, rows = (yield from self.calibrated(bundle, rows)), ()
        yield self.step("presets", rows=rows)
        trials = record_trials(bundle, _PRESET, self.options.calibrating) if self.options.check else None
        self.writer.add_calibration(calibration)
        making = PresetNetworks(self.writer, specs, keys, calibration, self.options.backend, self.changes).make(trials)
        while True:
            try:
                made = next(making)
            except StopIteration as end:
                return end.value, ()
            rows = () if made.row is None else (made.row,)
            yield self.step("presets", rows=rows, note="\n".join(made.notes), done=made.done, size=made.total)


def network_specs(
    sources: Sources, semantics: Semantics, *, framewise: bool = False
) -> tuple[Mapping[str, NetworkSpec], StreamEntry]:
    """The six networks on fake tensors (no weight is read), and how the decoder streams.

    ``framewise`` changes how the decoder is written down, not what it computes: see ``FramewiseVideoDecoder``.
    """
    checkpoint, gemma = sources.checkpoint, sources.text_encoder
    transformer, connectors = checkpoint.component("transformer"), checkpoint.component("connectors")
    video_vae, audio_vae = checkpoint.component("video_vae"), checkpoint.component("audio_vae")
    text_model, latent_upsampler = gemma.component(), sources.upsampler.component()
    with FakeTensorMode():
        vae: Any = video_vae.build().eval()
        form = FramewiseVideoDecoder if framewise else VideoDecoder
        decoder_spec, layout = video_decoder.spec(vae, video_vae.weights, form)
        specs = {
            "text_encoder": text_encoder.spec(
                text_model.build().eval(),  # type: ignore[arg-type]
                connectors.build().eval(),  # type: ignore[arg-type]
                (text_model.weights, connectors.weights),
                gemma.context_length,
            ),
            "audio_encoder": audio_encoder.spec(
                audio_vae.build().eval(),  # type: ignore[arg-type]
                audio_vae.weights,
                checkpoint.config,
            ),
            "image_encoder": image_encoder.spec(vae, video_vae.weights),
            "denoiser": denoiser.spec(
                transformer.build().eval(),  # type: ignore[arg-type]
                transformer.weights,
                semantics,
                gemma.context_length,
            ),
            "upsampler": upsampler.spec(
                latent_upsampler.build().eval(),  # type: ignore[arg-type]
                vae,
                latent_upsampler.weights,
                video_vae.weights,
            ),
            "video_decoder": decoder_spec,
        }
    states = tuple(
        StateEntry(name=state.name, channels=state.channels, spatial_scale=state.space_scale) for state in layout.states
    )
    return specs, StreamEntry(states=states, first_chunk_latents=layout.minimum_first_latents)


def tables(sources: Sources) -> dict[str, NDArray[Any]]:
    """``tables.npz``: RoPE frequencies, distilled schedules, latent statistics.

    The frequency grid is fp64, rounded once
    (Lightricks/LTX-2 packages/ltx-core/src/ltx_core/model/transformer/rope.py).
    """
    config = sources.checkpoint.config["transformer"]
    theta = float(config["positional_embedding_theta"])
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    cross = int(config["audio_cross_attention_dim"])
    full = load_preset("high")
    statistics = sources.checkpoint.component("video_vae").tensors(("latents_mean", "latents_std"))
    return {
        "rope_video": _frequencies(theta, width // 6),
        "rope_cross": _frequencies(theta, cross // 2),
        "sigmas_stage_1": np.array(full.stage_1_sigmas),
        "sigmas_stage_2": np.array(full.stage_2_sigmas),
        "latents_mean": statistics["latents_mean"].numpy(),
        "latents_std": statistics["latents_std"].numpy(),
    }


def _frequencies(theta: float, count: int) -> NDArray[np.float32]:
    return (theta ** np.linspace(0.0, 1.0, count) * np.pi / 2.0).astype(np.float32)


def _model_entry(writer: BundleWriter, sources: Sources, options: ExportOptions, stream: StreamEntry) -> ModelEntry:
    checkpoint = sources.checkpoint
    transformer = checkpoint.config["transformer"]
    seconds, height, width = transformer["positional_embedding_max_pos"]
    return ModelEntry(
        name=checkpoint.name,
        version=checkpoint.version,
        checkpoint_sha256=checkpoint.sha256(writer.sha256),
        semantics=options.semantics.value,
        licence=options.licence,
        context_tokens=sources.text_encoder.context_length,
        latent_channels=int(transformer["in_channels"]),
        image_crf=_IMAGE_CRF,
        auto_pixels=options.auto_pixels,
        rope_max_position=(float(seconds), float(height), float(width)),
        stream=stream,
        loras=tuple(
            LoraEntry(name=lora.path.stem, scale=lora.scale, sha256=writer.sha256(lora.path)) for lora in sources.loras
        ),
    )
