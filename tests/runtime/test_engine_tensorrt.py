# SPDX-License-Identifier: Apache-2.0
"""The TensorRT engine on a TensorRT that is played: it computes with ONNX Runtime, when the stream gets there.

Order, shapes, addresses and working memory are held against what TensorRT documents; the numbers are the CPU engine's,
so that whatever is read too early, too late or from the wrong place shows. That the calls exist in the real bindings is
the subject of ``test_tensorrt_conformance.py``.
"""

import ctypes
import enum
import math
import os
import shutil
import sys
import threading
import time
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest

from ltxrt import Pipeline, Request, gpu_store, stream
from ltxrt.backends import Machine
from ltxrt.bundle import Bundle, tiny_bundle_path
from ltxrt.clip_memory import ClipSize, clip_memory, process_bytes
from ltxrt.engine import concrete_shape, iterate
from ltxrt.engine_onnx import OnnxEngine
from ltxrt.engine_store import EngineStore
from ltxrt.engine_tensorrt import PlanFile, load_plans
from ltxrt.errors import CapacityError, EngineError
from ltxrt.graph import IdlePool
from ltxrt.manifest import NETWORK_NAMES, EngineEntry, EngineKey, EngineProfile, FileEntry
from ltxrt.media import bundled_speech
from ltxrt.shapes import LatentShape, PixelShape
from ltxrt.tensorrt_library import load_library
from ltxrt.testing_device import HOST_GPU, CudaError, HostCuda, HostLayout, host_device
from ltxrt.upsample import upsample

VERSION = "11.4.0.106"
MACHINE = Machine(gpu=HOST_GPU, tensorrt=VERSION, no_cuda_provider="not installed")
SCRATCH_BYTES = 4096


class PlayedTensorRT:
    """The module.

    Attributes:
        calls: ``(name, arguments)`` in order.
        refuses: Names of calls that fail.
        sessions: ONNX Runtime sessions by plan.
    """

    def __init__(self):
        self.__version__, self.__spec__ = VERSION, object()
        self.calls, self.refuses = [], set()
        self.loading = self.most_loading = 0
        self.lock = threading.Lock()
        self.TensorIOMode = enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
        self.ExecutionContextAllocationStrategy = enum.Enum(
            "ExecutionContextAllocationStrategy", ["STATIC", "USER_MANAGED"]
        )
        self.ILogger = ILogger

    def Runtime(self, logger):  # noqa: N802 - TensorRT's name
        if "Runtime" in self.refuses:
            logger.log(ILogger.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return Runtime(self, logger)

    def named(self, name):
        return [arguments for called, arguments in self.calls if called == name]


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING = range(3)

    def __init__(self):
        self.started = True


class Runtime:
    def __init__(self, trt, logger):
        assert logger.started
        self.trt, self.logger = trt, logger

    def deserialize_cuda_engine(self, data):
        path = Path(bytes(data).decode().strip())
        if not path.is_file():
            self.logger.log(ILogger.WARNING, "a warning")
            self.logger.log(ILogger.ERROR, "Serialization\n assertion failed")
            return None
        with self.trt.lock:
            self.trt.loading += 1
            self.trt.most_loading = max(self.trt.loading, self.trt.most_loading)
        time.sleep(0.02)
        session = session_of(path)
        with self.trt.lock:
            self.trt.loading -= 1
        return Engine(self.trt, session)


@cache
def session_of(path):
    """One session for each graph, whoever loads a plan of it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


DTYPES = {"tensor(float)": "FLOAT", "tensor(int64)": "INT64", "tensor(uint8)": "UINT8"}


class Engine:
    def __init__(self, trt, session):
        self.trt, self.session = trt, session
        self.inputs = {port.name: port for port in session.get_inputs()}
        self.outputs = {port.name: port for port in session.get_outputs()}

    def get_tensor_mode(self, name):
        modes = self.trt.TensorIOMode
        return modes.INPUT if name in self.inputs else modes.OUTPUT if name in self.outputs else modes.NONE

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=DTYPES[({**self.inputs, **self.outputs})[name].type])

    def get_device_memory_size_for_profile_v2(self, profile):
        return SCRATCH_BYTES * (profile + 1)

    def create_execution_context(self, strategy):
        assert strategy is self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.trt.calls.append(("create_execution_context", ()))
        return None if "create_execution_context" in self.trt.refuses else Context(self.trt, self)


class Context:
    """Answers as documented: shapes after a profile, working memory and addresses after shapes, and then it runs."""

    def __init__(self, trt, engine):
        self.trt, self.engine = trt, engine
        self.profile, self.shapes, self.addresses, self.scratch = None, {}, {}, None

    def allowed(self, name, *arguments):
        self.trt.calls.append((name, arguments))
        return name not in self.trt.refuses

    def set_optimization_profile_async(self, number, stream):
        self.profile = number
        return self.allowed("set_optimization_profile_async", number)

    def set_input_shape(self, name, shape):
        assert self.profile is not None
        assert isinstance(shape, tuple)
        self.shapes[name] = shape
        self.addresses.clear()
        self.scratch = None
        return self.allowed("set_input_shape", name, shape)

    def infer_shapes(self):
        return [] if self.allowed("infer_shapes") else ["latent"]

    def update_device_memory_size_for_shapes(self):
        assert set(self.shapes) == set(self.engine.inputs)
        return SCRATCH_BYTES

    def set_device_memory(self, address, size):
        assert address % 256 == 0
        assert size >= SCRATCH_BYTES
        self.scratch = address

    def get_tensor_shape(self, name):
        if "get_tensor_shape" in self.trt.refuses:
            return (-1, 3)
        # What the network gives at these shapes; a real engine has inferred it.
        zeros = {
            name: np.zeros(shape, np.int64 if "int64" in self.engine.inputs[name].type else np.float32)
            for name, shape in self.shapes.items()
        }
        key = tuple(sorted(self.shapes.items()))
        known = KNOWN.setdefault(id(self.engine.session), {})
        if key not in known:
            found = self.engine.session.run(None, zeros)
            known[key] = {port: value.shape for port, value in zip(self.engine.outputs, found, strict=True)}
        return known[key][name]

    def set_tensor_address(self, name, address):
        assert self.scratch is not None
        assert address % 256 == 0
        self.addresses[name] = address
        return self.allowed("set_tensor_address", name)

    def execute_async_v3(self, handle):
        assert set(self.addresses) == {*self.engine.inputs, *self.engine.outputs}
        inputs = {name: (self.addresses[name], shape) for name, shape in self.shapes.items()}
        outputs, scratch, engine = {n: self.addresses[n] for n in self.engine.outputs}, self.scratch, self.engine

        def work():
            ctypes.memset(scratch, 0xEE, SCRATCH_BYTES)
            feeds = {}
            for name, (address, shape) in inputs.items():
                dtype = np.dtype(np.int64 if "int64" in engine.inputs[name].type else np.float32)
                raw = ctypes.string_at(address, math.prod(shape) * dtype.itemsize)
                feeds[name] = np.frombuffer(raw, dtype).reshape(shape)
            for name, value in zip(outputs, engine.session.run(list(outputs), feeds), strict=True):
                ctypes.memmove(outputs[name], np.ascontiguousarray(value).ctypes.data, value.nbytes)

        stream = ctypes.cast(handle, ctypes.py_object).value
        if not self.allowed("execute_async_v3", stream.recording is not None):
            return False
        stream.put(work)
        return True


KNOWN: dict[int, dict] = {}


# --- a bundle with plans ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny bundle and, for every network, a plan that says where its graph is."""
    where = tmp_path_factory.mktemp("compiled") / "bundle"
    shutil.copytree(tiny_bundle_path(), where)
    (where / "engines").mkdir()
    return where


@pytest.fixture(scope="module")
def bundle(folder):
    opened = Bundle.open(folder)
    manifest = opened.manifest
    files, engines = dict(manifest.files), {}
    for key, network in manifest.networks.items():
        plan = folder / "engines" / f"{key}.plan"
        plan.write_text(str(folder / network.file))
        files[f"engines/{key}.plan"] = FileEntry(sha256="0" * 64, bytes=plan.stat().st_size)
        used = {s for port in network.inputs for s in symbol_names(port.shape)}
        limits = {symbol: (low, low, high) for symbol, (low, high) in network.shape_range.items() if symbol in used}
        profile = EngineProfile(name="all", sizes=limits)
        engine_key = EngineKey(
            schema_version=1,
            onnx_sha256=manifest.files[network.file].sha256,
            weights_sha256=tuple(manifest.files[name].sha256 for name in sorted(network.weights)),
            gpu_name=HOST_GPU.name,
            compute_capability=HOST_GPU.capability_text,
            tensorrt_version=VERSION,
            cuda_version="13.0",
            profiles=(profile,),
            options={},
        )
        engines[key] = EngineEntry(
            network=key,
            file=f"engines/{key}.plan",
            layers=f"engines/{key}.plan",
            key=engine_key,
            key_sha256="0" * 64,
            built_with={},
        )
    return replace(opened, manifest=manifest.model_copy(update={"files": files, "engines": engines}))


def symbol_names(shape):
    return {entry.rpartition("*")[2] for entry in shape if isinstance(entry, str)}


@pytest.fixture
def trt(monkeypatch):
    played = PlayedTensorRT()
    monkeypatch.setitem(sys.modules, "tensorrt", played)
    return played


@pytest.fixture
def opened():
    return host_device()


def plan_file(bundle, name):
    key = bundle.manifest.presets["high"][name]
    entry = bundle.manifest.engines[key]
    return PlanFile(name, bundle.manifest.networks[key], entry, bundle.file(entry.file))


def engine(bundle, name, device, captures=2):
    return load_plans([plan_file(bundle, name)], load_library(device), device, IdlePool(captures))[0]


@cache
def on_cpu_at(path, name):
    network = Bundle.open().network("high", name)
    ports = (tuple(tensor.spec() for tensor in side) for side in (network.inputs, network.outputs))
    return OnnxEngine(name, path, *ports, threads=1)


def on_cpu(bundle, name):
    return on_cpu_at(bundle.file(bundle.network("high", name).file), name)


def feeds_for(bundle, name, **sizes):
    rng = np.random.default_rng(11)
    network = bundle.network("high", name)
    return {
        port.name: (
            (rng.standard_normal(concrete_shape(port.shape, sizes)) * 0.3).astype(np.float32)
            if port.dtype == "float32"
            else rng.integers(0, 2, concrete_shape(port.shape, sizes))
        )
        for port in network.inputs
    }


DENOISER = {"Nv": 12, "Na": 7, "f": 2, "h": 2, "w": 3}
LEVELS = [
    {"sigma": np.array([now], np.float32), "sigma_next": np.array([after], np.float32)}
    for now, after in ((1, 0.9), (0.9, 0.6), (0.6, 0.3), (0.3, 0))
]


# --- runs ---


def test_a_run_at_two_sizes_in_one_context(bundle, trt, opened):
    device, _ = opened
    made, plain = engine(bundle, "upsampler", device), on_cpu(bundle, "upsampler")
    for frames in (2, 3, 2):
        feeds = feeds_for(bundle, "upsampler", f=frames, h=2, w=3)
        np.testing.assert_array_equal(made.run(feeds)["upsampled"], plain.run(feeds)["upsampled"])
    assert len(trt.named("create_execution_context")) == 1
    assert trt.named("set_optimization_profile_async") == [(0,)]
    assert trt.named("execute_async_v3") == [(False,)] * 3


def test_results_stay_and_are_fed_on(bundle, trt, opened):
    device, cuda = opened
    made, plain = engine(bundle, "video_decoder", device), on_cpu(bundle, "video_decoder")
    feeds = feeds_for(bundle, "video_decoder", n=2, h=2, w=3, p=0, q=0, c=2)
    first = made.run_resident(feeds)
    again = {**feeds, **{n.removeprefix("next_"): value for n, value in first.items() if n != "frames"}}
    del first
    second = made.run_resident(again)
    assert cuda.streams[1].handed == 0  # nothing was copied out
    del again
    wanted = plain.run(feeds)
    wanted = plain.run({**feeds, **{n.removeprefix("next_"): v for n, v in wanted.items() if n != "frames"}})
    np.testing.assert_array_equal(np.asarray(second["frames"]), wanted["frames"])


def test_a_loop_runs_from_one_graph_a_step_ahead(bundle, trt, opened):
    device, cuda = opened
    feeds = feeds_for(bundle, "denoiser", **DENOISER)
    carried = {"latent_next": "latent"}
    wanted = [
        step["latent_next"].copy() for step in iterate(on_cpu(bundle, "denoiser").capture(feeds), LEVELS, carried)
    ]
    steps = iterate(engine(bundle, "denoiser", device).capture(feeds), LEVELS, carried)
    found = []
    for done, step in enumerate(steps, start=1):
        (graph,) = cuda.graphs
        assert graph.launches == min(done + 1, len(LEVELS))
        found.append(step["latent_next"])
    assert cuda.streams[1].handed == 0
    assert trt.named("execute_async_v3") == [(False,), (True,)]  # once to warm up, once captured
    assert graph.work
    for value, expected in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(value), expected)


def test_a_graph_is_captured_once_a_shape_and_kept_in_a_bounded_number(bundle, trt, opened):
    device, cuda = opened
    made = engine(bundle, "denoiser", device, captures=2)
    shapes = [{**DENOISER, "Na": count} for count in (5, 6, 7)]

    def loop(sizes):
        *_, last = iterate(made.capture(feeds_for(bundle, "denoiser", **sizes)), LEVELS[:1], {})
        return np.asarray(last["latent_next"])

    first = loop(shapes[0])
    loop(shapes[1])
    np.testing.assert_array_equal(loop(shapes[0]), first)
    assert len(cuda.graphs) == 2
    loop(shapes[2])  # drops the shape that was used longest ago
    assert [graph.closed for graph in cuda.graphs] == [False, True, False]
    loop(shapes[1])
    assert len(cuda.graphs) == 4
    assert len(trt.named("create_execution_context")) == 4  # one for each captured graph
    made.close()
    assert all(graph.closed for graph in cuda.graphs)


def test_captures_are_not_shared_while_they_are_used(bundle, trt, opened):
    device, _ = opened
    made = engine(bundle, "denoiser", device)
    one, two = feeds_for(bundle, "denoiser", **DENOISER), feeds_for(bundle, "denoiser", **DENOISER)
    two["latent"] = two["latent"] + 1
    loops = [iterate(made.capture(feeds), LEVELS, {"latent_next": "latent"}) for feeds in (one, two)]
    found = [[np.asarray(step["latent_next"]) for step in pair] for pair in zip(*loops, strict=True)]
    plain = on_cpu(bundle, "denoiser")
    for index, feeds in enumerate((one, two)):
        wanted = [s["latent_next"].copy() for s in iterate(plain.capture(feeds), LEVELS, {"latent_next": "latent"})]
        for step, expected in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(step[index], expected)


def test_all_engines_share_one_block_of_working_memory(bundle, trt, opened):
    device, _ = opened
    for name, sizes in (("upsampler", {"f": 2, "h": 2, "w": 3}), ("denoiser", DENOISER)):
        engine(bundle, name, device).run(feeds_for(bundle, name, **sizes))
    assert device.scratch.size_bytes == SCRATCH_BYTES


def test_plans_are_loaded_at_the_same_time(bundle, trt, opened):
    device, _ = opened
    names = [name for name in NETWORK_NAMES if name != "denoiser"]
    loaded = load_plans([plan_file(bundle, name) for name in names], load_library(device), device, IdlePool(1))
    assert [one.name for one in loaded] == names
    assert trt.most_loading > 1


# --- refusals ---


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("create_execution_context", "the plan has no execution context: no reason given"),
        ("set_optimization_profile_async", "the plan refuses profile all: no reason given"),
        ("set_input_shape", r"the plan refuses latent of shape \(1, 32, 2, 2, 3\): no reason"),
        ("infer_shapes", "the plan cannot tell its shapes from latent: no reason"),
        ("get_tensor_shape", r"the plan cannot tell the shape of upsampled, only \(-1, 3\)"),
        ("set_tensor_address", "the plan refuses an address for latent: no reason"),
        ("execute_async_v3", "the plan does not run: no reason"),
    ],
)
@pytest.mark.parametrize("method", ["run", "capture"])
def test_what_tensorrt_refuses_is_one_line(bundle, trt, opened, call, message, method):
    device, _ = opened
    made = engine(bundle, "upsampler", device)
    trt.refuses.add(call)
    with pytest.raises(EngineError, match=f"upsampler: {message}") as caught:
        getattr(made, method)(feeds_for(bundle, "upsampler", f=2, h=2, w=3))
    assert "\n" not in str(caught.value)


def test_sizes_outside_of_every_profile_are_refused_before_the_device_is_asked(bundle, trt, opened):
    device, _ = opened
    key = bundle.manifest.presets["high"]["upsampler"]
    small = EngineProfile(name="short", sizes={"f": (1, 2, 2), "h": (1, 2, 4), "w": (1, 2, 4)})
    entry = bundle.manifest.engines[key]
    limited = entry.model_copy(update={"key": entry.key.model_copy(update={"profiles": (small,)})})
    file = replace(plan_file(bundle, "upsampler"), entry=limited)
    (made,) = load_plans([file], load_library(device), device, IdlePool(1))
    with pytest.raises(EngineError, match=r"upsampler: no profile of the engine serves f = 3 \(allowed: 1 to 2\)"):
        made.run(feeds_for(bundle, "upsampler", f=3, h=2, w=3))
    assert trt.calls == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"/nowhere", "upsampler: TensorRT cannot load x.plan: Serialization assertion failed"),
        (b"", "upsampler: x.plan cannot be read: cannot mmap an empty file"),
        (None, "upsampler: x.plan cannot be read: .*No such file"),
    ],
)
def test_a_plan_that_does_not_load(bundle, trt, opened, tmp_path, content, message):
    device, _ = opened
    path = tmp_path / "x.plan"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EngineError, match=message):
        load_plans([replace(plan_file(bundle, "upsampler"), path=path)], load_library(device), device, IdlePool(1))


def test_a_runtime_that_does_not_start(bundle, trt, opened):
    device, _ = opened
    trt.refuses.add("Runtime")
    with pytest.raises(EngineError, match="upsampler: TensorRT's runtime does not start: CUDA initialization failure"):
        engine(bundle, "upsampler", device)


def test_a_plan_of_another_network(bundle, trt, opened):
    device, _ = opened
    other = plan_file(bundle, "audio_encoder")
    with pytest.raises(EngineError, match="upsampler: the plan has no input latent, declared is latent float32"):
        load_plans(
            [replace(plan_file(bundle, "upsampler"), path=other.path)], load_library(device), device, IdlePool(1)
        )


def test_a_plan_of_another_type(bundle, trt, opened, monkeypatch):
    device, _ = opened
    monkeypatch.setitem(DTYPES, "tensor(float)", "HALF")
    with pytest.raises(EngineError, match="upsampler: input latent of the plan is HALF, declared is latent float32"):
        engine(bundle, "upsampler", device)


def test_a_version_that_is_not_supported(trt, opened):
    trt.__version__ = "10.3.0"
    with pytest.raises(EngineError, match=r"TensorRT 10\.3\.0 is installed; allowed: 11, or 10\.16"):
        load_library(opened[0])


# --- the store and the whole pipeline ---


@pytest.fixture
def stored(bundle, trt, monkeypatch):
    """``stored(memory_bytes)``: a store on the played TensorRT, and what stands behind the device."""

    def make(memory_bytes=HOST_GPU.memory_bytes) -> tuple[EngineStore, HostCuda]:
        device, cuda = host_device(memory_bytes=memory_bytes)
        device.layout = HostLayout(device)
        monkeypatch.setattr(gpu_store, "open_device", lambda: device)
        return EngineStore(bundle, machine=MACHINE), cuda

    return make


def test_the_store_takes_tensorrt_and_loads_a_preset_once(stored, bundle):
    store, _ = stored()
    assert store.backend.name == "tensorrt"
    first, again = store.engines("high"), store.engines("low")
    for name in NETWORK_NAMES:
        assert getattr(first, name) is getattr(again, name)
        assert getattr(first, name).name == name


def test_without_kernels_latents_go_through_the_host(bundle, trt, monkeypatch):
    device, _ = host_device()
    monkeypatch.setattr(gpu_store, "open_layout", lambda device, channels: (None, f"no compiler for {channels}"))
    inside = gpu_store.GpuStore(bundle, MACHINE, compiled=True, device=device)
    assert inside.no_layout == "no compiler for 32"
    tokens = np.random.default_rng(2).standard_normal((1, 12, 32)).astype(np.float32)
    shape, plain = LatentShape(2, 2, 3), on_cpu(bundle, "upsampler")
    made = engine(bundle, "upsampler", device)
    wanted = upsample(plain, tokens, shape)
    np.testing.assert_array_equal(np.asarray(upsample(made, device.place(tokens), shape)), wanted)
    device.layout = HostLayout(device)
    np.testing.assert_array_equal(np.asarray(upsample(made, device.place(tokens), shape)), wanted)
    assert device.layout.turned == 2


def test_a_preset_without_engines(bundle, trt, monkeypatch):
    manifest = bundle.manifest
    key = manifest.presets["high"]["denoiser"]
    networks = {**manifest.networks, "other": manifest.networks[key]}
    presets = {**manifest.presets, "low": {**manifest.presets["low"], "denoiser": "other"}}
    edited = replace(bundle, manifest=manifest.model_copy(update={"networks": networks, "presets": presets}))
    store = EngineStore(edited, machine=MACHINE)
    assert store.backend.name == "tensorrt"
    with pytest.raises(EngineError) as caught:
        store.engines("low")
    assert str(caught.value) == (
        "preset low: the bundle has engines for this GPU of medium, high, maximum alone: choose one of these, or run "
        "ltxrt-export build --preset low"
    )


def test_weights_that_do_not_fit_are_refused_before_they_are_loaded(stored, trt):
    store, _ = stored(memory_bytes=100)
    with pytest.raises(EngineError, match=r"preset high: the weights take 0\.0 GiB, Host has 0\.0 GiB free: choose a"):
        store.engines("high")
    assert trt.most_loading == 0


def test_a_clip_that_does_not_fit_is_refused_before_anything_is_loaded(stored, trt):
    store, cuda = stored(memory_bytes=2 * 1024**3)
    pipeline = replace(Pipeline.open(), store=store)
    request = Request(
        prompt="x", input_audio=bundled_speech(), resolution="1920x1088", match_audio_length=False, num_frames=121
    )
    with pytest.raises(
        CapacityError, match=r"1920x1088, 121 frames at high takes .* the largest that would fit is \d+x"
    ):
        pipeline.events(request)
    assert (trt.most_loading, cuda.used) == (0, 0)


def test_a_clip_outside_of_every_profile_is_refused_before_anything_is_loaded(bundle, trt, monkeypatch):
    manifest = bundle.manifest
    key = manifest.presets["high"]["video_decoder"]
    entry = manifest.engines[key]
    sizes = {**entry.key.profiles[0].sizes, "w": (1, 4, 6)}
    small = entry.key.model_copy(update={"profiles": (EngineProfile(name="small", sizes=sizes),)})
    engines = {**manifest.engines, key: entry.model_copy(update={"key": small})}
    limited = replace(bundle, manifest=manifest.model_copy(update={"engines": engines}))
    device, cuda = host_device()
    device.layout = HostLayout(device)
    monkeypatch.setattr(gpu_store, "open_device", lambda: device)
    store = EngineStore(limited, machine=MACHINE)
    store.check("high", ClipSize(PixelShape(73, 128, 192), Fraction(24)))
    with pytest.raises(EngineError, match=r"video_decoder: no profile of the engine serves w = 8 \(allowed: 1 to 6\)"):
        store.check("high", ClipSize(PixelShape(73, 128, 256), Fraction(24)))
    assert (trt.most_loading, cuda.used) == (0, 0)


def test_what_a_clip_left_behind_does_not_keep_the_next_one_out(stored, bundle, trt):
    size = ClipSize(PixelShape(73, 128, 128), Fraction(24))
    entries = {name: plan_file(bundle, name).entry for name in NETWORK_NAMES}
    needed = clip_memory(bundle, "high", size, entries).needed_bytes - process_bytes()  # before: an estimate
    store, cuda = stored(memory_bytes=needed)
    store.check("high", size)
    made = store.engines("high").denoiser
    *_, _last = iterate(made.capture(feeds_for(bundle, "denoiser", **DENOISER)), LEVELS, {})
    assert cuda.used > 0
    store.check("high", size)
    assert store._gpu.residency == "resident"
    with pytest.raises(EngineError, match=r"640x640, 73 frames at high takes"):
        store.check("high", ClipSize(PixelShape(73, 640, 640), Fraction(24)))


def test_captures_that_wait_for_another_clip_make_room_for_this_one(stored, bundle, trt, monkeypatch):
    monkeypatch.setattr(stream, "_cuda_errors", lambda: (CudaError,))
    small, large = (feeds_for(bundle, "denoiser", **{**DENOISER, "Nv": 12 * f, "f": 2 * f}) for f in (1, 2))

    def latents(store, feeds):
        steps = iterate(store.engines("high").denoiser.capture(feeds), LEVELS, {"latent_next": "latent"})
        return [np.asarray(step["latent_next"]) for step in steps]

    store, cuda = stored()
    wanted = latents(store, large)
    store, narrow = stored(memory_bytes=cuda.peak)
    latents(store, small)
    for one, other in zip(latents(store, large), wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    assert [graph.closed for graph in narrow.graphs] == [True, False]


def test_the_text_encoder_goes_where_it_cannot_stay(stored, bundle, trt, monkeypatch):
    store, _ = stored()
    engines = store.engines("high")
    prompt = {"input_ids": np.array([[1, 5, 7]])}
    wanted = on_cpu(bundle, "text_encoder").run(prompt)
    inside = store._gpu
    loads = trt.most_loading
    assert engines.text_encoder.loaded
    engines.text_encoder.run(prompt)
    assert engines.text_encoder.loaded
    monkeypatch.setattr(gpu_store, "residency_for", lambda *_: "release_text")
    inside.check("high", ClipSize(PixelShape(73, 128, 128), Fraction(24)))
    assert not engines.text_encoder.loaded
    for _ in range(2):
        found = engines.text_encoder.run(prompt)
        assert not engines.text_encoder.loaded
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value)
    monkeypatch.setattr(gpu_store, "residency_for", lambda *_: "resident")
    inside.check("high", ClipSize(PixelShape(73, 128, 128), Fraction(24)))
    engines.text_encoder.run(prompt)
    assert engines.text_encoder.loaded
    assert loads > 0
    with pytest.raises(EngineError, match="cannot be captured"):
        engines.text_encoder.capture(prompt)


def test_the_whole_pipeline_gives_the_cpu_s_bytes(stored, bundle):
    store, cuda = stored()
    request = Request(
        prompt="a face",
        input_audio=bundled_speech(),
        resolution="128x128",
        match_audio_length=False,
        num_frames=65,
        video_quality="low",
        seed=3,
    )
    plain = replace(Pipeline.open(), store=EngineStore(bundle, threads=1, backend="onnxruntime-cpu"))
    found = b"".join(replace(plain, store=store).generate(request))
    assert found == b"".join(plain.generate(request))
    assert store._gpu.device.layout.turned == 3  # into and out of the upsampler, into the decoder
    assert len(cuda.graphs) == 2  # one for each stage
    assert [graph.launches for graph in cuda.graphs] == [5, 2]


# --- a GPU ---


@pytest.mark.gpu
def test_graph_replay_equals_a_plain_run_bit_for_bit_on_a_gpu():
    """On the bundle that ``LTXRT_BUNDLE`` names, whose engines were built on this machine."""
    if "LTXRT_BUNDLE" not in os.environ:
        pytest.skip("LTXRT_BUNDLE names no bundle with engines")
    real = Bundle.open(os.environ["LTXRT_BUNDLE"])
    store = EngineStore(real, backend="tensorrt")
    preset = tuple(real.manifest.presets)[-1]
    made = store.engines(preset).denoiser
    sizes = {"Nv": 2 * 4 * 6, "Na": 26, "f": 2, "h": 4, "w": 6}
    rng = np.random.default_rng(1)
    feeds = {
        spec.name: rng.standard_normal(concrete_shape(spec.shape, sizes)).astype(spec.dtype)
        if spec.dtype != "int64"
        else np.ones(concrete_shape(spec.shape, sizes), np.int64)
        for spec in made.inputs
    }
    wanted = made.run(feeds)["latent_next"]
    capture = made.capture(feeds)
    for _ in range(3):
        capture.replay()
        np.testing.assert_array_equal(np.asarray(capture.outputs["latent_next"]), wanted)
