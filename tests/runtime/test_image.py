# SPDX-License-Identifier: Apache-2.0
"""Every pixel mode to sRGB, every bad image one MediaError, and the first frame equal to the reference's."""

import contextlib
import io
import math
import os
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile

from ltxrt.errors import EngineError, MediaError
from ltxrt.image import aspect_ratio, first_frame, read_image

HEIGHT, WIDTH = 20, 28


def colours(height=HEIGHT, width=WIDTH, seed=0):
    """Smooth random colours, [height, width, 3] uint8."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def save(tmp_path):
    """Writes an image, ``save(image, "PNG", **Pillow's options)``, under a name without a useful extension."""

    def write(image, form, **options):
        path = tmp_path / "upload.bin"
        image.save(path, form, **options)
        return path

    return write


# --- pixel modes ---


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_rgb_is_exact(save, form, options):
    pixels = colours()
    result = read_image(save(Image.fromarray(pixels), form, **options))
    assert result.dtype == np.uint8
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result, pixels)


@pytest.mark.parametrize(("form", "options"), [("JPEG", {"quality": 95, "subsampling": 0}), ("WEBP", {"quality": 95})])
def test_lossy_rgb_is_near(save, form, options):
    pixels = colours()
    result = read_image(save(Image.fromarray(pixels), form, **options))
    assert np.abs(result.astype(int) - pixels).mean() < 4


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA"])
def test_opaque_modes(save, mode):
    image = Image.fromarray(colours()).convert(mode)
    np.testing.assert_array_equal(read_image(save(image, "PNG")), np.asarray(image.convert("RGB")))


def test_16_bit_grey_is_scaled(save):
    grey = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    result = read_image(save(Image.fromarray(grey), "PNG"))
    np.testing.assert_array_equal(result[..., 0], np.round(grey / 257).astype(np.uint8))
    assert (result == result[..., :1]).all()


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpeg_modes(save, mode):
    image = Image.fromarray(colours()).convert(mode)
    result = read_image(save(image, "JPEG", quality=100))
    assert np.abs(result.astype(int) - np.asarray(image.convert("RGB"))).mean() < 3


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_alpha_is_put_on_white(save, form):
    pixels = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    pixels[..., 0] = 200  # red, also where it is hidden
    pixels[:10, :, 3] = 255
    pixels[15:, :, 3] = 51  # a fifth
    result = read_image(
        save(Image.fromarray(pixels), form, **({"lossless": True, "exact": True} if form == "WEBP" else {}))
    )
    assert (result[:10] == [200, 0, 0]).all()
    assert (result[10:15] == 255).all()
    assert (result[15:] == [244, 204, 204]).all()


def test_transparent_palette_and_grey(save):
    palette = Image.new("P", (WIDTH, HEIGHT), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30, 40, 50, 60])
    palette.paste(2, (0, 0, WIDTH, 5))
    result = read_image(save(palette, "PNG", transparency=2))
    assert (result[:5] == 255).all()
    assert (result[5:] == [10, 20, 30]).all()
    grey = Image.new("L", (WIDTH, HEIGHT), 90)
    grey.paste(7, (0, 0, WIDTH, 5))
    result = read_image(save(grey, "PNG", transparency=7))
    assert (result[:5] == 255).all()
    assert (result[5:] == 90).all()


# --- orientation, colour profile, animation ---


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda a: np.rot90(a)),
        (99, lambda a: a),
    ],
)
@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_exif_orientation(save, form, orientation, turned):
    pixels = colours()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    result = read_image(save(Image.fromarray(pixels), form, exif=exif, **options))
    np.testing.assert_array_equal(result, turned(pixels))


def test_broken_exif_is_ignored(save):
    pixels = colours()
    path = save(Image.fromarray(pixels), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    np.testing.assert_array_equal(read_image(path), pixels)


def srgb_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_icc_profile_is_converted(save, mode):
    # sRGB with the red and green primaries exchanged: the conversion must exchange the channels.
    profile = srgb_profile().replace(b"rXYZ", b"?XYZ").replace(b"gXYZ", b"rXYZ").replace(b"?XYZ", b"gXYZ")
    pixels = colours()
    result = read_image(save(Image.fromarray(pixels).convert(mode), "PNG", icc_profile=profile))
    assert np.abs(result.astype(int) - pixels[..., [1, 0, 2]]).max() <= 2


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_srgb_profile_changes_nothing(save, mode):
    image = Image.fromarray(colours()).convert(mode)
    result = read_image(save(image, "PNG", icc_profile=srgb_profile()))
    assert np.abs(result.astype(int) - np.asarray(image.convert("RGB"))).max() <= 1


@pytest.mark.parametrize("profile", [b"", b"junk", bytes(200), b"\xff" * 128 + b"RGB "])
def test_broken_profile_is_ignored(save, profile):
    pixels = colours()
    np.testing.assert_array_equal(read_image(save(Image.fromarray(pixels), "PNG", icc_profile=profile)), pixels)


@pytest.mark.parametrize("space", [b"GRAY", b"CMYK", b"Lab "])
def test_profile_of_another_colour_space_is_ignored(save, space):
    pixels = colours()
    profile = srgb_profile()
    path = save(Image.fromarray(pixels), "PNG", icc_profile=profile[:16] + space + profile[20:])
    np.testing.assert_array_equal(read_image(path), pixels)


@pytest.mark.parametrize(("form", "options"), [("WEBP", {"lossless": True}), ("PNG", {})])
def test_animation_gives_its_first_frame(save, form, options):
    frames = [Image.fromarray(colours(seed=seed)) for seed in range(3)]
    path = save(frames[0], form, save_all=True, append_images=frames[1:], duration=100, **options)
    with Image.open(path) as image:
        assert image.n_frames == 3
    np.testing.assert_array_equal(read_image(path), np.asarray(frames[0]))


def test_photo_with_a_second_picture(save):
    # Phones append a gain map or a preview to the JPEG.
    photo, extra = Image.fromarray(colours(64, 48)), Image.fromarray(colours(64, 48, seed=9))
    path = save(photo, "MPO", save_all=True, append_images=[extra], quality=95)
    assert np.abs(read_image(path).astype(int) - np.asarray(photo)).mean() < 6


# --- refusals ---


def refused(path, match):
    with pytest.raises(MediaError, match=match) as caught:
        read_image(path, field="input_image")
    error = caught.value
    assert error.field == "input_image"
    assert error.value == os.fspath(path)
    assert "\n" not in str(error)
    return error


@pytest.fixture
def undecodable(monkeypatch):
    """Makes decoding a failure of the test."""

    def load(_image):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)


@pytest.mark.parametrize("side", [12_000, 20_000])
def test_bombs_are_refused_before_a_pixel_is_decoded(save, side, request):
    path = save(Image.new("1", (side, side)), "PNG")
    assert path.stat().st_size < 100_000
    request.getfixturevalue("undecodable")
    error = refused(path, "pixels")
    assert "50 million pixels" in error.allowed


@pytest.mark.parametrize(("width", "height"), [(15, 40), (40, 15), (1, 1), (16_385, 16), (16, 16_385), (7_072, 7_072)])
def test_sizes_out_of_range(save, undecodable, width, height):
    refused(save(Image.new("1", (width, height)), "PNG"), f"is {width}x{height} pixels")


@pytest.mark.parametrize(("width", "height"), [(16, 16), (16_384, 16), (16, 16_384), (7_071, 7_071)])
def test_sizes_at_the_limit(save, width, height):
    assert read_image(save(Image.new("1", (width, height)), "PNG")).shape == (height, width, 3)


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "PPM", "ICO", "AVIF"])
def test_other_formats(save, form):
    refused(save(Image.fromarray(colours()), form), "is not an image that can be read")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b"text\n" * 100, "is not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image"),
        (b"\x89PNG\r\n\x1a\n", "is not an image"),
        (b"\xff\xd8\xff", "is not an image"),
        (b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(40), "is not an image"),
    ],
)
def test_what_is_not_an_image(tmp_path, content, match):
    path = tmp_path / "upload.png"
    path.write_bytes(content)
    refused(path, match)


def test_paths_that_lead_to_no_file(tmp_path):
    refused(tmp_path / "missing.png", "does not exist")
    refused(tmp_path, "is a folder")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_cut_off(save, form):
    path = save(Image.fromarray(colours(200, 300)), form)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(path, "is a damaged or cut off image|is not an image")


FUZZED = {
    "png": (Image.fromarray(colours()), "PNG", {}),
    "palette": (Image.fromarray(colours()).convert("P"), "PNG", {"transparency": 3}),
    "grey16": (Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20)), "PNG", {}),
    "profile": (Image.fromarray(colours()), "PNG", {"icc_profile": srgb_profile()}),
    "jpeg": (
        Image.fromarray(colours()),
        "JPEG",
        {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"},
    ),
    "cmyk": (Image.fromarray(colours()).convert("CMYK"), "JPEG", {}),
    "webp": (Image.fromarray(colours()).convert("RGBA"), "WEBP", {}),
    "animation": (
        Image.fromarray(colours()),
        "WEBP",
        {"save_all": True, "append_images": [Image.fromarray(colours())]},
    ),
}


@pytest.mark.parametrize("name", FUZZED)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_gives_an_image_or_an_error(tmp_path, name, data):
    image, form, options = FUZZED[name]
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    content = bytearray(buffer.getvalue())
    end = data.draw(st.integers(0, len(content)), label="cut at")
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=6), label="flipped"):
        content[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "upload"
    path.write_bytes(content[:end] if data.draw(st.booleans(), label="cut") else content)
    with contextlib.suppress(MediaError):
        result = read_image(path)
        assert result.dtype == np.uint8
        assert result.ndim == 3
        assert result.shape[2] == 3


# --- the first frame ---

# (source height, source width, canvas width, canvas height)
CANVASES = [
    (64, 64, 64, 64),  # nothing to do
    (100, 100, 64, 64),
    (97, 131, 256, 192),  # up, odd sides
    (480, 270, 512, 320),  # portrait to landscape: a wide crop
    (540, 960, 320, 512),
    (1000, 17, 64, 128),  # extreme aspect
    (33, 77, 704, 1280),
]


@pytest.mark.parametrize(("source_height", "source_width", "width", "height"), CANVASES)
def test_resize_equals_torch(source_height, source_width, width, height):
    torch = pytest.importorskip("torch")
    pixels = np.random.default_rng(1).integers(0, 256, (source_height, source_width, 3), dtype=np.uint8)
    scale = max(height / source_height, width / source_width)
    size = (math.ceil(source_height * scale), math.ceil(source_width * scale))
    planes = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(planes, size=size, mode="bilinear", align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    expected = (scaled / 127.5 - 1.0)[:, :, None, top : top + height, left : left + width].numpy()
    result = first_frame(pixels, width, height, 0)
    assert result.shape == (1, 3, 1, height, width)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    # Float32 rounding of values up to 1; torch adds the four corners in another order.
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)


def one_frame_video(pixels, crf):
    """What a player shows of ``pixels`` as an MP4 of one frame, by way of the container."""
    height, width = (side // 2 * 2 for side in pixels.shape[:2])
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=1, options={"crf": str(crf), "preset": "veryfast", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:height, :width]), format="rgb24")
        output.mux(stream.encode(frame.reformat(format="yuv420p")))
        output.mux(stream.encode(None))
    buffer.seek(0)
    with av.open(buffer) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


@pytest.mark.parametrize(("height", "width"), [(16, 16), (97, 131), (240, 321)])
@pytest.mark.parametrize("crf", [1, 33])
def test_compression_equals_a_video_of_one_frame(height, width, crf):
    pixels = colours(height, width, seed=crf)
    even_height, even_width = height // 2 * 2, width // 2 * 2
    result = first_frame(pixels, even_width, even_height, crf)
    expected = one_frame_video(pixels, crf).astype(np.float32).transpose(2, 0, 1)[None, :, None] / 127.5 - 1
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)


def test_compression_loses_more_at_a_higher_crf():
    pixels = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    pure = first_frame(pixels, 64, 64, 0)
    losses = [np.abs(first_frame(pixels, 64, 64, crf) - pure).mean() for crf in (1, 20, 33, 45)]
    assert losses == sorted(losses)
    assert losses[0] > 0


def test_first_frame_is_deterministic_and_leaves_its_input_alone():
    pixels = colours(270, 480)
    before = pixels.copy()
    first, second = (first_frame(pixels, 128, 64, 33) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(pixels, before)
    assert first.min() >= -1
    assert first.max() <= 1


def test_values_and_channel_order():
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[..., 0], pixels[..., 2] = 255, 127
    frame = first_frame(pixels, 64, 64, 0)
    assert (frame[0, 0] == 1).all()
    assert (frame[0, 1] == -1).all()
    np.testing.assert_allclose(frame[0, 2], 127 / 127.5 - 1, atol=1e-7)


def test_the_centre_is_kept():
    pixels = np.zeros((64, 192, 3), np.uint8)
    pixels[:, 64:128] = 255
    assert (first_frame(pixels, 64, 64, 0) == 1).all()


def test_sides_that_x264_does_not_take():
    with pytest.raises(EngineError, match="20000x16"):
        first_frame(np.zeros((16, 20_000, 3), np.uint8), 64, 64, 33)


def test_aspect_ratio():
    assert aspect_ratio(np.zeros((1080, 1920, 3), np.uint8)) == Fraction(16, 9)
    assert aspect_ratio(np.zeros((300, 200, 3), np.uint8)) == Fraction(2, 3)
