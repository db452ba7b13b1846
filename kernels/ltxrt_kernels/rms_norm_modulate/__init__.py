# SPDX-License-Identifier: Apache-2.0
"""RMSNorm with adaptive scale and shift, in one pass; the result may leave as FP8.

``x[N, D]``; ``scale`` and ``shift[R, D]``, one row for each distinct timestep, of which ``token_row[N]`` names one a
token (Lightricks/LTX-2 packages/ltx-core/src/ltx_core/model/transformer/transformer.py)::

    out[t] = x[t] / sqrt(mean(x[t]^2) + epsilon) * (1 + scale[token_row[t]]) + shift[token_row[t]]

All arithmetic is fp32, rounded once at the end; torch's 16-bit modules round after every operation. With ``quantise``
the result is divided by ``output_scale[1]`` and saturated to E4M3, as ONNX QuantizeLinear does it for the linear layer
that follows.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..dtypes import Dtype
from ..spec import C_TYPES, Launch, Port, Problem, Tolerance, spread, vector_of

__all__ = ["RmsNormModulate"]


@dataclass(frozen=True, kw_only=True)
class RmsNormModulate(Problem):
    """One norm.

    Attributes:
        tokens: N.
        width: D.
        rows: R.
        dtype: Of ``x``, ``scale`` and ``shift``, and of the result unless it is quantised.
        quantise: FP8 E4M3 out.
        epsilon: Of the norm.
    """

    op: ClassVar[str] = "rms_norm_modulate"
    tolerance: ClassVar[Tolerance] = Tolerance(of_value=4e-6, of_peak=1e-6)
    max_registers: ClassVar[int] = 64

    tokens: int
    width: int
    rows: int = 2
    dtype: Dtype = "bfloat16"
    quantise: bool = False
    epsilon: float = 1e-6

    @property
    def inputs(self) -> tuple[Port, ...]:
        modulation = (self.rows, self.width)
        ports = (
            Port("x", self.dtype, (self.tokens, self.width)),
            Port("scale", self.dtype, modulation),
            Port("shift", self.dtype, modulation),
            Port("token_row", "int64", (self.tokens,)),
        )
        return (*ports, Port("output_scale", "float32", (1,))) if self.quantise else ports

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (Port("out", "float8_e4m3" if self.quantise else self.dtype, (self.tokens, self.width)),)

    def launch(self) -> Launch:
        vector = vector_of(self.width, self.dtype)
        threads = spread(self.width // vector)
        return Launch(
            defines={
                "TYPE": C_TYPES[self.dtype],
                "OUT": C_TYPES[self.outputs[0].dtype],
                "WIDTH": self.width,
                "VECTOR": vector,
                "THREADS": threads,
                "EPSILON": f"{self.epsilon!r}f",
                "QUANTISED": int(self.quantise),
            },
            grid=(self.tokens, 1, 1),
            block=threads,
        )
