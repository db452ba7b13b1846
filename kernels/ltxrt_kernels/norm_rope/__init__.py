# SPDX-License-Identifier: Apache-2.0
"""RMSNorm of queries or keys over their whole width, then the split rotary embedding, in one pass.

``x[N, W]`` with W made of heads, ``weight[W]``; N = frames * height * width tokens, frame-major. The tables are the
runtime's own (``ltxrt.rope``), cosines first and then sines: ``rope_time[2, frames, n]``,
``rope_height[2, height, n]``, ``rope_width[2, width, n]``. With ``y = x / sqrt(mean(x^2) + epsilon) * weight``, each
head h of width d is turned in pairs, half a head apart (Lightricks/LTX-2
packages/ltx-core/src/ltx_core/model/transformer/{attention,rope}.py)::

    out[h d + r]       = y[h d + r] cos(i) - y[h d + d/2 + r] sin(i)
    out[h d + d/2 + r] = y[h d + d/2 + r] cos(i) + y[h d + r] sin(i)        i = h d/2 + r,  0 <= r < d/2

The angle of i: the first W/2 - 3n of them are not turned; after those, frequencies run axis-minor, so that the k-th is
row ``[position on axis k % 3, k // 3]`` of the tables. With one axis (audio, and the attention between video and
audio) only ``rope_time`` is there, and the k-th is ``[frame, k]``.

All arithmetic is fp32, rounded once at the end; torch's 16-bit modules round after the norm too. The layout stays
token-major: heads are a view.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..dtypes import Dtype
from ..spec import C_TYPES, Launch, Port, Problem, Tolerance, ceil_div, spread, vector_of

__all__ = ["NormRope"]

#: Values an access. Eight 16-bit ones would fill 16 bytes, but then a thread turns eight pairs and does not fit into 64
#: registers (NVRTC 13.0: 72 to 78, or spills where it is held to 64), which leaves three blocks of 256 on a processor.
_WIDEST = 4

#: (fewest tokens, tokens that a block takes one after another). Neighbours share two thirds of their tables' rows, so
#: a run reads less from L2; but it also makes fewer, longer blocks, which leaves processors idle at the end of a small
#: launch. Reasoned from the sizes and not measured yet: 8192 tokens are 2048 blocks of four, about two waves of 132
#: processors with 8 blocks each.
_RUNS = ((8192, 4), (0, 1))


@dataclass(frozen=True, kw_only=True)
class NormRope(Problem):
    """Queries or keys of one attention.

    Attributes:
        grid: Frames, height and width of the latent; audio tokens are [Na, 1, 1].
        heads: Heads.
        head_width: d, even.
        axes: 3 or 1.
        dtype: Of ``x``, ``weight`` and the result.
        epsilon: Of the norm.

    Raises:
        ValueError: Neither three axes nor one, or a head without halves.
    """

    op: ClassVar[str] = "norm_rope"
    tolerance: ClassVar[Tolerance] = Tolerance(of_value=4e-6, of_peak=1e-6)
    max_registers: ClassVar[int] = 64

    grid: tuple[int, int, int]
    heads: int
    head_width: int
    axes: int = 3
    dtype: Dtype = "bfloat16"
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if self.axes not in (1, 3):
            raise ValueError(f"axes: {self.axes} is not allowed; allowed: 1 or 3")
        if self.head_width % 2:
            raise ValueError(f"head_width: {self.head_width} is not allowed; allowed: even numbers")

    @property
    def tokens(self) -> int:
        """N."""
        frames, height, width = self.grid
        return frames * height * width

    @property
    def width(self) -> int:
        """W."""
        return self.heads * self.head_width

    @property
    def frequencies(self) -> int:
        """n, on each axis."""
        return self.width // 2 // self.axes

    @property
    def inputs(self) -> tuple[Port, ...]:
        names = ("rope_time", "rope_height", "rope_width")[: self.axes]
        tables = (
            Port(name, "float32", (2, extent, self.frequencies))
            for name, extent in zip(names, self.grid, strict=False)  # one axis has one table
        )
        return (
            Port("x", self.dtype, (self.tokens, self.width)),
            Port("weight", self.dtype, (self.width,)),
            *tables,
        )

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (Port("out", self.dtype, (self.tokens, self.width)),)

    def launch(self) -> Launch:
        vector = min(_WIDEST, vector_of(self.head_width // 2, self.dtype))
        # A vector comes with its partner in the other half of the head.
        threads = spread(self.width // vector)
        run = next(length for tokens, length in _RUNS if self.tokens >= tokens)
        return Launch(
            defines={
                "TYPE": C_TYPES[self.dtype],
                "WIDTH": self.width,
                "HEAD": self.head_width,
                "AXES": self.axes,
                "FREQUENCIES": self.frequencies,
                "VECTOR": vector,
                "THREADS": threads,
                "EPSILON": f"{self.epsilon!r}f",
            },
            grid=(ceil_div(self.tokens, run), 1, 1),
            block=threads,
            integers=(*self.grid, run),
        )
