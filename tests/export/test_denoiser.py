# SPDX-License-Identifier: Apache-2.0
"""The denoising step in torch against the diffusers class, for every generation of the modulation rules."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformer3DModel

from ltxrt.shapes import LatentShape
from ltxrt_export import architecture
from ltxrt_export.networks import denoiser
from ltxrt_export.networks.denoiser import DenoiseStep, RopeExpansion, Semantics
from ltxrt_export.parity import relative_error
from ltxrt_export.published import checkpoint_config
from ltxrt_export.references import denoise_velocity

SHAPE, AUDIO_TOKENS = LatentShape(3, 2, 3), 7

Feeds = dict[str, np.ndarray]
MakeFeeds = Callable[..., Feeds]
MakeCoordinates = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def model(random_transformer: Callable[..., LTX2VideoTransformer3DModel]) -> LTX2VideoTransformer3DModel:
    return random_transformer(layers=2)


def step(model: LTX2VideoTransformer3DModel, semantics: Semantics, feeds: Feeds) -> np.ndarray:
    spec = denoiser.spec(model, {}, semantics, feeds["video_context"].shape[1])
    with torch.no_grad():
        return spec.module(*(torch.from_numpy(feeds[port.name]) for port in spec.inputs)).numpy()


def euler(feeds: Feeds, velocity: np.ndarray) -> np.ndarray:
    """The step around the velocity, written out in fp64: x0, the first frame imposed again, Euler."""
    latent, clean, mask, sigma, sigma_next = (
        np.asarray(feeds[name], np.float64) for name in ("latent", "clean", "mask", "sigma", "sigma_next")
    )
    x0 = (latent - velocity * mask * sigma) * mask + clean * (1 - mask)
    return latent + (latent - x0) * (sigma_next - sigma) / sigma


def unpatched_velocity(model: Any, feeds: Feeds, coordinates: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
    """The class as it is, the audio stream clean at timestep 0 and labelled with the current sigma."""
    tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
    sigma = tensors["sigma"] * 1000
    with torch.no_grad():
        return model(
            hidden_states=tensors["latent"],
            audio_hidden_states=tensors["audio_tokens"],
            encoder_hidden_states=tensors["video_context"],
            audio_encoder_hidden_states=tensors["audio_context"],
            timestep=tensors["mask"][..., 0] * sigma,
            audio_timestep=torch.zeros(tensors["audio_tokens"].shape[:2]),
            sigma=sigma,
            audio_sigma=sigma,
            video_coords=coordinates[0],
            audio_coords=coordinates[1],
            use_cross_timestep=True,
            return_dict=False,
        )[0].numpy()


@pytest.mark.parametrize("strength", [None, 0.7, 1.0])
@pytest.mark.parametrize("semantics", list(Semantics))
def test_step_is_that_of_the_class(
    model: LTX2VideoTransformer3DModel,
    denoiser_feeds: MakeFeeds,
    denoiser_coordinates: MakeCoordinates,
    semantics: Semantics,
    strength: float | None,
) -> None:
    feeds = denoiser_feeds(model, SHAPE, AUDIO_TOKENS, strength)
    coordinates = denoiser_coordinates(model, SHAPE, AUDIO_TOKENS)
    if semantics is Semantics.R1:
        velocity = unpatched_velocity(model, feeds, coordinates)
    else:
        with torch.no_grad():
            velocity = denoise_velocity(model, feeds, coordinates, semantics)
    found = step(model, semantics, feeds)
    assert found.dtype == np.float32
    assert relative_error(found, euler(feeds, velocity)) < 1e-6
    if strength is None:
        # The velocity itself, which the latent outweighs in the step.
        change = feeds["sigma_next"] - feeds["sigma"]
        assert relative_error((found - feeds["latent"]) / change, velocity) < 1e-5


def test_generations_differ(model: LTX2VideoTransformer3DModel, denoiser_feeds: MakeFeeds) -> None:
    """Else the comparisons above could not tell one from another."""
    feeds = denoiser_feeds(model, SHAPE, AUDIO_TOKENS, 0.7)
    results = {semantics: step(model, semantics, feeds) for semantics in Semantics}
    for one, other in (("R1", "R2"), ("R2", "R3"), ("R1", "R3")):
        assert relative_error(results[Semantics(one)], results[Semantics(other)]) > 1e-3


@pytest.mark.parametrize("sigma_next", [0.421875, 0.0])
def test_the_first_frame_is_held_to_the_bit(
    model: LTX2VideoTransformer3DModel, denoiser_feeds: MakeFeeds, sigma_next: float
) -> None:
    feeds = denoiser_feeds(model, SHAPE, AUDIO_TOKENS, 1.0, sigma_next)
    found, held = step(model, Semantics.R3, feeds), SHAPE.tokens_per_frame
    np.testing.assert_array_equal(found[:, :held], feeds["clean"][:, :held])
    assert not np.isclose(found[:, held:], feeds["latent"][:, held:]).all(axis=-1).any()


def test_the_last_step_gives_x0(
    model: LTX2VideoTransformer3DModel, denoiser_feeds: MakeFeeds, denoiser_coordinates: MakeCoordinates
) -> None:
    feeds = denoiser_feeds(model, SHAPE, AUDIO_TOKENS, None, 0.0)
    with torch.no_grad():
        velocity = denoise_velocity(model, feeds, denoiser_coordinates(model, SHAPE, AUDIO_TOKENS), Semantics.R3)
    assert relative_error(step(model, Semantics.R3, feeds), feeds["latent"] - velocity * feeds["sigma"]) < 1e-6


def test_without_a_first_frame_the_rows_of_tokens_make_no_difference(
    model: LTX2VideoTransformer3DModel, denoiser_feeds: MakeFeeds
) -> None:
    feeds = denoiser_feeds(model, SHAPE, AUDIO_TOKENS, None)
    ones = {**feeds, "token_row": np.ones_like(feeds["token_row"])}
    np.testing.assert_array_equal(step(model, Semantics.R3, feeds), step(model, Semantics.R3, ones))


def test_the_clean_latent_counts_in_the_first_frame_alone(
    model: LTX2VideoTransformer3DModel, denoiser_feeds: MakeFeeds
) -> None:
    feeds = denoiser_feeds(model, SHAPE, AUDIO_TOKENS, 0.7)
    found = step(model, Semantics.R3, feeds)
    other = step(model, Semantics.R3, {**feeds, "clean": feeds["clean"] + 1})
    held = SHAPE.tokens_per_frame
    np.testing.assert_array_equal(found[:, held:], other[:, held:])
    assert (found[:, :held] != other[:, :held]).all()


#: Width of a head, of which there are two, and what three axes leave over of half of both.
HEADS = {32: 32 - 3 * 10, 24: 0, 34: 34 - 3 * 11}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("shape", "audio_tokens"), [(LatentShape(3, 2, 3), 7), (LatentShape(1, 1, 1), 1)])
def test_rope_expansion_is_that_of_the_rotary_modules(
    random_transformer: Callable[..., Any],
    denoiser_feeds: MakeFeeds,
    denoiser_coordinates: MakeCoordinates,
    head: int,
    shape: LatentShape,
    audio_tokens: int,
) -> None:
    model = random_transformer(layers=1, head=head)
    feeds, (video, audio) = (
        denoiser_feeds(model, shape, audio_tokens),
        denoiser_coordinates(model, shape, audio_tokens),
    )
    expansion = RopeExpansion(model)
    assert expansion.padding == HEADS[head]
    axes = ("rope_time", "rope_height", "rope_width", "rope_cross_time", "rope_audio")
    found = expansion(*(torch.from_numpy(feeds[name]) for name in axes))
    expected = (*model.rope(video), *model.cross_attn_rope(video[:, 0:1]), *model.audio_rope(audio[:, 0:1]))
    assert len(found) == len(expected) == 6
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == torch.float32
        # The grid is fp64 and rounded once on both sides: the angles are equal, and so are the tables.
        np.testing.assert_allclose(one.numpy(), other.float().numpy(), atol=2e-7)
    crossed = model.cross_attn_audio_rope(audio[:, 0:1])
    for one, other in zip(found[4:], crossed, strict=True):
        np.testing.assert_allclose(one.numpy(), other.float().numpy(), atol=2e-7)


def test_spec_of_the_published_model() -> None:
    config = checkpoint_config()
    config["transformer"]["num_layers"] = 2
    with torch.device("meta"):
        spec = denoiser.spec(architecture.transformer(config), {}, Semantics.R3, 1024)
    ports = {port.name: port.shape for port in (*spec.inputs, *spec.outputs)}
    assert ports == {
        "latent": (1, "Nv", 128),
        "clean": (1, "Nv", 128),
        "mask": (1, "Nv", 1),
        "audio_tokens": (1, "Na", 128),
        "video_context": (1, 1024, 4096),
        "audio_context": (1, 1024, 2048),
        "token_row": ("Nv",),
        "sigma": (1,),
        "sigma_next": (1,),
        "rope_time": (2, "f", 682),
        "rope_height": (2, "h", 682),
        "rope_width": (2, "w", 682),
        "rope_cross_time": (2, "f", 1024),
        "rope_audio": (2, "Na", 1024),
        "latent_next": (1, "Nv", 128),
    }
    assert {port.name for port in spec.inputs if port.dtype != "float32"} == {"token_row"}
    assert {name: value.shape for name, value in spec.constants.items()} == {
        "video_ones": (4096,),
        "audio_ones": (2048,),
    }


def test_only_the_last_block_gives_up_its_audio(model: LTX2VideoTransformer3DModel) -> None:
    blocks: Any = DenoiseStep(model, Semantics.R3).blocks
    assert [block.last for block in blocks] == [False, True]
    assert all(block.block is original for block, original in zip(blocks, model.transformer_blocks, strict=True))
