# SPDX-License-Identifier: Apache-2.0
"""216 damaged media files, each opened by the sandbox: read as media or refused with one clear line.

Hostile files of other kinds follow, a few of them through the whole server.
"""

import asyncio
import base64
import io
import os
import random
import struct
import threading
import wave
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from socketserver import StreamRequestHandler, ThreadingTCPServer

import av
import numpy as np
import pytest
from PIL import Image

from ltxrt.errors import MediaError
from ltxrt.image import read_image
from ltxrt.media import read_audio
from ltxrt.serve.sandbox import Sandbox, SandboxLimits


def encoded(format_name, codec, rate=16_000):
    """Half a second of noise; in an MP4 beside a picture."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(1).integers(-8000, 8000, rate // 2, np.int16)
    with av.open(buffer, "w", format=format_name) as container:
        video = container.add_stream("libx264", rate=4, width=32, height=32) if format_name == "mp4" else None
        stream = container.add_stream(codec, rate=rate, layout="mono")
        if video is not None:
            container.mux(video.encode(av.VideoFrame(32, 32, "yuv420p")))
            container.mux(video.encode(None))
        resampler = av.AudioResampler(stream.format, stream.layout, stream.rate, stream.frame_size or 0)
        frame = av.AudioFrame.from_ndarray(noise[None], format="s16", layout="mono")
        frame.sample_rate = rate
        for ready in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(stream.encode(ready))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def wav():
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(np.random.default_rng(1).integers(-8000, 8000, 8000, np.int16).tobytes())
    return buffer.getvalue()


def picture(kind):
    buffer = io.BytesIO()
    ramp = np.linspace(0, 255, 64 * 48 * 3, dtype=np.uint8).reshape(48, 64, 3)
    Image.fromarray(ramp).save(buffer, kind)
    return buffer.getvalue()


def samples():
    """Name to kind and bytes."""
    sounds = {
        "wav": wav(),
        "mp3": encoded("mp3", "libmp3lame"),
        "flac": encoded("flac", "flac"),
        "ogg": encoded("ogg", "libopus", 48_000),
        "m4a": encoded("ipod", "aac"),
        "mp4": encoded("mp4", "aac"),
    }
    pictures = {kind: picture(kind) for kind in ("png", "jpeg", "webp")}
    return {
        **{name: ("audio", data) for name, data in sounds.items()},
        **{name: ("image", data) for name, data in pictures.items()},
    }


def mutants(data, others, seed):
    """24 damaged versions of a file, the same for the same seed."""
    chance = random.Random(seed)
    size = len(data)

    def flipped(count, end):
        changed = bytearray(data)
        for _ in range(count):
            changed[chance.randrange(end)] ^= 1 << chance.randrange(8)
        return bytes(changed)

    yield from (flipped(1, min(64, size)) for _ in range(4))
    yield from (flipped(1, size) for _ in range(3))
    yield from (flipped(max(2, size // 200), size) for _ in range(3))
    yield from (data[: size * part // 16] for part in (1, 4, 8, 12, 15))
    yield data[:-1]
    yield from (other[:32] + data[32:] for other in chance.sample(others, 3))
    yield bytes(32) + data[32:]
    for _ in range(2):
        start, length = chance.randrange(size), chance.randrange(1, size // 2)
        yield data[: start + length] + data[start : start + length] + data[start + length :]
        yield data[:start] + data[start + length :]


@contextmanager
def sandboxed(folder):
    """``ask(name, kind, data)``: what the sandbox answers, and whether a file was refused with what words."""
    limits = SandboxLimits(memory_bytes=2 << 30, cpu_seconds=10)
    with asyncio.Runner() as runner:
        sandbox = runner.run(opened(limits))

        def ask(name, kind, data):
            source = folder / "source"
            source.write_bytes(data)
            try:
                return runner.run(sandbox.read(kind, source, folder / name, f"input_{kind}"))
            except MediaError as error:
                return {"problem": error.problem, "allowed": error.allowed}
            finally:
                source.unlink()

        yield ask
        runner.run(sandbox.close())


async def opened(limits):
    return Sandbox(limits)


def checked(answer, target, kind):
    """Whether a file was accepted; fails where it was neither that nor refused as it should be."""
    if "problem" in answer:
        assert answer["problem"]
        assert not answer["problem"].startswith("cannot be read within"), "the decoder crashed or ran into a limit"
        assert answer["allowed"]
        assert "\n" not in answer["problem"]
        assert not target.exists()
        return False
    if kind == "audio":
        track = read_audio(target)
        assert (track.sample_count, track.sample_rate) == (answer["samples"], answer["rate"])
        assert np.isfinite(track.samples).all()
    else:
        assert read_image(target).shape == (answer["height"], answer["width"], 3)
    return True


def test_mutated_media(tmp_path):
    originals = samples()
    verdicts = []
    with sandboxed(tmp_path) as ask:
        for number, (name, (kind, data)) in enumerate(originals.items()):
            assert checked(ask("whole", kind, data), tmp_path / "whole", kind), name
            others = [other for key, (_, other) in originals.items() if key != name]
            for index, mutant in enumerate(mutants(data, others, number)):
                target = tmp_path / f"{name}-{index}"
                verdicts.append(checked(ask(target.name, kind, mutant), target, kind))
                target.unlink(missing_ok=True)
    assert len(verdicts) == 24 * 9
    assert 20 < sum(verdicts) < 196  # neither is everything refused nor everything taken
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


# --- files that are not what they say ---


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width, height, *chunks):
    """A PNG of one colour that says how large it is and holds as much."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    rows = zlib.compress(bytes((1 + (width + 7) // 8) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def text_bomb():
    """64 MB of text in a small picture's metadata."""
    return bomb(64, 64, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(64 << 20), 9)))


def animation(frames):
    buffer = io.BytesIO()
    pictures = [Image.new("RGB", (64, 64), (number % 256, 0, 0)) for number in range(frames)]
    pictures[0].save(buffer, "WEBP", save_all=True, append_images=pictures[1:])
    return buffer.getvalue()


def lying_wav():
    head = b"RIFF\xff\xff\xff\xffWAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 65535, 384_000, 0xFFFFFFFF, 65535, 16)
    return head + b"data\xff\xff\xff\xff" + bytes(1000)


def scripts(port):
    """Texts that players follow to files and to the network."""
    return {
        "ffconcat": "ffconcat version 1.0\nfile canary.wav\n",
        "ffconcat-absolute": "ffconcat version 1.0\nfile '{folder}/canary.wav'\n",
        "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{folder}/canary.wav\n#EXT-X-ENDLIST\n",
        "hls-http": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:{port}/a.ts\n#EXT-X-ENDLIST\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 96\n",
        "dash": f"<MPD><Period><BaseURL>http://127.0.0.1:{port}/</BaseURL></Period></MPD>",
        "svg": f'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1:{port}/x"/></svg>',
        "svg-file": '<svg xmlns="http://www.w3.org/2000/svg"><image href="file://{folder}/canary.wav"/></svg>',
        "eps": "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n({folder}/canary.wav) (r) file\n",
        "pls": f"[playlist]\nFile1=http://127.0.0.1:{port}/a.mp3\n",
        "rtsp": f"RTSPtextRTSP://127.0.0.1:{port}/\n",
        "hls-in-avi": "RIFF\x40\0\0\0AVI LIST#EXTM3U\n#EXTINF:1,\n{folder}/canary.wav\n",
        "hls-in-wav": "RIFF\x40\0\0\0WAVE#EXTM3U\n#EXTINF:1,\n{folder}/canary.wav\n",
    }


@contextmanager
def listening():
    """A port, and what connected to it."""
    seen = []

    class Note(StreamRequestHandler):
        def handle(self):
            seen.append(self.client_address)

    with ThreadingTCPServer(("127.0.0.1", 0), Note) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1], seen
        server.shutdown()
        thread.join()


def test_scripts_read_nothing(tmp_path):
    canary = tmp_path / "canary.wav"
    canary.write_bytes(wav())
    os.utime(canary, (1, 2))  # read before it was written, so that every reading moves the first of them
    with listening() as (port, seen), sandboxed(tmp_path) as ask:
        for text in scripts(port).values():
            for kind in ("audio", "image"):
                answer = ask("out", kind, text.replace("{folder}", str(tmp_path)).encode())
                assert not checked(answer, tmp_path / "out", kind), text
    assert seen == []
    assert canary.stat().st_atime == 1
    assert list(tmp_path.iterdir()) == [canary]
    canary.read_bytes()
    if canary.stat().st_atime == 1:
        pytest.skip("this file system notes no readings")


def bombs():
    """Small files that claim to be, or become, large ones; and heads without a body."""
    endless = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    yield "image", bomb(12_000, 12_000)
    yield "image", bomb(50_000_001, 1)
    yield "image", bomb(16, 20_000)
    yield "image", b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", endless)
    yield "image", b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01\xff\xd9"
    yield "image", text_bomb()
    yield "image", b"GIF89a" + bytes(100)
    yield "audio", lying_wav()
    yield "audio", b"fLaC" + bytes(100)
    yield "audio", b"OggS" + bytes(100)
    yield "audio", b"\0\0\0\x18ftypisom" + b"\xff" * 100


def test_bombs_are_refused_and_animations_are_one_frame(tmp_path):
    with sandboxed(tmp_path) as ask:
        for kind, data in bombs():
            assert len(data) < 200_000
            assert not checked(ask("out", kind, data), tmp_path / "out", kind), data[:60]
        assert checked(ask("out", "image", animation(200)), tmp_path / "out", "image")
    assert (read_image(tmp_path / "out")[0, 0] < 16).all()


def test_the_server_survives_them(server, client):
    originals = samples()
    hostile = [("audio", scripts(9)[name].encode()) for name in ("ffconcat", "hls", "sdp")]
    hostile += [("image", text_bomb()), ("audio", originals["m4a"][1][:1000]), ("image", originals["webp"][1][:100])]
    valid = {kind: next(data for each, data in originals.values() if each == kind) for kind in ("audio", "image")}

    def posted(case):
        kind, data = case
        fields = {f"input_{each}": uri(data if each == kind else valid[each]) for each in ("audio", "image")}
        return client.post("/api/ai/queue", json={"prompt": "a face", "resolution": "128x128", **fields})

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(posted, hostile))
    for (kind, _), answer in zip(hostile, answers, strict=True):
        error = answer.json()["error"]
        assert (answer.status_code, error["type"]) == (422, "invalid_media")
        assert error["detail"].startswith(f"input_{kind} ")
    assert client.get("/health").status_code == 200
    assert list((server.data / "incoming").iterdir()) == []
    assert "traceback" not in server.log.read_text()


def uri(data):
    return f"data:;base64,{base64.b64encode(data).decode()}"
