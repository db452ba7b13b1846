# SPDX-License-Identifier: Apache-2.0
"""The bundle's ``manifest.json``: what the exporter promises and the runtime relies on."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from .engine import TensorSpec

__all__ = [
    "NETWORK_NAMES",
    "PRECISIONS",
    "SCHEMA_VERSION",
    "EngineEntry",
    "EngineKey",
    "EngineProfile",
    "FileEntry",
    "LoraEntry",
    "Manifest",
    "ModelEntry",
    "NetworkEntry",
    "StateEntry",
    "StreamEntry",
    "TensorEntry",
]

#: Raised with every change that an older runtime would misread.
SCHEMA_VERSION = 1

NETWORK_NAMES = ("text_encoder", "audio_encoder", "image_encoder", "denoiser", "upsampler", "video_decoder")

#: What a network may compute in, finest first; ``fp8-mixed`` keeps its first and last blocks in 16 bits.
PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "fp8-mixed")

NetworkName = Literal["text_encoder", "audio_encoder", "image_encoder", "denoiser", "upsampler", "video_decoder"]
Precision = Literal["fp32", "fp16", "bf16", "fp8", "fp8-mixed"]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Entry):
    """One file of the bundle."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class TensorEntry(_Entry):
    """One input or output of a network; a string in the shape is a symbol."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def spec(self) -> TensorSpec:
        """The same as the engines take it."""
        return TensorSpec(self.name, self.dtype, self.shape)


class NetworkEntry(_Entry):
    """One network: its graph, the weight files that the graph points into, and its ports.

    ``precision`` is what the graph computes in; ``shape_range`` gives the smallest and largest size of every symbol.
    """

    network: NetworkName
    file: str
    weights: tuple[str, ...]
    precision: Precision
    opset: int
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    shape_range: dict[str, tuple[int, int]]


class EngineProfile(_Entry):
    """Sizes that an engine serves at full speed: per symbol of the network the smallest, the tuned and the largest."""

    name: str
    sizes: dict[str, tuple[int, int, int]]


class EngineKey(_Entry):
    """Everything that reaches the engine compiler, in canonical form: equal keys, equal engines.

    Attributes:
        schema_version: Raised with every change of what the key holds or means.
        onnx_sha256: Hash of the graph.
        weights_sha256: Hash of every weight file, sorted by file name.
        gpu_name: As the driver tells it; two GPUs of one architecture are tuned differently.
        compute_capability: For example ``9.0``.
        tensorrt_version: Full version of the compiler.
        cuda_version: Newest CUDA that the driver serves, for example ``13.0``.
        profiles: In the order in which the engine numbers them.
        options: Builder options by name.
    """

    schema_version: int
    onnx_sha256: str
    weights_sha256: tuple[str, ...]
    gpu_name: str
    compute_capability: str
    tensorrt_version: str
    cuda_version: str
    profiles: tuple[EngineProfile, ...]
    options: dict[str, bool | int | str | None]


class EngineEntry(_Entry):
    """One compiled engine.

    Attributes:
        network: Key of the network in ``Manifest.networks``.
        file: The plan.
        layers: JSON of its layers and their precisions.
        key: What it was made from.
        key_sha256: Hash of ``key``.
        built_with: What else was so when it was built, for people.
    """

    network: str
    file: str
    layers: str
    key: EngineKey
    key_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    built_with: dict[str, str]


class StateEntry(_Entry):
    """One cached tensor of the streaming decoder: [1, channels, 0 or 2, h * spatial_scale, w * spatial_scale]."""

    name: str
    channels: int
    spatial_scale: int


class StreamEntry(_Entry):
    """How the video decoder is fed: its states and the least latent frames of the first chunk."""

    states: tuple[StateEntry, ...]
    first_chunk_latents: Annotated[int, Field(ge=1)]


class LoraEntry(_Entry):
    """A LoRA that is part of the weights: its file's name without the suffix, how much of it, and its hash."""

    name: str
    scale: float
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ModelEntry(_Entry):
    """What the networks were made from, and the model's own numbers.

    Attributes:
        name: Checkpoint name.
        version: Model version, for example ``2.3.0``.
        checkpoint_sha256: Hash of the checkpoint file.
        semantics: Generation of the modulation rules (R1, R2 or R3).
        licence: Terms of the weights, in one line.
        context_tokens: Length of the text contexts and most tokens of a prompt.
        latent_channels: Width of a video token.
        image_crf: x264 CRF that a first frame is compressed with before it is encoded; 0 is off.
        auto_pixels: Upper bound of the pixel budget of ``resolution: auto``; None leaves it to the preset.
        rope_max_position: Range of time (seconds), height and width (pixels) of the positions.
        stream: How the decoder is fed.
        loras: What was fused into the checkpoint, in order.
    """

    name: str
    version: str
    checkpoint_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    semantics: Literal["R1", "R2", "R3"]
    licence: str
    context_tokens: Annotated[int, Field(ge=1)]
    latent_channels: int
    image_crf: Annotated[int, Field(ge=0, le=51)]
    auto_pixels: int | None
    rope_max_position: tuple[float, float, float]
    stream: StreamEntry
    loras: tuple[LoraEntry, ...] = ()


class Manifest(_Entry):
    """The whole manifest.

    ``files`` lists every file but the manifest, by path relative to the bundle. ``networks`` is keyed by content (name,
    precision and hash), and ``presets`` maps each preset to one key per network, so that presets share what is equal.
    ``engines`` are compiled for one GPU each; a network has at most one for a GPU and a TensorRT version.
    """

    schema_version: Literal[1] = 1
    model: ModelEntry
    files: dict[str, FileEntry]
    networks: dict[str, NetworkEntry]
    presets: dict[str, dict[NetworkName, str]]
    engines: dict[str, EngineEntry] = {}
    made_with: dict[str, str]
