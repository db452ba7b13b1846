# SPDX-License-Identifier: Apache-2.0
"""The bundle that ships with ltxrt is what the exporter makes of the weights in it."""

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest

from ltxrt.bundle import Bundle
from ltxrt.errors import BundleError, ExportError
from ltxrt_export import tiny_bundle
from ltxrt_export.exporter import Sources
from ltxrt_export.tiny_bundle import TINY_OPTIONS, shipped_tiny


def test_the_published_files_are_those_of_the_bundle(shipped_sources: Sources) -> None:
    shipped = Bundle.open()
    for path in (
        shipped_sources.checkpoint.path,
        shipped_sources.upsampler.path,
        shipped_sources.text_encoder.path / "model.safetensors",
    ):
        assert path.read_bytes() == shipped.file(f"networks/{path.name}").read_bytes()
    assert shipped_sources.text_encoder.tokenizer_path.read_bytes() == shipped.file("tokenizer.json").read_bytes()
    assert shipped_sources.text_encoder.context_length == shipped.manifest.model.context_tokens


def test_options_are_those_of_the_shipped_manifest() -> None:
    model = Bundle.open().manifest.model
    assert (TINY_OPTIONS.semantics.value, TINY_OPTIONS.auto_pixels) == (model.semantics, model.auto_pixels)
    assert TINY_OPTIONS.licence == model.licence
    assert TINY_OPTIONS.check


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ExportError, match=r"tiny\.safetensors: the tiny model cannot be copied: No space left on"):
        shipped_tiny(tmp_path)


def test_a_damaged_bundle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(Bundle.open().path, damaged)
    (damaged / "networks" / "model.safetensors").write_bytes(b"x")
    opened = Bundle.open
    monkeypatch.setattr(tiny_bundle, "Bundle", type("Shipped", (), {"open": staticmethod(lambda: opened(damaged))}))
    with pytest.raises(BundleError, match=r"model\.safetensors has 1 bytes"):
        shipped_tiny(tmp_path)


@pytest.mark.slow
def test_regenerating_gives_the_same_hashes(regenerated: Any) -> None:
    shipped, again = Bundle.open(verify=True).manifest, Bundle.open(regenerated.path, verify=True).manifest
    if shipped.made_with != again.made_with:
        pytest.skip(f"the shipped graphs were made with {shipped.made_with}, here is {again.made_with}")
    assert {name: entry.sha256 for name, entry in again.files.items()} == {
        name: entry.sha256 for name, entry in shipped.files.items()
    }
    assert again == shipped
