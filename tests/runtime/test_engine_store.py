# SPDX-License-Identifier: Apache-2.0
"""Each network is loaded once, on first use, whoever asks; what cannot be loaded is named."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from fractions import Fraction

import pytest

from ltxrt import engine_store, gpu_store
from ltxrt.backends import Machine, this_machine
from ltxrt.bundle import Bundle
from ltxrt.clip_memory import ClipSize
from ltxrt.engine_store import Engines, EngineStore, backends, check_fits
from ltxrt.errors import EngineError, RequestError
from ltxrt.manifest import NETWORK_NAMES
from ltxrt.shapes import PixelShape
from ltxrt.testing import fake_engines
from ltxrt.testing_device import HOST_GPU
from ltxrt.timing import Timings

NO_GPU = Machine(no_gpu="no NVIDIA driver")
GPU_MACHINE = Machine(gpu=HOST_GPU, no_tensorrt="TensorRT is not installed")


@pytest.fixture
def store(toy_bundle):
    return EngineStore(Bundle.open(toy_bundle), threads=1)


def test_all_six_networks_come_under_their_names(store):
    engines = store.engines("high")
    assert tuple(field.name for field in fields(Engines)) == NETWORK_NAMES
    for name in NETWORK_NAMES:
        engine = getattr(engines, name)
        assert engine.name == name
        assert engine.outputs


def test_presets_share_what_is_equal(store):
    first, again, low = store.engines("high"), store.engines("high"), store.engines("low")
    for name in NETWORK_NAMES:
        assert getattr(first, name) is getattr(again, name) is getattr(low, name)


def test_threads_load_each_network_once(toy_bundle, monkeypatch):
    loaded = []
    real = engine_store.OnnxEngine

    def counted(name, *arguments, **options):
        loaded.append(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(engine_store, "OnnxEngine", counted)
    store = EngineStore(Bundle.open(toy_bundle), threads=1)
    assert loaded == []
    with ThreadPoolExecutor(8) as pool:
        everyone = list(pool.map(store.engines, ["high", "low"] * 8))
    assert sorted(loaded) == sorted(NETWORK_NAMES)
    assert all(engines.denoiser is everyone[0].denoiser for engines in everyone)


def test_a_preset_that_is_not_there(store):
    with pytest.raises(RequestError, match="low, high in this bundle"):
        store.engines("maximum")


def test_a_network_that_does_not_load_stays_loadable(toy_bundle):
    opened = Bundle.open(toy_bundle)
    path = toy_bundle / "networks" / "upsampler.onnx"
    whole = path.read_bytes()
    path.write_bytes(b"changed after opening")
    store = EngineStore(opened)
    with pytest.raises(EngineError, match=r"^upsampler: ONNX Runtime cannot load upsampler\.onnx"):
        store.engines("high")
    path.write_bytes(whole)
    assert store.engines("high").upsampler.name == "upsampler"


def test_a_network_of_another_backend(toy_bundle):
    manifest = toy_bundle / "manifest.json"
    (toy_bundle / "networks" / "denoiser.onnx").rename(toy_bundle / "networks" / "denoiser.plan")
    data = json.loads(manifest.read_text("utf-8"))
    data["files"]["networks/denoiser.plan"] = data["files"].pop("networks/denoiser.onnx")
    data["networks"]["denoiser-key"]["file"] = "networks/denoiser.plan"
    manifest.write_text(json.dumps(data), "utf-8")
    with pytest.raises(EngineError, match=r"^denoiser: networks/denoiser\.plan is not an ONNX graph"):
        EngineStore(Bundle.open(toy_bundle)).engines("high")


def test_timed_engines_count_in_one_clips_timings():
    timings, engines = Timings(), fake_engines()
    timed = engines.timed(timings)
    assert {name: getattr(timed, name).name for name in NETWORK_NAMES} == {name: name for name in NETWORK_NAMES}
    assert timed.denoiser.inputs == engines.denoiser.inputs
    assert timed.denoiser.outputs == engines.denoiser.outputs


def test_backends_say_why_they_are_off(store):
    found = {backend.name: backend for backend in backends()}
    assert found["onnxruntime-cpu"].available
    assert all(backend.reason and "\n" not in backend.reason for backend in found.values())
    if this_machine().gpu is None:
        assert [name for name, backend in found.items() if backend.available] == ["onnxruntime-cpu"]
        assert store.backend == found["onnxruntime-cpu"]


# --- precisions ---


def edited(folder, **precisions):
    """The toy bundle with other precisions by network key, its graphs as they are."""
    manifest = folder / "manifest.json"
    data = json.loads(manifest.read_text("utf-8"))
    for key, precision in precisions.items():
        data["networks"][key]["precision"] = precision
    manifest.write_text(json.dumps(data), "utf-8")
    return Bundle.open(folder)


def test_a_bf16_network_on_a_cpu(toy_bundle):
    opened = edited(toy_bundle, **{"denoiser-key": "bf16"})
    with pytest.raises(EngineError) as caught:
        EngineStore(opened, machine=NO_GPU).engines("high")
    assert str(caught.value) == (
        "denoiser: preset high is of precision bf16, for which ONNX Runtime has no CPU kernels: run it on an NVIDIA "
        "GPU, or export the bundle with --backend cpu"
    )


def test_the_presets_that_a_cpu_can_run_are_named(toy_bundle):
    opened = edited(toy_bundle, **{"denoiser-key": "bf16"})
    networks = dict(opened.manifest.networks)
    networks["fp32-denoiser"] = networks["denoiser-key"].model_copy(update={"precision": "fp32"})
    presets = {**opened.manifest.presets, "low": {**opened.manifest.presets["low"], "denoiser": "fp32-denoiser"}}
    manifest = opened.manifest.model_copy(update={"networks": networks, "presets": presets})
    store = EngineStore(replace(opened, manifest=manifest), machine=NO_GPU)
    with pytest.raises(EngineError, match="no CPU kernels: choose video_quality low, or run it on an NVIDIA GPU"):
        store.engines("high")
    assert store.engines("low").denoiser.name == "denoiser"


def test_what_a_cpu_has_no_kernel_for_is_said_the_same_way(toy_bundle, monkeypatch):
    def refuses(name, *arguments, **options):
        raise EngineError(f"{name}: ONNX Runtime cannot load x.onnx: Could not find an implementation for MatMul(13)")

    monkeypatch.setattr(engine_store, "OnnxEngine", refuses)
    with pytest.raises(
        EngineError, match="preset high is of precision fp32, for which ONNX Runtime has no CPU kernels"
    ):
        EngineStore(Bundle.open(toy_bundle), machine=NO_GPU).engines("high")


# --- a backend by name ---


def test_a_backend_by_name(toy_bundle):
    opened = Bundle.open(toy_bundle)
    assert EngineStore(opened, backend="onnxruntime-cpu", machine=GPU_MACHINE).backend.name == "onnxruntime-cpu"
    with pytest.raises(EngineError, match="tensorrt is off: no NVIDIA driver"):
        EngineStore(opened, backend="tensorrt", machine=NO_GPU)
    with pytest.raises(EngineError, match="backend: 'cuda' is not allowed; allowed: auto, tensorrt, onnxruntime-cuda"):
        EngineStore(opened, backend="cuda", machine=NO_GPU)


def test_nothing_is_asked_of_the_gpu_where_the_cpu_runs(toy_bundle, monkeypatch):
    monkeypatch.setattr(gpu_store, "GpuStore", lambda *_, **__: pytest.fail("the GPU was opened"))
    store = EngineStore(Bundle.open(toy_bundle), machine=NO_GPU)
    check_fits(store, "high", ClipSize(PixelShape(481, 2048, 2048), Fraction(24)))
    check_fits(object(), "high", ClipSize(PixelShape(481, 2048, 2048), Fraction(24)))
    store.engines("high")


def test_the_gpu_s_engines_are_asked_for_once_a_call(toy_bundle, monkeypatch):
    asked = []

    class Gpu:
        def __init__(self, bundle, machine, *, compiled):
            asked.append(compiled)

        def engines(self, preset):
            asked.append(preset)
            return {name: getattr(fake_engines(), name) for name in NETWORK_NAMES}

    monkeypatch.setattr(gpu_store, "GpuStore", Gpu)
    store = EngineStore(Bundle.open(toy_bundle), machine=GPU_MACHINE)
    assert store.backend.name == "onnxruntime-cuda"
    assert store.engines("high").denoiser.name == "denoiser"
    store.engines("low")
    assert asked == [False, "high", "low"]
