# SPDX-License-Identifier: Apache-2.0
"""Checkpoint to bundle: every network traced, checked against its torch class, and written with its manifest."""

import hashlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensorMode

from ltxrt.errors import ExportError
from ltxrt.manifest import NETWORK_NAMES, Manifest, ModelEntry, StateEntry, StreamEntry
from ltxrt.preset import PRESET_NAMES, load_preset

from . import diffusers_folder
from .bundle_writer import BundleWriter
from .checkpoint import Checkpoint, Gemma, Upsampler
from .denoiser_graph import export_denoiser
from .networks import audio_encoder, denoiser, image_encoder, text_encoder, upsampler, video_decoder
from .networks.denoiser import Semantics
from .networks.spec import NetworkSpec
from .onnx_export import export_model
from .parity import ParityRow, check_network

__all__ = ["ExportOptions", "ExportStep", "Sources", "export_bundle"]

PRECISION = "fp32"
_PROGRESS_BYTES = 1024**3
#: CRF of the first frame's re-compression for models before 2.4 (ltx_pipelines/utils/constants.py).
_IMAGE_CRF = 33
_TOOLS = ("diffusers", "onnx", "onnx-ir", "onnxscript", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Sources:
    """The three parts of a model, opened and checked."""

    checkpoint: Checkpoint
    text_encoder: Gemma
    upsampler: Upsampler

    @classmethod
    def open(cls, checkpoint: Path, text_encoder: Path | None = None, upsampler: Path | None = None) -> "Sources":
        """Open the single file, the Gemma folder and the upsampler file, or a folder in the diffusers layout.

        Args:
            checkpoint: The single file, or the folder.
            text_encoder: Gemma's folder; None for that of the diffusers folder.
            upsampler: The upsampler's file, or its folder; None for that of the diffusers folder.

        Raises:
            ExportError: One of them is missing, damaged, unknown, or does not fit the others.
        """
        whole = diffusers_folder.is_diffusers_folder(checkpoint)
        if not whole and (text_encoder is None or upsampler is None):
            raise ExportError(
                f"{checkpoint}: is no folder in the diffusers layout; name text encoder and upsampler too"
            )
        sources = cls(
            diffusers_folder.open_checkpoint(checkpoint) if whole else Checkpoint.open(checkpoint),
            diffusers_folder.open_text_encoder(checkpoint) if text_encoder is None else Gemma.open(text_encoder),
            _opened_upsampler(upsampler or checkpoint),
        )
        sources.checkpoint.check_text_encoder(sources.text_encoder)
        return sources


def _opened_upsampler(path: Path) -> Upsampler:
    return diffusers_folder.open_upsampler(path) if path.is_dir() else Upsampler.open(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What may be chosen.

    Attributes:
        semantics: Modulation rules.
        auto_pixels: Upper bound of the pixel budget of ``resolution: auto``; None leaves it to the presets.
        licence: Terms of the weights, in one line.
        check: Run every graph against its torch class before it is kept.
        overwrite: Replace a bundle that is there.
    """

    semantics: Semantics = Semantics.R3
    auto_pixels: int | None = None
    licence: str = "LTX-2 Community License; text encoder: Gemma Terms of Use"
    check: bool = True
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class ExportStep:
    """Progress: step ``index`` of ``total`` begins, or has got as far as ``done`` of ``size``.

    Attributes:
        rows: Parity figures of the step before, if any.
        note: A line for the user: before the first step, what the bundle will take on the disk.
    """

    index: int
    total: int
    description: str
    rows: tuple[ParityRow, ...] = ()
    note: str = ""
    done: int = 0
    size: int = 1


def export_bundle(sources: Sources, destination: Path, options: ExportOptions) -> Generator[ExportStep]:
    """Export all networks into a bundle at ``destination``.

    A generator: nothing runs until it is consumed, and closing it early leaves nothing behind.

    Raises:
        ExportError: A network cannot be exported, is not valid ONNX or misses its parity limit.
        OutputError: The bundle cannot be written.
    """
    total = len(NETWORK_NAMES) + 2
    with BundleWriter(destination, overwrite=options.overwrite) as writer:
        specs, stream = network_specs(sources, options.semantics)
        files = sorted({ref.path for spec in specs.values() for ref in spec.weights.values()})
        plan = writer.plan_weights(files)
        plan.check()
        yield ExportStep(0, total, "weights", note=str(plan))
        yield from (ExportStep(0, total, "weights", done=done, size=size) for done, size in _placed(writer, files))
        keys: dict[str, str] = {}
        rows: tuple[ParityRow, ...] = ()
        for index, name in enumerate(NETWORK_NAMES, start=1):
            yield ExportStep(index, total, name, rows)
            spec = specs[name]
            export = export_denoiser if name == "denoiser" else export_model
            keys[name] = writer.add_network(spec, export(spec, writer.location), PRECISION)
            rows = tuple(check_network(sources, spec, writer.path_of(keys[name]))) if options.check else ()
        yield ExportStep(total - 1, total, "manifest", rows)
        writer.add_tokenizer(sources.text_encoder.tokenizer_path)
        writer.add_tables(tables(sources))
        _commit(writer, sources, options, keys, stream)
    yield ExportStep(total, total, "done")


def _placed(writer: BundleWriter, files: Sequence[Path]) -> Generator[tuple[int, int]]:
    """Put the weight files beside the graphs: megabytes done and in all, every gigabyte."""
    sizes = [file.stat().st_size for file in files]
    before = 0
    for file, size in zip(files, sizes, strict=True):
        for done in writer.add_weights(file):
            if done == size or done % _PROGRESS_BYTES == 0:
                yield (before + done) // 10**6, max(1, sum(sizes) // 10**6)
        before += size


def network_specs(sources: Sources, semantics: Semantics) -> tuple[Mapping[str, NetworkSpec], StreamEntry]:
    """The six networks on fake tensors (no weight is read), and how the decoder streams."""
    checkpoint, gemma = sources.checkpoint, sources.text_encoder
    transformer, connectors = checkpoint.component("transformer"), checkpoint.component("connectors")
    video_vae, audio_vae = checkpoint.component("video_vae"), checkpoint.component("audio_vae")
    text_model, latent_upsampler = gemma.component(), sources.upsampler.component()
    with FakeTensorMode():
        vae: Any = video_vae.build().eval()
        decoder_spec, layout = video_decoder.spec(vae, video_vae.weights)
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


def _checkpoint_sha256(writer: BundleWriter, checkpoint: Checkpoint) -> str:
    """Of its file; of the hashes of its files, where there are several."""
    hashes = [writer.sha256(path) for path in sorted({ref.path for ref in checkpoint.file.tensors.values()})]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _commit(
    writer: BundleWriter, sources: Sources, options: ExportOptions, keys: Mapping[str, str], stream: StreamEntry
) -> Manifest:
    checkpoint = sources.checkpoint
    transformer = checkpoint.config["transformer"]
    seconds, height, width = transformer["positional_embedding_max_pos"]
    model = ModelEntry(
        name=checkpoint.name,
        version=checkpoint.version,
        checkpoint_sha256=_checkpoint_sha256(writer, checkpoint),
        semantics=options.semantics.value,
        licence=options.licence,
        context_tokens=sources.text_encoder.context_length,
        latent_channels=int(transformer["in_channels"]),
        image_crf=_IMAGE_CRF,
        auto_pixels=options.auto_pixels,
        rope_max_position=(float(seconds), float(height), float(width)),
        stream=stream,
    )
    # One precision so far: every preset runs the same networks and differs in schedule and encoder.
    presets = {preset: dict(keys) for preset in PRESET_NAMES}
    return writer.commit(model, presets, {name: metadata.version(name) for name in _TOOLS})
