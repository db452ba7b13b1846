# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on the CPU: the engine that every machine has."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from .engine import Array, Capture, TensorSpec, check_feeds
from .errors import EngineError

__all__ = ["OnnxCapture", "OnnxEngine"]

# ONNX Runtime raises these two and its own subclasses of them.
_ORT_ERRORS = (RuntimeError, ValueError)


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
        except _ORT_ERRORS as error:
            raise EngineError(f"{name}: ONNX Runtime cannot load {path.name}: {one_line(error)}") from error
        found = {value.name for value in self._session.get_inputs()}
        if found != {spec.name for spec in inputs}:
            raise EngineError(f"{name}: {path.name} takes {sorted(found)}, the manifest says otherwise")

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See ``Engine.run``."""
        check_feeds(self.name, self.inputs, feeds)
        names = [spec.name for spec in self.outputs]
        try:
            values = self._session.run(names, dict(feeds))
        except _ORT_ERRORS as error:
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
        except _ORT_ERRORS as error:
            raise EngineError(f"{self._engine.name}: {one_line(error)}") from error
        self.outputs = {name: np.asarray(value) for name, value in zip(names, values, strict=True)}


def session_options(threads: int) -> ort.SessionOptions:
    """Session options for the CPU: quiet, deterministic, and leaving the cores to x264 between calls."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Idle workers would otherwise spin for the next operator while the video encoder wants the core.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def one_line(error: Exception) -> str:
    """The first line of a backend's message, without its code prefix."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
