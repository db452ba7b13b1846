# SPDX-License-Identifier: Apache-2.0
"""Which sizes and limits a verification takes, and that a precision's limit tells rounding from a wrong weight."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from ltxrt.bundle import Bundle
from ltxrt.engine_store import Backend
from ltxrt.errors import ExportError
from ltxrt.manifest import PRECISIONS
from ltxrt_export import verify
from ltxrt_export.exporter import Sources
from ltxrt_export.networks.spec import NetworkSpec
from ltxrt_export.parity import LIMIT, LIMITS, check_network, computes_in_bf16, limit_of
from ltxrt_export.quantize.precision import PrecisionSettings, apply_precision
from ltxrt_export.references import REFERENCES, Reference
from ltxrt_export.verify import VerifyOptions, corner_sizes, verify_bundle
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


def test_the_reason_why_engines_are_not_run_is_the_backend_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "backends", lambda: (Backend("tensorrt", False, "no GPU here"),))
    assert verify.engines_not_run(Bundle.open(), ["denoiser"]) == []
