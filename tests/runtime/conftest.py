# SPDX-License-Identifier: Apache-2.0
"""Media files and a toy bundle for the tests of the runtime, made on the spot."""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

MakeAudio = Callable[..., Path]
MakeWav = Callable[[NDArray[np.generic], int, str], bytes]
Speechlike = Callable[..., NDArray[np.float32]]

# WAV stores 8 bits unsigned, more bits signed, and floats under format tag 3.
_PCM_DTYPES = {"u8": "u1", "s16": "<i2", "s32": "<i4", "f32": "<f4", "f64": "<f8"}


def _wav_bytes(samples: NDArray[np.generic], rate: int, kind: str) -> bytes:
    """A WAV file, written without FFmpeg.

    Args:
        samples: ``[channels, samples]``; for ``s24`` int32 values within 24 bits.
        rate: Samples per second.
        kind: ``u8``, ``s16``, ``s24``, ``s32``, ``f32`` or ``f64``.
    """
    channels = samples.shape[0]
    if kind == "s24":
        data = np.ascontiguousarray(samples.T, "<i4").view("u1").reshape(-1, 4)[:, :3].tobytes()
    else:
        data = np.ascontiguousarray(samples.T, _PCM_DTYPES[kind]).tobytes()
    width = int(kind[1:]) // 8
    form = struct.pack(
        "<HHIIHH", 3 if kind[0] == "f" else 1, channels, rate, rate * channels * width, channels * width, width * 8
    )
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def _speechlike(samples: int, rate: int, channels: int = 1) -> NDArray[np.float32]:
    """A decaying chirp from 200 Hz up, different in every channel: it correlates with itself in one place only."""
    time = np.arange(samples) / rate
    rows = [
        0.6 * np.sin(2 * np.pi * (200 + 60 * index + 300 * time) * time) * (1 - 0.5 * time / time[-1])
        for index in range(channels)
    ]
    return np.asarray(rows, np.float32)


@pytest.fixture(scope="session")
def wav_bytes() -> MakeWav:
    """``wav_bytes(samples, rate, kind)``: see ``_wav_bytes``."""
    return _wav_bytes


@pytest.fixture(scope="session")
def speechlike() -> Speechlike:
    """``speechlike(samples, rate, channels=1)``: see ``_speechlike``."""
    return _speechlike


@pytest.fixture
def make_audio(tmp_path: Path) -> MakeAudio:
    """Encodes ``[channels, samples]`` float32 with FFmpeg: ``make_audio(samples, rate, "mp3", "libmp3lame")``."""
    av = pytest.importorskip("av")

    def encode(
        samples: NDArray[np.float32], rate: int, container: str, codec: str, *, layout: str = "", video: bool = False
    ) -> Path:
        path = tmp_path / f"{codec}-{rate}-{samples.shape[0]}.{container}"
        layout = layout or ("mono", "stereo")[samples.shape[0] - 1]
        with av.open(str(path), "w", format=container) as output:
            picture = output.add_stream("mpeg4", rate=10) if video else None
            stream = output.add_stream(codec, rate=rate, layout=layout, options={"strict": "experimental"})
            if picture is not None:
                picture.width = picture.height = 16
                picture.pix_fmt = "yuv420p"
                for index in range(5):
                    still = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
                    still.pts, still.time_base = index, Fraction(1, 10)
                    output.mux(picture.encode(still))
                output.mux(picture.encode(None))
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        return path

    return encode


@pytest.fixture
def silent_video(tmp_path: Path) -> Path:
    """An MP4 of five frames without an audio track."""
    av = pytest.importorskip("av")
    path = tmp_path / "silent.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for _ in range(5):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
        output.mux(stream.encode(None))
    return path


# Six networks of a few nodes each, with the ports of the real ones at a toy width: enough for a grey clip.
_TOY_GRAPHS = {
    "text_encoder": """
(int64[1,n] input_ids) => (float[1,4,6] video_context, float[1,4,6] audio_context)
<int64[3] shape = {1, 4, 6}> {
    ids = Cast <to = 1> (input_ids)
    mean = ReduceMean <keepdims = 0> (ids)
    video_context = Expand (mean, shape)
    audio_context = Neg (video_context)
}""",
    "audio_encoder": """
(float[1,2,samples] waveform) => (float[1,Na,128] audio_tokens)
<int64[6] pads = {0, 0, 0, 0, 0, 1}, int64[3] repeats = {1, 1, 64}> {
    means = AveragePool <kernel_shape = [640], strides = [640]> (waveform)
    padded = Pad (means, pads)
    pairs = Transpose <perm = [0, 2, 1]> (padded)
    audio_tokens = Tile (pairs, repeats)
}""",
    "image_encoder": """
(float[1,3,1,H,W] image) => (float[1,hw,128] image_tokens)
<int64[1] axis = {2}, int64[1] one = {1}, int64[3] flat = {1, 3, -1}, int64[3] channels = {1, 128, 1}> {
    still = Squeeze (image, axis)
    means = AveragePool <kernel_shape = [32, 32], strides = [32, 32]> (still)
    rows = Reshape (means, flat)
    grey = ReduceMean <keepdims = 1> (rows, one)
    wide = Expand (grey, channels)
    image_tokens = Transpose <perm = [0, 2, 1]> (wide)
}""",
    "denoiser": """
(float[1,Nv,128] latent, float[1,Nv,128] clean, float[1,Nv,1] mask, float[1,Na,128] audio_tokens,
 float[1,4,6] video_context, float[1,4,6] audio_context, int64[Nv] token_row, float[1] sigma, float[1] sigma_next,
 float[2,f,2] rope_time, float[2,h,2] rope_height, float[2,w,2] rope_width, float[2,f,3] rope_cross_time,
 float[2,Na,3] rope_audio) => (float[1,Nv,128] latent_next)
<float one = {1}> {
    heard = ReduceMean <keepdims = 0> (audio_tokens)
    read = ReduceMean <keepdims = 0> (video_context)
    drift = Add (heard, read)
    velocity = Sub (latent, drift)
    time = Mul (mask, sigma)
    moved = Mul (velocity, time)
    guess = Sub (latent, moved)
    free = Mul (guess, mask)
    rest = Sub (one, mask)
    held = Mul (clean, rest)
    whole = Add (free, held)
    away = Sub (latent, whole)
    slope = Div (away, sigma)
    step = Sub (sigma_next, sigma)
    change = Mul (slope, step)
    latent_next = Add (latent, change)
}""",
    "upsampler": """
(float[1,128,f,h,w] latent) => (float[1,128,f,hh,ww] upsampled)
<float[5] scales = {1, 1, 1, 2, 2}> {
    upsampled = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">
        (latent, , scales)
}""",
    "video_decoder": """
(float[1,128,n,h,w] latent, float[p] first, float[q] last) => (uint8[T,rows,columns] frames)
<int64[1] axes = {1}, int64[2] ends = {0, 1}, float[5] scales = {1, 1, 8, 48, 32}, int64 seven = {7},
 int64[1] most = {100000}, int64[1] zero = {0}, float grey = {128}, float gain = {64}, float low = {16},
 float high = {235}> {
    mean = ReduceMean <keepdims = 1> (latent, axes)
    large = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">
        (mean, , scales)
    pixels = Squeeze (large, ends)
    count = Shape (first)
    start = Mul (count, seven)
    kept = Slice (pixels, start, most, zero)
    scaled = Mul (kept, gain)
    shifted = Add (scaled, grey)
    clipped = Clip (shifted, low, high)
    frames = Cast <to = 2> (clipped)
}""",
}
_ELEMENTS = {1: "float32", 2: "uint8", 7: "int64"}


def _toy_ports(values):
    return [
        {
            "name": value.name,
            "dtype": _ELEMENTS[value.type.tensor_type.elem_type],
            "shape": [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim],
        }
        for value in values
    ]


def _write_toy_bundle(folder: Path) -> None:
    onnx = pytest.importorskip("onnx")
    (folder / "networks").mkdir(parents=True)
    networks = {}
    for name, text in _TOY_GRAPHS.items():
        model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]> {name} {text}')
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, folder / "networks" / f"{name}.onnx")
        networks[f"{name}-key"] = {
            "network": name,
            "file": f"networks/{name}.onnx",
            "weights": ["networks/weights.bin"],
            "precision": "fp32",
            "opset": 23,
            "inputs": _toy_ports(model.graph.input),
            "outputs": _toy_ports(model.graph.output),
            "shape_range": {},
        }
    (folder / "networks" / "weights.bin").write_bytes(bytes(range(256)) * 40)
    full = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
    np.savez(
        folder / "tables.npz",
        rope_video=np.linspace(1, 2, 2, dtype=np.float32),
        rope_cross=np.linspace(1, 2, 3, dtype=np.float32),
        sigmas_stage_1=np.array(full),
        sigmas_stage_2=np.array(full[5:]),
    )
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, "<bos>": 1, "a": 2, "face": 3}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    files = {
        str(path.relative_to(folder)): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {
        "schema_version": 1,
        "model": {
            "name": "toy",
            "version": "2.3.0",
            "checkpoint_sha256": "0" * 64,
            "semantics": "R3",
            "licence": "none",
            "context_tokens": 4,
            "latent_channels": 128,
            "image_crf": 33,
            "auto_pixels": 128 * 192,
            "rope_max_position": [20.0, 2048.0, 2048.0],
            "stream": {"states": [], "first_chunk_latents": 2},
        },
        "files": files,
        "networks": networks,
        "presets": {preset: {name: f"{name}-key" for name in _TOY_GRAPHS} for preset in ("low", "high")},
        "made_with": {},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")


@pytest.fixture(scope="session")
def _toy_bundle_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "bundle"
    _write_toy_bundle(folder)
    return folder


@pytest.fixture
def toy_bundle(tmp_path: Path, _toy_bundle_original: Path) -> Path:
    """A whole bundle of toy networks with the presets ``low`` and ``high``, to run, edit and damage."""
    return Path(shutil.copytree(_toy_bundle_original, tmp_path / "toy-bundle"))
