# SPDX-License-Identifier: Apache-2.0
"""The manifest's schema: a whole one is read as it stands, and every slip in one is named."""

import copy
import json

import pytest
from pydantic import ValidationError

from ltxrt.engine import TensorSpec
from ltxrt.manifest import NETWORK_NAMES, SCHEMA_VERSION, Manifest, TensorEntry

WHOLE = {
    "schema_version": 1,
    "model": {
        "name": "toy",
        "version": "2.3.0",
        "checkpoint_sha256": "0" * 64,
        "semantics": "R3",
        "licence": "none",
        "context_tokens": 4,
        "latent_channels": 128,
        "image_crf": 33,
        "auto_pixels": None,
        "rope_max_position": [20, 2048, 2048],
        "stream": {"states": [{"name": "s0", "channels": 8, "spatial_scale": 2}], "first_chunk_latents": 15},
    },
    "files": {"networks/a.onnx": {"sha256": "ab" * 32, "bytes": 3}},
    "networks": {
        "key": {
            "network": "upsampler",
            "file": "networks/a.onnx",
            "weights": ["w.safetensors"],
            "precision": "fp16",
            "opset": 23,
            "inputs": [{"name": "latent", "dtype": "float32", "shape": [1, 128, "f", "h", "w"]}],
            "outputs": [{"name": "upsampled", "dtype": "float32", "shape": [1, 128, "f", "2*h", "2*w"]}],
            "shape_range": {"f": [1, 61]},
        }
    },
    "presets": {"high": {"upsampler": "key"}},
    "made_with": {"onnx": "1.23"},
}


def test_a_whole_manifest_is_read_and_written_as_it_stands():
    manifest = Manifest.model_validate(WHOLE)
    assert manifest.networks["key"].inputs[0].spec() == TensorSpec("latent", "float32", (1, 128, "f", "h", "w"))
    assert manifest.model.rope_max_position == (20.0, 2048.0, 2048.0)
    assert manifest.engines == {}
    assert manifest.model.loras == ()
    # What newer writers add is empty where it was not there.
    written = {**WHOLE, "engines": {}, "model": {**WHOLE["model"], "loras": []}}
    assert json.loads(manifest.model_dump_json()) == written
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_names_and_version():
    assert SCHEMA_VERSION == 1
    assert NETWORK_NAMES == (
        "text_encoder",
        "audio_encoder",
        "image_encoder",
        "denoiser",
        "upsampler",
        "video_decoder",
    )


def test_a_manifest_cannot_be_changed():
    manifest = Manifest.model_validate(WHOLE)
    with pytest.raises(ValidationError, match="frozen"):
        manifest.model = None


def test_sizes_and_symbols_keep_their_types():
    entry = TensorEntry.model_validate({"name": "x", "dtype": "int64", "shape": [1, "n", "32*h"]})
    assert entry.spec().shape == (1, "n", "32*h")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), 2),
        (("surprise",), 1),
        (("model", "semantics"), "R4"),
        (("model", "checkpoint_sha256"), "0" * 63),
        (("model", "context_tokens"), 0),
        (("model", "image_crf"), 52),
        (("model", "rope_max_position"), [20, 2048]),
        (("model", "stream", "first_chunk_latents"), 0),
        (("model", "surprise"), 1),
        (("files", "networks/a.onnx", "sha256"), "AB" * 32),
        (("files", "networks/a.onnx", "bytes"), -1),
        (("networks", "key", "network"), "vocoder"),
        (("networks", "key", "shape_range", "f"), [1]),
        (("networks", "key", "inputs"), [{"name": "latent", "dtype": "float32"}]),
        (("presets", "high", "vocoder"), "key"),
    ],
)
def test_slips_are_named(path, value):
    damaged = copy.deepcopy(WHOLE)
    inner = damaged
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    with pytest.raises(ValidationError) as caught:
        Manifest.model_validate(damaged)
    assert {error["loc"][: len(path)] for error in caught.value.errors()} == {path}


@pytest.mark.parametrize("name", ["model", "files", "networks", "presets", "made_with"])
def test_no_part_may_be_missing(name):
    with pytest.raises(ValidationError) as caught:
        Manifest.model_validate({key: value for key, value in WHOLE.items() if key != name})
    assert [error["loc"] for error in caught.value.errors()] == [(name,)]
