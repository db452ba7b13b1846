# SPDX-License-Identifier: Apache-2.0
"""TensorRT: compiled plans of one GPU, run at exact shapes, captured once per shape.

All contexts are ``USER_MANAGED``: their working memory is the device's one scratch block, which is legal because
everything runs on one stream. Single runs share one context per profile, whose shapes are set for each run; a capture
has a context of its own, because its shapes, addresses and working memory are part of the CUDA graph.

Written against what TensorRT 11.4 and 10.16 share and checked against both bindings on stand-in libraries; it has never
run on a GPU.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .engine import symbol_sizes
from .engine_device import Bound, DeviceEngine
from .errors import EngineError
from .graph import CapturedGraph, IdlePool, capture_graph
from .manifest import EngineEntry, NetworkEntry
from .memory import DeviceMemory, DeviceTensor
from .stream import Device, Stream
from .tensorrt_library import LoadedPlan, TensorRtLibrary
from .tensorrt_plans import profile_for

__all__ = ["PlanFile", "TensorRtNetwork", "load_plans"]


@dataclass(frozen=True, slots=True)
class PlanFile:
    """One network and its compiled engine in a bundle."""

    name: str
    network: NetworkEntry
    entry: EngineEntry
    path: Path


@dataclass(slots=True)
class _Context:
    """An execution context of one profile, and the working memory that it was given last."""

    raw: Any
    profile: int
    scratch: DeviceMemory | None = None


class TensorRtNetwork:
    """One plan on a device (see ``engine_device.Network``).

    Args:
        file: What it is.
        library: TensorRT.
        device: Current in this thread.

    Raises:
        EngineError: The plan does not load, or its ports are not the declared ones.
    """

    def __init__(self, file: PlanFile, library: TensorRtLibrary, device: Device) -> None:
        self.name = file.name
        self.inputs = tuple(tensor.spec() for tensor in file.network.inputs)
        self.outputs = tuple(tensor.spec() for tensor in file.network.outputs)
        self._key = file.entry.key
        self._library = library
        self._device = device
        self._plan: LoadedPlan = library.load(file.name, file.path)
        library.check_ports(self.name, self._plan, self.inputs)
        library.check_ports(self.name, self._plan, self.outputs, output=True)
        self._contexts: dict[int, _Context] = {}

    def enqueue(self, inputs: Mapping[str, DeviceTensor]) -> dict[str, DeviceTensor]:
        """See ``engine_device.Network.enqueue``."""
        number = self._profile(inputs)
        if number not in self._contexts:
            self._contexts[number] = self._context(number)
        context = self._contexts[number]
        outputs = self._prepare(context, inputs)
        self._execute(context, self._device.compute)
        return outputs

    def bind(self, inputs: Mapping[str, DeviceTensor]) -> Bound:
        """See ``engine_device.Network.bind``: warm-up, capture, and a check of what was captured."""
        context = self._context(self._profile(inputs))
        own = {name: self._device.empty(value.shape, value.dtype.name) for name, value in inputs.items()}
        for name, value in inputs.items():
            self._device.write(own[name], value)
        outputs = self._prepare(context, own)
        graph = capture_graph(self._device, lambda stream: self._execute(context, stream), self.name)
        return _BoundPlan(own, outputs, graph, self._device, context)

    def working_bytes(self, calls: Sequence[Mapping[str, int]]) -> int | None:
        """See ``engine_device.Network.working_bytes``: as the plan itself tells it.

        Raises:
            EngineError: No profile serves one of the calls.
        """
        profiles = {profile_for(self.name, self._key, sizes) for sizes in calls}
        return max(int(self._plan.engine.get_device_memory_size_for_profile_v2(number)) for number in profiles)

    def close(self) -> None:
        """See ``engine_device.Network.close``. Waits for work that is under way: TensorRT frees memory at once."""
        self._device.compute.sync()
        self._contexts.clear()
        del self._plan

    def _profile(self, inputs: Mapping[str, DeviceTensor]) -> int:
        shapes = {name: value.shape for name, value in inputs.items()}
        return profile_for(self.name, self._key, symbol_sizes(self.name, self.inputs, shapes))

    def _context(self, profile: int) -> _Context:
        strategy = self._library.module.ExecutionContextAllocationStrategy.USER_MANAGED
        raw = self._ask("has no execution context", self._plan.engine.create_execution_context, strategy)
        name = self._key.profiles[profile].name
        self._ask(f"refuses profile {name}", raw.set_optimization_profile_async, profile, self._device.compute.handle)
        return _Context(raw, profile)

    def _prepare(self, context: _Context, inputs: Mapping[str, DeviceTensor]) -> dict[str, DeviceTensor]:
        """Set shapes, working memory and addresses; the outputs are new."""
        raw = context.raw
        for name, value in inputs.items():
            self._ask(f"refuses {name} of shape {value.shape}", raw.set_input_shape, name, value.shape)
        missing = self._ask("cannot tell its shapes", raw.infer_shapes)
        if missing:
            raise self._failure(f"cannot tell its shapes from {', '.join(missing)}")
        needed = int(self._ask("cannot tell its working memory", raw.update_device_memory_size_for_shapes))
        context.scratch = self._device.scratch.reserve(needed)
        raw.set_device_memory(context.scratch.address, context.scratch.size_bytes)
        outputs: dict[str, DeviceTensor] = {}
        for spec in self.outputs:
            found = self._ask(f"cannot tell the shape of {spec.name}", raw.get_tensor_shape, spec.name)
            shape = tuple(int(size) for size in found)
            if any(size < 0 for size in shape):
                raise self._failure(f"cannot tell the shape of {spec.name}, only {shape}")
            outputs[spec.name] = self._device.empty(shape, spec.dtype)
        for name, value in (*inputs.items(), *outputs.items()):
            self._ask(f"refuses an address for {name}", raw.set_tensor_address, name, value.address)
        return outputs

    def _execute(self, context: _Context, stream: Stream) -> None:
        self._ask("does not run", context.raw.execute_async_v3, stream.handle)

    def _ask(self, failing: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """An answer of TensorRT's, whose bindings raise for some refusals and give False or None for others."""
        try:
            answer = call(*arguments)
        except (RuntimeError, ValueError) as error:
            raise self._failure(failing, " ".join(str(error).split())) from error
        if answer is None or answer is False:
            raise self._failure(failing)
        return answer

    def _failure(self, what: str, told: str = "") -> EngineError:
        log = self._plan.log
        return EngineError(f"{self.name}: the plan {what}: {log.last() if log.errors or not told else told}")


@dataclass(slots=True)
class _BoundPlan:
    """See ``engine_device.Bound``; the context is kept because the graph runs what belongs to it."""

    inputs: dict[str, DeviceTensor]
    outputs: dict[str, DeviceTensor]
    graph: CapturedGraph
    device: Device
    context: _Context | None

    def launch(self) -> None:
        self.graph.launch(self.device.compute)

    def close(self) -> None:
        # The context is freed at once, not in the order of the stream.
        self.device.compute.sync()
        self.graph.close()
        self.context = None


def load_plans(
    files: Sequence[PlanFile], library: TensorRtLibrary, device: Device, captures: "IdlePool[Bound]"
) -> list[DeviceEngine]:
    """Load plans at the same time, one thread each; most of it is copying weights to the GPU.

    Returns:
        Engines in the order of ``files``.

    Raises:
        EngineError: The first that does not load.
    """

    def load(file: PlanFile) -> DeviceEngine:
        device.make_current()
        network = TensorRtNetwork(file, library, device)
        return DeviceEngine((file.name, network.inputs, network.outputs), network, device, captures)

    with ThreadPoolExecutor(max(1, len(files))) as pool:
        return list(pool.map(load, files))
