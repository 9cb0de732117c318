"""What do the operators of an ONNX graph do to numbers?

The words that placement (`onnx_view`) and the walks over finished Q/DQ graphs (`qdq_graph`) share. An operator that is
in none of these sets computes something else, in float.
"""

QUANTIZE = "QuantizeLinear"
DEQUANTIZE = "DequantizeLinear"

CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
LINEAR = frozenset({"Gemm", "MatMul"})
AVERAGE_POOLS = frozenset({"AveragePool", "GlobalAveragePool"})

# They move numbers to other places or names and keep them all.
RESHAPING = frozenset({"Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Cast"})
_PICKING = frozenset({
    "Identity", "Dropout", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather",
    "DepthToSpace", "SpaceToDepth", "Expand",
})  # fmt: skip
# They give the same result before and behind a symmetric per-tensor quantizer.
COMMUTING = _PICKING | {"MaxPool", "GlobalMaxPool", "Relu"}
# They move or rename numbers and compute none.
MOVING = _PICKING | {"Concat", "Shape", "Cast", "ConstantOfShape", "Range"}
# An engine computes them in the last step of the INT8 layer before them.
EPILOGUE = frozenset({
    "Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Sigmoid", "HardSigmoid", "HardSwish", "Mish", "Tanh", "Softplus",
    "Erf", "Gelu", "Add", "Sub", "Mul", "Div", "BatchNormalization",
})  # fmt: skip
# They may lie between a convolution and the residual add that it is computed with.
BRANCH = frozenset({
    "Identity", "Dropout", "Relu", "Clip", "LeakyRelu", "HardSwish", "BatchNormalization", QUANTIZE, DEQUANTIZE,
})  # fmt: skip

NEVER_NEGATIVE = frozenset({"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Softplus", "Exp", "Abs"})
KEEPS_SIGN_OF_FIRST = COMMUTING | AVERAGE_POOLS | {"ReduceMean", "ReduceMax", "ReduceSum", "Cast", "Sqrt"}
KEEPS_SIGN_OF_ALL = frozenset({"Concat", "Add", "Mul", "Max"})

# A factor per channel passes through the first, and the second put the pixels of each channel side by side.
KEEPS_CHANNELS = AVERAGE_POOLS | {"Relu", "LeakyRelu", "MaxPool", "ReduceMean"}
REPEATS_CHANNELS = frozenset({"Flatten", "Reshape", "Squeeze"})
