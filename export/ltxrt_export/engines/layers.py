# SPDX-License-Identifier: Apache-2.0
"""What a compiled engine consists of: layers, kernels and precisions, as TensorRT's inspector tells it."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from ltxrt.errors import EngineError

from .versions import inspector_tensor_type

__all__ = ["layer_report"]

#: The inspector's words for a type, most telling first: a format's description may hold several words.
_TYPES = (
    ("fp8", re.compile(r"FP8|E4M3|Float8", re.IGNORECASE)),
    ("bf16", re.compile(r"BF16|BFloat16", re.IGNORECASE)),
    ("fp16", re.compile(r"FP16|Half", re.IGNORECASE)),
    ("fp32", re.compile(r"FP32|Float\b", re.IGNORECASE)),
    ("int64", re.compile(r"Int64", re.IGNORECASE)),
    ("int32", re.compile(r"Int32", re.IGNORECASE)),
    ("uint8", re.compile(r"UInt8", re.IGNORECASE)),
    ("bool", re.compile(r"Bool", re.IGNORECASE)),
)


def layer_report(inspector_json: str) -> dict[str, Any]:
    """The report that is kept beside a plan.

    Args:
        inspector_json: ``EngineInspector.get_engine_information`` in JSON of an engine built with detailed verbosity.

    Returns:
        ``summary`` (layers by type, by the types of what they put out, kernels that compute in FP8), ``layers`` (name,
        type, kernel, inputs and outputs with their types) and ``inspector`` (everything, as it came).

    Raises:
        EngineError: It is not of that form.
    """
    try:
        data = json.loads(inspector_json)
    except ValueError as error:
        raise EngineError(f"the layers of the engine cannot be read: {error}") from error
    layers = data.get("Layers") if isinstance(data, dict) else None
    if not isinstance(layers, list):
        raise EngineError("the layers of the engine cannot be read: the inspector lists none")
    rows = [_layer(layer) for layer in layers]
    outputs = Counter(kind for row in rows for kind in {output["type"] for output in row["outputs"]})
    return {
        "summary": {
            "layers": len(rows),
            "by_type": dict(sorted(Counter(row["type"] for row in rows).items())),
            "by_output_type": dict(sorted(outputs.items())),
            "fp8_kernels": sum(1 for row in rows if "e4m3" in row["kernel"].lower()),
            "fused_attention": sum(1 for row in rows if re.search(r"mha|attention", row["kernel"] + row["name"], re.I)),
        },
        "layers": rows,
        "inspector": data,
    }


def _layer(layer: Any) -> dict[str, Any]:
    if not isinstance(layer, dict):  # at lower verbosity a layer is its name alone
        return {"name": str(layer), "type": "unknown", "kernel": "", "inputs": [], "outputs": []}
    return {
        "name": str(layer.get("Name", "")),
        "type": str(layer.get("LayerType", "unknown")),
        "kernel": str(layer.get("TacticName", "")),
        "inputs": _tensors(layer.get("Inputs", ())),
        "outputs": _tensors(layer.get("Outputs", ())),
    }


def _tensors(tensors: Iterable[Any]) -> list[dict[str, Any]]:
    return [
        {"name": str(tensor.get("Name", "")), "type": _type(tensor), "shape": tensor.get("Dimensions", [])}
        for tensor in tensors
        if isinstance(tensor, dict)
    ]


def _type(tensor: Any) -> str:
    text = inspector_tensor_type(tensor)
    return next((name for name, pattern in _TYPES if pattern.search(text)), text or "unknown")
