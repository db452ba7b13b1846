# SPDX-License-Identifier: Apache-2.0
"""Every op compiles for every architecture, and stays within its bounds."""

import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from ltxrt_kernels.nvrtc import CompilerError, compile_program, identity
from ltxrt_kernels.ops import OPS
from ltxrt_kernels.program import ARCHITECTURES, program

pytest.importorskip("cuda.bindings.nvrtc")

LAUNCHES = [problem for op in OPS.values() for problem in op.production]
#: Least share of a processor's threads: half is what hides the latency of memory with 16 bytes a thread in flight.
MIN_OCCUPANCY = 0.5
MAX_SHARED_BYTES = 20 * 1024


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("problem", LAUNCHES, ids=str)
def test_resources_are_bounded(problem, architecture):
    compiled = compile_program(program(problem, architecture))
    used = compiled.resources
    assert compiled.code.startswith(b"\x7fELF")
    assert problem.op.encode() in compiled.code
    assert 0 < used.registers <= problem.max_registers
    assert used.spilled_bytes == used.stack_bytes == 0
    assert used.shared_bytes <= MAX_SHARED_BYTES
    assert used.occupancy(architecture, problem.launch().block) >= MIN_OCCUPANCY


@pytest.mark.parametrize("problem", LAUNCHES, ids=str)
def test_arguments_and_accesses_as_declared(problem):
    ptx = compile_program(program(problem, "sm_90a"), "ptx").code.decode("ascii")
    assert re.findall(r"\.param \.(u\d+)\b", ptx.split(")")[0]) == [
        *["u64"] * len(problem.inputs),
        *["u32"] * len(problem.launch().integers),
        *["u64"] * len(problem.outputs),
    ]
    # What is written is as wide as what is computed at a time: nothing is stored value by value.
    stores = {access_bytes(name) for name in re.findall(r"st\.global\.([\w.]+)", ptx)}
    output = problem.outputs[0]
    defines = problem.launch().defines
    vector = defines.get("WRITE", defines.get("VECTOR"))
    size = output.bytes // math.prod(output.shape)
    expected = {vector * size} if problem.op != "rgb_to_yuv420" else {vector, vector // 2}
    assert stores == expected
    # The driver of CUDA 13.0 reads no newer PTX, and TensorRT's plugins hand it theirs.
    assert re.search(r"^\.version 9\.0$", ptx, re.MULTILINE)


def access_bytes(suffix):
    """``wb.v4.u32`` as 16."""
    count = re.search(r"v(\d)", suffix)
    return (int(count[1]) if count else 1) * int(re.search(r"(\d+)$", suffix)[1]) // 8


def test_same_program_same_bytes():
    problem = LAUNCHES[0]
    assert compile_program(program(problem, "sm_80")).code == compile_program(program(problem, "sm_80")).code


def test_identity_names_the_compiler_and_its_headers():
    found = identity()
    assert re.fullmatch(r"13\.\d+ \([\w.]+\)", found.version)
    assert re.fullmatch(r"[0-9a-f]{64}", found.headers_sha256)


def test_what_does_not_compile_is_one_clear_error():
    broken = replace(program(LAUNCHES[0], "sm_80"), source="#error this is not a kernel\n")
    with pytest.raises(CompilerError, match=r"rms_norm_modulate for sm_80: .*this is not a kernel") as raised:
        compile_program(broken)
    assert "\n" not in str(raised.value)


def test_an_unknown_option_is_one_clear_error():
    wrong = replace(program(LAUNCHES[0], "sm_80"), options=("--no-such-option",))
    with pytest.raises(CompilerError, match="rms_norm_modulate for sm_80"):
        compile_program(wrong)


@pytest.mark.parametrize("blocked", ["cuda", "cuda.bindings", "cuda.pathfinder"])
def test_without_the_compiler(blocked):
    script = f"""
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {blocked!r}:
            raise ModuleNotFoundError("No module named " + repr(name))

sys.meta_path.insert(0, Blocked())
from ltxrt_kernels.nvrtc import CompilerError, identity
try:
    identity()
except CompilerError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    expected = rf"NVRTC is not installed \(No module named '{blocked}'\); pip install 'ltxrt\[gpu\]'\n"
    assert re.fullmatch(expected, ran.stdout), ran.stdout
