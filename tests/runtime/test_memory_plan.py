# SPDX-License-Identifier: Apache-2.0
"""Plans of an arena: what lives together lies apart, everywhere, and no plan is larger than it says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltxrt.memory_plan import ALIGNMENT_BYTES, MemoryRequest, plan_arena


@st.composite
def requests(draw):
    spans = draw(
        st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 9), st.integers(0, 9)), min_size=0, max_size=14)
    )
    return [MemoryRequest(f"r{i}", size, min(a, b), max(a, b)) for i, (size, a, b) in enumerate(spans)]


@given(requests())
def test_live_buffers_never_overlap(wanted):
    plan = plan_arena(wanted)
    assert [placement.request for placement in plan.placements] == wanted
    for index, one in enumerate(plan.placements):
        for other in plan.placements[:index]:
            if one.request.meets(other.request) and one.request.size_bytes and other.request.size_bytes:
                assert one.end <= other.offset or other.end <= one.offset


@given(requests())
def test_every_place_is_aligned_and_the_peak_is_the_end(wanted):
    plan = plan_arena(wanted)
    assert all(placement.offset % ALIGNMENT_BYTES == 0 and placement.offset >= 0 for placement in plan.placements)
    assert plan.peak_bytes == max((placement.end for placement in plan.placements), default=0)


@given(requests())
def test_the_peak_is_between_what_lives_at_once_and_what_all_take(wanted):
    plan = plan_arena(wanted)
    assert max((plan.live_bytes(step) for step in range(10)), default=0) <= plan.peak_bytes <= plan.unshared_bytes


@given(requests())
def test_the_order_of_the_requests_does_not_matter(wanted):
    there = {p.request.name: p.offset for p in plan_arena(wanted).placements}
    assert {p.request.name: p.offset for p in plan_arena(reversed(wanted)).placements} == there


def test_what_never_meets_shares():
    plan = plan_arena([MemoryRequest("a", 1000, 0, 1), MemoryRequest("b", 700, 2, 3), MemoryRequest("c", 600, 0, 3)])
    assert plan.peak_bytes == 1024 + 600
    assert plan.sharing("a") == ("b",)
    assert plan.sharing("c") == ()


def test_a_gap_is_filled():
    plan = plan_arena(
        [
            MemoryRequest("long", 4096, 0, 3),
            MemoryRequest("early", 2048, 0, 1),
            MemoryRequest("small", 512, 2, 2),
            MemoryRequest("late", 1024, 3, 3),
        ]
    )
    offsets = {placement.request.name: placement.offset for placement in plan.placements}
    assert offsets == {"long": 0, "early": 4096, "late": 4096, "small": 4096}
    assert plan.peak_bytes == 6144


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([MemoryRequest("a", 1, 0, 0), MemoryRequest("a", 2, 1, 1)], "two requests have one name"),
        ([MemoryRequest("a", -1, 0, 0)], "a: -1 bytes in steps 0 to 0"),
        ([MemoryRequest("a", 1, 2, 1)], "a: 1 bytes in steps 2 to 1"),
    ],
)
def test_what_is_no_plan(wanted, message):
    with pytest.raises(ValueError, match=message):
        plan_arena(wanted)
