# SPDX-License-Identifier: Apache-2.0
"""Everything that differs between the supported versions of TensorRT: 11, and 10.16 as the fallback.

The rest of this package uses what both have and treats them alike; which are allowed, ``ltxrt.tensorrt_plans`` knows.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["inspector_tensor_type", "network_flags"]


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
