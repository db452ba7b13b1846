# SPDX-License-Identifier: Apache-2.0
"""The command line on fake engines: what it writes, what it refuses, and what it leaves behind."""

import json
import os
import pty
import re
import resource
import signal
import statistics
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from typer.main import get_command

from ltxrt import cli, errors
from ltxrt.media import bundled_speech
from ltxrt.pipeline import Pipeline
from ltxrt.request import Request
from ltxrt.testing import fake_pipeline

# Runs ltxrt in a process of its own, on fake engines; LTXRT_TEST_SLOW makes every denoise step take that long.
DRIVER = """
import os, resource, time
from ltxrt import cli, testing
from ltxrt.pipeline import Pipeline

replay = testing.FakeCapture.replay
def slow_replay(self):
    time.sleep(float(os.environ.get("LTXRT_TEST_SLOW", "0")))
    replay(self)
testing.FakeCapture.replay = slow_replay

def fake_open(cls, bundle=None, **options):
    if "LTXRT_TEST_BUG" in os.environ:
        raise KeyError(os.environ["LTXRT_TEST_BUG"])
    return testing.fake_pipeline()
Pipeline.open = classmethod(fake_open)

if "LTXRT_TEST_FILE_BYTES" in os.environ:
    limit = int(os.environ["LTXRT_TEST_FILE_BYTES"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
cli.main()
"""

SMALL = ("--prompt", "a face", "--resolution", "128x128", "--seed", "5")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder."""
    path = tmp_path / "work"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


@pytest.fixture
def fake(monkeypatch):
    """Every bundle opens as fake engines."""
    monkeypatch.setattr(Pipeline, "open", classmethod(lambda cls, bundle=None, **options: fake_pipeline()))


@pytest.fixture
def sound(tmp_path, wav_bytes, speechlike):
    """A second of sound."""
    path = tmp_path / "voice.wav"
    path.write_bytes(wav_bytes(np.round(speechlike(16_000, 16_000) * 30_000), 16_000, "s16"))
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def driver(*arguments, **environment):
    """The driver as a subprocess that has just been started."""
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="surrogateescape",
        env={**os.environ, **environment},
    )


def refused(capsys, arguments, code, *parts):
    """The command is refused on one line with that code; stdout stays empty."""
    assert cli.run([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("engine: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


# --- clips ---


def test_demo(folder, fake, capsys):
    assert cli.run(["demo"]) == 0
    out, err = capsys.readouterr()
    assert out == "ltxrt-demo.mp4\n"
    assert names(folder) == ["ltxrt-demo.mp4"]
    for part in (
        "engine: onnxruntime-cpu",
        "denoise 1: 8/8",
        "118 frames",
        "192x192",
        "seed 7",
        "s of work per second",
    ):
        assert part in err
    assert cli.run(["demo"]) == 0  # under its own name a demo replaces the one before it
    capsys.readouterr()
    refused(capsys, ["demo", "--output", "ltxrt-demo.mp4"], 7, "ltxrt-demo.mp4", "--overwrite")
    assert cli.run(["demo", "--output", "ltxrt-demo.mp4", "--overwrite", "--seed", "8"]) == 0
    assert "seed 8" in capsys.readouterr().err


def test_generate_json(folder, fake, sound, capsys):
    flags = ["--frames-per-second", "23.976", "--video-quality", "low", "--no-generate-audio", "--json"]
    assert cli.run(["generate", "--audio", str(sound), *SMALL, *flags]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["output"] == "voice.mp4"
    assert names(folder) == ["voice.mp4"]
    expected = {"frames": 24, "frames_per_second": "24000/1001", "width": 128, "seed": 5, "video_quality": "low"}
    assert {name: result[name] for name in expected} == expected
    assert result["audio_samples"] is None
    assert result["real_time_factor"] > 0


def test_every_field_reaches_the_request(folder, fake, sound, capsys, monkeypatch):
    seen = []

    def stop(_, request, output):
        seen.append(request)
        raise errors.EngineError(f"no {output}")

    monkeypatch.setattr(Pipeline, "render_events", stop)
    values = {
        "prompt": "a face",
        "input_audio": str(sound),
        "input_image": "face.png",
        "match_audio_length": False,
        "num_frames": 33,
        "resolution": "square",
        "frames_per_second": 30.0,
        "image_strength": 0.25,
        "generate_audio": False,
        "video_quality": "maximum",
        "negative_prompt": "blur",
        "seed": 11,
    }
    flags = [
        "generate", "--prompt", "a face", "--audio", str(sound), "--image", "face.png", "--no-match-audio-length",
        "--num-frames", "33", "--resolution", "square", "--frames-per-second", "30", "--image-strength", "0.25",
        "--no-generate-audio", "--video-quality", "maximum", "--negative-prompt", "blur", "--seed", "11",
    ]  # fmt: skip
    refused(capsys, flags, 6, "no voice.mp4")
    assert seen == [Request(**values)]
    assert set(values) == set(Request.model_fields)
    refused(capsys, ["generate", "--prompt", "a face", "--audio", str(sound)], 6)
    assert seen[1] == Request(prompt="a face", input_audio=str(sound))


def test_flags_of_generate_are_the_contract():
    command = get_command(cli.app).commands["generate"]
    flags = {"/".join((*option.opts, *option.secondary_opts)): option.default for option in command.params}
    fields = {name: field.default for name, field in Request.model_fields.items()}
    assert set(flags) == {
        "--audio", "--prompt", "--image", "--match-audio-length/--no-match-audio-length", "--num-frames",
        "--resolution", "--frames-per-second", "--image-strength", "--generate-audio/--no-generate-audio",
        "--video-quality", "--negative-prompt", "--seed", "--bundle", "--output", "--overwrite", "--threads",
        "--prompt-cache", "--json",
    }  # fmt: skip
    for name in set(fields) - {"prompt", "input_audio", "input_image"}:
        flag = "--" + name.replace("_", "-")
        assert next(default for flag_, default in flags.items() if flag_.startswith(flag)) == fields[name]


def test_existing_files_are_kept(folder, fake, sound, capsys):
    Path("voice.mp4").write_bytes(b"dear")
    refused(capsys, ["generate", "--audio", sound, *SMALL], 7, "voice.mp4: exists", "--overwrite")
    assert Path("voice.mp4").read_bytes() == b"dear"
    inputs = ["generate", "--audio", sound, *SMALL, "--output", sound, "--overwrite"]
    refused(capsys, inputs, 7, "is an input of the clip")
    before = sound.read_bytes()
    assert cli.run(["generate", "--audio", str(sound), *SMALL, "--overwrite"]) == 0
    assert Path("voice.mp4").stat().st_size > 1000
    assert sound.read_bytes() == before


def test_names_that_are_not_unicode(folder, sound):
    name = os.fsdecode(b"cl\xffip.mp4")
    with driver("generate", "--audio", sound, *SMALL, "--output", name) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert names(folder) == [name]
    assert out == f"{name}\n"


# --- refusals ---

BAD_FIELDS = [
    (("--num-frames", "8"), "num_frames", "8"),
    (("--num-frames", "482"), "num_frames", "482"),
    (("--resolution", "100x100"), "resolution", "multiple"),
    (("--resolution", "huge"), "resolution", "landscape_16_9"),
    (("--frames-per-second", "0"), "frames_per_second", "1 to 60"),
    (("--frames-per-second", "61"), "frames_per_second", "1 to 60"),
    (("--frames-per-second", "nan"), "frames_per_second", "nan"),
    (("--frames-per-second", "inf"), "frames_per_second", "inf"),
    (("--image-strength", "1.01"), "image_strength", "0 to 1"),
    (("--image-strength", "nan"), "image_strength", "nan"),
    (("--image-strength", "-0.1"), "image_strength", "-0.1"),
    (("--video-quality", "best"), "video_quality", "low, medium, high, maximum"),
    (("--seed", "-2"), "seed", "-2"),
    (("--seed", str(2**63)), "seed", "0 to"),
    (("--prompt", "  "), "prompt", "not a space"),
    (("--prompt", "x" * 10_001), "prompt", "10000"),
    (("--negative-prompt", "x" * 10_001), "negative_prompt", "10000"),
    (("--audio", ""), "input_audio", "path"),
    (("--image", ""), "input_image", "path"),
]


@pytest.mark.parametrize(("flags", "field", "part"), BAD_FIELDS)
def test_fields_out_of_range(folder, fake, sound, capsys, flags, field, part):
    refused(capsys, ["generate", "--audio", sound, *SMALL, *flags], 3, f"{field}: ", part)
    assert names(folder) == []


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "see ltxrt --help"),
        (("paint",), "No such command 'paint'"),
        (("generate", "--prompt", "x"), "Missing option '--audio'"),
        (("generate", "--audio", "x"), "Missing option '--prompt'"),
        (("generate", "--audio", "x", *SMALL, "--num-frames", "ten"), "--num-frames"),
        (("generate", "--audio", "x", *SMALL, "--num-frames", "9.5"), "--num-frames"),
        (("generate", "--audio", "x", *SMALL, "--frames-per-second", "fast"), "--frames-per-second"),
        (("generate", "--audio", "x", *SMALL, "--seed", "1e3x"), "--seed"),
        (("generate", "--audio", "x", *SMALL, "--threads", "-1"), "--threads"),
        (("generate", "--audio", "x", *SMALL, "--frames", "9"), "No such option"),
        (("generate", "--audio"), "--audio"),
        (("verify",), "Missing argument"),
        (("presets", "extra"), "extra"),
    ],
)
def test_command_lines_that_do_not_parse(folder, capsys, arguments, part):
    if arguments:
        refused(capsys, arguments, 2, part, "see ltxrt --help")
    else:
        assert cli.run([]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "generate" in err


def test_audio_that_is_refused(folder, fake, tmp_path, sound, silent_video, wav_bytes, capsys):
    bad = {
        "missing.wav": (None, "does not exist"),
        "empty.wav": (b"", "is empty"),
        "text.wav": (b"Just some text.\n" * 50, "is not audio"),
        "silent.wav": (wav_bytes(np.zeros((1, 0), np.int16), 16_000, "s16"), "holds no sound"),
        "broken.flac": (bundled_speech().read_bytes()[:20_000], "is damaged or cut off"),
        "video.mp4": (silent_video.read_bytes(), "has no audio track"),
    }
    for name, (content, part) in bad.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        refused(capsys, ["generate", "--audio", path, *SMALL, "--output", "clip.mp4"], 4, "input_audio: ", name, part)
    refused(capsys, ["generate", "--audio", tmp_path, *SMALL], 4, "is a folder")
    assert names(folder) == []


def test_audio_that_is_too_long(folder, fake, tmp_path, wav_bytes, capsys):
    path = tmp_path / "long.wav"
    path.write_bytes(wav_bytes(np.ones((1, 8_000 * 21), np.int16), 8_000, "s16"))
    refused(capsys, ["generate", "--audio", path, *SMALL], 4, "21.000 s", "504 frames", "at most 20.041 s")
    assert names(folder) == []


def png(width, height):
    """A PNG whose header promises that many pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_images_that_are_refused(folder, fake, tmp_path, sound, capsys):
    bad = {
        "missing.png": (None, "does not exist"),
        "empty.png": (b"", "is empty"),
        "text.png": (b"Just some text.\n" * 50, "is not"),
        "bomb.png": (png(16_000, 16_000), "too many pixels"),
        "broken.png": (png(64, 64), "damaged"),
    }
    for name, (content, part) in bad.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        refused(capsys, ["generate", "--audio", sound, *SMALL, "--image", path], 4, "input_image: ", name, part)
    assert names(folder) == []


def test_outputs_that_cannot_be_written(folder, fake, sound, capsys):
    for output, part in (
        ("nowhere/clip.mp4", "nowhere does not exist"),
        (str(folder), "is a folder"),
        (f"{'x' * 300}.mp4", "too long"),
        ("/dev/null", "not a regular file"),
    ):
        refused(capsys, ["generate", "--audio", sound, *SMALL, "--output", output], 7, part)
    assert names(folder) == []


def test_a_folder_without_permission(folder, fake, sound, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    refused(capsys, ["generate", "--audio", sound, *SMALL], 7, "permission denied")


def test_errors_as_json(folder, fake, sound, capsys):
    arguments = ["generate", "--audio", str(sound), *SMALL, "--json"]
    assert cli.run([*arguments, "--frames-per-second", "nan"]) == 3
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert (error["type"], error["field"], error["exit_code"]) == ("RequestError", "frames_per_second", 3)
    assert f"error: {error['message']}\n" == err
    assert cli.run([*arguments, "--num-frames", "ten"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2
    assert cli.run(["generate", "--audio", "missing.wav", *SMALL, "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["error"]["problem"] == "does not exist"


def test_bundles_that_are_refused(folder, tmp_path, sound, capsys):
    arguments = ["generate", "--audio", sound, *SMALL, "--bundle"]
    refused(capsys, [*arguments, tmp_path / "nowhere"], 5, "is not a bundle")
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "manifest.json").write_text('{"schema_version": 99}')
    refused(capsys, [*arguments, newer], 5, "schema version 99", "reads 1")
    (newer / "manifest.json").write_text('{"schema_version": 1')
    refused(capsys, [*arguments, newer], 5, "is damaged")
    assert names(folder) == []


# --- processes: signals, full disks, pipes, bugs ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_stop_without_a_trace(folder, sound, number):
    with driver("generate", "--audio", sound, *SMALL, "--json", LTXRT_TEST_SLOW="0.3") as process:
        for line in process.stderr:
            if line.startswith("denoise 1: 2/8"):
                break
        assert len(names(folder)) == 1  # the hidden work file
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert [line for line in err.splitlines() if not line.startswith("denoise")] == [
        f"error: stopped by {number.name}, nothing is left behind"
    ]
    assert json.loads(out)["error"]["exit_code"] == 128 + number
    assert names(folder) == []


def test_ignored_signals_stay_ignored(folder, sound):
    script = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{DRIVER}"
    arguments = [sys.executable, "-c", script, "generate", "--audio", str(sound), *SMALL]
    with subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "LTXRT_TEST_SLOW": "0.1"},
    ) as process:
        process.stderr.readline()
        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=30)
    assert process.returncode == 0
    assert names(folder) == ["voice.mp4"]


@pytest.mark.parametrize("limit", ["0", "9000"])
def test_files_that_may_not_grow(folder, sound, limit):
    with driver("generate", "--audio", sound, *SMALL, LTXRT_TEST_FILE_BYTES=limit) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 7
    assert out == ""
    assert err.splitlines()[-1].startswith("error: voice.mp4: cannot be written (")
    assert "Traceback" not in err
    assert names(folder) == []


@pytest.mark.parametrize("size", ["8k", "24k"])  # full while it streams; full while the finished file is written
def test_full_disk(folder, sound, size):
    mounted = f"mount -t tmpfs -o size={size} none ."
    if subprocess.run(["unshare", "-rm", "sh", "-c", mounted], cwd=folder, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs in a namespace of their own")
    script = f'{mounted} && cd . && "$@"; code=$?; echo "left: $(ls -A)"; exit $code'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, "-c", DRIVER]
    ran = subprocess.run(
        [*command, "generate", "--audio", str(sound), *SMALL, "--output", f"{folder}/clip.mp4"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 7, ran.stderr
    assert ran.stderr.splitlines()[-1].endswith("clip.mp4: cannot be written (No space left on device)")
    assert ran.stdout == "left: \n"


def written_to(stdout, *arguments):
    """Exit code and stderr of ltxrt whose stdout is that file."""
    command = [sys.executable, "-m", "ltxrt", *arguments]
    ran = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    return ran.returncode, ran.stderr


BAD_REQUEST = ("generate", "--audio", "x", "--prompt", " ", "--json")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_stdout_that_cannot_be_written():
    with Path("/dev/full").open("w") as full:
        message = "error: standard output: cannot be written (No space left on device)\n"
        assert written_to(full, "presets") == (7, message)
        code, err = written_to(full, *BAD_REQUEST)
    assert code == 3
    assert len(err.splitlines()) == 1


def test_closed_pipe():
    read, write = os.pipe()
    os.close(read)
    assert written_to(write, "presets") == (1, "")
    code, err = written_to(write, *BAD_REQUEST)
    os.close(write)
    assert code == 3
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("debug", [False, True])
def test_bugs(folder, sound, debug):
    options = ["--debug"] if debug else []
    with driver(*options, "generate", "--audio", sound, *SMALL, "--json", LTXRT_TEST_BUG="two\nlines") as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert ("Traceback" in err) == debug
    if not debug:
        assert err.startswith("error: internal error: KeyError('two\\nlines')")
        assert len(err.splitlines()) == 1
        assert json.loads(out)["error"]["type"] == "KeyError"


# --- terminals ---


def on_a_terminal(sound, **environment):
    """What a terminal sees of a run."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, "generate", "--audio", str(sound), *SMALL, "--overwrite"],
        stdout=subprocess.DEVNULL,
        stderr=slave,
        env={"PATH": os.environ["PATH"], "TERM": "xterm-256color", "COLUMNS": "120", **environment},
    )
    os.close(slave)
    seen = b""
    while True:
        try:
            seen += os.read(master, 65_536)
        except OSError:  # the other end is closed
            break
    os.close(master)
    assert process.wait() == 0
    return seen.decode()


def test_bars_on_a_terminal(folder, sound):
    colour = re.compile(r"\x1b\[[0-9;]*(3|9)[0-9]m")
    seen = on_a_terminal(sound)
    assert re.search(r"denoise 1 .*8/8", seen)
    assert colour.search(seen)
    plain = on_a_terminal(sound, NO_COLOR="1")
    assert re.search(r"denoise 1 .*8/8", plain)
    assert not colour.search(plain)
    assert "\x1b" not in on_a_terminal(sound, TERM="dumb")


# --- help ---


def test_help_is_quick_and_light():
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "ltxrt", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time, which is the wall time of an idle machine and does not depend on what else runs.
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert statistics.median(seconds) < 0.5
    script = "import sys; from ltxrt import cli; cli.run(['--help']); print(*sys.modules, file=sys.stderr)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stderr.split()
    assert not {"numpy", "onnxruntime", "av", "soxr", "tokenizers", "PIL", "torch", "rich"} & set(loaded)
    assert "ltxrt.request" in loaded  # the list is what we think it is


def test_help_names_every_exit_code(capsys):
    assert cli.run(["--help"]) == 0
    text = capsys.readouterr().out
    listed = {int(code) for code in re.findall(r"^ +(\d+)  ", text, re.MULTILINE)}
    own = {getattr(errors, name).exit_code for name in errors.__all__} - {errors.ExportError.exit_code}
    assert listed == own | {0, 2, 130}


def test_version(capsys):
    assert cli.run(["--version"]) == 0
    assert re.fullmatch(r"ltxrt \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_presets(capsys):
    assert cli.run(["presets"]) == 0
    assert "high     8 + 3  19" in capsys.readouterr().out
    assert cli.run(["presets", "--json"]) == 0
    loaded = json.loads(capsys.readouterr().out)["presets"]
    assert [preset["name"] for preset in loaded] == ["low", "medium", "high", "maximum"]
    assert loaded[2]["stage_2_sigmas"] == [0.909375, 0.725, 0.421875, 0.0]


# --- verify ---


def test_verify(folder, fake, sound, capsys):
    assert cli.run(["generate", "--audio", str(sound), *SMALL]) == 0
    capsys.readouterr()
    assert cli.run(["verify", "voice.mp4"]) == 0
    assert "24 frames, 1.000 s, 128x128" in capsys.readouterr().out
    assert cli.run(["verify", "voice.mp4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["file"] == "voice.mp4"
    assert all(check["passed"] for check in report["checks"])


def test_verify_finds_what_is_wrong(folder, fake, sound, silent_video, capsys):
    assert cli.run(["verify", str(silent_video), "--json"]) == 8
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert {check["name"] for check in report["checks"] if not check["passed"]} >= {"ai_marked", "faststart"}
    assert cli.run(["verify", str(silent_video)]) == 8
    assert "FAILED  ai_marked" in capsys.readouterr().out
    refused(capsys, ["verify", sound], 4, "file: ")
    refused(capsys, ["verify", "missing.mp4"], 4, "does not exist")
