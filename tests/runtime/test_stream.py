# SPDX-License-Identifier: Apache-2.0
"""The device layer on a device that is host memory, and every call of it against the packages that are installed."""

import gc
import inspect
import re
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ltxrt import gpu, stream
from ltxrt.errors import EngineError
from ltxrt.graph import IdlePool, capture_graph
from ltxrt.memory import DeviceTensor
from ltxrt.testing_device import HOST_GPU, CudaError, HostGraphBuilder, Result, host_device


@pytest.fixture
def opened():
    return host_device()


@pytest.fixture
def device(opened):
    return opened[0]


@pytest.fixture
def cuda(opened):
    return opened[1]


# --- memory ---


@settings(max_examples=30)
@given(
    arrays.arrays(
        st.sampled_from([np.float32, np.float16, np.int64, np.uint8]),
        arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5),
        elements=st.integers(0, 100),
    )
)
def test_what_is_placed_comes_back(values):
    device, _ = host_device()
    tensor = device.place(values)
    assert (tensor.shape, tensor.dtype, tensor.nbytes) == (values.shape, values.dtype, values.nbytes)
    found = np.asarray(tensor)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


def test_nothing_is_done_before_somebody_waits(device, cuda):
    tensor = device.place(np.arange(1000, dtype=np.float32))
    copy = tensor.fetch()
    assert cuda.streams[0].done == cuda.streams[1].done == 0
    np.testing.assert_array_equal(copy.wait(), np.arange(1000))
    with pytest.raises(ValueError, match="handed out already"):
        copy.wait()


def test_a_copy_keeps_what_it_reads(device):
    tensor = device.place(np.arange(1000, dtype=np.float32))
    copy = tensor.fetch()
    del tensor
    gc.collect()
    device.compute.sync()
    np.testing.assert_array_equal(copy.wait(), np.arange(1000))


def test_an_abandoned_copy_is_done_before_its_source_is_overwritten(device, cuda):
    tensor = device.place(np.arange(1000, dtype=np.float32))
    copy = tensor.fetch()
    block = copy._block
    del tensor, copy
    gc.collect()
    device.compute.sync()  # waits for the copy, then gives the memory back
    assert cuda.streams[1].done == cuda.streams[1].handed
    np.testing.assert_array_equal(block.array((1000,), np.dtype("float32"), device.pinned, None), np.arange(1000))


def test_memory_is_given_back_in_the_order_of_the_stream(device, cuda):
    tensor = device.place(np.zeros(1000, np.float32))
    device.compute.sync()
    used = cuda.used
    del tensor
    assert cuda.used == used
    device.compute.sync()
    assert cuda.used == used - 4000


def test_pinned_memory_is_used_again_once_nobody_looks_at_it(device):
    one = device.place(np.ones(5000, np.float32)).fetch().wait()
    address = one.ctypes.data
    two = device.place(np.ones(5000, np.float32)).fetch().wait()
    assert two.ctypes.data != address
    part = one[100:200]
    del one
    three = np.asarray(device.place(np.ones(5000, np.float32)))
    assert three.ctypes.data != address
    np.testing.assert_array_equal(part, 1)
    del part
    again = {np.asarray(device.place(np.full(5000, 2, np.float32))).ctypes.data for _ in range(3)}
    assert address in again


def test_pinned_memory_may_come_back_while_some_is_taken(device):
    """As from a finalizer, which the collector runs wherever it likes."""
    one, two = device.pinned.take(5000), device.pinned.take(5000)

    class Collects:
        @property
        def is_done(self):
            device.pinned.give_back(two, SimpleNamespace(is_done=True))
            return False

    device.pinned.give_back(one, Collects())
    taken = []
    thread = threading.Thread(target=lambda: taken.append(device.pinned.take(5000)), daemon=True)
    thread.start()
    thread.join(5)
    assert taken == [two]


def test_a_copy_that_finds_no_memory_says_so(device, monkeypatch):
    tensor = device.place(np.ones(3000, np.float32))

    def refuses(size):
        raise CudaError("CUDA_ERROR_OUT_OF_MEMORY: the API call failed\nmore")

    monkeypatch.setattr(device.pinned, "take", refuses)
    with pytest.raises(EngineError, match=r"^the GPU fails in copying a result to the host: CUDA_ERROR_OUT_OF_MEMORY"):
        tensor.fetch()


def test_staging_memory_is_not_overwritten_before_it_has_been_read(device):
    tensors = [device.place(np.full(3000, value, np.float32)) for value in range(4)]  # nothing has been copied yet
    for value, tensor in enumerate(tensors):
        np.testing.assert_array_equal(np.asarray(tensor), value)


def test_a_word_travels_with_the_call(device, cuda):
    tensor = device.place(np.zeros(1, np.float32))
    host = np.array([0.725], np.float32)
    device.write(tensor, host)
    host[0] = 9
    assert float(np.asarray(tensor)[0]) == np.float32(0.725)


def test_copies_within_the_device(device):
    source, target = device.place(np.arange(6, dtype=np.int64)), device.empty((6,), "int64")
    device.write(target, source)
    device.write(source, np.zeros(6, np.int64))
    np.testing.assert_array_equal(np.asarray(target), np.arange(6))
    assert device.place(target) is target
    other, _ = host_device()
    np.testing.assert_array_equal(np.asarray(other.place(target)), np.arange(6))


@settings(max_examples=30)
@given(arrays.array_shapes(min_dims=3, max_dims=5, min_side=1, max_side=4), st.data())
def test_a_part_of_an_axis_is_a_tensor_of_its_own(shape, data):
    device, _ = host_device()
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    axis = data.draw(st.integers(0, len(shape) - 1))
    start = data.draw(st.integers(0, shape[axis]))
    stop = data.draw(st.integers(start, shape[axis]))
    part = device.part(device.place(values), axis, start, stop)
    np.testing.assert_array_equal(np.asarray(part), values.take(range(start, stop), axis))


def test_a_borrowed_tensor_says_so(device):
    own = device.place(np.arange(4, dtype=np.float32))
    lent = DeviceTensor(device, own.address, (2, 2), "float32", None)
    assert lent.borrowed
    assert not own.borrowed
    np.testing.assert_array_equal(np.asarray(lent, np.float64), [[0, 1], [2, 3]])
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(lent, copy=False)


def test_scratch_grows_and_old_work_keeps_the_old_block(device, cuda):
    small = device.scratch.reserve(1000)
    assert device.scratch.reserve(500) is small
    large = device.scratch.reserve(5000)
    assert large is not small
    assert device.scratch.size_bytes == 5000
    device.compute.sync()
    assert cuda.used == 6000
    del small
    device.compute.sync()
    assert cuda.used == 5000


def test_no_memory(device, cuda):
    cuda.memory_bytes = 3 * 1024**3
    with pytest.raises(EngineError) as caught:
        device.allocate(4 * 1024**3)
    assert str(caught.value).startswith("the GPU fails in allocating 4.00 GiB: CUDA_ERROR_OUT_OF_MEMORY: the API")
    assert str(caught.value).endswith("(3.00 GiB free on Host)")
    assert "\n" not in str(caught.value)


def test_a_refused_call_names_itself(device, monkeypatch):
    monkeypatch.setattr(
        device.compute, "_driver", SimpleNamespace(cuMemsetD32Async=lambda *_: (Result.CUDA_ERROR_OUT_OF_MEMORY,))
    )
    with pytest.raises(EngineError, match="the GPU refuses cuMemsetD32Async: CUDA_ERROR_OUT_OF_MEMORY"):
        device.compute.write_word(0, 1)


@pytest.fixture(autouse=True)
def _errors_of_cuda_core(monkeypatch):
    """The stand-in's error in the place of cuda-core's, which may not be installed."""
    monkeypatch.setattr(stream, "_cuda_errors", lambda: (CudaError,))


# --- graphs ---


def test_a_graph_is_tried_captured_and_replayed(device, cuda):
    tensor, ran = device.place(np.zeros(1, np.uint32)), []

    def work(where):
        ran.append(where)
        where.write_word(tensor.address, len(ran))

    graph = capture_graph(device, work, "denoiser")
    assert len(ran) == 2
    assert ran[0] is device.compute
    assert cuda.streams[0].done == cuda.streams[0].handed  # the first run was waited for
    assert graph.nodes == 1
    assert cuda.builders_closed == 1
    assert int(np.asarray(tensor)[0]) == 1  # capturing does nothing
    graph.launch(device.compute)
    assert int(np.asarray(tensor)[0]) == 2
    graph.close()
    with device.errors("x"), pytest.raises(Exception, match="destroyed"):
        graph.launch(device.compute)


def test_an_empty_graph_is_an_error(device, cuda):
    with pytest.raises(EngineError, match="denoiser: the captured CUDA graph is empty"):
        capture_graph(device, lambda where: None, "denoiser")
    assert cuda.builders_closed == 1
    assert cuda.graphs == []


def test_what_fails_while_captured_ends_the_capture(device, cuda):
    def work(where):
        if where is not device.compute:
            raise EngineError("denoiser does not run")

    with pytest.raises(EngineError, match="does not run"):
        capture_graph(device, work, "denoiser")
    assert cuda.builders_closed == 1


def spoiled(self):
    raise CudaError("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED: the API call failed")


def test_a_spoiled_capture_does_not_hide_what_spoiled_it(device, monkeypatch):
    def work(where):
        if where is not device.compute:
            raise EngineError("denoiser does not run")

    monkeypatch.setattr(HostGraphBuilder, "close", spoiled)
    with pytest.raises(EngineError, match=r"^denoiser does not run$"):
        capture_graph(device, work, "denoiser")


def test_a_capture_that_was_spoiled_unseen_is_an_engine_s_error(device, monkeypatch):
    def refuses(self):
        raise RuntimeError("Build process encountered an error\nand has been invalidated.")

    monkeypatch.setattr(HostGraphBuilder, "end_building", refuses)
    monkeypatch.setattr(HostGraphBuilder, "close", spoiled)
    with pytest.raises(EngineError) as caught:
        capture_graph(device, lambda where: where.write_word(device.empty((1,), "uint32").address, 1), "denoiser")
    assert str(caught.value) == (
        "denoiser cannot be captured: Build process encountered an error and has been invalidated."
    )


class Thing:
    def __init__(self):
        self.closed = 0

    def close(self):
        self.closed += 1


def test_the_least_recently_used_goes_first():
    pool, things = IdlePool(2), [Thing() for _ in range(4)]
    for key, thing in zip("abc", things, strict=False):
        pool.give_back(key, thing)
    assert [thing.closed for thing in things] == [1, 0, 0, 0]
    assert pool.take("a") is None
    taken = pool.take("b")
    assert taken is things[1]
    assert pool.take("b") is None  # it is somebody's
    pool.give_back("b", taken)
    pool.give_back("d", things[3])
    assert [thing.closed for thing in things] == [1, 0, 1, 0]
    pool.drop(lambda key: key == "b")
    assert [thing.closed for thing in things] == [1, 1, 1, 0]
    assert len(pool) == 1


def test_what_is_given_back_while_another_one_is_looked_for():
    """As by the collector, which ends a loop wherever it likes."""
    pool, things, taken = IdlePool(3), [Thing() for _ in range(3)], []

    class Collects:
        def __hash__(self):
            return 1

        def __eq__(self, other):
            pool.give_back("late", things[2])
            return False

    pool.give_back("a", things[0])
    pool.give_back(Collects(), things[1])
    thread = threading.Thread(target=lambda: taken.append(pool.take("a")), daemon=True)
    thread.start()
    thread.join(5)
    assert taken == [things[0]]
    assert pool.take("late") is things[2]


def test_a_pool_that_keeps_nothing():
    pool, thing = IdlePool(0), Thing()
    pool.give_back("a", thing)
    assert thing.closed == 1
    with pytest.raises(ValueError, match="limit: -1 is not allowed"):
        IdlePool(-1)


# --- opening ---


def test_no_driver(monkeypatch):
    monkeypatch.setattr(stream, "find_gpus", lambda: gpu.find_gpus("libnone.so"))
    with pytest.raises(EngineError) as caught:
        stream.open_device()
    assert str(caught.value) == "no NVIDIA driver (libnone.so cannot be loaded)"


def test_no_such_gpu(monkeypatch):
    monkeypatch.setattr(stream, "find_gpus", lambda: gpu.GpuSearch((HOST_GPU,), ""))
    with pytest.raises(EngineError, match="there is no GPU 1, only 1"):
        stream.open_device(1)


def test_no_cuda_core(monkeypatch):
    monkeypatch.setattr(stream, "find_gpus", lambda: gpu.GpuSearch((HOST_GPU,), ""))

    def missing(name):
        raise ModuleNotFoundError("No module named 'cuda'", name="cuda")

    monkeypatch.setattr(stream, "import_module", missing)
    with pytest.raises(EngineError, match=r"cuda-core cannot be loaded .*: run pip install 'ltxrt\[gpu\]'"):
        stream.open_device()


# --- the packages that are installed ---


def test_cuda_bindings_take_the_calls():
    driver = pytest.importorskip("cuda.bindings.driver")
    calls = {
        "cuMemcpyHtoDAsync": (1, 2, 3, driver.CUstream(0)),
        "cuMemcpyDtoHAsync": (1, 2, 3, driver.CUstream(0)),
        "cuMemcpyDtoDAsync": (1, 2, 3, driver.CUstream(0)),
        "cuMemsetD32Async": (1, 2, 1, driver.CUstream(0)),
        "cuMemcpy2DAsync": (driver.CUDA_MEMCPY2D(), driver.CUstream(0)),
        "cuMemGetInfo": (),
        "cuGraphGetNodes": (driver.CUgraph(0),),
        "cuThreadExchangeStreamCaptureMode": (driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED,),
    }
    for name, arguments in calls.items():
        inspect.signature(getattr(driver, name)).bind(*arguments)
    assert int(driver.CUresult.CUDA_SUCCESS) == 0
    assert driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY.name == "CUDA_ERROR_OUT_OF_MEMORY"
    rows = driver.CUDA_MEMCPY2D()
    for name in ("srcMemoryType", "dstMemoryType", "srcDevice", "dstDevice", "srcPitch", "dstPitch"):
        assert hasattr(type(rows), name)
    rows.srcMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
    rows.srcDevice, rows.WidthInBytes, rows.Height = 1 << 40, 12, 3
    assert int(rows.srcDevice) == 1 << 40
    asked = set(re.findall(r"\bcu[MGT]\w+", inspect.getsource(stream)))
    assert asked == set(calls)


def test_cuda_core_takes_the_calls():
    core = pytest.importorskip("cuda.core")
    graph = pytest.importorskip("cuda.core.graph")
    something = object()
    calls = [
        (core.Device.set_current, (), {}),
        (core.Device.create_stream, (), {"options": something}),
        (core.Device.allocate, (5,), {"stream": something}),
        (core.Device.create_graph_builder, (), {}),
        (core.Stream.record, (), {}),
        (core.Stream.wait, (something,), {}),
        (core.Stream.sync, (), {}),
        (core.Event.sync, (), {}),
        (core.LegacyPinnedMemoryResource.allocate, (5,), {}),
        (graph.GraphBuilder.begin_building, (), {"mode": "thread_local"}),
        (graph.GraphBuilder.complete, (), {}),
        (graph.Graph.launch, (something,), {}),
        (graph.Graph.upload, (something,), {}),
    ]
    for function, arguments, named in calls:
        inspect.signature(function).bind(something, *arguments, **named)
    assert core.StreamOptions(nonblocking=True).nonblocking
    attributes = {
        core.Device: ("memory_resource",),
        core.Stream: ("handle", "close"),
        core.Event: ("is_done",),
        core.Buffer: ("handle", "size"),
        core.DeviceMemoryResource: ("attributes",),
        graph.GraphBuilder: ("stream", "graph_definition", "end_building", "close"),
        graph.GraphDefinition: ("handle",),
        graph.Graph: ("close",),
    }
    for owner, names in attributes.items():
        assert not [name for name in names if not hasattr(owner, name)], owner
    pool = pytest.importorskip("cuda.core._memory._memory_pool")
    for name in ("reserved_mem_current", "used_mem_current"):
        assert hasattr(pool._MemPoolAttributes, name)


def test_the_error_of_cuda_core_is_where_it_is_looked_for(monkeypatch):
    pytest.importorskip("cuda.core")
    monkeypatch.undo()
    assert [kind.__name__ for kind in stream._cuda_errors()] == ["CUDAError"]


# --- a GPU ---


@pytest.fixture(scope="module")
def real():
    device = stream.open_device()
    yield device
    device.close()


@pytest.fixture
def on_gpu(request):
    """``on_gpu()``: the GPU; looked for when it is called, not before the marker has had its say."""
    pytest.importorskip("cuda.core")
    return lambda: request.getfixturevalue("real")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5, 7), (1, 1048577)])
def test_tensors_go_to_a_gpu_and_come_back(on_gpu, dtype, shape):
    values = (np.random.default_rng(1).standard_normal(shape) * 50).astype(dtype)
    np.testing.assert_array_equal(np.asarray(on_gpu().place(values)), values)


@pytest.mark.gpu
def test_parts_words_and_copies_on_a_gpu(on_gpu):
    device, values = on_gpu(), np.arange(2 * 5 * 7, dtype=np.float32).reshape(1, 2, 5, 7)
    tensor = device.place(values)
    np.testing.assert_array_equal(np.asarray(device.part(tensor, 2, 1, 4)), values[:, :, 1:4])
    word = device.place(np.zeros(1, np.float32))
    device.write(word, np.float32([0.725]))
    assert np.asarray(word)[0] == np.float32(0.725)
    copy = device.empty(tensor.shape, "float32")
    device.write(copy, tensor)
    device.write(tensor, np.zeros_like(values))
    np.testing.assert_array_equal(np.asarray(copy), values)


@pytest.mark.gpu
def test_memory_of_a_gpu_is_given_back(on_gpu):
    device = on_gpu()
    device.compute.sync()
    free = device.free_bytes()
    tensor = device.empty((1 << 26,), "uint8")
    assert device.free_bytes() <= free - (1 << 26)
    del tensor
    gc.collect()
    device.compute.sync()
    assert device.free_bytes() >= free - (1 << 21)


@pytest.mark.gpu
def test_copies_out_run_beside_what_is_computed_next(on_gpu):
    device = on_gpu()
    values = [np.full(1 << 20, index, np.float32) for index in range(6)]
    copies = [device.place(value).fetch() for value in values]
    for value, copy in zip(values, copies, strict=True):
        np.testing.assert_array_equal(copy.wait(), value)


def euler(device, folder):
    """A kernel, its arguments on the device, and where it writes."""
    from ltxrt_kernels.cache import CubinCache
    from ltxrt_kernels.euler_step import EulerStep
    from ltxrt_kernels.launch import DeviceKernels
    from ltxrt_kernels.ops import OPS

    problem = EulerStep(tokens=1000)
    kernel = DeviceKernels(device.raw, CubinCache(folder)).load(problem)
    inputs = {name: device.place(value) for name, value in OPS["euler_step"].generate_inputs(problem, 3).items()}
    (port,) = problem.outputs
    out = device.empty(port.shape, "float32")
    addresses = {**{name: tensor.address for name, tensor in inputs.items()}, port.name: out.address}
    return kernel, addresses, out, inputs


@pytest.mark.gpu
def test_a_captured_kernel_gives_the_bits_of_a_plain_launch(on_gpu, tmp_path):
    device = on_gpu()
    kernel, addresses, out, _inputs = euler(device, tmp_path)
    kernel.launch(device.compute.raw, addresses)
    plain = np.asarray(out)
    graph = capture_graph(device, lambda where: kernel.launch(where.raw, addresses), "kernel")
    assert graph.nodes == 1
    device.write(out, np.zeros_like(plain))
    for _ in range(3):
        graph.launch(device.compute)
        np.testing.assert_array_equal(np.asarray(out), plain)
    graph.close()


@pytest.mark.gpu
def test_a_latent_is_turned_by_a_kernel_on_a_gpu(on_gpu, monkeypatch, tmp_path):
    from ltxrt.device_layout import open_layout
    from ltxrt.latent import to_grid, to_tokens
    from ltxrt.shapes import LatentShape

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device, shape = on_gpu(), LatentShape(3, 5, 7)
    layout, reason = open_layout(device, 128)
    assert layout is not None, reason
    tokens = np.random.default_rng(4).standard_normal((1, shape.tokens, 128)).astype(np.float32)
    grid = layout.to_grid(device.place(tokens), shape)
    np.testing.assert_array_equal(np.asarray(grid), to_grid(tokens, shape))
    np.testing.assert_array_equal(np.asarray(layout.to_tokens(grid)), to_tokens(to_grid(tokens, shape)))
