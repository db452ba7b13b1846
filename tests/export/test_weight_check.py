# SPDX-License-Identifier: Apache-2.0
"""The weights behind a graph: right ones pass, and every way to be wrong shows with its name."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper
from safetensors.numpy import save_file

from ltxrt.errors import ExportError
from ltxrt_export.quantize.fp8_weights import Fp8Request, write_fp8
from ltxrt_export.weight_check import E4M3_LIMIT, weight_rows
from ltxrt_export.weights import TensorFile, TensorRef

Refs = dict[str, TensorRef]


@pytest.fixture
def model(tmp_path: Path) -> Refs:
    """A model of three weights; one of them square."""
    folder = tmp_path / "model"
    folder.mkdir()
    values = np.random.default_rng(0)
    tensors = {
        "wide.weight": values.standard_normal((24, 40), np.float32),
        "square.weight": values.standard_normal((32, 32), np.float32),
        "bias": values.standard_normal(7, np.float32),
    }
    save_file(tensors, folder / "model.safetensors")
    return dict(TensorFile.open(folder / "model.safetensors").tensors)


def external(ref: TensorRef, name: str, kind: int) -> TensorProto:
    tensor = TensorProto(name=name, data_type=kind, dims=ref.shape)  # type: ignore[arg-type]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", ref.path.name), ("offset", ref.offset), ("length", ref.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def written(folder: Path, initializers: list[TensorProto]) -> Path:
    inline = helper.make_tensor("constant", TensorProto.FLOAT, [1], [1.0])
    graph = helper.make_graph([], "g", [], [], [*initializers, inline])
    path = folder / "g.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


@pytest.fixture
def plain(tmp_path: Path, model: Refs) -> Path:
    """A graph that reads all of them from a copy of the file."""
    (tmp_path / "model.safetensors").write_bytes(model["bias"].path.read_bytes())
    return written(tmp_path, [external(ref, key, TensorProto.FLOAT) for key, ref in model.items()])


@pytest.fixture
def eight_bit(tmp_path: Path, model: Refs) -> Path:
    """A graph that has the two matrices in FP8: one turned, one as it was."""
    requests = [Fp8Request(model["wide.weight"], "F16"), Fp8Request(model["square.weight"], "F16", transposed=False)]
    pairs = write_fp8(tmp_path, "g", requests)
    initializers: list[TensorProto] = []
    for key, pair in pairs.items():
        initializers.append(external(pair.weight, f"{key}/fp8", TensorProto.FLOAT8E4M3FN))
        initializers.append(external(pair.scale, f"{key}/fp8_scale", TensorProto.FLOAT16))
    return written(tmp_path, initializers)


def overwritten(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_right_ones(plain: Path, model: Refs) -> None:
    (row,) = weight_rows("net", plain, model)
    assert (row.network, row.output, row.error, row.passed) == ("net", "weights", 0.0, True)
    assert row.sizes == {"tensors": 3}


@pytest.mark.parametrize("data", [b"\x01\x00\x00\x00", b"\x00\x00\xc0\x7f"])
def test_a_single_wrong_value(plain: Path, model: Refs, data: bytes) -> None:
    """However small, or NaN."""
    overwritten(plain.with_name("model.safetensors"), model["bias"].offset, data)
    (row,) = weight_rows("net", plain, model)
    assert row.output == "weights: bias"
    assert row.error > 0
    assert not row.passed


def change(path: Path, edit: Callable[[TensorProto], None], name: str = "bias") -> None:
    graph: ModelProto = onnx.load(path, load_external_data=False)
    edit(next(tensor for tensor in graph.graph.initializer if tensor.name == name))
    path.write_bytes(graph.SerializeToString())


def test_another_place_in_the_file(plain: Path, model: Refs) -> None:
    def edit(tensor: TensorProto) -> None:
        tensor.external_data[1].value = str(model["wide.weight"].offset)

    change(plain, edit)
    (row,) = weight_rows("net", plain, model)
    assert (row.output, row.passed) == ("weights: bias", False)


@pytest.mark.parametrize("dims", [[6], [7, 1]])
def test_another_shape(plain: Path, model: Refs, dims: list[int]) -> None:
    def edit(tensor: TensorProto) -> None:
        del tensor.dims[:]
        tensor.dims.extend(dims)

    change(plain, edit)
    (row,) = weight_rows("net", plain, model)
    assert row.error == float("inf")
    assert not row.passed


def test_a_weight_that_the_model_lacks(plain: Path, model: Refs) -> None:
    with pytest.raises(ExportError, match=r"^net: the graph reads bias, which is no weight of the model$"):
        weight_rows("net", plain, {key: ref for key, ref in model.items() if key != "bias"})


def test_beyond_the_end_of_the_file(plain: Path, model: Refs) -> None:
    def edit(tensor: TensorProto) -> None:
        tensor.external_data[1].value = str(10**6)

    change(plain, edit)
    with pytest.raises(ExportError, match=r"^net: bias does not lie in model\.safetensors$"):
        weight_rows("net", plain, model)


def test_fp8_within_its_rounding(eight_bit: Path, model: Refs) -> None:
    (row,) = weight_rows("net", eight_bit, model)
    assert (row.output, row.passed, row.limit) == ("fp8 weights", True, E4M3_LIMIT)
    assert 0.02 < row.error < 0.035
    assert row.sizes == {"tensors": 2}


@pytest.mark.parametrize("key", ["wide.weight", "square.weight"])
def test_fp8_signs_flipped(eight_bit: Path, model: Refs, key: str) -> None:
    """One row of codes in a weight of many: an output would hide it."""
    (file,) = eight_bit.parent.glob("g-fp8-*.safetensors")
    ref = TensorFile.open(file).tensors[f"{key}/fp8"]
    count = ref.shape[1]
    codes = np.fromfile(file, np.uint8, count, offset=ref.offset) ^ 0x80
    overwritten(file, ref.offset, codes.tobytes())
    (row,) = weight_rows("net", eight_bit, model)
    assert row.output == f"fp8 weights: {key}/fp8"
    assert not row.passed


def test_fp8_scales_of_another_weight(eight_bit: Path, model: Refs) -> None:
    (file,) = eight_bit.parent.glob("g-fp8-*.safetensors")
    ref = TensorFile.open(file).tensors["square.weight/fp8_scale"]
    scales = np.fromfile(file, np.float16, 32, offset=ref.offset)
    overwritten(file, ref.offset, np.roll(scales, 1).tobytes())
    (row,) = weight_rows("net", eight_bit, model)
    assert not row.passed


def test_fp8_without_a_scale(eight_bit: Path, model: Refs) -> None:
    graph = onnx.load(eight_bit, load_external_data=False)
    kept = [tensor for tensor in graph.graph.initializer if tensor.name != "wide.weight/fp8_scale"]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)
    eight_bit.write_bytes(graph.SerializeToString())
    (row,) = weight_rows("net", eight_bit, model)
    assert row.error == float("inf")
