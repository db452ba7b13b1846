# SPDX-License-Identifier: Apache-2.0
"""Tracing toy modules: weights stay where and what they are, and nothing of this machine gets into the graph."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, TensorProto, helper
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ltxrt.errors import ExportError
from ltxrt_export.networks.spec import Axis, NetworkSpec, Port
from ltxrt_export.onnx_export import (
    OPSET,
    attach_weights,
    check_graph,
    constant_key,
    export_model,
    finished,
)
from ltxrt_export.weights import TensorFile, TensorRef

#: Module name to stored key: two linears share a matrix, and one swaps its name with another's.
STORED = {
    "first.weight": "shared.weight",
    "first.bias": "second.bias",
    "second.weight": "shared.weight",
    "second.bias": "first.bias",
    "scale": "scale",
    "unused.weight": "unused.weight",
    "unused.bias": "unused.bias",
    "dead.weight": "dead.weight",
    "dead.bias": "dead.bias",
}
BF16 = ("shared.weight", "scale")


class Toy(nn.Module):
    """[1, n, 4] to [1, n, 3] and [1, 2n, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.second = nn.Linear(4, 3)
        self.unused = nn.Linear(5, 5)
        self.dead = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("ramp", torch.arange(3, dtype=torch.float32), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.dead(x)
        first = self.first(x) * self.scale + self.ramp
        return first, torch.cat([first, self.second(x)], dim=1)


def weights_of(folder: Path) -> dict[str, TensorRef]:
    """Random stored tensors of ``Toy``, in ``folder``."""
    generator = torch.Generator().manual_seed(0)
    shapes = {STORED[name]: value.shape for name, value in Toy().state_dict().items()}
    tensors = {
        key: torch.randn(shape, generator=generator).to(torch.bfloat16 if key in BF16 else torch.float32)
        for key, shape in shapes.items()
    }
    path = folder / "toy.safetensors"
    save_file(tensors, path)
    stored = TensorFile.open(path).tensors
    return {name: stored[key] for name, key in STORED.items()}


def toy_spec(weights: dict[str, TensorRef], *, fake: bool = False) -> NetworkSpec:
    if fake:
        with FakeTensorMode():
            module = Toy().eval()
    else:
        module = Toy().eval()
        module.load_state_dict({name: read(ref) for name, ref in weights.items()})
    return NetworkSpec(
        name="toy",
        module=module,
        inputs=(Port("x", "float32", (1, "n", 4)),),
        outputs=(Port("y", "float32", (1, "n", 3)), Port("z", "float32", (1, "2*n", 3))),
        axes={"n": Axis(1, 64, 5)},
        weights=weights,
        constants={"ramp": np.arange(3)},
    )


def read(ref: TensorRef) -> Tensor:
    """A stored tensor as fp32, straight from its bytes."""
    data = ref.path.read_bytes()[ref.offset : ref.offset + ref.nbytes]
    dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[ref.dtype]
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(ref.shape).float()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toy")


@pytest.fixture(scope="module")
def weights(folder: Path) -> dict[str, TensorRef]:
    return weights_of(folder)


@pytest.fixture(scope="module")
def model(weights: dict[str, TensorRef]) -> ModelProto:
    return export_model(toy_spec(weights))


@pytest.fixture(scope="module")
def written(model: ModelProto, folder: Path) -> Path:
    path = folder / "toy.onnx"
    onnx.save_model(model, path)
    return path


def initializers(model: ModelProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def external(model: ModelProto) -> dict[str, dict[str, str]]:
    """Where each external initializer lies."""
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in model.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    }


def consumers(model: ModelProto, name: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if name in node.input]


def test_weights_keep_names_layouts_and_places(model: ModelProto, weights: dict[str, TensorRef]) -> None:
    used = {ref.key: ref for name, ref in weights.items() if not name.startswith(("unused", "dead"))}
    assert external(model) == {
        key: {"location": "toy.safetensors", "offset": str(ref.offset), "length": str(ref.nbytes)}
        for key, ref in used.items()
    }
    found = initializers(model)
    assert all(tuple(found[key].dims) == ref.shape for key, ref in used.items())
    assert not any(found[key].raw_data for key in used)
    # A Linear keeps its [out, in] matrix and is transposed in the graph.
    assert tuple(found["shared.weight"].dims) == (3, 4)
    assert {node.op_type for node in consumers(model, "shared.weight/cast")} == {"Transpose"}


def test_only_what_is_stored_in_another_dtype_is_cast_and_once(model: ModelProto) -> None:
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    assert {node.input[0]: [attribute.i for attribute in node.attribute] for node in casts} == {
        key: [TensorProto.FLOAT] for key in BF16
    }
    assert len(casts) == len(BF16)
    assert {name: tensor.data_type for name, tensor in initializers(model).items() if name in STORED.values()} == {
        "shared.weight": TensorProto.BFLOAT16,
        "scale": TensorProto.BFLOAT16,
        "first.bias": TensorProto.FLOAT,
        "second.bias": TensorProto.FLOAT,
    }
    # Both linears read the one matrix.
    assert len(consumers(model, "shared.weight")) == 1
    assert len(consumers(model, "shared.weight/cast")) == 2


def test_unused_weights_are_left_out(model: ModelProto) -> None:
    assert not [name for name in initializers(model) if "unused" in name or "dead" in name]
    assert [value.name for value in model.graph.input] == ["x"]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_onnx_runtime_reads_the_weights_and_equals_torch(
    written: Path, weights: dict[str, TensorRef], count: int
) -> None:
    check_graph("toy", written)
    x = torch.randn(1, count, 4, generator=torch.Generator().manual_seed(count))
    session = ort.InferenceSession(written, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = toy_spec(weights).module(x)
    for found, value in zip(session.run(None, {"x": x.numpy()}), expected, strict=True):
        np.testing.assert_allclose(found, value.numpy(), rtol=1e-5, atol=1e-6)


def dimensions(value: onnx.ValueInfoProto) -> list[int | str]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


def test_axes_are_named_as_in_the_spec(model: ModelProto) -> None:
    assert dimensions(model.graph.input[0]) == [1, "n", 4]
    assert [value.name for value in model.graph.output] == ["y", "z"]
    assert [dimensions(value) for value in model.graph.output] == [[1, "n", 3], [1, "2*n", 3]]


def test_opset_and_producer(model: ModelProto) -> None:
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert (model.producer_name, model.producer_version, model.graph.name) == ("ltxrt-export", "", "toy")
    assert not model.functions


def strings(message: Any) -> Iterator[bytes]:
    """Every text of a protobuf message, at any depth."""
    for field, value in message.ListFields():
        for item in value if field.is_repeated and not hasattr(value, "ListFields") else [value]:
            if hasattr(item, "ListFields"):
                yield from strings(item)
            elif isinstance(item, str | bytes):
                yield item.encode() if isinstance(item, str) else item


def test_nothing_of_this_machine_is_in_the_graph(model: ModelProto, weights: dict[str, TensorRef]) -> None:
    data = model.SerializeToString()
    places = (Path.home(), Path.cwd(), Path(torch.__file__).parent, Path(__file__), weights["scale"].path.parent)
    for place in map(str, places):
        assert place == "/" or place.encode() not in data
    for word in (b"site-packages", b".py", b"stack_trace", b"pkg.torch", b"namespace"):
        assert word not in data
    # Texts are names and locations; the only slashes are those of casts.
    slashed = {text for text in strings(model.graph) if b"/" in text}
    assert slashed == {f"{key}/cast".encode() for key in BF16}


def test_finished_strips_every_trace(model: ModelProto) -> None:
    noisy = ModelProto()
    noisy.CopyFrom(model)
    noisy.doc_string, noisy.producer_version = "/somewhere", "9"
    noisy.metadata_props.add(key="a", value="/somewhere")
    noisy.graph.metadata_props.add(key="a", value="/somewhere")
    noisy.graph.value_info.add(name="v", doc_string="/somewhere")
    for part in (noisy.graph.node[0], noisy.graph.input[0], noisy.graph.output[0], noisy.graph.initializer[0]):
        part.doc_string = "/somewhere"
        part.metadata_props.add(key="a", value="/somewhere")
    assert finished(noisy, "toy") == model


def test_same_bytes_for_real_and_for_fake_tensors(model: ModelProto, weights: dict[str, TensorRef]) -> None:
    expected = model.SerializeToString(deterministic=True)
    assert export_model(toy_spec(weights)).SerializeToString(deterministic=True) == expected
    assert export_model(toy_spec(weights, fake=True)).SerializeToString(deterministic=True) == expected


def test_a_fake_buffer_without_a_value_is_refused(weights: dict[str, TensorRef]) -> None:
    spec = dataclasses.replace(toy_spec(weights, fake=True), constants={})
    with pytest.raises(ExportError, match=r"^Toy: ramp is a fake tensor, and its value is not given$"):
        export_model(spec)


def test_weight_files_are_named_by_their_location(weights: dict[str, TensorRef]) -> None:
    model = identity("a", "b")
    moved = {"a": dataclasses.replace(weights["scale"], key="k")}
    attach_weights(model, moved, lambda path: f"sub/{path.stem}.bin")
    assert external(model)["k"]["location"] == "sub/toy.bin"


def identity(*names: str) -> ModelProto:
    """A graph that sums its fp32 [3] inputs."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in names]
    output = helper.make_tensor_value_info("sum", TensorProto.FLOAT, [3])
    graph = helper.make_graph([helper.make_node("Sum", names, ["sum"], name="sum")], "g", ports, [output])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def test_one_key_of_two_files_is_refused(tmp_path: Path) -> None:
    one, other = (TensorRef(tmp_path / f"{name}.safetensors", "k", "F32", (3,), 8, 12) for name in "ab")
    with pytest.raises(ExportError, match=r"^k is a tensor of both .*a\.safetensors and .*b\.safetensors"):
        attach_weights(identity("x", "y"), {"x": one, "y": other})


def test_attached_weights_of_every_stored_dtype(tmp_path: Path) -> None:
    dtypes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1}
    refs = {f"w{name}": TensorRef(tmp_path / "w", name, name, (3,), 0, 3 * size) for name, size in dtypes.items()}
    model = identity("x", *refs)
    attach_weights(model, refs)
    assert Counter(node.op_type for node in model.graph.node) == {"Cast": len(dtypes) - 1, "Sum": 1}
    assert list(model.graph.node[-1].input) == ["x", *(name if name == "F32" else f"{name}/cast" for name in dtypes)]
    (tmp_path / "w").write_bytes(bytes(24))
    onnx.save_model(model, tmp_path / "m.onnx")
    check_graph("sum", tmp_path / "m.onnx")


def test_an_invalid_graph_is_refused_in_one_line(tmp_path: Path) -> None:
    model = identity("x", "y")
    model.graph.node[0].input[0] = "nowhere"
    onnx.save_model(model, tmp_path / "bad.onnx")
    with pytest.raises(ExportError, match=r"^toy: not a valid graph: .*nowhere") as caught:
        check_graph("toy", tmp_path / "bad.onnx")
    assert "\n" not in str(caught.value)


def test_wrong_shapes_and_missing_weight_files_are_refused(written: Path, model: ModelProto, tmp_path: Path) -> None:
    onnx.save_model(model, tmp_path / "alone.onnx")
    with pytest.raises(ExportError, match=r"toy\.safetensors"):
        check_graph("toy", tmp_path / "alone.onnx")
    wrong = ModelProto()
    wrong.CopyFrom(model)
    wrong.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 9
    onnx.save_model(wrong, written.parent / "wrong.onnx")
    with pytest.raises(ExportError, match="not a valid graph"):
        check_graph("toy", written.parent / "wrong.onnx")


def test_equal_constants_have_equal_keys() -> None:
    def tensor(value: Any, dtype: str) -> TensorProto:
        return onnx.numpy_helper.from_array(np.asarray(value, dtype), name=str(id(value)))

    assert constant_key(tensor([1, 2], "float32")) == constant_key(tensor((1, 2), "float32"))
    different = [tensor([1, 2], "float32"), tensor([[1, 2]], "float32"), tensor([1, 3], "float32")]
    # The same eight bytes, read as something else.
    different += [tensor([1, 2], "int32"), tensor(np.array([1, 2], "float32").view("int32"), "int32")]
    assert len({constant_key(one) for one in different}) == len(different)
