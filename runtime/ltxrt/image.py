# SPDX-License-Identifier: Apache-2.0
"""First frame in: a still image decoded to sRGB, and what the image encoder sees of it.

The model learnt its first frames from compressed video, so the reference compresses a still with H.264 before
it is resized; both steps, their order and their arithmetic follow it. Source: Lightricks/LTX-2
packages/ltx-pipelines/src/ltx_pipelines/utils/media_io/decode.py (load_image_and_preprocess, preprocess) and
resize.py (resize_and_center_crop).

Where this differs from the reference on purpose: all eight EXIF orientations are applied (there: the three
rotations), alpha is put on white (there: dropped, which shows whatever colour the transparent pixels hide),
and x264 runs in one thread, because its rate control gives other bytes for every number of threads.
"""

import math
import os
import struct
import warnings
import zlib
from fractions import Fraction
from io import BytesIO

import av
import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from .errors import EngineError, MediaError
from .media import open_media_file

__all__ = [
    "IMAGE_ALLOWED",
    "IMAGE_FORMATS",
    "MAX_IMAGE_PIXELS",
    "MAX_IMAGE_SIDE",
    "MIN_IMAGE_SIDE",
    "aspect_ratio",
    "first_frame",
    "read_image",
]

#: Formats that are opened, by Pillow's names; the file's name plays no part.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
#: Largest image that is decoded: 150 MB of RGB.
MAX_IMAGE_PIXELS = 50_000_000
#: Longest side that is decoded, x264's own limit.
MAX_IMAGE_SIDE = 16_384
#: Shortest side that is decoded: one macroblock.
MIN_IMAGE_SIDE = 16
IMAGE_ALLOWED = "a PNG, JPEG or WebP image"

_SIZES_ALLOWED = (
    f"sides of {MIN_IMAGE_SIDE} to {MAX_IMAGE_SIDE} pixels, "
    f"at most {MAX_IMAGE_PIXELS // 1_000_000} million pixels in all"
)
# What Pillow's readers are known to raise for files that are not what they should be.
_PILLOW_ERRORS = (
    EOFError,
    IndexError,
    KeyError,
    OSError,
    OverflowError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)

Pixels = NDArray[np.uint8]


def read_image(source: str | os.PathLike[str], *, field: str = "input_image") -> Pixels:
    """Decodes a still image, the first frame of an animated one.

    The EXIF orientation is applied, an ICC profile is converted to sRGB, transparency is put on white, and
    every pixel mode (palette, grey, 16 bit, CMYK) becomes 8-bit RGB. The size is checked before any pixel is
    decoded.

    Args:
        source: Path of the file.
        field: Request field that errors name.

    Returns:
        ``[height, width, 3]`` uint8, sRGB.

    Raises:
        MediaError: The file is missing, empty, no PNG, JPEG or WebP, damaged, too small or too large.
    """

    def refuse(problem: str, allowed: str = IMAGE_ALLOWED) -> MediaError:
        return MediaError(field, os.fspath(source), problem, allowed)

    with open_media_file(source, field, IMAGE_ALLOWED) as file, warnings.catch_warnings():
        # Pillow warns about odd metadata and, above a limit of its own, about size; ours is checked below.
        warnings.simplefilter("ignore")
        try:
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                width, height = image.size
                if (
                    min(width, height) < MIN_IMAGE_SIDE
                    or max(width, height) > MAX_IMAGE_SIDE
                    or width * height > MAX_IMAGE_PIXELS
                ):
                    raise refuse(f"is {width}x{height} pixels", _SIZES_ALLOWED)
                image.load()
                return _rgb(_upright(image))
        except MediaError:
            raise
        except Image.DecompressionBombError as error:
            raise refuse("has far too many pixels", _SIZES_ALLOWED) from error
        except UnidentifiedImageError as error:
            raise refuse("is not an image that can be read") from error
        except _PILLOW_ERRORS as error:
            raise refuse(f"is a damaged or cut off image ({type(error).__name__})") from error


def first_frame(image: Pixels, width: int, height: int, crf: int) -> NDArray[np.float32]:
    """The conditioning image of a canvas: compressed, scaled to cover it, cropped around the centre.

    Deterministic, and equal to the reference up to float32 rounding (with its x264 held to one thread).

    Args:
        image: ``[h, w, 3]`` uint8, sRGB.
        width: Canvas width in pixels.
        height: Canvas height in pixels.
        crf: x264 constant rate factor of the compression, 33 for LTX-2.3; 0 leaves it out.

    Returns:
        ``[1, 3, 1, height, width]`` float32 in [-1, 1], C-contiguous.

    Raises:
        EngineError: x264 cannot compress the image.
    """
    if crf:
        image = _recompressed(image, crf)
    covered = _cover(image, width, height)
    scaled = covered / np.float32(127.5) - np.float32(1.0)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None, :, None])


def aspect_ratio(image: Pixels) -> Fraction:
    """Width over height, exact."""
    return Fraction(image.shape[1], image.shape[0])


def _upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation wants it to be seen."""
    try:
        return ImageOps.exif_transpose(image)
    except _PILLOW_ERRORS:
        # The pixels are decoded and fine; broken metadata is not worth refusing them.
        return image


def _rgb(image: Image.Image) -> Pixels:
    """A decoded image of any mode as sRGB."""
    profile = image.info.get("icc_profile")
    grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit grey at 255 instead of scaling it.
        wide = np.asarray(image, np.float32).clip(0, 65535)
        image = Image.fromarray((wide / np.float32(257)).round().astype(np.uint8))
    elif image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    if profile:
        image = _srgb(image, profile, grey=grey)
    return np.array(image.convert("RGB"))


def _srgb(image: Image.Image, profile: bytes, *, grey: bool) -> Image.Image:
    """The image converted from an ICC profile, or as it is where the profile does not fit or is broken."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        space = profile[16:20]  # field of the ICC header
        if space == b"RGB ":
            image = image.convert("RGB")
        elif space == b"GRAY" and grey:
            image = image.convert("L")
        elif (space, image.mode) != (b"CMYK", "CMYK"):
            return image
        target = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, source, target, outputMode="RGB") or image
    except (ImageCms.PyCMSError, *_PILLOW_ERRORS):
        # Viewers show such an image as if it were sRGB, and so does the reference.
        return image


def _recompressed(image: Pixels, crf: int) -> Pixels:
    """The image after one intra frame of H.264, its sides cut to even numbers."""
    height, width = image.shape[0] // 2 * 2, image.shape[1] // 2 * 2
    source = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:height, :width]), format="rgb24")
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height = width, height
    encoder.pix_fmt = "yuv420p"
    encoder.time_base = encoder.framerate = Fraction(1)
    encoder.thread_count = 1
    encoder.options = {"crf": str(crf), "preset": "veryfast"}
    decoder = av.CodecContext.create("h264", "r")
    decoder.thread_count = 1
    try:
        packets = [*encoder.encode(source.reformat(format="yuv420p")), *encoder.encode(None)]
        frames = [frame for packet in (*packets, None) for frame in decoder.decode(packet)]
        return np.asarray(frames[0].to_ndarray(format="rgb24"), np.uint8)
    except (FFmpegError, IndexError) as error:
        raise EngineError(f"x264 cannot compress a first frame of {width}x{height} pixels") from error


def _cover(image: Pixels, width: int, height: int) -> NDArray[np.float32]:
    """Scales to the smallest size that covers ``width`` x ``height`` and crops its centre.

    Bilinear between pixel centres and without a low-pass filter, as
    ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`` does it. Only the pixels that
    remain after the crop are computed.

    Returns:
        ``[height, width, 3]`` float32 in [0, 255].
    """
    scale = max(height / image.shape[0], width / image.shape[1])
    top, bottom, down = _taps(image.shape[0], math.ceil(image.shape[0] * scale), height)
    left, right, across = _taps(image.shape[1], math.ceil(image.shape[1] * scale), width)
    upper, lower = (
        _blend(lines[:, left], lines[:, right], across[None, :, None]) for lines in (image[top], image[bottom])
    )
    return _blend(upper, lower, down[:, None, None])


def _blend(first: NDArray[np.generic], second: NDArray[np.generic], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """``first`` to ``second`` by ``weight``, in float32."""
    near = np.multiply(first, np.float32(1) - weight, dtype=np.float32)
    return np.add(near, np.multiply(second, weight, dtype=np.float32), dtype=np.float32)


def _taps(source: int, scaled: int, kept: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """The two pixels that each kept output pixel lies between along one side, and the second one's weight."""
    start = (scaled - kept) // 2
    # float32 as in the reference, whose compilers fuse the multiplication and the subtraction into one rounding.
    ratio = np.float64(np.float32(source) / np.float32(scaled))
    position = (ratio * (np.arange(start, start + kept) + 0.5) - 0.5).astype(np.float32)
    position = np.maximum(position, np.float32(0))
    first = np.minimum(position.astype(np.intp), source - 1)
    weight = np.clip(position - first.astype(np.float32), 0, 1).astype(np.float32)
    return first, np.minimum(first + 1, source - 1), weight
