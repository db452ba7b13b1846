# SPDX-License-Identifier: Apache-2.0
"""The engines of a bundle: which backend this machine offers, and each network loaded once."""

import threading
from dataclasses import dataclass
from importlib import util

from .bundle import Bundle
from .engine import Engine
from .engine_onnx import OnnxEngine
from .errors import EngineError
from .manifest import NETWORK_NAMES
from .timing import TimedEngine, Timings

__all__ = ["Backend", "EngineStore", "Engines", "backends"]


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to run networks, and why it is off where it is.

    Attributes:
        name: ``onnxruntime-cpu``, ``tensorrt`` or ``onnxruntime-cuda``.
        available: Whether this version can run a bundle with it on this machine.
        reason: Why it is off, or what it is.
    """

    name: str
    available: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Engines:
    """The six networks that one clip runs through."""

    text_encoder: Engine
    audio_encoder: Engine
    image_encoder: Engine
    denoiser: Engine
    upsampler: Engine
    video_decoder: Engine

    def timed(self, timings: Timings) -> "Engines":
        """The same engines, counted in ``timings``."""
        return Engines(**{name: TimedEngine(getattr(self, name), timings) for name in NETWORK_NAMES})


class EngineStore:
    """Loads networks on first use and keeps them; presets share the networks that are equal. Thread-safe.

    Args:
        bundle: Where the networks are.
        threads: CPU threads within one operator; 0 uses every core.
    """

    def __init__(self, bundle: Bundle, *, threads: int = 0) -> None:
        self.backend = next(backend for backend in backends() if backend.available)
        self._bundle = bundle
        self._threads = threads
        self._loaded: dict[str, Engine] = {}
        self._lock = threading.Lock()

    def engines(self, preset: str) -> Engines:
        """The six engines of a preset, loaded.

        Raises:
            RequestError: The bundle lacks the preset.
            EngineError: A network cannot be loaded.
        """
        return Engines(**{name: self._engine(preset, name) for name in NETWORK_NAMES})

    def _engine(self, preset: str, name: str) -> Engine:
        entry = self._bundle.network(preset, name)
        with self._lock:
            if entry.file not in self._loaded:
                if not entry.file.endswith(".onnx"):
                    raise EngineError(
                        f"{name}: {entry.file} is not an ONNX graph, which is all {self.backend.name} runs"
                    )
                self._loaded[entry.file] = OnnxEngine(
                    name,
                    self._bundle.file(entry.file),
                    tuple(tensor.spec() for tensor in entry.inputs),
                    tuple(tensor.spec() for tensor in entry.outputs),
                    threads=self._threads,
                )
            return self._loaded[entry.file]


def backends() -> tuple[Backend, ...]:
    """Every backend, fastest first, with the reason where it is off."""
    return (
        Backend("tensorrt", False, _off("tensorrt", "TensorRT engines are not supported by this version of ltxrt yet")),
        Backend("onnxruntime-cuda", False, "not supported by this version of ltxrt yet"),
        Backend("onnxruntime-cpu", True, "runs everywhere"),
    )


def _off(module: str, otherwise: str) -> str:
    return otherwise if util.find_spec(module) else f"{otherwise} (and the Python package {module} is not installed)"
