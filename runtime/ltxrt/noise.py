# SPDX-License-Identifier: Apache-2.0
"""Seeded Gaussian noise, the same on every backend and machine.

Definition, so that it can be written again anywhere: the 64-bit outputs of Philox-4x64-10 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011; NumPy's ``Philox``) with the key (seed, stream) and the
counters 1, 2, 3, ... are taken in pairs. Of each, the upper 53 bits make u = (bits + 0.5) / 2^53 in (0, 1]. The pair
(u, v) gives the two normals sqrt(-2 ln u) * cos(2 pi v) and sqrt(-2 ln u) * sin(2 pi v) (Box-Muller), in fp64, rounded
to fp32. NumPy's own ``standard_normal`` is not used: its method may change between NumPy releases. What is left to the
machine is the last bit of fp64 ln, sin and cos, which reaches the fp32 result about once in 10^10 values.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["gaussian"]


def gaussian(seed: int, stream: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal fp32 values.

    Args:
        seed: The request's seed, 0 to 2^64 - 1.
        stream: Which use of the seed: 1 and 2 are the two denoising stages. Streams are independent.
        shape: Shape of the result, filled in C order: a smaller draw is the beginning of a larger one.
    """
    count = int(np.prod(shape))
    key = np.array([seed, stream], np.uint64)
    bits = np.random.Philox(key=key).random_raw(count + count % 2).reshape(-1, 2)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log(uniform[:, 0]))
    angle = 2.0 * np.pi * uniform[:, 1]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs.reshape(-1)[:count].astype(np.float32).reshape(shape)
