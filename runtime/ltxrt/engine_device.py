# SPDX-License-Identifier: Apache-2.0
"""What the engines on a GPU have in common: feeds and results that stay there, captures, and the loop without the host.

A backend gives a ``Network`` (one loaded network that takes device tensors) and, for captures, a ``Bound`` one (fixed
shapes and addresses, replayed with one call). Everything else is here, once, so that TensorRT and ONNX Runtime behave
alike: feeds are checked before the device is touched, host arrays are uploaded, captures are leased to one user at a
time and kept in a bounded number.

It has never run on a GPU; its tests run it on a device that is host memory.
"""

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .engine import Array, Capture, Tensor, TensorSpec, check_feeds
from .errors import EngineError
from .graph import IdlePool
from .memory import DeviceTensor
from .stream import Device

__all__ = ["Bound", "DeviceCapture", "DeviceEngine", "Network"]

#: Steps that the device is ahead of what has been reported: enough never to be idle, few enough to stop soon.
_STEPS_AHEAD = 1


class Bound(Protocol):
    """A network on fixed buffers."""

    @property
    def inputs(self) -> Mapping[str, DeviceTensor]: ...

    @property
    def outputs(self) -> Mapping[str, DeviceTensor]: ...

    def launch(self) -> None:
        """Hand one run over to the compute stream."""
        ...

    def close(self) -> None:
        """Give back graph, context and buffers."""
        ...


class Network(Protocol):
    """One loaded network of a backend. Not for several threads at once."""

    def enqueue(self, inputs: Mapping[str, DeviceTensor]) -> dict[str, DeviceTensor]:
        """Hand one run over to the compute stream; the results own their memory, and nothing waits for them."""
        ...

    def bind(self, inputs: Mapping[str, DeviceTensor]) -> Bound:
        """Fix buffers of these shapes and make them ready to be replayed; ``inputs`` are what it is tried with."""
        ...

    def working_bytes(self, calls: Sequence[Mapping[str, int]]) -> int | None:
        """Working memory that runs at these sizes of every symbol take at most; None where it cannot be told."""
        ...

    def close(self) -> None:
        """Give back weights and contexts."""
        ...


@dataclass(frozen=True, slots=True)
class _Declared:
    """What the manifest says of a network."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class DeviceEngine:
    """One network on a device (see ``Engine``). Safe to share between threads; a capture is one user's at a time.

    Args:
        ports: Its name and declared ports.
        network: The loaded network.
        device: Where it is loaded.
        captures: Idle captures of all engines of the device.
    """

    def __init__(
        self,
        ports: tuple[str, tuple[TensorSpec, ...], tuple[TensorSpec, ...]],
        network: Network,
        device: Device,
        captures: "IdlePool[Bound]",
    ) -> None:
        self._declared = _Declared(*ports)
        self._network = network
        self._device = device
        self._captures = captures
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The network's name."""
        return self._declared.name

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Declared inputs."""
        return self._declared.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Declared outputs."""
        return self._declared.outputs

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Array]:
        """See ``Engine.run``; waits for the result, in ordinary memory: whoever keeps it locks no pages."""
        copies = {name: tensor.fetch() for name, tensor in self._run(feeds).items()}
        return {name: np.array(copy.wait()) for name, copy in copies.items()}

    def run_resident(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See ``engine.run_resident``."""
        return dict(self._run(feeds))

    def _run(self, feeds: Mapping[str, Tensor]) -> dict[str, DeviceTensor]:
        check_feeds(self.name, self.inputs, feeds)
        self._device.make_current()
        with self._lock, self._device.errors(self.name):
            return self._network.enqueue({name: self._device.place(value) for name, value in feeds.items()})

    def capture(self, feeds: Mapping[str, Tensor]) -> Capture:
        """See ``Engine.capture``. The capture is the caller's until its ``close``, or the end of its ``iterate``."""
        check_feeds(self.name, self.inputs, feeds)
        self._device.make_current()
        key = id(self), tuple(sorted((name, tuple(value.shape)) for name, value in feeds.items()))
        with self._lock, self._device.errors(self.name):
            bound = self._captures.take(key)
            if bound is None:
                bound = self._network.bind({name: self._device.place(value) for name, value in feeds.items()})
            for name, value in feeds.items():
                self._device.write(bound.inputs[name], value)
        return DeviceCapture(self.name, bound, self._device, lambda: self._captures.give_back(key, bound))

    def working_bytes(self, calls: Sequence[Mapping[str, int]]) -> int | None:
        """See ``Network.working_bytes``."""
        with self._lock:
            return self._network.working_bytes(calls)

    def close(self) -> None:
        """Give back what the network holds. The engine must not be used again."""
        self._device.make_current()
        with self._lock:
            self._captures.drop(lambda key: isinstance(key, tuple) and key[0] == id(self))
            self._network.close()


class DeviceCapture:
    """A network on fixed device buffers (see ``Capture`` and ``LoopCapture``).

    Attributes:
        inputs: Borrowed tensors; overwrite them with ``write``.
        outputs: Borrowed tensors, overwritten by every replay.
    """

    def __init__(self, name: str, bound: Bound, device: Device, give_back: Any) -> None:
        self._name = name
        self._bound: Bound | None = bound
        self._device = device
        self._give_back = give_back
        self.inputs: Mapping[str, Any] = bound.inputs
        self.outputs: Mapping[str, Any] = bound.outputs

    def write(self, name: str, value: Tensor) -> None:
        """Overwrite an input with a tensor of its shape and dtype, after what has been handed over so far.

        Raises:
            EngineError: There is no such input, or the tensor does not fit; nothing is written.
        """
        target = self.inputs.get(name)
        if target is None:
            raise EngineError(f"{self._name}: the feed does not take {name}")
        if value.shape != target.shape or value.dtype != target.dtype:
            raise EngineError(
                f"{self._name}: {name} is {value.dtype}{list(value.shape)}, expected {target.dtype}{list(target.shape)}"
            )
        self._device.write(target, value)

    def replay(self) -> None:
        """See ``Capture.replay``; nothing waits for the result."""
        bound = self._open()
        self._device.make_current()
        bound.launch()

    def iterate(
        self, steps: Sequence[Mapping[str, Array]], carried: Mapping[str, str]
    ) -> Iterator[Mapping[str, Tensor]]:
        """See ``engine.iterate``. A step is reported when the device has done it, and has been given the next by then.

        What is given owns its memory and holds for as long as it is kept.
        """
        under_way: deque[tuple[dict[str, DeviceTensor], Any]] = deque()
        try:
            for values in steps:
                under_way.append(self._step(values, carried))
                if len(under_way) > _STEPS_AHEAD:
                    yield self._finished(*under_way.popleft())
            while under_way:
                yield self._finished(*under_way.popleft())
        finally:
            self.close()

    def _step(self, values: Mapping[str, Array], carried: Mapping[str, str]) -> tuple[dict[str, DeviceTensor], Any]:
        """Hand over one step; its outputs, copied away from the next one, and the event of its end."""
        with self._device.errors(self._name):
            for name, value in values.items():
                self.write(name, value)
            self.replay()
            kept: dict[str, DeviceTensor] = {}
            for name, output in self.outputs.items():
                kept[name] = self._device.empty(output.shape, output.dtype.name)
                self._device.write(kept[name], output)
            for output, name in carried.items():
                self._device.write(self.inputs[name], self.outputs[output])
            return kept, self._device.compute.record()

    def _finished(self, outputs: dict[str, DeviceTensor], done: Any) -> dict[str, DeviceTensor]:
        self._device.make_current()
        with self._device.errors(self._name):
            done.sync()
        return outputs

    def close(self) -> None:
        """Let others have it; twice does no harm."""
        if self._bound is not None:
            self._bound = None
            self._device.make_current()  # the pool may drop another one for it
            self._give_back()

    def _open(self) -> Bound:
        if self._bound is None:
            raise EngineError(f"{self._name}: this capture has been given back")
        return self._bound
