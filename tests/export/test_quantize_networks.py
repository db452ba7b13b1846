# SPDX-License-Identifier: Apache-2.0
"""The tiny model in every precision: calibrated, retyped, quantised, linted, run, and compared with fp32."""

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto
from safetensors.torch import load_file, save_file

from ltxrt.bundle import Bundle
from ltxrt.errors import ExportError
from ltxrt.manifest import NETWORK_NAMES, NetworkEntry
from ltxrt.preset import load_preset, load_presets
from ltxrt_export.bundle_writer import BundleWriter
from ltxrt_export.denoiser_graph import export_denoiser
from ltxrt_export.exporter import Sources, tables
from ltxrt_export.lint.linter import lint_graph
from ltxrt_export.networks.denoiser import DenoiseStep, Semantics
from ltxrt_export.networks.spec import NetworkSpec
from ltxrt_export.onnx_export import export_model
from ltxrt_export.parity import relative_error
from ltxrt_export.quantize.calibrate import CalibrationOptions, CalibrationStep, calibrate
from ltxrt_export.quantize.calibration import Calibration
from ltxrt_export.quantize.clips import CLIPS
from ltxrt_export.quantize.fp8_weights import stored_scales
from ltxrt_export.quantize.graph import element_types, external_location, linears, stored_tensors
from ltxrt_export.quantize.precision import (
    PrecisionSettings,
    Variant,
    apply_precision,
    fp8_bytes,
    needed,
    variants,
)
from ltxrt_export.quantize.recipe import load_recipe
from ltxrt_export.quantize.recording import GraphTap, Taps, open_session
from ltxrt_export.quantize.sensitivity import record_feeds, sensitivity, table
from ltxrt_export.quantize.twin import rounding_twin
from ltxrt_export.weights import TensorFile

DIT = "model.diffusion_model."
Feeds = Mapping[str, np.ndarray]
SIZES = {"n": 23, "samples": 8_000, "h": 3, "w": 4, "f": 3, "Nv": 36, "Na": 31, "p": 1, "q": 1, "c": 0}
OTHER = {"n": 40, "samples": 9_600, "h": 4, "w": 4, "f": 4, "Nv": 64, "Na": 40, "p": 0, "q": 1, "c": 2}
OPTIONS = CalibrationOptions(width=128, height=128, frames=9, clips=CLIPS[:2])

#: Largest error of an output against fp32, by network and precision, with every node rounded as a GPU would: about
#: three times what was measured (decoder: first output, mean levels of 255).
LIMITS = {
    ("denoiser", "fp16"): 2e-3,
    ("denoiser", "bf16"): 1.5e-2,
    ("denoiser", "fp8"): 1e-1,
    ("denoiser", "fp8-mixed"): 1e-1,
    ("text_encoder", "fp16"): 3e-3,
    ("text_encoder", "fp8"): 1.2e-1,
    ("audio_encoder", "fp16"): 3e-3,
    ("image_encoder", "fp16"): 4e-3,
    ("upsampler", "fp16"): 3e-3,
    ("video_decoder", "fp16"): 3e-3,
}


@dataclass(frozen=True)
class Network:
    """An fp32 graph, where it lies, and inputs for it."""

    name: str
    path: Path
    entry: NetworkEntry
    model: ModelProto

    def shapes(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        return {port.name: tuple(size(entry, sizes) for entry in port.shape) for port in self.entry.inputs}

    def feeds(self) -> Feeds:
        generator = np.random.default_rng(11)
        shapes = self.shapes(SIZES)
        feeds: dict[str, np.ndarray] = {}
        for port in self.entry.inputs:
            shape = shapes[port.name]
            normal = generator.standard_normal(shape).astype(np.float32)
            feeds[port.name] = normal if port.dtype == "float32" else generator.integers(3, 100, shape)
        if self.name == "denoiser":
            row = (np.arange(36) >= 12).astype(np.int64)
            feeds |= {"token_row": row, "mask": row.reshape(1, -1, 1).astype(np.float32)}
            feeds["latent"] = np.where(feeds["mask"] == 0, feeds["clean"], feeds["latent"])
            feeds |= {"sigma": np.array([0.725], np.float32), "sigma_next": np.array([0.421875], np.float32)}
        return feeds


def size(entry: int | str, sizes: Mapping[str, int]) -> int:
    if isinstance(entry, int):
        return entry
    factor, _, symbol = entry.rpartition("*")
    return int(factor or 1) * sizes.get(symbol, 5)


@pytest.fixture(scope="module")
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny model in fp32: the shipped bundle if it is, else exported now."""
    shipped = Bundle.open()
    if {entry.network for entry in shipped.manifest.networks.values() if entry.precision == "fp32"} == {*NETWORK_NAMES}:
        return shipped
    sources: Sources = request.getfixturevalue("shipped_sources")
    specs: Mapping[str, NetworkSpec] = request.getfixturevalue("shipped_specs")
    path = tmp_path_factory.mktemp("fp32") / "tiny"
    with BundleWriter(path) as writer:
        keys = {
            name: writer.add_network(
                spec, (export_denoiser if name == "denoiser" else export_model)(spec, writer.location), "fp32"
            )
            for name, spec in specs.items()
        }
        writer.add_tokenizer(sources.text_encoder.tokenizer_path)
        writer.add_tables(tables(sources))
        writer.commit(shipped.manifest.model, {"high": keys}, {})
    return Bundle.open(path)


@pytest.fixture(scope="module")
def networks(bundle: Bundle) -> Mapping[str, Network]:
    found: dict[str, Network] = {}
    for entry in bundle.manifest.networks.values():
        if entry.precision == "fp32":
            path = bundle.file(entry.file)
            model = onnx.load(path, load_external_data=False)
            found[entry.network] = Network(entry.network, path, entry, model)
    return found


@pytest.fixture(scope="module")
def steps(bundle: Bundle) -> Sequence[CalibrationStep]:
    return list(calibrate(bundle, OPTIONS))


@pytest.fixture(scope="module")
def calibration(steps: Sequence[CalibrationStep]) -> Calibration:
    made = steps[-1].calibration
    assert made is not None
    return made


@pytest.fixture(scope="module")
def folder(networks: Mapping[str, Network], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All weight files, for graphs that are written there."""
    path = tmp_path_factory.mktemp("precisions")
    for network in networks.values():
        for location in {external_location(t) for t in network.model.graph.initializer if t.external_data}:
            # A copy: the checker refuses links.
            shutil.copyfile(network.path.parent / location, path / location)
    return path


@pytest.fixture(scope="module")
def settings(folder: Path, calibration: Calibration) -> PrecisionSettings:
    return PrecisionSettings(folder=folder, location=lambda path: path.name, calibration=calibration)


def made(network: Network, precision: str, settings: PrecisionSettings) -> Variant:
    weights = stored_tensors(network.model, network.path.parent)
    return apply_precision(network.model, network.name, precision, weights, settings)


def outputs(model: ModelProto, folder: Path, feeds: Feeds, *, exact: bool = False) -> list[np.ndarray]:
    return [np.asarray(value) for value in open_session(model, folder, threads=1, exact=exact).run(None, dict(feeds))]


def test_calibration_runs_every_step_of_every_clip(steps: Sequence[CalibrationStep], calibration: Calibration) -> None:
    assert [(step.index, step.total) for step in steps] == [(0, 11), *((index, 11) for index in range(12))]
    assert [step.calibration is None for step in steps] == [True] * 12 + [False]
    assert "every network whole" in steps[0].note
    assert {step.note for step in steps[1:]} == {""}
    assert len(calibration.made_from.stage_1_sigmas) == 9
    assert len(calibration.made_from.stage_2_sigmas) == 4
    assert "face at 1" in calibration.made_from.clips[1]


def test_calibration_covers_every_linear_layer(calibration: Calibration, networks: Mapping[str, Network]) -> None:
    for name in ("denoiser", "text_encoder"):
        keys = [linear.key for linear in linears(networks[name].model.graph)]
        ranges = calibration.networks[name].layers
        assert set(ranges) == set(keys)
        # A trained gate may shut all heads of an attention: nothing but zeros then enters its output projection.
        shut = {key for key, entry in ranges.items() if entry.amax == 0}
        assert all(re.search(r"_attn\.to_out\.0\.weight$", key) for key in shut)
        assert len(shut) < 4
        assert all(0 < entry.percentile <= entry.amax for key, entry in ranges.items() if key not in shut)
    blocks = "model.diffusion_model.transformer_blocks.0.attn1"
    layers = calibration.networks["denoiser"].layers
    assert (
        layers[f"{blocks}.to_q.weight"] == layers[f"{blocks}.to_k.weight"] == layers[f"{blocks}.to_gate_logits.weight"]
    )


def test_the_tap_gives_what_the_graph_gives(networks: Mapping[str, Network]) -> None:
    network = networks["denoiser"]
    feeds, name = network.feeds(), "block.0/linear"
    seen: list[Taps] = []
    tap = GraphTap(network.model, network.path.parent, [name], ["video/1"], threads=1)
    (found,) = tap.run([feeds], seen.append)
    (taps,) = seen
    np.testing.assert_allclose(
        found["latent_next"], outputs(network.model, network.path.parent, feeds)[0], rtol=1e-5, atol=1e-6
    )
    model = onnx.load(network.path, load_external_data=False)
    for output in (name, "video/1"):
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(output))
    _, value, stream = outputs(model, network.path.parent, feeds)
    np.testing.assert_allclose(taps.values[name], value, rtol=1e-4, atol=1e-5)
    assert taps.amax["video/1"] == pytest.approx(np.abs(stream).max(), rel=1e-5)


@pytest.fixture(scope="module")
def expected(networks: Mapping[str, Network]) -> Callable[[str], list[np.ndarray]]:
    """What each fp32 graph makes of its feeds, computed once."""

    @cache
    def run(name: str) -> list[np.ndarray]:
        return outputs(networks[name].model, networks[name].path.parent, networks[name].feeds())

    return run


@pytest.mark.parametrize(
    ("name", "precision"),
    [pytest.param(*key, marks=[pytest.mark.slow] if key[1] in ("bf16", "fp8-mixed") else []) for key in LIMITS],
)
def test_a_variant_is_valid_lints_clean_and_is_near_fp32(
    networks: Mapping[str, Network],
    settings: PrecisionSettings,
    expected: Callable[[str], list[np.ndarray]],
    name: str,
    precision: str,
) -> None:
    network = networks[name]
    # What FP16 cannot hold is fp32 here: ONNX Runtime has no BF16 kernels for the CPU.
    variant = made(network, precision, replace(settings, wide="fp32"))
    path = settings.folder / f"{name}-{precision}.onnx"
    path.write_bytes(variant.model.SerializeToString())
    onnx.checker.check_model(path, full_check=True)
    shapes = [network.shapes(SIZES), network.shapes(OTHER)]
    assert [str(found) for found in lint_graph(name, variant.model, shapes) if found.severity != "note"] == []
    # FP16 and BF16 as a GPU rounds them; FP8's own error is an order above that.
    rounding = "fp8" not in precision
    model = rounding_twin(variant.model) if rounding else variant.model
    found = outputs(model, settings.folder, network.feeds(), exact=rounding)
    assert [value.dtype for value in found] == [value.dtype for value in expected(name)]
    error = max(relative_error(*pair) for pair in zip(found, expected(name), strict=True))
    assert LIMITS[name, precision] / 100 < error < LIMITS[name, precision]
    if name == "denoiser":  # the first frame's 12 tokens are held, whatever the precision
        np.testing.assert_array_equal(found[0][:, :12], network.feeds()["clean"][:, :12])
    if rounding and precision != "bf16":
        plain = outputs(variant.model, settings.folder, network.feeds())
        assert max(relative_error(*pair) for pair in zip(plain, expected(name), strict=True)) <= LIMITS[name, precision]


def test_fp8_quantises_what_the_recipe_says_and_mixed_less(
    networks: Mapping[str, Network], settings: PrecisionSettings
) -> None:
    network = networks["denoiser"]
    keys = [linear.key for linear in linears(network.model.graph)]
    for precision, count in (("fp8", 5 * 28 - 6), ("fp8-mixed", 3 * 28)):
        variant = made(network, precision, settings)
        initializers = {tensor.name: tensor for tensor in variant.model.graph.initializer}
        stored = {name.removesuffix("/fp8") for name in initializers if name.endswith(".weight/fp8")}
        assert stored == set(load_recipe("denoiser", precision).select(keys).quantised)
        assert len(stored) == count
        assert not stored.intersection(initializers)
        assert {initializers[f"{key}/fp8_scale"].data_type for key in stored} == {TensorProto.FLOAT16}


def test_fp8_variants_share_one_weight_file(networks: Mapping[str, Network], settings: PrecisionSettings) -> None:
    files = {
        entry.value
        for precision in ("fp8", "fp8-mixed")
        for tensor in made(networks["denoiser"], precision, settings).model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location" and "fp8" in entry.value
    }
    assert len(files) == 1
    stored = stored_tensors(networks["denoiser"].model, networks["denoiser"].path.parent).values()
    planned = fp8_bytes(stored, "denoiser", ("fp8", "fp16", "fp8-mixed"))
    written = sum(ref.nbytes for ref in TensorFile.open(settings.folder / files.pop()).tensors.values())
    assert written <= planned < 1.1 * written
    assert fp8_bytes(stored, "denoiser", ("fp32", "fp16", "bf16")) == fp8_bytes(stored, "upsampler", ("fp8",)) == 0


def test_angles_steps_and_the_log_mel_stay_fp32(networks: Mapping[str, Network], settings: PrecisionSettings) -> None:
    for name, operators in (
        ("denoiser", ("Sin", "Cos", "ReduceMin")),
        ("audio_encoder", ("Log",)),
        ("text_encoder", ("Sin",)),
    ):
        model = made(networks[name], "fp16", settings).model
        kinds = element_types(model.graph)
        found = [node for node in model.graph.node if node.op_type in operators]
        assert found
        assert {kinds[value] for node in found for value in (*node.input[:1], *node.output)} == {TensorProto.FLOAT}


def test_fp8_in_fp32_surroundings(
    networks: Mapping[str, Network], settings: PrecisionSettings, expected: Callable[[str], list[np.ndarray]]
) -> None:
    network = networks["text_encoder"]
    variant = made(network, "fp8", replace(settings, surroundings="fp32"))
    found = outputs(variant.model, settings.folder, network.feeds())
    errors = [relative_error(*pair) for pair in zip(found, expected("text_encoder"), strict=True)]
    assert 1e-3 < max(errors) < LIMITS["text_encoder", "fp8"]


def test_large_tensors_of_the_calibration_widen_their_nodes(
    networks: Mapping[str, Network], settings: PrecisionSettings, calibration: Calibration
) -> None:
    ranges = calibration.networks["text_encoder"]
    stream = next(node.output[0] for node in networks["text_encoder"].model.graph.node if node.name == "node_add_169")
    planted = calibration.model_copy(
        update={
            "networks": {**calibration.networks, "text_encoder": ranges.model_copy(update={"large": {stream: 2e5}})}
        }
    )
    variant = made(networks["text_encoder"], "fp16", replace(settings, calibration=planted))
    assert [(excess.tensor, excess.operator) for excess in variant.excesses] == [(stream, "Add")]
    assert element_types(variant.model.graph)[stream] == TensorProto.BFLOAT16
    here = made(networks["text_encoder"], "fp16", replace(settings, calibration=planted, wide="fp32"))
    assert element_types(here.model.graph)[stream] == TensorProto.FLOAT
    outputs(here.model, settings.folder, networks["text_encoder"].feeds())


def test_a_published_fp8_checkpoint_brings_its_own_scales(
    networks: Mapping[str, Network], settings: PrecisionSettings, tmp_path: Path
) -> None:
    """The tiny checkpoint rewritten as the published FP8 files are: block 1 in E4M3, with scalar scales."""
    network = networks["denoiser"]
    weights = stored_tensors(network.model, network.path.parent)
    source = next(ref.path for key, ref in weights.items() if "transformer_blocks" in key)
    tensors = {key: value for key, value in load_file(source).items() if key in weights}
    chosen = [
        k
        for k in load_recipe("denoiser", "fp8").select(linear.key for linear in linears(network.model.graph)).quantised
        if "blocks.1." in k
    ]
    for key in chosen:
        scale = tensors[key].float().abs().max() / 448
        tensors[key] = (tensors[key].float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[key.replace(".weight", ".weight_scale")] = scale.reshape(())
        tensors[key.replace(".weight", ".input_scale")] = torch.tensor(8.0 / 448)
    save_file(tensors, tmp_path / "fp8.safetensors")
    file = TensorFile.open(tmp_path / "fp8.safetensors")
    model = ModelProto()
    model.CopyFrom(network.model)
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            ref = file.tensors[tensor.name]
            tensor.data_type = TensorProto.FLOAT8E4M3FN if ref.dtype == "F8_E4M3" else tensor.data_type
            for entry in tensor.external_data:
                entry.value = {"location": "fp8.safetensors", "offset": str(ref.offset), "length": str(ref.nbytes)}[
                    entry.key
                ]
    scales = stored_scales(file)
    assert set(scales) == set(chosen)
    own = replace(settings, folder=tmp_path, stored_scales=scales)
    variant = apply_precision(model, "denoiser", "fp8-mixed", file.tensors, own)
    assert variant.selection is not None
    assert set(chosen) < set(variant.selection.quantised)
    found = outputs(variant.model, tmp_path, network.feeds())[0]
    expected = outputs(network.model, network.path.parent, network.feeds())[0]
    assert relative_error(found, expected) < LIMITS["denoiser", "fp8"]
    with pytest.raises(ExportError, match=r"FP8 needs the range of the input of .* give a calibration"):
        apply_precision(model, "denoiser", "fp8-mixed", file.tensors, replace(own, calibration=None))


def test_presets_say_what_they_need() -> None:
    assert variants(load_preset("maximum"), bf16=True)["denoiser"] == "bf16"
    assert variants(load_preset("maximum"), bf16=False)["denoiser"] == "fp16"
    assert variants(load_preset("low"), bf16=False) == dict(load_preset("low").precision)
    table = needed(load_presets(), bf16=False)
    assert table["denoiser"] == ("fp8", "fp8-mixed", "fp16")
    assert table["video_decoder"] == ("fp16",)
    assert set(table) == set(NETWORK_NAMES)


def test_a_precision_that_a_network_does_not_come_in_is_refused(
    networks: Mapping[str, Network], settings: PrecisionSettings
) -> None:
    with pytest.raises(ExportError, match="upsampler does not come in 'fp8'; allowed: fp32, fp16, bf16"):
        made(networks["upsampler"], "fp8", settings)
    preset = replace(load_preset("low"), precision={"upsampler": "int8"})
    with pytest.raises(ExportError, match="upsampler does not come in 'int8'"):
        variants(preset, bf16=True)


def test_fp32_is_the_graph_itself(networks: Mapping[str, Network], settings: PrecisionSettings) -> None:
    assert made(networks["upsampler"], "fp32", settings).model is networks["upsampler"].model


def test_calibrating_networks_that_are_not_fp32_is_refused(bundle: Bundle) -> None:
    entries = {key: entry.model_copy(update={"precision": "fp16"}) for key, entry in bundle.manifest.networks.items()}
    other = replace(bundle, manifest=bundle.manifest.model_copy(update={"networks": entries}))
    with pytest.raises(ExportError, match="text_encoder is not there in fp32, which this needs: export with"):
        next(calibrate(other))


@pytest.mark.slow
def test_sensitivity_ranks_groups_of_layers(
    bundle: Bundle, networks: Mapping[str, Network], calibration: Calibration, tmp_path: Path
) -> None:
    feeds = record_feeds(bundle, next(iter(bundle.manifest.presets)))
    assert len(feeds) == 6
    assert feeds[0]["sigma"][0] == 1.0
    rows = list(sensitivity(networks["denoiser"].path, calibration, feeds[::3], "block", tmp_path))
    blocks = [row for row in rows if "transformer_blocks" in row.group]
    assert [row.group[-1] for row in blocks] == list("01234")
    assert sum(row.layers for row in rows) == len(linears(networks["denoiser"].model.graph))
    assert [sum(row.quantised[name] for row in rows) for name in ("fp8", "fp8-mixed")] == [134, 84]
    assert [bool(row.quantised["fp8-mixed"]) for row in blocks] == [False, True, True, True, False]
    assert {"patchify_proj", "audio_patchify_proj", "proj_out"} < {row.group for row in rows if row not in blocks}
    assert all(1e-6 < row.error < 0.1 for row in blocks)
    text = table(rows).splitlines()
    assert len(text) == len(rows) + 1
    assert [float(line.split()[-1]) for line in text[1:]] == sorted(
        (float(f"{r.error:.2e}") for r in rows), reverse=True
    )


def test_sensitivity_is_what_torch_makes_of_the_same_rounding(
    shipped_sources: Sources,
    bundle: Bundle,
    networks: Mapping[str, Network],
    calibration: Calibration,
    tmp_path: Path,
) -> None:
    """One of the first groups, rounded once more by a hook on the torch class."""
    group = "patchify_proj"
    feeds = record_feeds(bundle, next(iter(bundle.manifest.presets)))[2:3]
    rows = sensitivity(networks["denoiser"].path, calibration, feeds, "kind", tmp_path)
    row = next(row for row in rows if row.group == group)
    step = DenoiseStep(shipped_sources.checkpoint.component("transformer").load(), Semantics.R3).eval()
    inputs = [torch.from_numpy(feeds[0][port.name]) for port in networks["denoiser"].entry.inputs]
    with torch.no_grad():
        expected = step(*inputs).double()
        layer, amax = step.pre.proj_in, calibration.networks["denoiser"].layers[f"{DIT}{group}.weight"].amax
        layer.register_forward_pre_hook(lambda _, given: (rounded_to_fp8(given[0], amax),))
        layer.weight.copy_(rounded_to_fp8(layer.weight, layer.weight.abs().amax(dim=1, keepdim=True)))
        found = step(*inputs).double()
    assert (row.layers, row.quantised) == (1, {"fp8": 0, "fp8-mixed": 0})
    assert row.error == pytest.approx(float((found - expected).norm() / expected.norm()), rel=0.03)


def rounded_to_fp8(values: torch.Tensor, amax: torch.Tensor | float) -> torch.Tensor:
    """E4M3 and back, saturating at ``amax``."""
    scale = amax / 448
    return (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def test_scales_survive_in_16_bits(networks: Mapping[str, Network], settings: PrecisionSettings) -> None:
    """No weight's scale is below the smallest normal fp16 number, where its precision would go."""
    model = made(networks["denoiser"], "fp8", settings).model
    scales = [tensor for tensor in model.graph.initializer if tensor.name.endswith("/fp8_scale")]
    for tensor in scales:
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            path = settings.folder / entries["location"]
            values = np.fromfile(path, np.float16, int(entries["length"]) // 2, offset=int(entries["offset"]))
        else:
            values = onnx.numpy_helper.to_array(tensor)
        assert (values >= ml_dtypes.finfo(np.float16).smallest_normal).all()
