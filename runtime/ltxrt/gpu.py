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

__all__ = ["DRIVER_LIBRARY", "NO_GPU", "CudaDriver", "Gpu", "GpuSearch", "find_gpus"]

DRIVER_LIBRARY = "libcuda.so.1"
NO_GPU = "no NVIDIA GPU is visible to CUDA"
#: CUdevice_attribute numbers of the compute capability, fixed by the driver's interface.
_COMPUTE_CAPABILITY = (75, 76)
_REASONS = MappingProxyType(
    {
        2: "out of memory",
        35: "the driver is older than this CUDA",
        100: "no NVIDIA GPU is visible",
        101: "no such GPU",
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


class CudaDriver:
    """The driver's own C interface, started.

    Args:
        library: Path or name of the driver library.

    Raises:
        EngineError: There is no driver, or it does not start.
    """

    def __init__(self, library: str = DRIVER_LIBRARY) -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise EngineError(self.missing(library)) from error
        self.call("cuInit", 0)

    @staticmethod
    def missing(library: str) -> str:
        """What a machine without a driver is told."""
        return f"no NVIDIA driver ({library} cannot be loaded)"

    def gpus(self) -> tuple[Gpu, ...]:
        """Every visible GPU.

        Raises:
            EngineError: The driver fails.
        """
        count, version = c_int(), c_int()
        self.call("cuDeviceGetCount", byref(count))
        self.call("cuDriverGetVersion", byref(version))
        cuda = version.value // 1000, version.value % 1000 // 10
        return tuple(self._gpu(index, cuda) for index in range(count.value))

    def _gpu(self, index: int, cuda: tuple[int, int]) -> Gpu:
        device, memory = c_int(), c_size_t()
        name = ctypes.create_string_buffer(256)
        self.call("cuDeviceGet", byref(device), index)
        self.call("cuDeviceGetName", name, len(name), device)
        self.call("cuDeviceTotalMem_v2", byref(memory), device)
        capability: list[int] = []
        for attribute in _COMPUTE_CAPABILITY:
            value = c_int()
            self.call("cuDeviceGetAttribute", byref(value), attribute, device)
            capability.append(value.value)
        return Gpu(
            index=index,
            name=name.value.decode("utf-8", "replace"),
            compute_capability=(capability[0], capability[1]),
            memory_bytes=memory.value,
            cuda_version=cuda,
        )

    def call(self, function: str, *arguments: Any) -> None:
        """Call one of its functions.

        Raises:
            EngineError: It answers with an error, which is named and, where it is a usual one, explained.
        """
        code: int = getattr(self._library, function)(*arguments)
        if code:
            raise EngineError(f"the NVIDIA driver refuses {function}: {self._reason(code)}")

    def _reason(self, code: int) -> str:
        name = c_char_p()
        known = self._library.cuGetErrorName(code, byref(name)) == 0 and name.value
        label = name.value.decode() if known and name.value else f"error {code}"
        return f"{_REASONS[code]} ({label})" if code in _REASONS else label


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
        gpus = CudaDriver(library).gpus()
    except EngineError as error:
        return GpuSearch((), str(error))
    return GpuSearch(gpus, "" if gpus else NO_GPU)
