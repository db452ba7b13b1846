# SPDX-License-Identifier: Apache-2.0
"""Ranges of activations, gathered batch by batch in constant memory."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["Magnitudes"]

# Sign, exponent and the first six mantissa bits of an fp32 number: 64 bins an octave, so that a percentile read from
# the histogram is at most 1.6 % too high.
_SHIFT = 17
_BINS = 1 << (31 - _SHIFT)


@dataclass(slots=True)
class Magnitudes:
    """How large the elements of one tensor were.

    Attributes:
        amax: Largest magnitude so far.
        count: Elements so far.
    """

    amax: float = 0.0
    count: int = 0
    _bins: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))

    def update(self, values: NDArray[np.floating]) -> None:
        """Count a batch.

        Raises:
            ValueError: It holds infinities or NaN.
        """
        if values.size == 0:
            return
        magnitudes = np.abs(np.ascontiguousarray(values, np.float32)).reshape(-1)
        largest = float(magnitudes.max())
        if not np.isfinite(largest):
            raise ValueError("not finite")
        self.amax, self.count = max(self.amax, largest), self.count + magnitudes.size
        self._bins += np.bincount(magnitudes.view(np.uint32) >> np.uint32(_SHIFT), minlength=_BINS)

    def percentile(self, rank: float) -> float:
        """Smallest bin edge that ``rank`` percent of all elements so far do not exceed, at most ``amax``."""
        if self.count == 0:
            return 0.0
        index = int(np.searchsorted(np.cumsum(self._bins), rank / 100 * self.count, side="left"))
        edge = np.array([(index + 1) << _SHIFT], np.uint32).view(np.float32)[0]
        return min(float(edge), self.amax)
