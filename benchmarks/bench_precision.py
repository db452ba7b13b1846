# SPDX-License-Identifier: Apache-2.0
"""What precision costs in quality: final latents and frames of FP16, FP8 and FP8-mixed networks against fp32.

    python benchmarks/bench_precision.py --bundle FP32_BUNDLE [--calibration FILE] [--clips 3] [--out FILE]

The bundle's networks have to be fp32. Same noise, same schedule (8 + 3), same inputs on both sides; only the precision
of networks differs, one network at a time and then in each preset's combination. Without a calibration one is made
first. The clips are not those of the calibration: other noise, size and prompts. ONNX Runtime computes FP16 graphs in
fp32 on the CPU; with ``--rounding`` every node rounds its result as a GPU would, slowly, and BF16 is possible.
The last line is the record's path.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from ltxrt.bundle import Bundle
from ltxrt.engine import Array, Engine
from ltxrt.engine_store import Engines
from ltxrt.manifest import NETWORK_NAMES, NetworkEntry
from ltxrt.preset import load_presets
from ltxrt_export.quantize.calibrate import CalibrationOptions, calibrate, run_clip
from ltxrt_export.quantize.calibration import Calibration
from ltxrt_export.quantize.clips import CalibrationClip
from ltxrt_export.quantize.graph import stored_tensors
from ltxrt_export.quantize.precision import PrecisionSettings, apply_precision, needed, variants
from ltxrt_export.quantize.recording import ObservedEngine, link_weights, open_session
from ltxrt_export.quantize.twin import rounding_twin

RESULTS = Path(__file__).parent / "results"
CLIPS = (
    CalibrationClip("A doctor in a white coat explains an X-ray, close up.", "speech"),
    CalibrationClip("A singer with golden hair, portrait, studio light.", "chords", "face"),
    CalibrationClip("A robot talks to the camera on a teal background.", "syllables", "gradient"),
)
OPTIONS = CalibrationOptions(width=192, height=192, frames=49)
SEED = 1000


@dataclass(frozen=True)
class Row:
    """One configuration, over all clips; the worst clip counts, the time is the median."""

    configuration: str
    precisions: Mapping[str, str]
    latent_relative_l2: float
    luma_psnr_db: float
    luma_psnr_db_by_clip: tuple[float, ...]
    seconds_per_clip: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="bundle of fp32 networks; default: the tiny one")
    parser.add_argument("--calibration", type=Path, help="a calibration of that bundle; default: made now")
    parser.add_argument("--clips", type=int, default=len(CLIPS), choices=range(1, len(CLIPS) + 1))
    parser.add_argument("--surroundings", default="fp16", choices=("fp32", "fp16", "bf16"), help="type around FP8")
    parser.add_argument("--rounding", action="store_true", help="round after every node, as a GPU does")
    parser.add_argument("--out", type=Path, default=RESULTS / "precision.json")
    given = parser.parse_args()
    bundle = Bundle.open(given.bundle)
    calibration = Calibration.load(given.calibration) if given.calibration else calibrated(bundle)
    with tempfile.TemporaryDirectory() as folder:
        settings = PrecisionSettings(
            folder=Path(folder),
            location=lambda path: path.name,
            calibration=calibration,
            surroundings=given.surroundings,
            wide="bf16" if given.rounding else "fp32",
        )
        engines = engine_table(bundle, settings, rounding=given.rounding)
        rows = measure(bundle, engines, CLIPS[: given.clips], bf16=given.rounding)
    record = {
        "benchmark": "precision",
        "model": bundle.manifest.model.name,
        "checkpoint_sha256": bundle.manifest.model.checkpoint_sha256,
        "size": f"{OPTIONS.width}x{OPTIONS.height}, {OPTIONS.frames} frames",
        "surroundings": given.surroundings,
        "rounding": given.rounding,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "system": platform.system()},
        "python": platform.python_version(),
        "onnxruntime": metadata.version("onnxruntime"),
        "rows": [asdict(row) for row in rows],
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(given.out)


def calibrated(bundle: Bundle) -> Calibration:
    """A calibration made now."""
    for step in calibrate(bundle):
        print(f"calibration {step.index}/{step.total} {step.note}", flush=True)
        if step.calibration is not None:
            return step.calibration
    raise AssertionError("the last step carries the calibration")


def engine_table(bundle: Bundle, settings: PrecisionSettings, *, rounding: bool) -> dict[tuple[str, str], Engine]:
    """Every network in fp32 and in every precision that a preset asks for, loaded."""
    wanted = needed(load_presets(), bf16=rounding)
    table: dict[tuple[str, str], Engine] = {}
    for name in NETWORK_NAMES:
        entry = fp32_entry(bundle, name)
        path = bundle.file(entry.file)
        model = onnx.load(path, load_external_data=False)
        link_weights(model, path.parent, settings.folder)
        weights = stored_tensors(model, path.parent)
        for precision in ("fp32", *wanted[name]):
            variant = apply_precision(model, name, precision, weights, settings)
            table[name, precision] = engine(entry, variant.model, settings.folder, rounding=rounding)
            for excess in variant.excesses:
                print(f"{name}: {excess.tensor} reaches {excess.amax:g}, beyond FP16 (near {excess.weight})")
    return table


def engine(entry: NetworkEntry, model: onnx.ModelProto, folder: Path, *, rounding: bool) -> Engine:
    """A graph in ONNX Runtime, as it is or as a GPU would round it."""
    inputs, outputs = (tuple(port.spec() for port in ports) for ports in (entry.inputs, entry.outputs))
    session = open_session(rounding_twin(model) if rounding else model, folder, exact=rounding)
    names = [port.name for port in outputs]

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))

    return ObservedEngine(entry.network, inputs, outputs, run)


def fp32_entry(bundle: Bundle, name: str) -> NetworkEntry:
    """The bundle's fp32 graph of a network."""
    found = [e for e in bundle.manifest.networks.values() if e.network == name and e.precision == "fp32"]
    if not found:
        raise SystemExit(f"{bundle.path}: {name} is not there in fp32")
    return found[0]


def measure(
    bundle: Bundle, engines: Mapping[tuple[str, str], Engine], clips: tuple[CalibrationClip, ...], *, bf16: bool
) -> list[Row]:
    """Every configuration against fp32."""
    everything = dict.fromkeys(NETWORK_NAMES, "fp32")
    configurations = {"fp32": everything}
    configurations |= {
        f"{name} {precision}": {**everything, name: precision} for name, precision in engines if precision != "fp32"
    }
    configurations |= {f"preset {preset.name}": variants(preset, bf16=bf16) for preset in load_presets()}
    expected = [clip_result(bundle, engines, everything, index, clip)[:2] for index, clip in enumerate(clips)]
    rows: list[Row] = []
    for name, precisions in configurations.items():
        results = [clip_result(bundle, engines, precisions, index, clip) for index, clip in enumerate(clips)]
        pairs = list(zip(results, expected, strict=True))
        psnrs = tuple(round(psnr(found[1], frames), 2) for found, (_, frames) in pairs)
        row = Row(
            configuration=name,
            precisions=precisions,
            latent_relative_l2=max(relative(found[0], latent) for found, (latent, _) in pairs),
            luma_psnr_db=min(psnrs),
            luma_psnr_db_by_clip=psnrs,
            seconds_per_clip=round(statistics.median(seconds for _, _, seconds in results), 3),
        )
        print(
            f"{name:24} latent {row.latent_relative_l2:.2e}  luma PSNR {row.luma_psnr_db:6.2f} dB"
            f"  {row.seconds_per_clip:6.2f} s a clip",
            flush=True,
        )
        rows.append(row)
    return rows


def clip_result(
    bundle: Bundle,
    engines: Mapping[tuple[str, str], Engine],
    precisions: Mapping[str, str],
    index: int,
    clip: CalibrationClip,
) -> tuple[NDArray[np.float32], NDArray[np.uint8], float]:
    """Final latent, luma of the frames, and seconds."""
    chosen = Engines(**{name: engines[name, precision] for name, precision in precisions.items()})
    began = time.perf_counter()
    latent, frames = run_clip(bundle, chosen, clip, replace(OPTIONS), SEED + index)
    return latent, frames[:, : OPTIONS.height], time.perf_counter() - began


def relative(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Relative L2 error."""
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))


def psnr(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB, at most 99 for equal frames."""
    error = float(np.mean((found.astype(np.float64) - expected) ** 2))
    return 99.0 if error == 0 else min(99.0, 10 * np.log10(255.0**2 / error))


if __name__ == "__main__":
    main()
