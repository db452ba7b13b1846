# SPDX-License-Identifier: Apache-2.0
"""The FP8 pass on small graphs: the form that TensorRT fuses, the arithmetic, and what is refused."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper
from safetensors.torch import save_file

from ltxrt.errors import ExportError
from ltxrt_export.onnx_export import attach_weights
from ltxrt_export.quantize.fp8 import quantise
from ltxrt_export.quantize.fp8_weights import Fp8Pair, Fp8Request, stored_scales, write_fp8
from ltxrt_export.quantize.graph import linears, producers
from ltxrt_export.quantize.recording import open_session
from ltxrt_export.weights import TensorFile

AMAX = {"q.weight": 4.0, "k.weight": 4.0, "out.weight": 6.0}
FLOATS = {TensorProto.FLOAT: ("F32", np.float32), TensorProto.FLOAT16: ("F16", np.float16)}


def toy(folder: Path, dtype: int = TensorProto.FLOAT, *, gemm: bool = False) -> ModelProto:
    """q and k read one input, gate reads it too; out reads what they make. Weights [out, in] in bf16."""
    torch.manual_seed(5)
    shapes = {"q": (32, 16), "k": (32, 16), "gate": (32, 16), "out": (16, 32)}
    save_file({f"{n}.weight": torch.randn(s).bfloat16() / 4 for n, s in shapes.items()}, folder / "model.safetensors")
    nodes = []
    for name, source in (("q", "x"), ("k", "x"), ("gate", "x"), ("out", "mixed")):
        if name == "out":
            nodes += [helper.make_node("Mul", ["q", "k"], ["product"], name="product")]
            nodes += [helper.make_node("Add", ["product", "gate"], ["mixed"], name="mixed")]
        if gemm:
            nodes.append(helper.make_node("Gemm", [source, f"{name}.weight"], [name], name=name, transB=1))
        else:
            turned = f"{name}/turned"
            nodes.append(helper.make_node("Transpose", [f"{name}.weight"], [turned], name=turned, perm=[1, 0]))
            nodes.append(helper.make_node("MatMul", [source, turned], [name], name=name))
    shape = ["n", 16] if gemm else [1, "n", 16]
    values = [helper.make_tensor_value_info(f"{n}.weight", dtype, s) for n, s in shapes.items()]
    x, out = (helper.make_tensor_value_info(name, dtype, shape) for name in ("x", "out"))
    graph = helper.make_graph(nodes, "toy", [x, *values], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    attach_weights(model, TensorFile.open(folder / "model.safetensors").tensors)
    return model


def convert(folder: Path, keys: Mapping[str, float], scale: str = "F32") -> dict[str, Fp8Pair]:
    tensors = TensorFile.open(folder / "model.safetensors").tensors
    return write_fp8(folder, "toy", [Fp8Request(tensors[key], scale) for key in keys])


def quantised(folder: Path, model: ModelProto, scale: str = "F32", amax: Mapping[str, float] = AMAX) -> ModelProto:
    pairs = convert(folder, amax, scale)
    return quantise(model, pairs, amax, next(iter(pairs.values())).weight.path.name)


def run(folder: Path, model: ModelProto, x: np.ndarray) -> np.ndarray:
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    return np.asarray(open_session(model, folder, threads=1).run(None, {"x": x})[0])


def e4m3(x: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
    return (x / scale).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


def emulated(folder: Path, x: np.ndarray) -> np.ndarray:
    """The same arithmetic written out in NumPy."""
    tensors = TensorFile.open(folder / "model.safetensors").tensors
    weights = {
        key.removesuffix(".weight"): np.fromfile(ref.path, ml_dtypes.bfloat16, np.prod(ref.shape), offset=ref.offset)
        .reshape(ref.shape)
        .astype(np.float32)
        for key, ref in tensors.items()
    }
    fp8 = {name: e4m3(w, np.abs(w).max(axis=1, keepdims=True) / np.float32(448)) for name, w in weights.items()}
    narrow = e4m3(x, np.float32(4.0 / 448))
    mixed = (narrow @ fp8["q"].T) * (narrow @ fp8["k"].T) + x @ weights["gate"].T
    return e4m3(mixed, np.float32(6.0 / 448)) @ fp8["out"].T


@pytest.mark.parametrize("gemm", [False, True])
def test_the_form_is_the_one_that_fuses(tmp_path: Path, gemm: bool) -> None:
    model = quantised(tmp_path, toy(tmp_path, gemm=gemm))
    graph, made = model.graph, producers(model.graph)
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    for key in AMAX:
        node = made[key.removesuffix(".weight")]
        activation, weight = (made[name] for name in node.input[:2])
        assert (activation.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear")
        assert made[activation.input[0]].op_type == "QuantizeLinear"
        assert initializers[weight.input[0]].data_type == TensorProto.FLOAT8E4M3FN
        stored, scale = initializers[f"{key}/fp8"], initializers[f"{key}/fp8_scale"]
        assert list(weight.input) == [stored.name, scale.name]
        assert helper.get_node_attr_value(weight, "axis") == 1
        assert stored.dims[1] == scale.dims[0]
        assert key not in initializers
    # One pair for the tensor that q and k share, one for the input of out; the gate reads the exact tensor.
    assert Counter(node.op_type for node in graph.node)["QuantizeLinear"] == 2
    assert made["gate"].input[0] == "x"
    assert not any(node.op_type == "Transpose" for node in graph.node if "gate" not in node.name)
    assert not any(attribute.i for n in AMAX for attribute in made[n[:-7]].attribute if attribute.name == "transB")


@pytest.mark.parametrize("gemm", [False, True])
def test_the_arithmetic_is_that_of_e4m3(tmp_path: Path, gemm: bool) -> None:
    x = np.random.default_rng(6).standard_normal((1, 9, 16)).astype(np.float32)
    x = x[0] if gemm else x
    found = run(tmp_path, quantised(tmp_path, toy(tmp_path, gemm=gemm)), x)
    np.testing.assert_allclose(found, emulated(tmp_path, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", list(FLOATS))
def test_scales_have_the_type_around_them(tmp_path: Path, dtype: int) -> None:
    name, kind = FLOATS[dtype]
    model = toy(tmp_path, dtype)
    x = np.random.default_rng(7).standard_normal((1, 5, 16)).astype(kind)
    exact = run(tmp_path, model, x).astype(np.float32)
    made = quantised(tmp_path, model, name)
    found = run(tmp_path, made, x).astype(np.float32)
    scales = [tensor for tensor in made.graph.initializer if tensor.name.endswith("fp8_scale")]
    assert len(scales) == 5
    assert {tensor.data_type for tensor in scales} == {dtype}
    assert 1e-3 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.2


def test_layers_that_share_a_tensor_share_the_larger_range(tmp_path: Path) -> None:
    model = quantised(tmp_path, toy(tmp_path), amax={**AMAX, "k.weight": 8.0})
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == "x/fp8_scale")
    assert onnx.numpy_helper.to_array(scale) == np.float32(8.0 / 448)


def test_the_source_graph_is_left_alone(tmp_path: Path) -> None:
    model = toy(tmp_path)
    before = model.SerializeToString(deterministic=True)
    quantised(tmp_path, model)
    assert model.SerializeToString(deterministic=True) == before


def test_a_weight_that_something_else_reads_is_refused(tmp_path: Path) -> None:
    model = toy(tmp_path)
    model.graph.node.append(helper.make_node("Identity", ["q.weight/cast"], ["copy"], name="copy"))
    model.graph.output.append(helper.make_tensor_value_info("copy", TensorProto.FLOAT, [32, 16]))
    with pytest.raises(ExportError, match=r"q\.weight is FP8 now, but something else still reads it"):
        quantised(tmp_path, model)


def test_a_layer_without_a_range_is_refused(tmp_path: Path) -> None:
    pairs = convert(tmp_path, AMAX) if toy(tmp_path) else {}
    with pytest.raises(ExportError, match=r"no calibrated range for the input of out\.weight"):
        quantise(toy(tmp_path), pairs, {"q.weight": 1.0, "k.weight": 1.0}, "w")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_an_impossible_range_is_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(ExportError, match="allowed: finite, 0 or more"):
        quantised(tmp_path, toy(tmp_path), amax={**AMAX, "out.weight": value})


def test_a_key_of_no_layer_is_refused(tmp_path: Path) -> None:
    model = toy(tmp_path)
    pairs = convert(tmp_path, AMAX)
    with pytest.raises(ExportError, match=r"v\.weight is the weight of no linear layer"):
        quantise(model, {**pairs, "v.weight": pairs["q.weight"]}, AMAX, "w")


def test_a_conversion_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = toy(tmp_path)
    pairs = convert(tmp_path, AMAX)
    with pytest.raises(ExportError, match=r"q\.weight was converted to \[32, 16\], expected \[16, 32\]"):
        quantise(model, {**pairs, "q.weight": pairs["out.weight"]}, AMAX, "w")


def test_weights_stored_in_fp8_keep_their_scalar_scale(tmp_path: Path) -> None:
    model = toy(tmp_path)
    torch.manual_seed(8)
    weight = torch.randn(32, 16)
    scale = weight.abs().max() / 448
    stored = {"q.weight": (weight / scale).to(torch.float8_e4m3fn), "q.weight_scale": scale.reshape(())}
    save_file(stored, tmp_path / "published.safetensors")
    file = TensorFile.open(tmp_path / "published.safetensors")
    request = Fp8Request(file.tensors["q.weight"], "F32", stored=stored_scales(file)["q.weight"])
    pairs = write_fp8(tmp_path, "toy", [request])
    made = quantise(model, pairs, {"q.weight": 4.0}, pairs["q.weight"].weight.path.name)
    node = producers(made.graph)["q.weight/fp8_value"]
    assert not node.attribute
    x = np.random.default_rng(9).standard_normal((1, 5, 16)).astype(np.float32)
    made.graph.output.append(helper.make_tensor_value_info("q", TensorProto.FLOAT, [1, "n", 32]))
    found = open_session(made, tmp_path).run(["q"], {"x": x})[0]
    expected = e4m3(x, np.float32(4 / 448)) @ (stored["q.weight"].float() * scale).numpy().T
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_linear_layers_are_found_through_casts_and_transpositions(tmp_path: Path) -> None:
    found = {linear.key: linear for linear in linears(toy(tmp_path).graph)}
    assert list(found) == ["q.weight", "k.weight", "gate.weight", "out.weight"]
    assert all(linear.transposed for linear in found.values())
    assert (found["out.weight"].activation, found["out.weight"].shape) == ("mixed", (16, 32))
