# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on the CPU: the engine that every machine has."""

import ctypes
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state  # type: ignore[attr-defined]

from .engine import Array, Capture, TensorSpec, check_feeds
from .errors import EngineError

__all__ = ["ORT_ERRORS", "OnnxCapture", "OnnxEngine", "check_ports", "one_line", "return_freed_memory"]

#: What the native library reports has classes of its own, without a common base; its Python side raises the other two.
ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(kind for kind in vars(ort_state).values() if isinstance(kind, type) and issubclass(kind, Exception)),
)
# How ONNX Runtime names the element types whose NumPy name differs.
_DTYPES = {"float": "float32", "double": "float64"}
# What the arena reserves at first, and doubles when it is full. Memory that is reserved and not used costs nothing;
# tensors that lie in one piece of it leave fewer gaps than in many small ones.
_ARENA_BYTES = 512 * 1024**2
# Networks are loaded side by side, and an arena is registered once a process.
_ARENA_LOCK = threading.Lock()
_CODE_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")


class OnnxEngine:
    """One network in an ONNX Runtime CPU session.

    The session maps the graph's external weights and folds their bf16 -> fp32 casts while loading.
    Safe to share between threads for ``run``; captures are not.

    Args:
        name: Network name, for messages.
        path: The ``.onnx`` file; its external data lies beside it.
        inputs: Declared inputs, from the manifest.
        outputs: Declared outputs, from the manifest.
        threads: Threads within one operator; 0 lets ONNX Runtime use every core.

    Raises:
        EngineError: The file is no graph that loads, or its ports are not the declared ones.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        threads: int = 0,
    ) -> None:
        self.name = name
        self.inputs = inputs
        self.outputs = outputs
        try:
            self._session = ort.InferenceSession(path, session_options(threads), providers=["CPUExecutionProvider"])
        except ORT_ERRORS as error:
            raise EngineError(f"{name}: ONNX Runtime cannot load {path.name}: {one_line(error)}") from error
        check_ports(f"{name}: {path.name}", "input", inputs, self._session.get_inputs())
        check_ports(f"{name}: {path.name}", "output", outputs, self._session.get_outputs())

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See ``Engine.run``."""
        check_feeds(self.name, self.inputs, feeds)
        names = [spec.name for spec in self.outputs]
        try:
            values = self._session.run(names, dict(feeds))
        except ORT_ERRORS as error:
            raise EngineError(f"{self.name}: {one_line(error)}") from error
        return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}

    def capture(self, feeds: Mapping[str, Array]) -> Capture:
        """See ``Engine.capture``."""
        check_feeds(self.name, self.inputs, feeds)
        return OnnxCapture(self, self._session, feeds)


class OnnxCapture:
    """A session bound to fixed host buffers (see ``Capture``)."""

    def __init__(self, engine: OnnxEngine, session: ort.InferenceSession, feeds: Mapping[str, Array]) -> None:
        self._engine = engine
        self._session = session
        self.inputs: dict[str, Array] = {name: np.array(value, order="C") for name, value in feeds.items()}
        self.outputs: dict[str, Array] = {}

    def replay(self) -> None:
        """See ``Capture.replay``."""
        names = [spec.name for spec in self._engine.outputs]
        try:
            values = self._session.run(names, self.inputs)
        except ORT_ERRORS as error:
            raise EngineError(f"{self._engine.name}: {one_line(error)}") from error
        self.outputs = {name: np.asarray(value) for name, value in zip(names, values, strict=True)}


def check_ports(where: str, kind: str, declared: Sequence[TensorSpec], found: Sequence[Any]) -> None:
    """Compare declared ports with a graph's own: names, then dtypes, then ranks and fixed sizes.

    Args:
        where: Network and file, for messages.
        kind: ``input`` or ``output``.
        declared: From the manifest.
        found: ONNX Runtime's ``NodeArg`` of each port.

    Raises:
        EngineError: The first difference.
    """
    ports = {port.name: port for port in found}
    if set(ports) != {spec.name for spec in declared}:
        raise EngineError(f"{where} has {kind}s {sorted(ports)}, declared are {sorted(spec.name for spec in declared)}")
    for spec in declared:
        port = ports[spec.name]
        element = port.type.removeprefix("tensor(").removesuffix(")")
        dtype = _DTYPES.get(element) or element
        sizes = zip(port.shape, spec.shape, strict=False)
        fits = len(port.shape) == len(spec.shape) and all(
            size == wanted for size, wanted in sizes if isinstance(size, int) and isinstance(wanted, int)
        )
        if dtype != spec.dtype or not fits:
            raise EngineError(
                f"{where} has {kind} {TensorSpec(spec.name, dtype, tuple(port.shape))}, declared is {spec}"
            )


def session_options(threads: int) -> ort.SessionOptions:
    """Session options for the CPU: quiet, deterministic, and leaving the cores to x264 between calls."""
    options = ort.SessionOptions()
    # Fatal only: what goes wrong is raised, and would otherwise be printed as well.
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Off: planned reuse of buffers compares every tensor with every free one, which is most of the time that the
    # denoiser takes to load; the arena gives the same memory back at once, and runs take equally long.
    options.enable_mem_reuse = False
    # Off: one block a run for all its tensors, kept for the next one, is nearly twice what is alive at any moment.
    options.enable_mem_pattern = False
    # The default order leaves until the end what only outputs need, here the decoder's caches, and keeps alive what
    # they are cut from.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    # All networks draw on one arena; they never run at the same time within a clip.
    _share_arena()
    options.add_session_config_entry("session.use_env_allocators", "1")
    # Idle workers wait awake for the next operator, but no longer: afterwards the video encoder wants the core.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
    # Its int8 fusions take FP8 for int8 where fp32 surrounds it, and then refuse to load the graph.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def return_freed_memory() -> None:
    """Hand what loading has freed back to the system; glibc would keep it, on top of what runs take."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _share_arena() -> None:
    """Give the process the arena that sessions share."""
    with _ARENA_LOCK:
        _register_arena()


@cache
def _register_arena() -> None:
    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    settings = {"arena_extend_strategy": 0, "initial_chunk_size_bytes": _ARENA_BYTES}
    ort.create_and_register_allocator(info, ort.OrtArenaCfg(settings))


def one_line(error: Exception) -> str:
    """The first line of ONNX Runtime's message, without its code prefix."""
    text = str(error).strip().splitlines()
    return _CODE_PREFIX.sub("", text[0]) if text else type(error).__name__
