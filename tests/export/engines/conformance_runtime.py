# SPDX-License-Identifier: Apache-2.0
"""Runs in a process of its own, with TensorRT's real bindings on stand-in libraries: every call that a run makes.

As ``conformance.py`` does it for builds. The device is host memory (``ltxrt.testing_device``); behind the bindings
nothing is loaded and nothing runs (see ``stubs.cpp``). Prints one line of JSON and leaves without running destructors.

Arguments: bundle folder, working folder, and ``names`` or ``calls``.
"""

import ast
import ctypes
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt_bindings

import ltxrt
from ltxrt import engine_tensorrt
from ltxrt.bundle import Bundle
from ltxrt.engine import concrete_shape
from ltxrt.engine_tensorrt import PlanFile, TensorRtNetwork
from ltxrt.errors import EngineError
from ltxrt.manifest import EngineEntry, EngineKey, EngineProfile
from ltxrt.tensorrt_library import TensorRtLog, load_library
from ltxrt.testing_device import host_device

# The package of that name, which only NVIDIA's index has, is an alias of the bindings.
sys.modules["tensorrt"] = tensorrt_bindings

#: As a pointer an object, as a 32-bit number 0: for a call that asks one thing for an object and another for a count.
OBJECT_THAT_COUNTS_ZERO = 1 << 32
_OBJECT, _OBJECT_BYTES = 0x100010, 16  # of stubs.cpp
SIZES = {"f": 2, "h": 2, "w": 3}


def names() -> dict[str, Any]:
    """Every name that our code asks of the module, an engine, a context or a runtime, looked up in the bindings."""
    trt = tensorrt_bindings
    owners = {
        "module": trt,
        "severities": trt.ILogger,
        "modes": trt.TensorIOMode,
        "runtime": trt.Runtime,
        "engine": trt.ICudaEngine,
        "raw": trt.IExecutionContext,
    }
    asked: set[tuple[str, str]] = set()
    for name in ("tensorrt_library", "engine_tensorrt"):
        path = Path(next(iter(ltxrt.__path__))) / f"{name}.py"
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute):
                owner = ast.unparse(node.value).rpartition(".")[2]
                if owner in owners and not (owner == "raw" and node.attr == "handle"):
                    asked.add((owner, node.attr))
    missing = sorted(f"{owner}.{name}" for owner, name in asked if not hasattr(owners[owner], name))
    assert not missing, f"TensorRT {trt.__version__} lacks {missing}"
    log = TensorRtLog()
    logger = log.logger(trt)
    logger.log(trt.ILogger.ERROR, "one\n  line")
    logger.log(trt.ILogger.WARNING, "no error")
    return {"asked": sorted(f"{owner}.{name}" for owner, name in asked), "errors": log.errors, "refusal": refusal()}


def refusal() -> str:
    """A runtime as it behaves without a device: the factory returns nothing."""
    library = load_library(host_device()[0])
    try:
        library.load("denoiser", Path("/nowhere"))
    except EngineError as error:
        return str(error)
    raise AssertionError("a runtime without a device was made")


def calls() -> dict[str, Any]:
    """A load, a run and a capture against objects that answer everything; then against objects that refuse."""
    trt = tensorrt_bindings
    device, _ = host_device()
    stub = _library()
    _answering(trt.ICudaEngine, "get_tensor_mode", stub, lambda name: 1 if name == "latent" else 2)
    _answering(trt.ICudaEngine, "get_tensor_dtype", stub, lambda name: 0)
    _answering(trt.IExecutionContext, "infer_shapes", stub, lambda: OBJECT_THAT_COUNTS_ZERO)
    shape_of = trt.IExecutionContext.get_tensor_shape

    def known_shape(context: Any, name: str) -> Any:
        with suppress(
            RuntimeError
        ):  # the bindings take the call; a shape comes back by value, which the stand-in cannot
            shape_of(context, name)
        return trt.Dims((1, 32, 2, 4, 6))

    trt.IExecutionContext.get_tensor_shape = known_shape
    # The stand-in asks for a megabyte of working memory: its number is an address.
    network = TensorRtNetwork(_file(), load_library(device), device)
    spec = network.inputs[0]
    given = {"latent": device.place(np.zeros(concrete_shape(spec.shape, SIZES), np.float32))}
    outputs = network.enqueue(given)
    found: dict[str, Any] = {
        "outputs": {name: list(value.shape) for name, value in outputs.items()},
        "scratch": device.scratch.size_bytes,
        "told": network.working_bytes([SIZES]),
        # Nothing was handed over to the stream, and that is noticed.
        "capture": _message(lambda: network.bind(given)),
    }
    refused: dict[str, str] = {}
    for name in ("set_optimization_profile_async", "set_input_shape", "set_tensor_address", "execute_async_v3"):
        real = getattr(trt.IExecutionContext, name)
        _answering(trt.IExecutionContext, name, stub, lambda *_: 0)
        network._contexts.clear()
        refused[name] = _message(lambda: network.enqueue(given))
        setattr(trt.IExecutionContext, name, real)
    _answering(trt.ICudaEngine, "create_execution_context", stub, lambda *_: 0)
    network._contexts.clear()
    refused["create_execution_context"] = _message(lambda: network.enqueue(given))
    return {**found, "refused": refused}


def _answering(owner: Any, name: str, stub: Any, answer: Any) -> None:
    """Let the stand-in answer one call of the bindings with a number of its own."""
    real = getattr(owner, name)

    def call(self: Any, *arguments: Any) -> Any:
        stub.answer(answer(*arguments))
        try:
            return real(self, *arguments)
        finally:
            stub.answer_as_usual()

    setattr(owner, name, call)


def _library() -> Any:
    major = tensorrt_bindings.__version__.partition(".")[0]
    stub = ctypes.CDLL(f"libnvinfer.so.{major}")
    stub.answer.argtypes = [ctypes.c_size_t]
    stub.createInferRuntime_INTERNAL(None, 0)  # makes the object
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_size_t
    libc.mmap.argtypes = [ctypes.c_size_t, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    private_anonymous_fixed = 0x100022
    made = libc.mmap(OBJECT_THAT_COUNTS_ZERO, 4096, 3, private_anonymous_fixed, -1, 0)
    assert made == OBJECT_THAT_COUNTS_ZERO
    ctypes.memmove(made, _OBJECT, _OBJECT_BYTES)
    return stub


def _file() -> PlanFile:
    manifest = Bundle.open(sys.argv[1]).manifest
    key = manifest.presets["high"]["upsampler"]
    engine_key = EngineKey(
        schema_version=1,
        onnx_sha256="0" * 64,
        weights_sha256=(),
        gpu_name="none",
        compute_capability="9.0",
        tensorrt_version=tensorrt_bindings.__version__,
        cuda_version="13.0",
        profiles=(EngineProfile(name="all", sizes={"f": (1, 2, 60), "h": (1, 2, 60), "w": (1, 2, 60)}),),
        options={},
    )
    path = Path(sys.argv[2]) / "upsampler.plan"
    path.write_bytes(b"a plan")
    entry = EngineEntry(network=key, file="x", layers="x", key=engine_key, key_sha256="0" * 64, built_with={})
    return PlanFile("upsampler", manifest.networks[key], entry, path)


def _message(work: Any) -> str:
    try:
        work()
    except EngineError as error:
        return str(error)
    return "no error"


def main() -> None:
    assert engine_tensorrt.__doc__
    found = {"version": tensorrt_bindings.__version__, **(names() if sys.argv[3] == "names" else calls())}
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    os._exit(0)


main()
