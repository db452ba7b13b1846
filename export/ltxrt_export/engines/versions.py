# SPDX-License-Identifier: Apache-2.0
"""Everything that differs between the supported versions of TensorRT: 11, and 10.16 as the fallback.

The rest of this package uses what both have and treats them alike.
"""

import re
from collections.abc import Mapping
from typing import Any

from ltxrt.errors import EngineError

__all__ = ["SUPPORTED", "check_version", "inspector_tensor_type", "network_flags"]

SUPPORTED = "11, or 10.16"
_OLDEST_MINOR_OF_10 = 16
_MAJORS = (10, 11)
#: TensorRT 11 is built against CUDA 13 alone.
_CUDA_OF_11 = 13


def check_version(version: str, cuda_version: tuple[int, int]) -> None:
    """Refuse a TensorRT that this code was not written for, or that the driver is too old for.

    Args:
        version: As ``tensorrt.__version__`` tells it.
        cuda_version: Newest CUDA that the driver serves.

    Raises:
        EngineError: Naming what is there and what is allowed.
    """
    match = re.match(r"(\d+)\.(\d+)", version)
    major, minor = (int(match[1]), int(match[2])) if match else (0, 0)
    if major not in _MAJORS or (major == 10 and minor < _OLDEST_MINOR_OF_10):
        raise EngineError(f"TensorRT {version} is installed; allowed: {SUPPORTED}")
    if major == 11 and cuda_version[0] < _CUDA_OF_11:
        found = ".".join(map(str, cuda_version))
        raise EngineError(
            f"the NVIDIA driver serves CUDA {found}, TensorRT {version} needs {_CUDA_OF_11}.0: update the driver"
        )


def network_flags(tensorrt: Any) -> int:
    """Flags of a strongly typed network: the graph's types are obeyed. In 11 every network is, and the flag is idle."""
    return 1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def inspector_tensor_type(tensor: Mapping[str, Any]) -> str:
    """Type and format of a tensor in the inspector's JSON: one field in 10, two in 11."""
    joined = tensor.get("Format/Datatype")
    if isinstance(joined, str):
        return joined
    parts = (tensor.get(key) for key in ("DataType", "Datatype", "Format"))
    return " ".join(part for part in parts if isinstance(part, str))
