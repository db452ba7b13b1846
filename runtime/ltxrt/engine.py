# SPDX-License-Identifier: Apache-2.0
"""The one protocol behind which every backend stands, and the checks that all of them share.

An engine runs one network. Tensors are named; names, then dtypes, then shapes are checked against the
network's declaration before the backend is touched, so that a mistake is one sentence rather than a crash.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import EngineError

__all__ = ["Array", "Capture", "Engine", "TensorSpec", "check_feeds"]

#: Any array; each tensor's dtype is the network's declaration.
Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a network.

    Attributes:
        name: Tensor name in the graph.
        dtype: NumPy dtype name, for example ``float32``.
        shape: One entry per axis: a size, or a symbol that stands for the same size wherever it recurs.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join(map(str, self.shape))}]"


class Capture(Protocol):
    """A network bound to fixed buffers: what a CUDA graph is on a GPU.

    ``inputs`` are the buffers that the next replay reads; write into them in place. ``outputs`` are
    overwritten by every replay: copy what must outlive it. Not safe for concurrent use.
    """

    @property
    def inputs(self) -> Mapping[str, Array]: ...

    @property
    def outputs(self) -> Mapping[str, Array]: ...

    def replay(self) -> None:
        """Run the network once on what the input buffers hold now."""
        ...


class Engine(Protocol):
    """One loaded network. Host arrays go in and come out; all are C-contiguous."""

    @property
    def name(self) -> str: ...

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once and return fresh output arrays by name.

        Raises:
            EngineError: A tensor is missing, unknown, of the wrong dtype or shape, or the backend failed.
        """
        ...

    def capture(self, feeds: Mapping[str, Array]) -> Capture:
        """Fix the shapes and contents of ``feeds`` (copied) and return the bound network.

        Raises:
            EngineError: As for ``run``.
        """
        ...


def check_feeds(network: str, specs: Iterable[TensorSpec], feeds: Mapping[str, Array]) -> dict[str, int]:
    """Check feeds against a network's inputs; return the size of every symbol.

    Raises:
        EngineError: The first mismatch of names, then dtypes, then shapes.
    """
    wanted = {spec.name: spec for spec in specs}
    missing, unknown = wanted.keys() - feeds.keys(), feeds.keys() - wanted.keys()
    if missing or unknown:
        parts = [f"lacks {', '.join(sorted(missing))}"] if missing else []
        parts += [f"does not take {', '.join(sorted(unknown))}"] if unknown else []
        raise EngineError(f"{network}: the feed {' and '.join(parts)}")
    for name, spec in wanted.items():
        if feeds[name].dtype != np.dtype(spec.dtype):
            raise EngineError(f"{network}: {name} is {feeds[name].dtype}, expected {spec.dtype}")
    sizes: dict[str, int] = {}
    for name, spec in wanted.items():
        shape = feeds[name].shape
        if len(shape) != len(spec.shape):
            raise EngineError(f"{network}: {name} has shape {shape}, expected {spec}")
        for size, expected in zip(shape, spec.shape, strict=True):
            known = expected if isinstance(expected, int) else sizes.setdefault(expected, size)
            if size != known:
                raise EngineError(f"{network}: {name} has shape {shape}, expected {spec} with {expected} = {known}")
    return sizes
