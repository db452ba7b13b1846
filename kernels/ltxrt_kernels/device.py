# SPDX-License-Identifier: Apache-2.0
"""One problem's tensors in device memory, for tests and benchmarks: the runtime has its own plan for memory.

Checked against the interfaces of cuda-core 1.2 and cuda-bindings 13 without a device; it has not run on one yet.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import Arrays
from .dtypes import STORAGE
from .spec import Problem

__all__ = ["DeviceTensors", "opened_device"]


@contextmanager
def opened_device(index: int = 0) -> Generator[tuple[Any, Any]]:
    """A device, made current in this thread, and a stream of its own on it, both cuda-core's.

    Probe for a driver first (``ltxrt.doctor.nvidia``): cuda-core says less clearly that there is none.
    """
    core = import_module("cuda.core")
    device = core.Device(index)
    device.set_current()
    stream = device.create_stream(options=core.StreamOptions(nonblocking=True))
    try:
        yield device, stream
    finally:
        stream.close()


class DeviceTensors:
    """Inputs and outputs of one problem, each in a buffer of its own; a context manager.

    Attributes:
        problem: The problem.
        addresses: Of every tensor, by name.
    """

    def __init__(self, device: Any, stream: Any, problem: Problem) -> None:
        self.problem = problem
        self._stream = stream
        ports = (*problem.inputs, *problem.outputs)
        self._buffers = {port.name: device.allocate(port.bytes, stream=stream) for port in ports}
        stream.sync()
        self.addresses = {name: int(buffer.handle) for name, buffer in self._buffers.items()}

    def __enter__(self) -> "DeviceTensors":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory back; twice does no harm."""
        for buffer in self._buffers.values():
            buffer.close(self._stream)
        self._buffers.clear()

    def upload(self, inputs: Mapping[str, NDArray[Any]]) -> None:
        """Copy inputs to the device, and wait."""
        driver = import_module("cuda.bindings.driver")
        kept = [np.ascontiguousarray(inputs[port.name]) for port in self.problem.inputs]
        for port, host in zip(self.problem.inputs, kept, strict=True):
            # On the stream: a plain copy of pageable memory may return before the device has all of it, and a stream
            # that does not wait for the default one would not wait for that either.
            arguments = self.addresses[port.name], host.ctypes.data, port.bytes, self._stream.handle
            _done(driver.cuMemcpyHtoDAsync(*arguments), "cuMemcpyHtoDAsync")
        self._stream.sync()

    def download(self) -> Arrays:
        """Wait for the stream, and copy the outputs from the device."""
        driver = import_module("cuda.bindings.driver")
        self._stream.sync()
        outputs: Arrays = {}
        for port in self.problem.outputs:
            host = np.empty(port.shape, STORAGE[port.dtype])
            _done(driver.cuMemcpyDtoH(host.ctypes.data, self.addresses[port.name], port.bytes), "cuMemcpyDtoH")
            outputs[port.name] = host
        return outputs


def _done(returned: tuple[Any, ...], call: str) -> None:
    if returned[0].value:
        raise RuntimeError(f"{call}: {returned[0].name}")
