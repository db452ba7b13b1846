# SPDX-License-Identifier: Apache-2.0
"""Inputs of every kind become files of our own making; hostile ones become one clear error and leave nothing."""

import asyncio
import base64
import dataclasses
import io
import os
import threading
import time
from contextlib import asynccontextmanager

import numpy as np
import pytest
from PIL import Image

from ltxrt.errors import MediaError
from ltxrt.image import read_image
from ltxrt.media import bundled_speech, read_audio
from ltxrt.serve.inputs import InputLimits, InputReader, UploadShelf, redacted
from ltxrt.serve.sandbox import Sandbox, SandboxLimits


@asynccontextmanager
async def reader(folder, limits=None, sandbox=None):
    opened = Sandbox(sandbox or SandboxLimits())
    try:
        yield InputReader(limits or InputLimits(), opened, UploadShelf(folder / "uploads", 3))
    finally:
        await opened.close()


def uri(data, kind="audio/wav"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.fixture
def room(tmp_path):
    folder = tmp_path / "room"
    folder.mkdir()
    return folder


def read_all(folder, values, **options):
    """Read every (value, kind) in turn; what came of each, and the files."""

    async def run():
        outcomes = []
        async with reader(folder.parent, **options) as inputs:
            for number, (value, kind) in enumerate(values):
                try:
                    outcomes.append(await inputs.read("me", value, kind, folder / f"out{number}"))
                except MediaError as error:
                    outcomes.append(error)
        return outcomes

    return asyncio.run(run())


def png(width, height, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def test_samples_and_pixels_arrive_unchanged(room, speech):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    picture = io.BytesIO()
    Image.fromarray(pixels).save(picture, "PNG")
    values = [
        (uri(bundled_speech().read_bytes()), "audio"),
        (io.BytesIO(speech.read_bytes()), "audio"),
        (uri(picture.getvalue(), "image/png"), "image"),
    ]
    flac, wav, image = read_all(room, values)
    for number, source in enumerate((bundled_speech(), speech)):
        track, original = read_audio(room / f"out{number}"), read_audio(source)
        assert track.sample_rate == original.sample_rate
        assert np.array_equal(track.samples, original.samples)
    assert (flac["rate"], wav) == (read_audio(bundled_speech()).sample_rate, {"samples": 8000, "rate": 16000})
    assert image == {"width": 64, "height": 48}
    assert np.array_equal(read_image(room / "out2"), pixels)
    assert sorted(path.name for path in room.iterdir()) == ["out0", "out1", "out2"]


SECRET = b"ffconcat version 1.0\nfile secret.wav\n"
HOSTILE = [
    (uri(SECRET), "audio"),
    (uri(b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n"), "audio"),
    (uri(b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 96\n"), "audio"),
    (uri(b"RIFF\xff\xff\xff\xffWAVEfmt "), "audio"),
    (uri(b""), "audio"),
    (uri(b"\0" * 100), "image"),
    (uri(png(12_000, 12_000, "1")), "image"),
    (uri(png(64, 64)[:-40]), "image"),
    ("data:audio/wav;base64,@@@", "audio"),
    ("data:", "audio"),
    ("/etc/passwd", "audio"),
    ("file:///etc/passwd", "audio"),
    ("upload://" + "a" * 32, "audio"),
    ("upload://../../jobs.sqlite", "audio"),
    ("https://127.0.0.1/", "audio"),
    ("https://user:secret@example.com/", "image"),
]


def test_hostile_inputs(room):
    (room.parent / "secret.wav").write_bytes(b"RIFF")
    outcomes = read_all(room, HOSTILE)
    assert all(isinstance(outcome, MediaError) for outcome in outcomes), outcomes
    assert all("secret" not in str(outcome) for outcome in outcomes)
    assert list(room.iterdir()) == []


def test_caps_on_bytes(room, speech):
    data = speech.read_bytes()
    limits = InputLimits(audio_bytes=len(data), image_bytes=10)
    values = [(uri(data), "audio"), (uri(data + b"x"), "audio"), (uri(data * 3), "audio"), (uri(data), "image")]
    fits, *rest = read_all(room, values, limits=limits)
    assert fits["samples"] == 8000
    assert all("is larger than" in str(outcome) for outcome in rest)


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        ({"wall_seconds": 0.01}, "takes too long to read"),
        ({"output_bytes": 1000}, "too large when it is decoded|cannot be read within"),
        ({"audio_seconds": 1}, r"is longer than 1\.00 s"),
        ({"memory_bytes": 1 << 26}, "cannot be read within|too much memory"),
    ],
)
def test_caps_on_what_reading_takes(room, limits, problem):
    sound = io.BytesIO(bundled_speech().read_bytes())
    (outcome,) = read_all(room, [(sound, "audio")], sandbox=dataclasses.replace(SandboxLimits(), **limits))
    assert isinstance(outcome, MediaError)
    with pytest.raises(MediaError, match=problem):
        raise outcome
    assert list(room.iterdir()) == []


def test_uploads_are_the_caller_s_own_and_go_after_a_while(room, speech):
    shelf = UploadShelf(room / "uploads", 1)
    assert not shelf.full
    address, path = shelf.new("me")
    path.write_bytes(speech.read_bytes())
    assert shelf.full
    assert shelf.find("me", address) == path
    assert shelf.find("you", address) is None
    shelf.remove_older(time.time() - 100)
    assert path.exists()
    os.utime(path, (0, 0))
    shelf.remove_older(time.time() - 100)
    assert not path.exists()


def test_many_at_once_each_in_a_process_of_its_own(room, speech):
    data = speech.read_bytes()

    async def run():
        async with reader(room.parent) as inputs:
            reads = [inputs.read("me", io.BytesIO(data), "audio", room / f"out{number}") for number in range(8)]
            given_up = asyncio.create_task(inputs.read("me", io.BytesIO(data), "audio", room / "given-up"))
            await asyncio.sleep(0)
            given_up.cancel()
            return await asyncio.gather(*reads)

    assert asyncio.run(run()) == [{"samples": 8000, "rate": 16000}] * 8
    assert sorted(path.name for path in room.iterdir()) == [f"out{number}" for number in range(8)]
    assert children() == []


def test_a_caller_who_goes_away_while_a_file_is_brought_leaves_nothing(room, speech, monkeypatch):
    begun, go_on, bring = threading.Event(), threading.Event(), InputReader._bring

    def late(*arguments):
        begun.set()
        assert go_on.wait(20)
        bring(*arguments)

    async def run():
        async with reader(room.parent) as inputs:
            monkeypatch.setattr(InputReader, "_bring", late)
            reading = asyncio.create_task(inputs.read("me", io.BytesIO(speech.read_bytes()), "audio", room / "out"))
            await asyncio.to_thread(begun.wait, 20)
            reading.cancel()
            await asyncio.sleep(0.05)
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await reading

    asyncio.run(run())  # ends when its threads have
    assert list(room.iterdir()) == []


def test_no_process_is_left(room, speech):
    read_all(room, [(io.BytesIO(speech.read_bytes()), "audio")] * 2)
    assert children() == []


def children():
    """Processes of the sandbox that are still there."""
    return [entry for entry in os.listdir("/proc") if entry.isdigit() and _is_child(entry)]  # noqa: PTH208


def _is_child(process_id):
    try:
        with open(f"/proc/{process_id}/cmdline", "rb") as file:  # noqa: PTH123
            command = file.read()
        with open(f"/proc/{process_id}/stat") as file:  # noqa: PTH123
            parent = int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return False
    return parent == os.getpid() and b"ltxrt.serve.sandbox" in command


def test_records_hold_no_contents():
    assert redacted(uri(b"abc")) == "data:audio/wav;…"
    assert redacted("https://host.example/x?sig=1") == "address at host.example"
    assert redacted("upload://abc") == "upload://abc"
