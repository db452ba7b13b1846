# SPDX-License-Identifier: Apache-2.0
"""Arithmetic and bytes of a graph at given sizes, ceilings of the machine, and the distance between the two.

FLOPs are twice the multiply-accumulates of MatMul, Gemm, Conv and Attention. ``least_bytes`` is what no implementation
avoids: every weight, input and output once, in the types of the graph. ``moved_bytes`` is what a runtime moves that
fuses nothing. The ceilings are measured: a large matrix product in the type that matters, and a large copy, counting
what is read and what is written. ``bound_seconds`` is the longer of FLOPs and least bytes at those ceilings.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from ltxrt_export.lint.graph import GraphView, attributes
from ltxrt_export.lint.shapes import Shapes, infer_shapes

__all__ = ["Ceilings", "Work", "cpu_ceilings", "fp8_product", "gpu_ceilings", "graph_work", "node_flops", "view_work"]

#: Compute capability.
_FIRST_WITH_FP8 = (8, 9)
_BITS = {TensorProto.FLOAT8E4M3FN: 8, TensorProto.FLOAT8E5M2: 8, TensorProto.BFLOAT16: 16}


@dataclass(frozen=True, slots=True)
class Work:
    """What one run of a graph takes.

    Attributes:
        flops: Of products and convolutions.
        least_bytes: Weights, inputs and outputs.
        moved_bytes: Operands and results of every node that is not constant.
        unknown_nodes: Nodes whose sizes could not be told, and which count as nothing.
    """

    flops: int
    least_bytes: int
    moved_bytes: int
    unknown_nodes: int


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the machine can do, measured.

    Attributes:
        tflops: Of a product in fp32 on a CPU, in BF16 on a GPU.
        gb_per_second: Of a copy, read and written.
        fp8_tflops: Of a product in FP8; None where there is none.
    """

    tflops: float
    gb_per_second: float
    fp8_tflops: float | None = None

    def bound_seconds(self, work: Work) -> float:
        """Least time that the work can take."""
        return max(work.flops / (self.tflops * 1e12), work.least_bytes / (self.gb_per_second * 1e9))


def graph_work(path: Path, input_shapes: Mapping[str, tuple[int, ...]]) -> Work:
    """Count a graph's work.

    Args:
        path: The ``.onnx`` file; its weights are not read.
        input_shapes: Concrete shape of every input.
    """
    view = GraphView(path.name, onnx.load(path, load_external_data=False), path.parent)
    (shapes,) = infer_shapes(view, [(input_shapes, {})])
    return view_work(view, shapes)


def view_work(view: GraphView, shapes: Shapes) -> Work:
    """Count the work of a graph whose shapes are known."""
    flops = moved = unknown = 0
    for node in view.nodes:
        if all(view.is_constant(name) for name in node.output if name):
            continue
        counted = node_flops(node, shapes)
        sizes = [_bytes(name, shapes) for name in dict.fromkeys((*node.input, *node.output)) if name]
        if counted is None or None in sizes:
            unknown += 1
        flops += counted or 0
        moved += sum(size or 0 for size in sizes)
    ports = [*(value.name for value in view.model.graph.input), *sorted(view.outputs)]
    stored = [name for name, tensor in view.initializers.items() if name in view.users]
    least = sum(_bytes(name, shapes) or 0 for name in dict.fromkeys((*ports, *stored)))
    return Work(flops, least, moved, unknown)


def node_flops(node: NodeProto, shapes: Shapes) -> int | None:
    """Twice the multiply-accumulates of a node; 0 for those that have none, None where a size is unknown."""
    counter = _COUNTED.get(node.op_type)
    if counter is None:
        return 0
    known = [shapes.shapes.get(name, (None,)) for name in (*node.input[:3], node.output[0]) if name]
    if any(size is None for shape in known for size in shape):
        return None
    return counter(node, shapes.shapes)


def _product(node: NodeProto, shapes: Mapping[str, Any]) -> int:
    return 2 * prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]


def _gemm(node: NodeProto, shapes: Mapping[str, Any]) -> int:
    inner = shapes[node.input[0]][0 if attributes(node).get("transA") else 1]
    return 2 * prod(shapes[node.output[0]]) * inner


def _convolution(node: NodeProto, shapes: Mapping[str, Any]) -> int:
    # A kernel is [out, in / groups, ...]: all but its first axis is summed over.
    return 2 * prod(shapes[node.output[0]]) * prod(shapes[node.input[1]][1:])


def _attention(node: NodeProto, shapes: Mapping[str, Any]) -> int:
    query, keys, values = (shapes[name] for name in node.input[:3])
    if len(query) == 3:  # [batch, tokens, heads * width]
        return 2 * query[0] * query[1] * keys[1] * (query[2] + values[2])
    return 2 * query[0] * query[1] * query[2] * keys[2] * (query[3] + values[3])


_COUNTED: Mapping[str, Callable[[NodeProto, Mapping[str, Any]], int]] = {
    "MatMul": _product,
    "Gemm": _gemm,
    "Conv": _convolution,
    "Attention": _attention,
}


def _bytes(name: str, shapes: Shapes) -> int | None:
    count, kind = shapes.elements(name), shapes.types.get(name)
    if count is None or kind is None:
        return None
    bits = _BITS.get(kind) or 8 * helper.tensor_dtype_to_np_dtype(kind).itemsize
    return count * bits // 8


def cpu_ceilings(size: int = 2048, copied_bytes: int = 1 << 28) -> Ceilings:
    """FP32 product and copy in NumPy, best of five."""
    a, b = (np.random.default_rng(seed).standard_normal((size, size), np.float32) for seed in (0, 1))
    source, target = np.zeros(copied_bytes, np.uint8), np.zeros(copied_bytes, np.uint8)
    product = _best(lambda: a @ b)
    copy = _best(lambda: np.copyto(target, source))
    return Ceilings(2 * size**3 / product / 1e12, 2 * copied_bytes / copy / 1e9)


def gpu_ceilings(size: int = 8192, copied_bytes: int = 1 << 30) -> Ceilings:
    """BF16 and FP8 products and copy in torch, best of five. Never run on a GPU yet."""
    import torch

    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.zeros(copied_bytes, device="cuda", dtype=torch.uint8) for _ in range(2))

    def finished(function: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            function()
            torch.cuda.synchronize()

        return run

    product = _best(finished(lambda: a @ b))
    copy = _best(finished(lambda: target.copy_(source)))
    eight_bit = None
    if torch.cuda.get_device_capability() >= _FIRST_WITH_FP8:
        eight_bit = 2 * size**3 / _best(finished(fp8_product(size, "cuda"))) / 1e12
    return Ceilings(2 * size**3 / product / 1e12, 2 * copied_bytes / copy / 1e9, eight_bit)


def fp8_product(size: int, device: str) -> Callable[[], Any]:
    """A product of E4M3 matrices with a scale each, BF16 out, as torch has it: the second one lies by columns."""
    import torch

    operators: Any = torch.ops.aten
    one = torch.ones((), device=device)
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    return lambda: operators._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def _best(function: Callable[[], object]) -> float:
    function()
    seconds: list[float] = []
    for _ in range(5):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
