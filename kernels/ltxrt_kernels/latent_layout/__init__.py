# SPDX-License-Identifier: Apache-2.0
"""The two layouts of a latent, with the statistics that go with each: a transpose and an affine map in one pass.

The denoiser has tokens ``[N, C]``, normalised; the VAE has a grid ``[C, f, h, w]``, as it comes. N = f h w, tokens
frame-major, so the grid is ``[C, N]``; ``mean`` and ``std[C]`` (Lightricks/LTX-2
packages/ltx-core/src/ltx_core/components/patchifiers.py and model/video_vae)::

    pack      out[t, c] = (source[c, t] - mean[c]) / std[c]
    unpack    out[c, t] = source[t, c] * std[c] + mean[c]

fp32 arithmetic, rounded once. With a mean of 0 and a deviation of 1 it is the bare transpose, for networks that apply
the statistics themselves (this project's decoder and upsampler do).
"""

from dataclasses import dataclass
from typing import ClassVar

from ..dtypes import Dtype
from ..spec import C_TYPES, Launch, Port, Problem, Tolerance, ceil_div, vector_of

__all__ = ["LatentLayout"]

#: Side of the square that a block transposes. 64 makes every row of a tile at least 128 bytes, a whole cache line, in
#: the 16-bit types too; its fp32 copy takes 16.6 kB of shared memory.
_TILE = 64
_THREADS = 256


@dataclass(frozen=True, kw_only=True)
class LatentLayout(Problem):
    """One latent on its way into the other layout.

    Attributes:
        tokens: N.
        channels: C.
        pack: Grid to tokens; else tokens to grid.
        source: Type of what is read.
        target: Type of what is written.
    """

    op: ClassVar[str] = "latent_layout"
    tolerance: ClassVar[Tolerance] = Tolerance(of_value=1e-6, of_peak=3e-7)
    max_registers: ClassVar[int] = 40

    tokens: int
    channels: int = 128
    pack: bool = False
    source: Dtype = "float32"
    target: Dtype = "bfloat16"

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (
            Port("source", self.source, self._shape(tokens_first=not self.pack)),
            Port("mean", "float32", (self.channels,)),
            Port("std", "float32", (self.channels,)),
        )

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (Port("out", self.target, self._shape(tokens_first=self.pack)),)

    def _shape(self, *, tokens_first: bool) -> tuple[int, int]:
        return (self.tokens, self.channels) if tokens_first else (self.channels, self.tokens)

    def launch(self) -> Launch:
        rows, columns = self.inputs[0].shape
        return Launch(
            defines={
                "TYPE": C_TYPES[self.source],
                "OUT": C_TYPES[self.target],
                "CHANNELS": self.channels,
                "PACK": int(self.pack),
                "TILE": _TILE,
                "THREADS": _THREADS,
                "READ": vector_of(columns, self.source),
                # Packing reads the statistics in as wide an access as it writes.
                "WRITE": vector_of(rows, "float32" if self.pack else self.target),
            },
            grid=(ceil_div(columns, _TILE), ceil_div(rows, _TILE), 1),
            block=_THREADS,
            integers=(self.tokens,),
        )
