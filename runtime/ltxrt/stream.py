# SPDX-License-Identifier: Apache-2.0
"""One GPU for the runtime: its streams, memory, and copies between host and device.

Everything is computed in the order of one stream, in which it was handed over, whichever thread did so: that is what
lets all engines share their working memory, and tensors follow each other without waiting. A second stream copies
results out beside it. Only ``np.asarray`` of a device tensor, a ``HostCopy`` and ``sync`` wait.

Checked against the interfaces of cuda-core 1.2 and cuda-bindings 13; it has never run on a GPU.
"""

import math
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from .engine import Array, Tensor
from .errors import EngineError
from .gpu import Gpu, find_gpus
from .memory import DeviceMemory, DeviceTensor, PinnedBlock, PinnedPool, Scratch
from .memory_plan import ALIGNMENT_BYTES

__all__ = ["Device", "Stream", "open_device"]

_INSTALL = "run pip install 'ltxrt[gpu]'"
_WORD_BYTES = 4


@dataclass(frozen=True, slots=True)
class Rows:
    """A part of every row: ``width_bytes`` out of ``pitch_bytes``, ``count`` times."""

    width_bytes: int
    pitch_bytes: int
    count: int


class Stream:
    """cuda-core's ``Stream`` with the copies that it has no call for: raw addresses, and one word by value.

    Attributes:
        raw: cuda-core's, for ``ltxrt_kernels``' launches.
    """

    def __init__(self, raw: Any, driver: ModuleType) -> None:
        self.raw = raw
        self._driver = driver

    @property
    def handle(self) -> int:
        """The ``CUstream`` as a number."""
        return int(self.raw.handle)

    def upload(self, target: int, source: int, size_bytes: int) -> None:
        """Copy from page-locked host memory, which must hold until the copy is done."""
        self._done("cuMemcpyHtoDAsync", target, source, size_bytes, self.raw.handle)

    def download(self, target: int, source: int, size_bytes: int) -> None:
        """Copy to page-locked host memory."""
        self._done("cuMemcpyDtoHAsync", target, source, size_bytes, self.raw.handle)

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        """Copy within the device; the two must not overlap."""
        self._done("cuMemcpyDtoDAsync", target, source, size_bytes, self.raw.handle)

    def copy_rows(self, target: int, source: int, rows: "Rows") -> None:
        """Copy the same part of every row within the device; the target is dense."""
        copy = self._driver.CUDA_MEMCPY2D()
        copy.srcMemoryType = copy.dstMemoryType = self._driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.srcDevice, copy.dstDevice = source, target
        copy.srcPitch, copy.dstPitch = rows.pitch_bytes, rows.width_bytes
        copy.WidthInBytes, copy.Height = rows.width_bytes, rows.count
        self._done("cuMemcpy2DAsync", copy, self.raw.handle)

    def write_word(self, target: int, word: int) -> None:
        """Write 32 bits that travel with the call: no host memory has to hold, and nothing waits."""
        self._done("cuMemsetD32Async", target, word, 1, self.raw.handle)

    def record(self) -> Any:
        """An event (cuda-core's) that comes when all work handed over so far is done."""
        return self.raw.record()

    def wait(self, event: Any) -> None:
        """Let what is handed over from now on wait for an event; the host goes on."""
        self.raw.wait(event)

    def sync(self) -> None:
        """Wait, on the host, for all work handed over so far."""
        self.raw.sync()

    def close(self) -> None:
        """Destroy the stream."""
        self.raw.close()

    def _done(self, call: str, *arguments: Any) -> None:
        (result,) = getattr(self._driver, call)(*arguments)
        if int(result):
            raise EngineError(f"the GPU refuses {call}: {result.name}")


class Layout(Protocol):
    """What turns latents on the device (``device_layout.LayoutKernels``)."""

    def to_grid(self, tokens: DeviceTensor, shape: tuple[int, int, int]) -> DeviceTensor: ...

    def to_tokens(self, grid: DeviceTensor) -> DeviceTensor: ...


class Device:
    """An opened GPU. Safe to share between threads: a clip's steps need not come from the same one.

    What hands work over or asks the driver here makes the GPU current first; who calls CUDA otherwise does so himself.

    Args:
        gpu: As the driver tells it.
        core: The module ``cuda.core``.
        driver: The module ``cuda.bindings.driver``.

    Attributes:
        gpu: As given.
        compute: The stream that everything is computed on.
        copies: The stream that results are copied out on.
        sessions: The stream of ONNX Runtime, which captures all that its stream is given, from whichever thread. Only
            who holds ``sessions_lock`` hands work over to it, and joins it to the compute stream on both sides.
        sessions_lock: See ``sessions``.
        pinned: Page-locked host memory.
        scratch: The engines' working memory.
        layout: Turns latents; None lets them go through the host.
        give_back_spare: Gives back what is held only to be faster next time.
    """

    def __init__(self, gpu: Gpu, core: ModuleType, driver: ModuleType) -> None:
        self.gpu = gpu
        self._core = core
        self._driver = driver
        self._local = threading.local()
        with self.errors("opening the GPU"):
            self._raw = core.Device(gpu.index)
            self.make_current()
            self.compute, self.copies, self.sessions = (self._new_stream() for _ in range(3))
        self.sessions_lock = threading.Lock()
        host = core.LegacyPinnedMemoryResource()
        self.pinned = PinnedPool(lambda size: PinnedBlock(host.allocate(size)))
        self.scratch = Scratch(self.allocate)
        self.layout: Layout | None = None
        self.give_back_spare: Callable[[], None] = lambda: None

    def make_current(self) -> None:
        """Make it the GPU that CUDA uses in the calling thread. Deserialised engines belong to the current one."""
        if not getattr(self._local, "current", False):
            self._raw.set_current()
            # ONNX Runtime captures in a mode that forbids every other thread to allocate, unless it declares this one.
            self._driver.cuThreadExchangeStreamCaptureMode(
                self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
            )
            self._local.current = True

    def _new_stream(self) -> Stream:
        return Stream(self._raw.create_stream(options=self._core.StreamOptions(nonblocking=True)), self._driver)

    def free_bytes(self) -> int:
        """Memory that an allocation could get: the device's free memory and what the pool holds unused."""
        self.make_current()
        result, free, _total = self._driver.cuMemGetInfo()
        if int(result):
            raise EngineError(f"the GPU refuses cuMemGetInfo: {result.name}")
        pool = self._raw.memory_resource.attributes
        return int(free) + int(pool.reserved_mem_current) - int(pool.used_mem_current)

    def held_bytes(self) -> int:
        """Memory that this program's own blocks and tensors take; loaded engines are not among them."""
        return int(self._raw.memory_resource.attributes.used_mem_current)

    def allocate(self, size_bytes: int) -> DeviceMemory:
        """A block of its own, in the order of the compute stream; where memory is short, what is spare goes first.

        Raises:
            EngineError: There is no such block; the message says how much is free.
        """
        size = max(ALIGNMENT_BYTES, size_bytes)
        self.make_current()
        try:
            return self._block(size)
        except EngineError:
            self.give_back_spare()
            self.compute.sync()
        try:
            return self._block(size)
        except EngineError as error:
            raise EngineError(f"{error} ({_gib(self.free_bytes())} free on {self.gpu.name})") from error

    def _block(self, size: int) -> DeviceMemory:
        with self.errors(f"allocating {_gib(size)}"):
            return DeviceMemory(self._raw.allocate(size, stream=self.compute.raw))

    def empty(self, shape: tuple[int, ...], dtype: str) -> DeviceTensor:
        """A tensor that owns its memory, of no particular content."""
        memory = self.allocate(math.prod(shape) * np.dtype(dtype).itemsize)
        return DeviceTensor(self, memory.address, shape, dtype, memory)

    def part(self, tensor: DeviceTensor, axis: int, start: int, stop: int) -> DeviceTensor:
        """A range of one axis, as a dense tensor of its own."""
        shape = (*tensor.shape[:axis], stop - start, *tensor.shape[axis + 1 :])
        made = self.empty(shape, tensor.dtype.name)
        inner = math.prod(tensor.shape[axis + 1 :]) * tensor.dtype.itemsize
        rows = Rows((stop - start) * inner, tensor.shape[axis] * inner, math.prod(tensor.shape[:axis]))
        if made.nbytes:
            self.compute.copy_rows(made.address, tensor.address + start * inner, rows)
        return made

    def place(self, value: Tensor) -> DeviceTensor:
        """``value`` itself where it lies here already, otherwise a copy on the device that owns its memory."""
        if isinstance(value, DeviceTensor) and value.device is self:
            return value
        tensor = self.empty(value.shape, value.dtype.name)
        self.write(tensor, value)
        return tensor

    def write(self, target: DeviceTensor, value: Tensor) -> None:
        """Overwrite a tensor with one of the same size, in the order of the compute stream; nothing waits."""
        if value.nbytes == 0:
            return
        self.make_current()
        if isinstance(value, DeviceTensor) and value.device is self:
            if value.address != target.address:
                self.compute.copy(target.address, value.address, value.nbytes)
            return
        host = np.ascontiguousarray(value)
        if host.nbytes == _WORD_BYTES:
            self.compute.write_word(target.address, int(host.reshape(-1).view(np.uint32)[0]))
            return
        self._upload(target.address, host)

    def _upload(self, address: int, host: Array) -> None:
        block = self.pinned.take(host.nbytes)
        block.fill(host)
        self.compute.upload(address, block.address, host.nbytes)
        self.pinned.give_back(block, self.compute.record())

    def graph_builder(self) -> Any:
        """cuda-core's ``GraphBuilder``, on a stream of its own: what other threads hand over is not captured."""
        return self._raw.create_graph_builder()

    def node_count(self, definition: Any) -> int:
        """Operations in a captured graph. cuda-core would make an object of each of its thousands of kernels."""
        result, _, count = self._driver.cuGraphGetNodes(definition.handle)
        if int(result):
            raise EngineError(f"the GPU refuses cuGraphGetNodes: {result.name}")
        return int(count)

    def inside(self, raw: Any) -> Stream:
        """The stream of a graph builder."""
        return Stream(raw, self._driver)

    @property
    def raw(self) -> Any:
        """cuda-core's ``Device``, for ``ltxrt_kernels``."""
        return self._raw

    def close(self) -> None:
        """Wait for all work and destroy the streams."""
        for stream in (self.sessions, self.compute, self.copies):
            stream.sync()
            stream.close()

    @contextmanager
    def errors(self, doing: str) -> Generator[None]:
        """Errors of cuda-core within the block, as one line."""
        try:
            yield
        except _cuda_errors() as error:
            told = " ".join((str(error).splitlines() or [type(error).__name__])[0].split())
            raise EngineError(f"the GPU fails in {doing}: {told}") from error


def open_device(index: int = 0) -> Device:
    """Open a GPU.

    Args:
        index: As CUDA counts them.

    Raises:
        EngineError: No driver, no such GPU, or cuda-core is not installed: each in one line.
    """
    search = find_gpus()
    if index >= len(search.gpus):
        raise EngineError(search.reason or f"there is no GPU {index}, only {len(search.gpus)}")
    try:
        core, driver = import_module("cuda.core"), import_module("cuda.bindings.driver")
    except ImportError as error:
        raise EngineError(f"cuda-core cannot be loaded ({error}): {_INSTALL}") from error
    return Device(search.gpus[index], core, driver)


def _cuda_errors() -> tuple[type[Exception], ...]:
    """What cuda-core raises when the driver refuses; it has no public name."""
    try:
        return (import_module("cuda.core._utils.cuda_utils").CUDAError,)
    except (ImportError, AttributeError):
        return ()


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 1024**3:.2f} GiB"
