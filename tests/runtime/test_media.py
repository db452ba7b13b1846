# SPDX-License-Identifier: Apache-2.0
"""Every format to the exact sample, every bad file one MediaError, and cuts and rates to the exact length."""

import contextlib
import hashlib
import io
import os
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ltxrt import media
from ltxrt.errors import MediaError
from ltxrt.media import AudioTrack, bundled_speech, conditioning_waveform, fit, for_output, read_audio

# One frame of the codec that pads most: MP3 at low rates, after its encoder delay.
LOSSY_FRAME = 1152
# Raw AAC keeps the encoder's delay of one frame and the padding of the last one.
ADTS_DELAY = 1024


def track(samples, rate=48_000):
    return AudioTrack(np.ascontiguousarray(samples, np.float32), rate)


def correlation(left, right):
    return float(np.vdot(left, right) / np.sqrt(np.vdot(left, left) * np.vdot(right, right)))


# --- formats ---


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("kind", "bits"), [("u8", 8), ("s16", 16), ("s24", 24), ("s32", 32), ("f32", 0), ("f64", 0)])
def test_pcm_is_exact(tmp_path, wav_bytes, kind, bits, channels, rate):
    rng = np.random.default_rng(bits * rate + channels)
    if bits:
        top = 2 ** (bits - 1)
        values = rng.integers(-top, top, (channels, 5_001))
        values[:, 0], values[:, 1] = -top, top - 1
        expected = (values / top).astype(np.float32)
        stored = values + 128 if kind == "u8" else values
    else:
        stored = rng.uniform(-1, 1, (channels, 5_001)).astype("f4" if kind == "f32" else "f8")
        expected = stored.astype(np.float32)
    path = tmp_path / "sound"
    path.write_bytes(wav_bytes(stored, rate, kind))
    result = read_audio(path)
    assert result.sample_rate == rate
    assert result.duration == Fraction(5_001, rate)
    np.testing.assert_array_equal(result.samples, expected)


@pytest.mark.parametrize("rate", [8_000, 44_100, 96_000])
@pytest.mark.parametrize(("container", "codec"), [("flac", "flac"), ("ipod", "alac"), ("matroska", "flac")])
def test_lossless_codecs_are_exact(make_audio, speechlike, container, codec, rate):
    sound = (speechlike(rate // 2 + 37, rate, 2) * 32768).round() / np.float32(32768)
    result = read_audio(make_audio(sound, rate, container, codec))
    assert result.sample_rate == rate
    np.testing.assert_allclose(result.samples, sound, rtol=0, atol=1 / 32768)
    assert np.mean(result.samples == sound) > 0.99  # the encoder's own conversion to integers may round once


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    "case",
    [
        ("mp3", "libmp3lame", 8_000, LOSSY_FRAME),
        ("mp3", "libmp3lame", 22_050, 0),
        ("mp3", "libmp3lame", 44_100, 0),
        ("mp3", "libmp3lame", 48_000, 0),
        # MP4 edit lists count milliseconds: rounded up.
        ("ipod", "aac", 8_000, 8),
        ("ipod", "aac", 44_100, 45),
        ("ipod", "aac", 96_000, 96),
        ("mp4", "libopus", 48_000, 48),
        ("matroska", "aac", 44_100, 1024),
        ("ogg", "libopus", 48_000, 0),
        ("webm", "libopus", 48_000, 0),
    ],
)
def test_lossy_codecs_keep_length_and_place(make_audio, speechlike, channels, case):
    container, codec, rate, tolerance = case
    count = rate // 2 + 37
    sound = speechlike(count, rate, channels)
    result = read_audio(make_audio(sound, rate, container, codec))
    assert (result.channels, result.sample_rate) == (channels, rate)
    assert 0 <= result.sample_count - count <= tolerance
    assert correlation(result.samples[:, :count], sound) > 0.98


def test_vorbis(make_audio, speechlike):
    sound = speechlike(44_100, 44_100, 2)
    for container in ("ogg", "webm"):
        result = read_audio(make_audio(sound, 44_100, container, "vorbis"))
        assert 0 <= result.sample_count - 44_100 < 1024
        assert correlation(result.samples[:, :44_100], sound) > 0.98


@pytest.mark.parametrize("rate", [8_000, 44_100, 96_000])
def test_raw_aac_keeps_its_padding(make_audio, speechlike, rate):
    count = rate // 2
    sound = speechlike(count, rate)
    result = read_audio(make_audio(sound, rate, "adts", "aac"))
    assert ADTS_DELAY <= result.sample_count - count < ADTS_DELAY + 1024
    assert correlation(result.samples[:, ADTS_DELAY:][:, :count], sound) > 0.98


@pytest.mark.parametrize(("container", "codec"), [("mp4", "aac"), ("matroska", "libopus"), ("mov", "pcm_s16le")])
def test_the_sound_of_a_video(make_audio, speechlike, container, codec):
    sound = speechlike(24_000, 48_000, 2)
    result = read_audio(make_audio(sound, 48_000, container, codec, video=True))
    assert 0 <= result.sample_count - 24_000 <= 48
    assert correlation(result.samples[:, :24_000], sound) > 0.98


@pytest.mark.parametrize(("container", "codec"), [("wav", "pcm_s16le"), ("flac", "flac")])
def test_surround_keeps_the_voice_in_the_centre(make_audio, container, codec):
    left, right, centre, bass, back_left, back_right = np.eye(6, 600, dtype=np.float32).repeat(100, 1)[:, :600] / 2
    result = read_audio(
        make_audio(np.stack([left, right, centre, bass, back_left, back_right]), 48_000, container, codec, layout="5.1")
    )
    assert (result.channels, result.sample_count) == (2, 600)
    # One source channel speaks at a time: what each gives to the left and to the right.
    half = 0.5 / np.sqrt(2)
    gains = [[0.5, 0], [0, 0.5], [half, half], [0, 0], [half, 0], [0, half]]
    for index, (to_left, to_right) in enumerate(gains):
        middle = result.samples[:, index * 100 + 50]
        np.testing.assert_allclose(middle, [to_left, to_right], atol=1e-4)


def test_a_mix_over_full_scale_is_scaled_as_a_whole(make_audio):
    loud = np.full((6, 480), 0.9, np.float32)
    loud[:, 240:] = 0.09
    result = read_audio(make_audio(loud, 48_000, "wav", "pcm_f32le", layout="5.1"))
    assert result.samples.max() == 1.0
    np.testing.assert_allclose(result.samples[0, 300] / result.samples[0, 100], 0.1, rtol=1e-5)


def test_overshoot_is_clipped(tmp_path, wav_bytes):
    path = tmp_path / "sound"
    path.write_bytes(wav_bytes(np.array([[0.5, 1.5, -3.0, 1.0]]), 48_000, "f32"))
    np.testing.assert_array_equal(read_audio(path).samples, np.float32([[0.5, 1.0, -1.0, 1.0]]))


# --- what a file is ---


@pytest.mark.parametrize("name", ["sound.txt", "sound.mp3", "sound.m3u8", "sound.jpg", "sound", "söund ♪.sdp"])
def test_the_name_plays_no_part(tmp_path, wav_bytes, name):
    path = tmp_path / name
    path.write_bytes(wav_bytes(np.full((1, 10), 7), 16_000, "s16"))
    assert read_audio(str(path)).sample_count == 10


def id3(*frames: bytes, padding: int = 0) -> bytes:
    body = b"".join(frames) + bytes(padding)
    size = bytes(len(body) >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\x03\x00\x00" + size + body


def id3_frame(name: bytes, payload: bytes) -> bytes:
    return name + struct.pack(">IH", len(payload), 0) + payload


def cover_art() -> bytes:
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(picture, "PNG")
    return id3_frame(b"APIC", b"\x00image/png\x00\x03\x00" + picture.getvalue())


@pytest.mark.parametrize(
    "tag",
    [
        id3(id3_frame(b"TIT2", b"\x00title"), padding=300),
        id3(cover_art()),
        id3(padding=20) + id3(padding=5000),
        # Claims to be UTF-8 and is not.
        id3(id3_frame(b"TIT2", b"\x03\xff\xfe\x80\x80")),
    ],
    ids=["title", "cover", "two tags", "bad text"],
)
@pytest.mark.parametrize(("container", "codec"), [("mp3", "libmp3lame"), ("adts", "aac"), ("flac", "flac")])
def test_tags_in_front(make_audio, speechlike, container, codec, tag):
    path = make_audio(speechlike(22_050, 44_100), 44_100, container, codec)
    plain = read_audio(path)
    raw = path.read_bytes()
    # FFmpeg writes its own tag before MP3.
    bare = raw[10 + int.from_bytes(raw[8:10], "big") :] if raw.startswith(b"ID3") else raw
    path.write_bytes(tag + bare)
    np.testing.assert_array_equal(read_audio(path).samples, plain.samples)
    path.write_bytes(bare + b"TAG" + bytes(125))
    np.testing.assert_array_equal(read_audio(path).samples, plain.samples)


def test_metadata_in_no_encoding(tmp_path, wav_bytes):
    info = b"INFOINAM\x04\x00\x00\x00\xff\xfe\x80\x00"
    path = tmp_path / "sound"
    path.write_bytes(wav_bytes(np.full((1, 10), 7), 16_000, "s16") + b"LIST" + struct.pack("<I", len(info)) + info)
    assert read_audio(path).sample_count == 10


@pytest.mark.parametrize(
    "script",
    [
        "ffconcat version 1.0\nfile secret.wav\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\nsecret.wav\n#EXT-X-ENDLIST\n",
        "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nt=0 0\r\nm=audio 9 RTP/AVP 0\r\n",
        "<MPD><BaseURL>secret.wav</BaseURL></MPD>",
    ],
)
@pytest.mark.parametrize("name", ["upload", "upload.m3u8", "upload.wav"])
def test_scripts_that_open_other_files_are_not_audio(tmp_path, monkeypatch, wav_bytes, script, name):
    monkeypatch.chdir(tmp_path)
    Path("secret.wav").write_bytes(wav_bytes(np.full((1, 10), 7), 16_000, "s16"))
    Path(name).write_text(script)
    with pytest.raises(MediaError, match="is not audio"):
        read_audio(name)


# --- refusals ---


def refused(path, match, **options):
    with pytest.raises(MediaError, match=match) as caught:
        read_audio(path, field="input_audio", **options)
    error = caught.value
    assert error.field == "input_audio"
    assert error.value == os.fspath(path)
    assert "\n" not in str(error)
    assert error.allowed


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b"R", "is not audio"),
        (b"Just some text.\n" * 50, "is not audio"),
        ("Text".encode("utf-16") * 50, "is not audio"),
        (b"\x89PNG\r\n\x1a\n" + bytes(500), "is not audio"),
        (b"RIFF\x00\x01\x00\x00WEBPVP8 " + bytes(500), "is not audio"),
        (bytes(4096), "is not audio"),
        (b"fLaC" + bytes(4096), "is damaged or cut off"),
        (b"OggS" + bytes(4096), "is damaged or cut off"),
        (b"RIFF\x24\x00\x00\x00WAVE", "is damaged or cut off"),
        (b"\xff\xfb\x90\x64" + bytes(4096), "is damaged or cut off"),
        (b"\xff\xf1\x50\x80" + bytes(4096), "is damaged or cut off|holds no sound"),
        (b"\x00\x00\x00\x14ftypM4A " + bytes(4096), "is damaged or cut off"),
        (b"\x1a\x45\xdf\xa3" + bytes(4096), "is damaged or cut off"),
        (b"ID3\x03\x00\x00\x7f\x7f\x7f\x7f" + bytes(4096), "is damaged or cut off"),
    ],
)
def test_what_is_not_audio(tmp_path, capfd, content, match):
    path = tmp_path / "upload.wav"
    path.write_bytes(content)
    refused(path, match)
    assert capfd.readouterr() == ("", "")


def test_paths_that_lead_to_no_file(tmp_path):
    refused(tmp_path / "missing.wav", "does not exist")
    refused(tmp_path / "missing" / "missing.wav", "does not exist")
    refused(tmp_path, "is a folder")
    refused(str(tmp_path / "a\0b"), "is not a path")
    refused(str(tmp_path / ("x" * 5000)), "cannot be read")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "dangling", "does not exist")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    refused(tmp_path / "pipe", "is not a regular file")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch, wav_bytes):
    path = tmp_path / "sound.wav"
    path.write_bytes(wav_bytes(np.full((1, 10), 7), 16_000, "s16"))

    def denied(*_arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    refused(path, r"cannot be read \(Permission denied\)")


def test_a_video_without_sound(silent_video):
    refused(silent_video, "has no audio track")


def test_sound_of_no_length(tmp_path, wav_bytes):
    path = tmp_path / "sound.wav"
    path.write_bytes(wav_bytes(np.zeros((1, 0), np.int16), 16_000, "s16"))
    refused(path, "holds no sound")


@pytest.mark.parametrize("tag", [0x1234, 0x0161, 0x2001])
def test_codecs_that_are_not_read(tmp_path, wav_bytes, tag):
    content = bytearray(wav_bytes(np.full((2, 4000), 7), 16_000, "s16"))
    content[20:22] = struct.pack("<H", tag)
    path = tmp_path / "sound.wav"
    path.write_bytes(content)
    refused(path, "is encoded as .*, which is not read")


@pytest.mark.parametrize("rate", [1, 3_999, 384_001, 2**31 - 1])
def test_rates_that_no_sound_has(tmp_path, wav_bytes, rate):
    content = bytearray(wav_bytes(np.full((1, 100), 7), 16_000, "s16"))
    content[24:28] = struct.pack("<I", rate)
    path = tmp_path / "sound.wav"
    path.write_bytes(content)
    refused(path, "has a sample rate of|is damaged")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_samples_that_are_no_numbers(tmp_path, wav_bytes, bad, kind):
    sound = np.zeros((2, 9000))
    sound[1, 7000] = bad
    path = tmp_path / "sound.wav"
    path.write_bytes(wav_bytes(sound, 48_000, kind))
    refused(path, "not finite")


def test_integers_stored_as_floats(tmp_path, wav_bytes):
    path = tmp_path / "sound.wav"
    path.write_bytes(wav_bytes(np.array([[12000.0, -3.0]]), 48_000, "f32"))
    refused(path, "as large as 12000")


def test_too_long(make_audio, speechlike):
    sound = speechlike(48_000, 48_000)
    for container, codec in (("wav", "pcm_s16le"), ("ipod", "aac"), ("mp3", "libmp3lame")):
        path = make_audio(sound, 48_000, container, codec)
        # The padding of the last frame is no reason to refuse a track that fits.
        assert read_audio(path, max_seconds=Fraction(1)).duration == 1
        refused(path, r"is longer than 0\.99 s", max_seconds=Fraction(47_999, 48_000))
        refused(path, r"is longer than 0\.10 s", max_seconds=Fraction(1, 10))


def test_decoding_stops_at_the_cap(tmp_path, monkeypatch, make_audio):
    # Silence compresses without end; the cap has to stop the decoder, not judge its result.
    path = make_audio(np.zeros((2, 48_000 * 20), np.float32), 48_000, "flac", "flac")
    monkeypatch.setattr(media, "MAX_AUDIO_VALUES", 2 * 10_000)
    decoded = []
    floats = media._floats
    monkeypatch.setattr(media, "_floats", lambda frame: decoded.append(frame.samples) or floats(frame))
    refused(path, "is longer than")
    assert 10_000 < sum(decoded) < 30_000


def test_a_change_of_rate_on_the_way(tmp_path, make_audio, speechlike):
    first = make_audio(speechlike(48_000, 48_000), 48_000, "adts", "aac").read_bytes()
    second = make_audio(speechlike(8_000, 8_000), 8_000, "adts", "aac").read_bytes()
    path = tmp_path / "both.aac"
    path.write_bytes(first + second)
    refused(path, "changes its sample rate")


# --- damage ---


def test_a_wav_cut_short_plays_what_it_holds(tmp_path, wav_bytes):
    values = np.arange(10_000)[None] % 1000
    content = wav_bytes(values, 16_000, "s16")
    path = tmp_path / "sound.wav"
    path.write_bytes(content[: 44 + 2 * 6_000])
    np.testing.assert_array_equal(read_audio(path).samples, (values[:, :6_000] / 32768).astype(np.float32))
    path.write_bytes(content[:44])
    refused(path, "holds no sound|is damaged")


@pytest.mark.parametrize(("container", "codec"), [("flac", "flac"), ("adts", "aac"), ("ipod", "aac")])
def test_damage_that_is_reported_is_refused(make_audio, speechlike, container, codec):
    path = make_audio(speechlike(44_100, 44_100), 44_100, container, codec)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(path, "is damaged or cut off")


FUZZED = [
    ("wav", "pcm_s16le"),
    ("wav", "pcm_f32le"),
    ("mp3", "libmp3lame"),
    ("adts", "aac"),
    ("ipod", "aac"),
    ("flac", "flac"),
    ("ogg", "libopus"),
    ("ogg", "vorbis"),
    ("webm", "libopus"),
    ("mov", "pcm_s24le"),
]


@pytest.mark.parametrize(("container", "codec"), FUZZED)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_gives_sound_or_an_error(make_audio, speechlike, container, codec, data):
    path = make_audio(speechlike(4_800, 48_000, 2), 48_000, container, codec)
    content = bytearray(path.read_bytes())
    end = data.draw(st.integers(0, len(content)), label="cut at")
    # Headers are where damage does most.
    places = st.integers(0, min(len(content), 200) - 1) | st.integers(0, len(content) - 1)
    for place in data.draw(st.lists(places, max_size=6), label="flipped"):
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content[:end] if data.draw(st.booleans(), label="cut") else content)
    with contextlib.suppress(MediaError):
        result = read_audio(path)
        assert result.sample_count > 0
        assert np.abs(result.samples).max() <= 1.0


# --- fit ---


@given(
    have=st.integers(0, 4000),
    want=st.integers(0, 4000),
    rate=st.sampled_from([8_000, 44_100, 48_000]),
    channels=st.sampled_from([1, 2]),
)
@example(have=240, want=239, rate=48_000, channels=1)
@example(have=1000, want=1, rate=48_000, channels=2)
def test_fit(have, want, rate, channels):
    source = track(np.linspace(0.5, 1.0, channels * have).reshape(channels, have), rate)
    before = source.samples.copy()
    result = fit(source, want)
    assert result.samples.shape == (channels, want)
    assert result.sample_rate == rate
    np.testing.assert_array_equal(source.samples, before)
    if have == want:
        assert result is source
    elif have < want:
        np.testing.assert_array_equal(result.samples[:, :have], source.samples)
        assert not result.samples[:, have:].any()
    else:
        fade = min(want, round(rate * 0.005))
        np.testing.assert_array_equal(result.samples[:, : want - fade], source.samples[:, : want - fade])
        gain = result.samples[:, want - fade :] / source.samples[:, want - fade : want]
        assert (np.diff(gain, axis=1) < 0).all()
        assert (gain < 1).all()
        assert not result.samples[:, want - 1 :].any()


# --- rates ---


@pytest.mark.parametrize("rate", [44_100, 48_000])
def test_output_rates_are_kept_bit_for_bit(rate):
    source = track(np.random.default_rng(0).uniform(-1, 1, (2, 500)), rate)
    assert for_output(source) is source


@settings(deadline=None)
@given(
    count=st.integers(0, 30_000),
    rate=st.sampled_from([8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 88_200, 96_000, 192_000]),
    channels=st.sampled_from([1, 2]),
)
@example(count=1, rate=96_000, channels=1)  # half a sample: rounds to even, 0
@example(count=3, rate=96_000, channels=1)  # one and a half: 2
def test_output_length_is_exact(count, rate, channels):
    result = for_output(track(np.zeros((channels, count)), rate))
    assert result.sample_rate == 48_000
    assert result.samples.shape == (channels, round(Fraction(count * 48_000, rate)))


@pytest.mark.parametrize("rate", [8_000, 22_050, 32_000, 96_000])
def test_resampling_keeps_the_tone_and_its_phase(rate):
    def tone(of_rate):
        time = np.arange(of_rate) / of_rate
        return np.stack([0.5 * np.sin(2 * np.pi * 440 * time), 0.5 * np.cos(2 * np.pi * 1000 * time)])

    middle = slice(4_800, -4_800)  # away from the ends, where the tone starts and stops
    result = for_output(track(tone(rate), rate))
    np.testing.assert_allclose(result.samples[:, middle], tone(48_000)[:, middle], atol=1e-4)


def test_resampled_square_wave_stays_in_range():
    square = np.sign(np.sin(np.arange(8_000) * 0.3))[None]
    assert np.abs(for_output(track(square, 8_000)).samples).max() == 1.0


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_conditioning_keeps_events_in_place(rate, channels):
    sound = np.zeros((channels, 2 * rate), np.float32)
    sound[:, rate] = 0.9  # at one second
    waveform = conditioning_waveform(track(sound, rate), 40_000)
    assert waveform.shape == (1, 2, 40_000)
    assert waveform.dtype == np.float32
    assert waveform.flags.c_contiguous
    assert np.abs(np.abs(waveform).argmax(axis=2) - 16_000).max() <= 1
    assert not waveform[:, :, 32_000:].any()


def test_conditioning_of_16_khz_is_the_sound_itself():
    sound = np.random.default_rng(1).uniform(-1, 1, (1, 900)).astype(np.float32)
    for count in (1, 899, 900, 1200):
        waveform = conditioning_waveform(track(sound, 16_000), count)
        kept = min(count, 900)
        np.testing.assert_array_equal(waveform[0, 0, :kept], sound[0, :kept])
        np.testing.assert_array_equal(waveform[0, 1], waveform[0, 0])
        assert not waveform[0, :, kept:].any()


def test_stereo_stays_stereo():
    sound = np.stack([np.full(1600, 0.25), np.full(1600, -0.5)])
    waveform = conditioning_waveform(track(sound, 16_000), 1600)
    assert (waveform[0, 0] == 0.25).all()
    assert (waveform[0, 1] == -0.5).all()


# --- the track and the bundled speech ---


@pytest.mark.parametrize(
    "samples", [np.zeros((3, 5), np.float32), np.zeros(5, np.float32), np.zeros((1, 5)), np.zeros((0, 5), np.float32)]
)
def test_a_track_is_float32_with_one_or_two_channels(samples):
    with pytest.raises(ValueError, match="expected float32"):
        AudioTrack(samples, 48_000)


def test_bundled_speech():
    path = bundled_speech()
    assert path.stat().st_size < 120_000
    speech = read_audio(path)
    assert (speech.channels, speech.sample_rate) == (1, 44_100)
    assert speech.duration == Fraction(49, 10)
    loudness = np.sqrt(np.mean(speech.samples**2))
    assert 0.01 < loudness < 0.2
    assert for_output(speech) is speech
    origin = path.with_name("ORIGIN.md").read_text("utf-8")
    assert hashlib.sha256(path.read_bytes()).hexdigest() in origin
