# SPDX-License-Identifier: Apache-2.0
"""The GPU, its driver and TensorRT, found without crashing where one of them is missing.

TensorRT constructed without a working device crashes the process rather than raising, so the driver is asked first:
through its own C interface, which needs no CUDA toolkit and no Python package.
"""

import ctypes
import re
from collections.abc import Generator
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ltxrt.errors import EngineError, RequestError
from ltxrt.tensorrt_plans import SUPPORTED_TENSORRT, check_tensorrt_version

__all__ = ["CudaDriver", "Gpu", "Toolchain", "load_tensorrt", "open_toolchain"]

DRIVER_LIBRARY = "libcuda.so.1"
_DRIVER_VERSION_FILE = Path("/proc/driver/nvidia/version")
#: CUdevice_attribute numbers, fixed by the driver's interface.
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
INSTALL = (
    "run pip install 'tensorrt-cu13>=11,<12', which fetches it from NVIDIA's package index; without access to that "
    "index see NVIDIA's TensorRT installation guide"
)
_VERSION = re.compile(r"\b\d+\.\d+(\.\d+)*\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU.

    Attributes:
        index: As CUDA counts them.
        name: As the driver tells it.
        compute_capability: Major and minor.
        memory_bytes: All of its memory.
        cuda_version: Newest CUDA that the driver serves, major and minor.
        driver: Version of the kernel module, or empty where it cannot be read.
    """

    index: int
    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    cuda_version: tuple[int, int]
    driver: str


class CudaDriver:
    """The few calls of the driver's C interface that a build needs.

    Args:
        library: Path or name of the driver library.

    Raises:
        EngineError: There is no driver, or it does not start.
    """

    def __init__(self, library: str = DRIVER_LIBRARY) -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise EngineError(
                f"no NVIDIA driver ({library} cannot be loaded): engines are built on a machine with an NVIDIA GPU"
            ) from error
        self._call("cuInit", 0)

    def gpus(self) -> tuple[Gpu, ...]:
        """Every visible GPU.

        Raises:
            EngineError: There is none, or the driver fails.
        """
        count, version = c_int(), c_int()
        self._call("cuDeviceGetCount", byref(count))
        self._call("cuDriverGetVersion", byref(version))
        if count.value == 0:
            raise EngineError("no NVIDIA GPU is visible to CUDA: engines are built on the GPU that they are for")
        cuda = version.value // 1000, version.value % 1000 // 10
        return tuple(self._gpu(index, cuda) for index in range(count.value))

    def _gpu(self, index: int, cuda: tuple[int, int]) -> Gpu:
        device, memory = c_int(), c_size_t()
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGet", byref(device), index)
        self._call("cuDeviceGetName", name, len(name), device)
        self._call("cuDeviceTotalMem_v2", byref(memory), device)
        capability: list[int] = []
        for attribute in _COMPUTE_CAPABILITY:
            value = c_int()
            self._call("cuDeviceGetAttribute", byref(value), attribute, device)
            capability.append(value.value)
        return Gpu(
            index=index,
            name=name.value.decode("utf-8", "replace"),
            compute_capability=(capability[0], capability[1]),
            memory_bytes=memory.value,
            cuda_version=cuda,
            driver=_driver_version(),
        )

    @contextmanager
    def current(self, gpu: Gpu) -> Generator[None]:
        """Make a GPU the one that CUDA, and with it TensorRT, uses in the calling thread.

        Raises:
            EngineError: The GPU cannot be used.
        """
        device, context = c_int(), c_void_p()
        self._call("cuDeviceGet", byref(device), gpu.index)
        self._call("cuDevicePrimaryCtxRetain", byref(context), device)
        try:
            self._call("cuCtxPushCurrent_v2", context)
            try:
                yield
            finally:
                self._call("cuCtxPopCurrent_v2", byref(c_void_p()))
        finally:
            self._call("cuDevicePrimaryCtxRelease_v2", device)

    def free_bytes(self) -> int:
        """Free memory of the current GPU.

        Raises:
            EngineError: No GPU is current in this thread.
        """
        free, total = c_size_t(), c_size_t()
        self._call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value

    def _call(self, function: str, *arguments: Any) -> None:
        code: int = getattr(self._library, function)(*arguments)
        if code:
            raise EngineError(f"the NVIDIA driver refuses {function}: {self._reason(code)}")

    def _reason(self, code: int) -> str:
        name = c_char_p()
        known = self._library.cuGetErrorName(code, byref(name)) == 0 and name.value
        label = name.value.decode() if known and name.value else f"error {code}"
        return f"{_REASONS[code]} ({label})" if code in _REASONS else label


@dataclass(frozen=True, slots=True)
class Toolchain:
    """What compiles: TensorRT's module, the driver, and the GPU that engines are for."""

    tensorrt: Any
    driver: CudaDriver
    gpu: Gpu


def open_toolchain(choice: str = "auto") -> Toolchain:
    """Find the GPU and TensorRT.

    Args:
        choice: ``auto`` for the GPU with the most memory, or an index as CUDA counts them.

    Raises:
        EngineError: No driver, no GPU, no TensorRT, or versions that do not work together.
        RequestError: There is no GPU of that index.
    """
    driver = CudaDriver(DRIVER_LIBRARY)
    gpu = choose_gpu(driver.gpus(), choice)
    module = load_tensorrt()
    check_tensorrt_version(str(module.__version__), gpu.cuda_version)
    return Toolchain(module, driver, gpu)


def choose_gpu(gpus: tuple[Gpu, ...], choice: str) -> Gpu:
    """The GPU that ``choice`` names.

    Raises:
        RequestError: There is none.
    """
    if choice == "auto":
        return max(gpus, key=lambda gpu: (gpu.memory_bytes, -gpu.index))
    for gpu in gpus:
        if choice == str(gpu.index):
            return gpu
    raise RequestError("gpu", choice, f"auto, {', '.join(f'{gpu.index} ({gpu.name})' for gpu in gpus)}")


def load_tensorrt() -> Any:
    """TensorRT's Python module.

    Raises:
        EngineError: It is not installed or does not load; the message says what to install from where.
    """
    try:
        module = import_module("tensorrt")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "tensorrt":
            raise EngineError(f"TensorRT ({SUPPORTED_TENSORRT}) is not installed: {INSTALL}") from error
        raise EngineError(f"TensorRT is installed but does not load ({error}): {INSTALL}") from error
    if not hasattr(module, "Builder") or not hasattr(module, "OnnxParser"):
        raise EngineError(f"the installed TensorRT has no compiler, only a runtime: {INSTALL}")
    return module


def _driver_version() -> str:
    """Version of the kernel module, the first number of the form 1.2.3 in the file."""
    try:
        match = _VERSION.search(_DRIVER_VERSION_FILE.read_text("ascii", "replace"))
    except OSError:
        return ""
    return match[0] if match else ""
