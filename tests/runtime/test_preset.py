# SPDX-License-Identifier: Apache-2.0
"""The four presets hold what the design promises, and a preset file with a wrong key does not load."""

import dataclasses

import pytest

from ltxrt import preset
from ltxrt.errors import RequestError
from ltxrt.preset import PRESET_NAMES, load_preset, load_presets
from ltxrt.request import Request

EIGHT = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
FIVE = (1.0, 0.9875, 0.975, 0.909375, 0.725, 0.0)
THREE = (0.909375, 0.725, 0.421875, 0.0)
TWO = (0.909375, 0.725, 0.0)
PROMISED = {
    # name: (stage 1, stage 2, CRF, denoiser, text encoder, VAE)
    "low": (FIVE, TWO, 28, "fp8", "fp8", "fp16"),
    "medium": (EIGHT, TWO, 23, "fp8", "fp8", "fp16"),
    "high": (EIGHT, THREE, 19, "fp8-mixed", "fp16", "fp16"),
    "maximum": (EIGHT, THREE, 14, "bf16", "fp16", "fp16"),
}
NETWORKS = {"text_encoder", "audio_encoder", "image_encoder", "denoiser", "upsampler", "video_decoder"}


@pytest.mark.parametrize("name", PROMISED)
def test_presets_are_the_promised_ones(name):
    found = load_preset(name)
    stage_1, stage_2, crf, denoiser, text_encoder, vae = PROMISED[name]
    assert found.name == name
    assert found.stage_1_sigmas == stage_1
    assert found.stage_2_sigmas == stage_2
    assert found.crf == crf
    assert set(found.precision) == NETWORKS
    assert found.precision["denoiser"] == denoiser
    assert found.precision["text_encoder"] == text_encoder
    assert {found.precision[network] for network in ("video_decoder", "image_encoder", "upsampler")} == {vae}
    assert found.description.endswith(".")


def test_all_presets_come_in_order_of_quality():
    assert tuple(found.name for found in load_presets()) == PRESET_NAMES == ("low", "medium", "high", "maximum")
    for lower, higher in zip(load_presets(), load_presets()[1:], strict=False):
        assert lower.crf > higher.crf
        assert lower.auto_pixels <= higher.auto_pixels
        assert lower.audio_bitrate <= higher.audio_bitrate


def test_the_request_names_the_same_presets():
    assert Request.model_json_schema()["properties"]["video_quality"]["enum"] == list(PRESET_NAMES)


@pytest.mark.parametrize("name", ["ultra", "", "High", "../presets/high", None])
def test_an_unknown_preset_lists_the_known_ones(name):
    with pytest.raises(RequestError, match="low, medium, high, maximum") as caught:
        load_preset(name)
    assert (caught.value.field, caught.value.value) == ("video_quality", name)


def test_a_preset_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_preset("high").crf = 0


@pytest.mark.parametrize(
    ("before", "after", "key"),
    [("crf = 19", "crff = 19", "crf"), ("crf = 19", "", "crf"), ("crf = 19", "crf = 19\nfps = 3", "fps")],
)
def test_unknown_and_missing_keys_do_not_load(tmp_path, monkeypatch, before, after, key):
    text = preset.resources.files("ltxrt").joinpath("presets", "high.toml").read_text("utf-8")
    assert before in text
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "high.toml").write_text(text.replace(before, after), "utf-8")
    monkeypatch.setattr(preset.resources, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match=rf"preset high: keys .*'{key}'.* are unknown or missing"):
        load_preset("high")
