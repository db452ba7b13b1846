# SPDX-License-Identifier: Apache-2.0
"""Does the mouth follow the sound: lip sync by preset, frame rate and size, swapped sounds, silence."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ltxrt.preset import PRESET_NAMES
from ltxrt.shapes import covering_frames
from ltxrt_export.tiny.captions import held_out_captions
from ltxrt_export.tiny.measure import CLOSED, luma, psnr, ssim, synchrony
from ltxrt_export.tiny.mouth import Floats
from ltxrt_export.tiny.sound import silence

from .report import Figure, Report, Strip
from .studio import Camera, Clip, Shot
from .sync import AT_24_FPS, AT_OTHER_RATES, Sample, mean_correlation, report_sync

__all__ = ["FRAMES", "cast", "frame_rates", "presets", "silent", "sizes", "swapped"]

SECONDS = 3
FRAMES = covering_frames(24 * SECONDS)
LONGEST_FRAMES = 121
RATES = (12.5, 25.0, 30.0, 60.0)
SIZES = ((192, 192), (256, 128), (256, 256))
REFERENCE = "maximum"
CLOSED_SHARE = 0.95
#: FP8 against fp32: least luma PSNR in dB, and what lip sync may lose.
PRECISION_PSNR, PRECISION_LOSS = 30.0, 0.03
#: A border between chunks may change this much more than any other two frames.
FLICKER = 1.5


def cast(sounds: Sequence[Floats]) -> list[Shot]:
    """A shot for every sound, each with a held-out prompt and a seed of its own."""
    captions = held_out_captions()
    return [
        Shot(prompt=prompt, names=names, sound=sound, seed=100 + index, frames=FRAMES)
        for index, (sound, (prompt, names)) in enumerate(zip(sounds, captions, strict=False))
    ]


def presets(camera: Camera, other: Camera | None, shots: Sequence[Shot], report: Report) -> list[Sample]:
    """Every shot in every preset at 24 frames a second; samples of the default preset.

    Lip sync from the decoder's frames and from the MP4 file, each preset's frames against those of the longest
    schedule and, where there is another bundle, its frames against the same preset's here.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in PRESET_NAMES}
    played: dict[str, list[Sample]] = {name: [] for name in PRESET_NAMES}
    others: dict[str, list[Sample]] = {name: [] for name in PRESET_NAMES}
    for index, shot in enumerate(shots):
        clips = {name: camera.film(replace(shot, preset=name)) for name in PRESET_NAMES}
        for name, clip in clips.items():
            samples[name].append(Sample.of(clip))
            played[name].append(Sample.of(clip.played()))
            if name != REFERENCE:
                _compare(report, f"frames of a preset against {REFERENCE}", clip, clips[REFERENCE])
            if other is not None:
                compared = other.film(clip.shot)
                others[name].append(Sample.of(compared))
                _compare(report, "frames of the other bundle", compared, clip)
            if index == 0 or (name == "high" and index < 4):
                report.strips.append(Strip.of(f"24 fps, preset {name}\n{shot.prompt}", clip))
    question = "lip sync at 24 fps"
    for name in PRESET_NAMES:
        report_sync(report, question, name, samples[name], AT_24_FPS)
        report_sync(report, question, f"{name}, from the file", played[name], AT_24_FPS)
    _differences(report, f"frames of a preset against {REFERENCE}", None)
    if other is not None:
        for name in PRESET_NAMES:
            lost = mean_correlation(samples[name]) - mean_correlation(others[name])
            report.figures.append(Figure("lip sync lost in the other bundle", name, lost, at_most=PRECISION_LOSS))
        _differences(report, "frames of the other bundle", PRECISION_PSNR)
    return samples["high"]


def frame_rates(camera: Camera, shots: Sequence[Shot], report: Report) -> None:
    """Lip sync at other frame rates, in the default preset."""
    for rate in RATES:
        frames = min(LONGEST_FRAMES, covering_frames(round(SECONDS * rate)))
        clips = [camera.film(replace(shot, frames_per_second=rate, frames=frames)) for shot in shots]
        name, samples = f"{rate:g} fps", [Sample.of(clip) for clip in clips]
        report_sync(report, "lip sync at other rates", name, samples, AT_OTHER_RATES)
        report.strips.append(Strip.of(f"{name}\n{shots[0].prompt}", clips[0]))


def sizes(camera: Camera, shots: Sequence[Shot], report: Report) -> None:
    """Lip sync at other sizes, in the default preset at 24 frames a second."""
    for size in SIZES:
        clips = [camera.film(replace(shot, size=size)) for shot in shots]
        name = "{}x{}".format(*size)
        report_sync(report, "lip sync at other sizes", name, [Sample.of(clip) for clip in clips], AT_24_FPS)
        report.strips.append(Strip.of(f"{name}\n{shots[0].prompt}", clips[0]))


def swapped(camera: Camera, shots: Sequence[Shot], known: Sequence[Sample], report: Report) -> None:
    """Does every mouth go with its own sound rather than with another clip's, also after the sounds change places?

    Args:
        camera: Makes the clips.
        shots: The shots.
        known: What their clips show.
        report: Where the figures go.
    """
    question = "swapped sounds"
    turned = [replace(shot, sound=shots[(i + 1) % len(shots)].sound) for i, shot in enumerate(shots)]
    clips = [camera.film(shot) for shot in turned]
    energies = [sample.energy for sample in known]
    for name, samples, shift in (("before", known, 0), ("after", [Sample.of(clip) for clip in clips], 1)):
        own = [(index + shift) % len(shots) for index in range(len(shots))]
        matrix = np.array([[synchrony(s.mouth, energy, 1).correlation for energy in energies] for s in samples])
        fitting = float((matrix.argmax(axis=1) == own).mean())
        is_own = np.eye(len(shots), dtype=bool)[own]
        report.figures += [
            Figure(question, f"{name}: own sound fits best", fitting, "", 1.0),
            Figure(question, f"{name}: mean correlation, own", float(matrix[is_own].mean())),
            Figure(question, f"{name}: mean correlation, others", float(matrix[~is_own].mean())),
        ]
        report.detail(question, order=name, correlations=matrix.round(3).tolist())
    report.strips.append(Strip.of(f"sound of the next clip\n{shots[0].prompt}", clips[0]))


def silent(camera: Camera, count: int, report: Report) -> None:
    """Does the mouth stay shut without sound, and does the still picture jump between the decoder's chunks?"""
    closed: dict[str, list[Floats]] = {name: [] for name in PRESET_NAMES}
    across: list[float] = []
    within: list[float] = []
    for index, (prompt, names) in enumerate(held_out_captions()[:count]):
        sound = silence(np.random.default_rng([41, index]), LONGEST_FRAMES / 24)
        shot = Shot(prompt=prompt, names=names, sound=sound, seed=200 + index, frames=LONGEST_FRAMES)
        for name in PRESET_NAMES:
            clip = camera.film(replace(shot, preset=name))
            closed[name].append(np.asarray(clip.mouth() < CLOSED, np.float32))
            changes = np.abs(np.diff(luma(clip.frames).astype(np.int16), axis=0)).mean(axis=(1, 2))
            at_border = np.isin(np.arange(1, len(clip.frames)), clip.borders)
            across += changes[at_border].tolist()
            within += changes[~at_border].tolist()
            if name == "high" and index == 0:
                report.strips.append(Strip.of(f"silence\n{prompt}", clip))
    for name, shares in closed.items():
        report.figures.append(Figure("silence", f"{name}: mouth closed", float(np.mean(shares)), "", CLOSED_SHARE))
    # Medians: a blink that falls on a border is no flicker.
    question, border, elsewhere = "flicker between chunks", float(np.median(across)), float(np.median(within))
    report.figures += [
        Figure(question, "change across borders / elsewhere", border / max(elsewhere, 1e-3), "", at_most=FLICKER),
        Figure(question, "median change across borders", border, "levels"),
        Figure(question, "median change elsewhere", elsewhere, "levels"),
        Figure(question, "borders", float(len(across))),
    ]


def _compare(report: Report, question: str, clip: Clip, reference: Clip) -> None:
    """Keep luma PSNR and SSIM of two clips; every fourth frame is enough for SSIM."""
    first, second = luma(clip.frames), luma(reference.frames)
    report.detail(question, preset=clip.shot.preset, psnr_db=psnr(first, second), ssim=ssim(first[::4], second[::4]))


def _differences(report: Report, question: str, at_least: float | None) -> None:
    """Means over the clips of what ``_compare`` kept."""
    for preset in dict.fromkeys(detail["preset"] for detail in report.details[question]):
        kept = [detail for detail in report.details[question] if detail["preset"] == preset]
        report.figures += [
            Figure(question, f"{preset}: luma PSNR", float(np.mean([d["psnr_db"] for d in kept])), "dB", at_least),
            Figure(question, f"{preset}: SSIM", float(np.mean([d["ssim"] for d in kept]))),
        ]
