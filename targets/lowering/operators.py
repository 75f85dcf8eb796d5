"""Which ONNX operators the fallback lowering takes, and which it refuses, by name and why.

Everything is decided from the node, its types and its constant inputs, before TVM sees it, because
TVM silently computes something else for some of what is refused here. `docs/operators.md` has the
result of onnx's own tests per operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx
import onnx.numpy_helper

from edgepress.targets.lowering import decompose_recurrent
from edgepress.targets.lowering.decompose_quantized import exact_in_float32
from edgepress.targets.lowering.dialect import DOMAIN
from edgepress.targets.lowering.rewriting import attributes_of
from edgepress.targets.program import DTYPES, Array

_RANDOM = "its result is random"
_COUNT = "the size of its result depends on the data"
_SEQUENCE = "sequences, optionals and text are not tensors"
_SUBGRAPH = "it runs a subgraph"
_NO_KERNEL = "edgepress has no kernel for it yet"

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"), _RANDOM
    ),
    **dict.fromkeys(("RandomUniformLike",), _RANDOM),
    **dict.fromkeys(("NonMaxSuppression", "NonZero", "Unique"), _COUNT),
    **dict.fromkeys(
        (
            "ConcatFromSequence",
            "Optional",
            "OptionalGetElement",
            "OptionalHasElement",
            "RegexFullMatch",
            "SequenceAt",
            "SequenceConstruct",
            "SequenceEmpty",
            "SequenceErase",
            "SequenceInsert",
            "SequenceLength",
            "SplitToSequence",
            "StringConcat",
            "StringNormalizer",
            "StringSplit",
            "TfIdfVectorizer",
        ),
        _SEQUENCE,
    ),
    **dict.fromkeys(("If", "LinearAttention", "Loop", "Scan", "SequenceMap"), _SUBGRAPH),
    **dict.fromkeys(
        (
            "BitCast",
            "CumProd",
            "DeformConv",
            "ImageDecoder",
            "MaxUnpool",
            "MelWeightMatrix",
            "TensorScatter",
        ),
        _NO_KERNEL,
    ),
}

_SUPPORTED = """
Abs Acos Acosh Add AffineGrid And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool
BatchNormalization BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor BlackmanWindow Cast
CastLike CausalConvWithState Ceil Celu CenterCropPad Clip Col2Im Compress Concat Constant
ConstantOfShape Conv ConvInteger ConvTranspose Cos Cosh CumSum DFT DepthToSpace
DequantizeLinear Det Div Dropout DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike
Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool
GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HammingWindow HannWindow
HardSigmoid HardSwish Hardmax Identity InstanceNormalization IsInf IsNaN LRN LSTM
LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization LpPool MatMul
MatMulInteger Max MaxPool MaxRoiPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg
NegativeLogLikelihoodLoss Not OneHot Or PRelu Pad Pow QLinearConv QLinearMatMul QuantizeLinear
RMSNormalization RNN Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax
ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence
RoiAlign RotaryEmbedding Round STFT Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid
Sign Sin Sinh Size Slice Softmax SoftmaxCrossEntropyLoss Softplus Softsign SpaceToDepth Split
Sqrt Squeeze Sub Sum SwiGLU Swish Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze
Upsample Where Xor
"""
SUPPORTED = frozenset(_SUPPORTED.split())


class Facts:
    """What is known about the values of a graph before any inference."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._types = {
            value.name: value.type.tensor_type
            for value in (*graph.input, *graph.value_info, *graph.output)
            if value.type.HasField("tensor_type")
        }

    def constant(self, node: onnx.NodeProto, place: int) -> Array | None:
        """Array of an input; None where it is missing or not constant."""
        tensor = self._tensors.get(_input(node, place))
        return None if tensor is None else onnx.numpy_helper.to_array(tensor)

    def dtype(self, name: str) -> str:
        """Element type, such as `float32`; empty where it is not known."""
        if name in self._tensors:
            element = self._tensors[name].data_type
        elif name in self._types:
            element = self._types[name].elem_type
        else:
            return ""
        text = str(onnx.TensorProto.DataType.Name(element)).lower()
        return {"float": "float32", "double": "float64"}.get(text, text)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a value; None where it is not known."""
        if name in self._tensors:
            return tuple(self._tensors[name].dims)
        kind = self._types.get(name)
        if kind is None or not all(d.HasField("dim_value") for d in kind.shape.dim):
            return None
        return tuple(d.dim_value for d in kind.shape.dim)


def unsupported(model: onnx.ModelProto) -> list[tuple[str, str]]:
    """List every node that cannot be lowered, and why.

    Shapes and types are taken as the model declares them.
    """
    facts = Facts(model.graph)
    found = []
    for number, node in enumerate(model.graph.node):
        why = check(node, facts)
        if why is not None:
            name = node.name or (node.output[0] if node.output else str(number))
            found.append((f"{name} ({node.op_type})", why))
    return found


def check(node: onnx.NodeProto, facts: Facts) -> str | None:
    """Say why a node cannot be lowered; None where nothing is known against it."""
    if node.domain == DOMAIN:  # claimed already
        return None
    if node.domain not in ("", "ai.onnx"):
        return f"the domain {node.domain} is not supported"
    if node.op_type in REFUSED:
        return REFUSED[node.op_type]
    if node.op_type not in SUPPORTED:
        return "the operator is unknown"
    for name in (*node.input, *node.output):
        dtype = facts.dtype(name)
        if dtype and dtype not in DTYPES:
            return f"{name} is {dtype}; supported are {', '.join(DTYPES)}"
    form = _FORMS.get(node.op_type)
    return form(node, facts) if form else None


def single_node_models(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Give each node a model of its own, with the values it reads as inputs."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = {value.name: value for value in (*graph.input, *graph.value_info, *graph.output)}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        read = list(dict.fromkeys(name for name in node.input if name))
        if any(name not in values and name not in tensors for name in read):
            continue
        alone = onnx.ModelProto()
        alone.CopyFrom(model)
        alone.graph.Clear()
        alone.graph.name = graph.name
        alone.graph.node.append(node)
        alone.graph.input.extend(values[name] for name in read if name not in tensors)
        alone.graph.initializer.extend(tensors[name] for name in read if name in tensors)
        alone.graph.output.extend(values[name] for name in node.output if name in values)
        yield f"{node.name or node.output[0]} ({node.op_type})", alone


def _input(node: onnx.NodeProto, place: int) -> str:
    return node.input[place] if place < len(node.input) else ""


def _batch_normalization(node: onnx.NodeProto, _facts: Facts) -> str | None:
    if attributes_of(node).get("training_mode", 0) or len(node.output) > 1:
        return "it is in training mode"
    return None


def _bit_shift(node: onnx.NodeProto, facts: Facts) -> str | None:
    shifts = facts.constant(node, 1)
    if shifts is None:
        return "shifts that are not constant may exceed the width of the type"
    if (shifts < 0).any() or (shifts >= shifts.dtype.itemsize * 8).any():
        return "a shift exceeds the width of the type"
    return None


def _conv_integer(node: onnx.NodeProto, facts: Facts) -> str | None:
    shape = facts.shape(_input(node, 1))
    if shape is None or not exact_in_float32(shape):
        return "its sums exceed what float32 holds exactly"
    return None


def _det(node: onnx.NodeProto, facts: Facts) -> str | None:
    shape = facts.shape(_input(node, 0))
    return None if shape and shape[-1] == 2 else "only matrices of two rows are supported"


def _dropout(node: onnx.NodeProto, facts: Facts) -> str | None:
    if not _input(node, 2):
        return None
    training, ratio = facts.constant(node, 2), facts.constant(node, 1)
    if training is not None and not training.any():
        return None
    if training is not None and ratio is not None and not ratio.any():
        return None
    return "it is in training mode"


def _max_pool(node: onnx.NodeProto, _facts: Facts) -> str | None:
    if len(node.output) > 1 and node.output[1]:
        return "indices of the maxima are not supported"
    return None


def _mod(node: onnx.NodeProto, facts: Facts) -> str | None:
    if facts.dtype(_input(node, 0)) == "float32" and not attributes_of(node).get("fmod", 0):
        return "a floored remainder of floats is not supported"
    return None


def _pow(node: onnx.NodeProto, facts: Facts) -> str | None:
    if facts.dtype(_input(node, 0)) == "float32":
        return None
    power = facts.constant(node, 1)
    if power is None or power.size != 1 or not 1 <= float(power.item()) <= 8:
        return "powers of integers need one constant exponent from 1 to 8"
    return None if float(power.item()).is_integer() else "roots of integers are not supported"


def _recurrent(node: onnx.NodeProto, facts: Facts) -> str | None:
    shape = facts.shape(_input(node, 0))
    if shape is None:
        return "its input has no static shape"
    steps = shape[1 if attributes_of(node).get("layout", 0) else 0]
    return decompose_recurrent.why_not(node, steps, facts.constant(node, 4))


def _resize(node: onnx.NodeProto, facts: Facts) -> str | None:
    attributes = attributes_of(node)
    if facts.dtype(_input(node, 0)) != "float32" and attributes.get("mode", "nearest") != "nearest":
        return "only float32 is interpolated"
    crops = attributes.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    return _constant_inputs((1, 2, 3) if crops else (2, 3))(node, facts)


def _roi_align(node: onnx.NodeProto, _facts: Facts) -> str | None:
    return "mode max is not supported" if attributes_of(node).get("mode") == "max" else None


def _constant_inputs(places: tuple[int, ...]) -> Callable[[onnx.NodeProto, Facts], str | None]:
    """Refuse where one of these inputs is given but not constant."""

    def form(node: onnx.NodeProto, facts: Facts) -> str | None:
        for place in places:
            name = _input(node, place)
            if name and facts.constant(node, place) is None:
                return f"{name} must be constant"
        return None

    return form


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
_FORMS: dict[str, Callable[[onnx.NodeProto, Facts], str | None]] = {
    "AffineGrid": _constant_inputs((1,)),
    "BatchNormalization": _batch_normalization,
    "BitShift": _bit_shift,
    "BlackmanWindow": _constant_inputs((0,)),
    "CenterCropPad": _constant_inputs((1,)),
    "Col2Im": _constant_inputs((1, 2)),
    "Compress": _constant_inputs((1,)),
    "ConstantOfShape": _constant_inputs((0,)),
    "ConvInteger": _conv_integer,
    "CumSum": _constant_inputs((1,)),
    "DFT": _constant_inputs((1, 2)),
    "Det": _det,
    "Dropout": _dropout,
    "Expand": _constant_inputs((1,)),
    "GRU": _recurrent,
    "HammingWindow": _constant_inputs((0,)),
    "HannWindow": _constant_inputs((0,)),
    "LSTM": _recurrent,
    "MaxPool": _max_pool,
    "Mod": _mod,
    "OneHot": _constant_inputs((1,)),
    "Pad": _constant_inputs((1, 3)),
    "Pow": _pow,
    "RNN": _recurrent,
    "Range": _constant_inputs((0, 1, 2)),
    "Reshape": _constant_inputs((1,)),
    "Resize": _resize,
    "ReverseSequence": _constant_inputs((1,)),
    "RoiAlign": _roi_align,
    "STFT": _constant_inputs((1, 3)),
    "Slice": _constant_inputs((1, 2, 3, 4)),
    "Split": _constant_inputs((1,)),
    "Squeeze": _constant_inputs((1,)),
    "Tile": _constant_inputs((1,)),
    "TopK": _constant_inputs((1,)),
    "Trilu": _constant_inputs((1,)),
    "Unsqueeze": _constant_inputs((1,)),
    "Upsample": _constant_inputs((1,)),
    **{f"Reduce{kind}": _constant_inputs((1,)) for kind in _REDUCTIONS},
}
