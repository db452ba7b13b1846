# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on CUDA: for a GPU without TensorRT engines.

Inputs and outputs are bound to device memory, and ONNX Runtime does not wait at the end of a run, so tensors pass
between networks as they do between TensorRT engines. Where all of a network's operators have CUDA kernels, ONNX Runtime
captures its runs as CUDA graphs; where one has not, it runs without. All that its stream is given becomes part of a
capture, so it has one of its own (``Device.sessions``).

The CPU distribution imports this file and refuses to make an engine. It has never run on a GPU: its tests bind to host
memory on the CPU provider, through the same calls.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnxruntime as ort

from .backends import CUDA_PROVIDER, NO_CUDA_PROVIDER
from .engine import TensorSpec
from .engine_device import Bound, DeviceEngine
from .engine_onnx import ORT_ERRORS, check_ports, one_line
from .errors import EngineError
from .graph import IdlePool
from .memory import DeviceTensor
from .stream import Device

__all__ = ["CUDA_OPTIONS", "OnnxCudaNetwork", "OnnxPlacement", "cuda_engine"]

#: Options of the provider; the device's number and stream come on top.
CUDA_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        # Sizes change from clip to clip: doubling the arena would hold twice what the largest needs.
        "arena_extend_strategy": "kSameAsRequested",
        # Trying every algorithm takes seconds for each new shape.
        "cudnn_conv_algo_search": "HEURISTIC",
        "cudnn_conv_use_max_workspace": "1",
        "do_copy_in_default_stream": "1",
        # As the engines of TensorRT are built: fp32 is fp32.
        "use_tf32": "0",
    }
)
_NO_CAPTURE = "-1"
#: What ONNX Runtime says where a network cannot be captured as a whole.
_CAPTURE_REFUSED = "graph capture"


@dataclass(frozen=True, slots=True)
class OnnxPlacement:
    """Where a session runs and its tensors lie.

    Attributes:
        provider: Execution provider.
        memory: ONNX Runtime's name of the memory: ``cuda``.
        index: Number of the device.
        graphs: How many shapes of a network are captured as CUDA graphs; ONNX Runtime never gives one back.
    """

    provider: str = CUDA_PROVIDER
    memory: str = "cuda"
    index: int = 0
    graphs: int = 4

    def options(self, device: Device, *, capture: bool) -> dict[str, str]:
        """Options of the provider."""
        if self.provider != CUDA_PROVIDER:
            return {}
        own = {"device_id": str(self.index), "user_compute_stream": str(device.sessions.handle)}
        return {**CUDA_OPTIONS, **own, "enable_cuda_graph": "1" if capture else "0"}


class OnnxCudaNetwork:
    """One graph in a session on a device (see ``engine_device.Network``).

    Args:
        name: Network name, for messages.
        path: The ``.onnx`` file; its external data lies beside it.
        ports: Declared inputs and outputs.
        device: Current in this thread.
        placement: Where it runs.

    Raises:
        EngineError: This ONNX Runtime has no such provider, or the graph does not load on it.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        ports: tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]],
        device: Device,
        placement: OnnxPlacement,
    ) -> None:
        self.name = name
        self.inputs, self.outputs = ports
        self._device = device
        self._placement = placement
        if placement.provider not in ort.get_available_providers():
            raise EngineError(f"{name}: {NO_CUDA_PROVIDER}")
        self._session, self.capturable = self._open(path)
        check_ports(f"{name}: {path.name}", "input", self.inputs, self._session.get_inputs())
        check_ports(f"{name}: {path.name}", "output", self.outputs, self._session.get_outputs())
        self._captured = 0

    def enqueue(self, inputs: Mapping[str, DeviceTensor]) -> dict[str, DeviceTensor]:
        """See ``engine_device.Network.enqueue``; ONNX Runtime allocates the results, whose shapes only it knows."""
        binding = self._binding(inputs)
        for spec in self.outputs:
            binding.bind_output(spec.name, self._placement.memory, self._placement.index)
        self.run(binding, _NO_CAPTURE)
        # Outputs come in the order in which they were bound.
        return {
            spec.name: DeviceTensor(self._device, value.data_ptr(), tuple(value.shape()), spec.dtype, value)
            for spec, value in zip(self.outputs, binding.get_outputs(), strict=True)
        }

    def bind(self, inputs: Mapping[str, DeviceTensor]) -> Bound:
        """See ``engine_device.Network.bind``: a plain run tells the shapes of the outputs, then the addresses stay."""
        found = self.enqueue(inputs)
        own = {name: self._device.empty(value.shape, value.dtype.name) for name, value in inputs.items()}
        outputs = {name: self._device.empty(value.shape, value.dtype.name) for name, value in found.items()}
        for name, value in inputs.items():
            self._device.write(own[name], value)
        binding = self._binding(own)
        for name, value in outputs.items():
            binding.bind_output(name, *self._where(value))
        graph = _NO_CAPTURE
        if self.capturable and self._captured < self._placement.graphs:
            self._captured += 1
            graph = str(self._captured)
            # The first run of a thread under a number captures; it waits for nothing else, so it is waited for here.
            self.run(binding, graph)
            self._device.compute.sync()
        return _BoundSession(own, outputs, self, binding, graph)

    def run(self, binding: Any, graph: str) -> None:
        """One run in the order of the compute stream, replayed where ``graph`` numbers a capture.

        Raises:
            EngineError: ONNX Runtime fails.
        """
        options = ort.RunOptions()
        options.log_severity_level = 4
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self._placement.provider == CUDA_PROVIDER:
            options.add_run_config_entry("gpu_graph_id", graph)
        compute, sessions = self._device.compute, self._device.sessions
        with self._device.sessions_lock:
            sessions.wait(compute.record())
            try:
                self._session.run_with_iobinding(binding, options)
            except ORT_ERRORS as error:
                raise EngineError(f"{self.name}: {one_line(error)}") from error
            compute.wait(sessions.record())

    def working_bytes(self, calls: Sequence[Mapping[str, int]]) -> int | None:
        """See ``engine_device.Network.working_bytes``: ONNX Runtime does not tell."""
        return None

    def close(self) -> None:
        """See ``engine_device.Network.close``."""
        self._device.compute.sync()
        del self._session

    def _binding(self, inputs: Mapping[str, DeviceTensor]) -> Any:
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_input(name, *self._where(value))
        return binding

    def _where(self, tensor: DeviceTensor) -> tuple[str, int, type, tuple[int, ...], int]:
        return self._placement.memory, self._placement.index, tensor.dtype.type, tensor.shape, tensor.address

    def _open(self, path: Path) -> tuple[ort.InferenceSession, bool]:
        """A session, and whether its runs are captured."""
        for capture in (True, False):
            options = self._placement.options(self._device, capture=capture)
            try:
                session = ort.InferenceSession(path, session_options(), providers=[(self._placement.provider, options)])
            except ORT_ERRORS as error:
                if capture and _CAPTURE_REFUSED in str(error).lower():
                    continue
                raise EngineError(f"{self.name}: ONNX Runtime cannot load {path.name}: {one_line(error)}") from error
            if self._placement.provider not in session.get_providers():
                raise EngineError(f"{self.name}: ONNX Runtime's CUDA provider does not load: {NO_CUDA_PROVIDER}")
            return session, capture and self._placement.provider == CUDA_PROVIDER
        raise AssertionError("the second attempt ends in a session or an error")


@dataclass(slots=True)
class _BoundSession:
    """See ``engine_device.Bound``."""

    inputs: dict[str, DeviceTensor]
    outputs: dict[str, DeviceTensor]
    network: OnnxCudaNetwork
    binding: Any
    graph: str

    def launch(self) -> None:
        self.network.run(self.binding, self.graph)

    def close(self) -> None:
        self.binding = None


def cuda_engine(
    name: str,
    path: Path,
    ports: tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]],
    device: Device,
    captures: "IdlePool[Bound]",
) -> DeviceEngine:
    """A graph as an engine on a GPU.

    Raises:
        EngineError: As ``OnnxCudaNetwork``.
    """
    network = OnnxCudaNetwork(name, path, ports, device, OnnxPlacement(index=device.gpu.index))
    return DeviceEngine((name, *ports), network, device, captures)


def session_options() -> ort.SessionOptions:
    """Session options on a device: quiet, every optimisation, one thread for what little the host computes."""
    options = ort.SessionOptions()
    # Fatal only: what goes wrong is raised, and would otherwise be printed as well.
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = 1
    # Its int8 fusions take FP8 for int8 where fp32 surrounds it, and then refuse to load the graph.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options
