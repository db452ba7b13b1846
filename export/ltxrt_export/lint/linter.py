# SPDX-License-Identifier: Apache-2.0
"""All rules on all networks of a bundle, at the sizes of its profiles."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from onnx import ModelProto

from ltxrt.bundle import Bundle
from ltxrt.manifest import Manifest
from ltxrt_export.engines.buckets import Buckets
from ltxrt_export.engines.build import load_graph
from ltxrt_export.engines.engine_set import required_networks
from ltxrt_export.engines.profiles import Profile, Sizes, concrete_shape, network_profiles

from .attention import check_attention, check_normalisation
from .external import check_external_data
from .findings import Finding
from .fp8 import check_fp8
from .graph import GraphView
from .shapes import Shapes, infer_shapes
from .sizes import check_ports, check_sizes
from .structure import check_file, check_operators

__all__ = ["lint_bundle", "lint_graph", "lint_network", "sizes_to_check"]

InputShapes = Mapping[str, tuple[int, ...]]


def lint_bundle(folder: Path, buckets: Buckets, presets: Iterable[str] | None = None) -> Iterator[Finding]:
    """Check the networks of some presets, or all of a bundle, one after the other.

    Raises:
        BundleError: It is not a whole bundle.
        RequestError: It has no such preset.
    """
    manifest = Bundle.open(folder).manifest
    for key in required_networks(manifest, manifest.presets if presets is None else presets):
        yield from lint_network(folder, manifest, key, buckets)


def lint_network(folder: Path, manifest: Manifest, key: str, buckets: Buckets) -> Iterator[Finding]:
    """Check one network of a bundle at the sizes of its profiles."""
    network = manifest.networks[key]
    path = folder / network.file
    view = GraphView(key, load_graph(path), path.parent)
    profiles = network_profiles(manifest, key, buckets)
    points = [
        ({port.name: concrete_shape(port.shape, sizes) for port in network.inputs}, sizes)
        for sizes in sizes_to_check(profiles)
    ]
    yield from check_external_data(view, frozenset(PurePosixPath(name).name for name in network.weights))
    yield from check_ports(view, network, [frozenset(profile.entry.sizes) for profile in profiles])
    yield from _check(view, infer_shapes(view, points))


def lint_graph(network: str, model: ModelProto, input_shapes: Sequence[InputShapes]) -> Iterator[Finding]:
    """Check a graph on its own, at given input shapes (one or more sets of them)."""
    view = GraphView(network, model)
    points = [(shapes, {f"set {index}": index}) for index, shapes in enumerate(input_shapes, start=1)]
    yield from _check(view, infer_shapes(view, points))


def sizes_to_check(profiles: Iterable[Profile]) -> tuple[Sizes, ...]:
    """Corners of all profiles, less those that another one exceeds in every size with the same tensors empty.

    The smallest of each kind stays as well: what is static is told by what does not change between sizes.
    """
    corners = list({tuple(sizes.values()): sizes for profile in profiles for sizes in profile.corners}.values())
    kept: list[Sizes] = []
    patterns: set[tuple[bool, ...]] = set()
    for sizes in corners:  # the smallest of a pattern comes first
        pattern = _pattern(sizes)
        exceeded = any(other is not sizes and _exceeds(other, sizes) for other in corners)
        if pattern not in patterns or not exceeded:
            kept.append(sizes)
        patterns.add(pattern)
    return tuple(kept)


def _pattern(sizes: Sizes) -> tuple[bool, ...]:
    return tuple(size == 0 for size in sizes.values())


def _exceeds(other: Sizes, sizes: Sizes) -> bool:
    return _pattern(other) == _pattern(sizes) and all(other[symbol] >= size for symbol, size in sizes.items())


def _check(view: GraphView, points: tuple[Shapes, ...]) -> Iterator[Finding]:
    yield from check_file(view)
    yield from check_operators(view, points[0])
    yield from check_attention(view, points)
    yield from check_normalisation(view, points[0])
    yield from check_fp8(view, points[0])
    yield from check_sizes(view, points)
