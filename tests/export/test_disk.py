# SPDX-License-Identifier: Apache-2.0
"""Weight files that take no room, copies where that cannot be had, and refusals before anything is written."""

import errno
import hashlib
import os
import shutil
from pathlib import Path

import pytest

from ltxrt.errors import ExportError, OutputError
from ltxrt_export import disk
from ltxrt_export.disk import WeightPlan, free_bytes, gigabytes, hashed, plan_weights, require_room, share

CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "models" / "weights.safetensors"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "networks"
    path.mkdir()
    return path


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Neither clones nor links, as another file system says."""

    def link(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(disk, "_cloned", lambda source, target: False)
    monkeypatch.setattr(os, "link", link)


def drained(source: Path, copy: Path | None = None) -> tuple[list[int], str]:
    steps, done = hashed(source, copy), list[int]()
    while True:
        try:
            done.append(next(steps))
        except StopIteration as stop:
            return done, stop.value


def test_shared_without_a_copy(source: Path, folder: Path) -> None:
    target = folder / "weights.safetensors"
    assert share(source, target)
    assert target.read_bytes() == CONTENT
    assert not target.is_symlink()


def test_link_where_the_file_system_does_not_clone(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_cloned", lambda source, target: False)
    assert share(source, folder / "w")
    assert (folder / "w").stat().st_ino == source.stat().st_ino


def test_behind_a_symbolic_link_is_the_file(source: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshot").symlink_to(source)
    assert share(tmp_path / "snapshot", folder / "w")
    assert not (folder / "w").is_symlink()
    assert (folder / "w").read_bytes() == CONTENT


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_file_systems_that_do_neither(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    refuse(monkeypatch, number)
    assert not share(source, folder / "w")
    assert list(folder.iterdir()) == []


def test_other_errors_are_not_taken_for_a_refusal(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        share(source, folder / "w")


def test_source_that_is_gone(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"gone: cannot be read: No such file"):
        share(tmp_path / "gone", folder / "w")
    with pytest.raises(ExportError, match=r"gone: cannot be read: No such file"):
        drained(tmp_path / "gone")


def test_hash_and_copy_in_one_pass(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_BLOCK_BYTES", 100_000)
    expected = hashlib.sha256(CONTENT).hexdigest()
    assert drained(source) == ([100_000, 200_000, 256_000], expected)
    assert drained(source, folder / "w") == ([100_000, 200_000, 256_000], expected)
    assert (folder / "w").read_bytes() == CONTENT


def test_copy_that_is_interrupted_is_removed(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_BLOCK_BYTES", 1000)
    steps = hashed(source, folder / "w")
    next(steps)
    steps.close()
    assert list(folder.iterdir()) == []


def test_plan_tries_and_leaves_nothing(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_weights([source], folder)
    assert (dict(plan.shared), dict(plan.copied)) == ({source: 256_000}, {})
    plan.check()
    refuse(monkeypatch, errno.EXDEV)
    plan = plan_weights([source], folder)
    assert (dict(plan.shared), dict(plan.copied)) == ({}, {source: 256_000})
    assert list(folder.iterdir()) == []


def test_plan_in_words() -> None:
    plan = WeightPlan(Path("b"), {Path("x"): 46_149_345_334}, {Path("y"): 995_743_560}, 80_000_000_000)
    assert str(plan) == "weights: 46.1 GB shared with their files, 1.0 GB copied; 80.0 GB free"
    plan = WeightPlan(Path("b"), {}, {Path("y"): 995_743_560}, 80_000_000_000, 29_300_000_000)
    assert str(plan) == "weights: 0.0 GB shared with their files, 1.0 GB copied, 29.3 GB made in FP8; 80.0 GB free"


def test_plan_that_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, 46 * 10**9))
    copied = WeightPlan(folder, {}, {Path("/models/x"): 46 * 10**9}, 46 * 10**9)
    with pytest.raises(
        OutputError, match=r"46\.3 GB are needed and 46\.0 GB are free, for copies of the weights; a fol"
    ):
        copied.check()
    # What is shared takes nothing.
    WeightPlan(folder, {Path("/models/x"): 10**12}, {}, 0).check()
    with pytest.raises(
        OutputError, match=r"47\.3 GB are needed .*, for FP8 weights and copies of the weights; a folder"
    ):
        WeightPlan(folder, {}, {Path("/models/x"): 10**9}, 0, 46 * 10**9).check()
    with pytest.raises(OutputError, match=r"46\.3 GB are needed and 46\.0 GB are free, for FP8 weights$"):
        WeightPlan(folder, {}, {}, 0, 46 * 10**9).check()


def test_room_where_the_folder_is_not_made_yet(tmp_path: Path) -> None:
    there = tmp_path / "a" / "b"
    require_room(there, 1, "a byte")
    with pytest.raises(OutputError, match=r"a/b: .* are needed and .* are free, for more than there is"):
        require_room(there, free_bytes(there) * 2, "more than there is")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0.0 GB"), (999, "0.0 MB"), (3_500_000, "3.5 MB"), (46_149_345_334, "46.1 GB")]
)
def test_sizes_in_words(count: int, text: str) -> None:
    assert gigabytes(count) == text
