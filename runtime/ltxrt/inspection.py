# SPDX-License-Identifier: Apache-2.0
"""What a bundle holds, for people and as JSON, and whether its large files are intact."""

import hashlib
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from .bundle import HASH_ON_OPEN_BYTES, Bundle
from .cli_report import columns, size_text
from .clip_memory import PHASES, ClipMemory, ClipSize, clip_memory
from .errors import BundleError, RequestError
from .manifest import NETWORK_NAMES, EngineEntry, NetworkEntry
from .plan import auto_size
from .preset import load_preset
from .result import Progress
from .shapes import CANVAS_MULTIPLE, PixelShape, covering_frames, frame_rate

__all__ = ["bundle_json", "bundle_lines", "hash_large_files", "memory_json", "memory_lines", "planned_memory"]

_CLIP = re.compile(r"(\d{2,4})x(\d{2,4})x(\d{1,3})")
#: The clip whose memory is shown unless another is asked for, at the bundle's automatic size.
_FRAMES, _RATE = 121, 24.0

_BLOCK_BYTES = 16 * 1024**2


def hash_large_files(bundle: Bundle) -> Iterator[Progress]:
    """Hash the files that opening the bundle only measured; a stage is a file, a step a byte.

    Raises:
        BundleError: A file cannot be read or does not have the manifest's hash.
    """
    for relative, entry in bundle.manifest.files.items():
        if entry.bytes <= HASH_ON_OPEN_BYTES:
            continue
        path, digest, done = bundle.file(relative), hashlib.sha256(), 0
        try:
            with path.open("rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
                    done += len(block)
                    yield Progress(relative, done, entry.bytes)
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}") from error
        if digest.hexdigest() != entry.sha256:
            raise BundleError(f"{path} does not have the hash of the manifest: the bundle is damaged")


def bundle_json(bundle: Bundle) -> dict[str, Any]:
    """The manifest, and where it is; whoever asks has checked every hash."""
    return {"path": str(bundle.path), "intact": True, "manifest": bundle.manifest.model_dump(mode="json")}


def bundle_lines(bundle: Bundle) -> Iterator[str]:
    """The bundle as text: model, networks with their ports and shape ranges, presets, files."""
    manifest, model = bundle.manifest, bundle.manifest.model
    total = sum(entry.bytes for entry in manifest.files.values())
    yield from columns(
        [
            ("bundle", str(bundle.path)),
            ("model", f"{model.name} {model.version}, semantics {model.semantics}"),
            ("checkpoint", f"sha256 {model.checkpoint_sha256}"),
            *(("LoRA", f"{lora.name} x {lora.scale:g}, sha256 {lora.sha256}") for lora in model.loras),
            ("licence", model.licence),
            ("made with", ", ".join(f"{name} {version}" for name, version in manifest.made_with.items())),
            ("schema", str(manifest.schema_version)),
            ("size", f"{size_text(total)} in {len(manifest.files)} files, every hash right"),
        ]
    )
    yield "\nnetworks"
    for key, network in manifest.networks.items():
        yield from _network_lines(key, network)
    yield "\nprecision by preset"
    rows = [
        (preset, *(manifest.networks[keys[name]].precision for name in NETWORK_NAMES))
        for preset, keys in manifest.presets.items()
    ]
    yield from columns([("", *NETWORK_NAMES), *rows], indent=2)
    yield "\nfiles"
    files = [(relative, size_text(entry.bytes), entry.sha256) for relative, entry in manifest.files.items()]
    yield from columns(files, indent=2)


def _network_lines(key: str, network: NetworkEntry) -> Iterator[str]:
    yield f"  {key}: {network.precision}, opset {network.opset}, {network.file}"
    ranges = ", ".join(f"{name} {low}..{high}" for name, (low, high) in network.shape_range.items())
    weights = ", ".join(network.weights)
    ports = [("in", str(port.spec())) for port in network.inputs] + [
        ("out", str(port.spec())) for port in network.outputs
    ]
    rest = [(name, value) for name, value in (("sizes", ranges), ("weights", weights)) if value]
    yield from columns([*ports, *rest], indent=4)


def planned_memory(bundle: Bundle, preset: str | None, clip: str | None) -> ClipMemory:
    """The memory plan of a clip at 24 frames a second.

    Args:
        bundle: Its engines count where it has some for all networks of the preset, whatever GPU they are for.
        preset: Whose networks; None is ``high``, or the last that the bundle has.
        clip: ``WIDTHxHEIGHTxFRAMES``; None is 121 frames at the bundle's automatic size.

    Raises:
        RequestError: There is no such preset or clip.
    """
    manifest = bundle.manifest
    chosen = preset or ("high" if "high" in manifest.presets else tuple(manifest.presets)[-1])
    compiled = {name: engine for name in NETWORK_NAMES if (engine := _engine(bundle, chosen, name)) is not None}
    return clip_memory(bundle, chosen, _clip_size(bundle, chosen, clip), compiled)


def _engine(bundle: Bundle, preset: str, name: str) -> EngineEntry | None:
    bundle.network(preset, name)  # refuses a preset that is not there
    key = bundle.manifest.presets[preset][name]  # type: ignore[index]
    return next((entry for entry in bundle.manifest.engines.values() if entry.network == key), None)


def _clip_size(bundle: Bundle, preset: str, clip: str | None) -> ClipSize:
    if clip is None:
        budget = min(
            load_preset(preset).auto_pixels, bundle.manifest.model.auto_pixels or load_preset(preset).auto_pixels
        )
        width, height = auto_size(Fraction(16, 9), budget)
        return ClipSize(PixelShape(_FRAMES, height, width), frame_rate(_RATE))
    match = _CLIP.fullmatch(clip)
    width, height, frames = map(int, match.groups()) if match else (0, 0, 0)
    if not width or not height or not frames or width % CANVAS_MULTIPLE or height % CANVAS_MULTIPLE:
        raise RequestError("clip", clip, f"WIDTHxHEIGHTxFRAMES, sides that are multiples of {CANVAS_MULTIPLE}")
    return ClipSize(PixelShape(covering_frames(frames), height, width), frame_rate(_RATE))


def memory_lines(memory: ClipMemory) -> Iterator[str]:
    """A memory plan as text: what is needed from when to when, where it goes, and what shares its place."""
    phases = tuple(PHASES)
    kind = "as the engines report it" if memory.measured else "estimated, never measured on a GPU"
    yield f"memory on a GPU, {memory.size}; working memory {kind}"
    rows = [("", "size", "needed in", "offset", "place shared with")]
    for placement in sorted(memory.plan.placements, key=lambda place: (place.request.first, place.offset)):
        request = placement.request
        needed = f"{phases[request.first]} .. {phases[request.last]}" if request.last > request.first else ""
        shared = memory.plan.sharing(request.name)
        rows.append(
            (
                request.name,
                size_text(request.size_bytes),
                needed or phases[request.first],
                f"{placement.offset / 10**6:.1f} MB",
                ", ".join(shared[:2]) + (f" and {len(shared) - 2} more" if len(shared) > 2 else ""),
            )
        )
    yield from columns(rows, indent=2)
    header = ("", "alive", "working memory asked for")
    live = [
        (phase, size_text(memory.plan.live_bytes(step)), size_text(memory.working[phase]))
        for step, phase in enumerate(phases)
    ]
    yield from columns([header, *live], indent=2)
    yield (
        f"peak {size_text(memory.plan.peak_bytes)}, {size_text(memory.plan.unshared_bytes)} if nothing shared a place; "
        f"with CUDA's own {size_text(memory.process_bytes)} that is {size_text(memory.needed_bytes)}"
    )


def memory_json(memory: ClipMemory) -> dict[str, Any]:
    """A memory plan as JSON."""
    return {
        "clip": str(memory.size),
        "measured": memory.measured,
        "needed_bytes": memory.needed_bytes,
        "peak_bytes": memory.plan.peak_bytes,
        "process_bytes": memory.process_bytes,
        "phases": list(PHASES),
        "working_bytes": dict(memory.working),
        "placements": [
            {
                "name": placement.request.name,
                "bytes": placement.request.size_bytes,
                "first": placement.request.first,
                "last": placement.request.last,
                "offset": placement.offset,
            }
            for placement in memory.plan.placements
        ],
    }
