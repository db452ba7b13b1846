# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for tests of everything around the engines: shapes and dtypes are right, contents are constant.

``fake_pipeline()`` takes requests and gives playable MP4 bytes of a grey picture within milliseconds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from .bundle import Bundle
from .engine import Array, Capture, TensorSpec, check_feeds
from .engine_store import Engines, EngineStore
from .manifest import NETWORK_NAMES, Manifest, ModelEntry, NetworkEntry, StreamEntry, TensorEntry
from .pipeline import Pipeline
from .preset import PRESET_NAMES, load_preset
from .rope import RopeGrid
from .tokenizer import PromptTokenizer

__all__ = ["FakeCapture", "FakeEngine", "fake_engines", "fake_pipeline"]

_CONTEXT_TOKENS, _WIDTH, _CHANNELS = 16, 12, 128
_GREY = 128

Sizes = Mapping[str, int]


@dataclass(slots=True)
class FakeEngine:
    """An engine that checks its feeds and gives constant outputs (see ``Engine``).

    Attributes:
        name: Network name.
        inputs: Declared inputs.
        outputs: Declared outputs; symbols must occur in the inputs or in ``derived``.
        derived: Sizes of further symbols, from those of the inputs.
        value: What every output element holds.
        calls: Feeds of every run and replay, for assertions.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    derived: Callable[[Sizes], Sizes] = field(default=lambda sizes: {})
    value: int = 0
    calls: list[Mapping[str, Array]] = field(default_factory=list[Mapping[str, Array]])

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See ``Engine.run``."""
        sizes = check_feeds(self.name, self.inputs, feeds)
        self.calls.append({name: np.array(value) for name, value in feeds.items()})
        known = {**sizes, **self.derived(sizes)}
        return {
            spec.name: np.full([s if isinstance(s, int) else known[s] for s in spec.shape], self.value, spec.dtype)
            for spec in self.outputs
        }

    def capture(self, feeds: Mapping[str, Array]) -> Capture:
        """See ``Engine.capture``."""
        check_feeds(self.name, self.inputs, feeds)
        return FakeCapture(self, {name: np.array(value) for name, value in feeds.items()})


@dataclass(slots=True)
class FakeCapture:
    """A captured fake (see ``Capture``)."""

    engine: FakeEngine
    inputs: dict[str, Array]
    outputs: dict[str, Array] = field(default_factory=dict[str, Array])

    def replay(self) -> None:
        """See ``Capture.replay``."""
        self.outputs = self.engine.run(self.inputs)


def fake_engines() -> Engines:
    """Six fakes with the ports of the real networks at a toy width; the decoder streams without look-ahead."""
    return Engines(**{name: _fake(name) for name in NETWORK_NAMES})


def fake_pipeline() -> Pipeline:
    """A pipeline on fake engines, with every preset."""
    networks = {name: _entry(name) for name in NETWORK_NAMES}
    manifest = Manifest(
        model=ModelEntry(
            name="fake",
            version="2.3.0",
            checkpoint_sha256="0" * 64,
            semantics="R3",
            licence="none",
            context_tokens=_CONTEXT_TOKENS,
            latent_channels=_CHANNELS,
            image_crf=33,
            auto_pixels=128 * 128,
            rope_max_position=(20.0, 2048.0, 2048.0),
            stream=StreamEntry(states=(), first_chunk_latents=1),
        ),
        files={},
        networks=networks,
        presets={preset: {name: name for name in NETWORK_NAMES} for preset in PRESET_NAMES},
        made_with={},
    )
    full = load_preset("high")
    grid = RopeGrid(np.ones(_WIDTH // 6, np.float32), np.ones(_WIDTH // 4, np.float32), (20.0, 2048.0, 2048.0))
    bundle = Bundle(Path(), manifest, grid, (full.stage_1_sigmas, full.stage_2_sigmas))
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<bos>": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return Pipeline(bundle, _FakeStore(bundle), PromptTokenizer(tokenizer, _CONTEXT_TOKENS))


class _FakeStore(EngineStore):
    def engines(self, preset: str) -> Engines:
        self._bundle.network(preset, "denoiser")
        return fake_engines()


def _spec(text: str) -> TensorSpec:
    """``"latent float32 1,Nv,128"`` as a spec."""
    name, dtype, axes = text.split()
    return TensorSpec(name, dtype, tuple(int(axis) if axis.isdigit() else axis for axis in axes.split(",")))


_TEXT = f"1,{_CONTEXT_TOKENS},{_WIDTH}"
_PORTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "text_encoder": (("input_ids int64 1,n",), (f"video_context float32 {_TEXT}", f"audio_context float32 {_TEXT}")),
    "audio_encoder": (("waveform float32 1,2,samples",), (f"audio_tokens float32 1,Na,{_CHANNELS}",)),
    "image_encoder": (("image float32 1,3,1,H,W",), (f"image_tokens float32 1,hw,{_CHANNELS}",)),
    "denoiser": (
        (
            f"latent float32 1,Nv,{_CHANNELS}",
            f"clean float32 1,Nv,{_CHANNELS}",
            "mask float32 1,Nv,1",
            f"audio_tokens float32 1,Na,{_CHANNELS}",
            f"video_context float32 {_TEXT}",
            f"audio_context float32 {_TEXT}",
            "token_row int64 Nv",
            "sigma float32 1",
            "sigma_next float32 1",
            f"rope_time float32 2,f,{_WIDTH // 6}",
            f"rope_height float32 2,h,{_WIDTH // 6}",
            f"rope_width float32 2,w,{_WIDTH // 6}",
            f"rope_cross_time float32 2,f,{_WIDTH // 4}",
            f"rope_audio float32 2,Na,{_WIDTH // 4}",
        ),
        (f"latent_next float32 1,Nv,{_CHANNELS}",),
    ),
    "upsampler": (
        (f"latent float32 1,{_CHANNELS},f,h,w",),
        (f"upsampled float32 1,{_CHANNELS},f,2h,2w",),
    ),
    "video_decoder": (
        (f"latent float32 1,{_CHANNELS},n,h,w", "first float32 p", "last float32 q"),
        ("frames uint8 T,rows,columns",),
    ),
}

_DERIVED: dict[str, Callable[[Sizes], Sizes]] = {
    "audio_encoder": lambda sizes: {"Na": sizes["samples"] // 640 + 1},
    "image_encoder": lambda sizes: {"hw": sizes["H"] * sizes["W"] // 1024},
    "upsampler": lambda sizes: {"2h": 2 * sizes["h"], "2w": 2 * sizes["w"]},
    "video_decoder": lambda sizes: {
        "T": 8 * sizes["n"] - 7 * sizes["p"],
        "rows": 48 * sizes["h"],
        "columns": 32 * sizes["w"],
    },
}


def _fake(name: str) -> FakeEngine:
    inputs, outputs = _PORTS[name]
    derived = _DERIVED.get(name, lambda sizes: {})
    value = _GREY if name == "video_decoder" else 0
    return FakeEngine(name, tuple(map(_spec, inputs)), tuple(map(_spec, outputs)), derived, value)


def _entry(name: str) -> NetworkEntry:
    ports = [
        tuple(TensorEntry(name=spec.name, dtype=spec.dtype, shape=spec.shape) for spec in map(_spec, texts))
        for texts in _PORTS[name]
    ]
    return NetworkEntry.model_validate(
        {
            "network": name,
            "file": f"{name}.onnx",
            "weights": (),
            "precision": "fp32",
            "opset": 23,
            "inputs": ports[0],
            "outputs": ports[1],
            "shape_range": {},
        }
    )
