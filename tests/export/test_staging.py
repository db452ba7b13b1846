# SPDX-License-Identifier: Apache-2.0
"""Folders that are whole or not there: one writer at a time, and what a killed one leaves is put right by the next."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ltxrt.errors import OutputError
from ltxrt_export.staging import Staging

#: Writes "new" to the folder argv[1], and kills itself at call argv[3] of the method argv[2] of Path, before or after.
KILLED = """
import os, signal, sys
from pathlib import Path
from ltxrt_export.staging import Staging

destination, method, number, when = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
real, calls = getattr(Path, method), 0

def killing(path, *given, **named):
    global calls
    calls += 1
    if calls == number and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = real(path, *given, **named)
    if calls == number and when == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(Path, method, killing)
staging = Staging(destination, lambda: None)
(staging.folder / "data").write_text("new")
(staging.folder / "kept").write_text("finished")
staging.commit()
staging.close()
"""


def allowed() -> None:
    """Everything may be replaced."""


def written(destination: Path, text: str) -> None:
    staging = Staging(destination, allowed)
    (staging.folder / "data").write_text(text)
    staging.commit()
    staging.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed(destination: Path, method: str, number: int, when: str) -> None:
    command = [sys.executable, "-c", KILLED, str(destination), method, str(number), when]
    done = subprocess.run(command, check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("above", [".", "new/deep"])
def test_it_gets_its_name_when_it_is_whole(tmp_path: Path, above: str) -> None:
    destination = tmp_path / above / "it"
    staging = Staging(destination, allowed)
    assert staging.folder.parent == destination.parent
    assert not destination.exists()
    (staging.folder / "data").write_text("x")
    staging.commit()
    staging.close()
    assert names(destination.parent) == ["it"]
    assert names(destination) == ["data"]


def test_without_a_commit_nothing_is_left(tmp_path: Path) -> None:
    staging = Staging(tmp_path / "new" / "deep" / "it", allowed)
    (staging.folder / "data").write_text("x")
    staging.close()
    staging.close()
    assert names(tmp_path) == []


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    first = Staging(tmp_path / "it", allowed)
    (first.folder / "data").write_text("x")
    with pytest.raises(OutputError, match=r"it: another export is writing to it$"):
        Staging(tmp_path / "it", allowed)
    other = Staging(tmp_path / "other", allowed)
    other.close()
    first.commit()
    first.close()
    assert (tmp_path / "it" / "data").read_text() == "x"
    written(tmp_path / "it", "y")
    assert names(tmp_path) == ["it"]


def test_a_lock_that_its_holder_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two wait for one name; the one that comes late finds the file gone and makes its own."""
    samestat, seen = os.path.samestat, []

    def removed(one: os.stat_result, two: os.stat_result) -> bool:
        if not seen:
            seen.append((tmp_path / ".it.export-lock").unlink())
            raise FileNotFoundError
        return samestat(one, two)

    monkeypatch.setattr(os.path, "samestat", removed)
    staging = Staging(tmp_path / "it", allowed)
    assert (tmp_path / ".it.export-lock").exists()
    staging.close()
    assert names(tmp_path) == []


def test_what_may_not_be_replaced_is_not_touched(tmp_path: Path) -> None:
    def refuse() -> None:
        raise OutputError("no")

    (tmp_path / "it").mkdir()
    with pytest.raises(OutputError, match="no"):
        Staging(tmp_path / "it", refuse)
    assert names(tmp_path) == ["it"]


def test_finished_files_of_a_killed_run_are_taken_over(tmp_path: Path) -> None:
    killed(tmp_path / "it", "rename", 1, "before")
    assert names(tmp_path) == [".it.export-lock", ".it.export-partial"]
    staging = Staging(tmp_path / "it", allowed, lambda path: path.name == "kept")
    assert names(staging.folder) == ["kept"]
    staging.close()
    assert names(tmp_path) == []


def test_whatever_is_in_the_way_of_a_new_run_is_removed(tmp_path: Path) -> None:
    partial = tmp_path / ".it.export-partial"
    (partial / "a" / "b").mkdir(parents=True)
    (partial / "a" / "b" / "file").write_text("x")
    (partial / "a" / "kept").write_text("x")
    (partial / "link").symlink_to(tmp_path)
    staging = Staging(tmp_path / "it", allowed, lambda path: path.name == "kept")
    assert sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*")) == ["a", "a/kept"]
    staging.close()
    assert names(tmp_path) == []


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("rename", [1, 2])
def test_killed_in_the_swap(tmp_path: Path, rename: int, when: str) -> None:
    """A reader finds the old folder, none or the new one, and never a part; the next run finishes."""
    destination = tmp_path / "it"
    written(destination, "old")
    killed(destination, "rename", rename, when)
    if (rename, when) in ((1, "after"), (2, "before")):
        assert not destination.exists()
    else:
        assert (destination / "data").read_text() == ("old" if rename == 1 else "new")
    seen: list[str] = []
    data = destination / "data"
    staging = Staging(destination, lambda: seen.append(data.read_text() if data.exists() else "nothing"))
    # What was being replaced is back before anything is said of the destination.
    assert seen[-1] == ("new" if (rename, when) == (2, "after") else "old")
    (staging.folder / "data").write_text("newer")
    staging.commit()
    staging.close()
    assert names(tmp_path) == ["it"]
    assert (destination / "data").read_text() == "newer"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("method", "number"), [("mkdir", 1), ("mkdir", 2), ("open", 1), ("unlink", 1), ("write_text", 2)]
)
def test_killed_anywhere_else(tmp_path: Path, method: str, number: int, when: str) -> None:
    destination = tmp_path / "new" / "it"
    killed(destination, method, number, when)
    # The lock is removed last: only then is the new folder there.
    assert destination.exists() == (method == "unlink")
    written(destination, "newer")
    assert names(destination.parent) == ["it"]
    assert (destination / "data").read_text() == "newer"
