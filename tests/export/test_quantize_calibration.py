# SPDX-License-Identifier: Apache-2.0
"""The calibration file: what it keeps, that it is checked against the model, and that reading it never guesses."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltxrt.bundle import Bundle
from ltxrt.errors import ExportError, OutputError
from ltxrt.manifest import LoraEntry
from ltxrt_export.quantize.calibration import Calibration, LayerRange, NetworkRanges, Origin, rounded
from ltxrt_export.quantize.clips import CLIPS, IMAGES, SOUNDS

ORIGIN = Origin(
    model="m", checkpoint_sha256="ab" * 32, semantics="R3", stage_1_sigmas=(1.0, 0.0), stage_2_sigmas=(), clips=("c",)
)
CALIBRATION = Calibration(
    made_from=ORIGIN,
    networks={
        "denoiser": NetworkRanges(layers={"a.weight": LayerRange(amax=3.0, percentile=2.0)}, large={"t": 9000.0})
    },
)


def test_it_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    CALIBRATION.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == CALIBRATION
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_ranges_by_layer_and_kind() -> None:
    assert CALIBRATION.ranges("denoiser", ["a.weight"], "amax") == {"a.weight": 3.0}
    assert CALIBRATION.ranges("denoiser", ["a.weight"], "percentile") == {"a.weight": 2.0}


@pytest.mark.parametrize(("network", "key"), [("denoiser", "b.weight"), ("text_encoder", "a.weight")])
def test_a_layer_that_was_not_calibrated_is_named(network: str, key: str) -> None:
    with pytest.raises(ExportError, match=rf"'{network}' lacks 1 layers \({key}\): calibrate again"):
        CALIBRATION.ranges(network, [key], "amax")


def test_another_checkpoint_or_other_rules_are_refused() -> None:
    model = Bundle.open().manifest.model.model_copy(update={"checkpoint_sha256": "ab" * 32, "semantics": "R3"})
    CALIBRATION.check_model(model)
    with pytest.raises(ExportError, match=r"made from m abababababab by rules R3, this is .* cdcdcdcdcdcd by rules R3"):
        CALIBRATION.check_model(model.model_copy(update={"checkpoint_sha256": "cd" * 32}))
    with pytest.raises(ExportError, match=r"by rules R3, this is .* abababababab by rules R1: calibrate again"):
        CALIBRATION.check_model(model.model_copy(update={"semantics": "R1"}))


STYLE = LoraEntry(name="style", scale=0.5, sha256="ef" * 32)
OTHER = LoraEntry(name="other", scale=1.0, sha256="01" * 32)


@pytest.mark.parametrize(
    ("made", "used", "words"),
    [
        ((STYLE,), (), r"made with LoRA style x 0.5 \(efefefefefef\), this model has no LoRA: calibrate again"),
        ((), (STYLE,), r"made with no LoRA, this model has LoRA style x 0.5 \(efefefefefef\): calibrate again"),
        ((STYLE,), (STYLE.model_copy(update={"scale": 0.75}),), "this model has LoRA style x 0.75"),
        ((STYLE,), (STYLE, OTHER), r"has LoRA style x 0.5 \(efefefefefef\), other x 1 \(010101010101\)"),
    ],
)
def test_other_loras_are_refused_unless_that_is_said(
    made: tuple[LoraEntry, ...], used: tuple[LoraEntry, ...], words: str
) -> None:
    model = Bundle.open().manifest.model.model_copy(
        update={"checkpoint_sha256": "ab" * 32, "semantics": "R3", "loras": used}
    )
    calibration = CALIBRATION.model_copy(update={"made_from": ORIGIN.model_copy(update={"loras": made})})
    with pytest.raises(ExportError, match=words):
        calibration.check_model(model)
    calibration.check_model(model, other_loras=True)
    with pytest.raises(ExportError, match="by rules R1"):  # of which nothing was said
        calibration.check_model(model.model_copy(update={"semantics": "R1"}), other_loras=True)


def test_the_same_loras_in_another_order_or_at_scale_0_are_the_same(tmp_path: Path) -> None:
    model = Bundle.open().manifest.model.model_copy(
        update={"checkpoint_sha256": "ab" * 32, "semantics": "R3", "loras": (OTHER, STYLE)}
    )
    off = LoraEntry(name="off", scale=0.0, sha256="23" * 32)
    made = CALIBRATION.model_copy(update={"made_from": ORIGIN.model_copy(update={"loras": (STYLE, off, OTHER)})})
    made.check_model(model)
    made.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format"),
        ({"note": 1}, "note"),
        ({"networks": {"denoiser": {"layers": {"a": {"amax": -1, "percentile": 0}}, "large": {}}}}, "amax"),
        ({"networks": {"denoiser": {"layers": {"a": {"amax": 1e999, "percentile": 0}}, "large": {}}}}, "amax"),
        ({"made_from": None}, "made_from"),
    ],
)
def test_what_is_no_calibration_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**CALIBRATION.model_dump(mode="json"), **change}))
    with pytest.raises(ExportError, match=message):
        Calibration.load(path)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000])
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ExportError, match="not"):
        Calibration.load(tmp_path / "c.json")


def test_a_missing_file_and_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be read: No such file"):
        Calibration.load(tmp_path / "c.json")
    with pytest.raises(OutputError, match="cannot be written: No such file"):
        CALIBRATION.save(tmp_path / "none" / "c.json")


@given(st.floats(0, 2.0**100, width=32))
def test_rounding_never_shrinks_a_range(value: float) -> None:
    assert value <= rounded(value) <= value * 1.0015
    assert len(f"{rounded(value):.17g}") >= 1
    assert float(f"{rounded(value):.3e}") == rounded(value)


def test_the_clips_cover_what_requests_bring() -> None:
    assert {clip.sound for clip in CLIPS} == set(SOUNDS)
    assert {clip.image for clip in CLIPS} == {None, *IMAGES}
    assert {clip.portrait for clip in CLIPS} == {False, True}
    assert any(clip.image and clip.strength < 1 for clip in CLIPS)
    assert len({clip.prompt for clip in CLIPS}) == len(CLIPS)


@pytest.mark.parametrize("name", list(SOUNDS))
def test_sounds_are_sound_and_the_same_every_time(name: str) -> None:
    first, second = SOUNDS[name](), SOUNDS[name]()
    assert first.sample_count >= first.sample_rate * 4
    assert abs(first.samples).max() <= 1.0
    assert (first.samples == second.samples).all()
    assert (abs(first.samples).max() > 0) == (name != "silence")


@pytest.mark.parametrize("name", list(IMAGES))
def test_images_are_pictures_and_the_same_every_time(name: str) -> None:
    first = IMAGES[name]()
    assert first.dtype == "uint8"
    assert first.shape[2] == 3
    assert first.std() > 20
    assert (first == IMAGES[name]()).all()
