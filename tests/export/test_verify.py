# SPDX-License-Identifier: Apache-2.0
"""Which sizes and limits a verification takes, and that a precision's limit tells rounding from a wrong weight."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from ltxrt.backends import Machine
from ltxrt.bundle import Bundle
from ltxrt.engine_onnx import OnnxEngine
from ltxrt.errors import ExportError
from ltxrt.gpu import Gpu
from ltxrt.manifest import PRECISIONS, EngineEntry, EngineKey, EngineProfile
from ltxrt_export import verify
from ltxrt_export.exporter import Sources
from ltxrt_export.networks.spec import NetworkSpec
from ltxrt_export.parity import LIMIT, LIMITS, Runner, check_network, computes_in_bf16, limit_of
from ltxrt_export.quantize.precision import PrecisionSettings, apply_precision
from ltxrt_export.references import REFERENCES, Reference
from ltxrt_export.verify import NetworkReport, VerifyOptions, corner_sizes, verify_bundle
from ltxrt_export.verify_engines import (
    CompiledNetwork,
    compiled_networks,
    engines_not_run,
    serves,
    stream_sizes,
)
from ltxrt_export.weights import TensorFile

Specs = Mapping[str, NetworkSpec]


def nothing(*_: object) -> dict[str, np.ndarray]:
    raise AssertionError


def test_corners_are_the_smallest_and_each_largest() -> None:
    reference = Reference([{"f": 5, "h": 3, "samples": 9}], nothing, nothing, {"h": 2})
    ranges = {"f": (2, 64), "h": (1, 8), "samples": (640, 7_696_000), "other": (1, 9)}
    low = {"f": 2, "h": 2, "samples": 640}
    assert corner_sizes(reference, ranges) == [
        low,
        {**low, "f": 64},
        {**low, "h": 8},
        {**low, "samples": verify.LARGEST["samples"]},
    ]
    again = replace(reference, sizes=[low, {**low, "h": 8}])
    assert corner_sizes(again, ranges) == [{**low, "f": 64}, {**low, "samples": verify.LARGEST["samples"]}]


def test_every_precision_has_limits_with_a_reason() -> None:
    assert {limit.precision for limit in LIMITS} == set(PRECISIONS)
    assert all(len(limit.reason) > 30 and limit.relative > 0 and limit.levels > 0 for limit in LIMITS)
    order = [limit_of("denoiser", precision).relative for precision in ("fp32", "fp16", "bf16", "fp8-mixed", "fp8")]
    assert order == sorted(order)
    assert limit_of("text_encoder", "fp8").network == "text_encoder"
    assert limit_of("denoiser", "fp8").network is None
    assert limit_of("upsampler", "fp32").relative == LIMIT
    with pytest.raises(ExportError, match=r"denoiser: no limit is known for precision 'int8'; known: fp32, fp16"):
        limit_of("denoiser", "int8")


@pytest.fixture(scope="module")
def upsamplers(shipped_specs: Specs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped upsampler in fp32, FP16 and BF16, with its weights."""
    bundle, folder = Bundle.open(), tmp_path_factory.mktemp("upsamplers")
    entry = bundle.network("high", "upsampler")
    for name in entry.weights:
        shutil.copyfile(bundle.file(name), folder / Path(name).name)
    model = onnx.load(bundle.file(entry.file), load_external_data=False)
    refs = {ref.key: ref for ref in shipped_specs["upsampler"].weights.values()}
    settings = PrecisionSettings(folder=folder, location=lambda path: path.name)
    for precision in ("fp32", "fp16", "bf16"):
        variant = apply_precision(model, "upsampler", precision, refs, settings)
        (folder / f"{precision}.onnx").write_bytes(variant.model.SerializeToString())
    return folder


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_precision_runs_here(
    upsamplers: Path, shipped_sources: Sources, shipped_specs: Specs, precision: str
) -> None:
    model: ModelProto = onnx.load(upsamplers / f"{precision}.onnx", load_external_data=False)
    assert computes_in_bf16(model) is (precision == "bf16")
    rows = list(check_network(shipped_sources, shipped_specs["upsampler"], upsamplers / f"{precision}.onnx", precision))
    limit = limit_of("upsampler", precision).relative
    assert all(limit / 1000 < row.error < row.limit == limit for row in rows)
    if precision != "fp32":
        with pytest.raises(ExportError, match=r"upsampled at .* the limit is 0\.0001"):
            list(check_network(shipped_sources, shipped_specs["upsampler"], upsamplers / f"{precision}.onnx"))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_wrong_weight_is_beyond_every_limit(
    upsamplers: Path, shipped_sources: Sources, shipped_specs: Specs, tmp_path: Path, precision: str
) -> None:
    shutil.copytree(upsamplers, tmp_path / "wrong")
    file = tmp_path / "wrong" / shipped_sources.upsampler.path.name
    ref = TensorFile.open(file).tensors["final_conv.weight"]
    values = np.fromfile(file, np.uint16, 64, offset=ref.offset) ^ 0x8000
    with file.open("r+b") as opened:
        opened.seek(ref.offset)
        opened.write(values.tobytes())
    with pytest.raises(ExportError, match="upsampled at"):
        list(
            check_network(
                shipped_sources, shipped_specs["upsampler"], tmp_path / "wrong" / f"{precision}.onnx", precision
            )
        )


def test_another_model_has_other_ports(shipped_sources: Sources) -> None:
    bundle = Bundle.open()
    key = bundle.manifest.presets["high"]["upsampler"]
    entry = bundle.manifest.networks[key]
    port = entry.inputs[0].model_copy(update={"shape": (1, 16, "f", "h", "w")})
    networks = {**bundle.manifest.networks, key: entry.model_copy(update={"inputs": (port,)})}
    other = replace(bundle, manifest=bundle.manifest.model_copy(update={"networks": networks}))
    with pytest.raises(ExportError, match=r"^upsampler: input .*16, 'f'.* of the bundle is .*32, 'f'.* of this model$"):
        list(verify_bundle(other, shipped_sources, VerifyOptions(networks=["upsampler"])))


def test_inputs_are_those_of_the_seed(
    shipped_sources: Sources, shipped_specs: Specs, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = REFERENCES["upsampler"](shipped_sources, shipped_specs["upsampler"])
    seeds: list[int] = []

    def feeds(sizes: Mapping[str, int], seed: int) -> dict[str, np.ndarray]:
        seeds.append(seed)
        return made.feeds(sizes, seed)

    monkeypatch.setattr(verify, "REFERENCES", {"upsampler": lambda *_: replace(made, feeds=feeds)})
    steps = list(verify_bundle(Bundle.open(), shipped_sources, VerifyOptions(networks=["upsampler"], seed=100)))
    assert seeds == list(range(100, 105))
    reports = [step.report for step in steps if step.report is not None]
    assert [(report.network, report.precision, report.passed) for report in reports] == [("upsampler", "fp32", True)]
    assert reports[0].presets == ("low", "medium", "high", "maximum")
    assert reports[0].key == Bundle.open().manifest.presets["high"]["upsampler"]
    assert [(step.done, step.total) for step in steps] == [*((index, 10) for index in range(10)), (10, 10)]


def upsampler_engine(
    bundle: Bundle, box: Mapping[str, tuple[int, int]], change: Callable[[np.ndarray], np.ndarray] = lambda found: found
) -> dict[str, CompiledNetwork]:
    """An engine of the upsampler that serves some sizes; the CPU computes in its place."""
    key = bundle.manifest.presets["high"]["upsampler"]
    network = bundle.manifest.networks[key]
    sizes = {symbol: (low, low, high) for symbol, (low, high) in box.items()}
    entry = EngineEntry(
        network=key,
        file="networks/engine.plan",
        layers="networks/engine.json",
        key=EngineKey(
            schema_version=1,
            onnx_sha256="0" * 64,
            weights_sha256=(),
            gpu_name="NVIDIA H200",
            compute_capability="9.0",
            tensorrt_version="11.4.0",
            cuda_version="13.0",
            profiles=(EngineProfile(name="all", sizes=sizes),),
            options={},
        ),
        key_sha256="0" * 64,
        built_with={},
    )

    def load() -> Runner:
        ports = (tuple(tensor.spec() for tensor in side) for side in (network.inputs, network.outputs))
        engine = OnnxEngine("upsampler", bundle.file(network.file), *ports, threads=1)

        class Changed:
            def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
                return {name: change(np.asarray(value)) for name, value in engine.run(feeds).items()}

        return Changed()

    return {key: CompiledNetwork("upsampler-h200", entry, load)}


def engine_reports(
    sources: Sources, compiled: Mapping[str, CompiledNetwork], monkeypatch: pytest.MonkeyPatch
) -> list[NetworkReport]:
    monkeypatch.setattr(verify, "compiled_networks", lambda bundle: compiled)
    steps = list(verify_bundle(Bundle.open(), sources, VerifyOptions(networks=["upsampler"])))
    assert (steps[-1].done, steps[-1].total) == (steps[-1].total, steps[-1].total)
    return [step.report for step in steps if step.report is not None]


def test_engines_run_at_the_corners_of_their_profiles(
    shipped_sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = {"f": (3, 6), "h": (2, 5), "w": (4, 7)}
    graph, engine = engine_reports(shipped_sources, upsampler_engine(Bundle.open(), box), monkeypatch)
    assert (graph.engine, engine.engine, engine.passed) == ("", "upsampler-h200", True)
    tried = [tuple(row.sizes.values()) for row in engine.rows]
    # The last of the sizes that every graph is tried at lies within the profile as well.
    assert sorted(tried) == [(3, 2, 4), (3, 2, 7), (3, 5, 4), (5, 3, 7), (6, 2, 4)]
    assert not any(tuple(row.sizes.values()) == (6, 2, 4) for row in graph.rows if row.output == "upsampled")


def test_an_engine_that_computes_something_else_is_seen(
    shipped_sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = upsampler_engine(Bundle.open(), {"f": (3, 3), "h": (2, 2), "w": (4, 4)}, lambda found: found * 1.01)
    graph, engine = engine_reports(shipped_sources, compiled, monkeypatch)
    assert graph.passed
    assert [row.passed for row in engine.rows] == [False]
    assert not engine.passed


def test_an_engine_that_was_never_compared_has_not_passed(
    shipped_sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = upsampler_engine(Bundle.open(), {"f": (200, 300), "h": (2, 2), "w": (4, 4)})
    monkeypatch.setattr(verify, "corner_sizes", lambda reference, shape_range: [])
    _, engine = engine_reports(shipped_sources, compiled, monkeypatch)
    assert (engine.rows, engine.passed) == ((), False)


def test_a_stream_is_served_call_by_call() -> None:
    calls = stream_sizes(13, 8, 4, (2, 3))
    assert [(call["n"], call["p"], call["q"], call["c"]) for call in calls] == [
        (8, 1, 0, 0),
        (4, 0, 0, 2),
        (1, 0, 1, 2),
    ]
    assert {(call["h"], call["w"]) for call in calls} == {(2, 3)}
    entry = next(iter(upsampler_engine(Bundle.open(), {"n": (4, 8)}).values())).entry
    assert serves(entry.key, list(calls[:2]))
    assert not serves(entry.key, list(calls))


def test_without_a_gpu_no_engine_is_compiled_for_this_machine() -> None:
    machine = Machine(no_gpu="no NVIDIA driver", no_tensorrt="no NVIDIA driver")
    assert compiled_networks(Bundle.open(), machine) == {}
    assert engines_not_run(Bundle.open(), ["denoiser"], machine) == {}


def test_an_engine_for_this_machine_is_found_and_others_say_why(tmp_path: Path) -> None:
    bundle = Bundle.open()
    key = bundle.manifest.presets["high"]["upsampler"]
    network = bundle.manifest.networks[key]
    entry = upsampler_engine(bundle, {"f": (1, 2), "h": (1, 2), "w": (1, 2)})[key].entry
    own = {
        "onnx_sha256": bundle.manifest.files[network.file].sha256,
        "weights_sha256": tuple(bundle.manifest.files[name].sha256 for name in sorted(network.weights)),
    }
    mine = entry.model_copy(update={"key": entry.key.model_copy(update=own)})
    theirs = entry.model_copy(update={"key": entry.key.model_copy(update={**own, "gpu_name": "NVIDIA L40S"})})
    machine = Machine(
        gpu=Gpu(index=0, name="NVIDIA H200", compute_capability=(9, 0), memory_bytes=2**37, cuda_version=(13, 0)),
        tensorrt="11.4.0",
    )
    both = replace(bundle, manifest=bundle.manifest.model_copy(update={"engines": {"theirs": theirs, "mine": mine}}))
    assert {name: compiled.key for name, compiled in compiled_networks(both, machine).items()} == {key: "mine"}
    reasons = engines_not_run(both, ["upsampler"], machine)
    assert reasons == {"theirs": "another engine of the same network is for this machine"}
    alone = replace(bundle, manifest=bundle.manifest.model_copy(update={"engines": {"theirs": theirs}}))
    assert compiled_networks(alone, machine) == {}
    assert "is for NVIDIA L40S, this is NVIDIA H200" in engines_not_run(alone, ["upsampler"], machine)["theirs"]
    assert engines_not_run(alone, ["denoiser"], machine) == {}
