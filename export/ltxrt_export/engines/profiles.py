# SPDX-License-Identifier: Apache-2.0
"""Optimisation profiles: which sizes every network of a bundle is compiled for.

A profile is a box: each symbol has its own range, though the sizes of one clip hang together (``Nv = f * h * w``).
What a network can really see are points of that box; ``Profile.corners`` are such points at its edges, and what
has to be tried or computed at extreme sizes takes those.

Profiles depend on the bundle and on the network alone, not on the preset that is built: presets that share a
network share its engine.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ltxrt.encoders import CONDITIONING_SAMPLE_RATE
from ltxrt.errors import EngineError
from ltxrt.manifest import EngineProfile, Manifest, NetworkEntry
from ltxrt.preset import Preset, load_preset
from ltxrt.shapes import LatentShape, audio_token_count, samples_for_frames

from .buckets import Buckets, Clip

__all__ = ["Profile", "Sizes", "concrete_shape", "network_profiles", "symbols_of"]

Sizes = dict[str, int]
#: Frames that the streaming decoder keeps from chunk to chunk.
CACHED_FRAMES = 2
_SYMBOLIC = re.compile(r"(?:(\d+)\*)?([A-Za-z_]\w*)")


@dataclass(frozen=True, slots=True)
class Profile:
    """One profile and points of it that the network can really see.

    Attributes:
        entry: Name and ranges, as the manifest keeps them.
        corners: Consistent sizes at the edges of the ranges; ``tuned`` is not among them.
    """

    entry: EngineProfile
    corners: tuple[Sizes, ...]

    @property
    def tuned(self) -> Sizes:
        """The sizes that the compiler picks its kernels for."""
        return {symbol: sizes[1] for symbol, sizes in self.entry.sizes.items()}

    def shapes(self, shape: Iterable[int | str]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Smallest, tuned and largest shape of a port."""
        entries = tuple(shape)
        low, tuned, high = (
            concrete_shape(entries, {symbol: sizes[index] for symbol, sizes in self.entry.sizes.items()})
            for index in range(3)
        )
        return low, tuned, high


def concrete_shape(shape: Iterable[int | str], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A port's shape at given sizes; ``"32*h"`` is 32 times the size of ``h``."""
    return tuple(entry if isinstance(entry, int) else _factor(entry) * sizes[_symbol(entry)] for entry in shape)


def symbols_of(network: NetworkEntry) -> tuple[str, ...]:
    """Symbols of the inputs, in the order in which they appear."""
    entries = (entry for port in network.inputs for entry in port.shape if isinstance(entry, str))
    return tuple(dict.fromkeys(_symbol(entry) for entry in entries))


def network_profiles(manifest: Manifest, key: str, buckets: Buckets) -> tuple[Profile, ...]:
    """Profiles of one network, in the order in which its engine numbers them.

    Raises:
        EngineError: A bucket has no clip that the network serves.
    """
    network = manifest.networks[key]
    if network.network == "text_encoder":
        return (_prompt_profile(manifest, network, buckets),)
    users = [load_preset(preset) for preset, keys in manifest.presets.items() if key in keys.values()]
    if not users:
        raise EngineError(f"{key}: no preset of the bundle uses this network")
    budget = max(preset.auto_pixels for preset in users)
    if manifest.model.auto_pixels is not None:
        budget = min(budget, manifest.model.auto_pixels)
    view = _VIEWS[network.network](manifest, users)
    profiles: list[Profile] = []
    for bucket in buckets.bucket:
        canvases = bucket.both_ways()
        parts = [(f"_{width}x{height}", ((width, height),)) for width, height in canvases]
        for suffix, calls in view.calls.items():
            for where, together in parts if view.by_canvas else [("", canvases)]:
                clips = [clip for canvas in together for clip in bucket.extremes(canvas)]
                tuned = calls(bucket.tuned(together[0], budget))[0]
                profile = _profile(network, f"{bucket.name}{suffix}{where}", calls, clips, tuned)
                if not any(_within(profile.entry, earlier.entry) for earlier in profiles):
                    profiles.append(profile)
    return tuple(profiles)


def _profile(network: NetworkEntry, name: str, calls: "Calls", clips: Iterable[Clip], tuned: Sizes) -> Profile:
    """The ranges that cover every call that some clips make, and the calls at their edges."""
    symbols = symbols_of(network)
    every = [
        {symbol: call[symbol] for symbol in symbols} for clip in clips for call in calls(clip) if _served(network, call)
    ]
    if not every or not _served(network, tuned):
        raise EngineError(f"{network.network}: profile {name} has no clip that this network serves")
    sizes: dict[str, tuple[int, int, int]] = {}
    for symbol in symbols:
        low, high = min(call[symbol] for call in every), max(call[symbol] for call in every)
        if not low <= tuned[symbol] <= high:
            raise EngineError(
                f"{network.network}: profile {name} is tuned for {symbol} = {tuned[symbol]}, outside of {low} to {high}"
            )
        sizes[symbol] = low, tuned[symbol], high
    return Profile(EngineProfile(name=name, sizes=sizes), _corners(every, symbols))


def _within(inner: EngineProfile, outer: EngineProfile) -> bool:
    """Whether a runtime that takes the first profile that fits would never get to ``inner``."""
    return all(
        outer.sizes[symbol][0] <= low and high <= outer.sizes[symbol][2]
        for symbol, (low, _, high) in inner.sizes.items()
    )


def _served(network: NetworkEntry, point: Sizes) -> bool:
    """Whether the network was exported for these sizes."""
    limits = network.shape_range
    return all(limits[s][0] <= size <= limits[s][1] for s, size in point.items() if s in limits)


def _corners(points: Iterable[Sizes], symbols: tuple[str, ...]) -> tuple[Sizes, ...]:
    """Points that are extreme in a symbol or in the product of all, once each."""
    unique = list({tuple(point.values()): point for point in points}.values())

    def volume(point: Sizes) -> int:
        return math.prod(size + 1 for size in point.values())

    chosen: list[Sizes] = []
    for pattern in dict.fromkeys(tuple(size == 0 for size in point.values()) for point in unique):
        # Empty tensors are another case, not a smaller one: each pattern of them has corners of its own.
        alike = [point for point in unique if tuple(size == 0 for size in point.values()) == pattern]
        chosen += [min(alike, key=volume), max(alike, key=volume)]
        chosen += [max(alike, key=_first_by(symbol, volume)) for symbol in symbols]
    return tuple({tuple(point.values()): point for point in chosen}.values())


def _first_by(symbol: str, then: Callable[[Sizes], int]) -> Callable[[Sizes], tuple[int, int]]:
    return lambda point: (point[symbol], then(point))


def _prompt_profile(manifest: Manifest, network: NetworkEntry, buckets: Buckets) -> Profile:
    (symbol,) = symbols_of(network)
    low, high = network.shape_range[symbol]
    high = min(high, manifest.model.context_tokens)
    tuned = min(max(low, buckets.prompt_tokens), high)
    entry = EngineProfile(name="prompt", sizes={symbol: (low, tuned, high)})
    return Profile(entry, ({symbol: low}, {symbol: high}))


# --- what each network is called with for one clip ---

Calls = Callable[[Clip], list[Sizes]]


class _View(NamedTuple):
    """How a network sees a clip.

    Attributes:
        calls: Profiles by suffix of their name: what each is called with, the typical call first.
        by_canvas: Whether each canvas gets a profile of its own.
    """

    calls: Mapping[str, Calls]
    by_canvas: bool = False


def _audio(_manifest: Manifest, _users: Iterable[Preset]) -> _View:
    return _View(
        {"": lambda clip: [{"samples": samples_for_frames(clip.canvas.frames, clip.rate, CONDITIONING_SAMPLE_RATE)}]}
    )


def _image(_manifest: Manifest, _users: Iterable[Preset]) -> _View:
    def calls(clip: Clip) -> list[Sizes]:
        grids = clip.canvas.to_latent(), clip.canvas.halved().to_latent()
        return [{"h": grid.height, "w": grid.width} for grid in grids]

    return _View({"": calls})


def _denoiser(_manifest: Manifest, _users: Iterable[Preset]) -> _View:
    """Stage 1 and stage 2 differ by a factor of four in tokens: a profile each."""

    def calls(clip: Clip, grid: LatentShape) -> list[Sizes]:
        audio = audio_token_count(clip.canvas.frames, clip.rate)
        return [{"Nv": grid.tokens, "Na": audio, "f": grid.frames, "h": grid.height, "w": grid.width}]

    return _View(
        {
            "_half": lambda clip: calls(clip, clip.canvas.halved().to_latent()),
            "_full": lambda clip: calls(clip, clip.canvas.to_latent()),
        }
    )


def _upsampler(_manifest: Manifest, _users: Iterable[Preset]) -> _View:
    def calls(clip: Clip) -> list[Sizes]:
        grid = clip.canvas.halved().to_latent()
        return [{"f": grid.frames, "h": grid.height, "w": grid.width}]

    return _View({"": calls})


def _video_decoder(manifest: Manifest, users: Iterable[Preset]) -> _View:
    """The first chunk (which may be the only one), those after it and the last, told apart by tensors of length 0.

    Each has a profile of its own, and so has every canvas: with that the largest sizes of a profile are those of a
    call. A chunk that is first, last and has a cache would give twice the frames of any that there is. The last one is
    a single latent frame long (``chunk_lengths`` of the runtime), and gives all frames that were held back.
    """
    first = manifest.model.stream.first_chunk_latents
    chunks = sorted({preset.decode_chunk_latents for preset in users}, reverse=True)

    def size(grid: LatentShape, latents: int, edges: tuple[int, int], cached: int) -> Sizes:
        return {"n": latents, "p": edges[0], "q": edges[1], "c": cached, "h": grid.height, "w": grid.width}

    def opening(clip: Clip) -> list[Sizes]:
        grid = clip.canvas.to_latent()
        if grid.frames > first:
            return [size(grid, first, (1, 0), 0)]
        # A clip of exactly that length is the largest only chunk, whichever lengths the bucket has.
        return [size(grid, latents, (1, 1), 0) for latents in (grid.frames, first)]

    def following(clip: Clip) -> list[Sizes]:
        grid = clip.canvas.to_latent()
        return [size(grid, latents, (0, 0), CACHED_FRAMES) for latents in (*chunks, *range(1, chunks[0]))]

    def closing(clip: Clip) -> list[Sizes]:
        return [size(clip.canvas.to_latent(), 1, (0, 1), CACHED_FRAMES)]

    return _View({"_first": opening, "_next": following, "_last": closing}, by_canvas=True)


_VIEWS: dict[str, Callable[[Manifest, Iterable[Preset]], _View]] = {
    "audio_encoder": _audio,
    "image_encoder": _image,
    "denoiser": _denoiser,
    "upsampler": _upsampler,
    "video_decoder": _video_decoder,
}


def _factor(entry: str) -> int:
    return int(_match(entry)[1] or 1)


def _symbol(entry: str) -> str:
    return _match(entry)[2]


def _match(entry: str) -> re.Match[str]:
    match = _SYMBOLIC.fullmatch(entry)
    if match is None:
        raise EngineError(f"{entry!r} is neither a symbol nor size*symbol")
    return match
