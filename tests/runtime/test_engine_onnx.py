# SPDX-License-Identifier: Apache-2.0
"""The ONNX Runtime engine on graphs of a few nodes: results, captures, refusals, and use from several threads."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ltxrt.engine import TensorSpec
from ltxrt.engine_onnx import OnnxEngine
from ltxrt.errors import EngineError

onnx = pytest.importorskip("onnx")

GRAPH = """
(float[1,n] x, float[1] y) => (float[1,n] sum, float[1,n] product) {
    sum = Add (x, y)
    product = Mul (x, y)
}"""
INPUTS = (TensorSpec("x", "float32", (1, "n")), TensorSpec("y", "float32", (1,)))
OUTPUTS = (TensorSpec("sum", "float32", (1, "n")), TensorSpec("product", "float32", (1, "n")))


def written(path, text=GRAPH):
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]> toy {text}')
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


@pytest.fixture
def path(tmp_path):
    return written(tmp_path / "toy.onnx")


@pytest.fixture
def engine(path):
    return OnnxEngine("toy", path, INPUTS, OUTPUTS, threads=1)


def feeds(start=0.0, count=5, y=2.0):
    return {"x": np.arange(start, start + count, dtype=np.float32)[None], "y": np.array([y], np.float32)}


# --- results ---


def test_run_gives_every_output_by_name(engine):
    outputs = engine.run(feeds())
    assert list(outputs) == ["sum", "product"]
    np.testing.assert_array_equal(outputs["sum"], np.float32([[2, 3, 4, 5, 6]]))
    np.testing.assert_array_equal(outputs["product"], np.float32([[0, 2, 4, 6, 8]]))


def test_run_gives_fresh_arrays_at_any_size(engine):
    first = engine.run(feeds())
    kept = first["sum"].copy()
    second = engine.run(feeds(100, count=3))
    np.testing.assert_array_equal(first["sum"], kept)
    np.testing.assert_array_equal(second["sum"], np.float32([[102, 103, 104]]))


def test_arrays_that_are_not_contiguous_are_read_right(engine):
    x = np.arange(10, dtype=np.float32)[None, ::-2]
    np.testing.assert_array_equal(engine.run({**feeds(), "x": x})["sum"], x + 2)


def test_a_captured_network_runs_like_the_other(engine):
    capture = engine.capture(feeds(7))
    capture.replay()
    for name, value in engine.run(feeds(7)).items():
        np.testing.assert_array_equal(capture.outputs[name], value)


def test_a_capture_reads_its_own_buffers(engine):
    given = feeds()
    capture = engine.capture(given)
    buffers = dict(capture.inputs)
    given["x"][...] = 99  # copied, so this is not seen
    capture.replay()
    np.testing.assert_array_equal(capture.outputs["sum"], np.float32([[2, 3, 4, 5, 6]]))
    for y in (5, -1):
        capture.inputs["y"][0] = y
        capture.replay()
        np.testing.assert_array_equal(capture.outputs["sum"], np.arange(5, dtype=np.float32)[None] + y)
    capture.inputs["x"][...] = capture.outputs["product"]
    capture.replay()
    np.testing.assert_array_equal(capture.outputs["product"], np.arange(5, dtype=np.float32)[None])
    assert all(capture.inputs[name] is buffer for name, buffer in buffers.items())


def test_captures_do_not_share_buffers(engine):
    one, two = engine.capture(feeds()), engine.capture(feeds())
    one.inputs["x"][...] = 50
    two.replay()
    np.testing.assert_array_equal(two.outputs["sum"], np.float32([[2, 3, 4, 5, 6]]))


def test_threads_share_an_engine(engine):
    def sums(start):
        return [engine.run(feeds(start, count=200 + start, y=start))["sum"] for _ in range(50)]

    with ThreadPoolExecutor(8) as pool:
        for start, results in zip(range(16), pool.map(sums, range(16)), strict=True):
            expected = np.arange(start, 200 + 2 * start, dtype=np.float32)[None] + start
            for found in results:
                np.testing.assert_array_equal(found, expected)


# --- refusals ---


@pytest.mark.parametrize("method", ["run", "capture"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": None}, "toy: the feed lacks y"),
        ({"z": np.zeros(1, np.float32)}, "toy: the feed does not take z"),
        ({"y": np.zeros(1)}, "toy: y is float64, expected float32"),
        ({"y": np.zeros(2, np.float32)}, "toy: y has shape (2,), expected y float32[1] with 1 = 1"),
        ({"x": np.zeros(5, np.float32)}, "toy: x has shape (5,), expected x float32[1, n]"),
    ],
)
def test_feeds_are_checked_first(engine, method, change, message):
    given = {name: value for name, value in {**feeds(), **change}.items() if value is not None}
    with pytest.raises(EngineError) as caught:
        getattr(engine, method)(given)
    assert str(caught.value) == message


@pytest.mark.parametrize("data", [b"", b"no graph", bytes(1000), None], ids=["empty", "text", "zeros", "missing"])
def test_a_file_that_is_no_graph(tmp_path, capfd, data):
    path = tmp_path / "toy.onnx"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(EngineError, match=r"^toy: ONNX Runtime cannot load toy\.onnx: ") as caught:
        OnnxEngine("toy", path, INPUTS, OUTPUTS)
    assert len(str(caught.value).splitlines()) == 1
    assert "[ONNXRuntimeError]" not in str(caught.value)
    assert capfd.readouterr().err == ""  # said once, by the exception


def test_a_graph_that_was_cut(path):
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(EngineError, match=r"^toy: ONNX Runtime cannot load toy\.onnx: "):
        OnnxEngine("toy", path, INPUTS, OUTPUTS)


def test_a_graph_with_an_unknown_operator(path):
    model = onnx.load(path)
    model.graph.node[0].op_type = "Frobnicate"
    onnx.save(model, path)
    with pytest.raises(EngineError, match="Frobnicate"):
        OnnxEngine("toy", path, INPUTS, OUTPUTS)


def test_weights_that_are_not_beside_the_graph(tmp_path):
    path = tmp_path / "toy.onnx"
    text = "(float[1,n] x) => (float[1,n] sum) <float[1] w = {1}> { sum = Add (x, w) }"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]> toy {text}')
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.ones((1, 300), np.float32), "w"))
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    ports = (TensorSpec("x", "float32", (1, "n")),), (TensorSpec("sum", "float32", (1, "n")),)
    found = OnnxEngine("toy", path, *ports).run({"x": np.zeros((1, 300), np.float32)})
    np.testing.assert_array_equal(found["sum"], 1)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(EngineError, match=r"^toy: ONNX Runtime cannot load toy\.onnx: .*w\.bin"):
        OnnxEngine("toy", path, *ports)


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (INPUTS[:1], OUTPUTS, "has inputs ['x', 'y'], declared are ['x']"),
        ((*INPUTS, TensorSpec("z", "float32", ())), OUTPUTS, "has inputs ['x', 'y'], declared are ['x', 'y', 'z']"),
        (INPUTS, (TensorSpec("total", "float32", (1, "n")),), "has outputs ['product', 'sum'], declared are ['total']"),
        ((INPUTS[0], TensorSpec("y", "float16", (1,))), OUTPUTS, "has input y float32[1], declared is y float16[1]"),
        ((INPUTS[0], TensorSpec("y", "float32", (2,))), OUTPUTS, "has input y float32[1], declared is y float32[2]"),
        (
            (INPUTS[0], TensorSpec("y", "float32", (1, 1))),
            OUTPUTS,
            "has input y float32[1], declared is y float32[1, 1]",
        ),
        (
            INPUTS,
            (OUTPUTS[0], TensorSpec("product", "int64", (1, "n"))),
            "has output product float32[1, n], declared is product int64[1, n]",
        ),
    ],
)
def test_a_graph_that_is_not_the_declared_one(path, inputs, outputs, message):
    with pytest.raises(EngineError) as caught:
        OnnxEngine("toy", path, inputs, outputs)
    assert str(caught.value) == f"toy: toy.onnx {message}"


def test_symbols_may_be_named_differently(path):
    renamed = (TensorSpec("x", "float32", (1, "32*h")), INPUTS[1])
    engine = OnnxEngine("toy", path, renamed, OUTPUTS)
    np.testing.assert_array_equal(engine.run(feeds())["product"], np.float32([[0, 2, 4, 6, 8]]))


@pytest.mark.parametrize("method", ["run", "capture"])
def test_what_fails_while_running_is_one_line(tmp_path, capfd, method):
    text = "(float[a,b] x, float[c,d] y) => (float[a,d] z) { z = MatMul (x, y) }"
    path = written(tmp_path / "toy.onnx", text)
    inputs = TensorSpec("x", "float32", ("a", "b")), TensorSpec("y", "float32", ("c", "d"))
    engine = OnnxEngine("toy", path, inputs, (TensorSpec("z", "float32", ("a", "d")),))
    given = {"x": np.zeros((2, 3), np.float32), "y": np.zeros((4, 2), np.float32)}
    with pytest.raises(EngineError, match=r"^toy: .*MatMul") as caught:
        engine.run(given) if method == "run" else engine.capture(given).replay()
    assert len(str(caught.value).splitlines()) == 1
    assert "[ONNXRuntimeError]" not in str(caught.value)
    assert capfd.readouterr().err == ""
