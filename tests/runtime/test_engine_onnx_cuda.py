# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on a device: the same calls on the CPU provider and host memory, against the CPU engine; then a GPU."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import onnxruntime as ort
import pytest

from ltxrt import engine_onnx_cuda
from ltxrt.backends import CUDA_PROVIDER
from ltxrt.bundle import Bundle
from ltxrt.decode import VideoDecoder
from ltxrt.engine import TensorSpec, concrete_shape, iterate, run_resident
from ltxrt.engine_device import DeviceEngine
from ltxrt.engine_onnx import OnnxEngine
from ltxrt.engine_onnx_cuda import CUDA_OPTIONS, OnnxCudaNetwork, OnnxPlacement, cuda_engine
from ltxrt.errors import EngineError
from ltxrt.graph import IdlePool
from ltxrt.manifest import NETWORK_NAMES
from ltxrt.memory import DeviceTensor
from ltxrt.stream import Device, open_device
from ltxrt.testing_device import host_device

HOST = OnnxPlacement(provider="CPUExecutionProvider", memory="cpu")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open()


@pytest.fixture(scope="module")
def device() -> Device:
    """ONNX Runtime's CPU provider does everything at once, so the device does too."""
    return host_device(eager=True)[0]


def made(bundle: Bundle, name: str, device: Device, placement: OnnxPlacement = HOST) -> DeviceEngine:
    entry = bundle.network("high", name)
    ports = tuple(tensor.spec() for tensor in entry.inputs), tuple(tensor.spec() for tensor in entry.outputs)
    network = OnnxCudaNetwork(name, bundle.file(entry.file), ports, device, placement)
    return DeviceEngine((name, *ports), network, device, IdlePool(2))


def plain(bundle: Bundle, name: str) -> OnnxEngine:
    entry = bundle.network("high", name)
    ports = tuple(tensor.spec() for tensor in entry.inputs), tuple(tensor.spec() for tensor in entry.outputs)
    return OnnxEngine(name, bundle.file(entry.file), *ports, threads=1)


def drawn(bundle: Bundle, name: str, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Inputs of a network at given sizes; integers are 0 or 1."""
    rng = np.random.default_rng(3)
    feeds = {}
    for spec in bundle.network("high", name).inputs:
        shape = concrete_shape(spec.shape, sizes)
        values = rng.standard_normal(shape) * 0.3 if spec.dtype == "float32" else rng.integers(0, 2, shape)
        feeds[spec.name] = values.astype(spec.dtype)
    return feeds


SIZES = {
    "text_encoder": {"n": 5},
    "audio_encoder": {"samples": 16000},
    "image_encoder": {"h": 2, "w": 3},
    "denoiser": {"Nv": 12, "Na": 7, "f": 2, "h": 2, "w": 3},
    "upsampler": {"f": 2, "h": 2, "w": 3},
    "video_decoder": {"n": 2, "h": 2, "w": 3, "p": 0, "q": 1, "c": 2},
}


@pytest.mark.parametrize("name", NETWORK_NAMES)
def test_every_network_of_the_tiny_bundle_gives_the_same_bits(bundle, device, name):
    feeds = drawn(bundle, name, SIZES[name])
    engine, expected = made(bundle, name, device), plain(bundle, name).run(feeds)
    found, resident = engine.run(feeds), engine.run_resident(feeds)
    assert list(found) == list(expected) == list(resident)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        np.testing.assert_array_equal(found[key], value)
        assert isinstance(resident[key], DeviceTensor)
        np.testing.assert_array_equal(np.asarray(resident[key]), value)


def test_results_that_stay_are_fed_on_without_the_host(bundle, device, monkeypatch):
    engine = made(bundle, "video_decoder", device)
    feeds = drawn(bundle, "video_decoder", SIZES["video_decoder"])
    first = run_resident(engine, feeds)
    states = {name.removeprefix("next_"): value for name, value in first.items() if name != "frames"}
    expected = plain(bundle, "video_decoder")
    wanted = expected.run(
        {**feeds, **{n.removeprefix("next_"): v for n, v in expected.run(feeds).items() if "next" in n}}
    )
    copied = []
    monkeypatch.setattr(device.copies, "download", lambda *arguments: copied.append(arguments))
    second = run_resident(engine, {**feeds, **states})
    assert copied == []
    monkeypatch.undo()
    np.testing.assert_array_equal(np.asarray(second["frames"]), wanted["frames"])


def test_a_loop_stays_on_the_device_and_is_one_step_ahead(bundle, device, monkeypatch):
    feeds = drawn(bundle, "denoiser", SIZES["denoiser"])
    levels = [{"sigma": np.float32([a]), "sigma_next": np.float32([b])} for a, b in ((1, 0.9), (0.9, 0.4), (0.4, 0))]
    expected = [
        dict(step)["latent_next"].copy()
        for step in iterate(plain(bundle, "denoiser").capture(feeds), levels, {"latent_next": "latent"})
    ]
    engine = made(bundle, "denoiser", device)
    launched, downloads = [], []
    launch = engine_onnx_cuda._BoundSession.launch

    def counted(self):
        launched.append(self)
        launch(self)

    monkeypatch.setattr(engine_onnx_cuda._BoundSession, "launch", counted)
    capture = engine.capture(feeds)
    monkeypatch.setattr(device.copies, "download", lambda *arguments: downloads.append(arguments))
    steps = iterate(capture, levels, {"latent_next": "latent"})
    kept = []
    for done, step in enumerate(steps, start=1):
        assert len(launched) == min(done + 1, len(levels))
        kept.append(step["latent_next"])
    assert downloads == []
    monkeypatch.undo()
    for found, wanted in zip(kept, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(found), wanted)


def test_decoding_in_chunks_is_the_same_a_chunk_ahead(bundle, device):
    rng = np.random.default_rng(5)
    latent = rng.standard_normal((1, bundle.manifest.model.latent_channels, 11, 2, 2)).astype(np.float32)
    stream = bundle.manifest.model.stream

    def chunks(engine) -> Iterator[np.ndarray]:
        return (chunk.frames for chunk in VideoDecoder(engine, stream, 2).chunks(latent, 75, Fraction(24)))

    found, wanted = list(chunks(made(bundle, "video_decoder", device))), list(chunks(plain(bundle, "video_decoder")))
    assert [len(part) for part in found] == [len(part) for part in wanted]
    np.testing.assert_array_equal(np.concatenate(found), np.concatenate(wanted))


# --- captures ---


def test_a_capture_is_one_user_s_until_it_is_given_back(bundle, device):
    engine, feeds = made(bundle, "upsampler", device), drawn(bundle, "upsampler", SIZES["upsampler"])
    one, two = engine.capture(feeds), engine.capture(feeds)
    assert one.inputs["latent"].address != two.inputs["latent"].address
    address = one.inputs["latent"].address
    one.close()
    one.close()
    again = engine.capture({"latent": feeds["latent"] + 1})
    assert again.inputs["latent"].address == address
    again.replay()
    np.testing.assert_array_equal(
        np.asarray(again.outputs["upsampled"]),
        plain(bundle, "upsampler").run({"latent": feeds["latent"] + 1})["upsampled"],
    )
    with pytest.raises(EngineError, match="upsampler: this capture has been given back"):
        one.replay()


def test_a_loop_that_is_left_gives_its_capture_back(bundle, device):
    engine, feeds = made(bundle, "upsampler", device), drawn(bundle, "upsampler", SIZES["upsampler"])
    capture = engine.capture(feeds)
    address = capture.inputs["latent"].address
    steps = iterate(capture, [{}, {}, {}], {})
    next(steps)
    steps.close()
    assert engine.capture(feeds).inputs["latent"].address == address


def test_what_is_written_is_checked_first(bundle, device):
    engine, feeds = made(bundle, "upsampler", device), drawn(bundle, "upsampler", SIZES["upsampler"])
    capture = engine.capture(feeds)
    with pytest.raises(EngineError, match=r"upsampler: latent is float64\[1\], expected float32\[1, 32, 2, 2, 3\]"):
        capture.write("latent", np.zeros(1))
    with pytest.raises(EngineError, match="upsampler: the feed does not take other"):
        capture.write("other", np.zeros(1))


@pytest.mark.parametrize("method", ["run", "run_resident", "capture"])
def test_feeds_are_checked_before_the_device_is_touched(bundle, method, monkeypatch):
    device, cuda = host_device(eager=True)
    engine = made(bundle, "upsampler", device)
    monkeypatch.setattr(device, "make_current", lambda: pytest.fail("the device was touched"))
    with pytest.raises(EngineError, match="upsampler: latent is float64, expected float32"):
        getattr(engine, method)({"latent": np.zeros((1, 32, 2, 2, 3))})
    assert cuda.used == 0


def test_what_fails_while_running_is_one_line(tmp_path, device):
    onnx = pytest.importorskip("onnx")
    text = "toy (float[a,b] x, float[c,d] y) => (float[a,d] z) { z = MatMul (x, y) }"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]> {text}')
    onnx.save(model, tmp_path / "toy.onnx")
    ports = (
        (TensorSpec("x", "float32", ("a", "b")), TensorSpec("y", "float32", ("c", "d"))),
        (TensorSpec("z", "float32", ("a", "d")),),
    )
    engine = DeviceEngine(
        ("toy", *ports), OnnxCudaNetwork("toy", tmp_path / "toy.onnx", ports, device, HOST), device, IdlePool(1)
    )
    with pytest.raises(EngineError, match=r"^toy: .*MatMul") as caught:
        engine.run({"x": np.zeros((2, 3), np.float32), "y": np.zeros((4, 2), np.float32)})
    assert "\n" not in str(caught.value)


# --- the provider ---


def test_the_cpu_distribution_says_what_is_missing(bundle, device):
    if CUDA_PROVIDER in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA provider")
    with pytest.raises(EngineError) as caught:
        made(bundle, "upsampler", device, OnnxPlacement())
    assert str(caught.value).startswith(
        "upsampler: this ONNX Runtime has no CUDA provider: uninstall onnxruntime, then"
    )
    assert "\n" not in str(caught.value)


class Session:
    """A session of the CUDA provider that says which options it was made with."""

    made: ClassVar[list[tuple[str, dict[str, str]]]] = []
    refuses = ""

    def __init__(self, path, options, providers):
        ((name, given),) = providers
        type(self).made.append((name, given))
        if self.refuses and given["enable_cuda_graph"] == "1":
            raise RuntimeError(self.refuses)

    def get_providers(self):
        return [CUDA_PROVIDER, "CPUExecutionProvider"]

    def get_inputs(self):
        return []

    get_outputs = get_inputs


@pytest.fixture
def session(monkeypatch):
    monkeypatch.setattr(Session, "made", [])
    monkeypatch.setattr(Session, "refuses", "")
    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA_PROVIDER])
    return Session


def test_options_of_the_provider(session, device, tmp_path):
    network = OnnxCudaNetwork("toy", tmp_path / "toy.onnx", ((), ()), device, OnnxPlacement(index=1))
    assert network.capturable
    ((name, options),) = session.made
    assert name == CUDA_PROVIDER
    # What others hand to the compute stream meanwhile must not become part of a capture.
    assert device.sessions.handle != device.compute.handle
    own = {"device_id": "1", "user_compute_stream": str(device.sessions.handle), "enable_cuda_graph": "1"}
    assert options == {**CUDA_OPTIONS, **own}
    assert all(isinstance(value, str) for value in options.values())


def test_a_network_that_cannot_be_captured_runs_without(session, device, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Session, "refuses", "This session cannot use the graph capture feature as requested by the user"
    )
    network = OnnxCudaNetwork("toy", tmp_path / "toy.onnx", ((), ()), device, OnnxPlacement())
    assert not network.capturable
    assert [options["enable_cuda_graph"] for _, options in session.made] == ["1", "0"]


def test_a_graph_that_does_not_load(session, device, tmp_path, monkeypatch):
    monkeypatch.setattr(Session, "refuses", "no kernel\nmore")
    with pytest.raises(EngineError) as caught:
        OnnxCudaNetwork("toy", tmp_path / "toy.onnx", ((), ()), device, OnnxPlacement())
    assert str(caught.value) == "toy: ONNX Runtime cannot load toy.onnx: no kernel"


def test_a_provider_that_falls_back_is_refused(session, device, tmp_path, monkeypatch):
    monkeypatch.setattr(Session, "get_providers", lambda self: ["CPUExecutionProvider"])
    with pytest.raises(EngineError, match="toy: ONNX Runtime's CUDA provider does not load"):
        OnnxCudaNetwork("toy", tmp_path / "toy.onnx", ((), ()), device, OnnxPlacement())


def test_a_run_is_in_the_order_of_the_compute_stream_and_alone(session, device, tmp_path, monkeypatch):
    one, two = (OnnxCudaNetwork("toy", tmp_path / "toy.onnx", ((), ()), device, OnnxPlacement()) for _ in range(2))
    done, running, go_on = [], threading.Event(), threading.Event()

    def run(binding, options):
        done.append(binding)
        running.set()
        assert go_on.wait(5)

    one._session = two._session = SimpleNamespace(run_with_iobinding=run)
    monkeypatch.setattr(device.sessions, "wait", lambda event: done.append((event.stream is device.compute.raw, "on")))
    monkeypatch.setattr(device.compute, "wait", lambda event: done.append((event.stream is device.sessions.raw, "off")))
    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(one.run, "one", "1")]
        assert running.wait(5)
        runs.append(threads.submit(two.run, "two", "1"))  # one that captures would capture this as well
        assert not runs[1].done()
        assert done == [(True, "on"), "one"]
        go_on.set()
        [made.result() for made in runs]
    assert done == [(True, "on"), "one", (True, "off"), (True, "on"), "two", (True, "off")]


class Captured:
    """A session that notes under which number it is run."""

    def __init__(self, session):
        self.session, self.graphs = session, []

    def io_binding(self):
        return self.session.io_binding()

    def run_with_iobinding(self, binding, options):
        self.graphs.append(options.get_run_config_entry("gpu_graph_id"))
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        self.session.run_with_iobinding(binding)


def test_runs_are_captured_once_a_shape_up_to_the_limit(bundle, device):
    engine = made(bundle, "upsampler", device)
    network = engine._network
    network._placement = OnnxPlacement(memory="cpu", graphs=2)
    network._session, network.capturable = Captured(network._session), True
    feeds = [drawn(bundle, "upsampler", {"f": frames, "h": 2, "w": 3}) for frames in (1, 2, 3)]
    for index, feed in enumerate(feeds):
        engine.capture(feed).replay()
        # A run that tells the shapes, a run that captures, a replay; beyond the limit no capture.
        number = str(index + 1) if index < 2 else "-1"
        assert network._session.graphs == (["-1", number, number] if index < 2 else ["-1", "-1"])
        network._session.graphs.clear()
    engine.run(feeds[0])
    assert network._session.graphs == ["-1"]


# --- a GPU ---


@pytest.fixture(scope="module")
def real() -> Iterator[Device]:
    opened = open_device()
    yield opened
    opened.close()


@pytest.fixture
def on_gpu(request, bundle):
    """``on_gpu(name)``: the engine on the GPU; looked for when it is called, not before the marker has had its say."""

    def make(name):
        if CUDA_PROVIDER not in ort.get_available_providers():
            pytest.skip("this ONNX Runtime has no CUDA provider")
        device = request.getfixturevalue("real")
        entry = bundle.network("high", name)
        ports = tuple(tensor.spec() for tensor in entry.inputs), tuple(tensor.spec() for tensor in entry.outputs)
        return cuda_engine(name, bundle.file(entry.file), ports, device, IdlePool(2))

    return make


@pytest.mark.gpu
@pytest.mark.parametrize("name", NETWORK_NAMES)
def test_cuda_agrees_with_the_cpu(bundle, on_gpu, name):
    feeds = drawn(bundle, name, SIZES[name])
    found, expected = on_gpu(name).run(feeds), plain(bundle, name).run(feeds)
    for key, value in expected.items():
        if value.dtype == np.uint8:
            assert np.abs(found[key].astype(int) - value).max() <= 1
        else:
            np.testing.assert_allclose(found[key], value, rtol=2e-3, atol=2e-3 * max(1.0, float(np.abs(value).max())))


@pytest.mark.gpu
def test_replays_on_cuda_equal_plain_runs_bit_for_bit(bundle, on_gpu):
    engine, feeds = on_gpu("denoiser"), drawn(bundle, "denoiser", SIZES["denoiser"])
    expected = engine.run(feeds)["latent_next"]
    capture = engine.capture(feeds)
    for _ in range(3):
        capture.replay()
        np.testing.assert_array_equal(np.asarray(capture.outputs["latent_next"]), expected)


@pytest.mark.gpu
def test_the_loop_on_cuda_agrees_with_the_cpu(bundle, on_gpu):
    feeds = drawn(bundle, "denoiser", SIZES["denoiser"])
    levels = [{"sigma": np.float32([a]), "sigma_next": np.float32([b])} for a, b in ((1, 0.9), (0.9, 0.4), (0.4, 0))]
    carried = {"latent_next": "latent"}
    *_, found = (step["latent_next"] for step in iterate(on_gpu("denoiser").capture(feeds), levels, carried))
    *_, wanted = (step["latent_next"] for step in iterate(plain(bundle, "denoiser").capture(feeds), levels, carried))
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=5e-3, atol=5e-3)
