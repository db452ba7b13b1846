# SPDX-License-Identifier: Apache-2.0
"""One network to one engine: the only file that drives TensorRT's compiler.

Written against what TensorRT 11 and 10.16 share. Precision stands in the graph alone: the network is strongly
typed, and no flag here chooses a type.
"""

import json
import mmap
import re
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import ModelProto

from ltxrt.errors import EngineError, OutputError
from ltxrt.manifest import FileEntry, NetworkEntry
from ltxrt.tensorrt_library import TensorRtLog

from .cache_key import BuildOptions, canonical_options
from .constants import fold_convolutions
from .environment import Toolchain
from .layers import layer_report
from .plan_file import PlanFile, plan_writer, write_whole
from .profiles import Profile
from .progress import BuildProgress, Phase, progress_monitor
from .versions import network_flags
from .weights import MappedWeights, compiled_weight_bytes, external_tensors

__all__ = ["BuiltPlan", "NetworkJob", "build_network", "gib", "load_graph"]

#: Kept free beside weights and scratch memory: the context, the kernels' code and the tensors between layers.
MEMORY_MARGIN_BYTES = 1024**3
#: Less scratch memory than this makes most fast kernels unusable.
LEAST_WORKSPACE_BYTES = 256 * 1024**2
_OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|insufficient memory|not enough (device )?memory", re.IGNORECASE)
_NO_KERNEL = re.compile(r"[Cc]ould not find any implementation for node (?P<node>.+?)(?= due to|\.\s|\.\)|\.?$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkJob:
    """What to compile and where it goes.

    Attributes:
        key: Key of the network in the manifest.
        network: Its entry.
        graph: The ``.onnx``.
        profiles: In the order of their numbers.
        plan: Where the plan goes; the layers' JSON lies beside it as ``.layers.json``.
        timing_cache: Measured kernels, read and written; None keeps none.
    """

    key: str
    network: NetworkEntry
    graph: Path
    profiles: tuple[Profile, ...]
    plan: Path
    timing_cache: Path | None

    @property
    def layers(self) -> Path:
        """Where the layers' JSON goes."""
        return self.plan.with_suffix(".layers.json")


@dataclass(frozen=True, slots=True)
class BuiltPlan:
    """A finished engine: its files, and what else was so."""

    plan: FileEntry
    layers: FileEntry
    built_with: dict[str, str]


def load_graph(path: Path) -> ModelProto:
    """A graph without its external data.

    Raises:
        EngineError: The file is no ONNX model.
    """
    try:
        return onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise EngineError(f"{path} cannot be read as an ONNX model: {error}") from error


def allow_decomposed_attention(model: ModelProto) -> None:
    """Let TensorRT build attention from single operators where it has no fused kernel.

    The attribute is TensorRT's own and not of the ONNX standard, so it is set here and not in the exported graph, which
    the ONNX checker would then refuse. Source: onnx/onnx-tensorrt onnxOpImporters.cpp (Attention).
    """
    for node in model.graph.node:
        if node.op_type == "Attention":
            node.attribute.append(onnx.helper.make_attribute("TRT_decomposable", 1))


def build_network(job: NetworkJob, tools: Toolchain, options: BuildOptions) -> Generator[Phase, None, BuiltPlan]:
    """Compile a network, yielding where the compiler is; the generator returns the finished files.

    Leaving it early stops the compiler at its next step and leaves nothing but the timing cache.

    Raises:
        EngineError: TensorRT refuses the graph (naming network, node and rule), or the GPU's memory does not suffice.
        OutputError: The plan cannot be written.
        BundleError: The weights cannot be read.
    """
    progress = BuildProgress()
    return (yield from progress.watch(lambda: _Compilation(job, tools, options, progress).run()))


class _Compilation:
    """One compilation; everything of TensorRT's is made, used and dropped in the thread that runs it."""

    def __init__(self, job: NetworkJob, tools: Toolchain, options: BuildOptions, progress: BuildProgress) -> None:
        self.job = job
        self.trt = tools.tensorrt
        self.tools = tools
        self.options = canonical_options(options, job.network.precision)
        self.progress = progress
        self.log = TensorRtLog()
        self.logger = self.log.logger(self.trt)
        self.monitor = progress_monitor(self.trt, progress)
        #: Weights that were computed for the parser, which reads them as long as it lives.
        self._folded: dict[str, NDArray[Any]] = {}
        self._scratch_bytes: list[int] = []

    def run(self) -> BuiltPlan:
        model = load_graph(self.job.graph)
        with ExitStack() as stack:
            stack.enter_context(self.tools.driver.current(self.tools.gpu))
            plan = stack.enter_context(PlanFile(self.job.plan))
            weights = stack.enter_context(MappedWeights(external_tensors(model, self.job.graph.parent)))
            workspace = self._workspace_bytes(compiled_weight_bytes(model))
            self._compile(model, weights, plan, workspace)
            entry = plan.commit()
        try:
            with self.tools.driver.current(self.tools.gpu):
                layers = write_whole(self.job.layers, self._layers())
        except EngineError:
            self.job.plan.unlink(missing_ok=True)
            raise
        return BuiltPlan(entry, layers, self._built_with(workspace))

    def _compile(self, model: ModelProto, weights: MappedWeights, plan: PlanFile, workspace: int) -> None:
        builder = self._builder()
        network = builder.create_network(network_flags(self.trt))
        parser = self.trt.OnnxParser(network, self.logger)
        self._parse(parser, model, weights)
        config = self._config(builder, workspace)
        cache = self._timing_cache(config)
        writer = plan_writer(self.trt, plan)
        built = builder.build_serialized_network_to_stream(network, config, writer)
        if cache is not None:
            self._keep_timing_cache(config)
        if not built or plan.size == 0:
            raise self._failure(plan)

    def _builder(self) -> Any:
        try:
            return self.trt.Builder(self.logger)
        except TypeError as error:  # what the bindings make of a null pointer
            raise EngineError(f"TensorRT's compiler does not start: {self.log.last()}") from error

    def _parse(self, parser: Any, model: ModelProto, weights: MappedWeights) -> None:
        """The graph into TensorRT's network, its external weights by address."""
        if self.options["decomposed_attention"]:
            allow_decomposed_attention(model)
        folded = self._folded = fold_convolutions(model, weights.value)
        loaded = parser.load_model_proto(model.SerializeToString(), str(self.job.graph))
        used = {tensor.name for tensor in model.graph.initializer}
        places = [(t.name, weights.address(t), t.nbytes) for t in weights.tensors if t.name in used]
        places += [(name, int(value.ctypes.data), value.nbytes) for name, value in folded.items()]
        for name, address, nbytes in places if loaded else ():
            if not parser.load_initializer(name, address, nbytes):
                raise EngineError(
                    f"{self.job.key}: TensorRT's parser refuses weight {name} ({nbytes} bytes): {self.log.last()}"
                )
        if not loaded or not parser.parse_model_proto():
            raise EngineError(f"{self.job.key}: {self._parser_errors(parser)}")

    def _parser_errors(self, parser: Any) -> str:
        """The first finding of the parser as node, operator and rule, and how many more there are."""
        if parser.num_errors == 0:
            return f"TensorRT's parser refuses the graph: {self.log.last()}"
        error = parser.get_error(0)
        where = f"node {error.node_name() or error.node()} ({error.node_operator()})"
        rule = f"{error.code().name}: {' '.join(error.desc().split())}"
        more = f" (and {parser.num_errors - 1} more)" if parser.num_errors > 1 else ""
        return f"TensorRT's parser refuses {where}: {rule}{more}"

    def _config(self, builder: Any, workspace: int) -> Any:
        """Everything that is chosen; what can differ between two builds is in ``canonical_options``."""
        config = builder.create_builder_config()
        config.builder_optimization_level = self.options["optimization_level"]
        config.max_aux_streams = self.options["max_aux_streams"]
        config.profiling_verbosity = self.trt.ProfilingVerbosity.DETAILED
        config.clear_flag(self.trt.BuilderFlag.TF32)
        config.set_memory_pool_limit(self.trt.MemoryPoolType.WORKSPACE, workspace)
        config.progress_monitor = self.monitor
        for number, profile in enumerate(self.job.profiles):
            self._add_profile(builder, config, profile, first=number == 0)
        return config

    def _add_profile(self, builder: Any, config: Any, profile: Profile, *, first: bool) -> None:
        made = builder.create_optimization_profile()
        try:
            for port in self.job.network.inputs:
                low, tuned, high = profile.shapes(port.shape)
                made.set_shape(port.name, low, tuned, high)
        except ValueError as error:
            raise EngineError(f"{self.job.key}: profile {profile.entry.name} is refused: {error}") from error
        if not first:
            # Later profiles share the first one's weights instead of laying out their own.
            made.extra_memory_target = 0.0
        if config.add_optimization_profile(made) < 0:
            reason = self.log.last("the sizes do not fit the graph")
            raise EngineError(f"{self.job.key}: profile {profile.entry.name} is refused: {reason}")

    def _timing_cache(self, config: Any) -> Any:
        """Earlier measurements; those of another GPU or version, or a damaged file, are left aside."""
        path = self.job.timing_cache
        if path is None:
            return None
        for data in (path.read_bytes() if path.is_file() else b"", b""):
            cache = config.create_timing_cache(data)
            if cache is not None and config.set_timing_cache(cache, False):
                return cache
        return None

    def _keep_timing_cache(self, config: Any) -> None:
        cache = config.get_timing_cache()
        if cache is not None and self.job.timing_cache is not None:
            write_whole(self.job.timing_cache, bytes(memoryview(cache.serialize())))

    def _workspace_bytes(self, weight_bytes: int) -> int:
        """Scratch memory for kernels: what was asked for, at most what is left beside the weights."""
        free = self.tools.driver.free_bytes()
        left = free - weight_bytes - MEMORY_MARGIN_BYTES
        if left < LEAST_WORKSPACE_BYTES:
            raise EngineError(
                f"{self.job.key}: the GPU has {gib(free)} free, the weights take {gib(weight_bytes)} and the build "
                f"{gib(MEMORY_MARGIN_BYTES + LEAST_WORKSPACE_BYTES)} more: free memory, or take a GPU with more"
            )
        asked = self.options["workspace_gib"]
        return left if asked is None else min(left, int(asked) * 1024**3)

    def _failure(self, plan: PlanFile) -> EngineError | OutputError:
        """Why there is no plan, in words."""
        if plan.error is not None:
            return OutputError(f"{plan.path} cannot be written: {plan.error.strerror}")
        if self.progress.cancelled:
            return EngineError(f"{self.job.key}: cancelled")
        if self._complaint(_OUT_OF_MEMORY):
            return EngineError(
                f"{self.job.key}: the GPU's memory does not suffice to build this network; stop what else uses it, "
                f"lower --workspace-gib, or take a GPU with more ({self.log.last()})"
            )
        if missing := self._complaint(_NO_KERNEL):
            return EngineError(
                f"{self.job.key}: TensorRT has no kernel for node {missing['node']} at the sizes of the profiles"
            )
        return EngineError(f"{self.job.key}: TensorRT cannot build this network: {self.log.last()}")

    def _layers(self) -> bytes:
        """Load the plan once: it shows that it loads, and tells its layers and its working memory."""
        runtime = self.trt.Runtime(self.logger)
        with self.job.plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            engine = runtime.deserialize_cuda_engine(data)
            if engine is None:
                raise EngineError(f"{self.job.key}: the plan does not load: {self.log.last()}")
            profiles = range(len(self.job.profiles))
            self._scratch_bytes = [int(engine.get_device_memory_size_for_profile_v2(number)) for number in profiles]
            inspector = engine.create_engine_inspector()
            text = inspector.get_engine_information(self.trt.LayerInformationFormat.JSON)
        return (json.dumps(layer_report(text), indent=1) + "\n").encode()

    def _built_with(self, workspace: int) -> dict[str, str]:
        # One figure a profile; the runtime's memory model reads them before it loads anything.
        scratch = ",".join(map(str, self._scratch_bytes))
        found = {"driver": self.tools.kernel_module, "workspace_bytes": str(workspace), "scratch_bytes": scratch}
        if self.log.warnings:
            found["warnings"] = str(self.log.warnings)
        return found

    def _complaint(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """TensorRT's latest complaint of a kind."""
        found = (pattern.search(line) for line in reversed(self.log.errors))
        return next((match for match in found if match), None)


def gib(count: int) -> str:
    """A size for people, for example ``1.5 GiB``."""
    return f"{count / 1024**3:.1f} GiB"
