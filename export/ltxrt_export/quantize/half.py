# SPDX-License-Identifier: Apache-2.0
"""FP16 and BF16 graphs: a finished fp32 graph retyped, with fp32 kept where 16 bits are not enough.

Kept in fp32: whatever leads to a sine, cosine or logarithm (RoPE angles, timestep sinusoid, log-mel front end), the
RoPE rotation and its tables, statistics that are spelled out (x^2, mean, square root; 256^2 is beyond fp16), Gemma's
norms, whose scale 1 + w is computed, and the way from the last layer to the outputs named in ``POLICIES`` (x0, Euler
update, colour conversion). The fused norms need no help: they declare fp32 statistics (``stash_type`` 1). Weights keep
their stored type and are cast once in the graph, so the graph still points into the checkpoint.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from .graph import FLOATS, consumers, drop_unused, output_type, producers

__all__ = ["POLICIES", "HalfPolicy", "fp32_nodes", "to_half"]

#: Operators that move data and compute nothing: they run in the type that they are given.
LAYOUT = frozenset(
    {"Concat", "Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)
#: Operators in 16 bits where every kernel library has its tuned form; the way back from an output stops at them.
HEAVY = frozenset(
    {
        "Attention",
        "Conv",
        "ConvTranspose",
        "Gemm",
        "GroupNormalization",
        "LayerNormalization",
        "MatMul",
        "RMSNormalization",
    }
)
_NEEDS_FP32_INPUT = frozenset({"Cos", "Log", "Sin"})
_SUFFIX: Mapping[int, str] = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
_FP16_MAX = 65504.0
_WIDEST_FIRST = (TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.FLOAT16)
_NUMPY: Mapping[int, np.dtype[Any]] = {
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True, slots=True)
class HalfPolicy:
    """What a network keeps in fp32 beyond what its operators show.

    Attributes:
        inputs: Inputs that stay fp32 (a trailing ``*`` stands for any ending); the others are cast on entry.
        outputs: Outputs that are computed in fp32 from the last heavy operator on.
    """

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    def keeps(self, name: str) -> bool:
        """Whether an input stays fp32."""
        return any(name == kept or (kept[-1] == "*" and name.startswith(kept[:-1])) for kept in self.inputs)


POLICIES: Mapping[str, HalfPolicy] = {
    "denoiser": HalfPolicy(("latent", "clean", "mask", "sigma", "sigma_next", "rope_*"), ("latent_next",)),
    "audio_encoder": HalfPolicy(("waveform",)),
    "video_decoder": HalfPolicy((), ("frames",)),
}


@dataclass(slots=True)
class _Retyping:
    """The graph under construction.

    Attributes:
        half: Type of every node that nothing else claims.
        wide: Nodes that leave the range of ``half``, by name, and the type that they take instead.
        types: Element type of every tensor so far.
        constants: Inline constants by name.
        stored: External initializers.
        entering: Inputs that leave fp32 with the first node that reads them, a data movement included.
        nodes: Finished nodes.
        made: Tensor and type to the name of its cast.
        renamed: Tensor of the source graph to what replaces it.
    """

    half: int
    wide: Mapping[str, int]
    types: dict[str, int]
    constants: Mapping[str, TensorProto]
    stored: frozenset[str]
    entering: frozenset[str]
    nodes: list[NodeProto] = field(default_factory=list[NodeProto])
    added: list[TensorProto] = field(default_factory=list[TensorProto])
    made: dict[tuple[str, int], str] = field(default_factory=dict[tuple[str, int], str])
    renamed: dict[str, str] = field(default_factory=dict[str, str])

    def cast(self, name: str, wanted: int) -> str:
        """``name`` in another type: a converted copy of a constant, or one shared Cast node."""
        if self.types.get(name) not in FLOATS or self.types[name] == wanted:
            return name
        if (name, wanted) in self.made:
            return self.made[name, wanted]
        new = f"{name}/{_SUFFIX[wanted]}"
        if name in self.constants:
            values = numpy_helper.to_array(self.constants[name]).astype(np.float32).astype(_NUMPY[wanted])
            self.added.append(numpy_helper.from_array(values, new))
        else:
            self.nodes.append(helper.make_node("Cast", [name], [new], name=new, to=wanted))
        self.types[new], self.made[name, wanted] = wanted, new
        return new

    def too_large(self, node: NodeProto) -> bool:
        """Whether a constant that ``node`` computes with is finite and beyond the range of fp16."""
        if self.half != TensorProto.FLOAT16:
            return False
        operands = [numpy_helper.to_array(self.constants[name]) for name in node.input if name in self.constants]
        floats = [values for values in operands if values.dtype == np.float32]
        return any(bool(((np.abs(values) > _FP16_MAX) & np.isfinite(values)).any()) for values in floats)

    def layout_type(self, node: NodeProto) -> int | None:
        """The type that a data movement runs in: that of its widest activation; None keeps what is stored.

        Weights are turned, and rows gathered from them, before they are cast; only those of two types, joined, take
        the wider one.
        """
        inputs = [name for name in node.input if self.types.get(name) in FLOATS]
        if not inputs:
            return None
        activations = [name for name in inputs if name not in self.constants and name not in self.stored]
        present = {self.half if name in self.entering else self.types[name] for name in activations}
        stored = {self.types[name] for name in inputs}
        if present or len(stored) > 1:
            return next(kind for kind in _WIDEST_FIRST if kind in (present or stored))
        # ONNX Runtime repeats no BF16.
        return self.half if node.op_type in ("Expand", "Tile") and inputs[0] in self.stored else None


def to_half(model: ModelProto, network: str, half: int, wide: Iterable[str] = (), wide_type: int = 0) -> ModelProto:
    """The same network computing in 16 bits; inputs and outputs stay as they were.

    Args:
        model: A finished graph that computes in fp32; not changed.
        network: Its name, which chooses the policy.
        half: ``TensorProto.FLOAT16`` or ``TensorProto.BFLOAT16``.
        wide: Names of nodes whose values leave the fp16 range (``ranges.wide_nodes``).
        wide_type: What those compute in; 0 is BF16. FLOAT serves where nothing runs BF16.

    Raises:
        ValueError: ``half`` is no 16-bit type.
    """
    if half not in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
        raise ValueError(f"element type {half} is neither FLOAT16 nor BFLOAT16")
    result = ModelProto()
    result.CopyFrom(model)
    graph, policy = result.graph, POLICIES.get(network, HalfPolicy())
    external = [tensor.name for tensor in graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    work = _Retyping(
        half=half,
        wide=dict.fromkeys(wide, wide_type or TensorProto.BFLOAT16),
        types={tensor.name: tensor.data_type for tensor in graph.initializer},
        constants={tensor.name: tensor for tensor in graph.initializer if tensor.name not in set(external)},
        stored=frozenset(external),
        entering=frozenset(value.name for value in graph.input if not policy.keeps(value.name)),
    )
    for value in graph.input:
        work.types[value.name] = value.type.tensor_type.elem_type
    exact = fp32_nodes(model, network)
    computed = _computed_constants(model)
    for node in graph.node:
        _retype(work, node, exact=node.name in exact or node.name in computed)
    for value in graph.output:
        _restore(work, value.name, value.type.tensor_type.elem_type)
    del graph.node[:]
    graph.node.extend(work.nodes)
    graph.initializer.extend(work.added)
    drop_unused(graph)
    return result


def fp32_nodes(model: ModelProto, network: str) -> set[str]:
    """Names of the nodes that stay fp32, for the reasons in the module's docstring."""
    graph, policy = model.graph, POLICIES.get(network, HalfPolicy())
    made, read = producers(graph), consumers(graph)
    exact = _ancestors((node for node in graph.node if node.op_type in _NEEDS_FP32_INPUT), made, frozenset())
    for node in graph.node:
        if node.op_type == "Sqrt":
            exact |= _statistic(node, made, read)
        if node.op_type == "Split":
            exact |= _rotation(node, read)
        if node.op_type == "RMSNormalization" and node.input[1] in made and made[node.input[1]].op_type == "Add":
            exact.add(node.name)
    for output in policy.outputs:
        exact |= _ancestors([made[output]], made, HEAVY | {"bias"})
    return exact


def _retype(work: _Retyping, node: NodeProto, *, exact: bool) -> None:
    """Append ``node`` in its type, with casts in front of it where they are needed."""
    node.input[:] = [work.renamed.get(name, name) for name in node.input]
    if _is_float_cast(node) and work.types.get(node.input[0]) in FLOATS:
        # A cast between float types says what the source graph computed in, which this pass decides anew.
        work.renamed[node.output[0]] = node.input[0]
        return
    made = output_type(node, work.types)
    if made in FLOATS:
        if node.op_type in LAYOUT and not exact:
            wanted = work.layout_type(node)
        else:
            exact = exact or work.too_large(node)
            wanted = TensorProto.FLOAT if exact else work.wide.get(node.name, work.half)
        if wanted is not None:
            node.input[:] = [work.cast(name, wanted) for name in node.input]
            made = wanted
        if node.op_type == "Cast":
            _cast_target(node).i = made
    work.nodes.append(node)
    work.types |= {name: made for name in node.output if name}


def _restore(work: _Retyping, name: str, declared: int) -> None:
    """Make graph output ``name`` have its declared type."""
    source = work.renamed.get(name, name)
    if source == name and work.types[name] == declared:
        return
    if source == name:
        source = f"{name}/{_SUFFIX[work.types[name]]}"
        for node in work.nodes:
            node.input[:] = [source if value == name else value for value in node.input]
            node.output[:] = [source if value == name else value for value in node.output]
        work.types[source] = work.types[name]
    work.nodes.append(helper.make_node("Cast", [source], [name], name=f"{name}/{_SUFFIX[declared]}", to=declared))


def _is_float_cast(node: NodeProto) -> bool:
    return node.op_type == "Cast" and _cast_target(node).i in FLOATS


def _cast_target(node: NodeProto) -> AttributeProto:
    return next(attribute for attribute in node.attribute if attribute.name == "to")


def _ancestors(start: Iterable[NodeProto], made: Mapping[str, NodeProto], stop: frozenset[str]) -> set[str]:
    """Names of ``start`` and of every node before them, but not of operators in ``stop`` nor beyond those.

    ``bias`` in ``stop`` stands for an addition whose other operand is a product: the end of a linear layer.
    """
    found: set[str] = set()
    stack = list(start)
    while stack:
        node = stack.pop()
        bias = node.op_type == "Add" and any(made[n].op_type == "MatMul" for n in node.input if n in made)
        if node.name in found or node.op_type in stop or (bias and "bias" in stop):
            continue
        found.add(node.name)
        stack.extend(made[name] for name in node.input if name in made)
    return found


def _statistic(root: NodeProto, made: Mapping[str, NodeProto], read: Mapping[str, list[NodeProto]]) -> set[str]:
    """The nodes of a norm that is spelled out: square, mean, epsilon, root, and what is scaled by the root."""
    names, node = {root.name}, made.get(root.input[0])
    while node is not None and node.op_type in ("Add", "Pow", "ReduceMean", "ReduceSum"):
        names.add(node.name)
        node = made.get(node.input[0]) if node.op_type != "Pow" else None
    below = list(read.get(root.output[0], ()))
    for consumer in list(below):
        if consumer.op_type == "Reciprocal":
            names.add(consumer.name)
            below.extend(read.get(consumer.output[0], ()))
    return names | {consumer.name for consumer in below if consumer.op_type in ("Div", "Mul")}


def _rotation(split: NodeProto, read: Mapping[str, list[NodeProto]]) -> set[str]:
    """The nodes of a split-layout rotation that begins at ``split``; empty where it is none.

    Its two halves are multiplied by tables, the products added and subtracted, the results joined.
    """
    products = [node for name in split.output for node in read.get(name, ())]
    sums = [node for product in products for node in read.get(product.output[0], ())]
    joins = [node for total in sums for node in read.get(total.output[0], ())]
    shape = [{node.op_type for node in level} for level in (products, sums, joins)]
    if len(split.output) != 2 or shape != [{"Mul"}, {"Add", "Sub"}, {"Concat"}]:
        return set()
    return {split.name, *(node.name for node in (*products, *sums, *joins))}


def _computed_constants(model: ModelProto) -> set[str]:
    """Nodes that compute on weights and constants alone, such as 1 + w: engines fold them, so fp32 costs nothing."""
    constant = {tensor.name for tensor in model.graph.initializer}
    names: set[str] = set()
    for node in model.graph.node:
        if node.op_type not in HEAVY and node.input and all(name in constant for name in node.input if name):
            constant.update(node.output)
            if node.op_type not in LAYOUT and node.op_type != "Cast":
                names.add(node.name)
    return names
