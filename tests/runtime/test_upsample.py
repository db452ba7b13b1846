# SPDX-License-Identifier: Apache-2.0
"""The upsampler sees the whole grid at once, and its result comes back as tokens in order."""

import numpy as np
import pytest

from ltxrt.engine import TensorSpec, check_feeds
from ltxrt.errors import EngineError
from ltxrt.shapes import LatentShape
from ltxrt.upsample import upsample


class NearestUpsampler:
    """Doubles height and width by repeating; in fp64, as a network with another output width might."""

    name = "upsampler"
    inputs = (TensorSpec("latent", "float32", (1, 4, "f", "h", "w")),)
    calls = 0

    def run(self, feeds):
        check_feeds(self.name, self.inputs, feeds)
        self.calls += 1
        return {"upsampled": feeds["latent"].repeat(2, axis=3).repeat(2, axis=4).astype(np.float64)}


def test_every_token_becomes_four():
    shape = LatentShape(3, 2, 5)
    tokens = np.random.default_rng(0).standard_normal((1, shape.tokens, 4)).astype(np.float32)
    engine = NearestUpsampler()
    result = upsample(engine, tokens, shape)
    assert engine.calls == 1
    assert result.shape == (1, 4 * shape.tokens, 4)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    for frame in range(3):
        for row in range(4):
            for column in range(10):
                source = (frame * 2 + row // 2) * 5 + column // 2
                np.testing.assert_array_equal(result[0, (frame * 4 + row) * 10 + column], tokens[0, source])


def test_a_latent_of_another_width_is_the_engines_to_refuse():
    with pytest.raises(EngineError, match="upsampler: latent has shape"):
        upsample(NearestUpsampler(), np.zeros((1, 6, 5), np.float32), LatentShape(1, 2, 3))
