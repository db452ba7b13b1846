# SPDX-License-Identifier: Apache-2.0
"""Which backend runs a bundle on this machine, and why each faster one does not: one line each.

The machine is looked at cheap parts first. On one without an NVIDIA driver that is one failed load of a library, and no
package of CUDA's is imported.
"""

from dataclasses import dataclass
from functools import cache
from importlib import import_module, util

import onnxruntime

from .bundle import Bundle
from .errors import EngineError
from .gpu import Gpu, find_gpus
from .manifest import Manifest
from .tensorrt_library import import_tensorrt
from .tensorrt_plans import check_tensorrt_version, fitting_engine, unfit

__all__ = [
    "CUDA_PROVIDER",
    "NO_CUDA_PROVIDER",
    "Backend",
    "Machine",
    "backends",
    "compiled_presets",
    "this_machine",
]

CUDA_PROVIDER = "CUDAExecutionProvider"
NO_CUDA_PROVIDER = (
    "this ONNX Runtime has no CUDA provider: uninstall onnxruntime, then run pip install 'onnxruntime-gpu>=1.31,<1.32'"
)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is; each text says why something is not to be had and is empty where it is.

    Attributes:
        gpu: The first GPU as CUDA counts them.
        no_gpu: Why there is none that can be used.
        tensorrt: Version of TensorRT.
        no_tensorrt: Why it cannot be used.
        no_cuda_provider: Why ONNX Runtime cannot use the GPU.
    """

    gpu: Gpu | None = None
    no_gpu: str = ""
    tensorrt: str = ""
    no_tensorrt: str = ""
    no_cuda_provider: str = ""


@cache
def this_machine() -> Machine:
    """Look at this machine, once."""
    search = find_gpus()
    if not search.gpus:
        installed = "" if util.find_spec("tensorrt") else "; the Python package tensorrt is not installed either"
        return Machine(no_gpu=search.reason, no_tensorrt=f"{search.reason}{installed}")
    gpu = search.gpus[0]
    missing = _no_cuda_core()
    if missing:
        return Machine(gpu=gpu, no_gpu=missing)
    version, no_tensorrt = _tensorrt(gpu)
    return Machine(gpu=gpu, tensorrt=version, no_tensorrt=no_tensorrt, no_cuda_provider=_no_cuda_provider(gpu))


def backends(bundle: Bundle | None = None, machine: Machine | None = None) -> tuple[Backend, ...]:
    """Every backend, fastest first, with the reason where it is off.

    Args:
        bundle: Which one is to be run; None asks for none in particular.
        machine: Of another machine than this one.
    """
    machine = machine or this_machine()
    return (
        _tensorrt_backend(machine, None if bundle is None else bundle.manifest),
        _cuda_backend(machine),
        Backend("onnxruntime-cpu", True, "runs everywhere"),
    )


def compiled_presets(manifest: Manifest, machine: Machine) -> tuple[str, ...]:
    """Presets all of whose networks have an engine for this machine."""
    gpu = machine.gpu
    if gpu is None:
        return ()
    return tuple(
        preset
        for preset, networks in manifest.presets.items()
        if all(fitting_engine(manifest, key, gpu, machine.tensorrt) for key in networks.values())
    )


def _tensorrt_backend(machine: Machine, manifest: Manifest | None) -> Backend:
    off = machine.no_tensorrt or machine.no_gpu
    if off or machine.gpu is None:
        return Backend("tensorrt", False, off)
    found = f"TensorRT {machine.tensorrt} on {machine.gpu.name}"
    if manifest is None:
        return Backend("tensorrt", True, found)
    compiled = compiled_presets(manifest, machine)
    if compiled:
        return Backend("tensorrt", True, f"{found}, presets {', '.join(compiled)}")
    # The default preset, or the last one, which is of the highest quality, tells for all.
    preset = "high" if "high" in manifest.presets else tuple(manifest.presets)[-1]
    missing = next(
        key
        for key in manifest.presets[preset].values()
        if fitting_engine(manifest, key, machine.gpu, machine.tensorrt) is None
    )
    return Backend("tensorrt", False, unfit(manifest, missing, machine.gpu, machine.tensorrt))


def _cuda_backend(machine: Machine) -> Backend:
    off = machine.no_gpu or machine.no_cuda_provider
    if off or machine.gpu is None:
        return Backend("onnxruntime-cuda", False, off)
    return Backend("onnxruntime-cuda", True, f"ONNX Runtime on {machine.gpu.name}")


def _no_cuda_core() -> str:
    try:
        import_module("cuda.core")
    except ImportError as error:
        return f"cuda-core cannot be loaded ({error}): run pip install 'ltxrt[gpu]'"
    return ""


def _tensorrt(gpu: Gpu) -> tuple[str, str]:
    """Its version, and why it cannot be used."""
    try:
        version = str(import_tensorrt().__version__)
        check_tensorrt_version(version, gpu.cuda_version)
    except EngineError as error:
        return "", str(error)
    return version, ""


def _no_cuda_provider(gpu: Gpu) -> str:
    if CUDA_PROVIDER not in onnxruntime.get_available_providers():
        return NO_CUDA_PROVIDER
    built_for = str(getattr(onnxruntime, "cuda_version", "") or "")
    major = built_for.partition(".")[0]
    if major.isdigit() and gpu.cuda_version[0] < int(major):
        served = ".".join(map(str, gpu.cuda_version))
        return f"the NVIDIA driver serves CUDA {served}, this ONNX Runtime needs {major}.0: update the driver"
    return ""
