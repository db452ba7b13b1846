# SPDX-License-Identifier: Apache-2.0
"""The README is true: its example runs, its commands are CI's, its tree is the disk's, its links lead somewhere."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ltxrt import cli, errors
from ltxrt.media import bundled_speech
from ltxrt.readback import AI_DISCLOSURE, check_clip
from ltxrt.request import MAX_FRAMES, Request

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
DOCUMENTS = ("README.md", ".github/CONTRIBUTING.md", ".github/CHANGELOG.md")


def blocks(language):
    """Fenced blocks of that language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for tag, text in fenced if tag == language]


def test_example(tmp_path):
    (example,) = blocks("python")
    assert len(example.splitlines()) == 6
    shutil.copy(bundled_speech(), tmp_path / "speech.flac")
    ran = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert re.fullmatch(r"\d+ 118 4\.91\d+\n", ran.stdout)
    assert check_clip(tmp_path / "clip.mp4").ok


def test_commands_are_those_of_ci():
    demo, test = (block.strip() for block in blocks("sh"))
    script = (ROOT / ".ci/run").read_text("utf-8")
    assert test.endswith("&& pytest")
    assert script.splitlines()[-1] == test
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    workflow = (ROOT / ".github/workflows/ci.yml").read_text("utf-8")
    assert re.findall(r"- run: (.*)", workflow) == [".ci/run", demo, ".venv/bin/ltxrt verify ltxrt-demo.mp4"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links(document):
    text = (ROOT / document).read_text("utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or ((ROOT / document).parent / target).exists(), target
    for path in re.findall(r"`((?:runtime|kernels|export|tests|benchmarks|\.ci|\.github)/[\w./-]*)`", text):
        assert (ROOT / path).exists() or path == "benchmarks/results/", path


def tree():
    """Paths in the file tree, and its folders that show what is in them."""
    paths, open_folders, stack = [], set(), []
    for line in next(block for block in blocks("") if block.startswith("pyproject.toml")).splitlines():
        indent, name, phrase = re.fullmatch(r"( *)(\S+) +(\S.*)", line).groups()
        assert phrase
        del stack[len(indent) // 2 :]
        path = "/".join([*stack, name.rstrip("/")])
        if stack:
            open_folders.add("/".join(stack))
        if name.endswith("/"):
            stack.append(name.rstrip("/"))
        paths.append(path)
    return paths, open_folders


def test_tree_matches_the_disk():
    paths, open_folders = tree()
    assert len(paths) == len(set(paths))
    assert [path for path in paths if not (ROOT / path).exists()] == []
    for folder in open_folders:
        there = {
            f"{folder}/{path.name}"
            for path in (ROOT / folder).iterdir()
            if not path.name.startswith((".", "__pycache__")) and (folder != "tests" or path.is_file())
        }
        shown = {path for path in paths if path.rpartition("/")[0] == folder}
        assert shown == there
    # A folder that shows nothing of what is in it holds data.
    closed = {path for path in paths if (ROOT / path).is_dir()} - open_folders
    with_code = {path for path in closed if list((ROOT / path).rglob("*.py"))}
    # Or it is an op's, whose files CONTRIBUTING.md names.
    assert all(Path(path).parent.name == "ltxrt_kernels" for path in with_code)


def test_exit_codes():
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    assert listed == {getattr(errors, name).exit_code for name in errors.__all__} | {0, 2, 130}


def test_every_command_is_listed(capsys):
    assert cli.run(["--help"]) == 0
    commands = re.findall(
        r"^  (\w+) ", capsys.readouterr().out.split("Commands:")[1].split("Exit codes")[0], re.MULTILINE
    )
    assert len(commands) == 8
    assert all(re.search(rf"^ltxrt {command} ", README, re.MULTILINE) for command in commands)


def test_what_you_get():
    assert f"more than {MAX_FRAMES} frames" in README
    assert AI_DISCLOSURE in README
    for name in Request.model_fields["video_quality"].annotation.__args__:
        assert f"`{name}`" in README
    assert Request.model_fields["match_audio_length"].default is True


def test_no_machine_paths_or_numbers_without_a_source():
    for document in DOCUMENTS:
        assert not re.search(r"(?<![\w.])/(?:home|root|tmp|opt|work)/", (ROOT / document).read_text("utf-8"))
    # A measured time, rate or memory stands in a file of benchmarks/results/, with the machine that it is of.
    assert not re.search(r"\d (?:ms|s|seconds|fps|MB|GiB)\b", README)
