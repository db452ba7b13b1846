# SPDX-License-Identifier: Apache-2.0
"""Small graphs with a fault each, and what the linter says of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ltxrt_export.lint.findings import Finding
from ltxrt_export.lint.linter import lint_graph

#: An input: element type and one shape per point.
Input = tuple[int, Sequence[tuple[int, ...]]]


class Lint:
    """Builds graphs and checks them."""

    def model(
        self,
        nodes: Sequence[NodeProto],
        inputs: Mapping[str, Input],
        constants: Mapping[str, NDArray[Any]] | None = None,
        outputs: Sequence[str] = ("y",),
        opset: int = 23,
    ) -> ModelProto:
        """A model whose nodes are named after their output unless they have a name."""
        for node in nodes:
            node.name = node.name or (node.output[0] if node.output else "none")
        values = [
            helper.make_tensor_value_info(name, kind, [f"{name}{axis}" for axis in range(len(shapes[0]))])
            for name, (kind, shapes) in inputs.items()
        ]
        results = [helper.make_empty_tensor_value_info(name) for name in outputs]
        stored = [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()]
        graph = helper.make_graph(nodes, "g", values, results, stored)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)

    def findings(
        self, nodes: Sequence[NodeProto], inputs: Mapping[str, Input], *rest: Any, **named: Any
    ) -> list[Finding]:
        """Findings of a graph at the points that its inputs' shapes give."""
        return self.of(self.model(nodes, inputs, *rest, **named), inputs)

    def of(self, model: ModelProto, inputs: Mapping[str, Input]) -> list[Finding]:
        """Findings of a model."""
        points = max(len(shapes) for _, shapes in inputs.values())
        shapes = [{name: given[point % len(given)] for name, (_, given) in inputs.items()} for point in range(points)]
        return list(lint_graph("net", model, shapes))

    def rules(self, *arguments: Any, **named: Any) -> list[str]:
        """Rules that a graph breaks, notes left out."""
        return [entry.rule for entry in self.findings(*arguments, **named) if entry.severity != "note"]


@pytest.fixture
def lint() -> Lint:
    return Lint()


@pytest.fixture
def attention(lint: Lint) -> Callable[..., list[Finding]]:
    """``attention(q=..., mask=..., softcap=1.0)``: findings of one Attention node in fp16."""

    def made(
        shapes: Sequence[tuple[int, ...]] = ((1, 4, 8, 64), (1, 4, 16, 64)),
        kind: int = TensorProto.FLOAT16,
        extra: Mapping[str, Input] | None = None,
        **given: Any,
    ) -> list[Finding]:
        outputs = given.pop("outputs", ["y"])
        inputs: dict[str, Input] = {name: (kind, shapes) for name in ("q", "k", "v")} | dict(extra or {})
        node = helper.make_node("Attention", list(inputs), outputs, **given)
        return lint.findings([node], inputs, outputs=outputs[:1])

    return made


@pytest.fixture
def halves() -> Callable[..., NDArray[Any]]:
    """``halves(4, 8)``: ones in fp16."""
    return lambda *shape: np.ones(shape, np.float16)
