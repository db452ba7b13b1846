# SPDX-License-Identifier: Apache-2.0
"""Loading and launching up to the edge of the device: what cuda-core is handed, and how it reads that."""

import ctypes
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest

from ltxrt_kernels import launch as launch_module
from ltxrt_kernels.euler_step import EulerStep
from ltxrt_kernels.launch import DeviceKernels
from ltxrt_kernels.norm_rope import NormRope

Capability = namedtuple("Capability", "major minor")


class FakeCore:
    """The part of cuda-core that is used, recording what it is given."""

    def __init__(self):
        self.loaded, self.launched = [], []
        self.ObjectCode = SimpleNamespace(from_cubin=self.from_cubin)

    def from_cubin(self, code, *, name):
        self.loaded.append((code, name))
        return SimpleNamespace(get_kernel=lambda entry: (code, entry))

    def LaunchConfig(self, *, grid, block):  # noqa: N802 - cuda-core's name
        return grid, block

    def launch(self, *arguments):
        self.launched.append(arguments)


@pytest.fixture
def core(monkeypatch):
    fake = FakeCore()
    monkeypatch.setattr(launch_module, "import_module", lambda name: {"cuda.core": fake}[name])
    return fake


def kernels(capability=(9, 0)):
    cache = SimpleNamespace(cubin=lambda problem, architecture: f"{problem.op} {architecture}".encode())
    return DeviceKernels(SimpleNamespace(compute_capability=Capability(*capability)), cache)


def addresses(problem):
    return {port.name: 4096 * (index + 1) for index, port in enumerate((*problem.inputs, *problem.outputs))}


def test_launch(core):
    problem = NormRope(grid=(2, 3, 5), heads=2, head_width=8)
    kernels().load(problem).launch("stream", addresses(problem))
    ((stream, config, kernel, *arguments),) = core.launched
    assert stream == "stream"
    assert config == (problem.launch().grid, problem.launch().block)
    assert kernel == (b"norm_rope sm_90a", "norm_rope")
    assert arguments == [4096, 8192, 12288, 16384, 20480, 2, 3, 5, 1, 24576]
    assert [type(argument) for argument in arguments] == [*[int] * 5, *[np.int32] * 4, int]


def test_loads_each_size_once_and_shares_code(core):
    made = kernels((8, 6))
    first = made.load(EulerStep(tokens=5))
    assert made.load(EulerStep(tokens=5)) is first
    second = made.load(EulerStep(tokens=5000))
    assert second.kernel == first.kernel
    assert second.config != first.config
    assert core.loaded == [(b"euler_step sm_80", "euler_step")]


def test_a_gpu_that_is_too_old(core):
    with pytest.raises(ValueError, match=r"compute capability: 7\.5 is not allowed"):
        kernels((7, 5)).load(EulerStep(tokens=5))
    assert core.loaded == []


def test_addresses_are_checked_before_anything_is_launched(core):
    problem = EulerStep(tokens=5)
    loaded, given = kernels().load(problem), addresses(problem)
    with pytest.raises(ValueError, match="mask lies at 0x4008; allowed: multiples of 16"):
        loaded.launch("stream", given | {"mask": 0x4008})
    with pytest.raises(ValueError, match=r"euler_step: tensors .* given; allowed: \['latent', "):
        loaded.launch("stream", given | {"more": 0})
    del given["out"]
    with pytest.raises(ValueError, match=r"euler_step: tensors .* given; allowed: \['latent', "):
        loaded.launch("stream", given)
    assert core.launched == []


def test_cuda_core_reads_the_arguments_as_the_kernel_does(core):
    handler = pytest.importorskip("cuda.core._kernel_arg_handler")
    problem = NormRope(grid=(2, 3, 5), heads=2, head_width=8)
    given = {name: address + (0x7F12 << 32) for name, address in addresses(problem).items()}
    arguments = kernels().load(problem).arguments(given)
    holder = handler.ParamHolder(arguments)
    values = (ctypes.c_void_p * len(arguments)).from_address(holder.ptr)
    widths = [ctypes.c_int64] * 5 + [ctypes.c_int32] * 4 + [ctypes.c_int64]
    read = [width.from_address(value).value for width, value in zip(widths, values, strict=True)]
    assert read == [*list(given.values())[:5], 2, 3, 5, 1, given["out"]]


def test_cuda_core_takes_the_configuration_and_the_code(tmp_path):
    real = pytest.importorskip("cuda.core")
    problem = EulerStep(tokens=70000)
    config = real.LaunchConfig(grid=problem.launch().grid, block=problem.launch().block)
    assert config.grid == problem.launch().grid
    assert config.block == (problem.launch().block, 1, 1)
    from ltxrt_kernels.cache import CubinCache

    code = CubinCache(tmp_path).cubin(problem, "sm_90a")
    assert real.ObjectCode.from_cubin(code, name=problem.op).code == code
