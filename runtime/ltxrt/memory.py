# SPDX-License-Identifier: Apache-2.0
"""Device memory: blocks that are owned, tensors that own or borrow one, and copies on their way to the host.

Memory is given back in the order of the compute stream, so an owner may go as soon as the work that uses it has been
handed over. Checked against the interfaces of cuda-core 1.2 and cuda-bindings 13; it has never run on a GPU.
"""

import ctypes
import math
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .engine import Array

if TYPE_CHECKING:
    from .stream import Device

__all__ = ["DeviceMemory", "DeviceTensor", "HostCopy", "PinnedBlock", "PinnedPool", "Scratch"]

_LEAST_PINNED_BYTES = 4096


class DeviceMemory:
    """A block of device memory that is given back when this object is collected.

    Args:
        raw: cuda-core's ``Buffer``.
    """

    __slots__ = ("_raw", "address", "size_bytes")

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.address = int(raw.handle)
        self.size_bytes = int(raw.size)


class DeviceTensor:
    """A dense tensor in device memory (see ``engine.Tensor``).

    Work on it is ordered by the device's compute stream. ``np.asarray`` waits for that work and gives a copy.

    Args:
        device: Where it lies.
        address: Of its first element; a multiple of 256 for everything that the runtime makes itself.
        shape: Sizes, row-major.
        dtype: NumPy's name of the element type.
        owner: Whatever keeps the memory; None for borrowed memory, which its lender may overwrite or give back.
    """

    __slots__ = ("_device", "_owner", "address", "dtype", "shape")

    def __init__(self, device: "Device", address: int, shape: tuple[int, ...], dtype: str, owner: object) -> None:
        self._device = device
        self._owner = owner
        self.address = address
        self.shape = tuple(shape)
        self.dtype: np.dtype[Any] = np.dtype(dtype)

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def device(self) -> "Device":
        """Where it lies."""
        return self._device

    @property
    def borrowed(self) -> bool:
        """Whether the memory belongs to somebody else, who may overwrite it."""
        return self._owner is None

    def fetch(self) -> "HostCopy":
        """Begin to copy it to the host, after all work that the compute stream has been handed so far."""
        return HostCopy(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("a tensor on a device cannot be read without a copy")
        host = self.fetch().wait()
        return host if dtype is None else host.astype(dtype, copy=False)


class HostCopy:
    """A tensor on its way to the host, in page-locked memory, beside what the compute stream does next.

    Args:
        tensor: What is copied. It is kept until the copy is done.
    """

    def __init__(self, tensor: DeviceTensor) -> None:
        self._tensor: DeviceTensor | None = tensor
        self._device = tensor.device
        self._device.make_current()
        copies, compute = self._device.copies, self._device.compute
        with self._device.errors("copying a result to the host"):
            self._block = self._device.pinned.take(tensor.nbytes)
            copies.wait(compute.record())
            if tensor.nbytes:
                copies.download(self._block.address, tensor.address, tensor.nbytes)
            self._done = copies.record()

    def wait(self) -> Array:
        """The values. The array is the caller's; its memory is used again once no view of it is left."""
        tensor = self._tensor
        if tensor is None:
            raise ValueError("the copy has been handed out already")
        self._device.make_current()
        with self._device.errors("copying a result to the host"):
            self._done.sync()
        self._tensor = None
        return self._block.array(tensor.shape, tensor.dtype, self._device.pinned, self._done)

    def __del__(self) -> None:
        if getattr(self, "_tensor", None) is not None and hasattr(self, "_done"):
            # Nobody waited: what lies at the source must not be overwritten before it has been read.
            self._device.make_current()
            self._device.compute.wait(self._done)
            self._device.pinned.give_back(self._block, self._done)


class PinnedBlock:
    """Page-locked host memory, which a device copies from and to without the processor.

    Args:
        raw: cuda-core's ``Buffer``.
    """

    __slots__ = ("_raw", "address", "size_bytes")

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.address = int(raw.handle)
        self.size_bytes = int(raw.size)

    def fill(self, source: Array) -> None:
        """Overwrite its beginning with the bytes of a contiguous array."""
        ctypes.memmove(self.address, source.ctypes.data, source.nbytes)

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any], pool: "PinnedPool", done: Any) -> Array:
        """Its beginning as an array; the block goes back to ``pool`` with the last view of it."""
        memory = (ctypes.c_uint8 * self.size_bytes).from_address(self.address)
        weakref.finalize(memory, pool.give_back, self, done)
        return np.frombuffer(memoryview(memory), dtype, math.prod(shape)).reshape(shape)


class PinnedPool:
    """Page-locked blocks that are used again, in powers of two. Safe to share between threads.

    Locking pages takes milliseconds, so that a clip should find its blocks locked.

    Args:
        allocate: Gives a block of that many bytes.
    """

    def __init__(self, allocate: Callable[[int], PinnedBlock]) -> None:
        self._allocate = allocate
        # Blocks come back from finalizers, which run in the middle of anything: of ``take`` in the same thread too.
        self._lock = threading.RLock()
        self._idle: dict[int, list[tuple[PinnedBlock, Any]]] = {}

    def take(self, size_bytes: int) -> PinnedBlock:
        """A block of at least that size which no copy reads or writes any more."""
        size = max(_LEAST_PINNED_BYTES, 1 << max(0, size_bytes - 1).bit_length())
        with self._lock:
            idle = self._idle.get(size, [])
            for index, (_, done) in enumerate(idle):
                if done.is_done:
                    return idle.pop(index)[0]
        return self._allocate(size)

    def give_back(self, block: PinnedBlock, done: Any) -> None:
        """Take a block back; it is free once the event ``done`` has come."""
        with self._lock:
            self._idle.setdefault(block.size_bytes, []).append((block, done))


class Scratch:
    """Working memory of all engines of a device: one block, as large as the most demanding of them.

    Legal because every engine runs on the one compute stream, so that no two run at a time. A captured graph holds
    the block that it was captured with, so that the block may grow under it.
    """

    def __init__(self, allocate: Callable[[int], DeviceMemory]) -> None:
        self._allocate = allocate
        self._lock = threading.Lock()
        self._block: DeviceMemory | None = None

    @property
    def size_bytes(self) -> int:
        """Size of the block that new work gets."""
        return 0 if self._block is None else self._block.size_bytes

    def reserve(self, size_bytes: int) -> DeviceMemory:
        """A block of at least that size; keep it for as long as work may use it.

        Raises:
            EngineError: The device has no such block.
        """
        with self._lock:
            if self._block is None or self._block.size_bytes < size_bytes:
                # The old block goes first: both together may not fit.
                self._block = None
                self._block = self._allocate(size_bytes)
            return self._block
