# SPDX-License-Identifier: Apache-2.0
"""Tokens and grid hold the same values, element by element."""

import numpy as np
import pytest

from ltxrt.latent import to_grid, to_tokens
from ltxrt.shapes import LatentShape


@pytest.mark.parametrize("shape", [LatentShape(3, 4, 5), LatentShape(1, 1, 1), LatentShape(2, 1, 7)])
def test_every_element_lies_where_the_layout_says(shape):
    channels = 6
    tokens = np.arange(shape.tokens * channels, dtype=np.float32).reshape(1, shape.tokens, channels)
    grid = to_grid(tokens, shape)
    assert grid.shape == (1, channels, *shape)
    assert grid.flags.c_contiguous
    for frame in range(shape.frames):
        for row in range(shape.height):
            for column in range(shape.width):
                token = (frame * shape.height + row) * shape.width + column
                np.testing.assert_array_equal(grid[0, :, frame, row, column], tokens[0, token])
    back = to_tokens(grid)
    assert back.flags.c_contiguous
    np.testing.assert_array_equal(back, tokens)


def test_tokens_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(ValueError, match="reshape"):
        to_grid(np.zeros((1, 5, 6), np.float32), LatentShape(1, 2, 3))
