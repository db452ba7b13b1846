# SPDX-License-Identifier: Apache-2.0
"""A GPU that is host memory: cuda-core and the driver's calls as far as the runtime uses them, for tests without a GPU.

``host_device()`` is the runtime's own ``Device`` on these. Work is not done when it is handed over but when somebody
waits for it, as on a GPU, so that a wait that is missing shows. Memory that was given back is overwritten, in the
order of its stream, so that a use after that shows as well. What it does not show is whether CUDA agrees.
"""

import ctypes
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from .gpu import Gpu
from .memory import DeviceTensor
from .stream import Device

__all__ = ["HOST_GPU", "HostBuffer", "HostCuda", "HostLayout", "HostStream", "host_device"]

HOST_GPU = Gpu(index=0, name="Host", compute_capability=(9, 0), memory_bytes=2**33, cuda_version=(13, 0))

_POISON = 0xDD
_ALIGNMENT = 256

Work = Callable[[], None]


class Result(IntEnum):
    """The driver's results that occur."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2


class CudaError(Exception):
    """As cuda-core's."""


class HostStream:
    """A stream: work in order, done when it is waited for.

    Args:
        eager: Do everything at once.
        recording: Where work goes instead, while it is captured.
    """

    def __init__(self, *, eager: bool = False, recording: list[Work] | None = None) -> None:
        self.eager = eager
        self.recording = recording
        self.waiting: deque[Work] = deque()
        self.handed = self.done = 0
        self.closed = False

    @property
    def handle(self) -> int:
        """A number that stands for it."""
        return id(self)

    def put(self, work: Work) -> None:
        """Hand work over."""
        if self.recording is not None:
            self.recording.append(work)
            return
        self.waiting.append(work)
        self.handed += 1
        if self.eager:
            self.run_until(self.handed)

    def run_until(self, count: int) -> None:
        """Do the work up to that number."""
        while self.done < count:
            self.done += 1
            self.waiting.popleft()()

    def record(self) -> "HostEvent":
        return HostEvent(self, self.handed)

    def wait(self, event: "HostEvent") -> None:
        self.put(event.sync)

    def sync(self) -> None:
        self.run_until(self.handed)

    def close(self) -> None:
        self.closed = True


@dataclass(frozen=True, slots=True)
class HostEvent:
    """The moment when a stream has done so much."""

    stream: HostStream
    count: int

    @property
    def is_done(self) -> bool:
        return self.stream.done >= self.count

    def sync(self) -> None:
        self.stream.run_until(self.count)


class HostBuffer:
    """Memory that is overwritten when it is given back."""

    def __init__(self, cuda: "HostCuda", size: int, stream: HostStream | None) -> None:
        self._cuda, self._stream = cuda, stream
        self.size = size
        self._memory = np.full(size + _ALIGNMENT, _POISON, np.uint8)
        start = -self._memory.ctypes.data % _ALIGNMENT
        self.handle = self._memory.ctypes.data + start
        cuda.used += size
        cuda.peak = max(cuda.peak, cuda.used)

    def __del__(self) -> None:
        memory, cuda, size = self._memory, self._cuda, self.size

        def give_back() -> None:
            memory.fill(_POISON)
            cuda.used -= size

        if self._stream is None:
            give_back()
        else:
            self._stream.put(give_back)


class HostGraph:
    """A recording."""

    def __init__(self, work: list[Work]) -> None:
        self.work = list(work)
        self.launches = 0
        self.closed = False

    def upload(self, stream: HostStream) -> None:
        assert not stream.closed

    def launch(self, stream: HostStream) -> None:
        if self.closed:
            raise CudaError("the graph was destroyed")
        self.launches += 1
        for work in self.work:
            stream.put(work)

    def close(self) -> None:
        self.closed = True


class HostGraphBuilder:
    """Records what its stream is given."""

    def __init__(self, cuda: "HostCuda") -> None:
        self._cuda = cuda
        self._work: list[Work] = []
        self.stream = HostStream()
        self.mode = ""

    def begin_building(self, mode: str = "relaxed") -> "HostGraphBuilder":
        self.mode = mode
        self.stream.recording = self._work
        return self

    def end_building(self) -> "HostGraphBuilder":
        self.stream.recording = None
        return self

    @property
    def graph_definition(self) -> Any:
        return SimpleNamespace(handle=self._work)

    def complete(self) -> HostGraph:
        graph = HostGraph(self._work)
        self._cuda.graphs.append(graph)
        return graph

    def close(self) -> None:
        self._cuda.builders_closed += 1


@dataclass(slots=True)
class HostCuda:
    """Everything that the runtime asks of cuda-core and of the driver.

    Attributes:
        eager: Work is done when it is handed over.
        memory_bytes: Size of the device.
        used: Bytes that are allocated.
        peak: Most that were.
        streams: In the order in which they were made.
        graphs: Every graph that was made.
        builders_closed: How many captures ended.
    """

    eager: bool = False
    memory_bytes: int = HOST_GPU.memory_bytes
    used: int = 0
    peak: int = 0
    streams: list[HostStream] = field(default_factory=list[HostStream])
    graphs: list[HostGraph] = field(default_factory=list[HostGraph])
    builders_closed: int = 0

    def core(self) -> Any:
        """``cuda.core``."""
        return SimpleNamespace(
            Device=lambda index: self._device(),
            StreamOptions=lambda *, nonblocking: SimpleNamespace(nonblocking=nonblocking),
            LegacyPinnedMemoryResource=lambda: SimpleNamespace(allocate=lambda size: HostBuffer(self, size, None)),
        )

    def _device(self) -> Any:
        return SimpleNamespace(
            set_current=lambda: None,
            create_stream=self._stream,
            allocate=self._allocate,
            create_graph_builder=lambda: HostGraphBuilder(self),
            memory_resource=SimpleNamespace(attributes=_Pool(self)),
        )

    def _stream(self, *, options: Any) -> HostStream:
        assert options.nonblocking
        self.streams.append(HostStream(eager=self.eager))
        return self.streams[-1]

    def _allocate(self, size: int, *, stream: HostStream) -> HostBuffer:
        if self.used + size > self.memory_bytes:
            raise CudaError("CUDA_ERROR_OUT_OF_MEMORY: the API call failed\nmore")
        return HostBuffer(self, size, stream)

    def driver(self) -> Any:
        """``cuda.bindings.driver``."""
        return SimpleNamespace(
            cuMemcpyHtoDAsync=self._copy,
            cuMemcpyDtoHAsync=self._copy,
            cuMemcpyDtoDAsync=self._copy,
            cuMemcpy2DAsync=self._copy_rows,
            cuMemsetD32Async=self._write_words,
            cuGraphGetNodes=lambda work: (Result.CUDA_SUCCESS, [], len(work)),
            CUDA_MEMCPY2D=SimpleNamespace,
            cuThreadExchangeStreamCaptureMode=lambda mode: (Result.CUDA_SUCCESS, mode),
            CUstreamCaptureMode=SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2),
            CUmemorytype=SimpleNamespace(CU_MEMORYTYPE_DEVICE=2),
            cuMemGetInfo=lambda: (Result.CUDA_SUCCESS, self.memory_bytes - self.used, self.memory_bytes),
        )

    @staticmethod
    def _copy(target: int, source: int, size: int, stream: int) -> tuple[Result]:
        _stream_of(stream).put(lambda: cast(None, ctypes.memmove(target, source, size)))
        return (Result.CUDA_SUCCESS,)

    @staticmethod
    def _copy_rows(copy: Any, stream: int) -> tuple[Result]:
        assert copy.srcMemoryType == copy.dstMemoryType == 2

        def work() -> None:
            for row in range(copy.Height):
                source = copy.srcDevice + row * copy.srcPitch
                ctypes.memmove(copy.dstDevice + row * copy.dstPitch, source, copy.WidthInBytes)

        _stream_of(stream).put(work)
        return (Result.CUDA_SUCCESS,)

    @staticmethod
    def _write_words(target: int, word: int, count: int, stream: int) -> tuple[Result]:
        def write() -> None:
            (ctypes.c_uint32 * count).from_address(target)[:] = [word] * count

        _stream_of(stream).put(write)
        return (Result.CUDA_SUCCESS,)


class _Pool:
    """A pool that holds nothing that is not used."""

    def __init__(self, cuda: HostCuda) -> None:
        self._cuda = cuda

    @property
    def used_mem_current(self) -> int:
        return self._cuda.used

    reserved_mem_current = used_mem_current


class HostLayout:
    """Turns latents as ``device_layout.LayoutKernels`` does, without a kernel.

    Attributes:
        turned: How many.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self.turned = 0

    def to_grid(self, tokens: DeviceTensor, shape: tuple[int, int, int]) -> DeviceTensor:
        _, count, channels = tokens.shape
        return self._turned(tokens, (count, channels), (1, channels, *shape))

    def to_tokens(self, grid: DeviceTensor) -> DeviceTensor:
        channels, count = grid.shape[1], math.prod(grid.shape[2:])
        return self._turned(grid, (channels, count), (1, count, channels))

    def _turned(self, source: DeviceTensor, flat: tuple[int, int], shape: tuple[int, ...]) -> DeviceTensor:
        self.turned += 1
        target = self._device.empty(shape, "float32")
        read, write = ((ctypes.c_float * math.prod(flat)).from_address(t.address) for t in (source, target))

        def work() -> None:
            values = np.frombuffer(memoryview(read), np.float32).reshape(flat)
            np.frombuffer(memoryview(write), np.float32).reshape(flat[::-1])[...] = values.T

        self._device.compute.raw.put(work)
        return target


def _stream_of(handle: int) -> HostStream:
    """The stream behind a number that ``HostStream.handle`` gave."""
    return cast(HostStream, ctypes.cast(handle, ctypes.py_object).value)


def host_device(*, eager: bool = False, memory_bytes: int = HOST_GPU.memory_bytes) -> tuple[Device, HostCuda]:
    """A device on host memory, and what stands behind it for assertions."""
    cuda = HostCuda(eager=eager, memory_bytes=memory_bytes)
    return Device(HOST_GPU, cuda.core(), cuda.driver()), cuda
