# SPDX-License-Identifier: Apache-2.0
"""The gate on attention heads, 2 * sigmoid of a logit for each; the result may leave as FP8.

``attended[N, W]`` with W made of heads of width d, ``logits[N, W/d]`` from the input of the queries (Lightricks/LTX-2
packages/ltx-core/src/ltx_core/model/transformer/attention.py)::

    out[t, h d + e] = attended[t, h d + e] * 2 / (1 + exp(-logits[t, h]))

A logit of 0 leaves a head as it is. What follows is the output projection and then ``gated_residual``: the projection
stands between the two gates, so they are two ops. With ``quantise`` the result is divided by ``output_scale[1]`` and
saturated to E4M3 for that projection. fp32 arithmetic, rounded once.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..dtypes import Dtype
from ..spec import C_TYPES, Launch, Port, Problem, Tolerance, ceil_div, vector_of

__all__ = ["HeadGate"]

#: Threads of a block. They share nothing, so any size does that fills a processor in whole blocks.
_THREADS = 256


@dataclass(frozen=True, kw_only=True)
class HeadGate(Problem):
    """The output of one attention.

    Attributes:
        tokens: N.
        heads: Heads.
        head_width: d.
        dtype: Of the inputs, and of the result unless it is quantised.
        quantise: FP8 E4M3 out.
    """

    op: ClassVar[str] = "head_gate"
    tolerance: ClassVar[Tolerance] = Tolerance(of_value=2e-6)
    max_registers: ClassVar[int] = 32

    tokens: int
    heads: int
    head_width: int
    dtype: Dtype = "bfloat16"
    quantise: bool = False

    @property
    def width(self) -> int:
        """W."""
        return self.heads * self.head_width

    @property
    def inputs(self) -> tuple[Port, ...]:
        ports = (
            Port("attended", self.dtype, (self.tokens, self.width)),
            Port("logits", self.dtype, (self.tokens, self.heads)),
        )
        return (*ports, Port("output_scale", "float32", (1,))) if self.quantise else ports

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (Port("out", "float8_e4m3" if self.quantise else self.dtype, (self.tokens, self.width)),)

    def launch(self) -> Launch:
        vector = vector_of(self.head_width, self.dtype)
        return Launch(
            defines={
                "TYPE": C_TYPES[self.dtype],
                "OUT": C_TYPES[self.outputs[0].dtype],
                "WIDTH": self.width,
                "HEAD": self.head_width,
                "VECTOR": vector,
                "THREADS": _THREADS,
                "QUANTISED": int(self.quantise),
            },
            grid=(ceil_div(self.tokens * self.width // vector, _THREADS), 1, 1),
            block=_THREADS,
            integers=(self.tokens,),
        )
