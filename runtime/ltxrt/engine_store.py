# SPDX-License-Identifier: Apache-2.0
"""The engines of a bundle: the fastest backend that this machine offers for it, and each network loaded once."""

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .backends import Backend, Machine, backends, compiled_presets, this_machine
from .bundle import Bundle
from .clip_memory import ClipSize
from .engine import Engine
from .engine_onnx import OnnxEngine, return_freed_memory
from .errors import EngineError
from .manifest import NETWORK_NAMES, NetworkEntry
from .timing import TimedEngine, Timings

if TYPE_CHECKING:
    from .gpu_store import GpuStore

__all__ = ["Backend", "EngineStore", "Engines", "backends", "check_fits"]

#: What ONNX Runtime says of an operator that it has no CPU kernel for in the graph's type.
_NO_KERNEL = "Could not find an implementation"


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
        backend: Name of the backend; ``auto`` takes the fastest that is available.
        machine: What there is; None looks.

    Attributes:
        backend: The one that is used.

    Raises:
        EngineError: The named backend is off; the message has the reason.
    """

    def __init__(
        self, bundle: Bundle, *, threads: int = 0, backend: str = "auto", machine: Machine | None = None
    ) -> None:
        self._machine = machine or this_machine()
        self.backend = _chosen(backends(bundle, self._machine), backend)
        self._bundle = bundle
        self._threads = threads
        self._loaded: dict[str, Engine] = {}
        self._gpu: GpuStore | None = None
        self._lock = threading.Lock()

    def engines(self, preset: str) -> Engines:
        """The six engines of a preset, loaded.

        Raises:
            RequestError: The bundle lacks the preset.
            EngineError: A network cannot be loaded, or has no engine for this GPU.
        """
        entries = {name: self._bundle.network(preset, name) for name in NETWORK_NAMES}
        with self._lock:
            if self.backend.name == "onnxruntime-cpu":
                self._load_on_cpu(preset, entries)
                return Engines(**{name: self._loaded[entry.file] for name, entry in entries.items()})
            return Engines(**self._on_gpu(preset))

    def _load_on_cpu(self, preset: str, entries: Mapping[str, NetworkEntry]) -> None:
        missing = {entry.file: (name, entry) for name, entry in entries.items() if entry.file not in self._loaded}
        if not missing:
            return
        # One network's graph is worked through on one core; the smaller ones load beside the denoiser.
        with ThreadPoolExecutor(len(missing)) as threads:
            loading = [threads.submit(self._on_cpu, preset, name, entry) for name, entry in missing.values()]
        for network in loading:
            network.result()
        return_freed_memory()

    def _on_cpu(self, preset: str, name: str, entry: NetworkEntry) -> Engine:
        if entry.file not in self._loaded:
            if not entry.file.endswith(".onnx"):
                raise EngineError(f"{name}: {entry.file} is not an ONNX graph, which is all {self.backend.name} runs")
            if entry.precision == "bf16":
                raise self._not_on_a_cpu(preset, name, entry)
            try:
                self._loaded[entry.file] = OnnxEngine(
                    name,
                    self._bundle.file(entry.file),
                    tuple(tensor.spec() for tensor in entry.inputs),
                    tuple(tensor.spec() for tensor in entry.outputs),
                    threads=self._threads,
                )
            except EngineError as error:
                if _NO_KERNEL in str(error):
                    raise self._not_on_a_cpu(preset, name, entry) from error
                raise
        return self._loaded[entry.file]

    def _not_on_a_cpu(self, preset: str, name: str, entry: NetworkEntry) -> EngineError:
        """What to do with a network for which a CPU has no arithmetic."""
        manifest = self._bundle.manifest
        others = [
            other
            for other, networks in manifest.presets.items()
            if other != preset
            and all(manifest.networks[key].precision in ("fp32", "fp16") for key in networks.values())
        ]
        choose = f"choose video_quality {' or '.join(others)}, or " if others else ""
        return EngineError(
            f"{name}: preset {preset} is of precision {entry.precision}, for which ONNX Runtime has no CPU kernels: "
            f"{choose}run it on an NVIDIA GPU, or export the bundle with --backend cpu"
        )

    def _on_gpu(self, preset: str) -> dict[str, Engine]:
        if self.backend.name == "tensorrt":
            compiled = compiled_presets(self._bundle.manifest, self._machine)
            if preset not in compiled:
                raise EngineError(
                    f"preset {preset}: the bundle has engines for this GPU of {', '.join(compiled)} alone: choose one "
                    f"of these, or run ltxrt-export build --preset {preset}"
                )
        return self._gpu_store().engines(preset)

    def check(self, preset: str, size: ClipSize) -> None:
        """Refuse a clip that the GPU's memory cannot hold; a CPU's memory is not asked.

        Raises:
            EngineError: With the largest size that would fit.
        """
        if self.backend.name == "tensorrt":
            with self._lock:
                self._gpu_store().check(preset, size)

    def _gpu_store(self) -> "GpuStore":
        from .gpu_store import GpuStore  # which a machine without a GPU does not wait for

        if self._gpu is None:
            self._gpu = GpuStore(self._bundle, self._machine, compiled=self.backend.name == "tensorrt")
        return self._gpu


def check_fits(store: object, preset: str, size: ClipSize) -> None:
    """``EngineStore.check`` of a store; a stand-in for one knows no limits.

    Raises:
        EngineError: The clip does not fit.
    """
    if isinstance(store, EngineStore):
        store.check(preset, size)


def _chosen(offered: tuple[Backend, ...], name: str) -> Backend:
    if name == "auto":
        return next(backend for backend in offered if backend.available)
    for backend in offered:
        if backend.name == name:
            if not backend.available:
                raise EngineError(f"{name} is off: {backend.reason}")
            return backend
    raise EngineError(f"backend: {name!r} is not allowed; allowed: auto, {', '.join(b.name for b in offered)}")
