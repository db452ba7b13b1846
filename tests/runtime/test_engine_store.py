# SPDX-License-Identifier: Apache-2.0
"""Each network is loaded once, on first use, whoever asks; what cannot be loaded is named."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import pytest

from ltxrt import engine_store
from ltxrt.bundle import Bundle
from ltxrt.engine_store import Engines, EngineStore, backends
from ltxrt.errors import EngineError, RequestError
from ltxrt.manifest import NETWORK_NAMES
from ltxrt.testing import fake_engines
from ltxrt.timing import Timings


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
    assert [name for name, backend in found.items() if backend.available] == ["onnxruntime-cpu"]
    assert store.backend == found["onnxruntime-cpu"]


@pytest.mark.parametrize("installed", [True, False])
def test_a_backend_whose_package_is_missing_says_so(monkeypatch, installed):
    monkeypatch.setattr(engine_store.util, "find_spec", lambda name: object() if installed else None)
    (tensorrt,) = [backend for backend in backends() if backend.name == "tensorrt"]
    assert ("the Python package tensorrt is not installed" in tensorrt.reason) is not installed
