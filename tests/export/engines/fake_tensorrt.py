# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the ``tensorrt`` module: takes what the real one takes, and fails on demand.

It has what the engine build uses and nothing else: anything more is an AttributeError. That these names, arguments
and types are those of the real module is the subject of ``test_conformance.py``.
"""

import ctypes
import enum
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx

LAYERS_11 = {
    "Layers": [
        {
            "Name": "block.0/mlp",
            "LayerType": "gemm",
            "TacticName": "sm90_xmma_gemm_e4m3bf16_e4m3f32",
            "Inputs": [{"Name": "x", "Dimensions": [1, 4, 8], "Format": "Row major linear", "DataType": "FP8"}],
            "Outputs": [{"Name": "y", "Dimensions": [1, 4, 8], "Format": "Row major linear", "DataType": "BFloat16"}],
        },
        {
            "Name": "block.0/attention",
            "LayerType": "kgen",
            "TacticName": "_gemm_mha_v2_0x123",
            "Inputs": [{"Name": "y", "Dimensions": [1, 4, 8], "Format": "Row major linear", "DataType": "BFloat16"}],
            "Outputs": [{"Name": "z", "Dimensions": [1, 4, 8], "Format": "Row major linear", "DataType": "Float"}],
        },
    ],
    "I/O Tensors": ["x", "z"],
}


class FakeTensorRT:
    """The module. Attributes may be set before a build to make it fail.

    Attributes:
        calls: What was called, in order: ``("Class.method", arguments)``.
        weights: Initializers by name as the parser read them through the addresses that it was given.
        models: Graphs that were parsed.
        builder_starts: Off: ``Builder`` does what the bindings do with a null pointer.
        parser_errors: Errors of the parser: (node index, name, operator, code, text).
        refuses_weight: Name of an initializer that the parser refuses.
        refuses_shape: Message of the ``ValueError`` of ``set_shape``.
        refuses_profile: Whether ``add_optimization_profile`` gives -1.
        complaint: What the compiler logs before it fails; None lets it succeed.
        steps: Steps of the compiler's outer phase.
        on_step: Called with each step's number, before it is reported.
        plan: Pieces that are written; None derives them from the network.
        plan_loads: Off: the plan does not deserialise.
        timings_fit: Off: caches that hold something are of another GPU.
        layers: The inspector's answer.
    """

    def __init__(self, version: str = "11.4.0.106") -> None:
        self.__version__ = version
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.weights: dict[str, bytes] = {}
        self.models: list[onnx.ModelProto] = []
        self.builder_starts = True
        self.parser_errors: list[tuple[int, str, str, str, str]] = []
        self.refuses_weight: str | None = None
        self.refuses_shape: str | None = None
        self.refuses_profile = False
        self.complaint: str | None = None
        self.steps = 3
        self.on_step: Any = lambda step: None
        self.plan: list[bytes] | None = None
        self.plan_loads = True
        self.timings_fit = True
        self.layers: Any = LAYERS_11
        self.ILogger, self.IProgressMonitor, self.IStreamWriter = ILogger, IProgressMonitor, IStreamWriter
        self.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 0})
        self.ProfilingVerbosity = enum.Enum("ProfilingVerbosity", ["DETAILED"])
        self.BuilderFlag = enum.Enum("BuilderFlag", ["TF32"])
        self.MemoryPoolType = enum.Enum("MemoryPoolType", ["WORKSPACE"])
        self.LayerInformationFormat = enum.Enum("LayerInformationFormat", ["JSON"])

    def record(self, call: str, *arguments: Any) -> None:
        self.calls.append((call, arguments))

    def named(self, call: str) -> list[tuple[Any, ...]]:
        """Arguments of every call of that name."""
        return [arguments for name, arguments in self.calls if name == call]

    def Builder(self, logger: Any) -> Any:  # noqa: N802
        if not self.builder_starts:
            logger.log(ILogger.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return Builder(self, logger)

    def OnnxParser(self, network: Any, logger: Any) -> Any:  # noqa: N802
        return OnnxParser(self, network, logger)

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        return Runtime(self, logger)


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        self.started = True


class IProgressMonitor:
    def __init__(self) -> None:
        self.started = True


class IStreamWriter:
    def __init__(self) -> None:
        self.started = True


class Builder:
    def __init__(self, fake: FakeTensorRT, logger: Any) -> None:
        assert logger.started
        self.fake, self.logger = fake, logger

    def create_network(self, flags: int) -> Any:
        self.fake.record("Builder.create_network", flags)
        return SimpleNamespace(digest=b"")

    def create_builder_config(self) -> Any:
        return BuilderConfig(self.fake)

    def create_optimization_profile(self) -> Any:
        return OptimizationProfile(self.fake)

    def build_serialized_network_to_stream(self, network: Any, config: Any, writer: Any) -> bool:
        assert writer.started
        fake, monitor = self.fake, config.progress_monitor
        fake.record("Builder.build", dict(vars(config)))
        monitor.phase_start("Building", None, fake.steps)
        for step in range(fake.steps):
            monitor.phase_start("Timing", "Building", 2)
            monitor.step_complete("Timing", 0)
            monitor.phase_finish("Timing")
            fake.on_step(step)
            if not monitor.step_complete("Building", step):
                monitor.phase_finish("Building")
                return False
        monitor.phase_finish("Building")
        if config.cache is not None:
            config.cache.data += b"measured;"
        if fake.complaint is not None:
            self.logger.log(ILogger.ERROR, fake.complaint)
            return False
        pieces = [b"plan of ", network.digest] if fake.plan is None else fake.plan
        return all(writer.write(piece) == len(piece) for piece in pieces)


class BuilderConfig:
    def __init__(self, fake: FakeTensorRT) -> None:
        self.__dict__["fake"] = fake
        self.__dict__["cache"] = None
        self.__dict__["profiles"] = []

    def __setattr__(self, name: str, value: Any) -> None:
        known = ("builder_optimization_level", "max_aux_streams", "profiling_verbosity", "progress_monitor")
        if name not in known:
            raise AttributeError(name)
        self.__dict__[name] = value

    def clear_flag(self, flag: Any) -> None:
        self.fake.record("BuilderConfig.clear_flag", flag)

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.fake.record("BuilderConfig.set_memory_pool_limit", pool, size)

    def add_optimization_profile(self, profile: Any) -> int:
        if self.fake.refuses_profile:
            return -1
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, data: bytes) -> Any:
        self.fake.record("BuilderConfig.create_timing_cache", data)
        return None if data == b"damaged" else TimingCache(data)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.data and not self.fake.timings_fit:
            return False
        self.__dict__["cache"] = cache
        return True

    def get_timing_cache(self) -> Any:
        return self.cache


class TimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data


class OptimizationProfile:
    def __init__(self, fake: FakeTensorRT) -> None:
        self.fake = fake
        self.shapes: dict[str, tuple[Any, ...]] = {}
        self.extra_memory_target = 1.0

    def set_shape(self, name: str, low: Any, tuned: Any, high: Any) -> None:
        if self.fake.refuses_shape:
            raise ValueError(self.fake.refuses_shape)
        self.shapes[name] = low, tuned, high


class OnnxParser:
    def __init__(self, fake: FakeTensorRT, network: Any, logger: Any) -> None:
        assert logger.started
        self.fake, self.network, self.logger = fake, network, logger
        self.num_errors = len(fake.parser_errors)
        self.pending: dict[str, int] = {}

    def load_model_proto(self, model: bytes, path: str) -> bool:
        assert Path(path).is_file()
        self.model = onnx.load_from_string(model)
        self.sizes = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.pending = dict.fromkeys(t.name for t in self.model.graph.initializer if t.data_location)
        return True

    def load_initializer(self, name: str, address: int, size: int) -> bool:
        if name == self.fake.refuses_weight:
            self.logger.log(ILogger.ERROR, "Provided initializer size mismatches")
            return False
        self.pending[name] = (address, size)
        return True

    def parse_model_proto(self) -> bool:
        assert all(self.pending.values()), "a weight without an address"
        if self.fake.parser_errors:
            return False
        self.fake.models.append(self.model)
        digest = hashlib.sha256(self.model.SerializeToString())
        for name, (address, size) in sorted(self.pending.items()):
            self.fake.weights[name] = ctypes.string_at(address, size)
            digest.update(self.fake.weights[name])
        self.network.digest = digest.hexdigest().encode()
        return True

    def get_error(self, index: int) -> Any:
        node, name, operator, code, text = self.fake.parser_errors[index]
        return SimpleNamespace(
            node=lambda: node,
            node_name=lambda: name,
            node_operator=lambda: operator,
            code=lambda: SimpleNamespace(name=code),
            desc=lambda: text,
        )


class Runtime:
    def __init__(self, fake: FakeTensorRT, logger: Any) -> None:
        self.fake, self.logger = fake, logger

    def deserialize_cuda_engine(self, data: Any) -> Any:
        if not self.fake.plan_loads:
            self.logger.log(ILogger.ERROR, "Serialization assertion failed")
            return None
        assert bytes(memoryview(data)[:4])
        answer = self.fake.layers if isinstance(self.fake.layers, str) else json.dumps(self.fake.layers)
        inspector = SimpleNamespace(get_engine_information=lambda form: answer)
        return SimpleNamespace(
            create_engine_inspector=lambda: inspector,
            get_device_memory_size_for_profile_v2=lambda profile: 1000 * (profile + 1),
        )
