# SPDX-License-Identifier: Apache-2.0
"""One network through the compiler, on a fake one: what it is given, what becomes of it, how it fails."""

import errno
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from ltxrt.bundle import Bundle
from ltxrt.errors import BundleError, EngineError, OutputError
from ltxrt_export.engines import build as build_module
from ltxrt_export.engines.buckets import load_buckets
from ltxrt_export.engines.build import NetworkJob, build_network, load_graph
from ltxrt_export.engines.cache_key import BuildOptions
from ltxrt_export.engines.environment import Toolchain
from ltxrt_export.engines.profiles import network_profiles
from ltxrt_export.engines.progress import Phase
from ltxrt_export.engines.weights import external_tensors

GIB = 1024**3


@pytest.fixture
def make_job(bundle: Path, tmp_path: Path) -> Callable[..., NetworkJob]:
    """``make_job("denoiser")``: one network of the tiny bundle, its plan in a folder of its own."""
    manifest = Bundle.open(bundle).manifest
    (tmp_path / "out").mkdir()

    def make(name: str = "upsampler", timing_cache: Path | None = None) -> NetworkJob:
        key = manifest.presets["high"][name]  # type: ignore[index]
        return NetworkJob(
            key=key,
            network=manifest.networks[key],
            graph=bundle / manifest.networks[key].file,
            profiles=network_profiles(manifest, key, load_buckets()),
            plan=tmp_path / "out" / f"{name}.plan",
            timing_cache=timing_cache,
        )

    return make


def run(job: NetworkJob, tools: Toolchain, options: BuildOptions | None = None) -> tuple[Any, list[Phase]]:
    """Build to the end: what was made, and every phase that was reported."""
    phases = build_network(job, tools, options or BuildOptions())
    seen: list[Phase] = []
    while True:
        try:
            seen.append(next(phases))
        except StopIteration as end:
            return end.value, seen


def leftovers(job: NetworkJob) -> list[str]:
    return sorted(path.name for path in job.plan.parent.iterdir())


# --- what the compiler is given ---


@pytest.mark.parametrize("name", ["text_encoder", "denoiser"])
def test_every_stored_weight_reaches_the_parser_as_it_is_in_the_file(fake, tools, make_job, name) -> None:
    job = make_job(name)
    run(job, tools)
    tensors = external_tensors(load_graph(job.graph), job.graph.parent)
    assert len(tensors) > 50
    assert fake.weights.keys() == {tensor.name for tensor in tensors}
    for tensor in tensors:
        with tensor.path.open("rb") as file:
            file.seek(tensor.offset)
            assert fake.weights[tensor.name] == file.read(tensor.nbytes), tensor.name


@pytest.mark.parametrize("name", ["audio_encoder", "image_encoder", "upsampler", "video_decoder"])
def test_kernels_of_convolutions_are_constants_for_the_parser(fake, tools, make_job, name) -> None:
    job = make_job(name)
    run(job, tools)
    (model,) = fake.models
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert convolutions
    for node in convolutions:
        for operand in node.input[1:]:
            tensor = stored[operand]
            external = tensor.data_location == onnx.TensorProto.EXTERNAL
            data = np.frombuffer(fake.weights[operand] if external else tensor.raw_data, np.float32)
            assert data.size == np.prod(tensor.dims)
            assert np.isfinite(data).all()


def test_the_graph_computes_the_same_with_its_folded_kernels(fake, tools, make_job) -> None:
    job = make_job("upsampler")
    run(job, tools)
    (model,) = fake.models
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.raw_data = fake.weights[tensor.name]
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    latent = np.random.default_rng(0).standard_normal((1, job.network.inputs[0].shape[1], 2, 3, 4), np.float32)
    results = [
        onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"]).run(None, {"latent": latent})[0]
        for source in (str(job.graph), model.SerializeToString())
    ]
    np.testing.assert_array_equal(results[0], results[1])


def test_profiles_reach_the_compiler_in_order(fake, tools, make_job) -> None:
    job = make_job("denoiser")
    run(job, tools)
    (settings,) = fake.named("Builder.build")
    made = settings[0]["profiles"]
    assert len(made) == len(job.profiles) == 4
    for profile, planned in zip(made, job.profiles, strict=True):
        assert profile.shapes.keys() == {port.name for port in job.network.inputs}
        low, tuned, high = (planned.entry.sizes["Nv"][index] for index in range(3))
        width = job.network.inputs[0].shape[2]
        assert profile.shapes["latent"] == ((1, low, width), (1, tuned, width), (1, high, width))
        assert profile.shapes["sigma"] == ((1,), (1,), (1,))
    assert [profile.extra_memory_target for profile in made] == [1.0, 0.0, 0.0, 0.0]


def test_empty_tensors_have_a_range_from_zero(fake, tools, make_job) -> None:
    job = make_job("video_decoder")
    run(job, tools)
    (settings,) = fake.named("Builder.build")
    profiles = settings[0]["profiles"]
    opening, following, closing = profiles[0], profiles[len(profiles) // 2], profiles[-1]
    assert opening.shapes["first"] == ((1,), (1,), (1,))
    assert following.shapes["first"] == closing.shapes["first"] == ((0,), (0,), (0,))
    assert opening.shapes["last"] == ((0,), (0,), (1,))
    assert (following.shapes["last"], closing.shapes["last"]) == (((0,),) * 3, ((1,),) * 3)
    assert [shape[2] for shape in opening.shapes["state_00"]] == [0, 0, 0]
    assert [shape[2] for shape in following.shapes["state_00"]] == [2, 2, 2]


def test_settings(fake, tools, make_job) -> None:
    run(make_job(), tools, BuildOptions(workspace_gib=2, optimization_level=5))
    (settings,) = fake.named("Builder.build")
    assert settings[0]["builder_optimization_level"] == 5
    assert settings[0]["max_aux_streams"] == 0
    assert settings[0]["profiling_verbosity"] is fake.ProfilingVerbosity.DETAILED
    assert fake.named("BuilderConfig.clear_flag") == [(fake.BuilderFlag.TF32,)]
    assert fake.named("BuilderConfig.set_memory_pool_limit") == [(fake.MemoryPoolType.WORKSPACE, 2 * GIB)]
    assert fake.named("Builder.create_network") == [(1,)]


DECOMPOSED = [("fp32", False, [1]), ("fp16", False, []), ("fp16", True, [1])]


@pytest.mark.parametrize(("precision", "asked", "set_to"), DECOMPOSED)
def test_attention_is_decomposed_in_fp32_or_where_asked_for(fake, tools, make_job, precision, asked, set_to) -> None:
    job = make_job("denoiser")
    job = replace(job, network=job.network.model_copy(update={"precision": precision}))
    run(job, tools, BuildOptions(decomposed_attention=asked))
    (model,) = fake.models
    for node in model.graph.node:
        if node.op_type == "Attention":
            assert [value.i for value in node.attribute if value.name == "TRT_decomposable"] == set_to


def test_scratch_memory_is_what_is_left_beside_the_weights(fake, tools, make_job) -> None:
    tools.driver.free = 8 * GIB
    run(make_job(), tools)
    run(make_job(), tools, BuildOptions(workspace_gib=100))
    limits = [size for _, size in fake.named("BuilderConfig.set_memory_pool_limit")]
    assert limits[0] == limits[1]
    assert 6 * GIB < limits[0] < 7 * GIB


# --- what becomes of it ---


def test_what_is_written(fake, tools, make_job) -> None:
    fake.plan = [b"one", b"two", b"three"]
    job = make_job()
    built, _ = run(job, tools)
    assert job.plan.read_bytes() == b"onetwothree"
    assert built.plan.bytes == 11
    assert built.plan.sha256 == hashlib.sha256(b"onetwothree").hexdigest()
    report = json.loads(job.layers.read_text())
    assert report["summary"]["layers"] == 2
    assert report["summary"]["fp8_kernels"] == 1
    assert report["inspector"] == fake.layers
    assert built.built_with["driver"] == "580.65.06"
    assert built.built_with["scratch_bytes"] == ",".join(str(1000 * (n + 1)) for n in range(len(job.profiles)))
    assert leftovers(job) == ["upsampler.layers.json", "upsampler.plan"]


def test_progress(fake, tools, make_job) -> None:
    _, phases = run(make_job(), tools)
    outer = [(phase.done, phase.steps) for phase in phases if phase.name == "Building"]
    assert outer == [(0, 3), (1, 3), (2, 3), (3, 3)]
    inner = [phase for phase in phases if phase.name == "Timing"]
    assert {phase.parent for phase in inner} == {"Building"}
    assert [phase.done for phase in inner] == [0, 1, 2] * 3  # a phase that ends early counts as done


def test_the_gpu_is_current_in_the_thread_that_compiles(fake, tools, make_job) -> None:
    seen: list[Any] = []
    fake.on_step = lambda step: seen.append((threading.current_thread().name, list(tools.driver.current_gpus)))
    run(make_job(), tools)
    assert {gpus[0] for _, gpus in seen} == {0}
    assert all(name.startswith("engine-build") for name, _ in seen)
    assert tools.driver.current_gpus == []


def test_leaving_stops_the_compiler_at_its_next_step(fake, tools, make_job) -> None:
    fake.steps = 1000
    fake.on_step = lambda step: time.sleep(0.001)
    job = make_job()
    with closing(build_network(job, tools, BuildOptions())) as phases:
        next(phase for phase in phases if phase.done == 1 and phase.parent is None)
    assert leftovers(job) == []
    assert not any(thread.name.startswith("engine-build") for thread in threading.enumerate())


def test_ctrl_c_stops_the_compiler(fake, tools, make_job) -> None:
    fake.steps = 1000
    steps: list[int] = []
    fake.on_step = lambda step: (steps.append(step), time.sleep(0.001))
    job = make_job()

    def interrupted(job: NetworkJob) -> Iterator[None]:
        for _ in build_network(job, tools, BuildOptions()):
            if len(steps) > 3:
                raise KeyboardInterrupt
            yield

    with pytest.raises(KeyboardInterrupt):
        list(interrupted(job))
    assert len(steps) < 1000
    assert leftovers(job) == []


def test_timings_are_kept_and_used_again(fake, tools, make_job, tmp_path) -> None:
    path = tmp_path / "kernels.timing"
    run(make_job(timing_cache=path), tools)
    assert path.read_bytes() == b"measured;"
    run(make_job(timing_cache=path), tools)
    assert path.read_bytes() == b"measured;measured;"
    assert fake.named("BuilderConfig.create_timing_cache") == [(b"",), (b"measured;",)]


@pytest.mark.parametrize("content", [b"damaged", b"of another gpu"])
def test_timings_that_do_not_fit_are_left_aside(fake, tools, make_job, tmp_path, content) -> None:
    path = tmp_path / "kernels.timing"
    path.write_bytes(content)
    fake.timings_fit = False
    run(make_job(timing_cache=path), tools)
    assert path.read_bytes() == b"measured;"


def test_timings_outlive_a_build_that_fails(fake, tools, make_job, tmp_path) -> None:
    path = tmp_path / "kernels.timing"
    fake.complaint = "something"
    with pytest.raises(EngineError):
        run(make_job(timing_cache=path), tools)
    assert path.read_bytes() == b"measured;"


# --- failing ---


def failure(job: NetworkJob, tools: Toolchain, kind: type[Exception] = EngineError) -> str:
    """The message of a build that fails; one line, and nothing is left behind."""
    with pytest.raises(kind) as caught:
        run(job, tools)
    assert "\n" not in str(caught.value)
    assert leftovers(job) == []
    return str(caught.value)


def test_a_node_that_the_parser_refuses_is_named_with_its_rule(fake, tools, make_job) -> None:
    fake.parser_errors = [
        (17, "block.3/attn", "Attention", "UNSUPPORTED_NODE", "Setting softcap is not\n supported"),
        (18, "x", "Add", "INVALID_NODE", "y"),
    ]
    job = make_job()
    assert failure(job, tools) == (
        f"{job.key}: TensorRT's parser refuses node block.3/attn (Attention): "
        "UNSUPPORTED_NODE: Setting softcap is not supported (and 1 more)"
    )


def test_a_nameless_node_is_told_by_its_number(fake, tools, make_job) -> None:
    fake.parser_errors = [(17, "", "Attention", "UNSUPPORTED_NODE", "no")]
    assert "node 17 (Attention): UNSUPPORTED_NODE: no" in failure(make_job(), tools)


def test_a_weight_that_the_parser_refuses(fake, tools, make_job) -> None:
    job = make_job("denoiser")
    fake.refuses_weight = external_tensors(load_graph(job.graph), job.graph.parent)[0].name
    message = failure(job, tools)
    assert f"TensorRT's parser refuses weight {fake.refuses_weight} (" in message
    assert message.endswith("Provided initializer size mismatches")


def test_profiles_that_are_refused(fake, tools, make_job) -> None:
    fake.refuses_profile = True
    assert "profile short is refused: the sizes do not fit the graph" in failure(make_job(), tools)
    fake.refuses_shape = "Parameter check failed"
    assert "profile short is refused: Parameter check failed" in failure(make_job(), tools)


@pytest.mark.parametrize(
    ("complaint", "message"),
    [
        (
            "Error Code 10: Internal Error (Could not find any implementation for node {ForeignNode[a...b]}.)",
            "TensorRT has no kernel for node {ForeignNode[a...b]} at the sizes of the profiles",
        ),
        ("[virtualMemoryBuffer.cpp::resizePhysical] OutOfMemory Error in resize", "the GPU's memory does not suffice"),
        ("Requested amount of GPU memory could not be allocated: insufficient memory", "lower --workspace-gib"),
        ("Something  else\n entirely", "TensorRT cannot build this network: Something else entirely"),
    ],
)
def test_what_the_compiler_says_is_put_into_words(fake, tools, make_job, complaint, message) -> None:
    fake.complaint = complaint
    assert message in failure(make_job(), tools)


def test_a_compiler_that_says_nothing(fake, tools, make_job) -> None:
    fake.plan = []
    assert failure(make_job(), tools).endswith("TensorRT cannot build this network: no reason given")


def test_a_compiler_that_does_not_start(fake, tools, make_job) -> None:
    fake.builder_starts = False
    message = "TensorRT's compiler does not start: CUDA initialization failure with error: 35"
    assert failure(make_job(), tools) == message


def test_a_plan_that_does_not_load_is_no_plan(fake, tools, make_job) -> None:
    fake.plan_loads = False
    assert failure(make_job(), tools).endswith("the plan does not load: Serialization assertion failed")


@pytest.mark.parametrize("layers", ["{", "[]", '{"Bindings": []}', {"Layers": 3}])
def test_an_engine_whose_layers_cannot_be_read_is_no_engine(fake, tools, make_job, layers) -> None:
    fake.layers = layers
    assert "the layers of the engine cannot be read" in failure(make_job(), tools)


def test_not_enough_memory_for_the_weights(tools, make_job) -> None:
    tools.driver.free = GIB
    message = failure(make_job(), tools)
    assert "the GPU has 1.0 GiB free, the weights take 0.0 GiB and the build 1.2 GiB more" in message


def test_a_full_disk(fake, tools, make_job, monkeypatch) -> None:
    class FullDisk:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    class Plan(build_module.PlanFile):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self._file = FullDisk(self._file)

    monkeypatch.setattr(build_module, "PlanFile", Plan)
    assert failure(make_job(), tools, OutputError).endswith("upsampler.plan cannot be written: No space left on device")


def test_a_folder_that_is_not_there(tools, make_job, tmp_path) -> None:
    job = make_job()
    (tmp_path / "out").rmdir()
    with pytest.raises(OutputError, match=r"upsampler\.plan cannot be written: No such file"):
        run(job, tools)


@pytest.mark.parametrize("damage", ["gone", "cut", "empty"])
def test_weights_that_cannot_be_read(tools, make_job, damage) -> None:
    job = make_job("denoiser")
    path = external_tensors(load_graph(job.graph), job.graph.parent)[0].path
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    assert path.name in failure(job, tools, BundleError)


def test_a_graph_that_is_none(tools, make_job) -> None:
    job = make_job()
    job.graph.unlink()
    job.graph.write_bytes(b"\x00not a graph")
    assert "cannot be read as an ONNX model" in failure(job, tools)
