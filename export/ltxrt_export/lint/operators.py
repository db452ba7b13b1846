# SPDX-License-Identifier: Apache-2.0
"""Operators of TensorRT's ONNX parser and the types that each takes, as data.

Source: onnx/onnx-tensorrt docs/operators.md (TensorRT 10.15); 11 adds to it and takes nothing away.
"""

from onnx import TensorProto

__all__ = [
    "CALM_WHEN_EMPTY",
    "CONSTANT_OPERANDS",
    "CONTROL_FLOW",
    "DATA_DEPENDENT",
    "LEAST_OPSET",
    "MOST_OPSET",
    "ONE_TYPE",
    "OPERAND_TYPES",
    "SIZE_OPERANDS",
]

LEAST_OPSET, MOST_OPSET = 9, 24

_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})
_INTEGERS = frozenset({TensorProto.INT32, TensorProto.INT64})
_BOOL = frozenset({TensorProto.BOOL})
_NUMBERS = _FLOATS | _INTEGERS
_MOVABLE = _NUMBERS | _BOOL

_OF_FLOATS = """
Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh CumSum
Einsum Elu Erf Exp Floor Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization GRU HardSigmoid
HardSwish Hardmax InstanceNormalization IsInf LayerNormalization LeakyRelu Log LogSoftmax LRN LSTM LpNormalization
LpPool MatMul MaxPool MeanVarianceNormalization Mish PRelu QuantizeLinear RandomNormalLike RandomUniformLike
Reciprocal Resize RMSNormalization RNN RotaryEmbedding Round Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt
Tan Tanh ThresholdedRelu Upsample
"""
_OF_NUMBERS = """
Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Mean Min Mod Mul Neg Pad
Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
ReduceSumSquare Relu ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK
"""
_OF_ALL = """
Concat ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND Identity OneHot Reshape ReverseSequence
Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where
"""
_OF_ONE_TYPE = "Add Concat Conv ConvTranspose Div Einsum Gemm MatMul Max Min Mul Pow PRelu Sub Sum"
_ELEMENT_BY_ELEMENT = """
Abs Add And Cast Clip Concat ConstantOfShape Cos Div Equal Exp Expand Gather Gelu Greater Identity Less Log Max Min Mod
Mul Neg Not Or Pow Range Reciprocal Relu Round Shape Sigmoid Sin Slice Split Sqrt Squeeze Sub Tanh Tile Transpose
Unsqueeze Where
"""

#: Types of an operator's first operand; an operator that is not here is not in the parser.
OPERAND_TYPES: dict[str, frozenset[int]] = {
    **dict.fromkeys(_OF_FLOATS.split(), _FLOATS),
    **dict.fromkeys(_OF_NUMBERS.split(), _NUMBERS),
    **dict.fromkeys(_OF_ALL.split(), _MOVABLE),
    **dict.fromkeys(("And", "Or", "Xor", "Not"), _BOOL),
    "Attention": _FLOATS | {TensorProto.INT8, TensorProto.FLOAT8E4M3FN},
    "Cast": _MOVABLE | {TensorProto.UINT8},
    "CastLike": _MOVABLE | {TensorProto.UINT8},
    "Constant": _MOVABLE,
    "DequantizeLinear": frozenset({TensorProto.INT8, TensorProto.FLOAT8E4M3FN}),
    "GridSample": frozenset({TensorProto.FLOAT, TensorProto.FLOAT16}),
}

CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})
DATA_DEPENDENT = frozenset({"Compress", "NonMaxSuppression", "NonZero", "Unique"})

#: Positions of operands that the parser takes as constants only.
CONSTANT_OPERANDS: dict[str, tuple[int, ...]] = {
    **{name: (1,) for name in OPERAND_TYPES if name.startswith("Reduce")},
    "CumSum": (1,),
    "OneHot": (1,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
}

#: Operators whose floating-point operands are of one type in a strongly typed network.
ONE_TYPE = frozenset(_OF_ONE_TYPE.split())

#: Operators that move or combine elements one by one and so do nothing for an empty tensor.
CALM_WHEN_EMPTY = frozenset(_ELEMENT_BY_ELEMENT.split())

#: Operands that decide the size of the output.
SIZE_OPERANDS: dict[str, tuple[int, ...]] = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Tile": (1,),
}
