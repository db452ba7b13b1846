# SPDX-License-Identifier: Apache-2.0
"""Engines that let a spectator see what the runtime feeds a network, so that calibration runs on real inputs.

``GraphTap`` runs a whole graph in ONNX Runtime on the CPU. Whatever else can run one network and report what passed
through it, a block at a time or on a GPU, stands behind the same ``Tap`` protocol.
"""

import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, TensorProto, helper

from ltxrt.engine import Array, Capture, TensorSpec, check_feeds
from ltxrt.engine_onnx import session_options

from .graph import FLOATS, element_types, external_location

__all__ = ["GraphTap", "ObservedEngine", "Tap", "Taps", "link_weights", "open_session"]

Arrays = Mapping[str, Array]
_AMAX = "amax//"


@dataclass(frozen=True, slots=True)
class Taps:
    """What one run showed: the values of the watched tensors and the largest magnitude of the ranged ones."""

    values: Arrays
    amax: Mapping[str, float]


class Tap(Protocol):
    """Runs a network once and reports what passed through it."""

    def run(self, feeds: Arrays) -> tuple[dict[str, Array], Taps]:
        """Outputs by name, and the tapped tensors."""
        ...


class GraphTap:
    """A graph in ONNX Runtime on the CPU, with tensors made outputs.

    Args:
        path: The ``.onnx`` file, its weights beside it.
        watched: Tensors that leave as they are.
        ranged: Tensors of which only the largest magnitude leaves; None is every float tensor of the graph.
        threads: CPU threads within one operator; 0 uses every core.
    """

    def __init__(
        self, path: Path, watched: Collection[str], ranged: Collection[str] | None = None, *, threads: int = 0
    ) -> None:
        model = onnx.load(path, load_external_data=False)
        self._outputs = [value.name for value in model.graph.output]
        taps = _float_tensors(model) if ranged is None else list(ranged)
        self._watched = [name for name in watched if name not in self._outputs]
        self._also = [name for name in watched if name in self._outputs]
        self._ranged = taps
        for name in self._watched:
            model.graph.output.append(helper.make_empty_tensor_value_info(name))
        for name in taps:
            absolute, largest = f"{_AMAX}abs/{name}", f"{_AMAX}{name}"
            model.graph.node.append(helper.make_node("Abs", [name], [absolute], name=absolute))
            model.graph.node.append(helper.make_node("ReduceMax", [absolute], [largest], name=largest, keepdims=0))
            model.graph.output.append(helper.make_empty_tensor_value_info(largest))
        self._session = open_session(model, path.parent, threads=threads)

    def run(self, feeds: Arrays) -> tuple[dict[str, Array], Taps]:
        """See ``Tap.run``."""
        names = [*self._outputs, *self._watched, *(f"{_AMAX}{name}" for name in self._ranged)]
        found = dict(zip(names, self._session.run(names, dict(feeds)), strict=True))
        outputs = {name: np.asarray(found[name]) for name in self._outputs}
        values = {name: np.asarray(found[name]) for name in (*self._watched, *self._also)}
        # The maximum of nothing is minus infinity: the decoder's states are empty in the first chunk.
        amax = {name: max(0.0, float(np.asarray(found[f"{_AMAX}{name}"]))) for name in self._ranged}
        return outputs, Taps(values, amax)


@dataclass(slots=True)
class ObservedEngine:
    """An engine (see ``Engine``) whose runs and replays all pass through one function.

    Attributes:
        name: Network name.
        inputs: Declared inputs.
        outputs: Declared outputs.
        observe: Takes the feeds and gives the outputs.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    observe: Callable[[Arrays], dict[str, Array]]

    def run(self, feeds: Arrays) -> dict[str, Array]:
        """See ``Engine.run``."""
        check_feeds(self.name, self.inputs, feeds)
        return self.observe(feeds)

    def capture(self, feeds: Arrays) -> Capture:
        """See ``Engine.capture``."""
        check_feeds(self.name, self.inputs, feeds)
        return _ObservedCapture(self, {name: np.array(value) for name, value in feeds.items()})


@dataclass(slots=True)
class _ObservedCapture:
    engine: ObservedEngine
    inputs: dict[str, Array]
    outputs: dict[str, Array] = field(default_factory=dict[str, Array])

    def replay(self) -> None:
        """See ``Capture.replay``."""
        self.outputs = self.engine.observe(self.inputs)


def open_session(model: ModelProto, folder: Path, *, threads: int = 0, exact: bool = False) -> ort.InferenceSession:
    """A CPU session of a graph in memory whose weight files lie in ``folder``.

    Args:
        model: The graph; under 2 GB without its external weights.
        folder: Where its external weights lie.
        threads: CPU threads within one operator; 0 uses every core.
        exact: Run every node as it stands; otherwise ONNX Runtime optimises, which drops lossy pairs of casts.
    """
    options = session_options(threads)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if exact:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def link_weights(model: ModelProto, source: Path, folder: Path) -> None:
    """Make the weight files of a graph in ``source`` available in ``folder``: hard links, or copies on another disk.

    ONNX Runtime follows a hard link (a symbolic one it refuses), which is enough for a folder to work in.
    """
    for name in {external_location(t) for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL}:
        try:
            (folder / name).hardlink_to(source / name)
        except FileExistsError:
            continue
        except OSError:
            shutil.copyfile(source / name, folder / name)


def _float_tensors(model: ModelProto) -> list[str]:
    """Everything that nodes make and that is a float; casts of weights are no activations."""
    types = element_types(model.graph)
    stored = {tensor.name for tensor in model.graph.initializer}
    return [
        name
        for node in model.graph.node
        if not (node.op_type in ("Cast", "Transpose") and stored.issuperset(node.input))
        for name in node.output
        if types.get(name, TensorProto.UNDEFINED) in FLOATS
    ]
