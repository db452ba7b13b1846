# SPDX-License-Identifier: Apache-2.0
"""Does the picture show what it should: the given first frame, its colours to the end, the prompt's colours."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ltxrt.image import first_frame as recompressed
from ltxrt_export.tiny.captions import held_out_captions
from ltxrt_export.tiny.measure import Pictures, nearest_colour, part_colours, psnr
from ltxrt_export.tiny.mouth import Floats
from ltxrt_export.tiny.world import PARTS, Scene

from .report import Figure, Report, Strip
from .studio import Camera, Shot
from .sync import AT_24_FPS, Sample, report_sync

__all__ = ["first_frames", "identity", "prompts"]

SIZES = ((128, 128), (192, 192))
STRENGTHS = (1.0, 0.7, 0.0)
FIRST_FRAME_PSNR = 26.0
RIGHT_PROMPTS = 0.95
SHORT_FRAMES, LONG_FRAMES = 25, 121
PLAIN_PROMPT = "a talking face"


def first_frames(camera: Camera, sounds: Sequence[Floats], crf: int, report: Report) -> None:
    """PSNR of the decoded frame 0 against the picture that was given, by size and strength.

    Args:
        camera: Makes the clips.
        sounds: One for every picture.
        crf: Of the H.264 compression that a first frame goes through before it is encoded. What that alone leaves is
            reported too: the PSNR of a model that repeats exactly what it is shown.
        report: Where the figures go.
    """
    question = "first frame"
    for size in SIZES:
        name = "{}x{}".format(*size)
        shots = [replace(shot, size=size, frames=SHORT_FRAMES) for shot in _faces(sounds)]
        given = [shot.drawn(shot.scene, 1) for shot in shots if shot.scene is not None]
        limits = [psnr(_as_seen(picture[0], crf), picture) for picture in given]
        report.figures.append(Figure(question, f"{name}: left by the compression of it", float(np.mean(limits)), "dB"))
        for strength in STRENGTHS:
            clips = [camera.film(replace(shot, strength=strength)) for shot in shots]
            values = [psnr(clip.pictures()[:1], picture) for clip, picture in zip(clips, given, strict=True)]
            least = FIRST_FRAME_PSNR if strength == 1 else None
            report.figures += [
                Figure(question, f"{name}, strength {strength:g}: PSNR", float(np.mean(values)), "dB", least),
                Figure(question, f"{name}, strength {strength:g}: lowest", min(values), "dB"),
            ]
            report.detail(question, size=name, strength=strength, psnr_db=[round(value, 2) for value in values])
            beside = [picture for i in range(min(3, len(clips))) for picture in (given[i][0], clips[i].pictures()[0])]
            report.strips.append(Strip(f"first frame {name}, strength {strength:g}\ngiven, decoded", beside))


def identity(camera: Camera, sounds: Sequence[Floats], report: Report) -> None:
    """Colours of the last of 121 frames against those of the picture that was given.

    The prompt names the same colours; a second figure is for a prompt that names none.
    """
    question = "identity after 121 frames"
    for strength, prompt in ((1.0, None), (0.7, None), (1.0, PLAIN_PROMPT)):
        name = f"strength {strength:g}" + (", prompt without colours" if prompt else "")
        right: list[bool] = []
        away: list[float] = []
        samples: list[Sample] = []
        for index, shot in enumerate(_faces(sounds)):
            assert shot.scene is not None
            clip = camera.film(replace(shot, frames=LONG_FRAMES, strength=strength, prompt=prompt or shot.prompt))
            given, shown = part_colours(shot.drawn(shot.scene, 1)), part_colours(clip.pictures()[-1:])
            right += [nearest_colour(shown[part]) == nearest_colour(given[part]) for part in PARTS]
            away += [float(np.linalg.norm(shown[part] - given[part])) for part in PARTS]
            samples.append(Sample.of(clip))
            if index == 0:
                report.strips.append(Strip.of(f"121 frames, {name}\n{clip.shot.prompt}", clip))
        report.figures += [
            Figure(question, f"{name}: parts right", float(np.mean(right)), "", None if prompt else 1.0),
            Figure(question, f"{name}: farthest colour", max(away), "levels"),
        ]
        if prompt is None:
            report_sync(report, "lip sync with a first frame", name, samples, AT_24_FPS)
        report.detail(question, of=name, distances=[round(value, 1) for value in away])


def prompts(camera: Camera, sounds: Sequence[Floats], count: int, report: Report) -> None:
    """Are the colours that a held-out prompt names the ones that its clip shows?"""
    question = "prompt obedience"
    parts: list[bool] = []
    whole: list[bool] = []
    for index, (prompt, names) in enumerate(held_out_captions()[:count]):
        sound = sounds[index % len(sounds)]
        clip = camera.film(Shot(prompt=prompt, names=names, sound=sound, seed=400 + index, frames=SHORT_FRAMES))
        pictures = clip.pictures()
        shown = {part: nearest_colour(colour) for part, colour in part_colours(pictures).items()}
        right = [shown[part] == names[part] for part in PARTS]
        parts += right
        whole.append(all(right))
        report.prompts.append((prompt, pictures[0], all(right)))
        if not all(right):
            report.detail(question, prompt=prompt, shown=shown)
    report.figures += [
        Figure(question, f"of {count} prompts all right", float(np.mean(whole)), "", RIGHT_PROMPTS),
        Figure(question, "parts right", float(np.mean(parts))),
    ]


def _faces(sounds: Sequence[Floats]) -> list[Shot]:
    """Shots with a first frame whose colours the prompt names, for every sound."""
    return [
        Shot(
            prompt=prompt,
            names=names,
            sound=sound,
            seed=300 + index,
            scene=Scene.draw(np.random.default_rng([31, index]), names),
        )
        for index, (sound, (prompt, names)) in enumerate(zip(sounds, held_out_captions()[32:], strict=False))
    ]


def _as_seen(picture: Pictures, crf: int) -> Pictures:
    """A picture [H, W, 3] as the image encoder sees it, [1, H, W, 3]."""
    height, width = picture.shape[:2]
    values = recompressed(picture, width, height, crf)[0, :, 0].transpose(1, 2, 0)
    return np.rint((values + 1) * 127.5).clip(0, 255).astype(np.uint8)[None]
