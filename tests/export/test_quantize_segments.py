# SPDX-License-Identifier: Apache-2.0
"""Graphs in parts: what passes through is what passes through the whole, and only a part is in memory."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ltxrt_export.onnx_export import OPSET
from ltxrt_export.quantize.graph import linears
from ltxrt_export.quantize.recording import GraphTap, SegmentTap, Taps
from ltxrt_export.quantize.segments import cut, weight_bytes

WIDTH = 4
Arrays = Mapping[str, np.ndarray]


def chain(layers: int) -> ModelProto:
    """x -> (x @ W_i^T + x) for every layer, times the graph's second input; W_0 is read by the last layer again."""
    generator = np.random.default_rng(0)
    nodes, weights, x = [], [], "x"
    for index in range(layers):
        name = f"w.{0 if index == layers - 1 else index}"
        if index < layers - 1 or layers == 1:
            values = generator.standard_normal((WIDTH, WIDTH)).astype(np.float16)
            weights.append(numpy_helper.from_array(values, name))
        if f"{name}/turned" not in {node.output[0] for node in nodes}:
            nodes.append(helper.make_node("Cast", [name], [f"{name}/cast"], to=TensorProto.FLOAT))
            nodes.append(helper.make_node("Transpose", [f"{name}/cast"], [f"{name}/turned"]))
        nodes.append(helper.make_node("MatMul", [x, f"{name}/turned"], [f"product.{index}"]))
        nodes.append(helper.make_node("Add", [f"product.{index}", x], [f"sum.{index}"]))
        x = f"sum.{index}"
    nodes.append(helper.make_node("Mul", [x, "factor"], ["y"]))
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, WIDTH]) for name in ("x", "factor", "y")]
    graph = helper.make_graph(nodes, "chain", ports[:2], ports[2:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def seen_by(tap: GraphTap | SegmentTap, batches: list[Arrays]) -> tuple[list[dict[str, np.ndarray]], list[Taps]]:
    seen: list[Taps] = []
    return tap.run(batches, seen.append), seen


def merged(seen: list[Taps]) -> tuple[dict[str, list[np.ndarray]], dict[str, float]]:
    """Values by tensor, one for each batch, and the largest magnitudes over all batches."""
    values: dict[str, list[np.ndarray]] = {}
    amax: dict[str, float] = {}
    for taps in seen:
        for name, value in taps.values.items():
            values.setdefault(name, []).append(value)
        for name, largest in taps.amax.items():
            amax[name] = max(largest, amax.get(name, 0.0))
    return values, amax


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(0, 7 * WIDTH * WIDTH * 4))
def test_parts_hold_the_budget_and_give_what_the_whole_gives(layers: int, budget: int) -> None:
    model = chain(layers)
    one = WIDTH * WIDTH * 4
    parts = cut(model, budget)
    sizes = [weight_bytes(part.model.graph) for part in parts]
    assert all(size <= max(budget, one) for size in sizes)
    assert weight_bytes(model.graph) <= sum(sizes) <= weight_bytes(model.graph) + one
    # As few as the order allows: no two neighbours would fit together.
    assert all(left + right > budget for left, right in pairwise(sizes))
    generator = np.random.default_rng(layers)
    batches: list[Arrays] = [
        {name: generator.standard_normal((1, WIDTH)).astype(np.float32) for name in ("x", "factor")} for _ in range(2)
    ]
    watched = ["x", "sum.0"]
    whole, expected = seen_by(GraphTap(model, Path(), watched), batches)
    found, seen = seen_by(SegmentTap(model, Path(), watched, budget), batches)
    for left, right in zip(found, whole, strict=True):
        assert set(left) == {"y"}
        np.testing.assert_allclose(left["y"], right["y"], rtol=1e-6)
    (values, amax), (expected_values, expected_amax) = merged(seen), merged(expected)
    assert set(values) == set(expected_values) == {*watched}
    for name in watched:
        np.testing.assert_allclose(values[name], expected_values[name], rtol=1e-6)
    assert set(amax) == {*(f"{kind}.{index}" for kind in ("product", "sum") for index in range(layers)), "y"}
    assert amax == pytest.approx(expected_amax, rel=1e-6)


def test_what_is_needed_no_more_is_let_go() -> None:
    parts = cut(chain(4), 1)
    assert [sorted(part.needed_later) for part in parts] == [
        ["factor", "sum.0"],
        ["factor", "sum.1"],
        ["factor", "sum.2"],
        ["y"],
    ]


def test_a_table_is_looked_up_before_it_is_cast() -> None:
    """Gemma's embeddings would be 4 GB in fp32, for a prompt's few rows of them."""
    table = numpy_helper.from_array(np.arange(12, dtype=np.float16).reshape(6, 2), "table")
    nodes = [
        helper.make_node("Cast", ["table"], ["table/cast"], name="table/cast", to=TensorProto.FLOAT),
        helper.make_node("Gather", ["table/cast", "ids"], ["rows"], name="rows"),
    ]
    ids, rows = (
        helper.make_tensor_value_info(name, kind, [None])
        for name, kind in (("ids", TensorProto.INT64), ("rows", TensorProto.FLOAT))
    )
    model = helper.make_model(
        helper.make_graph(nodes, "lookup", [ids], [rows], [table]),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=10,
    )
    (part,) = cut(model, 1)
    assert [(node.op_type, node.input[0]) for node in part.model.graph.node] == [
        ("Gather", "table"),
        ("Cast", "rows/stored"),
    ]
    (found,), _ = seen_by(SegmentTap(model, Path(), ["rows"], 1), [{"ids": np.array([5, 1])}])
    np.testing.assert_array_equal(found["rows"], [[10, 11], [2, 3]])
    assert found["rows"].dtype == np.float32


@pytest.mark.parametrize("name", ["denoiser", "text_encoder"])
def test_the_large_networks_in_parts_show_what_they_show_whole(fp32_graphs: Mapping[str, Path], name: str) -> None:
    """The tiny model's, in parts of a few layers; every name, every value, and nothing twice."""
    path = fp32_graphs[name]
    model = onnx.load(path, load_external_data=False)
    watched = sorted({linear.activation for linear in linears(model.graph)})
    feeds = feeds_of(model)
    budget = weight_bytes(model.graph) // 12
    assert len(cut(model, budget)) > 10
    (whole,), expected = seen_by(GraphTap(model, path.parent, watched, threads=1), [feeds])
    (found,), seen = seen_by(SegmentTap(model, path.parent, watched, budget, threads=1), [feeds])
    (values, amax), (expected_values, expected_amax) = merged(seen), merged(expected)
    assert set(found) == set(whole)
    for output, value in whole.items():
        np.testing.assert_allclose(found[output], value, rtol=1e-3, atol=2e-5 * np.abs(value).max())
    assert set(values) == set(expected_values) == set(watched)
    for tensor, (value,) in expected_values.items():
        (other,) = values[tensor]
        assert np.abs(other).max() == pytest.approx(np.abs(value).max(), rel=1e-4, abs=1e-30)
    assert amax == pytest.approx(expected_amax, rel=1e-4, abs=1e-30)


def feeds_of(model: ModelProto) -> dict[str, np.ndarray]:
    """Small inputs of a network of the tiny model, with a first frame and without."""
    sizes = {"n": 23, "Nv": 36, "Na": 31, "f": 3, "h": 3, "w": 4}
    generator = np.random.default_rng(11)
    feeds: dict[str, np.ndarray] = {}
    for port in model.graph.input:
        shape = tuple(dim.dim_value or sizes[dim.dim_param] for dim in port.type.tensor_type.shape.dim)
        whole = port.type.tensor_type.elem_type == TensorProto.INT64
        feeds[port.name] = generator.integers(3, 100, shape) if whole else generator.standard_normal(shape, np.float32)
    if "token_row" in feeds:
        row = (np.arange(36) >= 12).astype(np.int64)
        feeds |= {"token_row": row, "mask": row.reshape(1, -1, 1).astype(np.float32)}
        feeds |= {"sigma": np.array([0.725], np.float32), "sigma_next": np.array([0.421875], np.float32)}
    return feeds
