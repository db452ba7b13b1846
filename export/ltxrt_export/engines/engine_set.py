# SPDX-License-Identifier: Apache-2.0
"""All engines of one or more presets: what is there is kept, what is missing is built, network by network."""

import shutil
import time
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ltxrt.errors import EngineError, OutputError, RequestError
from ltxrt.gpu import Gpu
from ltxrt.manifest import NETWORK_NAMES, EngineEntry, EngineKey, Manifest

from .buckets import Buckets
from .build import BuiltPlan, NetworkJob, build_network, gib, load_graph
from .cache_key import BuildOptions, engine_key, key_digest
from .environment import Toolchain
from .profiles import Profile, network_profiles
from .progress import Phase
from .store import ENGINES, EngineStore
from .weights import compiled_weight_bytes

__all__ = ["BuildStep", "EnginePlan", "build_engines", "plan_engines", "required_networks"]

#: Plans hold weights and kernels; what the kernels add is small beside the weights of all but toy networks.
_PLAN_OVERHEAD_BYTES = 64 * 1024**2
#: Compute capabilities from which on a type has tensor cores.
_LEAST_CAPABILITY = {"fp8": (8, 9), "bf16": (8, 0)}


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What will become of one network: ``entry`` where its engine is there already."""

    network_key: str
    key: EngineKey
    profiles: tuple[Profile, ...]
    weight_bytes: int
    entry: EngineEntry | None


@dataclass(frozen=True, slots=True)
class BuildStep:
    """Progress: network ``index`` of ``total``.

    ``phase`` is where the compiler is while it is building; ``seconds`` and ``plan_bytes`` are set once it is done.
    """

    index: int
    total: int
    network_key: str
    status: Literal["kept", "building", "built"]
    phase: Phase | None = None
    seconds: float = 0.0
    plan_bytes: int = 0


def required_networks(manifest: Manifest, presets: Iterable[str]) -> tuple[str, ...]:
    """Keys of the networks that the presets need, each once, in the order in which a clip meets them.

    Raises:
        RequestError: The bundle has no preset of that name.
    """
    found: dict[str, None] = {}
    wanted = tuple(presets)
    for preset in wanted:
        if preset not in manifest.presets:
            raise RequestError("preset", preset, f"{', '.join(manifest.presets)} in this bundle")
    for name in NETWORK_NAMES:
        found.update(dict.fromkeys(manifest.presets[preset][name] for preset in wanted))
    return tuple(found)


def plan_engines(
    store: EngineStore, presets: Iterable[str], tools: Toolchain, buckets: Buckets, options: BuildOptions
) -> tuple[EnginePlan, ...]:
    """What each network of the presets needs; nothing is built and nothing is written.

    Raises:
        RequestError: The bundle has no such preset.
        EngineError: The GPU cannot compute in a network's precision, or its memory cannot hold a network's weights.
        OutputError: The disk cannot hold the plans that are missing.
    """
    manifest = store.manifest
    plans: list[EnginePlan] = []
    for network_key in required_networks(manifest, presets):
        check_precision(network_key, manifest.networks[network_key].precision, tools.gpu)
        profiles = network_profiles(manifest, network_key, buckets)
        machine = tools.gpu, str(tools.tensorrt.__version__)
        key = engine_key(manifest, network_key, (profile.entry for profile in profiles), machine, options)
        graph = load_graph(store.folder / manifest.networks[network_key].file)
        weight_bytes = compiled_weight_bytes(graph)
        if weight_bytes > tools.gpu.memory_bytes:
            raise EngineError(
                f"{network_key}: its weights take {gib(weight_bytes)}, {tools.gpu.name} has "
                f"{gib(tools.gpu.memory_bytes)}: take a GPU with more, or a preset of lower precision"
            )
        plans.append(EnginePlan(network_key, key, profiles, weight_bytes, store.find(network_key, key)))
    missing = [plan for plan in plans if plan.entry is None]
    needed = sum(plan.weight_bytes + _PLAN_OVERHEAD_BYTES for plan in missing)
    free = shutil.disk_usage(store.folder).free
    if missing and needed > free:
        raise OutputError(f"{store.folder}: the plans take about {gib(needed)}, the disk has {gib(free)} free")
    return tuple(plans)


def check_precision(network_key: str, precision: str, gpu: Gpu) -> None:
    """Refuse a precision that the GPU has no arithmetic for.

    Raises:
        EngineError: Naming what it needs.
    """
    for kind, least in _LEAST_CAPABILITY.items():
        if precision.startswith(kind) and gpu.compute_capability < least:
            has, needs = (".".join(map(str, capability)) for capability in (gpu.compute_capability, least))
            raise EngineError(
                f"{network_key}: {kind} needs compute capability {needs}, {gpu.name} has {has}: take another preset"
            )


def build_engines(
    store: EngineStore,
    plans: Iterable[EnginePlan],
    tools: Toolchain,
    options: BuildOptions,
    timing_cache: Path | None = None,
) -> Generator[BuildStep]:
    """Build what is missing, one network after the other; each is in the bundle as soon as it is done.

    A generator: nothing runs until it is consumed. Leaving it early stops the compiler at its next step and keeps the
    engines that are done, so that the same call goes on from there.

    Args:
        store: The bundle's engines, opened.
        plans: From ``plan_engines``.
        tools: GPU and compiler.
        options: As given to ``plan_engines``.
        timing_cache: Kernel timings to use and to extend; None keeps them in the bundle.

    Raises:
        EngineError: A network cannot be built; the message names it.
        OutputError: The bundle cannot be written.
        BundleError: The weights cannot be read.
    """
    every = tuple(plans)
    for index, plan in enumerate(every):
        if plan.entry is not None:
            size = store.manifest.files[plan.entry.file].bytes
            yield BuildStep(index, len(every), plan.network_key, "kept", plan_bytes=size)
            continue
        begin = time.monotonic()
        yield BuildStep(index, len(every), plan.network_key, "building")
        job = NetworkJob(
            key=plan.network_key,
            network=store.manifest.networks[plan.network_key],
            graph=store.folder / store.manifest.networks[plan.network_key].file,
            profiles=plan.profiles,
            plan=store.plan_path(plan.network_key, plan.key),
            timing_cache=timing_cache or store.timing_cache_path(plan.key),
        )
        built = yield from _phases(build_network(job, tools, options), index, len(every), plan.network_key)
        _add(store, plan, job, built)
        seconds = time.monotonic() - begin
        yield BuildStep(index, len(every), plan.network_key, "built", None, seconds, built.plan.bytes)


def _phases(
    phases: Generator[Phase, None, BuiltPlan], index: int, total: int, network_key: str
) -> Generator[BuildStep, None, BuiltPlan]:
    """The compiler's phases as steps; ends with what it made."""
    with closing(phases):
        while True:
            try:
                phase = next(phases)
            except StopIteration as end:
                return end.value
            yield BuildStep(index, total, network_key, "building", phase)


def _add(store: EngineStore, plan: EnginePlan, job: NetworkJob, built: BuiltPlan) -> None:
    names = {path: f"{ENGINES}/{path.name}" for path in (job.plan, job.layers)}
    entry = EngineEntry(
        network=plan.network_key,
        file=names[job.plan],
        layers=names[job.layers],
        key=plan.key,
        key_sha256=key_digest(plan.key),
        built_with=built.built_with,
    )
    store.add(entry, {names[job.plan]: built.plan, names[job.layers]: built.layers})
