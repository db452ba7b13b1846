# SPDX-License-Identifier: Apache-2.0
"""Every call that builds and runs of engines make, through TensorRT's real Python bindings, in both supported versions.

The bindings are on the public index; the libraries behind them are not, and would need a GPU. So the bindings load
stand-ins (``stubs.cpp``), and ``conformance.py`` (builds) and ``conformance_runtime.py`` (runs) run our code on them in
a process of its own.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ltxrt.bundle import tiny_bundle_path

HERE = Path(__file__).parent
VERSIONS = ("11.4.0.106", "10.16.1.11")
LIBRARIES = {"NVINFER": "nvinfer", "PLUGIN": "nvinfer_plugin", "PARSER": "nvonnxparser"}

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile stand-in libraries with"),
    pytest.mark.skipif(sys.platform != "linux", reason="the stand-ins are for Linux"),
]


@pytest.fixture(scope="module", params=VERSIONS)
def bindings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A version and a folder with its bindings, from the package index."""
    version = request.param
    folder = tmp_path_factory.mktemp("bindings")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--target", str(folder), f"tensorrt-cu13-bindings=={version}"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        pytest.skip(f"the bindings of TensorRT {version} cannot be had from the package index: {ran.stderr[-200:]}")
    return version, folder


def conformance(bindings: tuple[str, Path], folder: Path, what: str, program: str = "conformance.py") -> dict[str, Any]:
    """What a program found."""
    version, packages = bindings
    major = version.partition(".")[0]
    objects = ["-DOBJECTS"] if what == "calls" else []
    for macro, library in LIBRARIES.items():
        name = f"lib{library}.so.{major}"
        command = ["g++", "-O1", "-shared", "-fPIC", f"-D{macro}", *objects, f"-Wl,-soname,{name}"]
        subprocess.run([*command, "-o", str(folder / name), str(HERE / "stubs.cpp")], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(packages)}
    script = [sys.executable, "-X", "faulthandler", str(HERE / program), str(tiny_bundle_path()), str(folder)]
    ran = subprocess.run([*script, what], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found.pop("version") == version
    return found


def test_every_name_that_our_code_asks_for_is_there(bindings, tmp_path) -> None:
    found = conformance(bindings, tmp_path, "names")
    assert {"Builder", "OnnxParser", "BuilderFlag.TF32", "MemoryPoolType.WORKSPACE"} <= set(found["names"])
    assert found["refusal"] == "TensorRT's compiler does not start: no reason given"
    assert found["callbacks"] == {
        "reports": [
            ["Building", None, 0, 2],
            ["Timing", "Building", 0, 1],
            ["Building", None, 1, 2],
            ["Building", None, 2, 2],
        ],
        "went_on": True,
        "stopped": True,
        "errors": ["severity 0", "severity 1"],
        "warnings": 1,
        "taken": [7, 5],
        "written": "one\0twothree",
    }


def test_whole_compilations_pass_the_bindings(bindings, tmp_path) -> None:
    found = conformance(bindings, tmp_path, "calls")
    ended = found["ended"]
    for name in ("text_encoder", "denoiser", "video_decoder"):
        # The stand-in reports success and writes nothing: that is where our code stops, and no earlier.
        assert ended[name].endswith("TensorRT cannot build this network: no reason given")
    assert ended["layers"] == "the layers of the engine cannot be read: the inspector lists none"
    assert ended["parser_errors"].startswith("TensorRT's parser refuses node {}")
    assert found["accepted"] == [True, True]
    assert found["refused"] == [False, False, False, 0, False, None, None, "", None]
    assert found["profile_number"] == -1


# --- runs ---


def test_every_name_that_the_runtime_asks_for_is_there(bindings, tmp_path) -> None:
    found = conformance(bindings, tmp_path, "names", "conformance_runtime.py")
    assert {"module.Runtime", "raw.execute_async_v3", "raw.set_device_memory", "modes.OUTPUT"} <= set(found["asked"])
    assert len(found["asked"]) > 18
    assert found["errors"] == ["one line"]
    assert found["refusal"] == "denoiser: TensorRT's runtime does not start: no reason given"


def test_whole_runs_pass_the_bindings(bindings, tmp_path) -> None:
    found = conformance(bindings, tmp_path, "calls", "conformance_runtime.py")
    assert found["outputs"] == {"upsampled": [1, 32, 2, 4, 6]}
    assert found["scratch"] == found["told"] == 0x100010  # the stand-in's answer, which the runtime allocates
    assert found["capture"] == "upsampler: the captured CUDA graph is empty"
    raised = "upsampler: the plan refuses profile all: Error in set optimization profile async."
    assert found["refused"] == {
        "set_optimization_profile_async": raised,
        "set_input_shape": "upsampler: the plan refuses latent of shape (1, 32, 2, 2, 3): no reason given",
        "set_tensor_address": "upsampler: the plan refuses an address for latent: no reason given",
        "execute_async_v3": "upsampler: the plan does not run: no reason given",
        "create_execution_context": "upsampler: the plan has no execution context: no reason given",
    }
