# SPDX-License-Identifier: Apache-2.0
"""The element types of the kernels, as NumPy holds them, to and from float64.

NumPy has neither bfloat16 nor FP8, so arrays of those hold bit patterns: ``uint16`` and ``uint8``. FP8 is E4M3 without
infinities (ONNX FLOAT8E4M3FN): largest value 448, beyond which a conversion saturates.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["FORMATS", "STORAGE", "Dtype", "FloatFormat", "decode", "encode"]

Dtype = Literal["float32", "float16", "bfloat16", "float8_e4m3", "uint8", "int64"]

#: NumPy's type for each of them.
STORAGE: dict[Dtype, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "float8_e4m3": np.uint8,
    "uint8": np.uint8,
    "int64": np.int64,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatFormat:
    """A binary floating-point format.

    Attributes:
        digits: Significant bits, the implicit one counted.
        smallest_exponent: Exponent of the smallest normal number.
        largest: Largest finite value.
        saturates: Whether a conversion gives ``largest`` where it would overflow, rather than infinity.
    """

    digits: int
    smallest_exponent: int
    largest: float
    saturates: bool = False

    def rounded(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Each value's nearest neighbour in the format, ties to even."""
        with np.errstate(invalid="ignore", over="ignore"):
            exponents = np.maximum(np.frexp(values)[1] - 1, self.smallest_exponent)
            steps = np.ldexp(1.0, exponents - (self.digits - 1))
            nearest = np.where(np.isfinite(values), np.rint(values / steps) * steps, values)
        beyond = self.largest if self.saturates else np.inf
        return np.where(np.abs(nearest) > self.largest, np.copysign(beyond, nearest), nearest)

    def rounding_error(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Largest error of one conversion of something near each value: half the distance to its neighbours."""
        exponents = np.maximum(np.frexp(values)[1] - 1, self.smallest_exponent)
        return np.ldexp(0.5, exponents - (self.digits - 1))


#: The formats of the floating-point types.
FORMATS: dict[Dtype, FloatFormat] = {
    "float32": FloatFormat(digits=24, smallest_exponent=-126, largest=float(np.finfo(np.float32).max)),
    "float16": FloatFormat(digits=11, smallest_exponent=-14, largest=65504.0),
    "bfloat16": FloatFormat(digits=8, smallest_exponent=-126, largest=(2 - 2**-7) * 2.0**127),
    "float8_e4m3": FloatFormat(digits=4, smallest_exponent=-6, largest=448.0, saturates=True),
}


def decode(stored: NDArray[Any], dtype: Dtype) -> NDArray[np.float64]:
    """The values that an array stands for.

    Args:
        stored: In ``STORAGE[dtype]``, any shape.
        dtype: What its elements are.
    """
    if dtype == "bfloat16":
        with np.errstate(invalid="ignore"):  # signalling NaNs become quiet ones
            return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype == "float8_e4m3":
        return _E4M3[stored]
    return stored.astype(np.float64)


def encode(values: NDArray[np.floating], dtype: Dtype) -> NDArray[Any]:
    """Values as an array of ``STORAGE[dtype]``: rounded once, ties to even."""
    if dtype in ("uint8", "int64"):
        return np.asarray(np.rint(values), STORAGE[dtype])
    nearest = FORMATS[dtype].rounded(np.asarray(values, np.float64))
    if dtype == "bfloat16":
        return (nearest.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if dtype == "float8_e4m3":
        codes = np.searchsorted(_E4M3[:0x7F], np.abs(nearest)).astype(np.uint8)
        return codes | (np.signbit(nearest).astype(np.uint8) << 7)
    with np.errstate(over="ignore"):
        return nearest.astype(STORAGE[dtype])


def _e4m3_values() -> NDArray[np.float64]:
    """The value of each of the 256 codes."""
    codes = np.arange(256)
    exponents, fractions = codes >> 3 & 0xF, (codes & 7) / 8
    magnitudes = np.where(exponents == 0, fractions * 2.0**-6, (1 + fractions) * np.ldexp(1.0, exponents - 7))
    magnitudes[codes & 0x7F == 0x7F] = np.nan
    return np.where(codes & 0x80, -magnitudes, magnitudes)


_E4M3 = _e4m3_values()
