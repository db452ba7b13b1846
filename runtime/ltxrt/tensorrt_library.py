# SPDX-License-Identifier: Apache-2.0
"""TensorRT's Python module: imported where there is a GPU, its messages kept, plans loaded from mapped files.

Written against what TensorRT 11.4 and 10.16 share. ``tensorrt.Runtime`` crashes the process where there is no GPU, so
a ``Device`` comes first. Checked against the real bindings on stand-in libraries; it has never run on a GPU.
"""

import mmap
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from .engine import TensorSpec
from .errors import EngineError
from .stream import Device
from .tensorrt_plans import SUPPORTED_TENSORRT, check_tensorrt_version

__all__ = ["LoadedPlan", "TensorRtLibrary", "TensorRtLog", "load_library"]

#: TensorRT's element types by the names that the manifest uses. ``tensorrt.nptype`` has none for some of them.
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "INT8": "int8",
    "BOOL": "bool",
}


@dataclass(slots=True)
class TensorRtLog:
    """What TensorRT says; its last complaint explains a failure.

    Attributes:
        errors: One line each.
        warnings: How many there were.
    """

    errors: list[str] = field(default_factory=list[str])
    warnings: int = 0

    def logger(self, tensorrt: Any) -> Any:
        """TensorRT's ``ILogger`` on this; must outlive everything that is made with it."""
        log, severities = self, tensorrt.ILogger

        class Logger(tensorrt.ILogger):
            def __init__(self) -> None:
                tensorrt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity in (severities.INTERNAL_ERROR, severities.ERROR):
                    log.errors.append(" ".join(msg.split()))
                elif severity == severities.WARNING:
                    log.warnings += 1

        return Logger()

    def last(self, otherwise: str = "no reason given") -> str:
        """The latest complaint, or something else where there was none."""
        return self.errors[-1] if self.errors else otherwise


@dataclass(frozen=True, slots=True)
class LoadedPlan:
    """A deserialised engine and what must outlive it.

    Attributes:
        engine: TensorRT's ``ICudaEngine``.
        runtime: The ``Runtime`` that made it.
        logger: Its logger.
        log: What was said.
    """

    engine: Any
    runtime: Any
    logger: Any
    log: TensorRtLog


@dataclass(frozen=True, slots=True)
class TensorRtLibrary:
    """The imported module.

    Attributes:
        module: ``tensorrt``.
    """

    module: Any

    @property
    def version(self) -> str:
        """Full version, as engines' keys have it."""
        return str(self.module.__version__)

    def load(self, name: str, path: Path) -> LoadedPlan:
        """Deserialise a plan from a mapped file; the calling thread's GPU gets it. Safe to call from several threads.

        Raises:
            EngineError: The file cannot be read, or TensorRT refuses it.
        """
        log = TensorRtLog()
        logger = log.logger(self.module)
        try:
            # One runtime for each plan: they are loaded by several threads at once.
            runtime = self.module.Runtime(logger)
        except TypeError as error:  # what the bindings make of a null pointer
            raise EngineError(f"{name}: TensorRT's runtime does not start: {log.last()}") from error
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                data.madvise(mmap.MADV_SEQUENTIAL)
                engine = runtime.deserialize_cuda_engine(data)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise EngineError(f"{name}: {path.name} cannot be read: {error}") from error
        if engine is None:
            raise EngineError(f"{name}: TensorRT cannot load {path.name}: {log.last()}")
        return LoadedPlan(engine, runtime, logger, log)

    def check_ports(self, name: str, plan: LoadedPlan, inputs: tuple[TensorSpec, ...], *, output: bool = False) -> None:
        """Compare declared ports with a plan's own: that they exist, their direction and dtype.

        Raises:
            EngineError: The first difference.
        """
        modes = self.module.TensorIOMode
        kind, mode = ("output", modes.OUTPUT) if output else ("input", modes.INPUT)
        for spec in inputs:
            if plan.engine.get_tensor_mode(spec.name) != mode:
                raise EngineError(f"{name}: the plan has no {kind} {spec.name}, declared is {spec}")
            found = str(plan.engine.get_tensor_dtype(spec.name).name)
            if _DTYPES.get(found, found) != spec.dtype:
                raise EngineError(f"{name}: {kind} {spec.name} of the plan is {found}, declared is {spec}")


def load_library(device: Device) -> TensorRtLibrary:
    """Import TensorRT for a device that is open.

    Raises:
        EngineError: It is not installed, does not load, or its version does not go with this code or the driver.
    """
    module = import_tensorrt()
    check_tensorrt_version(str(module.__version__), device.gpu.cuda_version)
    return TensorRtLibrary(module)


def import_tensorrt() -> Any:
    """The module ``tensorrt``; importing it touches no GPU.

    Raises:
        EngineError: It is not installed, or does not load.
    """
    try:
        return import_module("tensorrt")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "tensorrt":
            raise EngineError(
                f"TensorRT ({SUPPORTED_TENSORRT}) is not installed: run pip install 'tensorrt-cu13>=11,<12'"
            ) from error
        raise EngineError(f"TensorRT is installed but does not load ({error})") from error
