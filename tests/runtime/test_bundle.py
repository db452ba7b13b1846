# SPDX-License-Identifier: Apache-2.0
"""A whole bundle opens; whatever is damaged, missing or foreign in one is a single named refusal."""

import hashlib
import json
import os

import numpy as np
import pytest

from ltxrt import bundle as bundle_module
from ltxrt.bundle import Bundle
from ltxrt.errors import BundleError, RequestError
from ltxrt.manifest import NETWORK_NAMES
from ltxrt.pipeline import Pipeline


def edited(folder, change):
    """The bundle with its manifest changed in place."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), "utf-8")
    return folder


def replaced(folder, name, data):
    """The bundle with another file of that name, and a manifest that vouches for it."""
    (folder / name).write_bytes(data)
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    return edited(folder, lambda manifest: manifest["files"].update({name: entry}))


def refused(folder, match, **options):
    with pytest.raises(BundleError, match=match) as caught:
        Bundle.open(folder, **options)
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


# --- a whole bundle ---


def test_a_whole_bundle_opens(toy_bundle):
    opened = Bundle.open(toy_bundle, verify=True)
    assert opened.path == toy_bundle
    assert opened.manifest.model.name == "toy"
    assert opened.rope.max_position == (20.0, 2048.0, 2048.0)
    np.testing.assert_array_equal(opened.rope.video, np.float32([1, 2]))
    np.testing.assert_array_equal(opened.rope.cross, np.float32([1, 1.5, 2]))
    assert opened.sigmas[0] == (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
    assert opened.sigmas[1] == (0.909375, 0.725, 0.421875, 0.0)


def test_a_path_may_be_text(toy_bundle):
    assert Bundle.open(str(toy_bundle)).path == toy_bundle


def test_every_network_of_a_preset_is_found(toy_bundle):
    opened = Bundle.open(toy_bundle)
    for name in NETWORK_NAMES:
        entry = opened.network("high", name)
        assert entry.network == name
        assert opened.file(entry.file).is_file()


def test_a_preset_that_was_not_built_is_the_requests_fault(toy_bundle):
    with pytest.raises(RequestError, match="low, high in this bundle") as caught:
        Bundle.open(toy_bundle).network("maximum", "denoiser")
    assert (caught.value.field, caught.value.value) == ("video_quality", "maximum")


def test_files_that_the_manifest_does_not_name_are_no_matter(toy_bundle):
    (toy_bundle / "README").write_text("mine")
    Bundle.open(toy_bundle, verify=True)


# --- the folder and its manifest ---


@pytest.mark.parametrize("make", ["nothing", "file", "folder"])
def test_what_is_no_bundle(tmp_path, make):
    path = tmp_path / "b"
    if make == "file":
        path.write_text("x")
    elif make == "folder":
        path.mkdir()
    refused(path, "is not a bundle: it has no manifest.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_manifest_that_may_not_be_read(toy_bundle):
    (toy_bundle / "manifest.json").chmod(0)
    refused(toy_bundle, r"manifest\.json cannot be read: Permission denied")


def test_a_manifest_that_is_a_folder(tmp_path):
    (tmp_path / "manifest.json").mkdir()
    refused(tmp_path, r"manifest\.json cannot be read: Is a directory")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"not json",
        b"\xff\xfe",
        b'{"schema_version": 1',
        b"[" * 100_000,
        b'{"schema_version": ' + b"1" * 5000,
    ],
    ids=["empty", "brace", "text", "no-utf8", "cut", "deep", "long"],
)
def test_a_manifest_that_is_not_json(toy_bundle, data):
    (toy_bundle / "manifest.json").write_bytes(data)
    refused(toy_bundle, r"manifest\.json is damaged: ")


@pytest.mark.parametrize("version", [2, 0, "1", None, 1.5, [1]])
def test_another_schema_version(toy_bundle, version):
    edited(toy_bundle, lambda manifest: manifest.update(schema_version=version))
    refused(toy_bundle, r"has bundle schema version .*, this ltxrt reads 1: export it again, or install the ltxrt")


@pytest.mark.parametrize("data", ["[]", "{}", "3", '"bundle"', "null"])
def test_json_that_is_no_manifest(toy_bundle, data):
    (toy_bundle / "manifest.json").write_text(data)
    refused(toy_bundle, "has bundle schema version None")


def test_a_newer_schema_is_named_before_what_else_it_changed(toy_bundle):
    (toy_bundle / "manifest.json").write_text('{"schema_version": 7, "something": "else"}')
    refused(toy_bundle, "has bundle schema version 7")


def test_a_manifest_with_an_unknown_or_missing_part(toy_bundle):
    edited(toy_bundle, lambda manifest: manifest["model"].update(vocoder=True))
    refused(toy_bundle, r"is damaged: model\.vocoder: ")
    edited(toy_bundle, lambda manifest: manifest.pop("model"))
    refused(toy_bundle, "is damaged: model: Field required")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "networks/../../secret", "a\0b"])
def test_a_path_that_leaves_the_folder(toy_bundle, name):
    (toy_bundle.parent / "secret").write_bytes(b"x")
    edited(
        toy_bundle,
        lambda manifest: manifest["files"].update({name: {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1}}),
    )
    refused(toy_bundle, "which is outside the bundle")


@pytest.mark.parametrize("key", ["file", "weights"])
def test_a_network_that_needs_a_file_nobody_vouches_for(toy_bundle, key):
    value = "networks/other.bin" if key == "file" else ["networks/other.bin"]
    (toy_bundle / "networks" / "other.bin").write_bytes(b"x")
    edited(toy_bundle, lambda manifest: manifest["networks"]["denoiser-key"].update({key: value}))
    refused(toy_bundle, "network denoiser-key needs networks/other.bin, which the manifest does not list")


def test_a_preset_without_a_network(toy_bundle):
    edited(toy_bundle, lambda manifest: manifest["presets"]["low"].pop("upsampler"))
    refused(toy_bundle, r"preset low lacks \['upsampler'\]")


def test_a_preset_that_names_a_network_nobody_has(toy_bundle):
    edited(toy_bundle, lambda manifest: manifest["networks"].pop("denoiser-key"))
    refused(toy_bundle, r"preset low lacks \['denoiser-key'\]")


def test_a_preset_that_takes_one_network_for_another(toy_bundle):
    edited(toy_bundle, lambda manifest: manifest["presets"]["high"].update(upsampler="denoiser-key"))
    refused(toy_bundle, "preset high has denoiser-key as its upsampler")


def test_an_unknown_kind_of_network(toy_bundle):
    edited(toy_bundle, lambda manifest: manifest["presets"]["high"].update(vocoder="denoiser-key"))
    refused(toy_bundle, r"is damaged: presets\.high\.vocoder")


def test_a_precision_that_no_network_comes_in(toy_bundle):
    edited(toy_bundle, lambda manifest: manifest["networks"]["denoiser-key"].update(precision="int4"))
    refused(toy_bundle, r"is damaged: networks\.denoiser-key\.precision: Input should be 'fp32', .* or 'fp8-mixed'")


def test_a_bundle_without_a_preset(toy_bundle):
    edited(toy_bundle, lambda manifest: manifest.update(presets={}))
    refused(toy_bundle, "the manifest has no preset")


# --- engines ---


def with_engines(folder, **entries):
    """The bundle with engines, each another one than a good one of the denoiser by what is given."""
    for name in entries:
        for suffix in ("plan", "json"):
            (folder / "networks" / f"{name}.{suffix}").write_bytes(b"x")
    listed = {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1}

    def change(manifest):
        manifest["engines"] = {name: engine(name, **entry) for name, entry in entries.items()}
        manifest["files"].update({f"networks/{n}.{suffix}": listed for n in entries for suffix in ("plan", "json")})

    return edited(folder, change)


def engine(name, gpu="NVIDIA H100", tensorrt="11.4.0", **changes):
    """A manifest's entry of an engine."""
    key = {
        "schema_version": 1,
        "onnx_sha256": "0" * 64,
        "weights_sha256": [],
        "gpu_name": gpu,
        "compute_capability": "9.0",
        "tensorrt_version": tensorrt,
        "cuda_version": "13.0",
        "profiles": [],
        "options": {},
    }
    entry = {
        "network": "denoiser-key",
        "file": f"networks/{name}.plan",
        "layers": f"networks/{name}.json",
        "key": key,
        "key_sha256": "0" * 64,
        "built_with": {},
    }
    return {**entry, **changes}


def test_engines_for_several_machines(toy_bundle):
    with_engines(
        toy_bundle,
        one={},
        older={"tensorrt": "10.16.0"},
        other={"gpu": "NVIDIA L40S"},
        upsampler={"network": "upsampler-key"},
    )
    assert set(Bundle.open(toy_bundle).manifest.engines) == {"one", "older", "other", "upsampler"}


def test_an_engine_of_a_network_nobody_has(toy_bundle):
    refused(
        with_engines(toy_bundle, one={"network": "vocoder-key"}), "engine one is of vocoder-key, which the manifest"
    )


@pytest.mark.parametrize("key", ["file", "layers"])
def test_an_engine_that_needs_a_file_nobody_vouches_for(toy_bundle, key):
    with_engines(toy_bundle, one={key: "networks/nowhere"})
    refused(toy_bundle, "engine one needs networks/nowhere, which the manifest does not list")


def test_two_engines_of_one_network_for_one_machine(toy_bundle):
    with_engines(toy_bundle, one={}, two={})
    refused(toy_bundle, "engines one and two are both of denoiser-key for NVIDIA H100 9.0 11.4.0")


@pytest.mark.parametrize("name", ["tables.npz", "tokenizer.json"])
def test_what_every_bundle_must_have(toy_bundle, name):
    edited(toy_bundle, lambda manifest: manifest["files"].pop(name))
    refused(toy_bundle, f"the manifest does not list {name}")


# --- files ---

FILES = [*(f"networks/{name}.onnx" for name in NETWORK_NAMES), "networks/weights.bin", "tables.npz", "tokenizer.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit(toy_bundle, name):
    path = toy_bundle / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused(toy_bundle, f"{name} does not have the hash of the manifest: the bundle is damaged")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_cut(toy_bundle, name):
    path = toy_bundle / name
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    refused(toy_bundle, f"{name} has {size - 1} bytes, the manifest says {size}")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_gone(toy_bundle, name):
    (toy_bundle / name).unlink()
    refused(toy_bundle, f"{name} cannot be read: No such file or directory")


def test_a_file_that_is_a_folder(toy_bundle):
    path = toy_bundle / "networks" / "weights.bin"
    path.unlink()
    path.mkdir()
    size = path.stat().st_size
    edited(toy_bundle, lambda manifest: manifest["files"]["networks/weights.bin"].update(bytes=size))
    refused(toy_bundle, r"weights\.bin cannot be read: Is a directory")


def test_large_files_are_hashed_only_where_it_is_asked_for(toy_bundle, monkeypatch):
    path = toy_bundle / "networks" / "weights.bin"
    size = path.stat().st_size
    path.write_bytes(bytes(size))
    refused(toy_bundle, r"weights\.bin does not have the hash")
    # Above the limit by one byte: the size alone is compared.
    monkeypatch.setattr(bundle_module, "HASH_ON_OPEN_BYTES", size - 1)
    Bundle.open(toy_bundle)
    refused(toy_bundle, r"weights\.bin does not have the hash", verify=True)
    path.write_bytes(bytes(size - 1))
    refused(toy_bundle, rf"weights\.bin has {size - 1} bytes")


def test_hashing_reads_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle_module, "_BLOCK_BYTES", 7)
    data = os.urandom(50)
    (tmp_path / "f").write_bytes(data)
    assert bundle_module.file_sha256(tmp_path / "f") == hashlib.sha256(data).hexdigest()


# --- contents that are wrong although they are what was written ---


def archive(tmp_path, **changes):
    tables = {
        "rope_video": np.ones(2, np.float32),
        "rope_cross": np.ones(3, np.float32),
        "sigmas_stage_1": np.array([1.0, 0.0]),
        "sigmas_stage_2": np.array([0.5, 0.0]),
        **changes,
    }
    np.savez(tmp_path / "t.npz", **{name: table for name, table in tables.items() if table is not None})
    return (tmp_path / "t.npz").read_bytes()


@pytest.mark.parametrize("data", [b"", b"x", b"PK\x03\x04", b"\x93NUMPY\x01\x00"], ids=["empty", "text", "zip", "npy"])
def test_tables_that_are_no_archive(toy_bundle, data):
    refused(replaced(toy_bundle, "tables.npz", data), r"tables\.npz is damaged: ")


def test_tables_that_are_one_array(toy_bundle, tmp_path):
    np.save(tmp_path / "t.npy", np.ones(3))
    refused(replaced(toy_bundle, "tables.npz", (tmp_path / "t.npy").read_bytes()), r"tables\.npz is damaged: ")


def test_tables_that_hold_code(toy_bundle, tmp_path):
    data = archive(tmp_path, rope_video=np.array([print], object))
    refused(replaced(toy_bundle, "tables.npz", data), r"tables\.npz is damaged: Object arrays cannot be loaded")


@pytest.mark.parametrize("name", ["rope_video", "rope_cross", "sigmas_stage_1", "sigmas_stage_2"])
def test_a_table_that_is_missing(toy_bundle, tmp_path, name):
    refused(replaced(toy_bundle, "tables.npz", archive(tmp_path, **{name: None})), rf"tables\.npz lacks \['{name}'\]")


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("rope_video", np.ones(2)),  # fp64 frequencies give other angles than the reference's
        ("rope_cross", np.ones((1, 3), np.float32)),
        ("sigmas_stage_1", np.ones(3, np.int64)),
        ("sigmas_stage_2", np.float64(1)),
    ],
)
def test_a_table_of_the_wrong_kind(toy_bundle, tmp_path, name, table):
    data = archive(tmp_path, **{name: table})
    refused(replaced(toy_bundle, "tables.npz", data), rf"tables\.npz: {name} is .*, expected float32")


def test_schedules_may_be_stored_in_either_width(toy_bundle, tmp_path):
    data = archive(tmp_path, sigmas_stage_2=np.float32([0.5, 0.0]))
    assert Bundle.open(replaced(toy_bundle, "tables.npz", data)).sigmas[1] == (0.5, 0.0)


@pytest.mark.parametrize("data", [b"{}", b"\xff", b"[]"])
def test_a_tokenizer_that_is_none(toy_bundle, data):
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer: "):
        Pipeline.open(replaced(toy_bundle, "tokenizer.json", data))


# --- the one in the package ---


def test_the_bundle_that_ships_is_whole():
    opened = Bundle.open(verify=True)
    assert opened.path == bundle_module.tiny_bundle_path()
    assert set(opened.manifest.presets) == {"low", "medium", "high", "maximum"}
