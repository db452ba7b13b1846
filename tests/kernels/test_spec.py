# SPDX-License-Identifier: Apache-2.0
"""Launch tables: every value moves once, in the widest access that stays aligned."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltxrt_kernels.head_gate import HeadGate
from ltxrt_kernels.spec import Port, ceil_div, spread, vector_of


@given(st.integers(1, 10**6), st.integers(1, 10**4))
def test_ceil_div(count, size):
    assert (ceil_div(count, size) - 1) * size < count <= ceil_div(count, size) * size


@given(st.integers(1, 10**5), st.sampled_from(["float32", "float16", "bfloat16"]))
def test_rows_of_vectors_stay_aligned(width, dtype):
    size = Port("x", dtype, (1,)).bytes
    vector = vector_of(width, dtype)
    assert width % vector == 0
    assert vector * size <= 16
    assert vector * size == 16 or width % (2 * vector)


def test_the_widest_type_decides():
    assert vector_of(128, "float32", "bfloat16") == 4
    assert vector_of(128, "bfloat16") == 8


@given(st.integers(1, 4096))
def test_threads(vectors):
    threads = spread(vectors)
    assert 32 <= threads <= 512
    assert math.log2(threads).is_integer()
    assert vectors <= 2 * threads or threads == 512
    assert threads == 32 or vectors > threads


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float8_e4m3", 1), ("int64", 8)])
def test_bytes(dtype, size):
    assert Port("x", dtype, (3, 5)).bytes == 15 * size


def test_moved_bytes_counts_every_tensor_once():
    problem = HeadGate(tokens=10, heads=2, head_width=8, quantise=True)
    assert problem.moved_bytes == 10 * 16 * 2 + 10 * 2 * 2 + 4 + 10 * 16
