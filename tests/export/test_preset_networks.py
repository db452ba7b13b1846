# SPDX-License-Identifier: Apache-2.0
"""All presets of the tiny model: exported, linted, opened by the runtime, rendered, and each network compared."""

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from ltxrt.bundle import Bundle
from ltxrt.cli import run
from ltxrt.errors import ExportError
from ltxrt.manifest import NETWORK_NAMES
from ltxrt.media import bundled_speech
from ltxrt.preset import PRESET_NAMES, load_presets
from ltxrt.readback import check_clip
from ltxrt_export import exporter
from ltxrt_export.engines.buckets import load_buckets
from ltxrt_export.exporter import ExportOptions, ExportStep, Sources, export_bundle, stages
from ltxrt_export.lint.linter import lint_bundle
from ltxrt_export.networks.spec import NetworkSpec
from ltxrt_export.parity import ParityRow, limit_of
from ltxrt_export.preset_networks import PresetNetworks, Trial, preset_fp8_bytes, record_trials
from ltxrt_export.quantize import calibrate
from ltxrt_export.quantize.calibrate import CalibrationOptions
from ltxrt_export.quantize.calibration import Calibration, NetworkRanges
from ltxrt_export.quantize.clips import CLIPS
from ltxrt_export.quantize.precision import needed, variants
from ltxrt_export.tiny_bundle import TINY_OPTIONS

#: One small clip instead of eight: what is asked here is not how good the ranges are.
CALIBRATING = CalibrationOptions(width=128, height=128, frames=9, clips=CLIPS[1:2])
OPTIONS = replace(TINY_OPTIONS, precisions="presets", calibrating=CALIBRATING)


@pytest.fixture(scope="module")
def traced(fp32_graphs: Mapping[str, Path]) -> Generator[None]:
    """Graphs that are there already stand for tracing, and parity in fp32 is for other tests."""

    def loaded(spec: NetworkSpec, location: object) -> ModelProto:
        return onnx.load(fp32_graphs[spec.name], load_external_data=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "export_model", loaded)
        patch.setattr(exporter, "export_denoiser", loaded)
        patch.setattr(exporter, "check_network", lambda *_: ())
        yield


@dataclass(frozen=True)
class Exported:
    path: Path
    steps: Sequence[ExportStep]

    @property
    def rows(self) -> list[ParityRow]:
        return [row for step in self.steps for row in step.rows]

    def calibration(self) -> Calibration:
        return Calibration.load(self.path / "calibration.json")


Export = Callable[[str, ExportOptions], Exported]


@pytest.fixture(scope="module")
def export(traced: None, shipped_sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Export:
    folder = tmp_path_factory.mktemp("presets")

    def made(name: str, options: ExportOptions) -> Exported:
        return Exported(folder / name, list(export_bundle(shipped_sources, folder / name, options)))

    return made


@pytest.fixture(scope="module")
def cpu(export: Export) -> Exported:
    """For a CPU, calibrated on the way, every variant checked."""
    return export("cpu", OPTIONS)


def test_fp8_needs_at_most_so_much_room(shipped_specs: Mapping[str, NetworkSpec]) -> None:
    planned = preset_fp8_bytes(shipped_specs)
    only = {"upsampler": shipped_specs["upsampler"], "denoiser": shipped_specs["denoiser"]}
    assert 0 < preset_fp8_bytes(only) < planned


def test_stages_depend_on_what_is_given() -> None:
    assert stages(ExportOptions()) == ("weights", *NETWORK_NAMES, "manifest")
    assert stages(OPTIONS) == ("weights", *NETWORK_NAMES, "calibration", "presets", "manifest")
    given = replace(OPTIONS, calibration=Calibration.model_construct())
    assert stages(given) == ("weights", *NETWORK_NAMES, "presets", "manifest")


@pytest.mark.slow
def test_steps_of_an_export_of_all_presets(cpu: Exported, shipped_specs: Mapping[str, NetworkSpec]) -> None:
    assert tuple(dict.fromkeys(step.description for step in cpu.steps)) == (*stages(OPTIONS), "done")
    assert [step.index for step in cpu.steps] == sorted(step.index for step in cpu.steps)
    assert cpu.steps[-1].index == cpu.steps[-1].total == len(stages(OPTIONS))
    # The room that was announced was enough, and not much too much.
    written = sum(path.stat().st_size for path in cpu.path.rglob("*-fp8-*.safetensors"))
    assert 0.9 * written < preset_fp8_bytes(shipped_specs) < 1.6 * written
    assert "made in FP8" in cpu.steps[0].note
    assert [(step.done, step.size) for step in cpu.steps if step.description == "presets"][-1] == (9, 9)


@pytest.mark.slow
def test_every_variant_was_run_and_is_near_fp32(cpu: Exported) -> None:
    table = needed(load_presets(), bf16=False)
    wanted = [f"{name} {precision}" for name, precisions in table.items() for precision in precisions]
    assert [row.network for row in cpu.rows] == wanted
    for row in cpu.rows:
        assert row.limit == limit_of(*row.network.split()).relative
        # An error of nothing would be a comparison of fp32 with itself.
        assert 1e-6 < row.error < row.limit
    errors = {row.network: row.error for row in cpu.rows}
    assert errors["denoiser fp16"] < errors["denoiser fp8-mixed"] < errors["denoiser fp8"]


@pytest.mark.slow
def test_each_preset_has_its_precisions_and_equal_networks_are_stored_once(cpu: Exported) -> None:
    manifest = Bundle.open(cpu.path, verify=True).manifest
    assert set(manifest.presets) == set(PRESET_NAMES)
    for preset in load_presets():
        found = {name: manifest.networks[key].precision for name, key in manifest.presets[preset.name].items()}
        assert found == variants(preset, bf16=False)
    # Six networks, and two more precisions of the denoiser and one of the text encoder.
    assert len(manifest.networks) == len(NETWORK_NAMES) + 3
    assert manifest.presets["low"] == manifest.presets["medium"]
    for name in ("audio_encoder", "image_encoder", "upsampler", "video_decoder"):
        assert len({keys[name] for keys in manifest.presets.values()}) == 1
    # Nothing of fp32 is left, and FP8 weights are there once for a network.
    files = {path.name for path in (cpu.path / "networks").iterdir()}
    assert files == {Path(file).name for file in manifest.files if file.startswith("networks/")}
    assert not any("fp32" in name for name in files)
    assert sorted(name.split("-fp8-")[0] for name in files if "-fp8-" in name and name.endswith(".safetensors")) == [
        "denoiser",
        "text_encoder",
    ]
    assert [path.name for path in cpu.path.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_the_linter_finds_no_error(cpu: Exported) -> None:
    findings = list(lint_bundle(cpu.path, load_buckets(None)))
    assert [str(found) for found in findings if found.severity == "error"] == []


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_the_runtime_renders_every_preset(
    cpu: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str], preset: str
) -> None:
    clip = tmp_path / "clip.mp4"
    flags = ["--bundle", str(cpu.path), "--audio", str(bundled_speech()), "--video-quality", preset]
    flags += ["--no-match-audio-length", "--num-frames", "9", "--resolution", "128x128", "--seed", "3", "--json"]
    assert run(["generate", "--prompt", "A red ball.", *flags, "--output", str(clip)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["frames"] == 9
    report = check_clip(clip)
    assert report.ok
    assert (report.frames, report.width, report.height) == (9, 128, 128)


def notes_of(exported: Exported) -> list[str]:
    """A line for every tensor that FP16 cannot hold."""
    return [line for step in exported.steps if step.description == "presets" for line in step.note.splitlines()]


@pytest.mark.slow
def test_for_a_gpu_the_finest_preset_is_bf16_and_so_is_what_fp16_cannot_hold(
    cpu: Exported, export: Export, fp32_graphs: Mapping[str, Path]
) -> None:
    """All else is as for the CPU. Not run here: BF16 is for a GPU."""
    graph = onnx.load(fp32_graphs["upsampler"], load_external_data=False).graph
    tensor = next(node.output[0] for node in graph.node if node.op_type == "Conv")
    made = cpu.calibration()
    planted = made.model_copy(
        update={"networks": {**made.networks, "upsampler": NetworkRanges(layers={}, large={tensor: 1e5})}}
    )
    found = export("gpu", replace(OPTIONS, backend="gpu", calibration=planted, check=False))
    gpu, other = Bundle.open(found.path).manifest, Bundle.open(cpu.path).manifest
    maximum = gpu.presets["maximum"]
    assert gpu.networks[maximum["denoiser"]].precision == "bf16"
    # What leaves the range of FP16 by itself is fp32 there and BF16 here.
    wide = {"upsampler", *(line.split()[0] for line in notes_of(cpu))}
    lower = {key for key, network in gpu.networks.items() if network.precision != "fp32" and key.split("-")[0] in wide}
    assert {key for key in gpu.networks if key not in other.networks} == {maximum["denoiser"], *lower}
    (note,) = (line for line in notes_of(found) if line.startswith("upsampler"))
    assert note.startswith(f"upsampler fp16: {tensor} reaches 100000, too much for FP16, and is BF16 (Conv near ")
    assert found.rows == []
    assert found.calibration() == planted


@pytest.mark.slow
def test_a_calibration_of_another_model_is_refused(cpu: Exported, export: Export) -> None:
    made = cpu.calibration()
    other = made.model_copy(update={"made_from": made.made_from.model_copy(update={"checkpoint_sha256": "0" * 64})})
    with pytest.raises(ExportError, match=r"the calibration was made from ltx-2\.3-tiny 0{12} by rules R3, this is"):
        export("other", replace(OPTIONS, calibration=other))
    assert not (cpu.path.parent / "other").exists()


@pytest.mark.slow
def test_trials_are_the_first_and_the_last_run_of_a_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    real = calibrate.run_clip

    def seen(*given: object) -> object:
        seeds.append(given[-1])  # type: ignore[arg-type]
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("ltxrt_export.preset_networks.run_clip", seen)
    trials = record_trials(Bundle.open(), "high", CALIBRATING)
    assert seeds == [CALIBRATING.seed - 1]
    assert {name: len(runs) for name, runs in trials.items()} == {
        "text_encoder": 1,
        "audio_encoder": 1,
        "image_encoder": 2,  # one for each stage's size
        "denoiser": 2,
        "upsampler": 1,
        "video_decoder": 1,
    }
    first, last = (trial.feeds for trial in trials["denoiser"])
    assert (first["sigma"][0], last["sigma_next"][0]) == (1.0, 0.0)
    assert last["latent"].shape[1] == 4 * first["latent"].shape[1]


def test_a_variant_that_is_off_is_refused(
    shipped_specs: Mapping[str, NetworkSpec], fp32_graphs: Mapping[str, Path]
) -> None:
    """The worst of all outputs counts, and it is named with its size."""

    class Written:
        weights_folder = Path()
        location = sha256 = None

        def path_of(self, key: str) -> Path:
            assert key == "key"
            return fp32_graphs["upsampler"]

    making = PresetNetworks(Written(), shipped_specs, {}, None, "cpu")  # type: ignore[arg-type]
    feeds = {"latent": np.ones((1, 32, 2, 2, 3), np.float32)}
    right = making._rows(
        "upsampler", "fp32", "key", (Trial(feeds, {"upsampled": np.zeros((1, 32, 2, 4, 6), np.float32)}),)
    )
    assert next(right).error > 1
    with pytest.raises(
        ExportError, match=r"^upsampler fp16: upsampled at {'f': 2, 'h': 2, 'w': 3} is off from fp32 by"
    ):
        making._check(
            "upsampler", "fp16", "key", (Trial(feeds, {"upsampled": np.zeros((1, 32, 2, 4, 6), np.float32)}),)
        )
