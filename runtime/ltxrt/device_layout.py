# SPDX-License-Identifier: Apache-2.0
"""Latents between the networks, on the device: a kernel turns tokens into a grid and back (``ltxrt_kernels``).

Where the kernels cannot be compiled, latents go through the host, with the same result. Never run on a GPU yet; the
kernel itself is tested against its reference without one.
"""

import os
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from .memory import DeviceTensor
from .stream import Device

__all__ = ["LayoutKernels", "kernel_folder", "open_layout"]


class LayoutKernels:
    """Transposes latents on one device. Not for several threads at once.

    Args:
        device: Current in this thread.
        kernels: ``ltxrt_kernels.launch.DeviceKernels`` of it.
    """

    def __init__(self, device: Device, kernels: Any) -> None:
        self._device = device
        self._kernels = kernels
        self._statistics: dict[int, tuple[DeviceTensor, DeviceTensor]] = {}

    def to_grid(self, tokens: DeviceTensor, shape: tuple[int, int, int]) -> DeviceTensor:
        """Tokens [1, N, C] fp32 to a grid [1, C, f, h, w], in the order of the compute stream."""
        _, count, channels = tokens.shape
        return self._moved(tokens, (1, channels, *shape), count, pack=False)

    def to_tokens(self, grid: DeviceTensor) -> DeviceTensor:
        """A grid [1, C, f, h, w] fp32 to tokens [1, N, C]."""
        _, channels, frames, height, width = grid.shape
        count = frames * height * width
        return self._moved(grid, (1, count, channels), count, pack=True)

    def _moved(self, source: DeviceTensor, shape: tuple[int, ...], tokens: int, *, pack: bool) -> DeviceTensor:
        from ltxrt_kernels.latent_layout import LatentLayout

        channels = source.shape[1] if pack else source.shape[2]
        problem = LatentLayout(tokens=tokens, channels=channels, pack=pack, source="float32", target="float32")
        mean, deviation = self._identity(channels)
        target = self._device.empty(shape, "float32")
        addresses = {
            "source": source.address,
            "mean": mean.address,
            "std": deviation.address,
            "out": target.address,
        }
        self._kernels.load(problem).launch(self._device.compute.raw, addresses)
        return target

    def _identity(self, channels: int) -> tuple[DeviceTensor, DeviceTensor]:
        """Statistics that change nothing: the networks apply the real ones."""
        if channels not in self._statistics:
            self._statistics[channels] = (
                self._device.place(np.zeros(channels, np.float32)),
                self._device.place(np.ones(channels, np.float32)),
            )
        return self._statistics[channels]


def kernel_folder() -> Path:
    """Where compiled kernels are kept: ``ltxrt/kernels`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "ltxrt" / "kernels"


def open_layout(device: Device, channels: int) -> tuple[LayoutKernels | None, str]:
    """The kernels of a device, compiled for latents of that width; or None and why there are none."""
    try:
        cache = import_module("ltxrt_kernels.cache")
        launch = import_module("ltxrt_kernels.launch")
        layouts = import_module("ltxrt_kernels.latent_layout")
    except ImportError as error:
        return None, f"the kernels cannot be loaded: {error}"
    kernels = launch.DeviceKernels(device.raw, cache.CubinCache(kernel_folder()))
    try:
        # How wide an access may be depends on what divides the number of tokens: 1, 2 and 4 stand for all numbers.
        for tokens, pack in product((1, 2, 4), (False, True)):
            problem = layouts.LatentLayout(
                tokens=tokens, channels=channels, pack=pack, source="float32", target="float32"
            )
            with device.errors("loading a kernel"):
                kernels.load(problem)
    # The compiler's own error, the runtime's, and that of the search for headers are RuntimeErrors.
    except (RuntimeError, ValueError, OSError) as error:
        return None, f"the kernels cannot be compiled: {error}"
    return LayoutKernels(device, kernels), ""
