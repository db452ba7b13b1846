# SPDX-License-Identifier: Apache-2.0
"""The loop around the denoiser, on a denoiser small enough to be worked out again by hand."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from ltxrt.denoise import DenoiseStage
from ltxrt.encoders import Conditioning, TextContexts
from ltxrt.engine import TensorSpec, check_feeds
from ltxrt.errors import EngineError
from ltxrt.noise import gaussian
from ltxrt.preset import load_preset
from ltxrt.rope import RopeGrid, rope_tables
from ltxrt.shapes import LatentShape

CHANNELS, AUDIO_CHANNELS, AUDIO_TOKENS = 4, 3, 5
RATE = Fraction(24000, 1001)
GRID = RopeGrid(np.linspace(1, 3, 2, dtype=np.float32), np.linspace(1, 3, 3, dtype=np.float32), (20.0, 2048.0, 2048.0))
HALF, FULL = LatentShape(3, 2, 3), LatentShape(3, 4, 6)
SIGMAS = (1.0, 0.975, 0.725, 0.421875, 0.0)


def velocity(latent, times, audio, contexts, time_table):
    """A velocity that is linear in the latent and hears every other input: [tokens, channels]."""
    frames = time_table.shape[1]
    when = np.repeat(time_table[1].sum(axis=1), len(latent) // frames)[:, None]
    return 0.7 * latent - 0.2 * times + 0.1 * audio.sum() + 0.05 * contexts + 0.3 * when


class ToyDenoiser:
    """The denoiser's step in NumPy, on fixed buffers that every replay overwrites, as a captured graph has them."""

    name = "denoiser"
    inputs = (
        TensorSpec("latent", "float32", (1, "Nv", CHANNELS)),
        TensorSpec("clean", "float32", (1, "Nv", CHANNELS)),
        TensorSpec("mask", "float32", (1, "Nv", 1)),
        TensorSpec("audio_tokens", "float32", (1, "Na", AUDIO_CHANNELS)),
        TensorSpec("video_context", "float32", (1, 2, 2)),
        TensorSpec("audio_context", "float32", (1, 2, 1)),
        TensorSpec("token_row", "int64", ("Nv",)),
        TensorSpec("sigma", "float32", (1,)),
        TensorSpec("sigma_next", "float32", (1,)),
        TensorSpec("rope_time", "float32", (2, "f", 2)),
        TensorSpec("rope_height", "float32", (2, "h", 2)),
        TensorSpec("rope_width", "float32", (2, "w", 2)),
        TensorSpec("rope_cross_time", "float32", (2, "f", 3)),
        TensorSpec("rope_audio", "float32", (2, "Na", 3)),
    )
    outputs = (TensorSpec("latent_next", "float32", (1, "Nv", CHANNELS)),)

    def __init__(self):
        self.captures = []

    def run(self, feeds):
        raise AssertionError("every step is a replay")

    def capture(self, feeds):
        check_feeds(self.name, self.inputs, feeds)
        self.captures.append(ToyCapture({name: value.copy() for name, value in feeds.items()}))
        return self.captures[-1]


class ToyCapture:
    def __init__(self, inputs):
        self.inputs = inputs
        self.first = {name: value.copy() for name, value in inputs.items()}
        self.outputs = {"latent_next": np.full_like(inputs["latent"], np.nan)}
        self.sigmas = []

    def replay(self):
        feeds = self.inputs
        sigma, sigma_next = float(feeds["sigma"][0]), float(feeds["sigma_next"][0])
        self.sigmas.append((sigma, sigma_next))
        mask, clean, latent = (feeds[name][0].astype(np.float64) for name in ("mask", "clean", "latent"))
        # Two distinct times per step, chosen by the token's row, as AdaLN does it.
        times = np.array([float(mask[0, 0]) * sigma, sigma])[feeds["token_row"]][:, None]
        contexts = float(feeds["video_context"].sum() + feeds["audio_context"].sum())
        flow = velocity(latent, times, feeds["audio_tokens"], contexts, feeds["rope_time"])
        whole = (latent - flow * times) * mask + clean * (1 - mask)
        self.outputs["latent_next"][0] = latent + (latent - whole) / sigma * (sigma_next - sigma)


def conditioning(strength):
    rng = np.random.default_rng(7)
    frames = tuple(
        rng.standard_normal((1, shape.tokens_per_frame, CHANNELS)).astype(np.float32) for shape in (HALF, FULL)
    )
    return Conditioning(
        text=TextContexts(np.full((1, 2, 2), 0.3, np.float32), np.full((1, 2, 1), -0.2, np.float32)),
        audio_tokens=rng.standard_normal((1, AUDIO_TOKENS, AUDIO_CHANNELS)).astype(np.float32),
        first_frames=None if strength is None else frames,
        image_strength=0.7 if strength is None else strength,
    )


def stage(number=1, shape=HALF, sigmas=SIGMAS, engine=None):
    return DenoiseStage(
        number=number,
        engine=engine or ToyDenoiser(),
        rope=GRID,
        shape=shape,
        channels=CHANNELS,
        rate=RATE,
        sigmas=sigmas,
    )


def euler(number, shape, given, initial, seed, strength):
    """The whole stage in fp64, token by token, from the description of the sampler alone."""
    start = np.zeros((shape.tokens, CHANNELS)) if initial is None else initial[0].astype(np.float64)
    noise = gaussian(seed, number, (shape.tokens, CHANNELS)).astype(np.float64)
    table = rope_tables(GRID, shape, RATE, AUDIO_TOKENS)["rope_time"]
    contexts = 4 * 0.3 - 2 * 0.2
    held = {} if strength is None else dict(enumerate(given.first_frames[number - 1][0].astype(np.float64)))
    x = (1 - SIGMAS[0]) * start + SIGMAS[0] * noise
    for token, frame in held.items():
        x[token] = strength * frame + (1 - strength) * x[token]
    trail = []
    for sigma, sigma_next in pairwise(SIGMAS):
        times = np.full((shape.tokens, 1), sigma)
        times[list(held)] = (1 - (strength or 0)) * sigma
        flow = velocity(x, times, given.audio_tokens, contexts, table)
        following = x + flow * (sigma_next - sigma)
        for token, frame in held.items():
            pulled = strength * frame + (1 - strength) * (x[token] - flow[token] * times[token])
            following[token] = x[token] + (x[token] - pulled) / sigma * (sigma_next - sigma)
        x = following
        trail.append(x)
    return trail


@pytest.mark.parametrize("strength", [None, 1.0, 0.7, 0.25, 0.0])
@pytest.mark.parametrize("number", [1, 2])
def test_the_loop_is_the_euler_sampler(number, strength):
    shape = (HALF, FULL)[number - 1]
    given = conditioning(strength)
    rng = np.random.default_rng(3)
    initial = None if number == 1 else rng.standard_normal((1, shape.tokens, CHANNELS)).astype(np.float32)
    found = [step.latent.copy() for step in stage(number, shape).run(given, initial, 11)]
    expected = euler(number, shape, given, initial, 11, strength)
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours[0], theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("number", [1, 2])
def test_full_strength_ends_in_the_first_frame(number):
    shape = (HALF, FULL)[number - 1]
    given = conditioning(1.0)
    *_, last = stage(number, shape).run(given, None, 5)
    first = given.first_frames[number - 1]
    np.testing.assert_allclose(last.latent[:, : shape.tokens_per_frame], first, atol=1e-6, rtol=0)


def test_the_stages_draw_from_their_own_streams():
    engine = ToyDenoiser()
    for number in (1, 2):
        list(stage(number, engine=engine).run(conditioning(None), None, 9))
    for number, capture in enumerate(engine.captures, start=1):
        np.testing.assert_array_equal(capture.first["latent"][0], gaussian(9, number, (HALF.tokens, CHANNELS)))
    assert not np.array_equal(engine.captures[0].first["latent"], engine.captures[1].first["latent"])


@pytest.mark.parametrize(("strength", "mask"), [(None, 1.0), (1.0, 0.0), (0.7, 0.3), (0.0, 1.0)])
def test_only_the_first_frame_is_conditioned(strength, mask):
    engine = ToyDenoiser()
    given = conditioning(strength)
    list(stage(2, FULL, engine=engine).run(given, np.ones((1, FULL.tokens, CHANNELS), np.float32), 1))
    feeds, count = engine.captures[0].first, FULL.tokens_per_frame
    np.testing.assert_allclose(feeds["mask"][0, :count], mask, rtol=1e-6)
    np.testing.assert_array_equal(feeds["mask"][0, count:], 1)
    np.testing.assert_array_equal(feeds["token_row"][:count], 1 if strength is None else 0)
    np.testing.assert_array_equal(feeds["token_row"][count:], 1)
    np.testing.assert_array_equal(feeds["clean"][:, count:], 1)
    np.testing.assert_array_equal(feeds["clean"][:, :count], 1 if strength is None else given.first_frames[1])


def test_the_tables_are_those_of_the_stages_own_canvas():
    engine = ToyDenoiser()
    for number, shape in ((1, HALF), (2, FULL)):
        list(stage(number, shape, engine=engine).run(conditioning(None), None, 0))
        for name, table in rope_tables(GRID, shape, RATE, AUDIO_TOKENS).items():
            np.testing.assert_array_equal(engine.captures[-1].first[name], table)


@pytest.mark.parametrize(
    ("preset", "counts"), [("low", (5, 2)), ("medium", (8, 2)), ("high", (8, 3)), ("maximum", (8, 3))]
)
def test_steps_report_where_they_are(preset, counts):
    found = load_preset(preset)
    for number, sigmas, count in zip((1, 2), (found.stage_1_sigmas, found.stage_2_sigmas), counts, strict=True):
        engine = ToyDenoiser()
        done = [
            (step.step, step.steps, step.sigma)
            for step in stage(number, sigmas=sigmas, engine=engine).run(conditioning(None), None, 0)
        ]
        assert done == [(index, count, sigmas[index]) for index in range(1, count + 1)]
        (capture,) = engine.captures
        np.testing.assert_array_equal(capture.sigmas, np.float32(list(pairwise(sigmas))))


def test_what_is_handed_in_is_left_alone():
    given, initial = conditioning(0.7), np.ones((1, HALF.tokens, CHANNELS), np.float32)
    before = given.first_frames[1].copy()
    list(stage(2, HALF, SIGMAS).run(conditioning(None), initial, 0))
    list(stage(2, FULL, SIGMAS).run(given, None, 0))
    np.testing.assert_array_equal(initial, 1)
    np.testing.assert_array_equal(given.first_frames[1], before)


def test_nothing_runs_before_it_is_asked_for():
    engine = ToyDenoiser()
    running = stage(engine=engine).run(conditioning(None), None, 0)
    assert engine.captures == []
    next(running)
    assert len(engine.captures[0].sigmas) == 1
    running.close()
    assert len(engine.captures[0].sigmas) == 1


def test_a_conditioning_that_does_not_fit_is_refused_by_name():
    given = conditioning(None)
    wide = Conditioning(
        text=given.text, audio_tokens=np.zeros((1, 5, 8), np.float32), first_frames=None, image_strength=1.0
    )
    with pytest.raises(EngineError, match="denoiser: audio_tokens has shape"):
        next(stage().run(wide, None, 0))
