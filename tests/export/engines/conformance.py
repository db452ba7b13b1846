# SPDX-License-Identifier: Apache-2.0
"""Runs in a process of its own, with TensorRT's real bindings on stand-in libraries: every call that a build makes.

The bindings convert arguments and results as they always do; behind them nothing is parsed and nothing is built (see
``stubs.cpp``). Prints one line of JSON and leaves without running destructors, which have nothing to destroy.

Arguments: bundle folder, working folder, and ``names`` or ``calls``.
"""

import ast
import ctypes
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tensorrt_bindings

import ltxrt_export.engines
from ltxrt.bundle import Bundle
from ltxrt.errors import EngineError
from ltxrt.gpu import Gpu
from ltxrt.tensorrt_library import TensorRtLog
from ltxrt.tensorrt_plans import check_tensorrt_version
from ltxrt_export.engines.buckets import load_buckets
from ltxrt_export.engines.build import NetworkJob, _Compilation
from ltxrt_export.engines.cache_key import BuildOptions
from ltxrt_export.engines.environment import Toolchain, load_tensorrt
from ltxrt_export.engines.plan_file import PlanFile, plan_writer
from ltxrt_export.engines.profiles import network_profiles
from ltxrt_export.engines.progress import BuildProgress, progress_monitor
from ltxrt_export.engines.versions import network_flags

# The package of that name, which only NVIDIA's index has, is an alias of the bindings.
sys.modules["tensorrt"] = tensorrt_bindings

#: Place of a virtual function in an object's table. Interfaces with a version begin with four functions of their own.
FIRST_OF_VERSIONED = 4
GPU = Gpu(index=0, name="none", compute_capability=(9, 0), memory_bytes=2**37, cuda_version=(13, 0))


class Driver:
    @contextmanager
    def current(self, gpu: Gpu) -> Any:
        yield

    def free_bytes(self) -> int:
        return 2**36


def names() -> list[str]:
    """Every dotted name that our code asks of the module, found in its source and looked up in the bindings."""
    asked: set[str] = set()
    for path in Path(next(iter(ltxrt_export.engines.__path__))).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            for prefix in ("self.trt.", "tensorrt."):
                if text.startswith(prefix):
                    asked.add(text.removeprefix(prefix))
    missing = [name for name in sorted(asked) if not _has(tensorrt_bindings, name.split("."))]
    assert not missing, f"TensorRT {tensorrt_bindings.__version__} lacks {missing}"
    assert len(asked) > 15
    return sorted(asked)


def _has(owner: Any, path: list[str]) -> bool:
    for name in path:
        if not hasattr(owner, name):
            return False
        owner = getattr(owner, name)
    return True


def refusal() -> str:
    """The compiler as it behaves without a device: the factory returns nothing."""
    compilation = _Compilation(_job(), Toolchain(load_tensorrt(), Driver(), GPU), BuildOptions(), BuildProgress())  # type: ignore[arg-type]
    try:
        compilation._builder()
    except EngineError as error:
        return str(error)
    raise AssertionError("a compiler without a device was made")


def callbacks() -> dict[str, Any]:
    """Our subclasses, called as the library calls them: through their C++ objects' tables of functions."""
    trt = load_tensorrt()
    progress = BuildProgress()
    monitor = progress_monitor(trt, progress)
    start = _function(monitor, FIRST_OF_VERSIONED, None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int32)
    step = _function(monitor, FIRST_OF_VERSIONED + 1, ctypes.c_bool, ctypes.c_char_p, ctypes.c_int32)
    finish = _function(monitor, FIRST_OF_VERSIONED + 2, None, ctypes.c_char_p)
    start(b"Building", None, 2)
    start(b"Timing", b"Building", 1)
    went_on = step(b"Building", 0)
    progress.cancel()
    stopped = not step(b"Building", 1)
    finish(b"Building")
    reports = []
    while not progress._reports.empty():
        phase = progress._reports.get()
        assert phase is not None
        reports.append([phase.name, phase.parent, phase.done, phase.steps])
    log = TensorRtLog()
    logger = log.logger(trt)
    # A plain interface in 10, a versioned one in 11.
    place = FIRST_OF_VERSIONED if trt.__version__.startswith("11") else 0
    say = _function(logger, place, None, ctypes.c_int32, ctypes.c_char_p)
    for severity in range(5):
        say(severity, f"severity  {severity}\n".encode())
    path = Path(sys.argv[2]) / "written.plan"
    with PlanFile(path) as plan:
        writer = plan_writer(trt, plan)
        write = _function(writer, FIRST_OF_VERSIONED, ctypes.c_int64, ctypes.c_char_p, ctypes.c_int64)
        taken = [write(b"one\0two", 7), write(b"three...", 5)]
        plan.commit()
    written = path.read_bytes().decode()
    return {
        "reports": reports,
        "went_on": went_on,
        "stopped": stopped,
        "errors": log.errors,
        "warnings": log.warnings,
        "taken": taken,
        "written": written,
    }


def _function(made: Any, place: int, result: Any, *arguments: Any) -> Any:
    """A virtual function of the C++ object behind a Python one, which pybind11 keeps right after the object's head."""
    pointer = ctypes.c_void_p.from_address(id(made) + object.__basicsize__).value
    assert pointer is not None
    table = ctypes.c_void_p.from_address(pointer).value
    assert table is not None
    address = ctypes.c_void_p.from_address(table + place * ctypes.sizeof(ctypes.c_void_p)).value
    assert address is not None
    function = ctypes.CFUNCTYPE(result, ctypes.c_void_p, *arguments)(address)
    return lambda *values: function(pointer, *values)


def calls() -> dict[str, Any]:
    """Whole compilations against objects that answer everything; then the same against objects that refuse."""
    trt = load_tensorrt()
    check_tensorrt_version(trt.__version__, (13, 0))
    tools = Toolchain(trt, Driver(), GPU)  # type: ignore[arg-type]
    ended: dict[str, str] = {}
    for name in ("text_encoder", "denoiser", "video_decoder"):
        compilation = _Compilation(_job(name), tools, BuildOptions(), BuildProgress())
        # Nothing writes a plan, so the compilation ends where it looks for one: after every other call.
        ended[name] = _message(compilation.run)
    compilation.job.plan.write_bytes(b"a plan")
    ended["layers"] = _message(compilation._layers)
    builder = compilation._builder()
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    answer, as_usual = _library().answer, _library().answer_as_usual
    # One call after the other: the first refusal would end a compilation.
    parser = trt.OnnxParser(builder.create_network(network_flags(trt)), compilation.logger)
    ended["parser_errors"] = compilation._parser_errors(parser)
    cache = config.create_timing_cache(b"")
    accepted = config.set_timing_cache(cache, False), config.get_timing_cache() is not None
    memory = cache.serialize()
    answer(0)
    refused = [
        parser.load_model_proto(b"x", "/x.onnx"),
        parser.load_initializer("w", 1, 2),
        parser.parse_model_proto(),
        parser.num_errors,
        config.set_timing_cache(cache, False),
        config.create_timing_cache(b""),
        config.get_timing_cache(),
        bytes(memoryview(memory)).decode(),
        trt.Runtime(compilation.logger).deserialize_cuda_engine(b"x"),
    ]
    answer(2**64 - 1)
    profile_number = config.add_optimization_profile(profile)
    as_usual()
    return {"ended": ended, "accepted": accepted, "refused": refused, "profile_number": profile_number}


def _library() -> Any:
    major = tensorrt_bindings.__version__.partition(".")[0]
    return ctypes.CDLL(f"libnvinfer.so.{major}")


def _message(work: Any) -> str:
    try:
        work()
    except EngineError as error:
        return str(error)
    return "no error"


def _job(name: str = "upsampler") -> NetworkJob:
    folder = Path(sys.argv[1])
    manifest = Bundle.open(folder).manifest
    key = manifest.presets["high"][name]  # type: ignore[index]
    return NetworkJob(
        key=key,
        network=manifest.networks[key],
        graph=folder / manifest.networks[key].file,
        profiles=network_profiles(manifest, key, load_buckets()),
        plan=Path(sys.argv[2]) / f"{name}.plan",
        timing_cache=None,
    )


def main() -> None:
    found: dict[str, Any] = {"version": tensorrt_bindings.__version__}
    if sys.argv[3] == "names":
        found |= {"names": names(), "refusal": refusal(), "callbacks": callbacks()}
    else:
        found |= calls()
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    os._exit(0)


main()
