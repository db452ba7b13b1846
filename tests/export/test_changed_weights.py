# SPDX-License-Identifier: Apache-2.0
"""The published FP8 layout, written from the tiny model: read into 16 bits, and into FP8 networks as it is."""

import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltxrt.bundle import Bundle, file_sha256
from ltxrt.errors import ExportError, OutputError
from ltxrt_export import changed_weights, disk, exporter
from ltxrt_export.changed_weights import Change, ChangedWeights
from ltxrt_export.checkpoint import Checkpoint
from ltxrt_export.denoiser_graph import export_denoiser
from ltxrt_export.exporter import Sources, export_bundle, network_specs
from ltxrt_export.lora import LoraFile
from ltxrt_export.networks.denoiser import Semantics
from ltxrt_export.networks.spec import NetworkSpec
from ltxrt_export.onnx_export import Location
from ltxrt_export.parity import limit_of, open_runner, relative_error, tensor_specs
from ltxrt_export.quantize.calibrate import CalibrationOptions
from ltxrt_export.quantize.clips import CLIPS
from ltxrt_export.quantize.precision import PrecisionSettings, apply_precision
from ltxrt_export.references import REFERENCES
from ltxrt_export.tiny_bundle import TINY_OPTIONS
from ltxrt_export.verify import VerifyOptions, verify_bundle
from ltxrt_export.weight_check import weight_rows
from ltxrt_export.weights import TensorFile

BLOCKS = "model.diffusion_model.transformer_blocks."
QUERY = f"{BLOCKS}1.attn1.to_q"


def fp8_layers(tensors: dict[str, Tensor]) -> list[str]:
    """Linear layers of every block but the first and the last, gates included, as the published files have it."""
    return [
        key.removesuffix(".weight")
        for key, value in tensors.items()
        if key.startswith(tuple(f"{BLOCKS}{index}." for index in (1, 2, 3)))
        and key.endswith(".weight")
        and value.ndim == 2
    ]


@pytest.fixture(scope="module")
def scaled(shipped_sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """The tiny model in the published FP8 layout."""
    source = shipped_sources.checkpoint.path
    with safe_open(source, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(source)
    for layer in fp8_layers(tensors):
        weight = tensors[f"{layer}.weight"].float()
        scale = weight.abs().max() / 448
        tensors[f"{layer}.weight"] = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[f"{layer}.weight_scale"] = scale
        tensors[f"{layer}.input_scale"] = torch.tensor(16.0 / 448)
    path = tmp_path_factory.mktemp("scaled") / "ltx-2.3-22b-distilled-fp8.safetensors"
    save_file(tensors, path, metadata)
    return Sources.open(path, shipped_sources.text_encoder.path, shipped_sources.upsampler.path)


@pytest.fixture(scope="module")
def widened(scaled: Sources, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sources, ChangedWeights]:
    """The same with nothing in E4M3, written."""
    sources, weights = scaled.with_changes(tmp_path_factory.mktemp("widened"))
    assert weights is not None
    done = list(weights.write())
    assert done == sorted(done)
    assert done[-1] == weights.bytes == weights.path.stat().st_size
    return sources, weights


@pytest.fixture(scope="module")
def spec(widened: tuple[Sources, ChangedWeights]) -> NetworkSpec:
    return network_specs(widened[0], Semantics.R3)[0]["denoiser"]


@pytest.fixture
def traced_before(fp32_graphs: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network but the denoiser as it was traced before: its weights lie elsewhere now, and are the same."""

    def traced(spec: NetworkSpec, location: Location) -> onnx.ModelProto:
        model = onnx.load(fp32_graphs[spec.name], load_external_data=False)
        refs = {ref.key: ref for ref in spec.weights.values()}
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                ref = refs[tensor.name]
                del tensor.external_data[:]
                for key, value in (("location", location(ref.path)), ("offset", ref.offset), ("length", ref.nbytes)):
                    tensor.external_data.add(key=key, value=str(value))
        return model

    monkeypatch.setattr(exporter, "export_model", traced)


def test_values_are_dequantised_and_rounded_once(scaled: Sources, widened: tuple[Sources, ChangedWeights]) -> None:
    sources, weights = widened
    stored, found = load_file(scaled.checkpoint.path), load_file(weights.path)
    layers = fp8_layers(stored)
    assert set(found) == {f"{layer}.weight" for layer in layers}
    assert any("to_gate_logits" in layer for layer in layers)
    for layer in layers:
        exact = stored[f"{layer}.weight"].float() * stored[f"{layer}.weight_scale"]
        assert torch.equal(found[f"{layer}.weight"], exact.bfloat16())
    loaded = sources.checkpoint.component("transformer").load().state_dict()
    assert torch.equal(loaded["transformer_blocks.1.attn1.to_q.weight"], found[f"{QUERY}.weight"].float())
    assert torch.equal(loaded["proj_in.weight"], stored["model.diffusion_model.patchify_proj.weight"].float())
    assert sources.checkpoint.sha256() == scaled.checkpoint.sha256()


def test_it_is_a_safetensors_file_where_the_plan_says(widened: tuple[Sources, ChangedWeights]) -> None:
    assert dict(TensorFile.open(widened[1].path).tensors) == dict(widened[1].refs)


def test_nothing_is_written_before_it_is_asked_for(scaled: Sources, tmp_path: Path) -> None:
    sources, weights = scaled.with_changes(tmp_path)
    assert weights is not None
    assert set(sources.checkpoint.component("transformer").weights) == set(
        scaled.with_changes(tmp_path)[0].checkpoint.component("transformer").weights
    )
    assert not any(tmp_path.iterdir())
    writing = weights.write()
    next(writing)
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    writing.close()
    assert not any(tmp_path.iterdir())


def test_without_room_nothing_is_written(scaled: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda _: 1000)
    weights = scaled.with_changes(tmp_path)[1]
    assert weights is not None
    with pytest.raises(OutputError, match=r"are needed and .* are free, for changed weights"):
        next(weights.write())
    assert not any(tmp_path.iterdir())


def test_a_source_that_became_shorter(scaled: Sources, tmp_path: Path) -> None:
    short = tmp_path / "short.safetensors"
    short.write_bytes(scaled.checkpoint.path.read_bytes())
    checkpoint = Checkpoint.open(short)
    weights = ChangedWeights.plan(
        tmp_path / "out.safetensors", {f"{QUERY}.weight": Change(checkpoint.file.tensors[f"{QUERY}.weight"])}
    )
    with short.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ExportError, match=r"to_q\.weight cannot be read: the file became shorter"):
        list(weights.write())
    assert [path.name for path in tmp_path.iterdir()] == ["short.safetensors"]


def test_memory_does_not_grow_with_a_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of 40 runs: no array that is made on the way is larger than one of them."""
    rows, columns = 400, 64
    values = np.random.default_rng(0).standard_normal((rows, columns), np.float32).astype(ml_dtypes.bfloat16)
    header = json.dumps({"w": {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, values.nbytes]}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + values.tobytes())
    monkeypatch.setattr(changed_weights, "_CHUNK", 10 * columns)
    sizes: list[int] = []
    read = changed_weights.read_values

    def recorded(*arguments: object) -> np.ndarray:
        found = read(*arguments)  # type: ignore[arg-type]
        sizes.append(found.size)
        return found

    monkeypatch.setattr(changed_weights, "read_values", recorded)
    weights = ChangedWeights.plan(tmp_path / "b.safetensors", {"w": Change(TensorFile.open(path).tensors["w"])})
    list(weights.write())
    assert sizes == [10 * columns] * 40
    assert weights.path.read_bytes()[len(weights.header) :] == values.tobytes()


@pytest.mark.slow
def test_the_fp8_network_holds_the_published_codes(
    scaled: Sources, widened: tuple[Sources, ChangedWeights], spec: NetworkSpec, tmp_path: Path
) -> None:
    """With the checkpoint's own scales, no calibration; and the network is what the class makes of its weights."""
    sources, weights = widened
    model = export_denoiser(spec)
    assert not any(tensor.data_type == onnx.TensorProto.FLOAT8E4M3FN for tensor in model.graph.initializer)
    eight_bit = {key: weights.changes[key].source for key in weights.stored_scales}
    refs = {ref.key: ref for ref in spec.weights.values()} | eight_bit
    settings = PrecisionSettings(
        folder=tmp_path,
        location=lambda path: path.name,
        surroundings="fp32",
        together=frozenset({"fp8-mixed"}),
        stored_scales=weights.stored_scales,
    )
    variant = apply_precision(model, "denoiser", "fp8-mixed", refs, settings)
    for file in {scaled.checkpoint.path, weights.path}:
        (tmp_path / file.name).hardlink_to(file)
    path = tmp_path / "denoiser.onnx"
    path.write_bytes(variant.model.SerializeToString())
    (written,) = tmp_path.glob("denoiser-fp8-*.safetensors")
    stored = load_file(scaled.checkpoint.path)
    codes = load_file(written)
    assert {key.removesuffix("/fp8") for key in codes if key.endswith("/fp8")} == set(eight_bit)
    for key in eight_bit:
        assert torch.equal(codes[f"{key}/fp8"].view(torch.uint8), stored[key].T.contiguous().view(torch.uint8))
        assert torch.equal(codes[f"{key}/fp8_scale"], stored[f"{key}_scale"])
    rows = weight_rows("denoiser", path, {ref.key: ref for ref in spec.weights.values()})
    assert [(row.output, row.passed) for row in rows] == [("weights", True), ("fp8 weights", True)]
    reference = REFERENCES["denoiser"](sources, spec)
    feeds = reference.feeds({"f": 3, "h": 2, "w": 2, "Na": 7}, 1)
    with torch.no_grad():
        expected = reference.outputs(feeds)["latent_next"]
    found = open_runner("denoiser", path, tensor_specs(spec.inputs), tensor_specs(spec.outputs)).run(feeds)
    assert 1e-6 < relative_error(found["latent_next"], expected) < limit_of("denoiser", "fp8-mixed").relative


def test_a_lora_takes_a_layer_out_of_fp8(scaled: Sources, tmp_path: Path) -> None:
    down, up = torch.full((2, 128), 0.01), torch.full((128, 2), 0.02)
    layer = QUERY.removeprefix("model.")
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, tmp_path / "a.safetensors")
    paths = scaled.checkpoint.path, scaled.text_encoder.path, scaled.upsampler.path
    _, weights = Sources.open(*paths, [LoraFile(tmp_path / "a.safetensors", 0.5)]).with_changes(tmp_path)
    assert weights is not None
    assert set(weights.changes) - set(weights.stored_scales) == {f"{QUERY}.weight"}
    list(weights.write())
    stored = load_file(scaled.checkpoint.path)
    exact = stored[f"{QUERY}.weight"].float() * stored[f"{QUERY}.weight_scale"] + 0.5 * up @ down
    found = load_file(weights.path)[f"{QUERY}.weight"]
    assert torch.allclose(found.float(), exact, rtol=2**-8, atol=1e-7)


@pytest.mark.slow
@pytest.mark.usefixtures("traced_before")
def test_a_bundle_of_an_fp8_checkpoint_with_a_lora(scaled: Sources, tmp_path: Path) -> None:
    """Every precision of the presets, and all of it is what the torch class makes of the changed weights."""
    layer = QUERY.removeprefix("model.")
    generator = torch.Generator().manual_seed(0)
    lora = {
        f"{layer}.lora_A.weight": torch.randn(2, 128, generator=generator),
        f"{layer}.lora_B.weight": torch.randn(128, 2, generator=generator) * 0.05,
    }
    save_file(lora, tmp_path / "style.safetensors")
    given = LoraFile(tmp_path / "style.safetensors", 0.5)
    sources = Sources.open(scaled.checkpoint.path, scaled.text_encoder.path, scaled.upsampler.path, [given])
    options = replace(
        TINY_OPTIONS,
        check=False,
        precisions="presets",
        calibrating=CalibrationOptions(width=128, height=128, frames=9, clips=CLIPS[:2]),
    )
    steps = list(export_bundle(sources, tmp_path / "bundle", options))
    assert any("102 weights are changed" in step.note for step in steps)
    bundle = Bundle.open(tmp_path / "bundle", verify=True)
    (entry,) = bundle.manifest.model.loras
    assert (entry.name, entry.scale, entry.sha256) == ("style", 0.5, file_sha256(given.path))
    assert bundle.manifest.model.checkpoint_sha256 == file_sha256(scaled.checkpoint.path)
    changed, weights = sources.with_changes(tmp_path)
    assert weights is not None
    list(weights.write())
    reports = [
        step.report
        for step in verify_bundle(bundle, changed, VerifyOptions(networks=["denoiser"], seed=1))
        if step.report is not None
    ]
    assert {report.precision for report in reports} == {"fp8", "fp8-mixed", "fp16"}
    assert all(report.passed for report in reports)
    # Published codes are taken as they are: only the fused layer and the recipe's own blocks are rounded to E4M3 here.
    eight_bit = {row.sizes["tensors"] for report in reports for row in report.rows if row.output == "fp8 weights"}
    assert eight_bit == {101 + 1, 101 + 1 + 50}
