# SPDX-License-Identifier: Apache-2.0
"""The one protocol behind which every backend stands, and the checks that all of them share.

An engine runs one network. Tensors are named; names, then dtypes, then shapes are checked against the
network's declaration before the backend is touched, so that a mistake is one sentence rather than a crash.

What stays on a device between networks goes through ``run_resident`` and ``iterate``. They take any engine: on one
that computes in host memory they are plain runs and replays, in the same order and on the same arrays as ever.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .errors import EngineError

__all__ = [
    "Array",
    "Capture",
    "Engine",
    "LoopCapture",
    "ResidentEngine",
    "Tensor",
    "TensorSpec",
    "check_feeds",
    "concrete_shape",
    "iterate",
    "run_resident",
    "symbol_sizes",
]

#: Any array; each tensor's dtype is the network's declaration.
Array = NDArray[Any]

_SYMBOLIC = re.compile(r"(?:(\d+)\*)?([A-Za-z_]\w*)")


class Tensor(Protocol):
    """A dense tensor: a NumPy array, or a ``memory.DeviceTensor``. ``np.asarray`` gives its values on the host."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def nbytes(self) -> int: ...

    def __array__(self) -> Array: ...


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


@runtime_checkable
class LoopCapture(Protocol):
    """A capture that can run several times without the host in between."""

    def iterate(
        self, steps: Sequence[Mapping[str, Array]], carried: Mapping[str, str]
    ) -> Iterator[Mapping[str, Tensor]]:
        """See ``iterate``; the capture is given back when the iterator ends."""
        ...


@runtime_checkable
class ResidentEngine(Protocol):
    """An engine whose tensors may stay where it computes."""

    def run_resident(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See ``run_resident``."""
        ...


def run_resident(engine: Engine, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run once and leave the outputs where the engine computes.

    On a device nothing waits for the result: tensors are ordered by the device's stream, and asking for their values
    waits.

    Args:
        engine: Any engine.
        feeds: Host arrays, or what an engine on the same device gave.

    Raises:
        EngineError: As ``Engine.run``.
    """
    if isinstance(engine, ResidentEngine):
        return engine.run_resident(feeds)
    return dict(engine.run({name: np.asarray(value) for name, value in feeds.items()}))


def iterate(
    capture: Capture, steps: Sequence[Mapping[str, Array]], carried: Mapping[str, str]
) -> Iterator[Mapping[str, Tensor]]:
    """Replay once for each of ``steps`` and give the outputs of each, which hold until the next is asked for.

    Args:
        capture: Any capture. It must not be used again where it is a ``LoopCapture``.
        steps: Inputs to overwrite before each replay.
        carried: Output to input: what a replay gives is what the next one gets.

    Raises:
        EngineError: The backend failed.
    """
    if isinstance(capture, LoopCapture):
        yield from capture.iterate(steps, carried)
        return
    for values in steps:
        for name, value in values.items():
            capture.inputs[name][...] = value
        capture.replay()
        for output, name in carried.items():
            capture.inputs[name][...] = capture.outputs[output]
        yield capture.outputs


def concrete_shape(shape: Iterable[int | str], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A port's shape at given sizes; ``"32*h"`` is 32 times the size of ``h``.

    Raises:
        KeyError: A symbol has no size.
    """
    return tuple(entry if isinstance(entry, int) else _factor(entry)[0] * sizes[_factor(entry)[1]] for entry in shape)


def symbol_sizes(network: str, specs: Iterable[TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The size of every symbol, from the shapes of some ports; ``"32*h"`` tells ``h``.

    Raises:
        EngineError: A size is no multiple of its factor, or two ports disagree.
    """
    sizes: dict[str, int] = {}
    for spec in specs:
        for size, entry in zip(shapes[spec.name], spec.shape, strict=True):
            if isinstance(entry, int):
                continue
            factor, symbol = _factor(entry)
            if size % factor or sizes.setdefault(symbol, size // factor) != size // factor:
                raise EngineError(f"{network}: {spec.name} has shape {shapes[spec.name]}, expected {spec}")
    return sizes


def _factor(entry: str) -> tuple[int, str]:
    match = _SYMBOLIC.fullmatch(entry)
    if match is None:
        raise EngineError(f"{entry!r} is neither a symbol nor size*symbol")
    return int(match[1] or 1), match[2]


def check_feeds(network: str, specs: Iterable[TensorSpec], feeds: Mapping[str, Tensor]) -> dict[str, int]:
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
