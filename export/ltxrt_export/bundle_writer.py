# SPDX-License-Identifier: Apache-2.0
"""Writing a bundle: into a folder beside the wanted one, renamed when it is whole."""

import hashlib
import json
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from ltxrt.bundle import file_sha256
from ltxrt.errors import ExportError, OutputError
from ltxrt.manifest import FileEntry, Manifest, ModelEntry, NetworkEntry, TensorEntry

from .networks.spec import NetworkSpec
from .onnx_export import OPSET

__all__ = ["BundleWriter"]

_NETWORKS = "networks"


class BundleWriter:
    """Collects graphs, weight files and tables; a context manager that leaves nothing behind unless ``commit`` ran.

    Args:
        destination: The bundle's folder; must not exist unless ``overwrite``.
        overwrite: Replace a folder that is there.

    Raises:
        OutputError: The destination exists, or its parent cannot be written.
    """

    def __init__(self, destination: Path, *, overwrite: bool = False) -> None:
        if destination.exists() and not overwrite:
            raise OutputError(f"{destination} exists already; choose another folder or pass --overwrite")
        if destination.exists() and not (destination / "manifest.json").is_file() and any(destination.iterdir()):
            raise OutputError(f"{destination} is not a bundle, so it is not overwritten")
        self._destination = destination
        self._folder = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.partial")
        self._weights: dict[Path, str] = {}
        self._networks: dict[str, NetworkEntry] = {}
        self._hashes: dict[Path, str] = {}
        try:
            (self._folder / _NETWORKS).mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"{destination} cannot be written: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def location(self, path: Path) -> str:
        """Name of a weight file beside the graphs; two files of one name get different ones."""
        if path not in self._weights:
            taken = set(self._weights.values())
            self._weights[path] = path.name if path.name not in taken else f"{path.parent.name}-{path.name}"
            if self._weights[path] in taken:
                raise ExportError(f"{path}: another weight file of that name is part of the bundle already")
        return self._weights[path]

    def add_weights(self) -> None:
        """Put every weight file that a graph points to beside the graphs: a hard link where the disk allows it.

        Raises:
            OutputError: They cannot be written.
        """
        for path, name in self._weights.items():
            target = self._folder / _NETWORKS / name
            if target.exists():
                continue
            try:
                shutil.copyfile(path, target)
            except OSError as error:
                raise OutputError(f"{target}: {path.name} cannot be copied: {error.strerror}") from error

    def add_network(self, spec: NetworkSpec, model: ModelProto, precision: str) -> str:
        """Write a graph and return its key: name, precision and a hash of graph and weights.

        Raises:
            OutputError: It cannot be written.
        """
        data = model.SerializeToString(deterministic=True)
        weights = sorted({_location(tensor) for tensor in model.graph.initializer if _is_external(tensor)})
        digest = hashlib.sha256(data)
        for path, name in sorted(self._weights.items(), key=lambda item: item[1]):
            if name in weights:
                digest.update(self._sha256(path).encode())
        key = f"{spec.name}-{precision}-{digest.hexdigest()[:12]}"
        self._write(f"{_NETWORKS}/{key}.onnx", data)
        self._networks[key] = NetworkEntry(
            network=spec.name,  # type: ignore[arg-type]  # checked by the model
            file=f"{_NETWORKS}/{key}.onnx",
            weights=tuple(f"{_NETWORKS}/{name}" for name in weights),
            precision=precision,
            opset=OPSET,
            inputs=tuple(TensorEntry(name=p.name, dtype=p.dtype, shape=p.shape) for p in spec.inputs),
            outputs=tuple(TensorEntry(name=p.name, dtype=p.dtype, shape=p.shape) for p in spec.outputs),
            shape_range={name: (axis.minimum, axis.maximum) for name, axis in spec.axes.items()},
        )
        return key

    def path_of(self, key: str) -> Path:
        """The written graph of a network, for checks before the bundle is finished."""
        return self._folder / self._networks[key].file

    def add_tokenizer(self, path: Path) -> None:
        """Copy ``tokenizer.json``."""
        self._write("tokenizer.json", path.read_bytes())

    def add_tables(self, tables: Mapping[str, NDArray[Any]]) -> None:
        """Write ``tables.npz``; its bytes depend on the arrays alone."""
        with (self._folder / "tables.npz").open("wb") as file:
            np.savez(file, allow_pickle=False, **{name: np.asarray(tables[name]) for name in sorted(tables)})

    def commit(
        self, model: ModelEntry, presets: Mapping[str, Mapping[str, str]], made_with: Mapping[str, str]
    ) -> Manifest:
        """Write the manifest and give the folder its name.

        Raises:
            OutputError: It cannot be written.
        """
        manifest = Manifest(
            model=model,
            files={str(p.relative_to(self._folder)): _entry(p) for p in _files(self._folder)},
            networks=dict(sorted(self._networks.items())),
            presets={name: dict(keys) for name, keys in presets.items()},  # type: ignore[arg-type]  # checked by the model
            made_with=dict(sorted(made_with.items())),
        )
        self._write("manifest.json", (json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n").encode())
        try:
            if self._destination.exists():
                shutil.rmtree(self._destination)
            self._folder.replace(self._destination)
        except OSError as error:
            raise OutputError(f"{self._destination} cannot be written: {error.strerror}") from error
        return manifest

    def _sha256(self, path: Path) -> str:
        """Hash of a weight file, read once however many networks share it."""
        if path not in self._hashes:
            self._hashes[path] = file_sha256(path)
        return self._hashes[path]

    def _write(self, relative: str, data: bytes) -> None:
        try:
            (self._folder / relative).write_bytes(data)
        except OSError as error:
            raise OutputError(f"{self._destination / relative} cannot be written: {error.strerror}") from error


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _entry(path: Path) -> FileEntry:
    return FileEntry(sha256=file_sha256(path), bytes=path.stat().st_size)


def _is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL


def _location(tensor: TensorProto) -> str:
    return next(entry.value for entry in tensor.external_data if entry.key == "location")
