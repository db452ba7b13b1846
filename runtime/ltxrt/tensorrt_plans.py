# SPDX-License-Identifier: Apache-2.0
"""Which compiled engine of a bundle runs here, and which of its profiles serves which sizes: decided without a device.

Tokens are never padded to a profile's sizes. The denoiser's mask says which tokens are held to the first frame; none of
its attentions takes a mask, so padded tokens would be attended to and change the picture. Every clip runs at its exact
shapes within the dynamic ranges of a profile.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .errors import CapacityError, EngineError
from .gpu import Gpu
from .manifest import EngineEntry, EngineKey, EngineProfile, Manifest

__all__ = ["SUPPORTED_TENSORRT", "check_tensorrt_version", "fitting_engine", "profile_for", "unfit"]

SUPPORTED_TENSORRT = "11, or 10.16"
_OLDEST_MINOR_OF_10 = 16
#: TensorRT 11 is built against CUDA 13 alone.
_CUDA_OF_11 = 13


def check_tensorrt_version(version: str, cuda_version: tuple[int, int]) -> None:
    """Refuse a TensorRT that this code was not written for, or that the driver is too old for.

    Args:
        version: As ``tensorrt.__version__`` tells it.
        cuda_version: Newest CUDA that the driver serves.

    Raises:
        EngineError: Naming what is there and what is allowed.
    """
    match = re.match(r"(\d+)\.(\d+)", version)
    major, minor = (int(match[1]), int(match[2])) if match else (0, 0)
    if major not in (10, 11) or (major == 10 and minor < _OLDEST_MINOR_OF_10):
        raise EngineError(f"TensorRT {version} is installed; allowed: {SUPPORTED_TENSORRT}")
    if major == 11 and cuda_version[0] < _CUDA_OF_11:
        found = ".".join(map(str, cuda_version))
        raise EngineError(
            f"the NVIDIA driver serves CUDA {found}, TensorRT {version} needs {_CUDA_OF_11}.0: update the driver"
        )


@dataclass(frozen=True, slots=True)
class _Machine:
    gpu: Gpu
    tensorrt: str


def fitting_engine(manifest: Manifest, network_key: str, gpu: Gpu, tensorrt: str) -> EngineEntry | None:
    """The engine of a network that was compiled for this GPU by this TensorRT, of the graph as it is; None without."""
    engines = [entry for entry in manifest.engines.values() if entry.network == network_key]
    return next((entry for entry in engines if not _differences(manifest, entry, _Machine(gpu, tensorrt))), None)


def unfit(manifest: Manifest, network_key: str, gpu: Gpu, tensorrt: str) -> str:
    """Why no engine of a network fits, in a few words: there is none, or how the nearest differs."""
    engines = [entry for entry in manifest.engines.values() if entry.network == network_key]
    if not engines:
        return f"the bundle has no engine of {network_key}: run ltxrt-export build"
    found = [_differences(manifest, entry, _Machine(gpu, tensorrt)) for entry in engines]
    return f"its engine of {network_key} is for {min(found, key=len)[0]}: run ltxrt-export build on this machine"


def _differences(manifest: Manifest, entry: EngineEntry, machine: _Machine) -> list[str]:
    """What keeps an engine from running here, the plainest difference first."""
    key, network = entry.key, manifest.networks[entry.network]
    found: list[str] = []
    if key.compute_capability != machine.gpu.capability_text:
        found.append(
            f"{key.gpu_name} (compute capability {key.compute_capability}), this is {machine.gpu.name} "
            f"({machine.gpu.capability_text})"
        )
    elif key.gpu_name != machine.gpu.name:
        # The same code would run; it was tuned for another number of processors and another memory.
        found.append(f"{key.gpu_name}, this is {machine.gpu.name}")
    if key.tensorrt_version != machine.tensorrt:
        found.append(f"TensorRT {key.tensorrt_version}, {machine.tensorrt} is installed")
    weights = tuple(manifest.files[name].sha256 for name in sorted(network.weights))
    if key.onnx_sha256 != manifest.files[network.file].sha256 or key.weights_sha256 != weights:
        found.append("another version of the network")
    return found


def profile_for(network: str, key: EngineKey, sizes: Mapping[str, int]) -> int:
    """Number of the first profile that serves these sizes.

    Args:
        network: For messages.
        key: The engine's.
        sizes: Of every symbol of the inputs.

    Raises:
        CapacityError: None does; the message has the limits of the nearest.
    """
    for number, profile in enumerate(key.profiles):
        if not _outside(profile, sizes):
            return number
    nearest = min(key.profiles, key=lambda profile: len(_outside(profile, sizes)))
    limits = ", ".join(
        f"{symbol} = {sizes[symbol]} (allowed: {low} to {high})" for symbol, low, high in _outside(nearest, sizes)
    )
    raise CapacityError(
        f"{network}: no profile of the engine serves {limits} in profile {nearest.name}: take a smaller or shorter "
        "clip, or build engines for it (ltxrt-export build --buckets)"
    )


def _outside(profile: EngineProfile, sizes: Mapping[str, int]) -> list[tuple[str, int, int]]:
    return [(symbol, low, high) for symbol, (low, _, high) in profile.sizes.items() if not low <= sizes[symbol] <= high]


def all_fit(manifest: Manifest, network_keys: Iterable[str], gpu: Gpu, tensorrt: str) -> str:
    """Empty where every network has an engine for this machine; otherwise why the first does not."""
    for key in network_keys:
        if fitting_engine(manifest, key, gpu, tensorrt) is None:
            return unfit(manifest, key, gpu, tensorrt)
    return ""
