# SPDX-License-Identifier: Apache-2.0
"""Opening a bundle: the versioned folder that the exporter writes and the runtime runs.

Every file's size is checked on opening. Files up to ``HASH_ON_OPEN_BYTES`` are hashed as well; larger ones (the
weights of the 22B model take minutes to read) only where ``verify=True`` asks for it, as ``ltxrt inspect`` does.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from .errors import BundleError, RequestError, shown
from .manifest import NETWORK_NAMES, SCHEMA_VERSION, Manifest, NetworkEntry, NetworkName
from .rope import RopeGrid

__all__ = ["HASH_ON_OPEN_BYTES", "Bundle", "tiny_bundle_path"]

HASH_ON_OPEN_BYTES = 256 * 1024**2
_BLOCK_BYTES = 1024**2


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened and checked bundle; fixed once loaded.

    Attributes:
        path: The folder.
        manifest: Its checked manifest.
        rope: RoPE frequencies of the model.
        sigmas: Noise levels that the checkpoint was distilled for, stage 1 and stage 2.
    """

    path: Path
    manifest: Manifest
    rope: RopeGrid
    sigmas: tuple[tuple[float, ...], tuple[float, ...]]

    @classmethod
    def open(cls, path: str | Path | None = None, *, verify: bool = False) -> "Bundle":
        """Open ``path``, or the tiny bundle that comes with the package.

        Args:
            path: Folder with a ``manifest.json``.
            verify: Hash large files as well.

        Raises:
            BundleError: Missing, of another schema version, incomplete or damaged.
        """
        folder = tiny_bundle_path() if path is None else Path(path)
        manifest = _read_manifest(folder)
        check_files(folder, manifest, everything=verify)
        tables = _read_tables(folder)
        seconds, height, width = manifest.model.rope_max_position
        rope = RopeGrid(tables["rope_video"], tables["rope_cross"], (seconds, height, width))
        sigmas = tuple(float(s) for s in tables["sigmas_stage_1"]), tuple(float(s) for s in tables["sigmas_stage_2"])
        return cls(folder, manifest, rope, sigmas)

    def network(self, preset: str, name: str) -> NetworkEntry:
        """The network that a preset uses.

        Raises:
            RequestError: The bundle was built without that preset.
        """
        if preset not in self.manifest.presets:
            raise RequestError("video_quality", preset, f"{', '.join(self.manifest.presets)} in this bundle")
        return self.manifest.networks[self.manifest.presets[preset][name]]  # type: ignore[index]

    def file(self, relative: str) -> Path:
        """Path of a file that the manifest names."""
        return self.path / relative


def tiny_bundle_path() -> Path:
    """The tiny model's bundle, shipped with the package."""
    return Path(str(resources.files("ltxrt").joinpath("bundles", "tiny")))


def _read_manifest(folder: Path) -> Manifest:
    path = folder / "manifest.json"
    try:
        data: Any = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(f"{folder} is not a bundle: it has no manifest.json") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is damaged: {error}") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{folder} has bundle schema version {shown(version)}, this ltxrt reads {SCHEMA_VERSION}: "
            "export it again, or install the ltxrt that wrote it"
        )
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        finding = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in finding["loc"])
        raise BundleError(f"{path} is damaged: {where}: {finding['msg']}") from None
    _check_references(folder, manifest)
    return manifest


def _check_references(folder: Path, manifest: Manifest) -> None:
    """Everything that the manifest points to exists in it, and no path leaves the folder."""
    for relative in manifest.files:
        if Path(relative).is_absolute() or ".." in Path(relative).parts or "\0" in relative:
            raise BundleError(f"{folder}: the manifest names {relative!r}, which is outside the bundle")
    for key, network in manifest.networks.items():
        for relative in (network.file, *network.weights):
            if relative not in manifest.files:
                raise BundleError(f"{folder}: network {key} needs {relative}, which the manifest does not list")
    if not manifest.presets:
        raise BundleError(f"{folder}: the manifest has no preset")
    for preset, networks in manifest.presets.items():
        _check_preset(folder, manifest, preset, networks)
    _check_engines(folder, manifest)
    for relative in ("tables.npz", "tokenizer.json"):
        if relative not in manifest.files:
            raise BundleError(f"{folder}: the manifest does not list {relative}")


def _check_preset(folder: Path, manifest: Manifest, preset: str, networks: Mapping[NetworkName, str]) -> None:
    """A preset has all networks, and each is one of that kind."""
    missing = set(NETWORK_NAMES) - networks.keys()
    unknown = {key for key in networks.values() if key not in manifest.networks}
    if missing or unknown:
        raise BundleError(f"{folder}: preset {preset} lacks {sorted(missing | unknown)}")
    for name, key in networks.items():
        if manifest.networks[key].network != name:
            raise BundleError(f"{folder}: preset {preset} has {key} as its {name}")


def _check_engines(folder: Path, manifest: Manifest) -> None:
    """An engine is of a network that is there, has its files, and is the only one for its GPU and TensorRT."""
    seen: dict[tuple[str, ...], str] = {}
    for name, engine in manifest.engines.items():
        if engine.network not in manifest.networks:
            raise BundleError(f"{folder}: engine {name} is of {engine.network}, which the manifest does not list")
        for relative in (engine.file, engine.layers):
            if relative not in manifest.files:
                raise BundleError(f"{folder}: engine {name} needs {relative}, which the manifest does not list")
        machine = engine.key.gpu_name, engine.key.compute_capability, engine.key.tensorrt_version
        other = seen.setdefault((engine.network, *machine), name)
        if other != name:
            raise BundleError(
                f"{folder}: engines {other} and {name} are both of {engine.network} for {' '.join(machine)}"
            )


def check_files(folder: Path, manifest: Manifest, *, everything: bool) -> None:
    """Compare every file with the manifest: size always, hash where it is small or ``everything`` is asked for.

    Raises:
        BundleError: Naming the first file that differs.
    """
    for relative, entry in manifest.files.items():
        path = folder / relative
        try:
            size = path.stat().st_size
            if size != entry.bytes:
                raise BundleError(f"{path} has {size} bytes, the manifest says {entry.bytes}: the bundle is damaged")
            if (everything or size <= HASH_ON_OPEN_BYTES) and file_sha256(path) != entry.sha256:
                raise BundleError(f"{path} does not have the hash of the manifest: the bundle is damaged")
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}") from error


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _read_tables(folder: Path) -> dict[str, NDArray[Any]]:
    path = folder / "tables.npz"
    wanted = ("rope_video", "rope_cross", "sigmas_stage_1", "sigmas_stage_2")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            tables = {name: archive[name] for name in archive.files if name in wanted}
    # A single array, which is no archive, gives the TypeError.
    except (EOFError, OSError, TypeError, ValueError, BadZipFile) as error:
        raise BundleError(f"{path} is damaged: {error}") from error
    if missing := set(wanted) - set(tables):
        raise BundleError(f"{path} lacks {sorted(missing)}")
    for name, table in tables.items():
        # Frequencies in fp64 would run and give other angles than the reference's.
        exact = table.dtype == np.float32 or (table.dtype == np.float64 and name.startswith("sigmas"))
        if table.ndim != 1 or not exact:
            raise BundleError(f"{path}: {name} is {table.dtype}{list(table.shape)}, expected float32 [n]")
    return tables
