# SPDX-License-Identifier: Apache-2.0
"""The stitched denoiser: any depth from one set of traces, each block on its own weights, nothing dead in it."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, TensorProto
from safetensors.torch import save_file

from ltxrt.shapes import LatentShape
from ltxrt_export.denoiser_graph import export_denoiser, stitched, traced_parts
from ltxrt_export.networks import denoiser
from ltxrt_export.networks.denoiser import Semantics
from ltxrt_export.networks.spec import NetworkSpec
from ltxrt_export.onnx_export import TracedGraph, check_graph
from ltxrt_export.parity import relative_error
from ltxrt_export.weights import TensorFile

CONTEXT = 6
DEPTHS = (1, 2, 4)

Specs = Mapping[int, NetworkSpec]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("denoiser")


@pytest.fixture(scope="module")
def models(random_transformer: Callable[..., Any]) -> Mapping[int, Any]:
    """A DiT of each depth."""
    return {depth: random_transformer(layers=depth) for depth in DEPTHS}


@pytest.fixture(scope="module")
def specs(models: Mapping[int, Any], folder: Path) -> Specs:
    """The denoiser of each depth, its weights stored in bf16 but for the modulation tables, as published."""
    made: dict[int, NetworkSpec] = {}
    for depth, model in models.items():
        path = folder / f"weights-{depth}.safetensors"
        state = model.state_dict()
        save_file({name: value if "table" in name else value.bfloat16() for name, value in state.items()}, path)
        made[depth] = denoiser.spec(model, TensorFile.open(path).tensors, Semantics.R3, CONTEXT)
    return made


@pytest.fixture(scope="module")
def parts(specs: Specs) -> Mapping[str, TracedGraph]:
    """Traced once, from the deepest: tracing is what takes time."""
    return traced_parts(specs[max(DEPTHS)])


@pytest.fixture(scope="module")
def graphs(specs: Specs, parts: Mapping[str, TracedGraph]) -> Mapping[int, ModelProto]:
    return {depth: stitched(spec, parts) for depth, spec in specs.items()}


@pytest.mark.parametrize("depth", DEPTHS)
def test_graph_equals_the_step_in_torch(
    models: Mapping[int, Any],
    specs: Specs,
    graphs: Mapping[int, ModelProto],
    denoiser_feeds: Callable[..., dict[str, np.ndarray]],
    folder: Path,
    depth: int,
) -> None:
    path = folder / f"denoiser-{depth}.onnx"
    onnx.save_model(graphs[depth], path)
    check_graph("denoiser", path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    spec = specs[depth]
    for shape, audio_tokens, strength, sigma_next in (
        (LatentShape(2, 1, 1), 1, None, 0.421875),
        (LatentShape(4, 3, 5), 31, 0.7, 0.421875),
        (LatentShape(3, 2, 1), 8, 1.0, 0.0),
    ):
        feeds = denoiser_feeds(models[depth], shape, audio_tokens, strength, sigma_next)
        (found,) = session.run(["latent_next"], feeds)
        with torch.no_grad():
            expected = spec.module(*(torch.from_numpy(feeds[port.name]) for port in spec.inputs)).numpy()
        assert relative_error(found, expected) < 5e-6
        if strength == 1.0:
            held = shape.tokens_per_frame
            np.testing.assert_array_equal(found[:, :held], feeds["clean"][:, :held])


def external(model: ModelProto) -> set[str]:
    return {tensor.name for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL}


@pytest.mark.parametrize("depth", DEPTHS)
def test_no_weight_of_what_never_reaches_the_video_is_in_the_graph(
    specs: Specs, graphs: Mapping[int, ModelProto], depth: int
) -> None:
    last = f"transformer_blocks.{depth - 1}."
    dead = ("audio_proj_out.", "audio_norm_out", "audio_scale_shift_table")
    dead += (f"{last}audio_ff.", f"{last}video_to_audio_attn.")
    assert external(graphs[depth]) == {name for name in specs[depth].weights if not name.startswith(dead)}


def test_each_block_reads_its_own_weights(specs: Specs, graphs: Mapping[int, ModelProto]) -> None:
    depth = max(DEPTHS)
    model, refs = graphs[depth], specs[depth].weights
    weights = external(model)
    # What is cast belongs to no block; the cast's reader does.
    stored = {node.output[0]: node.input[0] for node in model.graph.node if node.output[0].endswith("/cast")}
    read: dict[str, set[str]] = {}
    for node in model.graph.node:
        names = {stored.get(value, value) for value in node.input} & weights
        read.setdefault(node.name.split("/")[0], set()).update(names)
    for index in range(depth):
        names = read[f"block.{index}"]
        assert names
        assert all(name.startswith(f"transformer_blocks.{index}.") for name in names)
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in model.graph.initializer
        if tensor.name in weights
    }
    assert places == {
        name: {"location": refs[name].path.name, "offset": str(refs[name].offset), "length": str(refs[name].nbytes)}
        for name in weights
    }


def test_nodes_grow_by_the_same_number_with_every_block(graphs: Mapping[int, ModelProto]) -> None:
    counts = {depth: len(model.graph.node) for depth, model in graphs.items()}
    a_block = counts[2] - counts[1]
    assert a_block > 0
    assert counts[4] == counts[2] + 2 * a_block
    constants = {depth: len(model.graph.initializer) - len(external(model)) for depth, model in graphs.items()}
    assert constants[4] == constants[2]


def test_ports_are_those_of_the_spec(specs: Specs, graphs: Mapping[int, ModelProto]) -> None:
    graph, spec = graphs[2].graph, specs[2]
    for values, ports in ((graph.input, spec.inputs), (graph.output, spec.outputs)):
        assert [value.name for value in values] == [port.name for port in ports]
        for value, port in zip(values, ports, strict=True):
            shape = tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
            assert shape == port.shape


def test_operators_are_plain(graphs: Mapping[int, ModelProto]) -> None:
    """One opset, attention and norms as single nodes, none of the forms that export badly."""
    model = graphs[2]
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 23)]
    operators = Counter(node.op_type for node in model.graph.node)
    refused = ("Sequence", "Scatter", "NonZero", "Loop", "If", "Einsum", "Where", "Trilu")
    assert not [name for name in operators if name.startswith(refused)]
    # The only Squeezes make scalars of lengths: none touches a tensor.
    producers = {value: node.op_type for node in model.graph.node for value in node.output}
    assert {producers[node.input[0]] for node in model.graph.node if node.op_type == "Squeeze"} <= {"Shape"}
    # Six attentions a block, and one less in the last.
    assert operators["Attention"] == 11


def test_parts_name_a_block_by_no_number(parts: Mapping[str, TracedGraph]) -> None:
    assert set(parts) == {"pre", "rope", "block", "last", "post"}
    for name in ("block", "last"):
        assert parts[name].weights
        assert all(weight.startswith("block.") for weight in parts[name].weights)
    assert not parts["rope"].weights


def test_only_a_denoise_step_is_taken(specs: Specs) -> None:
    spec = specs[1]
    other = NetworkSpec(
        name="other",
        module=torch.nn.Identity(),
        inputs=spec.inputs,
        outputs=spec.outputs,
        axes=spec.axes,
        weights=spec.weights,
    )
    with pytest.raises(TypeError, match="other is not a DenoiseStep"):
        export_denoiser(other)
