# SPDX-License-Identifier: Apache-2.0
"""Text contexts of prompts that have been seen before, so that the text encoder runs once a prompt.

An entry is found by a hash of the text encoder (graph, weights, backend) and of the prompt's tokens, so it can only be
what that encoder made of those tokens. Entries are kept in memory and, if asked for, in a folder that several
processes may share: a file is written under another name and renamed, and one that is damaged counts as absent.
A folder that fails costs a log line, never a clip.
"""

import hashlib
import io
import logging
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .engine import Array, TensorSpec
from .errors import OutputError

__all__ = ["DISK_BYTES", "MEMORY_BYTES", "PromptCache", "prompt_key", "text_model"]

#: Default bound of what is kept in memory: five prompts of the 22B model, whose contexts take 25 MB.
MEMORY_BYTES = 128 * 1024**2
#: Default bound of a cache folder.
DISK_BYTES = 1024**3

_FORMAT = b"ltxrt prompt contexts 1\n"
_SUFFIX, _PARTIAL = ".contexts", ".partial"
_ABANDONED_SECONDS = 3600.0

_log = logging.getLogger(__name__)


def text_model(bundle: Bundle, preset: str, backend: str) -> str:
    """What a prompt's contexts depend on besides its tokens: the hash of everything that encodes it.

    Args:
        bundle: The bundle.
        preset: One of its presets; its precision is part of the graph.
        backend: Name of the backend, because two of them round differently.
    """
    entry = bundle.network(preset, "text_encoder")
    files = bundle.manifest.files
    hashes = [files[name].sha256 for name in (entry.file, *sorted(entry.weights)) if name in files]
    return hashlib.sha256("\n".join((backend, *hashes)).encode()).hexdigest()


def prompt_key(model: str, input_ids: NDArray[np.int64]) -> str:
    """Name of a prompt's entry.

    Args:
        model: From ``text_model``.
        input_ids: [1, n].
    """
    tokens = np.ascontiguousarray(input_ids, "<i8").tobytes()
    return hashlib.sha256(_FORMAT + model.encode() + b"\n" + tokens).hexdigest()


class PromptCache:
    """Bounded, least recently used first out. Thread-safe; its folder may be shared by processes.

    Args:
        folder: Where entries outlive the process; None keeps them in memory only.
        memory_bytes: Bound of the arrays in memory.
        disk_bytes: Bound of the files in the folder.

    Raises:
        OutputError: The folder cannot be made or written.
    """

    def __init__(
        self, folder: Path | None = None, *, memory_bytes: int = MEMORY_BYTES, disk_bytes: int = DISK_BYTES
    ) -> None:
        self._folder = folder
        self._memory_bytes, self._disk_bytes = memory_bytes, disk_bytes
        self._entries: OrderedDict[str, dict[str, Array]] = OrderedDict()
        self._held_bytes = 0
        self._lock = threading.Lock()
        if folder is not None:
            _prepare(folder)

    @classmethod
    def open(cls, setting: str | Path) -> "PromptCache | None":
        """The cache that an option asks for: ``off``, ``memory``, or a folder.

        Raises:
            OutputError: The folder cannot be made or written.
        """
        if setting == "off":
            return None
        return cls() if setting == "memory" else cls(Path(setting))

    def get(self, key: str, outputs: Iterable[TensorSpec]) -> Mapping[str, Array] | None:
        """What was kept under a key, read-only arrays by name; None if there is nothing, or nothing that fits.

        Args:
            key: From ``prompt_key``.
            outputs: What the text encoder gives; an entry of other tensors counts as damaged.
        """
        with self._lock:
            if (known := self._entries.get(key)) is not None:
                self._entries.move_to_end(key)
                return known
        stored = self._read(key, {spec.name: spec for spec in outputs})
        if stored is not None:
            self._keep(key, stored)
        return stored

    def put(self, key: str, tensors: Mapping[str, Array]) -> None:
        """Keep what the text encoder made; the arrays are copied."""
        copies = {name: np.array(value) for name, value in tensors.items()}
        self._keep(key, copies)
        if self._folder is not None:
            try:
                _write(self._folder / f"{key}{_SUFFIX}", copies)
                self._shrink(self._folder)
            except OSError as error:
                _log.warning("prompt cache: %s cannot be written (%s)", self._folder, error.strerror)

    def _keep(self, key: str, tensors: dict[str, Array]) -> None:
        size = _bytes_of(tensors)
        if size > self._memory_bytes:
            return
        for value in tensors.values():
            value.flags.writeable = False
        with self._lock:
            self._held_bytes += size - _bytes_of(self._entries.pop(key, {}))
            self._entries[key] = tensors
            while self._held_bytes > self._memory_bytes:
                _, oldest = self._entries.popitem(last=False)
                self._held_bytes -= _bytes_of(oldest)

    def _read(self, key: str, specs: Mapping[str, TensorSpec]) -> dict[str, Array] | None:
        if self._folder is None:
            return None
        path = self._folder / f"{key}{_SUFFIX}"
        try:
            tensors = _parsed(path.read_bytes(), specs)
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("prompt cache: %s cannot be read (%s)", path, error.strerror)
            return None
        except ValueError as error:
            _log.warning("prompt cache: %s is damaged and is made anew (%s)", path, error)
            return None
        with suppress(OSError):  # only its place in the order of use, which another process may just have removed
            os.utime(path)
        return tensors

    def _shrink(self, folder: Path) -> None:
        """Remove the entries that were not used for longest, until the rest fits."""
        files = [(path, stat) for path in folder.glob(f"*{_SUFFIX}") if (stat := _stat(path)) is not None]
        excess = sum(stat.st_size for _, stat in files) - self._disk_bytes
        for path, stat in sorted(files, key=lambda file: file[1].st_mtime_ns):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= stat.st_size


def _prepare(folder: Path) -> None:
    """Make the folder, see that it can be written, and remove what writers left that were killed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for path in folder.glob(f"*{_PARTIAL}"):
            stat = _stat(path)
            if stat is not None and time.time() - stat.st_mtime > _ABANDONED_SECONDS:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot hold the prompt cache ({error.strerror})") from error


def _write(path: Path, tensors: Mapping[str, Array]) -> None:
    """Format, hash of the rest, then the arrays as npz."""
    payload = io.BytesIO()
    np.savez(payload, **tensors)  # type: ignore[arg-type]  # names are the network's, never savez's own options
    data = payload.getvalue()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=_PARTIAL)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_FORMAT + hashlib.sha256(data).digest() + data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _parsed(data: bytes, specs: Mapping[str, TensorSpec]) -> dict[str, Array]:
    """The arrays of a file.

    Raises:
        ValueError: It is not what ``_write`` wrote, or holds other tensors than the text encoder gives.
    """
    header, payload = data[: len(_FORMAT) + 32], data[len(_FORMAT) + 32 :]
    if header != _FORMAT + hashlib.sha256(payload).digest():
        raise ValueError("its hash is wrong")
    with np.load(io.BytesIO(payload), allow_pickle=False) as archive:
        tensors = {name: archive[name] for name in archive.files}
    if tensors.keys() != specs.keys():
        raise ValueError(f"it holds {', '.join(sorted(tensors))}")
    for name, spec in specs.items():
        found = tensors[name]
        fits = len(found.shape) == len(spec.shape) and all(
            size == wanted or isinstance(wanted, str) for size, wanted in zip(found.shape, spec.shape, strict=True)
        )
        if found.dtype != np.dtype(spec.dtype) or not fits:
            raise ValueError(f"{name} is {found.dtype}{list(found.shape)}, expected {spec}")
    return tensors


def _bytes_of(tensors: Mapping[str, Array]) -> int:
    return sum(value.nbytes for value in tensors.values())


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # removed by another process
        return None
