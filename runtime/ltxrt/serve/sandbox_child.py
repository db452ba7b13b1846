# SPDX-License-Identifier: Apache-2.0
"""What is done with one file from a caller, in a process of its own: one order, plain samples or pixels, and the end.

The process may use little: no network where the kernel lets it go without, few files, bounded memory, time and output.
Whatever a hostile file makes of the decoders stays in here.
"""

import ctypes
import json
import os
import resource
import struct
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import MediaError
from ..image import read_image
from ..media import AudioTrack, read_audio

__all__ = ["carry_out", "load_readers", "write_wav"]

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_OPEN_FILES = 32
_FLOAT = 3  # WAV's format tag


def load_readers() -> None:
    """Import what Pillow would look for in every process anew."""
    Image.preinit()
    import_module("PIL.WebPImagePlugin")


def carry_out(order: bytes) -> bytes:
    """Confine this process for good, carry out an order, and say as JSON what came of it.

    Raises:
        Exception: What no reader should raise; to the server it is as a crash.
    """
    wanted = json.loads(order)
    _confine(wanted["memory_bytes"], wanted["cpu_seconds"], wanted["output_bytes"])
    try:
        answer = _audio(wanted) if wanted["kind"] == "audio" else _image(wanted)
    except MediaError as error:
        answer = {"problem": error.problem, "allowed": error.allowed}
    except MemoryError:
        answer = {"problem": "takes too much memory to read", "allowed": "a smaller file"}
    except OSError:
        answer = {"problem": "is too large when it is decoded", "allowed": "a smaller file"}
    return json.dumps(answer).encode()


def write_wav(track: AudioTrack, target: Path) -> None:
    """A track as a 32-bit float WAV file, which reads back as the same samples."""
    width = 4 * track.channels
    form = struct.pack("<HHIIHH", _FLOAT, track.channels, track.sample_rate, track.sample_rate * width, width, 32)
    size = track.samples.nbytes
    with target.open("wb") as file:
        file.write(b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt " + struct.pack("<I", len(form)) + form)
        file.write(b"data" + struct.pack("<I", size))
        file.write(np.ascontiguousarray(track.samples.T, "<f4").data)


def _audio(order: dict[str, Any]) -> dict[str, Any]:
    track = read_audio(order["source"], field=order["field"], max_seconds=Fraction(order["max_seconds"]))
    write_wav(track, Path(order["target"]))
    return {"samples": track.sample_count, "rate": track.sample_rate}


def _image(order: dict[str, Any]) -> dict[str, Any]:
    pixels = read_image(order["source"], field=order["field"])
    Image.fromarray(pixels).save(order["target"], "PNG", compress_level=1)
    return {"width": pixels.shape[1], "height": pixels.shape[0]}


def _confine(memory_bytes: int, cpu_seconds: int, output_bytes: int) -> None:
    for kind, limit in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, output_bytes),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    # Without a network where the kernel grants that to everyone; where it does not, the demuxers that could use one
    # are off all the same (media.py).
    ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
    os.umask(0o077)
