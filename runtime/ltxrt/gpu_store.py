# SPDX-License-Identifier: Apache-2.0
"""The engines of a bundle on a GPU: loaded in parallel, kept or given back, refused before they would not fit.

Weights stay on the GPU as long as everything fits. Where the weights fit and a clip's working memory beside them does
not, the text encoder is given back after each prompt and loaded again for the next. What does not fit even so is
refused before anything is loaded, with the largest size that would.

It has never run on a GPU; its tests run it on a device that is host memory.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from .backends import Machine
from .bundle import Bundle
from .clip_memory import (
    PHASES,
    ClipMemory,
    ClipSize,
    Working,
    clip_calls,
    clip_memory,
    largest_that_fits,
    process_bytes,
)
from .device_layout import open_layout
from .engine import Array, Capture, Engine, Tensor, TensorSpec, check_feeds
from .engine_device import Bound, DeviceEngine
from .engine_onnx_cuda import cuda_engine
from .engine_tensorrt import PlanFile, load_plans
from .errors import CapacityError, EngineError
from .graph import IdlePool
from .manifest import NETWORK_NAMES, EngineEntry, NetworkEntry
from .stream import Device, open_device
from .tensorrt_library import load_library
from .tensorrt_plans import fitting_engine, profile_for, unfit

__all__ = ["CAPTURES", "GpuStore", "Residency", "SwappedEngine", "residency_for"]

#: Captured shapes that are kept: two stages of two sizes of clip.
CAPTURES = 4

Residency = Literal["resident", "release_text"]


class GpuStore:
    """Engines on one GPU, loaded on first use and kept. Not for several threads at once: its user has a lock.

    Args:
        bundle: Where the networks are.
        machine: With a GPU.
        compiled: TensorRT's engines rather than ONNX Runtime.
        device: An opened device; None opens the machine's GPU.

    Attributes:
        device: The GPU.
        residency: Whether the text encoder stays.
        no_layout: Why latents go through the host between networks; empty where they do not.

    Raises:
        EngineError: The GPU cannot be opened.
    """

    no_layout = ""

    def __init__(self, bundle: Bundle, machine: Machine, *, compiled: bool, device: Device | None = None) -> None:
        self._bundle = bundle
        self._machine = machine
        self._compiled = compiled
        self.device = device or open_device()
        if self.device.layout is None:
            self.device.layout, self.no_layout = open_layout(self.device, bundle.manifest.model.latent_channels)
        self._captures: IdlePool[Bound] = IdlePool(CAPTURES)
        self.device.give_back_spare = lambda: self._captures.drop(lambda _: True)
        self._loaded: dict[str, Engine] = {}
        self.residency: Residency = "resident"

    def engines(self, preset: str) -> dict[str, Engine]:
        """The six engines of a preset, those that are missing loaded at the same time.

        Raises:
            EngineError: A network cannot be loaded, or the weights do not fit.
        """
        self.device.make_current()
        keys = {name: self._bundle.manifest.presets[preset][name] for name in NETWORK_NAMES}
        missing = [name for name in NETWORK_NAMES if keys[name] not in self._loaded]
        if missing:
            made = self._load_compiled(preset, missing) if self._compiled else self._load_graphs(preset, missing)
            self._loaded |= {keys[name]: engine for name, engine in made.items()}
        return {name: self._loaded[keys[name]] for name in NETWORK_NAMES}

    def check(self, preset: str, size: ClipSize) -> None:
        """Refuse a clip that no profile of an engine serves, or that the GPU's memory cannot hold beside the weights.

        Only compiled engines say what they take.

        Raises:
            CapacityError: With the limits; or with what is needed, what is free, and the largest size that would fit.
        """
        if not self._compiled:
            return
        entries = self._entries(preset)
        for phase, name in PHASES.items():
            for sizes in clip_calls(self._bundle, preset, size, phase):
                profile_for(name, entries[name].key, sizes)
        # What is held already is part of what the clip takes: weights, buffers, working memory, CUDA itself.
        held = sum(self._plan_bytes(entries[name]) for name in self._held(preset)) + self.device.held_bytes()
        available = self.device.free_bytes() + held + process_bytes()
        self.residency = residency_for((self._bundle, preset), size, available, entries, self._working(preset))
        if self.residency == "release_text":
            for engine in self._loaded.values():
                if isinstance(engine, SwappedEngine):
                    engine.release()

    def _working(self, preset: str) -> dict[str, Working]:
        """What those engines say that are loaded."""
        networks = self._bundle.manifest.presets[preset]
        loaded = {name: self._loaded.get(networks[name]) for name in NETWORK_NAMES}
        return {
            name: lambda calls, engine=engine: engine.working_bytes(calls) or 0
            for name, engine in loaded.items()
            if isinstance(engine, DeviceEngine)
        }

    def _held(self, preset: str) -> list[str]:
        """Networks of a preset whose weights are on the GPU."""
        networks = self._bundle.manifest.presets[preset]
        loaded = {name: self._loaded.get(networks[name]) for name in NETWORK_NAMES}
        return [
            name
            for name, engine in loaded.items()
            if engine is not None and not (isinstance(engine, SwappedEngine) and not engine.loaded)
        ]

    def _entries(self, preset: str) -> dict[str, EngineEntry]:
        manifest, machine = self._bundle.manifest, self._machine
        gpu = machine.gpu or self.device.gpu
        found: dict[str, EngineEntry] = {}
        for name, key in manifest.presets[preset].items():
            entry = fitting_engine(manifest, key, gpu, machine.tensorrt)
            if entry is None:
                raise EngineError(f"preset {preset}: {unfit(manifest, key, gpu, machine.tensorrt)}")
            found[name] = entry
        return found

    def _plan_bytes(self, entry: EngineEntry) -> int:
        return self._bundle.manifest.files[entry.file].bytes

    def _load_compiled(self, preset: str, names: Sequence[str]) -> dict[str, Engine]:
        entries = self._entries(preset)
        needed, free = sum(self._plan_bytes(entries[name]) for name in names), self.device.free_bytes()
        if needed > free:
            raise EngineError(
                f"preset {preset}: the weights take {_gib(needed)}, {self.device.gpu.name} has {_gib(free)} free: "
                "choose a preset of lower precision, or a GPU with more memory"
            )
        library = load_library(self.device)
        files = {name: self._plan_file(preset, name, entries[name]) for name in names}
        kept = [name for name in names if self._keeps(name)]
        loaded = load_plans([files[name] for name in kept], library, self.device, self._captures)
        made: dict[str, Engine] = dict(zip(kept, loaded, strict=True))
        if "text_encoder" in names:
            file = files["text_encoder"]
            made["text_encoder"] = SwappedEngine(
                _ports(file.network),
                lambda: load_plans([file], library, self.device, self._captures)[0],
                lambda: self._keeps("text_encoder"),
                next((engine for name, engine in zip(kept, loaded, strict=True) if name == "text_encoder"), None),
            )
        return made

    def _keeps(self, name: str) -> bool:
        """Whether a network's weights stay on the GPU."""
        return name != "text_encoder" or self.residency == "resident"

    def _plan_file(self, preset: str, name: str, entry: EngineEntry) -> PlanFile:
        return PlanFile(name, self._bundle.network(preset, name), entry, self._bundle.file(entry.file))

    def _load_graphs(self, preset: str, names: Sequence[str]) -> dict[str, Engine]:
        def load(name: str) -> Engine:
            self.device.make_current()
            network = self._bundle.network(preset, name)
            _, inputs, outputs = _ports(network)
            path = self._bundle.file(network.file)
            return cuda_engine(name, path, (inputs, outputs), self.device, self._captures)

        with ThreadPoolExecutor(len(names)) as pool:
            return dict(zip(names, pool.map(load, names), strict=True))


class SwappedEngine:
    """An engine that is loaded for a run, and given back after it where it must not stay (see ``Engine``).

    Args:
        ports: Name, inputs and outputs.
        load: Gives the engine; its weights come from the system's page cache from the second time on.
        stays: Asked after each run whether the engine is kept.
        engine: What is loaded already.
    """

    def __init__(
        self,
        ports: tuple[str, tuple[TensorSpec, ...], tuple[TensorSpec, ...]],
        load: Callable[[], DeviceEngine],
        stays: Callable[[], bool],
        engine: DeviceEngine | None = None,
    ) -> None:
        self.name, self.inputs, self.outputs = ports
        self._load = load
        self._stays = stays
        self._engine = engine
        self._lock = threading.Lock()

    @property
    def loaded(self) -> bool:
        """Whether it holds its weights now."""
        return self._engine is not None

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Array]:
        """See ``Engine.run``."""
        check_feeds(self.name, self.inputs, feeds)
        with self._lock:
            self._engine = self._engine or self._load()
            try:
                return self._engine.run(feeds)
            finally:
                if not self._stays():
                    self._drop()

    def release(self) -> None:
        """Give the weights back now."""
        with self._lock:
            self._drop()

    def capture(self, feeds: Mapping[str, Tensor]) -> Capture:
        """Refused: a capture would hold the weights.

        Raises:
            EngineError: Always.
        """
        raise EngineError(f"{self.name}: an engine that may be given back after each run cannot be captured")

    def _drop(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def residency_for(
    of: tuple[Bundle, str],
    size: ClipSize,
    available_bytes: int,
    engines: Mapping[str, EngineEntry],
    working: Mapping[str, Working] | None = None,
) -> Residency:
    """What has to be given back for a clip to fit.

    Args:
        of: The bundle, and the preset.
        size: Of the clip.
        available_bytes: Free memory, and what this program holds for clips of the preset.
        engines: Compiled engines by network name.
        working: What loaded engines say that they need.

    Raises:
        CapacityError: It does not fit even so; the message has the largest size that would.
    """

    def planned(clip: ClipSize, *, release: bool) -> ClipMemory:
        return clip_memory(*of, clip, engines, working=working, release_text=release)

    def fits(clip: ClipSize) -> bool:
        return planned(clip, release=True).needed_bytes <= available_bytes

    if planned(size, release=False).needed_bytes <= available_bytes:
        return "resident"
    memory = planned(size, release=True)
    if memory.needed_bytes <= available_bytes:
        return "release_text"
    smaller = largest_that_fits(size, fits)
    hint = "no size of this length fits" if smaller is None else f"the largest that would fit is {smaller}"
    kind = "measured" if memory.measured else "estimated"
    raise CapacityError(
        f"{size} at {of[1]} takes {_gib(memory.needed_bytes)} of GPU memory ({kind}), {_gib(available_bytes)} can be "
        f"had: {hint}"
    )


def _ports(network: NetworkEntry) -> tuple[str, tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    inputs, outputs = (tuple(tensor.spec() for tensor in side) for side in (network.inputs, network.outputs))
    return network.network, inputs, outputs


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 1024**3:.1f} GiB"
