# SPDX-License-Identifier: Apache-2.0
"""The report of an engine's layers, from the inspector's JSON of both versions."""

import json

import pytest

from ltxrt.errors import EngineError
from ltxrt_export.engines.layers import layer_report


def tensor(kind: str, *, version: int) -> dict:
    fields = (
        {"Format/Datatype": f"Row major linear {kind} format"} if version == 10 else {"DataType": kind, "Format": "x"}
    )
    return {"Name": "t", "Dimensions": [1, 2], **fields}


@pytest.mark.parametrize("version", [10, 11])
@pytest.mark.parametrize(
    ("told", "meant"),
    [
        ("FP8", "fp8"),
        ("BFloat16", "bf16"),
        ("BF16", "bf16"),
        ("FP16", "fp16"),
        ("Half", "fp16"),
        ("FP32", "fp32"),
        ("Float", "fp32"),
        ("Int64", "int64"),
        ("Int32", "int32"),
        ("UInt8", "uint8"),
        ("Bool", "bool"),
    ],
)
def test_types_of_both_versions(version: int, told: str, meant: str) -> None:
    layer = {"Name": "a", "LayerType": "gemm", "Inputs": [], "Outputs": [tensor(told, version=version)]}
    report = layer_report(json.dumps({"Layers": [layer]}))
    assert report["layers"][0]["outputs"] == [{"name": "t", "type": meant, "shape": [1, 2]}]
    assert report["summary"]["by_output_type"] == {meant: 1}


def test_a_summary() -> None:
    layers = [
        {"Name": "a", "LayerType": "gemm", "TacticName": "sm90_E4M3_gemm", "Outputs": [tensor("FP8", version=11)]},
        {"Name": "b", "LayerType": "kgen", "TacticName": "_gemm_mha_v2", "Outputs": [tensor("Half", version=11)]},
        {"Name": "c", "LayerType": "gemm", "Outputs": [tensor("Half", version=11), tensor("Half", version=11)]},
        "a layer that is only named",
    ]
    assert layer_report(json.dumps({"Layers": layers}))["summary"] == {
        "layers": 4,
        "by_type": {"gemm": 2, "kgen": 1, "unknown": 1},
        "by_output_type": {"fp16": 2, "fp8": 1},
        "fp8_kernels": 1,
        "fused_attention": 1,
    }


def test_a_type_that_is_not_known_is_told_as_it_is() -> None:
    layer = {"Name": "a", "Outputs": [{"DataType": "Q7"}, {"Name": "no type"}]}
    report = layer_report(json.dumps({"Layers": [layer]}))
    assert [output["type"] for output in report["layers"][0]["outputs"]] == ["Q7", "unknown"]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"Layers": {}}'])
def test_what_is_no_report(text: str) -> None:
    with pytest.raises(EngineError, match="the layers of the engine cannot be read"):
        layer_report(text)
