# SPDX-License-Identifier: Apache-2.0
"""The streamed decoder against the un-chunked diffusers decoder, in torch and in ONNX Runtime."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from diffusers import AutoencoderKLLTX2Video
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from ltxrt.errors import ExportError
from ltxrt_export import published
from ltxrt_export.networks import video_decoder
from ltxrt_export.networks.video_decoder import StreamLayout, VideoDecoder, stream_layout
from ltxrt_export.networks.video_decoder_framewise import FramewiseVideoDecoder
from ltxrt_export.onnx_export import export_model
from ltxrt_export.vae_blocks import video_vae_options
from ltxrt_export.weights import TensorFile
from ltxrt_kernels.rgb_to_yuv420 import MAX_DIFFERING, MAX_LEVELS
from ltxrt_kernels.rgb_to_yuv420.reference import rgb_to_yuv420

PUBLISHED = published.checkpoint_config()

#: Smaller widths, one residual block a level; everything else as in LTX-2.3.
SMALL: dict[str, Any] = {
    **video_vae_options(PUBLISHED),
    "block_out_channels": (64, 64, 64, 64),
    "decoder_block_out_channels": (32, 64, 64, 128),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
}

Run = Callable[..., Sequence[Tensor]]


def random_vae(**changes: Any) -> AutoencoderKLLTX2Video:
    """A VAE with random weights and statistics, whose pictures fill [-1, 1] and a little more."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLLTX2Video(**{**SMALL, **changes}).eval().requires_grad_(False)
        vae.latents_mean.normal_()
        vae.latents_std.uniform_(0.5, 1.5)
        vae.decoder.conv_out.conv.weight.mul_(4)
    return vae


def latents(frames: int, height: int, width: int) -> Tensor:
    """Normalised latents [1, 128, frames, height, width]."""
    generator = torch.Generator().manual_seed(frames * 100 + height * 10 + width)
    return torch.randn(1, 128, frames, height, width, generator=generator)


def whole(vae: AutoencoderKLLTX2Video, latent: Tensor) -> Tensor:
    """The un-chunked decode by diffusers, [1, 3, 8F - 7, 32h, 32w]."""
    statistics = (1, -1, 1, 1, 1)
    return vae.decode(latent * vae.latents_std.view(statistics) + vae.latents_mean.view(statistics), return_dict=False)[
        0
    ]


def streamed(run: Run, layout: StreamLayout, latent: Tensor, chunks: Sequence[int]) -> list[Tensor]:
    """What ``run`` gives for each chunk, caches handed on."""
    height, width = latent.shape[3:]
    states: Sequence[Tensor] = [
        torch.zeros(1, state.channels, 0, height * state.space_scale, width * state.space_scale, dtype=latent.dtype)
        for state in layout.states
    ]
    results: list[Tensor] = []
    for index, chunk in enumerate(latent.split(list(chunks), dim=2)):
        first, last = torch.ones(int(index == 0)), torch.ones(int(index == len(chunks) - 1))
        output, *states = run(chunk, first, last, *states)
        results.append(output)
    return results


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLLTX2Video:
    return random_vae()


@pytest.fixture(scope="module")
def network(vae: AutoencoderKLLTX2Video) -> VideoDecoder:
    return VideoDecoder(vae).eval()


@pytest.mark.parametrize("chunks", [[1], [2], [10], [8, 1], [8, 1, 2, 1]])
def test_framewise_is_the_same_decoder(vae: AutoencoderKLLTX2Video, network: VideoDecoder, chunks: list[int]) -> None:
    """Frames and caches, in fp64 so that nothing but an error can differ."""
    framewise = FramewiseVideoDecoder(vae).eval()
    latent = latents(sum(chunks), 1, 2).double()
    framewise.double()  # and with it the decoder that both share
    try:
        expected, found = (recorded(module.rgb, network.layout, latent, chunks) for module in (network, framewise))
    finally:
        vae.float()
    for ours, theirs in zip(found, expected, strict=True):
        assert all(relative_error(*pair) < 1e-12 for pair in zip(ours, theirs, strict=True))


def recorded(run: Run, layout: StreamLayout, latent: Tensor, chunks: Sequence[int]) -> list[Sequence[Tensor]]:
    """Everything that ``run`` gives for each chunk."""
    kept: list[Sequence[Tensor]] = []

    def keeping(*feeds: Tensor) -> Sequence[Tensor]:
        kept.append(run(*feeds))
        return kept[-1]

    streamed(keeping, layout, latent, chunks)
    return kept


def test_layout_of_the_published_decoder() -> None:
    with torch.device("meta"):
        decoder = AutoencoderKLLTX2Video(**video_vae_options(PUBLISHED)).decoder
    layout = stream_layout(decoder)
    assert layout.minimum_first_latents == 15
    assert layout.held_frames == 108  # the receptive field reaches 108 frames ahead
    assert len(layout.states) == 2 + 2 * 18 + 4  # conv_in and conv_out, 18 residual blocks, 4 upsamplers
    assert [state.name for state in layout.states[:2]] == ["state_00", "state_01"]
    scales = Counter((state.channels, state.time_scale, state.space_scale) for state in layout.states)
    assert scales == {
        (128, 1, 1): 1,
        (1024, 1, 1): 5,
        (512, 2, 2): 5,
        (512, 4, 4): 9,
        (256, 8, 4): 13,
        (128, 8, 8): 9,
    }


@st.composite
def clips(draw: st.DrawFn) -> tuple[int, int, int, list[int]]:
    """Height, width, and the chunk lengths of a clip: a first one of at least 8, the rest at least 1."""
    height, width = draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    chunks = [draw(st.integers(8, 10)), *draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))]
    return height, width, sum(chunks), chunks


@given(clip=clips())
@settings(max_examples=12, deadline=None)
def test_any_split_equals_the_unchunked_decode(
    vae: AutoencoderKLLTX2Video, network: VideoDecoder, clip: tuple[int, int, int, list[int]]
) -> None:
    height, width, frames, chunks = clip
    latent = latents(frames, height, width)
    pieces = streamed(network.rgb, network.layout, latent, chunks)
    held = network.layout.held_frames
    expected = [8 * chunks[0] - 7 - held, *(8 * n for n in chunks[1:-1]), 8 * chunks[-1] + held]
    assert [piece.shape[2] for piece in pieces] == expected
    assert relative_error(torch.cat(pieces, 2), whole(vae, latent)) < 1e-5


def test_split_is_exact_in_exact_arithmetic() -> None:
    vae = random_vae().double()
    network = VideoDecoder(vae)
    latent = latents(11, 1, 2).double()
    pieces = streamed(network.rgb, network.layout, latent, [8, 1, 2])
    assert (torch.cat(pieces, 2) - whole(vae, latent)).abs().max() < 1e-12


@pytest.mark.parametrize("frames", [1, 2, 3, 7, 8])
def test_clip_in_one_chunk(vae: AutoencoderKLLTX2Video, network: VideoDecoder, frames: int) -> None:
    latent = latents(frames, 2, 3)
    (piece,) = streamed(network.rgb, network.layout, latent, [frames])
    assert relative_error(piece, whole(vae, latent)) < 1e-5


@pytest.mark.parametrize("layers", [(1, 1, 1, 1, 1), (1, 0, 0, 0, 1), (2, 1, 3, 1, 0)])
def test_minimum_first_chunk_is_the_least_that_runs(layers: tuple[int, ...]) -> None:
    network = VideoDecoder(random_vae(decoder_layers_per_block=layers))
    minimum = network.layout.minimum_first_latents
    latent = latents(minimum, 1, 1)
    states = [torch.zeros(1, s.channels, 0, s.space_scale, s.space_scale) for s in network.layout.states]
    edges = torch.ones(1), torch.ones(0)
    assert network.rgb(latent, *edges, *states)[0].shape[2] == 8 * minimum - 7 - network.layout.held_frames >= 1
    with pytest.raises(RuntimeError):
        network.rgb(latent[:, :, 1:], *edges, *states)


@pytest.mark.parametrize("kind", [VideoDecoder, FramewiseVideoDecoder])
def test_pictures_are_the_reference_conversion(vae: AutoencoderKLLTX2Video, kind: type[VideoDecoder]) -> None:
    network = kind(vae).eval()
    latent = latents(9, 2, 3)
    pictures = torch.cat(streamed(network, network.layout, latent, [8, 1])).numpy()
    rgb = whole(vae, latent)[0].transpose(0, 1).numpy()
    assert pictures.shape == (65, 96, 96)
    assert pictures.dtype == np.uint8
    assert np.abs(rgb).max() > 1  # so that clipping is part of the test
    expected = rgb_to_yuv420(rgb)
    difference = np.abs(pictures.astype(int) - expected)
    assert difference.max() <= MAX_LEVELS
    assert (difference != 0).mean() < MAX_DIFFERING
    assert difference[:, :64].mean() < 1
    assert np.ptp(expected[:, :64]) > 150


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"decoder_causal": True}, "causal convolutions"),
        ({"timestep_conditioning": True}, "timestep conditioning"),
        ({"decoder_inject_noise": (True,) * 5}, "noise injection"),
        ({"upsample_residual": (True,) * 4}, "residual upsampling"),
        ({"upsample_factor": (1, 1, 1, 1)}, "a convolution at the head of an up block"),
    ],
)
def test_parts_that_cannot_be_streamed_are_refused(changes: dict[str, Any], part: str) -> None:
    with torch.device("meta"):
        vae = AutoencoderKLLTX2Video(**{**SMALL, **changes})
    with pytest.raises(ExportError, match=f"^video VAE decoder: {part} cannot be streamed"):
        VideoDecoder(vae)


def test_spec_takes_the_decoder_and_the_statistics(vae: AutoencoderKLLTX2Video, tmp_path: Path) -> None:
    weights = stored(vae, tmp_path / "vae.safetensors")
    network, layout = video_decoder.spec(vae, weights)
    assert (
        set(network.weights)
        == {name for name in weights if name.startswith(("decoder.", "latents_"))}
        == set(network.module.state_dict())
    )
    assert all(ref is weights[name] for name, ref in network.weights.items())
    assert [port.name for port in network.inputs] == [
        "latent", "first", "last", *(state.name for state in layout.states)
    ]  # fmt: skip
    assert [port.name for port in network.outputs] == ["frames", *(f"next_{s.name}" for s in layout.states)]


def stored(vae: AutoencoderKLLTX2Video, path: Path) -> Any:
    save_file({name: tensor.contiguous() for name, tensor in vae.state_dict().items()}, path)
    return TensorFile.open(path).tensors


class Exported:
    """A VAE and its decoder as an ONNX file beside its weights, in a session."""

    def __init__(self, vae: AutoencoderKLLTX2Video, folder: Path) -> None:
        self.vae = vae
        network, self.layout = video_decoder.spec(vae, stored(vae, folder / "vae.safetensors"))
        self.module = network.module
        self.model = export_model(network)
        path = folder / "video_decoder.onnx"
        onnx.save_model(self.model, path)
        onnx.checker.check_model(path, full_check=True)
        self._session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        names = [value.name for value in self._session.get_inputs()]
        feeds = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(value) for value in self._session.run(None, feeds)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A decoder of fewer residual blocks: tracing takes more than a second a convolution."""
    return Exported(random_vae(decoder_layers_per_block=(1, 0, 0, 0, 1)), tmp_path_factory.mktemp("decoder"))


def check_graph(exported: Exported) -> None:
    operators = Counter(node.op_type for node in exported.model.graph.node)
    refused = ("Sequence", "Scatter", "NonZero", "Loop", "If", "Split", "Einsum")
    assert not [name for name in operators if name.startswith(refused)]
    # The only Squeezes make scalars of lengths: none touches a tensor.
    producers = {name: node for node in exported.model.graph.node for name in node.output}
    squeezed = {producers[node.input[0]].op_type for node in exported.model.graph.node if node.op_type == "Squeeze"}
    assert squeezed <= {"Shape"}
    along_time = [
        node
        for node in exported.model.graph.node
        if node.op_type == "Concat" and any(attribute.i == 2 for attribute in node.attribute)
    ]
    assert len(along_time) == operators["Conv"] == len(exported.layout.states)


def check_clip(exported: Exported, shape: tuple[int, int, int], chunks: list[int]) -> None:
    latent = latents(*shape)
    pictures = streamed(exported, exported.layout, latent, chunks)
    in_torch = streamed(exported.module, exported.layout, latent, chunks)
    assert [len(piece) for piece in pictures] == [len(piece) for piece in in_torch]
    expected = rgb_to_yuv420(whole(exported.vae, latent)[0].transpose(0, 1).numpy())
    for actual in (torch.cat(pictures), torch.cat(in_torch)):
        assert actual.shape == expected.shape
        difference = np.abs(actual.numpy().astype(int) - expected)
        assert difference.max() <= MAX_LEVELS
        assert (difference != 0).mean() < MAX_DIFFERING


def test_graph_has_one_copy_a_convolution_and_no_foreign_operator(exported: Exported) -> None:
    check_graph(exported)


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [
        ((1, 1, 1), [1]),
        ((2, 1, 2), [2]),
        ((5, 3, 2), [5]),
        ((9, 2, 1), [7, 1, 1]),
        ((13, 2, 3), [8, 3, 2]),
        ((8, 4, 4), [7, 1]),
    ],
)
def test_onnx_runtime_equals_diffusers(exported: Exported, shape: tuple[int, int, int], chunks: list[int]) -> None:
    check_clip(exported, shape, chunks)


def test_caches_of_onnx_runtime_are_those_of_torch(exported: Exported) -> None:
    latent = latents(7, 2, 2)
    states = [torch.zeros(1, s.channels, 0, 2 * s.space_scale, 2 * s.space_scale) for s in exported.layout.states]
    inputs = (latent, torch.ones(1), torch.ones(0), *states)
    _, *actual = exported(*inputs)
    _, *expected = exported.module(*inputs)
    for one, other, state in zip(actual, expected, exported.layout.states, strict=True):
        assert one.shape == (1, state.channels, 2, 2 * state.space_scale, 2 * state.space_scale)
        assert relative_error(one, other) < 1e-5


@pytest.mark.slow
def test_onnx_runtime_equals_diffusers_with_every_stage(vae: AutoencoderKLLTX2Video, tmp_path: Path) -> None:
    exported = Exported(vae, tmp_path)
    check_graph(exported)
    check_clip(exported, (12, 1, 2), [8, 1, 3])
    check_clip(exported, (2, 3, 4), [2])
