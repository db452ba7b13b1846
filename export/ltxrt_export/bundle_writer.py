# SPDX-License-Identifier: Apache-2.0
"""Writing a bundle: into a folder beside the wanted one, renamed when it is whole."""

import hashlib
import json
import shutil
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from ltxrt.bundle import Bundle, file_sha256
from ltxrt.errors import ExportError, OutputError
from ltxrt.manifest import FileEntry, Manifest, ModelEntry, NetworkEntry, TensorEntry

from . import disk
from .networks.spec import NetworkSpec
from .onnx_export import OPSET, check_graph
from .quantize.calibration import Calibration
from .quantize.fp8_weights import is_finished
from .staging import Staging

__all__ = ["BundleWriter"]

_NETWORKS = "networks"
_MANIFEST = "manifest.json"


class BundleWriter:
    """Collects graphs, weight files and tables; a context manager that leaves nothing behind unless ``commit`` ran.

    Args:
        destination: The bundle's folder; must not exist unless ``overwrite``. Folders above it are made.
        overwrite: Replace the bundle, or the empty folder, that is there.

    Raises:
        OutputError: The destination exists, cannot be written, or another export is writing to it.
    """

    def __init__(self, destination: Path, *, overwrite: bool = False) -> None:
        self._destination = destination
        self._weights: dict[Path, str] = {}
        self._networks: dict[str, NetworkEntry] = {}
        self._hashes: dict[Path, str] = {}
        self._placed: set[Path] = set()
        with _written(destination):
            self._staging = Staging(
                destination, lambda: _check_destination(destination, overwrite=overwrite), is_finished
            )
        self._folder = self._staging.folder
        try:
            with _written(destination):
                self.weights_folder.mkdir(exist_ok=True)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove what was not committed. Calling it again does nothing."""
        self._staging.close()

    @property
    def weights_folder(self) -> Path:
        """Where graphs and weight files lie; a weight file that is made there is part of the bundle as it is."""
        return self._folder / _NETWORKS

    def location(self, path: Path) -> str:
        """Name of a weight file beside the graphs; two files of one name get different ones."""
        if path not in self._weights:
            taken = set(self._weights.values())
            self._weights[path] = path.name if path.name not in taken else f"{path.parent.name}-{path.name}"
            if self._weights[path] in taken:
                raise ExportError(f"{path}: another weight file of that name is part of the bundle already")
        return self._weights[path]

    def plan_weights(self, files: Iterable[Path], made_bytes: int = 0) -> disk.WeightPlan:
        """What the weight files will take on this disk, and ``made_bytes`` of FP8 weights that are not there yet.

        Raises:
            ExportError: A file cannot be read.
            OutputError: The bundle cannot be written.
        """
        with _written(self._destination):
            # A killed run may have made some of them.
            there = sum(path.stat().st_size for path in _files(self.weights_folder) if is_finished(path))
            return disk.plan_weights(files, self.weights_folder, max(0, made_bytes - there))

    def add_weights(self, path: Path) -> Generator[int]:
        """Put a weight file beside the graphs, shared with its source where the disk can do it, and hash it.

        It is read once, whoever asks for its hash later; yields the bytes read so far.

        Raises:
            ExportError: It cannot be read.
            OutputError: It cannot be written.
        """
        if path in self._placed:
            return
        relative = f"{_NETWORKS}/{self.location(path)}"
        target = self._folder / relative
        with _written(self._destination / relative):
            there = path == target or disk.share(path, target)
            self._hashes[path] = yield from disk.hashed(path, None if there else target)
        self._placed.add(path)

    def add_network(self, spec: NetworkSpec, model: ModelProto, precision: str) -> str:
        """Write a graph with the weight files that it points to, check it, and return its key.

        The key is name, precision and a hash of graph and weights.

        Raises:
            ExportError: The graph is not valid ONNX.
            OutputError: It cannot be written.
        """
        data = model.SerializeToString(deterministic=True)
        weights = sorted({_location(tensor) for tensor in model.graph.initializer if _is_external(tensor)})
        digest = hashlib.sha256(data)
        for path, name in sorted(self._weights.items(), key=lambda item: item[1]):
            if name in weights:
                for _ in self.add_weights(path):
                    pass
                digest.update(self.sha256(path).encode())
        key = f"{spec.name}-{precision}-{digest.hexdigest()[:12]}"
        self._write(f"{_NETWORKS}/{key}.onnx", data)
        self._networks[key] = NetworkEntry(
            network=spec.name,  # type: ignore[arg-type]  # checked by the model
            file=f"{_NETWORKS}/{key}.onnx",
            weights=tuple(f"{_NETWORKS}/{name}" for name in weights),
            precision=precision,  # type: ignore[arg-type]  # likewise
            opset=OPSET,
            inputs=tuple(TensorEntry(name=p.name, dtype=p.dtype, shape=p.shape) for p in spec.inputs),
            outputs=tuple(TensorEntry(name=p.name, dtype=p.dtype, shape=p.shape) for p in spec.outputs),
            shape_range={name: (axis.minimum, axis.maximum) for name, axis in spec.axes.items()},
        )
        check_graph(spec.name, self.path_of(key))
        return key

    def path_of(self, key: str) -> Path:
        """The written graph of a network, for checks before the bundle is finished."""
        return self._folder / self._networks[key].file

    def add_tokenizer(self, path: Path) -> None:
        """Copy ``tokenizer.json``.

        Raises:
            OutputError: It cannot be read or written.
        """
        self._copy(path, "tokenizer.json")

    def add_tables(self, tables: Mapping[str, NDArray[Any]]) -> None:
        """Write ``tables.npz``; its bytes depend on the arrays alone.

        Raises:
            OutputError: It cannot be written.
        """
        data = BytesIO()
        np.savez(data, allow_pickle=False, **{name: np.asarray(tables[name]) for name in sorted(tables)})
        self._write("tables.npz", data.getvalue())

    def add_calibration(self, calibration: Calibration) -> None:
        """Keep the ranges that the networks were made with.

        Raises:
            OutputError: They cannot be written.
        """
        calibration.save(self._folder / "calibration.json")

    def draft(self, model: ModelEntry, presets: Mapping[str, Mapping[str, str]]) -> Bundle:
        """What there is so far, opened as a bundle in its hidden folder; it ends with this writer.

        Raises:
            BundleError: A network, the tokenizer or the tables are missing.
            OutputError: It cannot be written.
        """
        self._write_manifest(model, presets, {})
        return Bundle.open(self._folder)

    def commit(
        self, model: ModelEntry, presets: Mapping[str, Mapping[str, str]], made_with: Mapping[str, str]
    ) -> Manifest:
        """Drop the networks that no preset names and their files, write the manifest, give the folder its name.

        Raises:
            OutputError: It cannot be written; a bundle that was to be replaced is still there.
        """
        named = {key for keys in presets.values() for key in keys.values()}
        self._networks = {key: entry for key, entry in self._networks.items() if key in named}
        kept = {file for entry in self._networks.values() for file in (entry.file, *entry.weights)}
        with _written(self._destination):
            for path in _files(self.weights_folder):
                if path.relative_to(self._folder).as_posix() not in kept:
                    path.unlink()
        manifest = self._write_manifest(model, presets, made_with)
        with _written(self._destination):
            self._staging.commit()
        return manifest

    def _write_manifest(
        self, model: ModelEntry, presets: Mapping[str, Mapping[str, str]], made_with: Mapping[str, str]
    ) -> Manifest:
        manifest_path = self._folder / _MANIFEST
        hashes = {self._folder / _NETWORKS / self._weights[path]: self._hashes[path] for path in self._placed}
        with _written(self._destination):
            files = {
                path.relative_to(self._folder).as_posix(): _entry(path, hashes.get(path))
                for path in _files(self._folder)
                if path != manifest_path
            }
        manifest = Manifest(
            model=model,
            files=files,
            networks=dict(sorted(self._networks.items())),
            presets={name: dict(keys) for name, keys in presets.items()},  # type: ignore[arg-type]  # checked by the model
            made_with=dict(sorted(made_with.items())),
        )
        self._write(_MANIFEST, (json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n").encode())
        return manifest

    def sha256(self, path: Path) -> str:
        """Hash of a source file, read once however many ask for it.

        Raises:
            ExportError: It cannot be read.
        """
        if path not in self._hashes:
            try:
                self._hashes[path] = file_sha256(path)
            except OSError as error:
                raise ExportError(f"{path}: cannot be read: {error.strerror}") from error
        return self._hashes[path]

    def _copy(self, path: Path, relative: str) -> None:
        target = self._folder / relative
        if not target.exists():
            with _written(self._destination / relative):
                shutil.copyfile(path, target)

    def _write(self, relative: str, data: bytes) -> None:
        with _written(self._destination / relative):
            (self._folder / relative).write_bytes(data)


@contextmanager
def _written(path: Path) -> Generator[None]:
    """Turn what the file system says into one line that names ``path``."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error


def _check_destination(destination: Path, *, overwrite: bool) -> None:
    if not (destination.exists() or destination.is_symlink()):
        return
    if not overwrite:
        raise OutputError(f"{destination}: exists already; choose another folder, or --overwrite to replace a bundle")
    bundle = (destination / _MANIFEST).is_file() or (destination.is_dir() and not any(destination.iterdir()))
    if not bundle or destination.is_symlink():
        raise OutputError(f"{destination}: is not a bundle, so it is not overwritten; choose another folder")


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _entry(path: Path, sha256: str | None) -> FileEntry:
    return FileEntry(sha256=sha256 or file_sha256(path), bytes=path.stat().st_size)


def _is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL


def _location(tensor: TensorProto) -> str:
    return next(entry.value for entry in tensor.external_data if entry.key == "location")
