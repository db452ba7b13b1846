# SPDX-License-Identifier: Apache-2.0
"""NumPy statement of ``euler_step``, in float64, and inputs to try it on."""

import numpy as np
from numpy.typing import NDArray

from ..arrays import Arrays, drawn, values_of
from . import EulerStep

__all__ = ["euler_step", "generate_inputs", "reference"]

Values = NDArray[np.float64]


def euler_step(latent: Values, velocity: Values, clean: Values, mask: Values, sigmas: tuple[Values, Values]) -> Values:
    """The latent at the next noise level (see the package).

    Args:
        latent: At the present level, [N, C].
        velocity: What the network says, [N, C].
        clean: What conditioned tokens are held to, [N, C].
        mask: 1 where a token is denoised, [N].
        sigmas: Present and next level, [1] each.
    """
    sigma, sigma_next = sigmas
    share = mask[:, None]
    denoised = (latent - velocity * (share * sigma)) * share + clean * (1 - share)
    return latent + (latent - denoised) / sigma * (sigma_next - sigma)


def reference(problem: EulerStep, inputs: Arrays) -> dict[str, Values]:
    """What a kernel gives for stored inputs, before it is rounded to the type of the output."""
    values = values_of(problem, inputs)
    sigmas = values.pop("sigma"), values.pop("sigma_next")
    return {"out": euler_step(**values, sigmas=sigmas)}


def generate_inputs(problem: EulerStep, seed: int) -> Arrays:
    """Random latents, a third of the tokens conditioned by some strength, at a step of the distilled schedule."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    inputs = drawn(problem, generator)
    strengths = generator.uniform(0, 1, problem.tokens) * (generator.uniform(0, 1, problem.tokens) < 1 / 3)
    inputs["mask"] = (1 - strengths).astype(np.float32)
    inputs["sigma"], inputs["sigma_next"] = np.array([0.909375], np.float32), np.array([0.725], np.float32)
    return inputs
