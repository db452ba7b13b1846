# SPDX-License-Identifier: Apache-2.0
"""``ltxrt inspect`` on a bundle with real files and hashes, whose networks nobody runs."""

import json

import numpy as np
import pytest

from ltxrt import bundle, cli, inspection
from ltxrt.bundle import file_sha256
from ltxrt.errors import BundleError
from ltxrt.manifest import FileEntry
from ltxrt.testing import fake_pipeline


@pytest.fixture
def made(tmp_path):
    """A bundle's folder; ``denoiser.onnx`` is the largest file."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    opened = fake_pipeline().bundle
    for network in opened.manifest.networks.values():
        (folder / network.file).write_bytes(network.network.encode() * (900 if network.network == "denoiser" else 3))
    (folder / "tokenizer.json").write_text("{}")
    np.savez(
        folder / "tables.npz",
        rope_video=opened.rope.video,
        rope_cross=opened.rope.cross,
        sigmas_stage_1=np.float32(opened.sigmas[0]),
        sigmas_stage_2=np.float32(opened.sigmas[1]),
    )
    files = {
        path.name: FileEntry(sha256=file_sha256(path), bytes=path.stat().st_size) for path in sorted(folder.iterdir())
    }
    manifest = opened.manifest.model_copy(update={"files": files, "made_with": {"torch": "2.13.0"}})
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return folder


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_text(made, capsys):
    assert cli.run(["inspect", str(made)]) == 0
    out = capsys.readouterr().out
    for part in ("fake 2.3.0", "semantics R3", "latent_next float32[1, Nv, 128]", "opset 23", "torch 2.13.0"):
        assert part in out
    assert "maximum  fp32" in out
    assert file_sha256(made / "tables.npz") in out


def test_fused_loras(made, capsys):
    path = made / "manifest.json"
    manifest = json.loads(path.read_text())
    assert cli.run(["inspect", str(made)]) == 0
    assert "LoRA" not in capsys.readouterr().out
    manifest["model"]["loras"] = [{"name": "style", "scale": 0.75, "sha256": "ef" * 32}]
    path.write_text(json.dumps(manifest))
    assert cli.run(["inspect", str(made)]) == 0
    assert f"LoRA        style x 0.75, sha256 {'ef' * 32}" in capsys.readouterr().out


def test_json(made, capsys):
    assert cli.run(["inspect", str(made), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["intact"] is True
    assert told["manifest"]["model"]["name"] == "fake"
    assert told["manifest"] == json.loads((made / "manifest.json").read_text())


@pytest.mark.parametrize(
    ("command", "large"),
    [("inspect", False), ("inspect", True), ("generate", False)],  # generate leaves hashing large files to inspect
)
def test_a_flipped_byte(made, tmp_path, capsys, monkeypatch, command, large):
    if large:
        monkeypatch.setattr(bundle, "HASH_ON_OPEN_BYTES", 100)
        monkeypatch.setattr(inspection, "HASH_ON_OPEN_BYTES", 100)
    flip(made / "denoiser.onnx")
    generate = ["generate", "--prompt", "x", "--audio", "x", "--output", f"{tmp_path}/clip.mp4", "--bundle", str(made)]
    assert cli.run(generate if command == "generate" else ["inspect", str(made)]) == 5
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "denoiser.onnx does not have the hash of the manifest: the bundle is damaged" in last


def test_progress_of_large_files(made, monkeypatch):
    monkeypatch.setattr(inspection, "HASH_ON_OPEN_BYTES", 3000)
    monkeypatch.setattr(inspection, "_BLOCK_BYTES", 4000)
    steps = list(inspection.hash_large_files(bundle.Bundle.open(made)))
    assert [(step.stage, step.step, step.steps) for step in steps] == [
        ("denoiser.onnx", 4000, 7200),
        ("denoiser.onnx", 7200, 7200),
    ]


def test_a_large_file_that_goes_away(made, monkeypatch):
    monkeypatch.setattr(inspection, "HASH_ON_OPEN_BYTES", 3000)
    opened = bundle.Bundle.open(made)
    (made / "denoiser.onnx").unlink()
    with pytest.raises(BundleError, match=r"denoiser.onnx cannot be read: No such file"):
        list(inspection.hash_large_files(opened))
