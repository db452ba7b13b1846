# SPDX-License-Identifier: Apache-2.0
"""BT.709 frames: reference against published colour values and swscale, kernel against reference."""

import numpy as np
import pytest

from ltxrt_kernels.ops import OPS
from ltxrt_kernels.rgb_to_yuv420 import RgbToYuv420
from ltxrt_kernels.rgb_to_yuv420.reference import generate_inputs, rgb_to_yuv420

#: Widths that allow accesses of every size, several frames, and blocks that end early.
PROBLEMS = (
    RgbToYuv420(frames=2, height=8, width=6),
    RgbToYuv420(frames=1, height=36, width=48),
    RgbToYuv420(frames=3, height=4, width=12, dtype="float16"),
    RgbToYuv420(frames=2, height=12, width=20, dtype="float32"),
)

# 8-bit limited-range BT.709 colour bars (100 %), as printed in broadcast test-signal tables.
COLOURS = {
    (1, 1, 1): (235, 128, 128),
    (0, 0, 0): (16, 128, 128),
    (1, 0, 0): (63, 102, 240),
    (0, 1, 0): (173, 42, 26),
    (0, 0, 1): (32, 240, 118),
    (1, 1, 0): (219, 16, 138),
    (0, 1, 1): (188, 154, 16),
    (1, 0, 1): (78, 214, 230),
}


def planes(picture: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Y, U and V of one I420 picture, cut by byte offsets rather than by rows."""
    data = picture.tobytes()
    luma, chroma = height * width, height * width // 4
    offsets = ((0, luma, (height, width)), (luma, chroma, None), (luma + chroma, chroma, None))
    return tuple(
        np.frombuffer(data, np.uint8, count, offset).reshape(shape or (height // 2, width // 2))
        for offset, count, shape in offsets
    )


@pytest.mark.parametrize(("rgb", "expected"), COLOURS.items())
def test_known_colours(rgb: tuple[int, ...], expected: tuple[int, ...]) -> None:
    frames = np.broadcast_to(2 * np.array(rgb, np.float32).reshape(1, 3, 1, 1) - 1, (2, 3, 8, 6))
    result = rgb_to_yuv420(frames)
    assert result.shape == (2, 12, 6)
    assert result.dtype == np.uint8
    for picture in result:
        for plane, level in zip(planes(picture, 8, 6), expected, strict=True):
            assert np.unique(plane).tolist() == [level]


def test_values_beyond_black_and_white_are_clipped() -> None:
    bright = rgb_to_yuv420(np.full((1, 3, 4, 4), 7.0))
    dark = rgb_to_yuv420(np.full((1, 3, 4, 4), -7.0))
    assert np.unique(bright[0, :4]).tolist() == [235]
    assert np.unique(dark[0, :4]).tolist() == [16]


def test_levels_are_rounded_not_truncated() -> None:
    # Luma 16 + 219 * 0.5 = 125.5 lies on a tie (to even); a hair above and below falls to either side.
    grey = [rgb_to_yuv420(np.full((1, 3, 4, 4), value))[0, 0, 0] for value in (-1e-4, 0.0, 1e-4)]
    assert grey == [125, 126, 126]


def test_chroma_is_the_mean_of_its_block() -> None:
    # One red pixel among three black ones: chroma of a quarter red, luma of each pixel its own.
    rgb = np.full((1, 3, 4, 4), -1.0)
    rgb[0, 0, 0, 0] = 1.0
    luma, blue, red = planes(rgb_to_yuv420(rgb)[0], 4, 4)
    assert luma[0, :2].tolist() == [63, 16]
    assert blue[0].tolist() == [round(128 - 224 * 0.25 * 0.2126 / 1.8556), 128]
    assert red[0].tolist() == [round(128 + 224 * 0.25 * 0.5), 128]


def test_agrees_with_swscale() -> None:
    av = pytest.importorskip("av")
    reformatter = pytest.importorskip("av.video.reformatter")
    height, width = 48, 64
    rgb = generate_inputs(RgbToYuv420(frames=3, height=height, width=width, dtype="float32"), 5)["rgb"]
    eight_bit = np.rint(np.clip((rgb + 1) / 2, 0, 1) * 255).astype(np.uint8)
    ours = rgb_to_yuv420(eight_bit / np.float32(127.5) - 1)
    for picture, frame in zip(ours, eight_bit, strict=True):
        source = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame.transpose(1, 2, 0)), format="rgb24")
        # Area interpolation is the one that takes chroma from the plain mean of 2x2 pixels.
        theirs = source.reformat(
            format="yuv420p",
            dst_colorspace=reformatter.Colorspace.ITU709,
            dst_color_range=reformatter.ColorRange.MPEG,
            interpolation=reformatter.Interpolation.AREA,
        ).to_ndarray()
        assert theirs.shape == picture.shape
        assert np.abs(theirs.astype(int) - picture).max() <= 2


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 4, 4, 4), (1, 3, 6, 4), (1, 3, 4, 3)])
def test_shapes_are_checked(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        rgb_to_yuv420(np.zeros(shape))


def test_sizes_are_checked():
    for height, width in ((6, 4), (4, 3)):
        with pytest.raises(ValueError, match=f"frames of {width}x{height} are not allowed"):
            RgbToYuv420(frames=1, height=height, width=width)


def test_inputs_exceed_the_range() -> None:
    rgb = generate_inputs(RgbToYuv420(frames=2, height=8, width=12, dtype="float32"), 1)["rgb"]
    assert rgb.max() > 1
    assert rgb.min() < -1


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_kernel_on_the_cpu(problem, emulated):
    assert emulated(problem, PROBLEMS) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("problem", [*PROBLEMS, *OPS["rgb_to_yuv420"].production], ids=str)
def test_kernel_on_the_gpu(problem, on_gpu):
    assert on_gpu(problem) <= 1
