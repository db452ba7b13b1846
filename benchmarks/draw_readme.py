# SPDX-License-Identifier: Apache-2.0
"""The README's picture: what ``ltxrt demo`` makes of the speech that ships with ltxrt.

    python benchmarks/draw_readme.py [--bundle DIR] [--out FILE]

Three frames of the file that the command writes, and below them the opening of the mouth, measured in every frame,
over the energy of the sound. The frames are picked by the sound alone: the quietest moment, the loudest and one of
half the energy. The last line is the picture's path.
"""

import argparse
import io
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from quality.drawing import ENERGY, INK, MOUTH, PAPER, Box, draw_curves, font
from quality.studio import file_frames

from ltxrt.encoders import CONDITIONING_SAMPLE_RATE
from ltxrt.media import bundled_speech, conditioning_waveform, read_audio
from ltxrt_export.tiny.measure import Pictures, energy_envelope, mouth_opening, rgb_pictures
from ltxrt_export.tiny.mouth import Floats

PICTURE = Path(__file__).parents[1] / ".github" / "demo.png"
MAX_BYTES = 150_000
#: Frames a second of the demo.
RATE = 24

_SIDE, _GAP, _CAPTION, _CURVES = 256, 16, 24, 140
#: Frames at either end that are not shown.
_ENDS = 8


def main() -> None:
    """Make the clip and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="folder of a bundle; default: the one that ships")
    parser.add_argument("--out", type=Path, default=PICTURE)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "demo.mp4"
        bundle = ["--bundle", str(given.bundle)] if given.bundle else []
        subprocess.run(
            [sys.executable, "-m", "ltxrt", "demo", "--output", str(clip), *bundle],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        pictures = rgb_pictures(file_frames(clip))
    energy = energy_envelope(bundled_waveform(), len(pictures), RATE)
    given.out.write_bytes(encoded(drawn(pictures, energy)))
    print(given.out)


def bundled_waveform() -> Floats:
    """The speech of the demo as the audio encoder hears it, [samples] at 16 kHz."""
    track = read_audio(bundled_speech())
    samples = round(track.duration * CONDITIONING_SAMPLE_RATE)
    return conditioning_waveform(track, samples)[0].mean(axis=0)


def moments(energy: Floats) -> list[int]:
    """The quietest frame, the loudest and one of half the energy, in order of time."""
    inner = energy[_ENDS:-_ENDS]
    middle = (inner.min() + inner.max()) / 2
    return sorted(_ENDS + int(index) for index in (inner.argmin(), inner.argmax(), np.abs(inner - middle).argmin()))


def drawn(pictures: Pictures, energy: Floats) -> Image.Image:
    """Three frames above the curves."""
    width = 3 * _SIDE + 2 * _GAP
    image = Image.new("RGB", (width, _SIDE + _CAPTION + _CURVES + _CAPTION), PAPER)
    draw = ImageDraw.Draw(image)
    shown = moments(energy)
    for place, index in enumerate(shown):
        left = place * (_SIDE + _GAP)
        picture = Image.fromarray(pictures[index]).resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        image.paste(picture, (left, 0))
        draw.text((left + _SIDE / 2, _SIDE + 4), f"{index / RATE:.2f} s", INK, font(14), anchor="ma")
    top = _SIDE + _CAPTION
    draw_curves(draw, Box(0, top, width, _CURVES), energy, mouth_opening(pictures), shown)
    left = 0
    for colour, text in ((ENERGY, "energy of the sound"), (MOUTH, "opening of the mouth, measured in the frames")):
        draw.rectangle((left, top + _CURVES + 9, left + 11, top + _CURVES + 20), fill=colour)
        draw.text((left + 18, top + _CURVES + 6), text, INK, font(14))
        left += 220
    return image


def encoded(image: Image.Image) -> bytes:
    """As PNG, with as many colours as fit into ``MAX_BYTES``; a drawn face needs few.

    Raises:
        SystemExit: Not even 32 do.
    """
    for colours in (256, 128, 64, 32):
        file = io.BytesIO()
        image.quantize(colours, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        if file.tell() <= MAX_BYTES:
            return file.getvalue()
    raise SystemExit(f"the picture takes {file.tell()} bytes, at most {MAX_BYTES} belong into a repository")


if __name__ == "__main__":
    main()
