"""ONNX -> Relax -> tte IR: a file or a ModelProto, checked before TVM sees it.

For the same graph text as from PyTorch itself, export with names and batch norm kept:
    torch.onnx.export(model, (x,), path, dynamo=True, optimize=False)
    torch.onnx.export(model, (x,), path, dynamo=False, training=TrainingMode.PRESERVE, do_constant_folding=False)
Other options fold batch norm into the convolutions before we see it: that is another network, with other parameters.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tte.document import tally
from tte.errors import TTEError
from tte.frontends.lower import (
    Imported,
    Unsupported,
    Weight,
    lower,
    refuse_nonfinite,
    refuse_quantization,
    refuse_unsupported,
)
from tte.frontends.relax import GIVEN, import_onnx, translate_errors
from tte.ir import Graph

OPSET = (7, 22)
SUPPORTED = frozenset(
    """
    Conv ConvTranspose Gemm MatMul Relu Clip LeakyRelu HardSigmoid HardSwish Sigmoid Tanh Gelu Softplus Neg Exp Log Sqrt
    Reciprocal Abs Sign Pow Add Sub Mul Div Max Min Sum MaxPool AveragePool GlobalAveragePool GlobalMaxPool
    Reshape Flatten Transpose Concat Split Slice Gather Pad Resize Upsample ReduceMean ReduceSum ReduceMax GatherND Mean
    Softmax LogSoftmax Greater Where CastLike Erf
    BatchNormalization LayerNormalization GroupNormalization InstanceNormalization Dropout Identity Squeeze Unsqueeze
    Expand Cast Constant QuantizeLinear DequantizeLinear
    """.split()
)
# Arithmetic on shapes, done here; arrays beyond FOLD_LIMIT elements are not shapes.
FOLDED = frozenset(
    """
    Shape Size Constant ConstantOfShape Range Gather Slice Concat Squeeze Unsqueeze Cast Reshape Expand Transpose
    Add Sub Mul Div Mod Neg Floor Ceil Min Max Equal Where Identity ReduceProd
    """.split()
)
FOLD_LIMIT = 4096
# Of these, activations, weights and biases are made; what else has an int32 is a setting.
INTEGERS = {"int8", "uint8", "int16", "uint16", "int32"}
MOVES = frozenset(
    "Reshape Flatten Transpose Concat Split Slice Gather Squeeze Unsqueeze Expand Pad Identity MaxPool".split()
)
CONVERSIONS = ("_QuantizeLinear", "_DequantizeLinear")
EXPORTED = r"node_\w+"  # names that PyTorch's exporter makes up for nodes
NOTHING: Mapping[str, str] = {}
AXES, MAX_RANK = {"axis", "axes", "batch_dims", "perm", "start"}, 16  # attributes that name dimensions
CONTROL_FLOW = {"If", "Loop", "Scan"}
# Operators whose small inputs are settings, not tensors that could learn: (operator, first such input)
SETTINGS = {
    "QuantizeLinear": 1,
    "DequantizeLinear": 1,
    "Clip": 1,
    "Pad": 1,
    "Resize": 1,
    "Upsample": 1,
    "Dropout": 1,
    "Expand": 1,
    "Reshape": 1,
    "Pow": 1,
}


def read_onnx(path: Path) -> Any:
    """The ModelProto of a file, external data included. Raises TTEError."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load_model_from_string(path.read_bytes())
        if not model.graph.node:
            raise ValueError("it holds no graph")
        missing = {place for place in _data_files(model) if not (path.parent / place).is_file()}
        if missing:
            what = f"the model's weights are in {', '.join(sorted(missing))}, which is not there"
            fix = "put that file beside the model, or export with external_data=False"
            raise TTEError("TTE-E020", what, where=str(path), fix=fix)
        onnx.load_external_data_for_model(model, str(path.parent))
    except (DecodeError, OSError, ValueError, RuntimeError, onnx.checker.ValidationError) as problem:
        raise _invalid(problem, str(path)) from problem
    return model


def _data_files(model: Any) -> Iterator[str]:
    """The files beside the model that hold data of its tensors."""
    for tensor in model.graph.initializer:
        yield from (entry.value for entry in tensor.external_data if entry.key == "location")


def import_onnx_model(given: Any, name: str) -> Graph:
    """The forward graph of an ``onnx.ModelProto``. Raises TTEError."""
    model = type(given)()
    model.CopyFrom(given)
    with translate_errors(given.graph.name or "ONNX model"):
        _check(model)
        _fix_batch(model)
        fold_constants(model)
        _resolve_padding(model)
        refuse_unsupported(_unsupported(model))
        _check_quantization(model)
        named = _named(model)
    for tensor, array in named.items():
        refuse_nonfinite(array, tensor)
    scopes = frozenset(_scope(node) for node in model.graph.node)
    # A layer has its name from its weight, dequantised or not.
    names = {t: t for t in named} | {
        n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in named
    }
    makers = {name: node for node in model.graph.node for name in node.output}

    def find_layer(node: Any) -> str:
        """What onnxruntime puts between nodes belongs to the layer whose result it quantises."""
        while node.name.endswith(CONVERSIONS) and node.input[0] in makers:
            node = makers[node.input[0]]
        of_input = node.name.endswith(CONVERSIONS) and node.input[0] not in names
        return str(node.input[0]) if of_input else layer_of(node, names, scopes)

    function, layers = import_onnx(model, named, find_layer)
    weights = {GIVEN + tensor: Weight(tensor, array) for tensor, array in named.items()}
    return lower(Imported(function, GIVEN + _inputs(model)[0].name, weights, layers), name)


def layer_of(node: Any, named: Mapping[str, str] = NOTHING, scopes: frozenset[str] = frozenset()) -> str:
    """The user's layer of a node: from its weight's name, else what PyTorch's exporters wrote, else the node's name.

    named: tensors -> the weights with the user's names; scopes: all module paths in node names
    """
    for tensor in node.input:
        weight = named.get(tensor, "")
        if "." in weight and not weight.startswith("onnx::"):
            return weight.rpartition(".")[0]
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            modules = re.findall(r"'([^']*)'", entry.value)
            return str(modules[-2]) if len(modules) > 1 else ""
    if not node.name.startswith("/"):
        return "" if re.fullmatch(EXPORTED, node.name) else str(node.name or node.output[0])
    path = _scope(node)
    # The second call of a module is written as "act_1", like a module of that name; weights tell them apart.
    while (once := re.sub(r"_\d+($|\.)", r"\1", path)) in scopes and once != path:
        if any(tensor.startswith(path + ".") for tensor in named):
            break
        path = once
    return path


def _scope(node: Any) -> str:
    """ "/layer1/layer1.0/conv1/Conv" -> "layer1.0.conv1": a child of a container repeats the container's name."""
    path: list[str] = []
    for part in node.name.split("/")[1:-1]:
        if path and part.startswith(path[-1] + "."):
            path[-1] = part
        else:
            path.append(part)
    return ".".join(path)


def _invalid(problem: BaseException, where: str) -> TTEError:
    lines = [line for line in str(problem).splitlines() if line.strip()] or [type(problem).__name__]
    return TTEError("TTE-E020", f"not a valid ONNX model: {lines[0]}", where=where, fix="export the model again")


def _check(model: Any) -> None:
    """Everything that can be said before shapes are known. Raises TTEError."""
    import onnx

    if not all(isinstance(name, str) for name in _strings(model)):
        raise _invalid(ValueError("a name is not UTF-8"), "ONNX model")
    where = model.graph.name or "ONNX model"
    for node in model.graph.node:
        for a in node.attribute:
            # onnx's own shape inference crashes on some of these
            limit = MAX_RANK if a.name in AXES else 2**31
            if not all(-limit <= i <= limit for i in (a.i, *a.ints)):
                raise _invalid(ValueError(f"{node.op_type} {node.name}: {a.name} is out of range"), where)
    external = [t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    if external:
        raise TTEError(
            "TTE-E020",
            f"the data of {external[0]} is in another file",
            where=where,
            fix="give the path of the .onnx file, with its data file beside it",
        )
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    if len(versions) != 1 or not OPSET[0] <= versions[0] <= OPSET[1]:
        raise TTEError(
            "TTE-E020",
            f"the model uses opset {versions[0] if versions else 'none'}",
            where=where,
            fix=f"export with opset_version between {OPSET[0]} and {OPSET[1]}",
        )
    if model.functions:
        model.CopyFrom(onnx.inliner.inline_local_functions(model))
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, RuntimeError, ValueError) as problem:
        raise _invalid(problem, where) from problem
    for node in model.graph.node:
        if "" not in node.input or node.domain not in ("", "ai.onnx"):
            continue
        declared = onnx.defs.get_schema(node.op_type, versions[0], "").inputs
        for i, name in enumerate(node.input):
            kind = declared[min(i, len(declared) - 1)].option
            if not name and kind != kind.Optional:  # the checker lets this pass, and TVM crashes on it
                raise _invalid(ValueError(f"{node.op_type} {node.name}: input {i} has no name"), where)
    branches = [n for n in model.graph.node if n.op_type in CONTROL_FLOW or any(a.HasField("g") for a in n.attribute)]
    if branches:
        raise TTEError(
            "TTE-E026",
            f"the model has control flow: {', '.join(sorted({n.op_type for n in branches}))}",
            where=", ".join(layer_of(n) or n.op_type for n in branches),
            fix="a device's graph is a straight line: choose the branch at export time",
        )
    inputs, outputs = _inputs(model), [o.name for o in model.graph.output]
    if len(inputs) != 1 or len(outputs) != 1:
        raise TTEError(
            "TTE-E023",
            f"the model has {tally(len(inputs), 'input')} and {tally(len(outputs), 'output')}",
            where=f"inputs {[i.name for i in inputs]}, outputs {outputs}",
            fix="export a model that takes one tensor and returns one tensor",
        )
    if inputs[0].type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        raise TTEError("TTE-E023", "the input is not float32", where=inputs[0].name, fix="export a float32 model")
    training = [n for n in model.graph.node if n.op_type == "BatchNormalization" and _attribute(n, "training_mode", 0)]
    constants = {t.name: t for t in model.graph.initializer} | {
        n.output[0]: a.t for n in model.graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"
    }
    for n in model.graph.node:
        if n.op_type == "Dropout" and len(n.input) > 2 and n.input[2]:
            flag = constants.get(n.input[2])
            if flag is None or onnx.numpy_helper.to_array(flag).any():
                training.append(n)
    if training:
        raise TTEError(
            "TTE-E029",
            "the model was exported in training mode: dropout or batch norm is active",
            where=", ".join(layer_of(n) or n.op_type for n in training),
            fix="call model.eval() and export again",
        )


def _strings(model: Any) -> Iterable[Any]:
    """All names; protobuf gives bytes for what is not UTF-8."""
    graph = model.graph
    yield graph.name
    for named in (*graph.input, *graph.output, *graph.value_info, *graph.initializer, *graph.node, *model.functions):
        yield named.name
    for node in graph.node:
        yield from (node.op_type, node.domain, *node.input, *node.output)
        yield from (a.name for a in node.attribute)
        yield from (text for entry in node.metadata_props for text in (entry.key, entry.value))


def _inputs(model: Any) -> list[Any]:
    """The inputs that are not initializers."""
    stored = {t.name for t in model.graph.initializer}
    return [i for i in model.graph.input if i.name not in stored]


def _attribute(node: Any, name: str, default: Any) -> Any:
    import onnx

    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _fix_batch(model: Any) -> None:
    """A free first dimension of the input becomes 1; other free dimensions are refused."""
    source = _inputs(model)[0]
    if not source.type.tensor_type.HasField("shape"):
        raise TTEError("TTE-E022", "the input has no shape", where=source.name, fix="export with a fixed input shape")
    dims = source.type.tensor_type.shape.dim
    if dims and not dims[0].HasField("dim_value"):
        dims[0].dim_value = 1
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in dims)
    if any(not isinstance(d, int) or d < 1 for d in shape):
        raise TTEError(
            "TTE-E022",
            f"the input has dynamic dimensions: {shape}",
            where=source.name,
            fix="export without dynamic axes: memory is planned at compile time",
        )
    if shape and shape[0] != 1:
        raise TTEError(
            "TTE-E027",
            f"the input has batch {shape[0]}: {shape}",
            where=source.name,
            fix=f"export again with batch 1, shape {(1, *shape[1:])}: the device learns from one sample at a time",
        )


def fold_constants(model: Any) -> None:
    """Compute what depends on shapes and small constants only; a copied initializer becomes one of its own.

    Shapes and constants take turns; onnx's own propagation of values allocates whatever a file asks for.
    """
    import onnx

    weights = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and t.dims}
    _infer_shapes(model)
    while _fold_once(model, weights):
        _infer_shapes(model)


def _fold_once(model: Any, weights: set[str]) -> bool:
    """One walk over the nodes; says whether there were any to fold. ``weights`` are not folded, only copied."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    graph = model.graph
    shapes = _shapes(model)
    known = {t.name: t for t in graph.initializer}
    kinds = _kinds(model)
    arrays: dict[str, np.ndarray] = {}

    def value(name: str) -> np.ndarray:
        if name not in arrays:
            arrays[name] = onnx.numpy_helper.to_array(known[name])
        return arrays[name]

    left = []
    for node in graph.node:
        inputs = [i for i in node.input if i]
        if node.op_type == "Shape" and inputs[0] in shapes:
            part = slice(_attribute(node, "start", 0), _attribute(node, "end", None))
            result = np.asarray(shapes[inputs[0]][part], np.int64)
        elif node.op_type == "Identity" and inputs[0] in known:
            result = value(inputs[0])
            if inputs[0] in weights:
                weights.add(node.output[0])
        elif node.op_type == "CastLike" and inputs[0] in known and inputs[1] in kinds:
            result = value(inputs[0]).astype(onnx.helper.tensor_dtype_to_np_dtype(kinds[inputs[1]]))
        elif node.op_type == "CastLike" and kinds.get(inputs[0]) == kinds.get(inputs[1], 0):
            node.op_type = "Identity"
            del node.input[1:]
            left.append(node)
            continue
        elif node.op_type == "QuantizeLinear" and all(i in known for i in inputs):
            refuse_nonfinite(value(inputs[0]), inputs[0])  # float weights in front of their pair
            result = np.asarray(ReferenceEvaluator(node).run(None, {i: value(i) for i in inputs})[0])
        elif node.op_type == "Constant":
            result = np.asarray(ReferenceEvaluator(node).run(None, {})[0])
        elif (
            node.op_type in FOLDED
            and all(i in known and i not in weights for i in inputs)
            and sum(value(i).size for i in inputs) <= FOLD_LIMIT
            and not (node.op_type in ("ConstantOfShape", "Expand", "Range") and _result_size(node, value) > FOLD_LIMIT)
        ):
            result = np.asarray(ReferenceEvaluator(node).run(None, {i: value(i) for i in inputs})[0])
        else:
            left.append(node)
            continue
        tensor = onnx.numpy_helper.from_array(np.asarray(result, order="C"), node.output[0])
        known[node.output[0]] = tensor
        graph.initializer.append(tensor)
    folded = len(left) < len(graph.node)
    del graph.node[:]
    graph.node.extend(left)
    stored = {t.name for t in graph.initializer}
    for kept in [i for i in graph.input if i.name in stored]:
        graph.input.remove(kept)
    return folded


def _kinds(model: Any) -> dict[str, int]:
    """The ONNX element types that are known, by tensor."""
    graph = model.graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    return kinds | {t.name: t.data_type for t in graph.initializer}


def _infer_shapes(model: Any) -> None:
    """Types of everything, from the input's alone: what the file says may be for another batch."""
    import onnx

    del model.graph.value_info[:]
    for value in model.graph.output:
        value.ClearField("type")
    try:
        model.CopyFrom(onnx.shape_inference.infer_shapes(model, strict_mode=True))
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as problem:
        raise _invalid(problem, model.graph.name or "ONNX model") from problem


def _result_size(node: Any, value: Any) -> float:
    if node.op_type == "Range":
        start, stop, step = (float(value(i)) for i in node.input)
        return abs((stop - start) / step) if step else math.inf
    return float(np.prod(np.abs(value(node.input[-1]).astype(np.float64))))


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """The shapes that are known, by tensor."""
    graph = model.graph
    shapes = {t.name: tuple(t.dims) for t in graph.initializer}
    for v in (*graph.input, *graph.value_info, *graph.output):
        dims = v.type.tensor_type.shape.dim
        if v.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            shapes[v.name] = tuple(d.dim_value for d in dims)
    return shapes


def _resolve_padding(model: Any) -> None:
    """auto_pad becomes pads."""
    import onnx

    shapes = _shapes(model)
    for node in model.graph.node:
        mode = _attribute(node, "auto_pad", b"NOTSET").decode()
        if node.op_type not in ("Conv", "MaxPool", "AveragePool") or mode == "NOTSET":
            continue
        size = shapes[node.input[0]][2:]
        kernel = _attribute(node, "kernel_shape", None) or shapes[node.input[1]][2:]
        strides = _attribute(node, "strides", [1] * len(size))
        dilations = _attribute(node, "dilations", [1] * len(size))
        begin, end = [0] * len(size), [0] * len(size)
        if mode.startswith("SAME"):
            for d, (n, k, s, r) in enumerate(zip(size, kernel, strides, dilations, strict=True)):
                total = max((-(-n // s) - 1) * s + (k - 1) * r + 1 - n, 0)
                begin[d], end[d] = (total // 2, total - total // 2)
                if mode == "SAME_LOWER":
                    begin[d], end[d] = end[d], begin[d]
        for attribute in [a for a in node.attribute if a.name in ("auto_pad", "pads")]:
            node.attribute.remove(attribute)
        node.attribute.append(onnx.helper.make_attribute("pads", begin + end))


def _unsupported(model: Any) -> list[Unsupported]:
    """Operators that tte does not have. Raises TTEError TTE-E080 where a model is quantised in another form."""
    import onnx

    types = {v.name: v for v in (*model.graph.input, *model.graph.value_info)}
    constants = {t.name: t for t in model.graph.initializer}
    found = []
    if integer := sorted({n.op_type for n in model.graph.node if re.match(r"QLinear|QGemm|\w+Integer$", n.op_type)}):
        what = f"operators on integers: {', '.join(integer)}"
        fix = "quantise the float model statically, as pairs: QuantFormat.QDQ of onnxruntime, or `tte quantize`"
        raise refuse_quantization(what, model.graph.name or "ONNX model", fix)

    def describe(name: str) -> str:
        if name in constants:
            kind, dims = constants[name].data_type, list(constants[name].dims)
        elif name in types:
            tensor = types[name].type.tensor_type
            kind, dims = tensor.elem_type, [d.dim_value for d in tensor.shape.dim]
        else:
            return "?"
        return f"{onnx.TensorProto.DataType.Name(kind).lower()}{dims}"

    for node in model.graph.node:
        why = "" if node.domain in ("", "ai.onnx") else f"domain {node.domain}"
        if node.op_type in ("Resize", "Upsample") and (scales := _scales(node, constants)) is not None:
            tensor = types.get(node.input[0])
            sizes = [d.dim_value for d in tensor.type.tensor_type.shape.dim] if tensor else []
            if len(sizes) != len(scales) or any((n * float(s)) % 1 for n, s in zip(sizes, scales, strict=True)):
                why = "a scale does not give whole rows or columns: export with a size"
        if (
            node.op_type == "Dropout"
            and len(node.output) > 1
            and any(node.output[1] in n.input for n in model.graph.node)
        ):
            why = "its mask is used"
        if node.op_type == "ConvTranspose" and _attribute(node, "output_shape", None):
            why = "output_shape: export with pads and output_padding"
        if node.op_type not in SUPPORTED or why:
            operands = ", ".join(describe(i) for i in node.input if i)
            layer = layer_of(node, {name: name for name in constants}) or f"node {node.name or node.output[0]}"
            found.append(Unsupported(layer, node.op_type, f"({operands})", why))
    return found


def _check_quantization(model: Any) -> None:
    """Pairs, scales and zero points of a quantised model. Raises TTEError TTE-E080, naming the tensor."""
    import onnx

    constants = {t.name: t for t in model.graph.initializer}
    kinds = {name: onnx.TensorProto.DataType.Name(kind).lower() for name, kind in _kinds(model).items()}
    grids: dict[str, tuple[float, int]] = {}
    pair = "quantise again: integers lie between QuantizeLinear and DequantizeLinear"
    for node in model.graph.node:
        dequantizes = node.op_type == "DequantizeLinear"
        for tensor in node.input[: SETTINGS.get(node.op_type)]:
            if dequantizes and kinds.get(tensor) == "float":
                raise refuse_quantization("DequantizeLinear of what is float32", tensor, pair)
            if kinds.get(tensor) in INTEGERS and not dequantizes and node.op_type not in MOVES:
                what = f"{node.op_type} of what is {kinds[tensor]}, without DequantizeLinear"
                raise refuse_quantization(what, tensor, pair)
        if dequantizes or node.op_type == "QuantizeLinear":
            _check_grid(node, constants, grids)
    for output in model.graph.output:
        if kinds.get(output.name) in INTEGERS:
            what = f"the model's output is {kinds[output.name]}, without DequantizeLinear"
            raise refuse_quantization(what, output.name, pair)


def _check_grid(node: Any, constants: Mapping[str, Any], grids: dict[str, tuple[float, int]]) -> None:
    """Scale and zero point of one node; ``grids``: those of activations that were quantised before."""
    import onnx

    tensor = node.input[0]
    stored = node.op_type == "DequantizeLinear" and tensor in constants
    given = [name for name in node.input[1:] if name]
    if any(name not in constants for name in given):
        raise refuse_quantization("a scale or zero point that the model computes", tensor, "quantise statically")
    scale, *zeros = (onnx.numpy_helper.to_array(constants[name]) for name in given)
    types = [zeros[0].dtype] if zeros else []
    kind = constants[tensor].data_type if stored else _attribute(node, "output_dtype", 0)
    types += [onnx.helper.tensor_dtype_to_np_dtype(kind)] if kind else []
    dtype = str(types[0]) if types else "uint8"
    zero = zeros[0] if zeros else np.zeros(scale.shape, np.int8)
    if _attribute(node, "block_size", 0):
        raise refuse_quantization("scales per block", tensor, "quantise per channel or per tensor")
    if not (np.isfinite(scale) & (scale > 0)).all():
        wrong = scale[~(np.isfinite(scale) & (scale > 0))].reshape(-1)[0]
        raise refuse_quantization(f"the scale {wrong:g}; scales are above 0 and finite", tensor, "calibrate again")
    axis = _attribute(node, "axis", 1)
    channels = dict(enumerate(constants[tensor].dims)) if stored else {}
    channels |= {d - len(channels): n for d, n in channels.items()}
    if stored and scale.size != 1 and scale.shape != (channels.get(axis),):
        what = f"{scale.size} scales for {channels.get(axis, 'no')} channels, which are axis {axis}"
        raise refuse_quantization(what, tensor, "give every channel one scale")
    if zero.size != scale.size:
        what = f"{scale.size} scales, but {zero.size} zero points"
        raise refuse_quantization(what, tensor, "give every scale one zero point")
    if stored:
        return
    if dtype not in ("int8", "uint8"):
        raise refuse_quantization(f"activations of {dtype}", tensor, "quantise activations to int8 or uint8")
    if scale.size != 1:
        raise refuse_quantization("activations with a scale per channel", tensor, "quantise activations per tensor")
    grid = (float(scale.item()), int(zero.item()))
    if node.op_type == "QuantizeLinear":
        grids[node.output[0]] = grid
    elif grids.get(tensor, grid) != grid:
        what = f"quantised with scale and zero point {grids[tensor]}, but dequantised with {grid}"
        raise refuse_quantization(what, tensor, "export the model again")


def _scales(node: Any, constants: Any) -> Any:
    import onnx

    at = 2 if node.op_type == "Resize" and len(node.input) > 2 else 1
    if len(node.input) > at and node.input[at] in constants:
        array = onnx.numpy_helper.to_array(constants[node.input[at]])
        return array if array.size else None
    return _attribute(node, "scales", None)


def _named(model: Any) -> dict[str, np.ndarray]:
    """The initializers that are tensors of the model: float32, not numbers, not settings of an operator; integers that
    are dequantised."""
    import onnx

    settings = {i for n in model.graph.node for i in n.input[SETTINGS.get(n.op_type, len(n.input)) :]}
    integers = {n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    # What was a Constant node has the exporter's name, not the user's.
    return {
        t.name: onnx.numpy_helper.to_array(t)
        for t in model.graph.initializer
        if (t.data_type == onnx.TensorProto.FLOAT and t.dims and t.name not in settings and not is_generated(t.name))
        or t.name in integers
    }


def is_generated(name: str) -> bool:
    """Names that PyTorch's exporters make up for constants inside of forward()."""
    return bool(re.fullmatch(r"/.*_output_\d+|val_\d+|scalar_tensor_default.*|lifted_tensor.*", name))
