# SPDX-License-Identifier: Apache-2.0
"""Retyping on small graphs: what stays fp32, where casts stand, and which values survive because of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from ltxrt.errors import ExportError
from ltxrt_export.onnx_export import attach_weights
from ltxrt_export.quantize.graph import element_types, producers
from ltxrt_export.quantize.half import to_half
from ltxrt_export.quantize.ranges import Excess, excesses, wide_nodes
from ltxrt_export.quantize.recording import open_session
from ltxrt_export.quantize.twin import rounding_twin
from ltxrt_export.weights import TensorFile

FP32, FP16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16


def node(operator: str, inputs: Sequence[str], output: str, **attributes: object) -> NodeProto:
    return helper.make_node(operator, inputs, [output], name=output, **attributes)


def graph(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Mapping[str, Sequence[int | str]],
    constants: Mapping[str, object] | None = None,
) -> ModelProto:
    """An fp32 graph; constants inline."""
    made = helper.make_graph(
        list(nodes),
        "toy",
        [helper.make_tensor_value_info(name, FP32, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, FP32, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def stored(model: ModelProto, folder: Path, weights: Mapping[str, torch.Tensor]) -> ModelProto:
    """Give a graph stored weights under the names of some of its inputs."""
    save_file(dict(weights), folder / "model.safetensors")
    for name, value in weights.items():
        model.graph.input.append(helper.make_tensor_value_info(name, FP32, value.shape))
    attach_weights(model, TensorFile.open(folder / "model.safetensors").tensors)
    return model


def run(model: ModelProto, feeds: Mapping[str, np.ndarray], folder: Path) -> np.ndarray:
    (folder / "graph.onnx").write_bytes(model.SerializeToString())
    onnx.checker.check_model(folder / "graph.onnx", full_check=True)
    return np.asarray(open_session(model, folder, threads=1).run(None, dict(feeds))[0])


def types(model: ModelProto) -> dict[str, int]:
    return element_types(model.graph)


def linear(folder: Path) -> ModelProto:
    nodes = [
        node("Transpose", ["w.weight"], "turned", perm=[1, 0]),
        node("MatMul", ["x", "turned"], "product"),
        node("Add", ["product", "half"], "y"),
    ]
    model = graph(nodes, {"x": ["n", 16]}, {"y": ["n", 8]}, {"half": np.float32(0.5)})
    torch.manual_seed(1)
    return stored(model, folder, {"w.weight": torch.randn(8, 16).bfloat16()})


@pytest.mark.parametrize("half", [FP16, BF16])
def test_ports_stay_and_everything_between_is_16_bit(tmp_path: Path, half: int) -> None:
    model = to_half(linear(tmp_path), "toy", half)
    kinds = types(model)
    assert (kinds["x"], kinds["y"], kinds["product"]) == (FP32, FP32, half)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "w.weight")
    assert weight.data_type == BF16
    assert weight.data_location == TensorProto.EXTERNAL
    casts = {n.name for n in model.graph.node if n.op_type == "Cast"}
    # bf16 weights need no cast in a bf16 graph, and constants are converted, not cast.
    assert casts == ({"x/bf16", "y/fp32"} if half == BF16 else {"x/fp16", "y/fp32", "turned/fp16"})
    assert {tensor.name for tensor in model.graph.initializer} == {
        "w.weight",
        f"half/{'bf16' if half == BF16 else 'fp16'}",
    }


def test_fp16_runs_and_is_near(tmp_path: Path) -> None:
    model, x = linear(tmp_path), np.random.default_rng(2).standard_normal((5, 16)).astype(np.float32)
    found, exact = run(to_half(model, "toy", FP16), {"x": x}, tmp_path), run(model, {"x": x}, tmp_path)
    assert found.dtype == np.float32
    assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < 2e-3


@pytest.mark.parametrize(("half", "kind"), [(FP16, np.float16), (BF16, ml_dtypes.bfloat16)])
def test_the_twin_rounds_where_the_16_bit_graph_would(tmp_path: Path, half: int, kind: type) -> None:
    twin = rounding_twin(to_half(linear(tmp_path), "toy", half))
    x = np.random.default_rng(3).standard_normal((5, 16)).astype(np.float32)
    ref = TensorFile.open(tmp_path / "model.safetensors").tensors["w.weight"]
    weight = np.fromfile(ref.path, ml_dtypes.bfloat16, 128, offset=ref.offset).reshape(8, 16).astype(np.float32)

    def rounded(values: np.ndarray) -> np.ndarray:
        return values.astype(kind).astype(np.float32)

    found = open_session(twin, tmp_path, exact=True).run(None, {"x": x})[0]
    expected = rounded(rounded(rounded(x) @ weight.T) + np.float32(0.5))
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(found, x @ weight.T + np.float32(0.5))
    smooth = rounding_twin(to_half(linear(tmp_path), "toy", half), rounding=False)
    found = open_session(smooth, tmp_path, exact=True).run(None, {"x": x})[0]
    np.testing.assert_allclose(found, x @ weight.T + 0.5, rtol=1e-5, atol=1e-5)


def test_angles_are_fp32_up_to_the_sine(tmp_path: Path) -> None:
    """At 4000 rad fp16 has steps of 2 rad: any rounding on the way would show."""
    nodes = [node("Mul", ["sigma", "thousand"], "scaled"), node("Sin", ["scaled"], "sine"), node("Neg", ["sine"], "y")]
    model = to_half(graph(nodes, {"sigma": [4]}, {"y": [4]}, {"thousand": np.float32(4000)}), "toy", FP16)
    sigma = np.array([0.1234, 0.5, 0.909375, 0.99375], np.float32)
    np.testing.assert_allclose(run(model, {"sigma": sigma}, tmp_path), -np.sin(sigma * 4000), atol=1e-3)
    assert types(model)["y/fp16"] == FP16


def rotation() -> ModelProto:
    nodes = [
        helper.make_node("Split", ["x"], ["a", "b"], name="split", axis=-1, num_outputs=2),
        node("Mul", ["a", "rope_cos"], "ac"),
        node("Mul", ["b", "rope_sin"], "bs"),
        node("Mul", ["b", "rope_cos"], "bc"),
        node("Mul", ["a", "rope_sin"], "as"),
        node("Sub", ["ac", "bs"], "first"),
        node("Add", ["bc", "as"], "second"),
        node("Concat", ["first", "second"], "turned", axis=-1),
        node("Sigmoid", ["turned"], "latent_next"),
    ]
    inputs = {"x": [3, 8], "rope_cos": [3, 4], "rope_sin": [3, 4]}
    return graph(nodes, inputs, {"latent_next": [3, 8]})


def test_the_rotation_and_its_tables_are_fp32() -> None:
    model = to_half(rotation(), "denoiser", BF16)
    kinds = types(model)
    assert {kinds[name] for name in ("a", "ac", "bs", "first", "second", "turned", "rope_cos")} == {FP32}
    assert not any(n.name.startswith("rope_") for n in model.graph.node)


def test_a_split_that_is_no_rotation_is_16_bit() -> None:
    nodes = [
        helper.make_node("Split", ["x"], ["a", "b"], name="split", axis=-1, num_outputs=2),
        node("Sigmoid", ["a"], "gate"),
        node("Mul", ["gate", "b"], "y"),
    ]
    kinds = types(to_half(graph(nodes, {"x": [3, 8]}, {"y": [3, 4]}), "toy", FP16))
    assert kinds["a"] == kinds["gate"] == FP16


def test_spelled_out_statistics_are_fp32_and_nothing_behind_them(tmp_path: Path) -> None:
    """300^2 is beyond fp16, 300 is not."""
    nodes = [
        node("Pow", ["x", "two"], "square"),
        node("ReduceMean", ["square", "axes"], "mean", keepdims=1),
        node("Add", ["mean", "eps"], "safe"),
        node("Sqrt", ["safe"], "root"),
        node("Reciprocal", ["root"], "inverse"),
        node("Mul", ["x", "inverse"], "norm"),
        node("Sigmoid", ["norm"], "y"),
    ]
    constants = {"two": np.float32(2), "axes": np.array([1]), "eps": np.float32(1e-8)}
    model = to_half(graph(nodes, {"x": [2, 4]}, {"y": [2, 4]}, constants), "toy", FP16)
    kinds = types(model)
    assert {kinds[name] for name in ("square", "mean", "safe", "root", "inverse", "norm")} == {FP32}
    assert kinds["y/fp16"] == FP16
    x = np.array([[300, -300, 300, 300], [1e-3, 0, 0, 0]], np.float32)
    exact = 1 / (1 + np.exp(-x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-8)))
    np.testing.assert_allclose(run(model, {"x": x}, tmp_path), exact, atol=2e-3)


def test_the_way_to_a_named_output_is_fp32_from_the_last_linear_layer_on(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["x", "w.weight"], "product"),
        node("Add", ["product", "b.bias"], "velocity"),
        node("Mul", ["velocity", "sigma"], "moved"),
        node("Sub", ["latent", "moved"], "latent_next"),
    ]
    inputs = {"x": [4, 8], "sigma": [1], "latent": [4, 8]}
    model = graph(nodes, inputs, {"latent_next": [4, 8]})
    weights = {"w.weight": torch.eye(8).bfloat16(), "b.bias": torch.zeros(8).bfloat16()}
    made = to_half(stored(model, tmp_path, weights), "denoiser", FP16)
    kinds = types(made)
    assert kinds["product"] == kinds["velocity"] == FP16
    assert kinds["moved"] == kinds["latent_next"] == FP32
    latent = np.full((4, 8), 1.0001, np.float32)
    feeds = {"x": np.zeros((4, 8), np.float32), "sigma": np.ones(1, np.float32), "latent": latent}
    np.testing.assert_array_equal(run(made, feeds, tmp_path), latent)


def test_a_norm_with_a_computed_scale_is_fp32(tmp_path: Path) -> None:
    nodes = [node("Add", ["w.weight", "one"], "scale"), node("RMSNormalization", ["x", "scale"], "norm", axis=-1)]
    nodes.append(node("Sigmoid", ["norm"], "y"))
    model = graph(nodes, {"x": [2, 8]}, {"y": [2, 8]}, {"one": np.float32(1)})
    kinds = types(to_half(stored(model, tmp_path, {"w.weight": torch.zeros(8).bfloat16()}), "toy", BF16))
    assert kinds["scale"] == kinds["norm"] == FP32
    assert kinds["y/bf16"] == BF16


def test_rows_are_gathered_before_they_are_cast(tmp_path: Path) -> None:
    nodes = [node("Gather", ["table.weight", "ids"], "rows"), node("Mul", ["rows", "x"], "y")]
    model = graph(nodes, {"x": [2, 8]}, {"y": [2, 8]}, {"ids": np.array([1, 3])})
    made = to_half(stored(model, tmp_path, {"table.weight": torch.randn(9, 8).bfloat16()}), "toy", FP16)
    assert producers(made.graph)["rows"].input[0] == "table.weight"
    assert types(made)["rows"] == BF16


@pytest.mark.parametrize("half", [FP16, BF16])
def test_a_weight_joined_with_a_constant_takes_its_type(tmp_path: Path, half: int) -> None:
    model = graph(
        [node("Concat", ["zeros", "b"], "biases", axis=0), node("Add", ["x", "biases"], "y")],
        {"x": ["n", 12]},
        {"y": ["n", 12]},
        {"zeros": np.zeros(4, np.float32)},
    )
    torch.manual_seed(5)
    joined = to_half(stored(model, tmp_path, {"b": torch.randn(8).bfloat16()}), "toy", half)
    kinds = types(joined)
    assert (kinds["b"], kinds["biases"]) == (BF16, FP32)
    (tmp_path / "graph.onnx").write_bytes(joined.SerializeToString())
    onnx.checker.check_model(tmp_path / "graph.onnx", full_check=True)
    if half == FP16:  # ONNX Runtime adds no BF16 on a CPU
        x = np.random.default_rng(6).standard_normal((3, 12)).astype(np.float32)
        np.testing.assert_allclose(run(joined, {"x": x}, tmp_path), run(model, {"x": x}, tmp_path), atol=4e-3)


def test_an_input_that_lends_its_shape_alone_is_not_cast() -> None:
    nodes = [node("Shape", ["state"], "size"), node("Expand", ["x", "size"], "y")]
    model = to_half(graph(nodes, {"state": ["n"], "x": [1]}, {"y": ["n"]}), "toy", FP16)
    assert not any("state" in n.name for n in model.graph.node)


def overflowing() -> ModelProto:
    """x -> residual stream of large numbers -> small again."""
    nodes = [
        node("Mul", ["x", "large"], "stream"),
        node("Unsqueeze", ["stream", "axis"], "moved"),
        node("RMSNormalization", ["moved", "ones"], "norm", axis=-1, stash_type=1),
        node("Sigmoid", ["norm"], "y"),
    ]
    constants = {"large": np.float32(6e4), "axis": np.array([0]), "ones": np.ones(8, np.float32)}
    return graph(nodes, {"x": [2, 8]}, {"y": [1, 2, 8]}, constants)


def test_tensors_beyond_fp16_are_named_and_their_nodes_widened(tmp_path: Path) -> None:
    model, x = overflowing(), np.random.default_rng(4).standard_normal((2, 8)).astype(np.float32)
    found = excesses(model, "toy", {"stream": 1e6, "norm": 3.0})
    assert found == (Excess("stream", 1e6, "stream", "Mul", ""),)
    assert wide_nodes(model, found) == {"stream", "norm"}
    kinds = types(to_half(model, "toy", FP16, wide_nodes(model, found)))
    assert kinds["stream"] == kinds["moved"] == kinds["norm"] == BF16
    assert kinds["y/fp16"] == FP16
    # Without it the graph overflows; with fp32 in BF16's place it runs here too.
    assert not np.isfinite(run(to_half(model, "toy", FP16), {"x": x}, tmp_path)).all()
    safe = run(to_half(model, "toy", FP16, wide_nodes(model, found), FP32), {"x": x}, tmp_path)
    np.testing.assert_allclose(safe, run(model, {"x": x}, tmp_path), atol=2e-3)


def test_a_constant_beyond_fp16_keeps_its_node_in_fp32(tmp_path: Path) -> None:
    nodes = [node("Div", ["x", "large"], "small"), node("Sigmoid", ["small"], "y")]
    model = to_half(graph(nodes, {"x": [4]}, {"y": [4]}, {"large": np.float32(1e5)}), "toy", FP16)
    assert types(model)["small"] == FP32
    x = np.array([1e5, -1e5, 3e5, 0], np.float32)
    np.testing.assert_allclose(run(model, {"x": x}, tmp_path), 1 / (1 + np.exp(-x / 1e5)), atol=1e-3)


def test_the_margin_counts_and_fp32_nodes_do_not() -> None:
    model = overflowing()
    assert excesses(model, "toy", {"stream": 40_000.0})
    assert not excesses(model, "toy", {"stream": 40_000.0}, margin=1.0)
    assert not excesses(rotation(), "denoiser", {"turned": 1e6})


def test_ranges_of_another_graph_are_refused() -> None:
    with pytest.raises(ExportError, match=r"the ranges name block\.9/add"):
        excesses(overflowing(), "toy", {"block.9/add": 1e6})


def test_the_source_graph_is_left_alone_and_the_target_is_checked(tmp_path: Path) -> None:
    model = linear(tmp_path)
    before = model.SerializeToString(deterministic=True)
    to_half(model, "toy", FP16)
    assert model.SerializeToString(deterministic=True) == before
    with pytest.raises(ValueError, match="neither FLOAT16 nor BFLOAT16"):
        to_half(model, "toy", FP32)
