# SPDX-License-Identifier: Apache-2.0
"""All ops, each with its reference, its inputs, and the launches that the 22B model makes of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import euler_step, gated_residual, head_gate, latent_layout, norm_rope, rgb_to_yuv420, rms_norm_modulate
from .arrays import Arrays
from .euler_step import reference as euler_step_reference
from .gated_residual import reference as gated_residual_reference
from .head_gate import reference as head_gate_reference
from .latent_layout import reference as latent_layout_reference
from .norm_rope import reference as norm_rope_reference
from .rgb_to_yuv420 import reference as rgb_to_yuv420_reference
from .rms_norm_modulate import reference as rms_norm_modulate_reference
from .spec import Problem

__all__ = ["OPS", "Op"]

#: The latent of 121 frames at 1280x704 in the full-size stage.
_GRID = (16, 22, 40)
_TOKENS = 16 * 22 * 40
#: Audio tokens of those frames at 24 a second.
_AUDIO_TOKENS = 126


@dataclass(frozen=True, slots=True)
class Op:
    """An op.

    Attributes:
        reference: Of a problem and its stored inputs: the outputs by name, in float64.
        generate_inputs: Of a problem and a seed: stored inputs by name.
        production: What the 22B model launches at 1280x704, 121 frames; compiled and bounded in CI.
    """

    reference: Callable[[Any, Arrays], dict[str, NDArray[np.float64]]]
    generate_inputs: Callable[[Any, int], Arrays]
    production: tuple[Problem, ...]

    @property
    def name(self) -> str:
        """The folder's."""
        return self.production[0].op


_ALL = (
    Op(
        rms_norm_modulate_reference.reference,
        rms_norm_modulate_reference.generate_inputs,
        (
            rms_norm_modulate.RmsNormModulate(tokens=_TOKENS, width=4096),
            rms_norm_modulate.RmsNormModulate(tokens=_TOKENS, width=4096, quantise=True),
            rms_norm_modulate.RmsNormModulate(tokens=_AUDIO_TOKENS, width=2048, rows=1, dtype="float16"),
        ),
    ),
    Op(
        norm_rope_reference.reference,
        norm_rope_reference.generate_inputs,
        (
            norm_rope.NormRope(grid=_GRID, heads=32, head_width=128),
            norm_rope.NormRope(grid=_GRID, heads=32, head_width=64, axes=1, dtype="float16"),
            norm_rope.NormRope(grid=(_AUDIO_TOKENS, 1, 1), heads=32, head_width=64, axes=1),
        ),
    ),
    Op(
        head_gate_reference.reference,
        head_gate_reference.generate_inputs,
        (
            head_gate.HeadGate(tokens=_TOKENS, heads=32, head_width=128),
            head_gate.HeadGate(tokens=_TOKENS, heads=32, head_width=128, dtype="float16", quantise=True),
        ),
    ),
    Op(
        gated_residual_reference.reference,
        gated_residual_reference.generate_inputs,
        (
            gated_residual.GatedResidual(tokens=_TOKENS, width=4096),
            gated_residual.GatedResidual(tokens=_AUDIO_TOKENS, width=2048, rows=1, dtype="float16"),
        ),
    ),
    Op(
        euler_step_reference.reference,
        euler_step_reference.generate_inputs,
        (euler_step.EulerStep(tokens=_TOKENS), euler_step.EulerStep(tokens=_TOKENS, dtype="float32")),
    ),
    Op(
        rgb_to_yuv420_reference.reference,
        rgb_to_yuv420_reference.generate_inputs,
        (
            rgb_to_yuv420.RgbToYuv420(frames=16, height=704, width=1280),
            rgb_to_yuv420.RgbToYuv420(frames=16, height=704, width=1280, dtype="float16"),
            rgb_to_yuv420.RgbToYuv420(frames=16, height=704, width=1280, dtype="float32"),
        ),
    ),
    Op(
        latent_layout_reference.reference,
        latent_layout_reference.generate_inputs,
        (
            latent_layout.LatentLayout(tokens=_TOKENS),
            latent_layout.LatentLayout(tokens=_TOKENS, pack=True, source="float16", target="float32"),
        ),
    ),
)

#: By name.
OPS: Mapping[str, Op] = {op.name: op for op in _ALL}
