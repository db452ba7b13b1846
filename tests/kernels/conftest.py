# SPDX-License-Identifier: Apache-2.0
"""Kernels run where a test can run them: on a GPU, and their source on the CPU.

Every buffer stands between guards: NaN around what is read, a pattern around what is written, so that a kernel that
reaches beyond its tensors is found out.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ltxrt_kernels
from ltxrt_kernels.arrays import Arrays, excess
from ltxrt_kernels.cache import CubinCache
from ltxrt_kernels.device import DeviceTensors, opened_device
from ltxrt_kernels.dtypes import STORAGE
from ltxrt_kernels.launch import DeviceKernels
from ltxrt_kernels.ops import OPS
from ltxrt_kernels.spec import Port, Problem

_GUARD_BYTES = 256
_PATTERN = 0xA5


class Guarded:
    """A port's tensor in the middle of a larger buffer, 16-byte aligned and no more."""

    def __init__(self, port: Port, content: np.ndarray | None) -> None:
        raw = np.full(port.bytes + 3 * _GUARD_BYTES, 0xFF if content is not None else _PATTERN, np.uint8)
        begin = -raw.ctypes.data % _GUARD_BYTES + _GUARD_BYTES + 16
        self.port, self.raw, self.begin = port, raw, begin
        self.tensor = raw[begin : begin + port.bytes].view(STORAGE[port.dtype]).reshape(port.shape)
        if content is not None:
            assert content.dtype == self.tensor.dtype, port.name
            self.tensor[...] = content

    @property
    def address(self) -> int:
        return self.raw.ctypes.data + self.begin

    def check_guards(self) -> None:
        outside = np.concatenate([self.raw[: self.begin], self.raw[self.begin + self.port.bytes :]])
        assert np.all(outside == _PATTERN), f"{self.port.name} was written beyond its ends"


def guarded(problem: Problem, inputs: Arrays) -> tuple[list[Guarded], list[Guarded]]:
    return (
        [Guarded(port, inputs[port.name]) for port in problem.inputs],
        [Guarded(port, None) for port in problem.outputs],
    )


def worst(problem: Problem, inputs: Arrays, outputs: Arrays) -> float:
    """How much of the tolerance the worst output uses up."""
    expected = OPS[problem.op].reference(problem, inputs)
    assert set(expected) == {port.name for port in problem.outputs}
    return max(excess(outputs[port.name], expected[port.name], port, problem.tolerance) for port in problem.outputs)


# --- on the CPU ---


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[Problem]], ctypes.CDLL]:
    """Kernels compiled for the CPU, all sizes of an op together."""
    folder = tmp_path_factory.mktemp("emulated")
    return cache(lambda batch: build(batch, folder / batch[0].op))


def build(batch: Sequence[Problem], stem: Path) -> ctypes.CDLL:
    """Compile one op's kernel once for each problem, with the toolkit's headers and a check of every alignment."""
    pathfinder = pytest.importorskip("cuda.pathfinder")
    headers = [pathfinder.find_nvidia_header_directory(name) for name in ("cudart", "cccl")]
    if shutil.which("g++") is None or None in headers or not (Path(headers[0]) / "crt").is_dir():
        pytest.skip("no g++ or no CUDA headers to compile kernels for the CPU with")
    package = Path(ltxrt_kernels.__file__).parent
    parts = ['#include "emulator.hpp"', '#include "ltxrt.cuh"']
    for index, problem in enumerate(batch):
        defines = {problem.op: f"{problem.op}_{index}", **problem.launch().defines}
        parts += [f"#define {name} {value}" for name, value in defines.items()]
        parts += [f"namespace n{index} {{", f'#include "{package / problem.op / "kernel.cu"}"', "}"]
        parts += [
            f'extern "C" int emulate_{index}(void** arguments, int count, const unsigned* grid, unsigned threads) {{',
            f"    return emulator::launch(n{index}::{problem.op}, arguments, count, grid, threads);",
            "}",
        ]
        parts += [f"#undef {name}" for name in defines]
    source, target = stem.with_suffix(".cpp"), stem.with_suffix(".so")
    source.write_text("\n".join(parts))
    folders = [Path(__file__).parent, package / "include", *headers]
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-fno-strict-aliasing", "-fsanitize=alignment,bounds"]
    command = ["g++", *options, *(f"-I{folder}" for folder in folders), str(source), "-o", str(target)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ctypes.CDLL(str(target))


@pytest.fixture
def emulated(libraries: Callable[..., ctypes.CDLL], capfd: pytest.CaptureFixture[str]) -> Callable[..., float]:
    """Run a problem's kernel on the CPU and compare it; ``batch`` holds all sizes that are compiled with it."""

    def run(
        problem: Problem, batch: Sequence[Problem], inputs: Arrays | None = None, *, in_place: str | None = None
    ) -> float:
        inputs = OPS[problem.op].generate_inputs(problem, 11) if inputs is None else inputs
        sources, targets = guarded(problem, inputs)
        if in_place is not None:  # the first output takes the place of that input
            index = [port.name for port in problem.inputs].index(in_place)
            targets[0].tensor[...] = inputs[in_place]
            sources[index] = targets[0]
        launch = problem.launch()
        integers = [ctypes.c_int(value) for value in launch.integers]
        pointers = [
            *(buffer.address for buffer in sources),
            *(ctypes.addressof(value) for value in integers),
            *(buffer.address for buffer in targets),
        ]
        function = getattr(libraries(batch), f"emulate_{batch.index(problem)}")
        arguments = (ctypes.c_void_p * len(pointers))(*pointers)
        status = function(arguments, len(pointers), (ctypes.c_uint * 3)(*launch.grid), launch.block)
        assert status == 0, "the kernel takes another number of arguments"
        assert "runtime error" not in capfd.readouterr().err
        for buffer in targets:
            buffer.check_guards()
        return worst(problem, inputs, {buffer.port.name: buffer.tensor for buffer in targets})

    return run


# --- on the GPU ---


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any, DeviceKernels]]:
    """The first GPU, a stream on it, and its kernels, compiled in this session."""
    with opened_device() as (opened, stream):
        yield opened, stream, DeviceKernels(opened, CubinCache(tmp_path_factory.mktemp("cubins")))


@pytest.fixture
def on_gpu(request: pytest.FixtureRequest) -> Callable[[Problem], float]:
    """Run a problem's kernel on the GPU and compare it. The device is looked for when it is called: not before the
    marker has had its say.
    """

    def run(problem: Problem) -> float:
        opened, stream, kernels = request.getfixturevalue("device")
        inputs = OPS[problem.op].generate_inputs(problem, 12)
        with DeviceTensors(opened, stream, problem) as tensors:
            tensors.upload(inputs)
            kernels.load(problem).launch(stream, tensors.addresses)
            return worst(problem, inputs, tensors.download())

    return run
