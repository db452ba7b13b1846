# SPDX-License-Identifier: Apache-2.0
"""What every op declares: its tensors, how it is launched, and how far it may be from its reference.

An op is a folder: the formula in words and the launch table in ``__init__.py``, the NumPy statement and inputs to try
it on in ``reference.py``, the CUDA C++ in ``kernel.cu``. The kernel's function has the folder's name and takes the
inputs' pointers, the integers, then the outputs' pointers, in the order of the declaration: the order of TensorRT's
ahead-of-time plugins too, which is also why no floating-point number is an argument.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, prod
from typing import ClassVar

import numpy as np

from .dtypes import STORAGE, Dtype

__all__ = ["C_TYPES", "Launch", "Port", "Problem", "Tolerance", "ceil_div", "spread", "vector_of"]

#: What a kernel's source calls the floating-point types.
C_TYPES: Mapping[Dtype, str] = {
    "float32": "float",
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "float8_e4m3": "ltxrt::E4m3",
}

_ACCESS_BYTES = 16
_LARGEST_BLOCK = 512
_WARP = 32


@dataclass(frozen=True, slots=True)
class Port:
    """A tensor that a kernel reads or writes: dense, row-major, its address a multiple of 16 bytes."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return prod(self.shape) * np.dtype(STORAGE[self.dtype]).itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A row of a launch table.

    Attributes:
        defines: What the source is compiled with; everything else about the launch may change without compiling.
        grid: Blocks, in three dimensions.
        block: Threads of a block.
        integers: The kernel's ``int`` arguments.
    """

    defines: Mapping[str, str | int]
    grid: tuple[int, int, int]
    block: int
    integers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far an output may be from the reference, beyond the rounding to its own type.

    Attributes:
        of_value: Share of the value itself.
        of_peak: Share of the largest value of the output.
        differing: Largest share of the elements that may differ at all; None for no such limit.
    """

    of_value: float = 0.0
    of_peak: float = 0.0
    differing: float | None = None


@dataclass(frozen=True)
class Problem(ABC):
    """An op at one size: everything that has to be known to compile, launch and check it."""

    op: ClassVar[str]
    tolerance: ClassVar[Tolerance]
    #: Most registers that a thread may use on any architecture, for what production launches.
    max_registers: ClassVar[int]

    @property
    @abstractmethod
    def inputs(self) -> tuple[Port, ...]:
        """Tensors that are read, in the order of the kernel's arguments."""

    @property
    @abstractmethod
    def outputs(self) -> tuple[Port, ...]:
        """Tensors that are written."""

    @abstractmethod
    def launch(self) -> Launch:
        """The row of the launch table."""

    @property
    def moved_bytes(self) -> int:
        """Least traffic with memory: every input once and every output once."""
        return sum(port.bytes for port in (*self.inputs, *self.outputs))


def ceil_div(count: int, size: int) -> int:
    """How many pieces of ``size`` cover ``count``."""
    return -(-count // size)


def vector_of(extent: int, *dtypes: Dtype) -> int:
    """Values that move in one access: as many as 16 bytes hold of the widest type and as divide ``extent``.

    Rows that start on a multiple of their own length stay aligned that way, whatever the length.
    """
    widest = max(np.dtype(STORAGE[dtype]).itemsize for dtype in dtypes)
    return gcd(extent, _ACCESS_BYTES // widest)


def spread(vectors: int) -> int:
    """Threads for a row of ``vectors`` accesses: whole warps, at most two accesses a thread while 512 threads allow it.

    Two accesses in flight a thread hide latency; more cost registers, and with them blocks that could be resident.
    """
    threads = _WARP
    while threads < _LARGEST_BLOCK and vectors > 2 * threads:
        threads *= 2
    return threads
