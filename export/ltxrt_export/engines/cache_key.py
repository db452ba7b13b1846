# SPDX-License-Identifier: Apache-2.0
"""The key of an engine: every input that reaches the compiler, once, in one canonical form.

An engine is built again when its key changes and never otherwise. Where it is unclear whether an input matters,
it is in the key: a build too many costs time, an engine that does not fit its network costs trust.

Left out on purpose, because they change how an engine is found but not what it computes or for whom: the timing
cache (it holds measurements of the same kernels), the memory that happened to be free (the *requested* limit is in),
and the version of the kernel module (kernels are compiled by TensorRT, not by the driver; the CUDA version that the
driver serves is in). They stand in ``EngineEntry.built_with``.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from ltxrt.errors import BundleError
from ltxrt.gpu import Gpu
from ltxrt.manifest import EngineKey, EngineProfile, Manifest

__all__ = ["KEY_SCHEMA", "BuildOptions", "engine_key", "engine_name", "key_digest"]

#: Raise it when the code that builds engines changes what it makes of equal inputs: every key changes with it.
KEY_SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What may be chosen about an engine.

    Attributes:
        workspace_gib: Most scratch memory that a kernel may use; None allows what is free.
        optimization_level: TensorRT's 0 (first kernel that works) to 5 (every kernel that there is).
        decomposed_attention: Allow attention without a fused kernel where there is none; slow and large, so it is an
            error unless the network computes in fp32, for which there are no fused kernels.
    """

    workspace_gib: int | None = None
    optimization_level: int = 3
    decomposed_attention: bool = False


def engine_key(
    manifest: Manifest,
    network_key: str,
    profiles: Iterable[EngineProfile],
    machine: tuple[Gpu, str],
    options: BuildOptions,
) -> EngineKey:
    """The key of one network's engine.

    Args:
        manifest: Of the bundle; its hashes stand for the files.
        network_key: Key of the network in it.
        profiles: In the engine's order.
        machine: The GPU and the version of TensorRT.
        options: As asked for.

    Raises:
        BundleError: The manifest lacks a file of the network.
    """
    network = manifest.networks[network_key]
    gpu, tensorrt_version = machine
    missing = [name for name in (network.file, *network.weights) if name not in manifest.files]
    if missing:
        raise BundleError(f"{network_key}: the manifest does not list {missing[0]}")
    return EngineKey(
        schema_version=KEY_SCHEMA,
        onnx_sha256=manifest.files[network.file].sha256,
        weights_sha256=tuple(manifest.files[name].sha256 for name in sorted(network.weights)),
        gpu_name=gpu.name,
        compute_capability=".".join(map(str, gpu.compute_capability)),
        tensorrt_version=tensorrt_version,
        cuda_version=".".join(map(str, gpu.cuda_version)),
        profiles=tuple(profiles),
        options=canonical_options(options, network.precision),
    )


def canonical_options(options: BuildOptions, precision: str) -> dict[str, bool | int | str | None]:
    """Every builder option that is set, whether it can be chosen or not, sorted by name."""
    chosen = asdict(options)
    chosen["decomposed_attention"] = options.decomposed_attention or precision == "fp32"
    fixed = {"max_aux_streams": 0, "strongly_typed": True, "tf32": False}
    return dict(sorted({**chosen, **fixed}.items()))


def key_digest(key: EngineKey) -> str:
    """Hex SHA-256 of a key; the same for equal keys whatever order their mappings were filled in."""
    text = json.dumps(key.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def engine_name(network_key: str, key: EngineKey) -> str:
    """Name of the engine's files and of its entry in the manifest."""
    architecture = key.compute_capability.replace(".", "")
    return f"{network_key}-sm{architecture}-{key_digest(key)[:12]}"
