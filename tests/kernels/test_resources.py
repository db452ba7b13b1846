# SPDX-License-Identifier: Apache-2.0
"""Reading the assembler's report, and how full a processor gets."""

import pytest

from ltxrt_kernels.program import ARCHITECTURES
from ltxrt_kernels.resources import PROCESSORS, Resources, resources_of

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'other' for 'sm_90a'
ptxas info    : Function properties for other
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas info    : Function properties for k
ptxas         .     40 bytes stack frame, 24 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 40 bytes cumulative stack size, 256 bytes smem, 376 bytes cmem[0]
ptxas info    : Compile time = 33.889 ms
"""


def test_report_is_read():
    used = Resources(registers=64, spilled_bytes=56, stack_bytes=40, shared_bytes=256)
    assert resources_of(LOG, "k") == used
    assert resources_of(LOG, "other") == Resources(registers=12, spilled_bytes=0, stack_bytes=0, shared_bytes=0)


def test_a_silent_log_is_an_error():
    with pytest.raises(ValueError, match="says nothing about 'q'"):
        resources_of(LOG, "q")


def test_every_architecture_has_its_processor():
    assert set(PROCESSORS) == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "block", "expected"),
    [
        ("sm_90a", 32, 0, 256, 1.0),  # eight blocks of 8192 registers: all threads
        ("sm_90a", 33, 0, 256, 0.75),  # 40 a thread, as they come in steps of 256 a warp: six blocks
        ("sm_90a", 64, 0, 512, 0.5),
        ("sm_90a", 16, 100 * 1024, 256, 0.25),  # two blocks of 101 KiB in 228 KiB
        ("sm_90a", 16, 0, 32, 0.5),  # 32 blocks are the most
        ("sm_89", 40, 0, 256, 1.0),
        ("sm_89", 64, 0, 512, 2 / 3),
    ],
)
def test_occupancy(architecture, registers, shared, block, expected):
    used = Resources(registers=registers, spilled_bytes=0, stack_bytes=0, shared_bytes=shared)
    assert used.occupancy(architecture, block) == pytest.approx(expected)
