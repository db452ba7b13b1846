# SPDX-License-Identifier: Apache-2.0
"""The compiled engines of a bundle that this machine can run, for ``verify``, and the sizes that they serve.

Never run on a GPU yet: the tests put the CPU engine in the place of a compiled one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from numpy.typing import NDArray

from ltxrt.backends import Machine, this_machine
from ltxrt.bundle import Bundle
from ltxrt.engine import symbol_sizes
from ltxrt.engine_tensorrt import PlanFile, load_plans
from ltxrt.graph import IdlePool
from ltxrt.manifest import EngineEntry, EngineKey, NetworkEntry
from ltxrt.shapes import chunk_lengths
from ltxrt.stream import open_device
from ltxrt.tensorrt_library import load_library
from ltxrt.tensorrt_plans import fitting_engine, unfit

from .parity import Runner

__all__ = ["CompiledNetwork", "compiled_networks", "engines_not_run", "feed_sizes", "serves", "stream_sizes"]

Sizes = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class CompiledNetwork:
    """An engine that was compiled for this machine.

    Attributes:
        key: Of the engine, in the manifest.
        entry: What the manifest says of it.
        load: Brings it onto the GPU.
    """

    key: str
    entry: EngineEntry
    load: Callable[[], Runner]


def compiled_networks(bundle: Bundle, machine: Machine | None = None) -> dict[str, CompiledNetwork]:
    """The engines that this machine runs, by the key of their network.

    Args:
        bundle: The bundle.
        machine: What there is; None looks.
    """
    machine, manifest = machine or this_machine(), bundle.manifest
    if machine.gpu is None or machine.no_gpu or machine.no_tensorrt:
        return {}
    found: dict[str, CompiledNetwork] = {}
    for key, network in manifest.networks.items():
        entry = fitting_engine(manifest, key, machine.gpu, machine.tensorrt)
        if entry is not None:
            name = next(name for name, other in manifest.engines.items() if other == entry)
            found[key] = CompiledNetwork(name, entry, partial(_load, bundle, network, entry))
    return found


def _load(bundle: Bundle, network: NetworkEntry, entry: EngineEntry) -> Runner:
    device = open_device()
    file = PlanFile(network.network, network, entry, bundle.file(entry.file))
    runner: Any = load_plans([file], load_library(device), device, IdlePool(0))[0]
    return runner


def engines_not_run(bundle: Bundle, networks: list[str], machine: Machine | None = None) -> dict[str, str]:
    """Why the other engines of some networks are not run, by the engine's key."""
    machine, manifest = machine or this_machine(), bundle.manifest
    here = {compiled.key for compiled in compiled_networks(bundle, machine).values()}
    reasons: dict[str, str] = {}
    for key, entry in manifest.engines.items():
        if key in here or manifest.networks[entry.network].network not in networks:
            continue
        off = machine.no_tensorrt or machine.no_gpu
        reasons[key] = off if machine.gpu is None or off else _misfit(bundle, entry, machine)
    return reasons


def _misfit(bundle: Bundle, entry: EngineEntry, machine: Machine) -> str:
    assert machine.gpu is not None  # asked before
    if fitting_engine(bundle.manifest, entry.network, machine.gpu, machine.tensorrt) is not None:
        return "another engine of the same network is for this machine"
    return unfit(bundle.manifest, entry.network, machine.gpu, machine.tensorrt)


# --- sizes ---


def feed_sizes(network: NetworkEntry, feeds: Mapping[str, NDArray[Any]]) -> Sizes:
    """The size of every symbol of a network's inputs."""
    specs = [tensor.spec() for tensor in network.inputs]
    return symbol_sizes(network.network, specs, {spec.name: feeds[spec.name].shape for spec in specs})


def stream_sizes(latents: int, first: int, rest: int, canvas: tuple[int, int]) -> list[Sizes]:
    """Sizes of every call of the video decoder for a clip in chunks of ``rest`` latent frames after ``first``."""
    lengths = chunk_lengths(latents, first, rest)
    ends = len(lengths) - 1
    return [
        {"n": n, "h": canvas[0], "w": canvas[1], "p": int(not i), "q": int(i == ends), "c": 2 if i else 0}
        for i, n in enumerate(lengths)
    ]


def serves(key: EngineKey, calls: list[Sizes]) -> bool:
    """Whether every call lies within some profile of an engine."""
    return all(
        any(
            all(low <= sizes[symbol] <= high for symbol, (low, _, high) in profile.sizes.items())
            for profile in key.profiles
        )
        for sizes in calls
    )
