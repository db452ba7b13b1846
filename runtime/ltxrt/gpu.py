# SPDX-License-Identifier: Apache-2.0
"""The NVIDIA GPUs of this machine, as the driver's own C interface tells them: no package, no context, no crash.

CUDA's Python packages say unclearly that there is no driver, and TensorRT without one crashes the process, so the
driver is asked first. Asking costs well under a millisecond where there is none.
"""

import ctypes
from ctypes import byref, c_char_p, c_int, c_size_t
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from .errors import EngineError

__all__ = ["Gpu", "GpuSearch", "find_gpus"]

DRIVER_LIBRARY = "libcuda.so.1"
#: CUdevice_attribute numbers of the compute capability, fixed by the driver's interface.
_COMPUTE_CAPABILITY = (75, 76)
_REASONS = MappingProxyType(
    {
        100: "no NVIDIA GPU is visible",
        802: "the GPUs are still starting up",
        803: "driver library and kernel module do not match; restart the machine",
        804: "the GPU does not support this CUDA compatibility package",
        999: "unknown; the kernel module may not be loaded",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU.

    Attributes:
        index: As CUDA counts them.
        name: As the driver tells it.
        compute_capability: Major and minor.
        memory_bytes: All of its memory.
        cuda_version: Newest CUDA that the driver serves, major and minor.
    """

    index: int
    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    cuda_version: tuple[int, int]

    @property
    def capability_text(self) -> str:
        """For example ``9.0``."""
        return ".".join(map(str, self.compute_capability))


@dataclass(frozen=True, slots=True)
class GpuSearch:
    """What was found: GPUs, or one line that says why there are none."""

    gpus: tuple[Gpu, ...]
    reason: str


def find_gpus(library: str | None = None) -> GpuSearch:
    """Ask the driver for its GPUs.

    The answer for the machine's own driver is kept: the driver cannot appear while the process runs.

    Args:
        library: Path or name of another driver library.
    """
    return _machine() if library is None else _search(library)


@cache
def _machine() -> GpuSearch:
    return _search(DRIVER_LIBRARY)


def _search(library: str) -> GpuSearch:
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return GpuSearch((), f"no NVIDIA driver ({library} cannot be loaded)")
    try:
        _call(driver, "cuInit", 0)
        count, version = c_int(), c_int()
        _call(driver, "cuDeviceGetCount", byref(count))
        _call(driver, "cuDriverGetVersion", byref(version))
        cuda = version.value // 1000, version.value % 1000 // 10
        gpus = tuple(_gpu(driver, index, cuda) for index in range(count.value))
    except EngineError as error:
        return GpuSearch((), str(error))
    return GpuSearch(gpus, "" if gpus else "no NVIDIA GPU is visible to CUDA")


def _gpu(driver: ctypes.CDLL, index: int, cuda: tuple[int, int]) -> Gpu:
    device, memory = c_int(), c_size_t()
    name = ctypes.create_string_buffer(256)
    _call(driver, "cuDeviceGet", byref(device), index)
    _call(driver, "cuDeviceGetName", name, len(name), device)
    _call(driver, "cuDeviceTotalMem_v2", byref(memory), device)
    capability: list[int] = []
    for attribute in _COMPUTE_CAPABILITY:
        value = c_int()
        _call(driver, "cuDeviceGetAttribute", byref(value), attribute, device)
        capability.append(value.value)
    return Gpu(
        index=index,
        name=name.value.decode("utf-8", "replace"),
        compute_capability=(capability[0], capability[1]),
        memory_bytes=memory.value,
        cuda_version=cuda,
    )


def _call(driver: ctypes.CDLL, function: str, *arguments: Any) -> None:
    code: int = getattr(driver, function)(*arguments)
    if code:
        raise EngineError(f"the NVIDIA driver refuses {function}: {_reason(driver, code)}")


def _reason(driver: ctypes.CDLL, code: int) -> str:
    name = c_char_p()
    known = driver.cuGetErrorName(code, byref(name)) == 0 and name.value
    label = name.value.decode() if known and name.value else f"error {code}"
    return f"{_REASONS[code]} ({label})" if code in _REASONS else label
