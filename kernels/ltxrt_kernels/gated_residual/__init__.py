# SPDX-License-Identifier: Apache-2.0
"""The residual connection with an adaptive gate.

``residual`` and ``update[N, D]``; ``gate[R, D]``, one row for each distinct timestep, of which ``token_row[N]`` names
one a token (Lightricks/LTX-2 packages/ltx-core/src/ltx_core/model/transformer/transformer.py)::

    out[t] = residual[t] + update[t] * gate[token_row[t]]

fp32 arithmetic, rounded once. ``out`` may be ``residual``. The 2 * sigmoid gate of the heads is ``head_gate``.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..dtypes import Dtype
from ..spec import C_TYPES, Launch, Port, Problem, Tolerance, ceil_div, vector_of

__all__ = ["GatedResidual"]

#: Threads of a block. They share nothing, so any size does that fills a processor in whole blocks.
_THREADS = 256


@dataclass(frozen=True, kw_only=True)
class GatedResidual(Problem):
    """One residual connection.

    Attributes:
        tokens: N.
        width: D.
        rows: R.
        dtype: Of everything but ``token_row``.
    """

    op: ClassVar[str] = "gated_residual"
    tolerance: ClassVar[Tolerance] = Tolerance(of_value=1e-6, of_peak=3e-7)
    max_registers: ClassVar[int] = 40

    tokens: int
    width: int
    rows: int = 2
    dtype: Dtype = "bfloat16"

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (
            Port("residual", self.dtype, (self.tokens, self.width)),
            Port("update", self.dtype, (self.tokens, self.width)),
            Port("gate", self.dtype, (self.rows, self.width)),
            Port("token_row", "int64", (self.tokens,)),
        )

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (Port("out", self.dtype, (self.tokens, self.width)),)

    def launch(self) -> Launch:
        vector = vector_of(self.width, self.dtype)
        return Launch(
            defines={"TYPE": C_TYPES[self.dtype], "WIDTH": self.width, "VECTOR": vector, "THREADS": _THREADS},
            grid=(ceil_div(self.tokens * self.width // vector, _THREADS), 1, 1),
            block=_THREADS,
            integers=(self.tokens,),
        )
