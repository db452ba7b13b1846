# SPDX-License-Identifier: Apache-2.0
"""Random weights that are the same bytes on every machine, and plausible enough that every network responds.

Values are uniform, from raw Philox bits through exact float32 arithmetic and correctly rounded square roots:
no logarithm or cosine whose last bit depends on the math library. Each tensor has its own key, so adding or
resizing one leaves the others as they are.
"""

import hashlib
import math
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["random_tensor"]


@dataclass(frozen=True, slots=True)
class _Uniform:
    """Uniform in [centre - half_width, centre + half_width)."""

    centre: float
    half_width: float


@dataclass(frozen=True, slots=True)
class _FanIn:
    """Uniform around 0, so that unit-variance inputs give outputs of standard deviation ``gain``."""

    gain: float


#: First pattern that is found in the stored key decides.
_RULES: tuple[tuple[re.Pattern[str], _Uniform | _FanIn], ...] = tuple(
    (re.compile(pattern), rule)
    for pattern, rule in (
        (r"std-of-means$", _Uniform(1.0, 0.5)),
        (r"mean-of-means$", _Uniform(0.0, 0.5)),
        (r"learnable_registers$", _Uniform(0.0, 1.0)),
        (r"scale_shift_table", _Uniform(0.0, 0.3)),
        # Gemma stores its norm weights less 1.
        (r"^language_model\..*norm\.weight$", _Uniform(0.0, 0.1)),
        (r"norm\d?\.weight$", _Uniform(1.0, 0.1)),
        # Gemma multiplies its embeddings by the square root of the width, 8.
        (r"embed_tokens\.weight$", _Uniform(0.0, 0.2)),
        (r"\.bias$", _Uniform(0.0, 0.05)),
        (r"adaln_single\.linear\.weight$", _FanIn(0.3)),
        # What a residual branch adds stays below what it is added to.
        (r"\.(to_out\.0|net\.2|conv2|conv2\.conv)\.weight$", _FanIn(0.5)),
        (r"", _FanIn(1.0)),
    )
)


def random_tensor(key: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """The float32 values of the stored tensor ``key``."""
    rule = next(rule for pattern, rule in _RULES if pattern.search(key))
    if isinstance(rule, _Uniform):
        centre, half_width = rule.centre, rule.half_width
    else:
        # A uniform variable of half width w has variance w^2 / 3.
        centre, half_width = 0.0, rule.gain * math.sqrt(3 / math.prod(shape[1:]))
    values = _signed_unit(key, math.prod(shape), seed) * np.float32(half_width)
    if centre:
        values = values + np.float32(centre)
    return values.reshape(shape)


def _signed_unit(key: str, count: int, seed: int) -> NDArray[np.float32]:
    """``count`` values in [-1, 1), multiples of 2^-23."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    raw = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)
    # 24 bits are exact in a float32, and so is the scaling by a power of two.
    return (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
