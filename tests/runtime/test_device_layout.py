# SPDX-License-Identifier: Apache-2.0
"""Latents turned by a kernel: which kernel, with which addresses; and the reason where there is none."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest

from ltxrt import device_layout, stream
from ltxrt.device_layout import LayoutKernels, kernel_folder, open_layout
from ltxrt.latent import grid_of, to_grid, to_tokens, tokens_of
from ltxrt.shapes import LatentShape
from ltxrt.testing_device import CudaError, host_device
from ltxrt_kernels import cache, launch
from ltxrt_kernels.latent_layout import LatentLayout
from ltxrt_kernels.nvrtc import CompilerError
from ltxrt_kernels.ops import OPS

SHAPE = LatentShape(3, 2, 5)


class Kernels:
    """Runs a kernel's reference on what lies at the addresses."""

    def __init__(self, device):
        self.device, self.problems = device, []

    def load(self, problem):
        self.problems.append(problem)

        def start(stream, addresses):
            assert stream is self.device.compute.raw
            assert set(addresses) == {port.name for port in (*problem.inputs, *problem.outputs)}
            stream.put(lambda: self.run(problem, addresses))

        return SimpleNamespace(launch=start)

    def run(self, problem, addresses):
        def at(port):
            memory = (ctypes.c_float * int(np.prod(port.shape))).from_address(addresses[port.name])
            return np.frombuffer(memory, np.float32).reshape(port.shape)

        inputs = {port.name: at(port) for port in problem.inputs}
        (found,) = OPS[problem.op].reference(problem, inputs).values()
        at(problem.outputs[0])[...] = found


@pytest.fixture
def device():
    made, _ = host_device()
    made.layout = LayoutKernels(made, Kernels(made))
    return made


@pytest.fixture
def tokens():
    return np.random.default_rng(1).standard_normal((1, SHAPE.tokens, 8)).astype(np.float32)


def test_tokens_to_a_grid_and_back(device, tokens):
    grid = grid_of(device.place(tokens), SHAPE)
    assert grid.shape == (1, 8, *SHAPE)
    back = tokens_of(grid)
    np.testing.assert_array_equal(np.asarray(grid), to_grid(tokens, SHAPE))
    np.testing.assert_array_equal(np.asarray(back), tokens)
    unpack, pack = device.layout._kernels.problems
    assert (unpack.pack, pack.pack) == (False, True)
    assert unpack.tokens == pack.tokens == SHAPE.tokens
    assert unpack.launch().defines["CHANNELS"] == 8
    assert (unpack.source, unpack.target) == ("float32", "float32")


def test_arrays_of_the_host_stay_there(tokens):
    grid = grid_of(tokens, SHAPE)
    np.testing.assert_array_equal(grid, to_grid(tokens, SHAPE))
    np.testing.assert_array_equal(tokens_of(grid), to_tokens(to_grid(tokens, SHAPE)))


# --- opening ---


def test_every_kernel_is_compiled_before_a_clip_needs_it(device, monkeypatch, tmp_path):
    loaded = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(launch.DeviceKernels, "load", lambda self, problem: loaded.append((self.cache.folder, problem)))
    layout, reason = open_layout(device, 128)
    assert layout is not None
    assert reason == ""
    assert all(problem.channels == 128 for _, problem in loaded)
    compiled = [problem.launch().defines for _, problem in loaded]
    for tokens in range(1, 100):
        for pack in (False, True):
            clip = LatentLayout(tokens=tokens, channels=128, pack=pack, source="float32", target="float32")
            assert clip.launch().defines in compiled
    assert {folder for folder, _ in loaded} == {tmp_path / "ltxrt" / "kernels"}


@pytest.mark.parametrize(
    "error",
    [
        CompilerError("no NVRTC"),
        ValueError("7.5 is not allowed"),
        OSError("read-only"),
        RuntimeError("UNKNOWN libname='cccl'"),
    ],
)
def test_kernels_that_cannot_be_compiled(device, monkeypatch, error):
    def refuses(self, problem):
        raise error

    monkeypatch.setattr(launch.DeviceKernels, "load", refuses)
    assert open_layout(device, 128) == (None, f"the kernels cannot be compiled: {error}")


def test_kernels_that_the_gpu_refuses(device, monkeypatch):
    def refuses(self, problem):
        raise CudaError("CUDA_ERROR_NO_BINARY_FOR_GPU: the API call failed\nmore")

    monkeypatch.setattr(stream, "_cuda_errors", lambda: (CudaError,))
    monkeypatch.setattr(launch.DeviceKernels, "load", refuses)
    layout, reason = open_layout(device, 128)
    assert layout is None
    assert reason.endswith("the GPU fails in loading a kernel: CUDA_ERROR_NO_BINARY_FOR_GPU: the API call failed")


def test_kernels_that_cannot_be_loaded(device, monkeypatch):
    def missing(name):
        raise ImportError("No module named 'cuda'")

    monkeypatch.setattr(device_layout, "import_module", missing)
    assert open_layout(device, 128) == (None, "the kernels cannot be loaded: No module named 'cuda'")


def test_the_real_compiler_makes_what_is_asked_for(device, monkeypatch, tmp_path):
    pytest.importorskip("cuda.bindings.nvrtc")
    made = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    core = SimpleNamespace(
        ObjectCode=SimpleNamespace(
            from_cubin=lambda code, *, name: made.append(code) or SimpleNamespace(get_kernel=lambda entry: entry)
        ),
        LaunchConfig=lambda *, grid, block: (grid, block),
    )
    monkeypatch.setattr(launch, "import_module", lambda name: core)
    device._raw.compute_capability = (9, 0)
    layout, reason = open_layout(device, 32)
    assert layout is not None, reason
    assert len(made) == 6
    assert all(cache.is_whole(code) for code in made)
    assert len(list(kernel_folder().iterdir())) == 6
