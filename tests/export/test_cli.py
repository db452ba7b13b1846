# SPDX-License-Identifier: Apache-2.0
"""``ltxrt-export``: exit codes, one line per error, the result on stdout and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ltxrt.bundle import Bundle
from ltxrt.errors import ExportError
from ltxrt_export import exporter
from ltxrt_export.cli import run
from ltxrt_export.exporter import ExportOptions, ExportStep, Sources
from ltxrt_export.networks.denoiser import Semantics
from ltxrt_export.parity import LIMIT, ParityRow
from ltxrt_export.quantize.calibration import Calibration, Origin
from ltxrt_export.tiny_bundle import TINY_OPTIONS, shipped_tiny

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and an empty one for temporary files."""
    folder, temporary = tmp_path / "work", tmp_path / "temporary"
    folder.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return folder


def nothing_left(work: Path) -> bool:
    return not any(work.iterdir()) and not any(work.with_name("temporary").iterdir())


@pytest.fixture
def model(tmp_path: Path) -> list[str]:
    """The flags that name a model."""
    paths = shipped_tiny(tmp_path / "model")
    return [
        f"--checkpoint={paths.checkpoint}",
        f"--text-encoder={paths.text_encoder}",
        f"--upsampler={paths.upsampler}",
    ]


def one_error(capture: Capture) -> str:
    """The only line of stderr, without its ``error:``."""
    out, err = capture.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


class Recorded:
    """Stands for the export: two networks, one of them checked."""

    def __init__(self) -> None:
        self.sources: Sources | None = None
        self.options: ExportOptions | None = None
        self.licence_file = b""

    def __call__(self, sources: Sources, destination: Path, options: ExportOptions) -> Generator[ExportStep]:
        self.sources, self.options = sources, options
        self.weights = sources.checkpoint.path.read_bytes()
        row = ParityRow("denoiser", "latent_next", {"f": 2, "Na": 31}, 2.5e-7, LIMIT, "(relative L2)")
        yield ExportStep(0, 2, "weights", note="weights: 1.0 MB copied")
        yield ExportStep(1, 2, "denoiser")
        yield ExportStep(2, 2, "done", (row,))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    made = Recorded()
    monkeypatch.setattr(exporter, "export_bundle", made)
    return made


def test_help_is_instant_and_names_the_exit_codes() -> None:
    script = "import sys; from ltxrt_export.cli import run; code = run(['--help']); print('torch' in sys.modules, code)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "False 0"
    for text in ("export", "tiny", "130  interrupted", "9  the checkpoint is refused"):
        assert text in done.stdout


@pytest.mark.parametrize("command", ["export", "tiny"])
def test_help_of_the_commands(capsys: Capture, command: str) -> None:
    assert run([command, "--help"]) == 0
    assert "--out" in capsys.readouterr().out


def test_without_a_command_there_is_help(capsys: Capture) -> None:
    assert run([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Usage: ltxrt-export" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--semantics", "R4"], "R4"),
        (["--semantics", "r3"], "r3"),
        (["--nonsense"], "--nonsense"),
        (["stray"], "stray"),
    ],
)
def test_a_command_line_that_does_not_parse(
    work: Path, model: list[str], capsys: Capture, arguments: list[str], message: str
) -> None:
    assert run(["export", *model, "--out", "bundle", *arguments]) == 2
    line = one_error(capsys)
    assert message in line
    assert line.endswith("(see ltxrt-export --help)")
    assert nothing_left(work)


def test_a_missing_checkpoint_flag(work: Path, model: list[str], capsys: Capture) -> None:
    name = model.pop(0).split("=")[0]
    assert run(["export", *model, "--out", "bundle"]) == 2
    assert name in one_error(capsys)


@pytest.mark.parametrize("flag", [1, 2])
def test_only_a_diffusers_folder_goes_alone(work: Path, model: list[str], capsys: Capture, flag: int) -> None:
    del model[flag]
    assert run(["export", *model, "--out", "bundle"]) == 9
    assert "name text encoder and upsampler too" in one_error(capsys)
    assert nothing_left(work)


@pytest.mark.parametrize("flag", [0, 1, 2])
def test_a_missing_file(work: Path, model: list[str], capsys: Capture, flag: int) -> None:
    model[flag] = model[flag].split("=")[0] + "=nowhere"
    assert run(["export", *model, "--out", "bundle"]) == ExportError.exit_code == 9
    assert one_error(capsys).startswith("nowhere")
    assert nothing_left(work)


def test_an_output_that_exists(work: Path, model: list[str], capsys: Capture) -> None:
    (work / "bundle").mkdir()
    for arguments in (["export", *model], ["tiny"], ["tiny", "--random"]):
        assert run([*arguments, "--out", "bundle"]) == 7
        assert one_error(capsys).startswith("bundle: exists already; choose another folder")
    assert [path.name for path in work.iterdir()] == ["bundle"]


def test_an_output_that_is_no_bundle(work: Path, capsys: Capture) -> None:
    (work / "photos").mkdir()
    (work / "photos" / "one.jpg").write_text("x")
    assert run(["tiny", "--out", "photos", "--overwrite"]) == 7
    assert one_error(capsys) == "photos: is not a bundle, so it is not overwritten; choose another folder"
    assert (work / "photos" / "one.jpg").read_text() == "x"


def test_an_error_as_json(work: Path, model: list[str], capsys: Capture) -> None:
    model[0] = "--checkpoint=nowhere"
    assert run(["export", *model, "--out", "bundle", "--json"]) == 9
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["type"], error["exit_code"]) == ("ExportError", 9)
    assert error["message"].startswith("nowhere: ")


def test_the_result_is_a_path(work: Path, model: list[str], capsys: Capture, recorded: Recorded) -> None:
    assert run(["export", *model, "--out", "new/bundle"]) == 0
    out, err = capsys.readouterr()
    assert out == "new/bundle\n"
    assert "weights: 1.0 MB copied" in err
    assert "latent_next at f=2 Na=31: 2.50e-07 (relative L2)" in err
    assert recorded.options == ExportOptions()


def test_the_result_as_json(work: Path, model: list[str], capsys: Capture, recorded: Recorded) -> None:
    flags = ["--semantics", "R1", "--no-check", "--overwrite", "--json"]
    assert run(["export", *model, "--out", "bundle", *flags]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "bundle": "bundle",
        "parity": [
            {
                "network": "denoiser",
                "output": "latent_next",
                "sizes": {"f": 2, "Na": 31},
                "error": 2.5e-7,
                "limit": LIMIT,
                "unit": "(relative L2)",
            }
        ],
    }
    assert recorded.options == ExportOptions(semantics=Semantics.R1, check=False, overwrite=True)


@pytest.mark.parametrize("command", ["export", "tiny"])
def test_all_presets(work: Path, model: list[str], recorded: Recorded, command: str) -> None:
    """For a GPU, or with the tiny model for a CPU, unless the other is asked for."""
    origin = Origin(
        model="m", checkpoint_sha256="0" * 64, semantics="R3", stage_1_sigmas=(), stage_2_sigmas=(), clips=()
    )
    ranges = Calibration(made_from=origin, networks={})
    ranges.save(work / "c.json")
    arguments, base = (["export", *model], ExportOptions()) if command == "export" else (["tiny"], TINY_OPTIONS)
    assert run([*arguments, "--out", "bundle", "--precision", "presets"]) == 0
    assert recorded.options == replace(base, precisions="presets")
    assert base.backend == ("gpu" if command == "export" else "cpu")
    other = "cpu" if command == "export" else "gpu"
    flags = ["--precision", "presets", "--backend", other, "--calibration", "c.json"]
    assert run([*arguments, "--out", "bundle", *flags]) == 0
    assert recorded.options == replace(base, precisions="presets", backend=other, calibration=ranges)


def test_tiny_exports_the_shipped_weights(work: Path, capsys: Capture, recorded: Recorded) -> None:
    assert run(["tiny", "--out", "bundle"]) == 0
    assert capsys.readouterr().out == "bundle\n"
    assert recorded.options == TINY_OPTIONS
    assert recorded.weights == Bundle.open().file("networks/ltx-2.3-tiny.safetensors").read_bytes()
    assert nothing_left(work)


def test_tiny_with_random_weights(work: Path, recorded: Recorded) -> None:
    assert run(["tiny", "--random", "--out", "bundle", "--no-check"]) == 0
    assert recorded.options is not None
    assert recorded.sources is not None
    assert not recorded.options.check
    assert recorded.sources.checkpoint.path.parent.parent == work.with_name("temporary")
    assert nothing_left(work)


def test_an_interruption_in_the_middle(
    work: Path, model: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        assert any(work.rglob("*.safetensors"))
        raise KeyboardInterrupt

    monkeypatch.setattr(exporter, "export_model", interrupted)
    for arguments in (["export", *model], ["tiny"]):
        assert run([*arguments, "--out", "new/bundle"]) == 130
        assert capsys.readouterr().out == ""
        assert nothing_left(work)


def test_an_internal_error_is_one_line_unless_asked_for_more(tmp_path: Path) -> None:
    # An import that fails is an internal error, and before torch is loaded.
    script = "import sys; sys.modules['ltxrt_export.exporter'] = None; from ltxrt_export.cli import main; main()"
    for flags in ([], ["--debug"]):
        command = [sys.executable, "-c", script, *flags, "tiny", "--out", "bundle"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert ("Traceback" in done.stderr) == bool(flags)
        assert len(done.stderr.splitlines()) == 1 or flags


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_it_and_leaves_nothing(tmp_path: Path, number: signal.Signals, code: int) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    script = "from ltxrt_export.cli import main; main()"
    command = [sys.executable, "-c", script, "tiny", "--out", "new/bundle"]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        process.send_signal(number)
        errors = process.stderr.read()
    assert first.startswith("weights: ")
    assert errors.endswith(f"error: stopped by {number.name}, nothing is left behind\n")
    assert process.returncode == code
    assert list(tmp_path.iterdir()) == [temporary]
    # ONNX Runtime may keep a file of its own there.
    assert not any(path.is_dir() for path in temporary.iterdir())
