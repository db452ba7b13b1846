# SPDX-License-Identifier: Apache-2.0
"""What a bundle holds, for people and as JSON, and whether its large files are intact."""

import hashlib
from collections.abc import Iterator
from typing import Any

from .bundle import HASH_ON_OPEN_BYTES, Bundle
from .cli_report import columns, size_text
from .errors import BundleError
from .manifest import NETWORK_NAMES, NetworkEntry
from .result import Progress

__all__ = ["bundle_json", "bundle_lines", "hash_large_files"]

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
