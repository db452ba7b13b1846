# SPDX-License-Identifier: Apache-2.0
"""Profiles: every clip of a bucket fits one, corners are calls that really happen, data errors are named."""

import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ltxrt.bundle import Bundle
from ltxrt.errors import EngineError, ExportError
from ltxrt.manifest import NETWORK_NAMES, EngineProfile, Manifest
from ltxrt.plan import auto_size
from ltxrt.preset import PRESET_NAMES, load_preset
from ltxrt.request import NAMED_SIZES
from ltxrt.shapes import PixelShape, audio_token_count, chunk_lengths, covering_frames, frame_rate, samples_for_frames
from ltxrt_export.engines.buckets import Bucket, Buckets, load_buckets
from ltxrt_export.engines.profiles import Profile, concrete_shape, network_profiles, symbols_of

BUCKETS = load_buckets()
MANIFEST = Bundle.open().manifest
PROFILES = {
    MANIFEST.networks[key].network: network_profiles(MANIFEST, key, BUCKETS)
    for key in MANIFEST.presets["high"].values()
}
SIDES = range(128, 2049, 64)


def fits(network: str, sizes: dict[str, int]) -> bool:
    """Whether a profile has all of these sizes."""
    return any(
        all(profile.entry.sizes[symbol][0] <= size <= profile.entry.sizes[symbol][2] for symbol, size in sizes.items())
        for profile in PROFILES[network]
    )


def calls(frames: int, rate_value: float, width: int, height: int) -> list[tuple[str, dict[str, int]]]:
    """What the runtime runs for a clip, told from the runtime's own functions."""
    rate = frame_rate(rate_value)
    canvas = PixelShape(covering_frames(frames), height, width)
    half, full = canvas.halved().to_latent(), canvas.to_latent()
    audio = audio_token_count(canvas.frames, rate)
    found = [("audio_encoder", {"samples": samples_for_frames(canvas.frames, rate, 16000)})]
    for grid in (half, full):
        found.append(("image_encoder", {"h": grid.height, "w": grid.width}))
        sizes = {"Nv": grid.tokens, "Na": audio, "f": grid.frames, "h": grid.height, "w": grid.width}
        found.append(("denoiser", sizes))
    found.append(("upsampler", {"f": half.frames, "h": half.height, "w": half.width}))
    first, rest = MANIFEST.model.stream.first_chunk_latents, load_preset("high").decode_chunk_latents
    lengths = chunk_lengths(full.frames, first, rest)
    for index, length in enumerate(lengths):
        sizes = {"n": length, "h": full.height, "w": full.width, "c": 2 if index else 0}
        found.append(("video_decoder", sizes | {"p": int(index == 0), "q": int(index == len(lengths) - 1)}))
    return found


@settings(deadline=None)
@given(st.data())
def test_every_clip_of_a_bucket_fits_a_profile_of_every_network(data: st.DataObject) -> None:
    bucket = data.draw(st.sampled_from(BUCKETS.bucket))
    canvas = data.draw(st.sampled_from(bucket.both_ways()))
    width, height = (data.draw(st.sampled_from([side for side in SIDES if side <= limit])) for limit in canvas)
    frames = data.draw(st.integers(bucket.frames[0], bucket.frames[2]))
    rate = data.draw(st.floats(bucket.frames_per_second[0], bucket.frames_per_second[2]))
    for network, sizes in calls(frames, rate, width, height):
        assert fits(network, sizes), (network, sizes)


@pytest.mark.parametrize(("width", "height"), NAMED_SIZES.values(), ids=NAMED_SIZES)
def test_every_named_size_is_served_at_every_length(width: int, height: int) -> None:
    for frames, rate in ((9, 60.0), (481, 24.0), (481, 1.0)):
        for network, sizes in calls(frames, rate, width, height):
            assert fits(network, sizes), (network, sizes)


@given(st.fractions(Fraction(1, 16), 16), st.sampled_from(PRESET_NAMES))
def test_every_automatic_size_is_served_at_every_length(aspect: Fraction, preset: str) -> None:
    width, height = auto_size(aspect, load_preset(preset).auto_pixels)
    for frames, rate in ((9, 60.0), (481, 1.0)):
        for network, sizes in calls(frames, rate, width, height):
            assert fits(network, sizes), (network, sizes)


def test_a_clip_outside_of_the_buckets_does_not_fit() -> None:
    for width, height, frames in ((2048, 2048, 9), (1344, 1344, 481), (1920, 1088, 9)):
        found = [fits(network, sizes) for network, sizes in calls(frames, 24.0, width, height)]
        assert not all(found)


@pytest.mark.parametrize("network", NETWORK_NAMES)
def test_ranges_are_ordered_and_within_what_the_network_serves(network: str) -> None:
    entry = MANIFEST.networks[MANIFEST.presets["high"][network]]  # type: ignore[index]
    names = [profile.entry.name for profile in PROFILES[network]]
    assert len(set(names)) == len(names) > 0
    for profile in PROFILES[network]:
        assert tuple(profile.entry.sizes) == symbols_of(entry)
        for symbol, (low, tuned, high) in profile.entry.sizes.items():
            assert entry.shape_range[symbol][0] <= low <= tuned <= high <= entry.shape_range[symbol][1]


def test_corners_are_calls_that_a_clip_makes() -> None:
    for network, profiles in PROFILES.items():
        for profile in profiles:
            assert profile.corners
            for corner in profile.corners:
                assert all(low <= corner[s] <= high for s, (low, _, high) in profile.entry.sizes.items()), network
            for symbol, (low, _, high) in profile.entry.sizes.items():
                assert {corner[symbol] for corner in profile.corners} >= {low, high} - ({0} if low == 0 else set())
    for profile in PROFILES["denoiser"]:
        assert all(c["Nv"] == c["f"] * c["h"] * c["w"] for c in profile.corners)
    kinds = {(c["p"], c["q"], c["c"]) for profile in PROFILES["video_decoder"] for c in profile.corners}
    assert kinds == {(1, 1, 0), (1, 0, 0), (0, 0, 2), (0, 1, 2)}  # only, first, middle, last chunk


def test_the_largest_sizes_of_a_decoder_profile_are_those_of_a_call() -> None:
    names = [profile.entry.name for profile in PROFILES["video_decoder"]]
    assert names == [f"short_{part}_{size}" for part in ("first", "next", "last") for size in CANVASES]
    for profile in PROFILES["video_decoder"]:
        assert {symbol: sizes[2] for symbol, sizes in profile.entry.sizes.items()} in profile.corners


CANVASES = ("2048x896", "896x2048", "1344x1344")


def test_stages_have_profiles_of_their_own() -> None:
    half, full = (
        next(p for p in PROFILES["denoiser"] if p.entry.name == f"short_{stage}") for stage in ("half", "full")
    )
    assert full.tuned["Nv"] == 4 * half.tuned["Nv"]
    assert full.tuned["Na"] == half.tuned["Na"]


def test_a_profile_that_no_clip_would_reach_is_left_out() -> None:
    assert [profile.entry.name for profile in PROFILES["image_encoder"]] == ["short"]
    assert not [name for name in (p.entry.name for p in PROFILES["video_decoder"]) if name.startswith("long")]
    names = [profile.entry.name for profile in PROFILES["denoiser"]]
    assert names == ["short_half", "short_full", "long_half", "long_full"]


def with_presets(manifest: Manifest, presets: list[str]) -> Manifest:
    return manifest.model_copy(update={"presets": {name: manifest.presets[name] for name in presets}})


def test_profiles_do_not_depend_on_the_preset_that_is_built() -> None:
    key = MANIFEST.presets["high"]["denoiser"]
    forwards = network_profiles(with_presets(MANIFEST, ["low", "high"]), key, BUCKETS)
    backwards = network_profiles(with_presets(MANIFEST, ["high", "low"]), key, BUCKETS)
    assert forwards == backwards


def test_tuned_for_the_largest_budget_of_the_presets_that_share_a_network() -> None:
    free = MANIFEST.model_copy(update={"model": MANIFEST.model.model_copy(update={"auto_pixels": None})})
    key = MANIFEST.presets["high"]["upsampler"]

    def tuned(presets: list[str]) -> int:
        sizes = network_profiles(with_presets(free, presets), key, BUCKETS)[0].tuned
        return sizes["h"] * sizes["w"] * 64 * 64

    assert tuned(["low"]) < tuned(["high"]) < tuned(["maximum"]) == tuned(["low", "maximum"])
    assert load_preset("maximum").auto_pixels / 2 <= tuned(["maximum"]) <= load_preset("maximum").auto_pixels


def test_shapes_of_a_port() -> None:
    profile = Profile(EngineProfile(name="p", sizes={"h": (1, 2, 4), "n": (0, 1, 1)}), ())
    assert profile.shapes((1, "32*h", "n")) == ((1, 32, 0), (1, 64, 1), (1, 128, 1))
    assert concrete_shape(("1*h", 3), {"h": 5}) == (5, 3)
    with pytest.raises(EngineError, match="'h\\+1' is neither a symbol nor size\\*symbol"):
        concrete_shape(("h+1",), {"h": 1})


def test_a_network_that_serves_no_clip_of_a_bucket_is_an_error() -> None:
    key = MANIFEST.presets["high"]["upsampler"]
    network = MANIFEST.networks[key].model_copy(update={"shape_range": {"f": (1, 1), "h": (1, 1), "w": (1, 1)}})
    manifest = MANIFEST.model_copy(update={"networks": {**MANIFEST.networks, key: network}})
    with pytest.raises(EngineError, match="upsampler: profile short has no clip that this network serves"):
        network_profiles(manifest, key, BUCKETS)


def test_a_network_that_no_preset_uses_is_an_error() -> None:
    with pytest.raises(EngineError, match="no preset of the bundle uses this network"):
        network_profiles(with_presets(MANIFEST, []), MANIFEST.presets["high"]["denoiser"], BUCKETS)


def test_a_tuned_size_outside_of_the_bucket_is_an_error() -> None:
    wide = Bucket(name="wide", frames=(121, 121, 121), frames_per_second=(24, 24, 24), canvases=((256, 256),))
    network = MANIFEST.networks[MANIFEST.presets["high"]["denoiser"]]
    low = network.model_copy(update={"shape_range": {**network.shape_range, "Nv": (300, 400)}})
    manifest = MANIFEST.model_copy(update={"networks": {**MANIFEST.networks, network_key(): low}})
    with pytest.raises(EngineError, match=r"denoiser: profile wide_half has no clip that this network serves"):
        network_profiles(manifest, network_key(), Buckets(prompt_tokens=8, bucket=(wide,)))


def network_key() -> str:
    return MANIFEST.presets["high"]["denoiser"]


def test_a_canvas_below_the_automatic_size_is_tuned_for_itself() -> None:
    small = Bucket(name="small", frames=(9, 9, 9), frames_per_second=(24, 24, 24), canvases=((128, 128),))
    profiles = network_profiles(MANIFEST, network_key(), Buckets(prompt_tokens=8, bucket=(small,)))
    assert [profile.tuned["Nv"] for profile in profiles] == [8, 32]


# --- the data file ---

GOOD = """
prompt_tokens = 8
[[bucket]]
name = "only"
frames = [9, 33, 65]
frames_per_second = [12, 24, 30]
canvases = [[512, 256]]
"""


def test_a_file_of_buckets(tmp_path) -> None:
    path = tmp_path / "buckets.toml"
    path.write_text(GOOD)
    (bucket,) = load_buckets(path).bucket
    assert bucket.frames == (9, 33, 65)
    assert bucket.both_ways() == ((512, 256), (256, 512))
    extremes = list(bucket.extremes((512, 256)))
    assert {clip.canvas.frames for clip in extremes} == {9, 65}
    assert {(clip.canvas.width, clip.canvas.height) for clip in extremes} == {
        (128, 128),
        (128, 256),
        (512, 128),
        (512, 256),
    }
    assert bucket.tuned((512, 256), 192 * 128).canvas == PixelShape(33, 128, 192)
    assert bucket.tuned((256, 512), 10**6).canvas == PixelShape(33, 512, 256)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("frames = [9, 33, 65]", "frames = [33, 9, 65]"), "bucket.0: Value error, frames [33, 9, 65] do not rise"),
        (
            ("frames = [9, 33, 65]", "frames = [9, 33, 482]"),
            "bucket.0.frames.2: Input should be less than or equal to 481",
        ),
        (
            ("canvases = [[512, 256]]", "canvases = [[500, 256]]"),
            "bucket.0.canvases.0.0: Input should be a multiple of 64",
        ),
        (("canvases = [[512, 256]]", "canvases = []"), "bucket.0.canvases: Tuple should have at least 1 item"),
        (("prompt_tokens = 8", "prompt_tokens = 8\nmore = 1"), "more: Extra inputs are not permitted"),
        (("[[bucket]]", "[bucket]"), "bucket: Input should be a valid tuple"),
        (("prompt_tokens = 8", "prompt_tokens ="), "is not TOML"),
        (('name = "only"', 'name = "a b"'), "bucket.0.name: String should match pattern"),
        (("prompt_tokens = 8", "prompt_tokens = 8" + GOOD.partition("8")[2]), "names ['only', 'only'] recur"),
    ],
)
def test_a_file_that_is_not_of_that_form(tmp_path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "buckets.toml"
    path.write_text(GOOD.replace(*change))
    with pytest.raises(ExportError, match=re.escape(message)):
        load_buckets(path)


def test_a_file_that_is_not_there(tmp_path) -> None:
    with pytest.raises(ExportError, match=r"none\.toml cannot be read: No such file"):
        load_buckets(tmp_path / "none.toml")
