# SPDX-License-Identifier: Apache-2.0
"""The engines of a bundle on disk: found by key, added one by one, never half.

An engine's files get their names before the manifest names them, and the manifest is replaced in one step. Whoever
is killed in between leaves a bundle that loads as it did before, and files that the next build clears away.
"""

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from ltxrt.bundle import Bundle
from ltxrt.errors import BundleError, OutputError
from ltxrt.manifest import EngineEntry, EngineKey, FileEntry, Manifest

from .cache_key import engine_name, key_digest
from .plan_file import PARTIAL_SUFFIX, write_whole

__all__ = ["EngineStore", "clone_bundle"]

ENGINES = "engines"
_LOCK = ".lock"


class EngineStore:
    """The engines of one bundle; a context manager that keeps other builds out while it is open.

    Args:
        folder: The bundle; its manifest is read and replaced.

    Raises:
        BundleError: It is not a whole bundle.
        OutputError: It cannot be written, or another build is at work in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Bundle.open(folder).manifest
        self._engines = folder / ENGINES
        try:
            self._engines.mkdir(exist_ok=True)
            self._lock = (self._engines / _LOCK).open("w")
        except OSError as error:
            raise OutputError(
                f"{folder} cannot be written ({error.strerror}): give another folder with --out"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise OutputError(f"{folder}: another build is at work in this bundle") from error

    def __enter__(self) -> Self:
        self._clear_leftovers()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def plan_path(self, network_key: str, key: EngineKey) -> Path:
        """Where the plan of an engine goes."""
        return self._engines / f"{engine_name(network_key, key)}.plan"

    def timing_cache_path(self, key: EngineKey) -> Path:
        """Where kernel timings of this GPU and this TensorRT are kept unless another file is given."""
        gpu = "".join(letter if letter.isalnum() else "-" for letter in key.gpu_name.lower())
        return self._engines / f"{gpu}-{key.tensorrt_version}.timing"

    def find(self, network_key: str, key: EngineKey) -> EngineEntry | None:
        """The engine of exactly this key, if it is there and its files have their sizes."""
        entry = self.manifest.engines.get(engine_name(network_key, key))
        if entry is None or entry.key_sha256 != key_digest(key) or entry.network != network_key:
            return None
        for name in (entry.file, entry.layers):
            path, listed = self.folder / name, self.manifest.files.get(name)
            if listed is None or not path.is_file() or path.stat().st_size != listed.bytes:
                return None
        return entry

    def add(self, entry: EngineEntry, files: dict[str, FileEntry]) -> None:
        """Put a finished engine into the manifest, in place of an older one for the same network, GPU and TensorRT.

        Args:
            entry: Its entry.
            files: The engine's files, by path relative to the bundle.

        Raises:
            OutputError: The manifest cannot be written; the bundle is as it was.
        """
        old = {
            name: other
            for name, other in self.manifest.engines.items()
            if other.network == entry.network and _machine(other.key) == _machine(entry.key)
        }
        replaced = {file for other in old.values() for file in (other.file, other.layers)} - set(files)
        engines = {name: other for name, other in self.manifest.engines.items() if name not in old}
        engines[engine_name(entry.network, entry.key)] = entry
        listed = {name: file for name, file in self.manifest.files.items() if name not in replaced}
        manifest = self.manifest.model_copy(
            update={"engines": dict(sorted(engines.items())), "files": dict(sorted({**listed, **files}.items()))}
        )
        write_manifest(self.folder, manifest)
        self.manifest = manifest
        for name in replaced:
            (self.folder / name).unlink(missing_ok=True)

    def _clear_leftovers(self) -> None:
        """Remove what a killed build left: nothing that the manifest names, no timings, and only files of a build."""
        (self.folder / f"manifest.json{PARTIAL_SUFFIX}").unlink(missing_ok=True)
        for path in self._engines.iterdir():
            named = f"{ENGINES}/{path.name}" in self.manifest.files
            if not named and path.name.endswith((PARTIAL_SUFFIX, ".plan", ".layers.json")):
                path.unlink()


def clone_bundle(source: Path, destination: Path) -> None:
    """A second bundle of the same networks, whose engines are its own; files are hard links where the disk allows it.

    Where ``destination`` is such a bundle already, it is left as it is, so that a build goes on where it stopped.

    Raises:
        BundleError: ``source`` is not a whole bundle.
        OutputError: ``destination`` is something else, or cannot be written.
    """
    manifest = Bundle.open(source).manifest
    if (destination / "manifest.json").is_file():
        try:
            there = Bundle.open(destination).manifest
        except BundleError as error:
            raise OutputError(f"{destination} is there and is not whole ({error}): choose another folder") from error
        if (there.model, there.networks, there.presets) != (manifest.model, manifest.networks, manifest.presets):
            raise OutputError(f"{destination} is a bundle of other networks: choose another folder")
        return
    partial = destination.with_name(f".{destination.name}{PARTIAL_SUFFIX}")
    own = {name for entry in manifest.engines.values() for name in (entry.file, entry.layers)}
    kept = {name: entry for name, entry in manifest.files.items() if name not in own}
    try:
        if destination.exists() and any(destination.iterdir()):
            raise OutputError(f"{destination} is there and is not a bundle: choose another folder")
        shutil.rmtree(partial, ignore_errors=True)
        for name in kept:
            target = partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(source / name, target)
        write_manifest(partial, manifest.model_copy(update={"engines": {}, "files": kept}))
        if destination.exists():
            destination.rmdir()
        partial.replace(destination)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{destination} cannot be written: {error.strerror}") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace ``manifest.json`` in one step.

    Raises:
        OutputError: It cannot be written.
    """
    text = json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n"
    write_whole(folder / "manifest.json", text.encode())


def _machine(key: EngineKey) -> tuple[str, str, str]:
    """What a runtime picks an engine by."""
    return key.gpu_name, key.compute_capability, key.tensorrt_version


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, target)
