# SPDX-License-Identifier: Apache-2.0
"""RGB frames to 8-bit planar YUV 4:2:0 (I420), BT.709, limited range.

Input ``rgb[T, 3, H, W]``, float, black at -1 and white at 1, H a multiple of 4 and W of 2. With
``R, G, B = clip((rgb + 1) / 2, 0, 1)``, gamma-encoded as they stand (Rec. ITU-R BT.709-6, items 3.2 to 3.5)::

    Y' = 0.2126 R + 0.7152 G + 0.0722 B                 luma  = round(16 + 219 Y')
    Cb = (B - Y') / 1.8556     Cr = (R - Y') / 1.5748   chroma = round(128 + 224 C)

Chroma is taken from the mean RGB of each 2x2 block (centre-sited), luma from every pixel. Ties round to even.

Output ``frames[T, 3H/2, W]``, uint8: one I420 picture a frame, byte for byte. Rows ``[0, H)`` are the luma
plane; the H/2 x W/2 planes of Cb and then Cr follow, each read as H/4 rows of W.

An implementation may differ from ``reference`` by ``MAX_LEVELS`` at ``MAX_DIFFERING`` of the samples, where
its arithmetic falls on the other side of a tie.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..dtypes import Dtype
from ..spec import C_TYPES, Launch, Port, Problem, Tolerance, ceil_div, vector_of

__all__ = [
    "CB_RANGE",
    "CHROMA_OFFSET",
    "CHROMA_SCALE",
    "CR_RANGE",
    "KB",
    "KG",
    "KR",
    "LUMA_OFFSET",
    "LUMA_SCALE",
    "MAX_DIFFERING",
    "MAX_LEVELS",
    "RgbToYuv420",
]

KR = 0.2126
KG = 0.7152
KB = 0.0722
#: Spans of B - Y' and R - Y', which bring both colour differences to [-0.5, 0.5].
CB_RANGE = 2 * (1 - KB)
CR_RANGE = 2 * (1 - KR)

LUMA_OFFSET = 16.0
LUMA_SCALE = 219.0
CHROMA_OFFSET = 128.0
CHROMA_SCALE = 224.0

#: Largest difference from the reference in any sample, in 8-bit levels.
MAX_LEVELS = 1
#: Largest share of samples that may differ at all.
MAX_DIFFERING = 1e-3

#: Threads of a block. They share nothing, so any size does that fills a processor in whole blocks.
_THREADS = 256

_CONSTANTS = {
    "KR": KR,
    "KG": KG,
    "KB": KB,
    "CB_RANGE": CB_RANGE,
    "CR_RANGE": CR_RANGE,
    "LUMA_OFFSET": LUMA_OFFSET,
    "LUMA_SCALE": LUMA_SCALE,
    "CHROMA_OFFSET": CHROMA_OFFSET,
    "CHROMA_SCALE": CHROMA_SCALE,
}


@dataclass(frozen=True, kw_only=True)
class RgbToYuv420(Problem):
    """The frames of one chunk.

    Attributes:
        frames: T.
        height: H, a multiple of 4.
        width: W, a multiple of 2.
        dtype: Of ``rgb``.

    Raises:
        ValueError: A size that has no such picture.
    """

    op: ClassVar[str] = "rgb_to_yuv420"
    tolerance: ClassVar[Tolerance] = Tolerance(differing=MAX_DIFFERING)
    max_registers: ClassVar[int] = 48

    frames: int
    height: int
    width: int
    dtype: Dtype = "bfloat16"

    def __post_init__(self) -> None:
        if self.height % 4 or self.width % 2:
            size = f"{self.width}x{self.height}"
            raise ValueError(f"frames of {size} are not allowed; allowed: height a multiple of 4 and width of 2")

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (Port("rgb", self.dtype, (self.frames, 3, self.height, self.width)),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (Port("frames", "uint8", (self.frames, self.height // 2 * 3, self.width)),)

    def launch(self) -> Launch:
        vector = vector_of(self.width, self.dtype)
        return Launch(
            defines={
                "TYPE": C_TYPES[self.dtype],
                "VECTOR": vector,
                "THREADS": _THREADS,
                **{name: f"{value!r}f" for name, value in _CONSTANTS.items()},
            },
            grid=(ceil_div(self.height // 2 * self.width // vector, _THREADS), self.frames, 1),
            block=_THREADS,
            integers=(self.height, self.width),
        )
