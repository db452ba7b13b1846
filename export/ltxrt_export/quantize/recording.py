# SPDX-License-Identifier: Apache-2.0
"""Engines that let a spectator see what the runtime feeds a network, so that calibration runs on real inputs.

``GraphTap`` runs a whole graph. ``SegmentTap`` runs one of any size in the memory of a part of it: a few layers at a
time, over all batches before the next ones. Both give the same tensors under the same names. On a GPU they have not run
yet.
"""

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, TensorProto, helper

from ltxrt.engine import Array, Capture, TensorSpec, check_feeds
from ltxrt.engine_onnx import session_options
from ltxrt.errors import EngineError

from .graph import element_types, external_location
from .segments import cut

__all__ = ["Device", "GraphTap", "ObservedEngine", "SegmentTap", "Tap", "Taps", "link_weights", "open_session"]

Arrays = Mapping[str, Array]
#: Where ONNX Runtime runs a graph. What CUDA has no kernel for runs on the CPU even so.
Device = Literal["cpu", "cuda"]

_AMAX = "amax//"
_CUDA = "CUDAExecutionProvider"
_PROVIDERS: Mapping[str, list[str | tuple[str, dict[str, str]]]] = {
    "cpu": ["CPUExecutionProvider"],
    # Ranges are of fp32: TF32 would round what is multiplied to ten bits.
    "cuda": [(_CUDA, {"use_tf32": "0"}), "CPUExecutionProvider"],
}


@dataclass(frozen=True, slots=True)
class Taps:
    """What one run showed: the values of the watched tensors and the largest magnitude of the ranged ones."""

    values: Arrays
    amax: Mapping[str, float]


#: Is told what each run showed, batch by batch and maybe in parts.
See = Callable[[Taps], None]


class Tap(Protocol):
    """Runs a network and reports what passed through it."""

    def run(self, batches: Sequence[Arrays], see: See) -> list[dict[str, Array]]:
        """Outputs by name, of every batch of feeds; ``see`` is told of the tapped tensors on the way."""
        ...


class GraphTap:
    """A graph in ONNX Runtime, with tensors made outputs.

    Args:
        model: The graph; not changed.
        folder: Where its weight files lie.
        watched: Tensors that leave as they are.
        ranged: Tensors of which only the largest magnitude leaves; None is every fp32 tensor of the graph.
        device: Where it runs.
        threads: CPU threads within one operator; 0 uses every core.

    Raises:
        EngineError: It cannot run there.
    """

    def __init__(
        self,
        model: ModelProto,
        folder: Path,
        watched: Collection[str],
        ranged: Collection[str] | None = None,
        *,
        device: Device = "cpu",
        threads: int = 0,
    ) -> None:
        tapped = ModelProto()
        tapped.CopyFrom(model)
        graph = tapped.graph
        self._outputs = [value.name for value in graph.output]
        self._watched = list(watched)
        self._ranged = _float_tensors(model) if ranged is None else list(ranged)
        for name in self._watched:
            if name not in self._outputs:
                graph.output.append(helper.make_empty_tensor_value_info(name))
        for name in self._ranged:
            absolute, largest = f"{_AMAX}abs/{name}", f"{_AMAX}{name}"
            graph.node.append(helper.make_node("Abs", [name], [absolute], name=absolute))
            graph.node.append(helper.make_node("ReduceMax", [absolute], [largest], name=largest, keepdims=0))
            graph.output.append(helper.make_empty_tensor_value_info(largest))
        self._session = open_session(tapped, folder, threads=threads, device=device)

    def run(self, batches: Sequence[Arrays], see: See) -> list[dict[str, Array]]:
        """See ``Tap.run``."""
        return [self._run(feeds, see) for feeds in batches]

    def _run(self, feeds: Arrays, see: See) -> dict[str, Array]:
        names = list(dict.fromkeys((*self._outputs, *self._watched, *(f"{_AMAX}{name}" for name in self._ranged))))
        found = dict(zip(names, map(np.asarray, self._session.run(names, dict(feeds))), strict=True))
        # The maximum of nothing is minus infinity: the decoder's states are empty in the first chunk.
        amax = {name: max(0.0, float(found[f"{_AMAX}{name}"])) for name in self._ranged}
        see(Taps({name: found[name] for name in self._watched}, amax))
        return {name: found[name] for name in self._outputs}


class SegmentTap:
    """A graph of which only a part is in memory: it is run part by part, each over all batches.

    What is held besides a part's weights is what later parts read, of every batch.

    Args:
        model: The graph; not changed.
        folder: Where its weight files lie.
        watched: Tensors that leave as they are; of every fp32 tensor the largest magnitude leaves.
        budget_bytes: Most bytes of weights in fp32 that are held at a time, unless a single layer has more.
        device: Where it runs.
        threads: CPU threads within one operator; 0 uses every core.
    """

    def __init__(
        self,
        model: ModelProto,
        folder: Path,
        watched: Collection[str],
        budget_bytes: int,
        *,
        device: Device = "cpu",
        threads: int = 0,
    ) -> None:
        self._segments = cut(model, budget_bytes)
        self._folder, self._watched = folder, frozenset(watched)
        self._device: Device = device
        self._threads = threads

    def run(self, batches: Sequence[Arrays], see: See) -> list[dict[str, Array]]:
        """See ``Tap.run``."""
        live = [dict(feeds) for feeds in batches]
        for feeds in live:
            see(Taps({name: feeds[name] for name in self._watched.intersection(feeds)}, {}))
        unseen = self._watched.difference(*batches)
        for segment in self._segments:
            graph = segment.model.graph
            read = [value.name for value in graph.input]
            here = {name for node in graph.node for name in node.output} | {tensor.name for tensor in graph.initializer}
            watched, unseen = sorted(unseen & here), unseen - here
            tap = GraphTap(segment.model, self._folder, watched, device=self._device, threads=self._threads)
            for tensors in live:
                (found,) = tap.run([{name: tensors[name] for name in read}], see)
                tensors.update(found)
                for name in tensors.keys() - segment.needed_later:
                    del tensors[name]
            # Before the next one is opened, so that the weights of two are never there together.
            del tap
        return live


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


def open_session(
    model: ModelProto, folder: Path, *, threads: int = 0, exact: bool = False, device: Device = "cpu"
) -> ort.InferenceSession:
    """A session of a graph in memory whose weight files lie in ``folder``.

    Args:
        model: The graph; under 2 GB without its external weights.
        folder: Where its external weights lie.
        threads: CPU threads within one operator; 0 uses every core.
        exact: Run every node as it stands; otherwise ONNX Runtime optimises, which drops lossy pairs of casts.
        device: Where it runs.

    Raises:
        EngineError: ONNX Runtime has no GPU here.
    """
    options = session_options(threads)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if exact:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if device == "cuda" and _CUDA not in ort.get_available_providers():
        raise EngineError("this ONNX Runtime knows no GPU: uninstall onnxruntime, install onnxruntime-gpu")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=_PROVIDERS[device])
    if device == "cuda" and _CUDA not in session.get_providers():
        raise EngineError("ONNX Runtime finds no GPU, or not the CUDA libraries that it was built with")
    return session


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
    """Everything that nodes make in fp32; casts and transpositions of weights are no activations."""
    types = element_types(model.graph)
    weights = {tensor.name for tensor in model.graph.initializer}
    found: list[str] = []
    for node in model.graph.node:
        if node.op_type in ("Cast", "Transpose") and weights.issuperset(node.input):
            weights.update(node.output)
        else:
            found += [name for name in node.output if types.get(name) == TensorProto.FLOAT]
    return found
