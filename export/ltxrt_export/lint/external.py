# SPDX-License-Identifier: Apache-2.0
"""Rules about weights in files beside the graph.

Sources: onnx/onnx-tensorrt WeightsContext.cpp (keys, relative paths); ONNX Runtime and onnx.checker refuse symbolic
links and absolute paths.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from onnx import TensorProto

from ltxrt_export.engines.weights import tensor_bytes

from .findings import Finding, finding
from .graph import GraphView

__all__ = ["check_external_data"]

_KEYS = frozenset({"location", "offset", "length", "checksum"})


def check_external_data(view: GraphView, listed: frozenset[str] | None = None) -> Iterator[Finding]:
    """Every initializer that points into a file.

    Args:
        view: The graph; its ``folder`` is where locations start.
        listed: Names that the manifest lists for this network; None skips that rule.
    """
    checked: dict[str, list[str]] = {}
    for name, tensor in view.initializers.items():
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        for key in sorted(entries.keys() - _KEYS):
            yield finding(view.network, name, "external-key", f"it has the key {key}")
        location = entries.get("location", "")
        if location not in checked:
            checked[location] = list(_location(view.folder, location))
            if listed is not None and location not in listed:
                yield finding(view.network, name, "external-listed", f"it points to {location or 'nothing'}")
        for message in checked[location]:
            yield finding(view.network, name, "external-location", message)
        if not checked[location]:
            yield from _range(view, tensor, entries)


def _location(folder: Path | None, location: str) -> Iterator[str]:
    """What is wrong with a file, whichever tensor points to it."""
    path = PurePosixPath(location)
    if not location:
        yield "it points to no file"
    elif path.is_absolute() or len(path.parts) != 1 or location == "..":
        yield f"it points to {location}"
    elif folder is not None and (folder / location).is_symlink():
        yield f"{location} is a symbolic link"
    elif folder is not None and not (folder / location).is_file():
        yield f"{location} is not there"


def _range(view: GraphView, tensor: TensorProto, entries: dict[str, str]) -> Iterator[Finding]:
    expected = tensor_bytes(tensor)
    try:
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", str(expected)))
    except ValueError:
        yield finding(view.network, tensor.name, "external-range", "offset or length is not a number")
        return
    if length != expected:
        message = f"{list(tensor.dims)} takes {expected} bytes, its length is {length}"
        yield finding(view.network, tensor.name, "external-range", message)
    if offset < 0:
        yield finding(view.network, tensor.name, "external-range", f"its offset is {offset}")
    elif view.folder is not None:
        size = (view.folder / entries["location"]).stat().st_size
        if offset + length > size:
            message = f"it ends at byte {offset + length}, {entries['location']} has {size}"
            yield finding(view.network, tensor.name, "external-range", message)
