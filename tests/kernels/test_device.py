# SPDX-License-Identifier: Apache-2.0
"""Tensors of a problem on a device that is host memory here, and the interface that a real one has to have."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest

from ltxrt_kernels import device as device_module
from ltxrt_kernels.device import DeviceTensors, opened_device
from ltxrt_kernels.head_gate import HeadGate
from ltxrt_kernels.ops import OPS

PROBLEM = HeadGate(tokens=3, heads=2, head_width=5, quantise=True)


class FakeBuffer:
    def __init__(self, size):
        self.memory = np.full(size, 0xA5, np.uint8)
        self.closed = 0

    @property
    def handle(self):
        return self.memory.ctypes.data

    def close(self, stream):
        self.closed += 1


class FakeDevice:
    def __init__(self):
        self.buffers = []

    def allocate(self, size, *, stream):
        self.buffers.append(FakeBuffer(size))
        return self.buffers[-1]


class FakeStream:
    def __init__(self):
        self.synced = self.closed = 0
        self.handed = []
        self.handle = self

    def sync(self):
        self.synced += 1
        while self.handed:
            self.handed.pop(0)()

    def close(self):
        self.closed += 1


def fake_driver(result=0):
    answer = SimpleNamespace(value=result, name="CUDA_ERROR_INVALID_VALUE")

    def handed(target, source, size, stream):
        stream.handed.append(lambda: ctypes.memmove(target, source, size))
        return (answer,)

    def copied(target, source, size):
        ctypes.memmove(target, source, size)
        return (answer,)

    return SimpleNamespace(cuMemcpyHtoDAsync=handed, cuMemcpyDtoH=copied)


def test_what_is_uploaded_lies_there_and_what_lies_there_is_downloaded(monkeypatch):
    monkeypatch.setattr(device_module, "import_module", lambda name: {"cuda.bindings.driver": fake_driver()}[name])
    device, stream = FakeDevice(), FakeStream()
    inputs = OPS["head_gate"].generate_inputs(PROBLEM, 1)
    with DeviceTensors(device, stream, PROBLEM) as tensors:
        assert set(tensors.addresses) == {"attended", "logits", "output_scale", "out"}
        tensors.upload(inputs)
        for port, buffer in zip(PROBLEM.inputs, device.buffers, strict=False):
            assert buffer.handle == tensors.addresses[port.name]
            assert buffer.memory.tobytes() == inputs[port.name].tobytes()
        before = stream.synced
        (out,) = tensors.download().values()
        assert stream.synced == before + 1
        assert out.shape == (3, 10)
        assert np.all(out == 0xA5)
        tensors.close()
    assert [buffer.closed for buffer in device.buffers] == [1, 1, 1, 1]


def test_a_failed_copy_is_an_error(monkeypatch):
    monkeypatch.setattr(device_module, "import_module", lambda name: fake_driver(result=1))
    tensors = DeviceTensors(FakeDevice(), FakeStream(), PROBLEM)
    with pytest.raises(RuntimeError, match="cuMemcpyHtoDAsync: CUDA_ERROR_INVALID_VALUE"):
        tensors.upload(OPS["head_gate"].generate_inputs(PROBLEM, 1))


def test_the_stream_is_closed_whatever_happens(monkeypatch):
    stream = FakeStream()
    device = SimpleNamespace(set_current=lambda: None, create_stream=lambda options: stream)
    core = SimpleNamespace(Device=lambda index: device, StreamOptions=lambda nonblocking: nonblocking)
    monkeypatch.setattr(device_module, "import_module", lambda name: core)
    with pytest.raises(RuntimeError, match="True"), opened_device() as opened:
        raise RuntimeError(opened == (device, stream))
    assert stream.closed == 1


def test_cuda_core_has_what_is_used():
    core, driver = pytest.importorskip("cuda.core"), pytest.importorskip("cuda.bindings.driver")
    assert core.StreamOptions(nonblocking=True).nonblocking
    assert core.EventOptions(timing_enabled=True).timing_enabled
    used = {
        core.Device: ("allocate", "compute_capability", "create_stream", "properties", "set_current"),
        core.Buffer: ("close", "copy_to", "fill", "handle"),
        core.Stream: ("close", "handle", "record", "sync"),
        core.ObjectCode: ("from_cubin", "get_kernel"),
        core: ("launch", "LaunchConfig"),
        driver: ("cuMemcpyDtoH", "cuMemcpyHtoDAsync"),
    }
    for owner, names in used.items():
        assert not [name for name in names if not hasattr(owner, name)], owner
