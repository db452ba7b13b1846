# SPDX-License-Identifier: Apache-2.0
"""The GPU, its driver and TensorRT, found without crashing where one of them is missing.

TensorRT constructed without a working device crashes the process rather than raising, so the driver is asked first:
through its own C interface, which needs no CUDA toolkit and no Python package.
"""

import re
from collections.abc import Generator
from contextlib import contextmanager
from ctypes import byref, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ltxrt.errors import EngineError, RequestError
from ltxrt.gpu import DRIVER_LIBRARY, NO_GPU, CudaDriver, Gpu
from ltxrt.tensorrt_plans import SUPPORTED_TENSORRT, check_tensorrt_version

__all__ = ["BuildDriver", "Toolchain", "load_tensorrt", "open_toolchain"]

_DRIVER_VERSION_FILE = Path("/proc/driver/nvidia/version")
INSTALL = (
    "run pip install 'tensorrt-cu13>=11,<12', which fetches it from NVIDIA's package index; without access to that "
    "index see NVIDIA's TensorRT installation guide"
)
_VERSION = re.compile(r"\b\d+\.\d+(\.\d+)*\b")


class BuildDriver(CudaDriver):
    """The driver with the few calls more that a build needs; without a GPU it says what one is needed for.

    Args:
        library: Path or name of the driver library.

    Raises:
        EngineError: There is no driver, or it does not start.
    """

    @staticmethod
    def missing(library: str) -> str:
        """What a machine without a driver is told."""
        return f"{CudaDriver.missing(library)}: engines are built on a machine with an NVIDIA GPU"

    def gpus(self) -> tuple[Gpu, ...]:
        """Every visible GPU.

        Raises:
            EngineError: There is none, or the driver fails.
        """
        found = super().gpus()
        if not found:
            raise EngineError(f"{NO_GPU}: engines are built on the GPU that they are for")
        return found

    @contextmanager
    def current(self, gpu: Gpu) -> Generator[None]:
        """Make a GPU the one that CUDA, and with it TensorRT, uses in the calling thread.

        Raises:
            EngineError: The GPU cannot be used.
        """
        device, context = c_int(), c_void_p()
        self.call("cuDeviceGet", byref(device), gpu.index)
        self.call("cuDevicePrimaryCtxRetain", byref(context), device)
        try:
            self.call("cuCtxPushCurrent_v2", context)
            try:
                yield
            finally:
                self.call("cuCtxPopCurrent_v2", byref(c_void_p()))
        finally:
            self.call("cuDevicePrimaryCtxRelease_v2", device)

    def free_bytes(self) -> int:
        """Free memory of the current GPU.

        Raises:
            EngineError: No GPU is current in this thread.
        """
        free, total = c_size_t(), c_size_t()
        self.call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value


@dataclass(frozen=True, slots=True)
class Toolchain:
    """What compiles.

    Attributes:
        tensorrt: TensorRT's module.
        driver: The driver.
        gpu: The GPU that engines are for.
        kernel_module: Version of the driver's kernel module, or empty where it cannot be read.
    """

    tensorrt: Any
    driver: BuildDriver
    gpu: Gpu
    kernel_module: str = ""


def open_toolchain(choice: str = "auto") -> Toolchain:
    """Find the GPU and TensorRT.

    Args:
        choice: ``auto`` for the GPU with the most memory, or an index as CUDA counts them.

    Raises:
        EngineError: No driver, no GPU, no TensorRT, or versions that do not work together.
        RequestError: There is no GPU of that index.
    """
    driver = BuildDriver(DRIVER_LIBRARY)
    gpu = choose_gpu(driver.gpus(), choice)
    module = load_tensorrt()
    check_tensorrt_version(str(module.__version__), gpu.cuda_version)
    return Toolchain(module, driver, gpu, kernel_module_version())


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


def kernel_module_version() -> str:
    """Version of the driver's kernel module, the first number of the form 1.2.3 in its file; empty without one."""
    try:
        match = _VERSION.search(_DRIVER_VERSION_FILE.read_text("ascii", "replace"))
    except OSError:
        return ""
    return match[0] if match else ""
