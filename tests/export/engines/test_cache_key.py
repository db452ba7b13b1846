# SPDX-License-Identifier: Apache-2.0
"""The cache key: equal for equal inputs, different for each input that differs."""

import json
from dataclasses import replace
from typing import Any

import pytest

from ltxrt.bundle import Bundle
from ltxrt.errors import BundleError
from ltxrt.gpu import Gpu
from ltxrt.manifest import EngineKey, EngineProfile, FileEntry, Manifest
from ltxrt_export.engines.cache_key import (
    KEY_SCHEMA,
    BuildOptions,
    canonical_options,
    engine_key,
    engine_name,
    key_digest,
)

MANIFEST = Bundle.open().manifest
NETWORK = MANIFEST.presets["high"]["denoiser"]
PROFILES = (EngineProfile(name="a", sizes={"x": (1, 2, 3), "y": (4, 5, 6)}),)


def key(gpu: Gpu, **changes: Any) -> EngineKey:
    given = {"manifest": MANIFEST, "profiles": PROFILES, "version": "11.4.0.106", "options": BuildOptions(), **changes}
    return engine_key(given["manifest"], NETWORK, given["profiles"], (gpu, given["version"]), given["options"])


def with_file(name: str) -> Manifest:
    files = {**MANIFEST.files, name: FileEntry(sha256="0" * 64, bytes=1)}
    return MANIFEST.model_copy(update={"files": files})


def test_equal_inputs_give_equal_keys(gpu: Gpu) -> None:
    assert key_digest(key(gpu)) == key_digest(key(replace(gpu)))
    assert key_digest(EngineKey.model_validate_json(key(gpu).model_dump_json())) == key_digest(key(gpu))


def test_what_changes_the_key(gpu: Gpu) -> None:
    network = MANIFEST.networks[NETWORK]
    keys = [
        key(gpu),
        key(replace(gpu, name="NVIDIA H100 80GB HBM3")),
        key(replace(gpu, compute_capability=(10, 0))),
        key(replace(gpu, cuda_version=(13, 1))),
        key(gpu, version="11.4.0.107"),
        key(gpu, manifest=with_file(network.file)),
        key(gpu, manifest=with_file(network.weights[0])),
        key(gpu, profiles=(EngineProfile(name="b", sizes=PROFILES[0].sizes),)),
        key(gpu, profiles=(EngineProfile(name="a", sizes={"x": (1, 2, 4), "y": (4, 5, 6)}),)),
        key(gpu, profiles=PROFILES * 2),
        key(gpu, options=BuildOptions(workspace_gib=8)),
        key(gpu, options=BuildOptions(optimization_level=4)),
        key(gpu).model_copy(update={"schema_version": KEY_SCHEMA + 1}),
    ]
    assert len({key_digest(entry) for entry in keys}) == len(keys)


def test_what_does_not_change_the_key(gpu: Gpu) -> None:
    same = [
        key(replace(gpu, index=3, memory_bytes=1)),
        key(gpu, profiles=(EngineProfile(name="a", sizes={"y": (4, 5, 6), "x": (1, 2, 3)}),)),
        key(gpu, manifest=with_file("tokenizer.json")),
    ]
    assert {key_digest(entry) for entry in same} == {key_digest(key(gpu))}


def test_the_form_of_the_key_is_what_the_schema_number_says(gpu: Gpu) -> None:
    # Whoever changes this changes what every engine in the world is found by: raise KEY_SCHEMA.
    data = json.loads(key(gpu).model_dump_json())
    data |= {"onnx_sha256": "o", "weights_sha256": ["w"]}
    assert KEY_SCHEMA == 1
    assert key_digest(EngineKey.model_validate(data)) == (
        "9a5ee29db65e739ebbb4fbc4491cbedc80d43566b5009c23eb982f25e08f9ac1"
    )


def test_every_option_is_in_the_key_whether_it_can_be_chosen_or_not(gpu: Gpu) -> None:
    assert key(gpu, options=BuildOptions(workspace_gib=4)).options == {
        "decomposed_attention": True,
        "max_aux_streams": 0,
        "optimization_level": 3,
        "strongly_typed": True,
        "tf32": False,
        "workspace_gib": 4,
    }


@pytest.mark.parametrize(("precision", "decomposed"), [("fp32", True), ("fp16", False), ("fp8-mixed", False)])
def test_attention_is_decomposed_in_fp32_alone_unless_asked_for(precision: str, decomposed: bool) -> None:
    assert canonical_options(BuildOptions(), precision)["decomposed_attention"] is decomposed
    assert canonical_options(BuildOptions(decomposed_attention=True), precision)["decomposed_attention"] is True


def test_the_name_tells_network_architecture_and_key(gpu: Gpu) -> None:
    assert engine_name(NETWORK, key(gpu)) == f"{NETWORK}-sm90-{key_digest(key(gpu))[:12]}"


def test_a_network_whose_files_the_manifest_does_not_list(gpu: Gpu) -> None:
    files = {name: entry for name, entry in MANIFEST.files.items() if not name.endswith(".safetensors")}
    with pytest.raises(BundleError, match=r"the manifest does not list networks/.*\.safetensors"):
        key(gpu, manifest=MANIFEST.model_copy(update={"files": files}))
