# SPDX-License-Identifier: Apache-2.0
"""Kernels on a device: loaded once, launched on a stream. Needs a GPU and ``cuda-core``, of the ``gpu`` extra.

Checked against the interface of cuda-core 1.2 without a device; it has not run on one yet.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np

from .cache import CubinCache
from .program import architecture_for
from .spec import Problem

__all__ = ["DeviceKernels", "LoadedKernel"]

_ALIGNMENT_BYTES = 16


@dataclass(frozen=True, slots=True)
class LoadedKernel:
    """A kernel at one size. A captured graph keeps the addresses of the launch that it captured.

    Attributes:
        problem: The size.
        kernel: cuda-core's ``Kernel``.
        config: Its ``LaunchConfig``.
        integers: The kernel's ``int`` arguments.
    """

    problem: Problem
    kernel: Any
    config: Any
    integers: tuple[int, ...]

    def launch(self, stream: Any, addresses: Mapping[str, int]) -> None:
        """Enqueue it; nothing waits for the result.

        Args:
            stream: cuda-core's ``Stream``, or the ``GraphBuilder`` that captures.
            addresses: Of every input and output in device memory, by name. What lies there is not checked.

        Raises:
            ValueError: An address is missing, unknown, or not a multiple of 16.
        """
        arguments = self.arguments(addresses)
        import_module("cuda.core").launch(stream, self.config, self.kernel, *arguments)

    def arguments(self, addresses: Mapping[str, int]) -> tuple[int | np.int32, ...]:
        """What the kernel is called with: cuda-core passes an ``int`` as a pointer, an ``np.int32`` as C's ``int``."""
        inputs, outputs = ([port.name for port in side] for side in (self.problem.inputs, self.problem.outputs))
        if set(addresses) != {*inputs, *outputs}:
            raise ValueError(f"{self.problem.op}: tensors {sorted(addresses)} given; allowed: {[*inputs, *outputs]}")
        for name, address in addresses.items():
            if address % _ALIGNMENT_BYTES:
                raise ValueError(f"{self.problem.op}: {name} lies at {address:#x}; allowed: multiples of 16")
        return (
            *(int(addresses[name]) for name in inputs),
            *(np.int32(value) for value in self.integers),
            *(int(addresses[name]) for name in outputs),
        )


@dataclass(frozen=True, slots=True)
class DeviceKernels:
    """The kernels of one device. Not for several threads at once.

    Attributes:
        device: cuda-core's ``Device``, current in this thread.
        cache: Where compiled kernels lie or will lie.
    """

    device: Any
    cache: CubinCache
    _loaded: dict[Problem, LoadedKernel] = field(default_factory=dict[Problem, LoadedKernel], init=False)
    _modules: dict[bytes, Any] = field(default_factory=dict[bytes, Any], init=False)

    def load(self, problem: Problem) -> LoadedKernel:
        """The kernel of a problem, compiled and loaded at most once.

        Raises:
            CompilerError: It is not in the cache, and there is no compiler or it refuses the kernel.
            ValueError: No architecture's code runs on this device.
        """
        if problem not in self._loaded:
            core = import_module("cuda.core")
            code = self.cache.cubin(problem, architecture_for(tuple(self.device.compute_capability)))
            if code not in self._modules:
                self._modules[code] = core.ObjectCode.from_cubin(code, name=problem.op)
            launch = problem.launch()
            config = core.LaunchConfig(grid=launch.grid, block=launch.block)
            kernel = self._modules[code].get_kernel(problem.op)
            self._loaded[problem] = LoadedKernel(problem, kernel, config, launch.integers)
        return self._loaded[problem]
