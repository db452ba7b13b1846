# SPDX-License-Identifier: Apache-2.0
"""The noise against its definition, written out once more in whole numbers, and against what noise should look like."""

import math
import struct
from itertools import islice

import numpy as np
import pytest

from ltxrt.noise import gaussian

WORD = 2**64 - 1


def philox_block(counter, key):
    """Philox-4x64-10 of Salmon et al. (SC 2011), four 64-bit words."""
    words, (first, second) = list(counter), key
    for _ in range(10):
        even, odd = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [(odd >> 64) ^ words[1] ^ first, odd & WORD, (even >> 64) ^ words[3] ^ second, even & WORD]
        first, second = (first + 0x9E3779B97F4A7C15) & WORD, (second + 0xBB67AE8584CAA73B) & WORD
    return words


def defined_normals(seed, stream):
    counter = 1
    while True:
        words = philox_block((counter, 0, 0, 0), (seed, stream))
        counter += 1
        for pair in (words[:2], words[2:]):
            u, v = (((word >> 11) + 0.5) / 2**53 for word in pair)
            radius = math.sqrt(-2 * math.log(u))
            for value in (radius * math.cos(2 * math.pi * v), radius * math.sin(2 * math.pi * v)):
                yield struct.unpack("f", struct.pack("f", value))[0]


def test_the_oracle_passes_the_published_vectors():
    # kat_vectors of Random123, the authors' own implementation.
    assert philox_block((0, 0, 0, 0), (0, 0)) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]
    assert philox_block((WORD,) * 4, (WORD,) * 2) == [
        0x87B092C3013FE90B,
        0x438C3C67BE8D0224,
        0x9CC7D7C69CD777B6,
        0xA09CAEBF594F0BA0,
    ]


@pytest.mark.parametrize(("seed", "stream"), [(0, 1), (0, 2), (7, 1), (2**63 - 1, 2), (2**64 - 1, 1)])
def test_noise_is_its_definition(seed, stream):
    expected = list(islice(defined_normals(seed, stream), 1001))
    assert gaussian(seed, stream, (1001,)).tolist() == expected


def test_golden_values():
    assert [str(value) for value in gaussian(0, 1, (4,))] == ["0.005377246", "-0.64276636", "-0.8871989", "0.09442845"]
    assert [str(value) for value in gaussian(1234567890123456789, 2, (4,))] == [
        "-0.82832175",
        "-0.14696375",
        "-0.031367354",
        "-1.2410685",
    ]


@pytest.mark.parametrize("shape", [(1, 32, 128), (3, 5), (1,), (7,), (), (0,), (2, 0, 3)])
def test_shape_dtype_and_order(shape):
    noise = gaussian(3, 1, shape)
    assert noise.shape == shape
    assert noise.dtype == np.float32
    assert noise.flags.c_contiguous
    np.testing.assert_array_equal(noise.reshape(-1), gaussian(3, 1, (noise.size,)))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 99, 100])
def test_a_shorter_draw_is_the_beginning_of_a_longer_one(count):
    np.testing.assert_array_equal(gaussian(11, 2, (count,)), gaussian(11, 2, (128,))[:count])


def test_seeds_and_streams_are_unrelated():
    draws = [gaussian(seed, stream, (100_000,)) for seed in (0, 1, 2**63 - 1) for stream in (1, 2)]
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 5 / math.sqrt(100_000)


def test_the_same_seed_gives_the_same_noise():
    np.testing.assert_array_equal(gaussian(5, 1, (1000,)), gaussian(5, 1, (1000,)))


def test_noise_is_standard_normal():
    count = 1_000_000
    noise = gaussian(42, 1, (count,)).astype(np.float64)
    # Five standard errors each.
    assert abs(noise.mean()) < 5 / math.sqrt(count)
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / count)
    assert abs((noise**3).mean()) < 5 * math.sqrt(15 / count)
    assert abs((noise**4).mean() - 3) < 5 * math.sqrt(96 / count)
    for threshold in (0.5, 1, 2, 3):
        tail = math.erfc(threshold / math.sqrt(2))
        assert abs((np.abs(noise) > threshold).mean() - tail) < 5 * math.sqrt(tail * (1 - tail) / count)


def test_neighbours_are_unrelated():
    noise = gaussian(42, 1, (200_000,)).astype(np.float64)
    for lag in (1, 2, 3, 4, 128):
        assert abs((noise[:-lag] * noise[lag:]).mean()) < 5 / math.sqrt(len(noise) - lag)
