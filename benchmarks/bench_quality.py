# SPDX-License-Identifier: Apache-2.0
"""What the tiny model's clips show, on voices and prompts that training never saw.

    python benchmarks/bench_quality.py [--bundle DIR] [--precision-bundle DIR] [--quick] [--out DIR]

Every clip is made by the runtime from files, as a caller makes it; frames are measured as they leave the decoder and,
for lip sync, once more from the MP4 file. With ``--precision-bundle`` the presets of another bundle are compared with
the same presets of the first one, which should be fp32. ``--drawn`` measures clips that are drawn as they should be:
the best figures that measuring, chroma at half size and H.264 allow. ``--quick`` takes few clips and writes nothing
unless ``--out`` says where. The table comes on stdout, ``quality.json`` and ``quality.png`` into the results; the exit
code is 1 where a target is missed. Voices are espeak-ng's, which has to be installed.
"""

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import RESULTS, record
from quality import pictures, speech
from quality.drawing import sheet
from quality.report import Report
from quality.studio import Camera, DrawnStudio, Studio

from ltxrt.bundle import Bundle
from ltxrt_export.tiny.measure import energy_envelope, synchrony
from ltxrt_export.tiny.mouth import SAMPLE_RATE, Floats
from ltxrt_export.tiny.sound import espeak, espeak_available

PACKAGES = ("ltxrt", "numpy", "onnxruntime", "av", "pillow")
#: Longest sound: 121 frames at 24 frames a second.
SECONDS = 121 / 24
#: No two sounds have envelopes that go together this well; swapping such two would show nothing.
ALIKE = 0.7


@dataclass(frozen=True)
class Effort:
    """How many clips answer each question."""

    voices: int = 16
    sizes: int = 4
    still: int = 4
    faces: int = 6
    long: int = 4
    prompts: int = 64


QUICK = Effort(voices=3, sizes=1, still=1, faces=1, long=1, prompts=8)


def main() -> int:
    """Measure, print, write; 0 if every target is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="folder of the bundle; default: the one that ships")
    parser.add_argument("--precision-bundle", type=Path, help="another bundle, compared with the first one")
    parser.add_argument("--drawn", action="store_true", help="measure drawn clips instead of a bundle's")
    parser.add_argument("--quick", action="store_true", help="few clips, for trying")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads within one operator; default: all cores")
    parser.add_argument(
        "--out", type=Path, help="folder of the results; default: results, with --quick or --drawn none"
    )
    given = parser.parse_args()
    if not espeak_available():
        parser.exit(2, "espeak-ng is not installed; the held-out voices are its own (apt install espeak-ng)\n")
    began = time.perf_counter()
    effort = QUICK if given.quick else Effort()
    camera = DrawnStudio() if given.drawn else Studio(given.bundle, given.threads)
    other = Studio(given.precision_bundle, given.threads) if given.precision_bundle else None
    bundle = Bundle.open(given.bundle)
    report = measured(camera, other, bundle.manifest.model.image_crf, effort)
    print("\n".join(report.table()))
    out = given.out or (None if given.quick or given.drawn else RESULTS)
    if out is not None:
        made_from = {"drawn": given.drawn, "bundle": described(bundle), "precision_bundle": None}
        if other is not None:
            made_from["precision_bundle"] = described(other.bundle)
        seconds = round(time.perf_counter() - began)
        results = {**made_from, "clips": asdict(effort), "seconds": seconds, **report.as_json()}
        path = record("quality", PACKAGES, results, out).replace(out / "quality.json")
        name = "drawn" if given.drawn else bundle.manifest.model.name
        heading = f"{name}, held-out voices and prompts; grey: energy of the sound, red: measured opening of the mouth"
        sheet(report, heading).quantize(256).save(path.with_suffix(".png"), optimize=True)
        print(path)
    missed = report.missed()
    print(f"{len(missed)} of {sum(figure.passed is not None for figure in report.figures)} targets missed")
    return 1 if missed else 0


def measured(camera: Camera, other: Camera | None, crf: int, effort: Effort) -> Report:
    """All questions, with progress on stderr."""
    report = Report()
    sounds = held_out_sounds(effort.voices)
    shots = speech.cast(sounds)
    samples = speech.presets(camera, other, shots, report)
    _progress("presets")
    speech.frame_rates(camera, shots, report)
    _progress("frame rates")
    speech.sizes(camera, shots[: effort.sizes], report)
    _progress("sizes")
    speech.swapped(camera, shots, samples, report)
    _progress("swapped sounds")
    speech.silent(camera, effort.still, report)
    _progress("silence")
    pictures.first_frames(camera, sounds[: effort.faces], crf, report)
    _progress("first frames")
    pictures.identity(camera, sounds[: effort.long], report)
    _progress("identity")
    pictures.prompts(camera, sounds, effort.prompts, report)
    _progress("prompts")
    return report


def held_out_sounds(count: int) -> list[Floats]:
    """Sentences by held-out voices, mono at 16 kHz, [samples] each, no two alike in their energy."""
    random = np.random.default_rng(40)
    sounds: list[Floats] = []
    envelopes: list[Floats] = []
    while len(sounds) < count:
        spoken = espeak(random, held_out=True)[: round(SECONDS * SAMPLE_RATE)]
        envelope = energy_envelope(spoken, speech.FRAMES, 24)
        if all(synchrony(envelope, known, 1).correlation < ALIKE for known in envelopes):
            sounds.append(spoken)
            envelopes.append(envelope)
    return sounds


def described(bundle: Bundle) -> dict[str, Any]:
    """Which model, and the precision of every network by preset."""
    manifest = bundle.manifest
    return {
        "model": manifest.model.name,
        "checkpoint_sha256": manifest.model.checkpoint_sha256,
        "precision": {
            preset: {name: manifest.networks[key].precision for name, key in networks.items()}
            for preset, networks in manifest.presets.items()
        },
    }


def _progress(question: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {question}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
