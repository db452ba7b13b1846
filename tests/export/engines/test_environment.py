# SPDX-License-Identifier: Apache-2.0
"""Driver, GPU and TensorRT: found, chosen, and refused in words."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from ltxrt.errors import EngineError, RequestError
from ltxrt.gpu import Gpu
from ltxrt_export.engines import environment
from ltxrt_export.engines.environment import BuildDriver, choose_gpu, load_tensorrt, open_toolchain
from ltxrt_export.engines.versions import inspector_tensor_type, network_flags

SOURCE = Path(__file__).parent / "libcuda.c"
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to compile a stand-in driver with")


@pytest.fixture
def driver_library(tmp_path: Path) -> Callable[..., str]:
    """``driver_library(GPUS=2)``: a driver library that answers as the macros say."""

    def compiled(**macros: int) -> str:
        path = tmp_path / f"libcuda-{'-'.join(f'{name}{value}' for name, value in macros.items())}.so"
        defines = [f"-D{name}={value}" for name, value in macros.items()]
        subprocess.run(["gcc", "-shared", "-fPIC", *defines, "-o", str(path), str(SOURCE)], check=True)
        return str(path)

    return compiled


@needs_gcc
def test_a_gpu_is_current_within_the_block_alone(driver_library) -> None:
    driver = BuildDriver(driver_library())
    (gpu,) = driver.gpus()
    with pytest.raises(EngineError, match=r"refuses cuMemGetInfo_v2: CUDA_ERROR_INVALID_CONTEXT"):
        driver.free_bytes()
    with driver.current(gpu):
        assert driver.free_bytes() == 123456789
    with pytest.raises(EngineError, match="INVALID_CONTEXT"):
        driver.free_bytes()


@needs_gcc
@pytest.mark.parametrize(
    ("macros", "message"),
    [
        ({"GPUS": 0}, "no NVIDIA GPU is visible to CUDA: engines are built on the GPU that they are for"),
        ({"INIT": 100}, "the NVIDIA driver refuses cuInit: no NVIDIA GPU is visible (CUDA_ERROR_NO_DEVICE)"),
        (
            {"INIT": 803},
            "refuses cuInit: driver library and kernel module do not match; restart the machine (error 803)",
        ),
        ({"INIT": 77}, "refuses cuInit: error 77"),
    ],
)
def test_a_driver_that_does_not_work(driver_library, macros, message) -> None:
    with pytest.raises(EngineError) as caught:
        BuildDriver(driver_library(**macros)).gpus()
    assert message in str(caught.value)


def test_no_driver() -> None:
    with pytest.raises(EngineError, match=r"no NVIDIA driver \(libnone\.so cannot be loaded\): engines are built on"):
        BuildDriver("libnone.so")


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a driver")
def test_the_whole_search_on_a_machine_without_a_driver() -> None:
    with pytest.raises(EngineError, match=r"no NVIDIA driver \(libcuda\.so\.1 cannot be loaded\)"):
        open_toolchain()


def test_version_of_the_kernel_module(monkeypatch, tmp_path) -> None:
    version = tmp_path / "version"
    version.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC 12.2.0\n"
    )
    monkeypatch.setattr(environment, "_DRIVER_VERSION_FILE", version)
    assert environment.kernel_module_version() == "580.65.06"


def test_no_kernel_module(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(environment, "_DRIVER_VERSION_FILE", tmp_path / "none")
    assert environment.kernel_module_version() == ""


# --- which GPU ---


def test_auto_takes_the_gpu_with_the_most_memory(gpu: Gpu) -> None:
    small, large = replace(gpu, index=0, memory_bytes=1), replace(gpu, index=1, memory_bytes=2)
    assert choose_gpu((small, large), "auto") is large
    assert choose_gpu((small, replace(small, index=1)), "auto") is small
    assert choose_gpu((small, large), "0") is small


@pytest.mark.parametrize("choice", ["2", "-1", "cuda:0", ""])
def test_a_gpu_that_is_not_there(gpu: Gpu, choice: str) -> None:
    with pytest.raises(RequestError, match=r"gpu: '.*' is not allowed; allowed: auto, 0 \(NVIDIA H200\)"):
        choose_gpu((gpu,), choice)


# --- TensorRT ---


def test_tensorrt_is_not_installed(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError) as caught:
        load_tensorrt()
    text = str(caught.value)
    assert "TensorRT (11, or 10.16) is not installed: run pip install 'tensorrt-cu13>=11,<12'" in text
    assert "NVIDIA's package index" in text
    assert "\n" not in text


def test_tensorrt_does_not_load(monkeypatch, tmp_path) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(EngineError, match=r"is installed but does not load \(libnvinfer\.so\.11: cannot open"):
        load_tensorrt()


def test_a_part_of_tensorrt_is_missing(monkeypatch, tmp_path) -> None:
    (tmp_path / "tensorrt.py").write_text("import tensorrt_bindings_that_are_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(EngineError, match="is installed but does not load"):
        load_tensorrt()


def test_the_runtime_alone_cannot_compile(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(Runtime=object))
    with pytest.raises(EngineError, match="has no compiler, only a runtime"):
        load_tensorrt()


@needs_gcc
def test_the_whole_search(monkeypatch, driver_library, fake) -> None:
    monkeypatch.setattr(environment, "DRIVER_LIBRARY", driver_library())
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    tools = open_toolchain("0")
    assert (tools.gpu.name, tools.tensorrt) == ("NVIDIA H200", fake)


def test_the_network_is_strongly_typed_in_both_versions(fake) -> None:
    assert network_flags(fake) == 1  # 11: the flag's number is 0
    fake.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    assert network_flags(fake) == 2  # 10


def test_tensors_of_the_inspector_in_both_versions() -> None:
    assert inspector_tensor_type({"Format/Datatype": "Row major linear FP16 format"}) == "Row major linear FP16 format"
    assert inspector_tensor_type({"Format": "Row major", "DataType": "Half"}) == "Half Row major"
    assert inspector_tensor_type({"Dimensions": [1]}) == ""
