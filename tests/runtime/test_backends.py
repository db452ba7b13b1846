# SPDX-License-Identifier: Apache-2.0
"""Which backend runs a bundle, and the one line of each that does not, on machines that are described, not there."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest

from ltxrt import backends as module
from ltxrt import gpu, tensorrt_library
from ltxrt.backends import Machine, backends, this_machine
from ltxrt.bundle import Bundle
from ltxrt.cli_report import engine_line
from ltxrt.errors import CapacityError, EngineError
from ltxrt.gpu import GpuSearch, find_gpus
from ltxrt.manifest import EngineEntry, EngineKey, EngineProfile
from ltxrt.tensorrt_plans import check_tensorrt_version, profile_for
from ltxrt.testing_device import HOST_GPU

H200 = replace(HOST_GPU, name="NVIDIA H200", memory_bytes=139 * 1024**3)
MACHINE = Machine(gpu=H200, tensorrt="11.4.0.106")
DRIVER_SOURCE = Path(__file__).parents[1] / "export" / "engines" / "libcuda.c"


@pytest.fixture(scope="module")
def bundle():
    return Bundle.open()


def compiled(bundle, presets=("high",), gpu=H200, **changes):
    """The bundle with an engine for every network of some presets."""
    manifest = bundle.manifest
    engines = {}
    for preset in presets:
        for key in manifest.presets[preset].values():
            network = manifest.networks[key]
            values = {
                "schema_version": 1,
                "onnx_sha256": manifest.files[network.file].sha256,
                "weights_sha256": tuple(manifest.files[name].sha256 for name in sorted(network.weights)),
                "gpu_name": gpu.name,
                "compute_capability": gpu.capability_text,
                "tensorrt_version": "11.4.0.106",
                "cuda_version": "13.0",
                "profiles": (EngineProfile(name="short", sizes={"n": (1, 8, 64)}),),
                "options": {},
            }
            entry = EngineEntry(
                network=key,
                file=f"engines/{key}.plan",
                layers=f"engines/{key}.layers.json",
                key=EngineKey(**{**values, **changes}),
                key_sha256="0" * 64,
                built_with={},
            )
            engines[key] = entry
    return replace(bundle, manifest=manifest.model_copy(update={"engines": engines}))


def found(bundle=None, machine=MACHINE):
    return {backend.name: backend for backend in backends(bundle, machine)}


def test_fastest_first():
    assert list(found()) == ["tensorrt", "onnxruntime-cuda", "onnxruntime-cpu"]
    assert all(backend.available for backend in found().values())


def test_engines_that_fit_are_used(bundle):
    backend = found(compiled(bundle))["tensorrt"]
    # Every preset of the tiny bundle has the same networks.
    assert backend.available
    assert backend.reason == "TensorRT 11.4.0.106 on NVIDIA H200, presets low, medium, high, maximum"


def test_a_bundle_without_engines(bundle):
    backend = found(bundle)["tensorrt"]
    assert not backend.available
    assert backend.reason.startswith("the bundle has no engine of text_encoder-fp32-")
    assert backend.reason.endswith(": run ltxrt-export build")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (
            {"gpu_name": "NVIDIA L40S", "compute_capability": "8.9"},
            "is for NVIDIA L40S (compute capability 8.9), this is NVIDIA H200 (9.0): run ltxrt-export build on this",
        ),
        ({"gpu_name": "NVIDIA H100 80GB HBM3"}, "is for NVIDIA H100 80GB HBM3, this is NVIDIA H200: run"),
        ({"tensorrt_version": "10.16.1.11"}, "is for TensorRT 10.16.1.11, 11.4.0.106 is installed: run"),
        ({"onnx_sha256": "f" * 64}, "is for another version of the network: run"),
        ({"weights_sha256": ()}, "is for another version of the network: run"),
    ],
)
def test_engines_of_another_machine_or_network(bundle, changes, part):
    machine_found = found(compiled(bundle, **changes))
    assert not machine_found["tensorrt"].available
    assert part in machine_found["tensorrt"].reason
    assert machine_found["onnxruntime-cuda"].available


def test_the_line_at_the_start(bundle):
    machine = replace(MACHINE, tensorrt="", no_tensorrt="TensorRT is not installed")
    offered = backends(bundle, machine)
    assert engine_line(offered[1], offered) == "engine: onnxruntime-cuda (off: tensorrt: TensorRT is not installed)"


# --- this machine ---


@pytest.fixture
def looked(monkeypatch):
    """``looked(gpus, **modules)``: what ``this_machine`` finds with these GPUs."""

    def look(search):
        monkeypatch.setattr(module, "find_gpus", lambda: search)
        monkeypatch.setattr(module, "_no_cuda_core", lambda: "")
        return this_machine.__wrapped__()

    return look


@pytest.mark.parametrize("installed", [True, False])
def test_no_driver(looked, monkeypatch, installed):
    monkeypatch.setattr(module.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(module, "import_tensorrt", lambda: pytest.fail("TensorRT was imported without a GPU"))
    off = found(machine=looked(GpuSearch((), "no NVIDIA driver (libcuda.so.1 cannot be loaded)")))
    assert off["onnxruntime-cuda"].reason == "no NVIDIA driver (libcuda.so.1 cannot be loaded)"
    assert off["tensorrt"].reason.startswith(off["onnxruntime-cuda"].reason)
    assert ("the Python package tensorrt is not installed" in off["tensorrt"].reason) is not installed


def test_a_gpu_without_tensorrt(looked, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(tensorrt_library, "import_module", missing)
    off = found(machine=looked(GpuSearch((H200,), "")))
    assert off["tensorrt"].reason == (
        "TensorRT (11, or 10.16) is not installed: run pip install 'tensorrt-cu13>=11,<12'"
    )


def test_tensorrt_that_does_not_load(looked, monkeypatch):
    def broken(name):
        raise ImportError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr(tensorrt_library, "import_module", broken)
    off = found(machine=looked(GpuSearch((H200,), "")))
    assert off["tensorrt"].reason == (
        "TensorRT is installed but does not load (libnvinfer.so.11: cannot open shared object file)"
    )


def test_a_driver_that_is_too_old(looked, monkeypatch):
    monkeypatch.setattr(module, "import_tensorrt", lambda: SimpleNamespace(__version__="11.4.0.106"))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0", raising=False)
    off = found(machine=looked(GpuSearch((replace(H200, cuda_version=(12, 4)),), "")))
    assert off["tensorrt"].reason == (
        "the NVIDIA driver serves CUDA 12.4, TensorRT 11.4.0.106 needs 13.0: update the driver"
    )
    assert off["onnxruntime-cuda"].reason == (
        "the NVIDIA driver serves CUDA 12.4, this ONNX Runtime needs 13.0: update the driver"
    )
    assert [name for name, backend in off.items() if backend.available] == ["onnxruntime-cpu"]


def test_a_gpu_with_everything(looked, monkeypatch):
    monkeypatch.setattr(module, "import_tensorrt", lambda: SimpleNamespace(__version__="11.4.0.106"))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert looked(GpuSearch((H200,), "")) == MACHINE


def test_the_cpu_distribution_of_onnxruntime(looked, monkeypatch):
    monkeypatch.setattr(module, "import_tensorrt", lambda: SimpleNamespace(__version__="11.4.0.106"))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    off = found(machine=looked(GpuSearch((H200,), "")))["onnxruntime-cuda"]
    assert off.reason.startswith("this ONNX Runtime has no CUDA provider: uninstall onnxruntime, then run pip install")


def test_cuda_core_is_not_installed(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'cuda'", name="cuda")

    monkeypatch.setattr(module, "find_gpus", lambda: GpuSearch((H200,), ""))
    monkeypatch.setattr(module, "import_module", missing)
    off = found(machine=this_machine.__wrapped__())
    for name in ("tensorrt", "onnxruntime-cuda"):
        assert off[name].reason == "cuda-core cannot be loaded (No module named 'cuda'): run pip install 'ltxrt[gpu]'"


# --- versions and profiles ---


@pytest.mark.parametrize("version", ["11.0.0.114", "11.4.0.106", "11.9", "10.16.1.11", "10.17.0"])
def test_versions_that_are_supported(version):
    check_tensorrt_version(version, H200.cuda_version)


@pytest.mark.parametrize("version", ["10.15.1", "10.3.0.26", "9.3.0", "8.6.1", "12.0.0", "dev", ""])
def test_versions_that_are_not(version):
    with pytest.raises(EngineError, match=r"is installed; allowed: 11, or 10\.16"):
        check_tensorrt_version(version, H200.cuda_version)


def test_version_11_needs_a_driver_for_cuda_13():
    with pytest.raises(EngineError, match=r"the NVIDIA driver serves CUDA 12\.8, TensorRT 11\.4 needs 13\.0: update"):
        check_tensorrt_version("11.4", (12, 8))
    check_tensorrt_version("10.16.1.11", (12, 8))


KEY = EngineKey(
    schema_version=1,
    onnx_sha256="0" * 64,
    weights_sha256=(),
    gpu_name="x",
    compute_capability="9.0",
    tensorrt_version="11.4",
    cuda_version="13.0",
    profiles=(
        EngineProfile(name="short", sizes={"Nv": (2, 100, 500), "Na": (1, 20, 50)}),
        EngineProfile(name="long", sizes={"Nv": (2, 400, 900), "Na": (1, 60, 200)}),
    ),
    options={},
)


@pytest.mark.parametrize(
    ("sizes", "number"),
    [({"Nv": 2, "Na": 1}, 0), ({"Nv": 500, "Na": 50}, 0), ({"Nv": 500, "Na": 51}, 1), ({"Nv": 900, "Na": 200}, 1)],
)
def test_the_first_profile_that_serves(sizes, number):
    assert profile_for("denoiser", KEY, sizes) == number


def test_no_profile_serves():
    with pytest.raises(CapacityError) as caught:
        profile_for("denoiser", KEY, {"Nv": 901, "Na": 60})
    assert str(caught.value) == (
        "denoiser: no profile of the engine serves Nv = 901 (allowed: 2 to 900) in profile long: take a smaller or "
        "shorter clip, or build engines for it (ltxrt-export build --buckets)"
    )


# --- the driver ---


@pytest.fixture
def driver_library(tmp_path):
    """``driver_library(GPUS=2)``: a driver library that answers as the macros say."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to compile a stand-in driver with")

    def built(**macros):
        path = tmp_path / f"libcuda-{'-'.join(f'{name}{value}' for name, value in macros.items())}.so"
        defines = [f"-D{name}={value}" for name, value in macros.items()]
        subprocess.run(["gcc", "-shared", "-fPIC", *defines, "-o", str(path), str(DRIVER_SOURCE)], check=True)
        return str(path)

    return built


def test_the_gpus_as_the_driver_tells_them(driver_library):
    search = find_gpus(driver_library(GPUS=2))
    assert search.reason == ""
    assert search.gpus[0] == gpu.Gpu(
        index=0, name="NVIDIA H200", compute_capability=(9, 0), memory_bytes=150754820096, cuda_version=(13, 2)
    )
    assert (search.gpus[1].name, search.gpus[1].capability_text) == ("NVIDIA L40S", "8.9")


@pytest.mark.parametrize(
    ("macros", "reason"),
    [
        ({"GPUS": 0}, "no NVIDIA GPU is visible to CUDA"),
        ({"INIT": 100}, "the NVIDIA driver refuses cuInit: no NVIDIA GPU is visible (CUDA_ERROR_NO_DEVICE)"),
        (
            {"INIT": 803},
            "the NVIDIA driver refuses cuInit: driver library and kernel module do not match; restart the machine "
            "(error 803)",
        ),
        ({"INIT": 77}, "the NVIDIA driver refuses cuInit: error 77"),
    ],
)
def test_a_driver_that_does_not_work(driver_library, macros, reason):
    assert find_gpus(driver_library(**macros)) == GpuSearch((), reason)


def test_no_driver_library():
    assert find_gpus("libnone.so") == GpuSearch((), "no NVIDIA driver (libnone.so cannot be loaded)")
