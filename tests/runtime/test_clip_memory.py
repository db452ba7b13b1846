# SPDX-License-Identifier: Apache-2.0
"""What a clip takes of a GPU's memory: exact where it can be, larger for larger clips, and refused in words."""

import json
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ltxrt import cli
from ltxrt.bundle import Bundle
from ltxrt.clip_memory import PHASES, ClipSize, clip_calls, clip_memory, largest_that_fits
from ltxrt.errors import EngineError, RequestError
from ltxrt.gpu_store import residency_for
from ltxrt.manifest import NETWORK_NAMES, EngineEntry, EngineKey, EngineProfile, FileEntry
from ltxrt.shapes import PixelShape

RATE = Fraction(24)
MIB = 1024**2


@pytest.fixture(scope="module")
def bundle():
    return Bundle.open()


def clip(width=256, height=128, frames=121):
    return ClipSize(PixelShape(frames, height, width), RATE)


def engines(bundle, plan_bytes, scratch=None):
    """An engine for every network, each plan of so many bytes: the bundle with their files, and the entries."""
    files, entries = dict(bundle.manifest.files), {}
    for name in NETWORK_NAMES:
        file = f"engines/{name}.plan"
        files[file] = FileEntry(sha256="0" * 64, bytes=plan_bytes)
        key = EngineKey(
            schema_version=1,
            onnx_sha256="0" * 64,
            weights_sha256=(),
            gpu_name="x",
            compute_capability="9.0",
            tensorrt_version="11.4",
            cuda_version="13.0",
            profiles=(
                EngineProfile(name="short", sizes={"f": (1, 8, 16)}),
                EngineProfile(name="long", sizes={"f": (1, 30, 61)}),
            ),
            options={},
        )
        entries[name] = EngineEntry(
            network=bundle.manifest.presets["high"][name],
            file=file,
            layers=file,
            key=key,
            key_sha256="0" * 64,
            built_with={} if scratch is None else {"scratch_bytes": scratch},
        )
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"files": files})), entries


def request(memory, name):
    return next(place.request for place in memory.plan.placements if place.request.name == name)


def test_sizes_of_inputs_and_outputs_are_exact(bundle):
    memory = clip_memory(bundle, "high", clip())
    assert request(memory, "text inputs").size_bytes == 8 * 128
    assert request(memory, "text outputs").size_bytes == 4 * 128 * (128 + 64)
    tokens = 16 * 4 * 8
    assert request(memory, "denoise_2 outputs").size_bytes == 4 * tokens * 32
    assert request(memory, "upsample outputs").size_bytes == 4 * tokens * 32
    assert request(memory, "upsample inputs").size_bytes == tokens * 32
    assert request(memory, "denoise_2 inputs").size_bytes > 4 * tokens * (32 + 32 + 1)
    frames = 8 * 8 * 128 * 256 * 3 // 2
    assert request(memory, "decode outputs").size_bytes > frames


def test_what_is_kept_is_there_until_it_is_read_last(bundle):
    memory, order = clip_memory(bundle, "high", clip()), tuple(PHASES)
    assert order[request(memory, "text outputs").last] == "denoise_2"
    assert order[request(memory, "denoise_1 outputs").last] == "upsample"
    assert order[request(memory, "denoise_2 outputs").last] == "decode"
    assert (request(memory, "audio inputs").first, request(memory, "audio inputs").last) == (1, 1)
    weights = [place.request for place in memory.plan.placements if "weights" in place.request.name]
    assert len(weights) == 3  # three files, shared by six networks
    assert all((one.first, one.last) == (0, 6) for one in weights)
    assert request(memory, "working memory of all engines").size_bytes == max(memory.working.values())
    assert not memory.measured


def test_released_text_weights_make_room_for_what_follows(bundle):
    made, entries = engines(bundle, 100 * MIB)
    kept = clip_memory(made, "high", clip(), entries)
    released = clip_memory(made, "high", clip(), entries, release_text=True)
    assert request(kept, "text_encoder weights").last == 6
    assert request(released, "text_encoder weights").last == 0
    assert released.plan.peak_bytes <= kept.plan.peak_bytes
    assert released.plan.live_bytes(6) == kept.plan.live_bytes(6) - 100 * MIB


def test_an_engine_s_own_figure_counts(bundle):
    made, entries = engines(bundle, MIB, scratch=f"{5 * MIB},{700 * MIB}")
    short, long = (clip_memory(made, "high", clip(frames=frames), entries) for frames in (121, 241))
    assert short.measured
    assert short.working["denoise_2"] == 5 * MIB
    assert long.working["denoise_2"] == 700 * MIB


def test_a_loaded_engine_s_figure_counts_first(bundle):
    made, entries = engines(bundle, MIB, scratch=f"{5 * MIB},{700 * MIB}")
    asked = []

    def told(calls):
        asked.append(list(calls))
        return 9 * MIB

    memory = clip_memory(made, "high", clip(), entries, working={"video_decoder": told})
    assert memory.working["decode"] == 9 * MIB
    assert memory.working["denoise_2"] == 5 * MIB
    (calls,) = asked
    # Sixteen latent frames: the first chunk has no cache, the others have one, the last one ends the clip.
    assert {(call["p"], call["q"], call["c"]) for call in calls} == {(1, 0, 0), (0, 0, 2), (0, 1, 2)}
    assert max(call["n"] for call in calls) == 8


def test_calls_are_those_that_a_clip_makes(bundle):
    half, full = (clip_calls(bundle, "high", clip(), phase)[0] for phase in ("denoise_1", "denoise_2"))
    assert (half["Nv"], full["Nv"]) == (16 * 2 * 4, 16 * 4 * 8)
    assert half["Na"] == full["Na"]
    assert [(call["h"], call["w"]) for call in clip_calls(bundle, "high", clip(), "image")] == [(4, 8), (2, 4)]
    (only,) = clip_calls(bundle, "high", clip(frames=33), "decode")
    assert (only["n"], only["p"], only["q"], only["c"]) == (5, 1, 1, 0)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 20), st.integers(2, 20), st.integers(1, 40), st.sampled_from(["width", "height", "frames"]))
def test_more_never_takes_less(width, height, latents, side):
    bundle = Bundle.open()
    small = {"width": 64 * width, "height": 64 * height, "frames": 8 * latents + 1}
    large = {**small, side: small[side] + (8 if side == "frames" else 64)}
    assert (
        clip_memory(bundle, "high", clip(**small)).needed_bytes
        <= clip_memory(bundle, "high", clip(**large)).needed_bytes
    )


def test_the_largest_that_fits_is_the_largest(bundle):
    limit = clip_memory(bundle, "high", clip(704, 384)).needed_bytes

    def fits(size):
        return clip_memory(bundle, "high", size).needed_bytes <= limit

    found = largest_that_fits(clip(1280, 704), fits)
    assert found is not None
    assert fits(found)
    height, width = found.canvas.height, found.canvas.width
    assert not fits(clip(round(1280 * (height + 64) / 704 / 64) * 64, height + 64))
    assert abs(width / height - 1280 / 704) < 0.2
    assert found.canvas.frames == 121
    assert largest_that_fits(clip(1280, 704), lambda size: False) is None


# --- residency ---


def needed(made, entries, size, *, release):
    return clip_memory(made, "high", size, entries, release_text=release).needed_bytes


def test_everything_stays_while_it_fits(bundle):
    made, entries = engines(bundle, 300 * MIB)
    size = clip(1280, 704)
    kept, released = (needed(made, entries, size, release=release) for release in (False, True))
    assert released < kept
    assert residency_for((made, "high"), size, kept, entries) == "resident"
    assert residency_for((made, "high"), size, kept - 1, entries) == "release_text"
    assert residency_for((made, "high"), size, released, entries) == "release_text"


def test_what_does_not_fit_is_refused_with_what_would(bundle):
    made, entries = engines(bundle, 100 * MIB)
    available = needed(made, entries, clip(704, 384), release=True)
    with pytest.raises(EngineError) as caught:
        residency_for((made, "high"), clip(1280, 704), available, entries)
    text = str(caught.value)
    assert text.startswith("1280x704, 121 frames at high takes ")
    assert "(estimated)" in text
    assert "can be had: the largest that would fit is " in text
    assert text.endswith(", 121 frames")
    with pytest.raises(EngineError, match="no size of this length fits"):
        residency_for((made, "high"), clip(1280, 704), 5, entries)


# --- ltxrt inspect --memory ---


def test_the_plan_as_text(capsys):
    assert cli.run(["inspect", "--memory"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("memory on a GPU, 256x128, 121 frames; working memory estimated, never measured on a GPU\n")
    assert "working memory of all engines" in out
    assert "peak " in out.splitlines()[-1]


def test_the_plan_as_json(capsys):
    assert cli.run(["inspect", "--memory", "--json", "--clip", "128x192x10", "--preset", "low"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["clip"] == "128x192, 17 frames"
    assert told["phases"] == list(PHASES)
    assert told["peak_bytes"] == max(place["offset"] + place["bytes"] for place in told["placements"])
    assert told["needed_bytes"] == told["peak_bytes"] + told["process_bytes"]


@pytest.mark.parametrize("text", ["100x128x9", "128x128", "128x128x0", "wide"])
def test_a_clip_that_is_none(text, capsys):
    assert cli.run(["inspect", "--memory", "--clip", text]) == RequestError.exit_code
    assert f"clip: '{text}' is not allowed; allowed: WIDTHxHEIGHTxFRAMES" in capsys.readouterr().err
    assert cli.run(["inspect", "--memory", "--preset", "best"]) == RequestError.exit_code
