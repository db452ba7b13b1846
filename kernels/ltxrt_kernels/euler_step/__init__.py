# SPDX-License-Identifier: Apache-2.0
"""One Euler step of the flow, with the first frame held to what it is conditioned on.

``latent``, ``velocity`` and ``clean[N, C]``; ``mask[N]``, 1 where a token is denoised and 1 - strength where it is
conditioned; ``sigma[1]``, not 0, and ``sigma_next[1]`` (Lightricks/LTX-2
packages/ltx-pipelines/src/ltx_pipelines/utils/samplers.py)::

    x0  = (latent - velocity * (mask * sigma)) * mask + clean * (1 - mask)
    out = latent + (latent - x0) / sigma * (sigma_next - sigma)

Everything but the velocity is fp32 and stays so. ``out`` may be ``latent``.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..dtypes import Dtype
from ..spec import C_TYPES, Launch, Port, Problem, Tolerance, ceil_div, vector_of

__all__ = ["EulerStep"]

#: Threads of a block. They share nothing, so any size does that fills a processor in whole blocks.
_THREADS = 256


@dataclass(frozen=True, kw_only=True)
class EulerStep(Problem):
    """One step of one latent.

    Attributes:
        tokens: N.
        channels: C.
        dtype: Of the velocity.
    """

    op: ClassVar[str] = "euler_step"
    tolerance: ClassVar[Tolerance] = Tolerance(of_value=1e-6, of_peak=1e-6)
    max_registers: ClassVar[int] = 40

    tokens: int
    channels: int = 128
    dtype: Dtype = "bfloat16"

    @property
    def inputs(self) -> tuple[Port, ...]:
        shape = (self.tokens, self.channels)
        return (
            Port("latent", "float32", shape),
            Port("velocity", self.dtype, shape),
            Port("clean", "float32", shape),
            Port("mask", "float32", (self.tokens,)),
            Port("sigma", "float32", (1,)),
            Port("sigma_next", "float32", (1,)),
        )

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (Port("out", "float32", (self.tokens, self.channels)),)

    def launch(self) -> Launch:
        vector = vector_of(self.channels, "float32", self.dtype)
        return Launch(
            defines={"TYPE": C_TYPES[self.dtype], "WIDTH": self.channels, "VECTOR": vector, "THREADS": _THREADS},
            grid=(ceil_div(self.tokens * self.channels // vector, _THREADS), 1, 1),
            block=_THREADS,
            integers=(self.tokens,),
        )
