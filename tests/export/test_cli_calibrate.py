# SPDX-License-Identifier: Apache-2.0
"""``ltxrt-export calibrate`` and ``sensitivity``: one small file or nothing, and a table."""

import json
from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx import ModelProto
from safetensors.torch import save_file

from ltxrt.bundle import Bundle
from ltxrt.manifest import LoraEntry
from ltxrt_export import exporter
from ltxrt_export.cli import run
from ltxrt_export.networks.spec import NetworkSpec
from ltxrt_export.quantize import calibrate, recording, sensitivity
from ltxrt_export.quantize.calibrate import CalibrationOptions, CalibrationStep
from ltxrt_export.quantize.calibration import Calibration, LayerRange, NetworkRanges, Origin
from ltxrt_export.quantize.clips import CLIPS
from ltxrt_export.quantize.sensitivity import SensitivityRow
from ltxrt_export.tiny_bundle import shipped_tiny

Capture = pytest.CaptureFixture[str]


def calibration_of(bundle: Bundle) -> Calibration:
    model = bundle.manifest.model
    origin = Origin(
        model=model.name,
        checkpoint_sha256=model.checkpoint_sha256,
        semantics=model.semantics,
        stage_1_sigmas=(1.0, 0.0),
        stage_2_sigmas=(),
        clips=("a clip",),
    )
    ranges = NetworkRanges(layers={"a.weight": LayerRange(amax=2.0, percentile=1.0)}, large={"t": 9000.0, "u": 2e5})
    return Calibration(made_from=origin, networks={"denoiser": ranges, "upsampler": NetworkRanges(layers={}, large={})})


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> list[str]:
    paths = shipped_tiny(tmp_path / "model")
    return [
        f"--checkpoint={paths.checkpoint}",
        f"--text-encoder={paths.text_encoder}",
        f"--upsampler={paths.upsampler}",
    ]


@pytest.fixture
def traced(fp32_graphs: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(spec: NetworkSpec, location: object) -> ModelProto:
        return onnx.load(fp32_graphs[spec.name], load_external_data=False)

    monkeypatch.setattr(exporter, "export_model", loaded)
    monkeypatch.setattr(exporter, "export_denoiser", loaded)


@pytest.fixture
def clips(monkeypatch: pytest.MonkeyPatch) -> list[Bundle]:
    """Stands for running the clips: what it was given."""
    seen: list[Bundle] = []

    def fake(bundle: Bundle, options: CalibrationOptions) -> Generator[CalibrationStep]:
        assert options == CalibrationOptions()
        seen.append(bundle)
        assert Path.cwd() in bundle.path.parents
        yield CalibrationStep(0, 1)
        yield CalibrationStep(1, 1, calibration=calibration_of(bundle))

    monkeypatch.setattr(exporter, "calibrate", fake)
    return seen


def test_the_result_is_a_small_file(
    work: Path, model: list[str], traced: None, clips: list[Bundle], capsys: Capture
) -> None:
    assert run(["calibrate", *model, "--out", "new/c.json"]) == 0
    out, err = capsys.readouterr()
    assert out == "new/c.json\n"
    assert "denoiser: 2 tensors near the limit of FP16 or beyond, the largest u (200000)" in err
    assert "calibration: 1/1" in err
    assert "upsampler: 0 tensors" not in err
    # The networks that were run are gone, and the file is the one that export takes.
    assert [path.name for path in (work / "new").iterdir()] == ["c.json"]
    assert Calibration.load(work / "new" / "c.json") == calibration_of(clips[0])
    assert {entry.precision for entry in clips[0].manifest.networks.values()} == {"fp32"}


def test_the_result_as_json(work: Path, model: list[str], traced: None, clips: list[Bundle], capsys: Capture) -> None:
    (work / "c.json").write_text("old")
    assert run(["calibrate", *model, "--out", "c.json", "--overwrite", "--semantics", "R1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "calibration": "c.json",
        "clips": ["a clip"],
        "networks": {
            "denoiser": {"layers": 1, "near_fp16_limit": {"t": 9000.0, "u": 2e5}},
            "upsampler": {"layers": 0, "near_fp16_limit": {}},
        },
    }
    assert Calibration.load(work / "c.json").made_from.semantics == "R1"


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_what_is_there_is_refused_before_any_work(
    work: Path, model: list[str], capsys: Capture, flags: list[str]
) -> None:
    """A file unless it may be replaced, a folder always."""
    (work / "c.json").mkdir() if flags else (work / "c.json").write_text("old")
    assert run(["calibrate", *model, "--out", "c.json", *flags]) == 7
    assert "c.json: exists already; choose another file" in capsys.readouterr().err
    assert [path.name for path in work.iterdir()] == ["c.json"]


def test_an_interruption_leaves_what_was_there(
    work: Path, model: list[str], traced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        assert any(work.rglob("*.onnx"))
        raise KeyboardInterrupt

    (work / "c.json").write_text("old")
    monkeypatch.setattr(exporter, "calibrate", interrupted)
    assert run(["calibrate", *model, "--out", "c.json", "--overwrite"]) == 130
    assert [path.read_text() for path in work.rglob("*")] == ["old"]


def test_a_calibration_goes_with_the_presets(work: Path, model: list[str], capsys: Capture) -> None:
    calibration_of(Bundle.open()).save(work / "c.json")
    for command in (["export", *model], ["tiny"]):
        assert run([*command, "--out", "bundle", "--calibration", "c.json"]) == 2
        assert "--calibration" in capsys.readouterr().err
        assert run([*command, "--out", "bundle", "--precision", "presets", "--calibration", "nowhere"]) == 9
        assert capsys.readouterr().err == "error: nowhere: cannot be read: No such file or directory\n"
    assert [path.name for path in work.iterdir()] == ["c.json"]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, fp32_graphs: Mapping[str, Path]) -> list[object]:
    """Stands for the measurement: what it was given."""
    seen: list[object] = []

    def fake(graph: Path, ranges: Calibration, feeds: str, by: str, folder: Path) -> Generator[SensitivityRow]:
        assert (feeds, list(folder.iterdir())) == ("feeds", [])
        seen.extend((graph, ranges, by))
        yield SensitivityRow("a", 2, {"fp8": 2, "fp8-mixed": 0}, 20, 1e-4)
        yield SensitivityRow("b", 1, {"fp8": 1, "fp8-mixed": 1}, 10, 3e-3)

    monkeypatch.setattr(sensitivity, "sensitivity", fake)
    monkeypatch.setattr(sensitivity, "record_feeds", lambda bundle, preset: "feeds")
    monkeypatch.setattr(calibrate, "fp32_entry", lambda bundle, name: next(iter(bundle.manifest.networks.values())))
    return seen


def test_sensitivity_lists_the_worst_first(work: Path, measured: list[object], capsys: Capture) -> None:
    shipped = Bundle.open()
    calibration_of(shipped).save(work / "c.json")
    assert run(["sensitivity", str(shipped.path), "--calibration", "c.json", "--by", "block"]) == 0
    out, err = capsys.readouterr()
    assert [line.split() for line in out.splitlines()] == [
        ["group", "layers", "fp8", "fp8-mixed", "parameters", "error"],
        ["b", "1", "1", "1", "10", "3.00e-03"],
        ["a", "2", "2", "0", "20", "1.00e-04"],
    ]
    assert err == "a: 1.00e-04\nb: 3.00e-03\n"
    assert measured[1:] == [calibration_of(shipped), "block"]
    assert run(["sensitivity", str(shipped.path), "--calibration", "c.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "bundle": str(shipped.path),
        "by": "layer",
        "rows": [
            {"group": "b", "layers": 1, "quantised": {"fp8": 1, "fp8-mixed": 1}, "parameters": 10, "error": 3e-3},
            {"group": "a", "layers": 2, "quantised": {"fp8": 2, "fp8-mixed": 0}, "parameters": 20, "error": 1e-4},
        ],
    }


def test_sensitivity_refuses_the_calibration_of_another_model(
    work: Path, measured: list[object], capsys: Capture
) -> None:
    made = calibration_of(Bundle.open())
    other = made.model_copy(update={"made_from": made.made_from.model_copy(update={"semantics": "R2"})})
    other.save(work / "c.json")
    assert run(["sensitivity", str(Bundle.open().path), "--calibration", "c.json"]) == 9
    assert "by rules R2, this is ltx-2.3-tiny" in capsys.readouterr().err
    assert measured == []


def test_loras_device_and_memory_reach_the_calibration(
    work: Path, model: list[str], traced: None, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    seen: list[tuple[Bundle, CalibrationOptions]] = []

    def fake(bundle: Bundle, options: CalibrationOptions) -> Generator[CalibrationStep]:
        seen.append((bundle, options))
        yield CalibrationStep(0, 1, "every network whole")
        yield CalibrationStep(1, 1, calibration=calibration_of(bundle))

    monkeypatch.setattr(exporter, "calibrate", fake)
    layer = "diffusion_model.transformer_blocks.0.attn1.to_q"
    save_file(
        {f"{layer}.lora_A.weight": torch.ones(1, 128), f"{layer}.lora_B.weight": torch.zeros(128, 1)},
        "style.safetensors",
    )
    command = ["calibrate", *model, "--out", "c.json", "--lora", "style.safetensors:0.5"]
    assert run([*command, "--device", "cuda", "--memory", "1.5"]) == 0
    ((bundle, options),) = seen
    assert [(lora.name, lora.scale) for lora in bundle.manifest.model.loras] == [("style", 0.5)]
    assert (options.device, options.memory_bytes) == ("cuda", 1_500_000_000)
    err = capsys.readouterr().err
    assert "1 weights are changed" in err
    assert "every network whole\n" in err


def test_a_calibration_with_a_lora_is_refused_without_it(
    work: Path, model: list[str], traced: None, capsys: Capture
) -> None:
    """Before anything is exported; that it may be taken even so is in test_quantize_calibration.py."""
    made = calibration_of(Bundle.open())
    style = LoraEntry(name="style", scale=0.5, sha256="ef" * 32)
    made.model_copy(update={"made_from": made.made_from.model_copy(update={"loras": (style,)})}).save(work / "c.json")
    command = ["export", *model, "--out", "bundle", "--precision", "presets", "--calibration", "c.json"]
    assert run(command) == 9
    assert "made with LoRA style x 0.5 (efefefefefef), this model has no LoRA" in capsys.readouterr().err
    assert [path.name for path in work.iterdir()] == ["c.json"]
    # Said so, it goes on to the layers, which this file has none of.
    assert run([*command, "--other-loras", "--no-check"]) == 9
    assert "lacks" in capsys.readouterr().err


def test_without_a_gpu_cuda_is_refused_in_one_line(
    work: Path, model: list[str], traced: None, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(recording.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert run(["calibrate", *model, "--out", "c.json", "--device", "cuda"]) == 6
    assert "error: this ONNX Runtime knows no GPU: uninstall onnxruntime, install" in capsys.readouterr().err
    assert list(work.iterdir()) == []


@pytest.mark.slow
def test_a_calibration_of_the_tiny_model_fits_its_networks_and_is_the_same_in_parts(
    work: Path, model: list[str], traced: None, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The real thing, on one small clip."""
    small = CalibrationOptions(width=64, height=64, frames=9, clips=CLIPS[1:2], segment_bytes=5 * 10**6)
    real = exporter.calibrate
    monkeypatch.setattr(
        exporter, "calibrate", lambda bundle, given: real(bundle, replace(small, memory_bytes=given.memory_bytes))
    )
    assert run(["calibrate", *model, "--out", "c.json"]) == 0
    assert "calibration: every network whole" in capsys.readouterr().err
    made = Calibration.load(work / "c.json")
    made.check_model(Bundle.open().manifest.model)
    assert len(made.networks["denoiser"].layers) > 100
    assert (work / "c.json").stat().st_size < 50_000
    assert run(["calibrate", *model, "--out", "parts.json", "--memory", "1.06"]) == 0
    assert (
        "calibration: a few layers at a time of denoiser (10.0 MB in fp32), the rest whole" in capsys.readouterr().err
    )
    parts = Calibration.load(work / "parts.json")
    assert parts.made_from == made.made_from
    for name, ranges in made.networks.items():
        assert set(parts.networks[name].layers) == set(ranges.layers)
        for key, layer in ranges.layers.items():
            # Four digits are kept of each; a percentile may fall into the next bin, 1.6 % further.
            other = parts.networks[name].layers[key]
            assert other.amax == pytest.approx(layer.amax, rel=1.1e-3)
            assert other.percentile == pytest.approx(layer.percentile, rel=2e-2)
        assert parts.networks[name].large == pytest.approx(ranges.large, rel=1.1e-3)
