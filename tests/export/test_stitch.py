# SPDX-License-Identifier: Apache-2.0
"""A graph stitched from two traced parts is the module that the parts compose to."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim

from ltxrt_export.networks.spec import Port
from ltxrt_export.onnx_export import OPSET, TracedGraph, attach_weights, check_graph, finished, trace, value_info
from ltxrt_export.stitch import Stitcher
from ltxrt_export.weights import TensorFile

WIDTH, DEPTH = 4, 3


class Head(nn.Module):
    """Start and offset of the sum, both [1, n, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.proj(x), x * 0.5


class Block(nn.Module):
    """One residual step; ``gain`` is one tensor that every block shares."""

    def __init__(self, gain: nn.Parameter) -> None:
        super().__init__()
        self.block = nn.Linear(WIDTH, WIDTH)
        self.gain = gain

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        return x + torch.tanh(self.block(x) * self.gain) * 0.5 + offset


class Whole(nn.Module):
    """What the stitched graph is to compute."""

    def __init__(self) -> None:
        super().__init__()
        gain = nn.Parameter(torch.randn(WIDTH))
        self.head = Head()
        self.blocks = nn.ModuleList(Block(gain) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        value, offset = self.head(x)
        for block in self.blocks:
            value = block(value, offset)
        return value


@pytest.fixture(scope="module")
def whole() -> Whole:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Whole().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def parts(whole: Whole) -> Mapping[str, TracedGraph]:
    x = torch.zeros(1, 5, WIDTH)
    tokens = {1: Dim("n", min=2, max=64)}
    return {
        "head": trace(whole.head, (x,), (tokens,), (["x"], ["value", "offset"])),
        "block": trace(whole.blocks[0], (x, x.clone()), (tokens, tokens), (["value", "offset"], ["value_out"])),
    }


@pytest.fixture(scope="module")
def stitcher(parts: Mapping[str, TracedGraph]) -> Stitcher:
    stitcher = Stitcher("whole")
    stitcher.add(parts["head"], "head", {"x": "x", "value": "value/0", "offset": "offset"})
    for index in range(DEPTH):
        output = "y" if index == DEPTH - 1 else f"value/{index + 1}"
        wires = {"value": f"value/{index}", "offset": "offset", "value_out": output}
        stitcher.add(parts["block"], f"block.{index}", wires, weight_prefix=("block.", f"blocks.{index}."))
    return stitcher


PORTS = [Port("x", "float32", (1, "n", WIDTH))], [Port("y", "float32", (1, "n", WIDTH))]


@pytest.fixture(scope="module")
def model(stitcher: Stitcher) -> ModelProto:
    return stitcher.model(*(map(value_info, ports) for ports in PORTS))


def test_weights_are_those_of_each_block(stitcher: Stitcher, model: ModelProto) -> None:
    expected = {"proj.weight", "proj.bias", "gain"}
    expected |= {f"blocks.{index}.{name}" for index in range(DEPTH) for name in ("weight", "bias")}
    assert stitcher.weights == expected
    # Each is declared once, with its type, however many parts use it.
    declared = [value.name for value in model.graph.input]
    assert sorted(declared) == sorted([*expected, "x"])
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input if v.name != "x"}
    assert shapes["blocks.2.weight"] == [WIDTH, WIDTH]
    assert shapes["gain"] == [WIDTH]


def test_tags_keep_the_parts_apart(model: ModelProto) -> None:
    nodes = model.graph.node
    names = [node.name for node in nodes]
    values = [value for node in nodes for value in node.output]
    assert len(set(names)) == len(names)
    assert len(set(values)) == len(values)
    tags = Counter(name.split("/")[0] for name in names)
    assert set(tags) == {"head", *(f"block.{index}" for index in range(DEPTH))}
    assert len({tags[f"block.{index}"] for index in range(DEPTH)}) == 1
    crossing = {"value/0", "offset", "value/1", "value/2", "y"}
    assert crossing < set(values)
    assert all(value in crossing or value.split("/")[0] in tags for value in values)


def test_equal_constants_are_stored_once(parts: Mapping[str, TracedGraph], model: ModelProto) -> None:
    stored = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    halves = [value for value in stored if value.dtype == np.float32 and np.array_equal(value.ravel(), [0.5])]
    separate = sum(len(part.model.graph.initializer) for part in parts.values())
    assert separate > len(stored) > 0
    # The head's and every block's 0.5 are one tensor.
    assert len(halves) == 1
    assert [tensor.name for tensor in model.graph.initializer] == [f"constant/{i}" for i in range(len(stored))]


@pytest.mark.parametrize("count", [1, 2, 9])
def test_the_stitched_graph_is_the_composed_module(whole: Whole, model: ModelProto, tmp_path: Path, count: int) -> None:
    state = whole.state_dict()
    stored = {name.replace(".block.", ".").removeprefix("head."): value for name, value in state.items()}
    stored = {("gain" if name.endswith("gain") else name): value for name, value in stored.items()}
    save_file(stored, tmp_path / "whole.safetensors")
    attached = ModelProto()
    attached.CopyFrom(model)
    attach_weights(attached, TensorFile.open(tmp_path / "whole.safetensors").tensors)
    onnx.save_model(finished(attached, "whole"), tmp_path / "whole.onnx")
    check_graph("whole", tmp_path / "whole.onnx")
    session = ort.InferenceSession(tmp_path / "whole.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(1, count, WIDTH, generator=torch.Generator().manual_seed(count))
    (found,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, whole(x).numpy(), rtol=1e-5, atol=1e-6)


def test_missing_inputs_stay_missing_and_the_parts_unchanged() -> None:
    """An optional input is the empty name; it gets no tag."""
    nodes = [helper.make_node("Clip", ["x", "", "top"], ["y"], name="clip")]
    top = numpy_helper.from_array(np.float32(1), "top")
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in "xy"]
    graph = helper.make_graph(nodes, "part", ports[:1], ports[1:], [top])
    part = TracedGraph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)]), frozenset())
    before = part.model.SerializeToString()
    stitcher = Stitcher("two")
    stitcher.add(part, "one", {"x": "x", "y": "middle"})
    stitcher.add(part, "two", {"x": "middle", "y": "y"})
    joint = stitcher.model(ports[:1], ports[1:]).graph
    assert [list(node.input) for node in joint.node] == [["x", "", "constant/0"], ["middle", "", "constant/0"]]
    assert [node.name for node in joint.node] == ["one/clip", "two/clip"]
    assert part.model.SerializeToString() == before


def test_a_model_can_be_made_more_than_once(stitcher: Stitcher, model: ModelProto) -> None:
    assert stitcher.model(*(map(value_info, ports) for ports in PORTS)) == model
