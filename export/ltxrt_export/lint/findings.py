# SPDX-License-Identifier: Apache-2.0
"""What the linter finds, and the rules that it knows, as data."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from onnx import NodeProto

__all__ = ["RULES", "Finding", "Rule", "Severity", "finding"]

#: ``error``: the build fails or the engine is wrong. ``warning``: it may, or it is slow. ``note``: worth knowing.
Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: how bad a breach is, and why it is a rule."""

    severity: Severity
    reason: str


RULES: dict[str, Rule] = {
    # the file
    "opset": Rule("error", "the parsers of TensorRT 10.16 and 11 both read opsets 9 to 24"),
    "domain": Rule("error", "the parser knows the operators of the standard domain; others need a plugin"),
    "local-function": Rule("warning", "model-local functions are inlined by the parser, and its findings name no node"),
    "name": Rule("error", "a name that stands for two tensors is read as either"),
    "node-name": Rule("warning", "the parser's findings and the engine's layers are told apart by node names"),
    # operators and types
    "operator": Rule("error", "the parser has no such operator"),
    "control-flow": Rule("error", "an engine with branches or loops cannot be captured as a CUDA graph"),
    "data-dependent": Rule("error", "an output size that depends on values has no optimisation profile"),
    "scatter": Rule("error", "ScatterND runs as a plugin and keeps its neighbours from being fused"),
    "operand-type": Rule("error", "the parser's operator does not take this type"),
    "mixed-types": Rule("error", "a strongly typed network computes with operands of one type"),
    "constant-operand": Rule("error", "the parser needs this operand as a constant"),
    "attribute": Rule("error", "the parser does not implement this setting"),
    "conv-kernel": Rule("warning", "a convolution whose kernel is known only at run time gets few, slow kernels"),
    "folded-kernel": Rule("note", "computed from constants: ltxrt-export build folds it before TensorRT sees it"),
    "int64": Rule("note", "integers of 64 bit are computed as such; int32 is enough for indices and half the traffic"),
    # attention and normalisation
    "attention-rank": Rule("error", "Attention takes query, key and value of rank 4"),
    "attention-heads": Rule("error", "the number of heads and their width must be known when the engine is built"),
    "attention-input": Rule("error", "Attention takes query, key, value and a mask, and nothing from a cache"),
    "attention-output": Rule("error", "Attention has one output"),
    "attention-attribute": Rule("error", "softcap, softmax_precision and qk_matmul_output_mode are not implemented"),
    "attention-mask": Rule("error", "a mask is boolean or of the query's type, of rank 4 at the most"),
    "attention-unfused": Rule("warning", "there are fused kernels for 16-bit types; without one the build fails"),
    "norm-axis": Rule("error", "RMSNormalization over the last axis is what becomes one kernel"),
    "norm-precision": Rule("error", "a normalisation of 16-bit tensors computes its mean in fp32 (stash_type 1)"),
    "norm-output": Rule("error", "only the first output of a normalisation is implemented"),
    # sizes
    "rank": Rule("error", "TensorRT's tensors have at most 8 axes"),
    "elements": Rule("error", "not every kernel addresses more than 2^31 - 1 elements"),
    "profile": Rule("error", "a free axis needs a range in every profile"),
    "shape-unknown": Rule("warning", "a size could not be followed: the rules about sizes were not checked behind it"),
    "inconsistent": Rule("error", "the graph does not fit together at sizes that a clip can have"),
    "empty-input": Rule("note", "the smallest size of the profile is 0, and the runtime binds an address even then"),
    "empty-reshape": Rule("error", "a 0 in a Reshape means the size of the input unless allowzero is set"),
    "empty-operand": Rule("warning", "few operators are tested on empty tensors, and a mean of nothing is NaN"),
    # FP8
    "fp8-type": Rule("error", "FP8 tensor cores take E4M3; other 8-bit types need other rules"),
    "fp8-pair": Rule("error", "a quantised tensor must be dequantised at once, with the same scale"),
    "fp8-consumer": Rule("error", "dequantised tensors feed a MatMul directly, or it is not computed in FP8"),
    "fp8-operands": Rule("error", "a MatMul is computed in FP8 only if both operands are"),
    "fp8-scale": Rule("error", "scales are positive, finite constants of the high-precision type"),
    "fp8-scale-shape": Rule("error", "activations have one scale, weights one or one per output channel"),
    "fp8-zero-point": Rule("error", "quantisation is symmetric"),
    "fp8-block": Rule("error", "blocks of scales exist for other types only"),
    "fp8-stored": Rule("warning", "a weight that is quantised in the graph is stored twice as large as it needs to be"),
    "fp8-gate": Rule("error", "gates are a few channels wide and sensitive: no speed to gain, quality to lose"),
    "fp8-alignment": Rule("warning", "FP8 tensor cores take sizes in multiples of 16"),
    # files
    "external-location": Rule("error", "weights lie beside the graph as real files, under a bare name"),
    "external-range": Rule("error", "a weight's bytes lie within its file and are as many as its shape and type take"),
    "external-key": Rule("error", "the parser reads location, offset, length and checksum"),
    "external-listed": Rule("error", "a file that the manifest does not list is neither checked nor copied"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One breach of a rule.

    Attributes:
        network: Key of the network.
        node: Name of the node, input or initializer.
        rule: Key of ``RULES``.
        severity: Of the rule.
        message: What is so; the rule says why that is bad.
    """

    network: str
    node: str
    rule: str
    severity: Severity
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.network}: {self.node}: {self.message} [{self.rule}: {RULES[self.rule].reason}]"

    def to_json(self) -> dict[str, Any]:
        """As plain data, with the reason of the rule."""
        return {**asdict(self), "reason": RULES[self.rule].reason}


def finding(network: str, where: NodeProto | str, rule: str, message: str) -> Finding:
    """A finding with its rule's severity; a nameless node is told by what it puts out."""
    if isinstance(where, str):
        node = where
    else:
        node = f"{where.name or '-> ' + next(iter(where.output), '?')} ({where.op_type})"
    return Finding(network, node, rule, RULES[rule].severity, message)
