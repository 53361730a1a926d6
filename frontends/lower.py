"""Relax -> tte IR: a white list of Relax operators, each with the rule that lowers it.

Relax expressions are only looked at here; who makes them is ``relax.py``. Spatial operators are NHWC in tte: each gets
a transposition in front and behind, which ``passes.layout`` cancels.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tte.document import tally
from tte.errors import TTEError
from tte.ir import Builder, Const, Graph, InvalidType, Node, Origin, TensorType, Value, rewrite

NHWC, NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
# Names in the IR that users' tensors must not take.
RESERVED = {"x", "target", "lr"}
LAYERS = {"nn.conv1d", "nn.conv2d", "nn.conv1d_transpose", "nn.conv2d_transpose", "matmul"}
MOVES = {"dequantize", "permute_dims", "reshape", "flatten", "squeeze", "expand_dims"}


@dataclass(frozen=True)
class Weight:
    """A tensor of the user's model that has a name there: float32, or the integers of a quantised one."""

    name: str
    data: np.ndarray


@dataclass(frozen=True)
class Imported:
    """What a TVM importer made of a model.

    function  the Relax function; parameters are the model's input and the named tensors
    input     the parameter that is the model's input
    weights   Relax parameter -> the user's tensor
    layers    Relax variable -> the user's layer
    """

    function: Any
    input: str
    weights: Mapping[str, Weight]
    layers: Mapping[str, str]


class Refused(Exception):
    """One operator cannot be lowered; the message says why."""


@dataclass(frozen=True)
class Piece:
    """The result of an operator that tte has only as a part of another one."""

    x: Value


@dataclass(frozen=True)
class Erf(Piece):
    """(erf(x) + shift) * scale: a part of gelu."""

    shift: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Greater(Piece):
    """x > bound: a part of softplus."""

    bound: float


@dataclass(frozen=True)
class Unsupported:
    """An operator of the user's model that tte does not have."""

    layer: str
    operator: str
    types: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.layer or 'the model itself'}: {self.operator}{self.types}" + (
            f": {self.why}" if self.why else ""
        )


def refuse_unsupported(found: Sequence[Unsupported]) -> None:
    """Raise one TTEError that lists every operator which tte does not have."""
    if not found:
        return
    lines = list(dict.fromkeys(map(str, found)))
    raise TTEError(
        "TTE-E024",
        f"{len(found)} operator{'s' * (len(found) > 1)} not supported",
        where="\n         ".join(lines),
        fix="replace them by operators of `tte ops`, or keep that part of the model outside",
    )


def refuse_nonfinite(array: np.ndarray, name: str) -> None:
    """Raise TTEError if a weight holds NaN or infinity."""
    if not np.isfinite(array).all():
        count = int((~np.isfinite(array)).sum())
        are = "is" if count == 1 else "are"
        raise TTEError(
            "TTE-E028",
            f"{count:,} of the {tally(array.size, 'value')} of {name} {are} NaN or infinite",
            where=name,
            fix="train again or repair the checkpoint: nothing useful can be learned from here",
        )


def refuse_quantization(what: str, tensor: str, fix: str) -> TTEError:
    return TTEError("TTE-E080", f"quantisation that tte does not compute: {what}", where=tensor, fix=fix)


@dataclass
class Lowering:
    """The state of one translation: Relax variables and what they became; ``operands``: what layers read."""

    imported: Imported
    operands: set[str]
    builder: Builder = field(default_factory=Builder)
    env: dict[str, Any] = field(default_factory=dict)
    producer: dict[str, Node] = field(default_factory=dict)
    layer: str = ""
    _moved: dict[tuple[str, str], Value] = field(default_factory=dict)

    def call(self, op: str, *inputs: Value, **attrs: Any) -> Value:
        result = self.builder.call(op, *inputs, layer=self.layer, **attrs)
        self.producer[result.name] = self.builder.nodes[-1]
        return result

    def value(self, expression: Any) -> Any:
        """What an operand became: a Value, or a tuple of them."""
        found = self.operand(expression)
        for part in found if isinstance(found, tuple) else (found,):
            if isinstance(part, Piece):
                raise Refused(
                    "reads erf, which is supported only in gelu"
                    if isinstance(part, Erf)
                    else "reads a comparison, which is supported only in softplus"
                )
        return found

    def operand(self, expression: Any) -> Any:
        """``value``, or a Piece."""
        kind = type(expression).__name__
        if kind in ("Var", "DataflowVar"):
            name = expression.name
            return self.weight(name) if name in self.imported.weights else self.env[name]
        if kind == "Tuple":
            return tuple(self.value(f) for f in expression.fields)
        if kind == "GenericConst":
            array = np.asarray(expression.value.numpy())
            return self.builder.const(array.astype(np.float32) if array.dtype.kind in "fiub" else array)
        if kind == "TupleGetItem":
            return self.value(expression.tuple_value)[expression.index]
        raise Refused(f"an operand of kind {kind}")

    def weight(self, variable: str) -> Const:
        """The user's tensor as a constant; a constant with a name is one constant, however often it is read."""
        weight = self.imported.weights[variable]
        name = constant_name(weight.name)
        while (taken := self.builder.consts.get(name)) and taken.origin and taken.origin.name != weight.name:
            name += "_"  # two names of the user's that differ only in characters that the IR does not have
        if name not in self.builder.consts:
            data = np.asarray(weight.data, np.float32, order="C")
            index = np.arange(data.size, dtype=np.int64).reshape(data.shape)
            self.builder.const(data, name, Origin(weight.name, data.shape, index))
        return self.builder.consts[name]

    def quantized_weight(self, variable: str, call: Any, layer: bool) -> Const:
        """The reals that the user's integers stand for; the origin keeps the integers for ``lower_qdq``.

        layer: a convolution or matrix product reads it. What none reads is quantised as activations are, with any zero
        point: a number that does not learn.
        """
        weight = self.imported.weights[variable]
        name = constant_name(weight.name)
        if name in self.builder.consts:
            return self.builder.consts[name]
        scale, zero = (_constant(self, a) for a in call.args[1:3])
        integers = np.asarray(weight.data, order="C")
        require(bool((np.isfinite(scale) & (scale > 0)).all()), "a scale that is zero, negative or not finite")
        shape = [1] * integers.ndim
        if scale.size > 1:
            shape[int(call.attrs.axis) % max(1, integers.ndim)] = scale.size
        full = np.broadcast_to(scale.astype(np.float64).reshape(shape), integers.shape)
        if not layer and integers.dtype != np.int32:
            zeros = zero.astype(np.int64).reshape(shape if zero.size > 1 else ())
            return self.builder.const(((integers - zeros) * full).astype(np.float32))
        if integers.dtype not in (np.int8, np.int32):
            fix = "quantise weights to int8, biases to int32"
            raise refuse_quantization(f"weights of {integers.dtype}", weight.name, fix)
        if zero.any():
            what = f"asymmetric weights, with zero point {zero[zero != 0][0]}"
            raise refuse_quantization(what, weight.name, "quantise weights symmetrically, with zero point 0")
        index = np.arange(integers.size, dtype=np.int64).reshape(integers.shape)
        origin = Origin(weight.name, integers.shape, index, np.array(full), integers.reshape(-1))
        return self.builder.const((integers * full).astype(np.float32), name, origin)

    def moved(self, op: str, x: Value, **attrs: Any) -> Value:
        """``call``, but a weight that is read twice is moved once."""
        if not isinstance(x, Const):
            return self.call(op, x, **attrs)
        key = (x.name, f"{op} {attrs}")
        if key not in self._moved:
            self._moved[key] = self.call(op, x, **attrs)
        return self._moved[key]

    def const(self, value: float) -> Const:
        return self.builder.const(float(value))


def constant_name(name: str) -> str:
    """The user's name of a tensor in the characters of the IR; never the name of a value."""
    clean = re.sub(r"[^A-Za-z0-9_.:/\-]", "_", name) or "unnamed"
    return f"param.{clean}" if clean.isdigit() or clean in RESERVED or clean.startswith("const.") else clean


def clean_layer(name: str) -> str:
    """A layer's name in the characters of the IR."""
    return re.sub(r"[^A-Za-z0-9_.:/\-]", "_", name)


def lower(imported: Imported, name: str) -> Graph:
    """The forward graph of a Relax function with one input and one output.

    Raises TTEError TTE-E024, listing every operator that is not in the table at once.
    """
    function = imported.function
    bindings = [b for block in function.body.blocks for b in block.bindings]
    state = Lowering(imported, _operands(bindings))
    given = next(p for p in function.params if p.name == imported.input)
    source = Value("x", tensor_type_of(given.ty))
    state.env[given.name] = source
    layers = _layers(bindings, imported.layers)
    problems: list[Unsupported] = []
    for binding, layer in zip(bindings, layers, strict=True):
        state.layer = clean_layer(layer)
        variable, value = binding.var, binding.value
        operator = _operator(value)
        try:
            if operator is None:
                state.env[variable.name] = state.operand(value)
            elif operator not in TABLE:
                raise Refused("")
            else:
                state.env[variable.name] = TABLE[operator](state, value)
        except (Refused, InvalidType) as problem:
            types = _types(value.args) if operator else ""
            what = operator.removeprefix("relax.") if operator else type(value).__name__
            problems.append(Unsupported(layer, what, types, str(problem)))
            state.env[variable.name] = _placeholder(state.builder, variable.ty)
    result: Any = ()
    try:
        result = state.value(function.body.body)
    except Refused as problem:
        problems.append(Unsupported("", "output", "", str(problem)))
    refuse_unsupported(problems)
    outputs = result if isinstance(result, tuple) else (result,)
    if len(outputs) != 1:
        what = f"the model has {tally(len(outputs), 'output')}"
        raise TTEError("TTE-E023", what, where="model", fix="return one tensor")
    computed = {"x"}
    for node in state.builder.nodes:
        if any(v.name in computed for v in node.inputs):
            computed.add(node.output.name)
    if outputs[0].name not in computed or outputs[0] is source:
        what = "the model's output does not depend on its input"
        raise TTEError("TTE-E023", what, where="model", fix="export the model that computes something")
    graph = Graph(name, inputs=(source,), consts=tuple(state.builder.consts.values()), outputs=(outputs[0],))
    return rewrite(graph, state.builder.nodes)


def _operator(value: Any) -> str | None:
    return value.op.name if type(value).__name__ == "Call" and hasattr(value.op, "name") else None


def _operands(bindings: Sequence[Any]) -> set[str]:
    """The variables that convolutions and matrix products read, moved or dequantised on the way perhaps."""
    found: set[str] = set()
    for binding in reversed(bindings):
        operator = (_operator(binding.value) or "").removeprefix("relax.")
        if operator in LAYERS or (binding.var.name in found and operator in MOVES):
            found |= {argument.name for argument in binding.value.args if hasattr(argument, "name")}
    return found


def _layers(bindings: Sequence[Any], known: Mapping[str, str]) -> list[str]:
    """A layer per binding: what has no record was emitted on the way to the next that has."""
    result: list[str] = []
    layer = ""
    for binding in reversed(bindings):
        layer = known.get(binding.var.name, layer)
        result.append(layer)
    return result[::-1]


def _placeholder(builder: Builder, type: Any) -> Any:
    """Stands for a result that could not be computed, so that the search for problems can go on."""
    if hasattr(type, "fields"):
        return tuple(_placeholder(builder, t) for t in type.fields)
    return builder.fresh(tensor_type_of(type) if hasattr(type, "dtype") else TensorType(()))


def _types(arguments: Sequence[Any]) -> str:
    flat = [f for a in arguments for f in (a.fields if hasattr(a, "fields") else [a])]
    types = [tensor_type_of(a.ty) for a in flat if hasattr(a.ty, "ndim") and hasattr(a.ty, "dtype")]
    return "(" + ", ".join(f"{t.dtype}{list(t.shape)}" for t in types) + ")"


def tensor_type_of(type: Any) -> TensorType:
    """The tte type of a Relax tensor type. Raises TTEError where a dimension is not a positive number."""
    shape = []
    for dim in type.shape if getattr(type, "shape", None) is not None else ["?"]:
        number = int(dim) if hasattr(dim, "value") or isinstance(dim, int) else 0
        if number < 1:
            raise TTEError(
                "TTE-E022",
                f"a dimension is not known or not positive: {type}",
                fix="export the model with a fixed input shape that is large enough",
            )
        shape.append(number)
    dtype = str(type.dtype).replace('"', "")
    dtype = dtype.removeprefix("dtype(").removesuffix(")").strip("'")
    return TensorType(tuple(shape), dtype if dtype in ("float32", "int32", "int8", "uint8") else "float32")


# The table. Each rule takes the state and the Relax call and returns what the call became.

Rule = Callable[[Lowering, Any], Any]
TABLE: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        TABLE.update({f"relax.{name}": function for name in names})
        return function

    return add


def ints(array: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in array)


def number(value: Any) -> float:
    """A setting as float32 would show it: ONNX stores 1e-5 as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def result_shape(call: Any) -> tuple[int, ...]:
    return tensor_type_of(call.ty).shape


def require(condition: bool, why: str) -> None:
    if not condition:
        raise Refused(why)


UNARY = {
    "nn.relu": "nn.relu", "sigmoid": "sigmoid", "tanh": "tanh", "nn.silu": "nn.silu", "negative": "negative",
    "exp": "exp", "log": "log", "sqrt": "sqrt", "rsqrt": "rsqrt", "abs": "abs", "sign": "sign", "nn.gelu": "nn.gelu",
}  # fmt: skip


def _unary(name: str) -> Rule:
    return lambda state, call: state.call(name, state.value(call.args[0]))


def _binary(name: str) -> Rule:
    def lower_binary(state: Lowering, call: Any) -> Any:
        for i in (0, 1):
            if isinstance(erf := state.operand(call.args[i]), Erf):
                return _gelu_by_hand(state, name, state.value(call.args[1 - i]), erf)
        return state.call(name, state.value(call.args[0]), state.value(call.args[1]))

    return lower_binary


@rule("erf")
def _erf(state: Lowering, call: Any) -> Erf:
    return Erf(state.value(call.args[0]))


def _gelu_by_hand(state: Lowering, name: str, u: Any, erf: Erf) -> Any:
    """x * (erf(x / sqrt(2)) + 1) = 2 gelu(x); with x / 2 in place of the first x it is gelu(x)."""
    if isinstance(u, Const) and u.type.size == 1:
        if name == "add" and u.data.item() == 1.0 and erf.shift == 0.0:
            return Erf(erf.x, 1.0)
        if name == "multiply":
            return replace(erf, scale=erf.scale * u.data.item())

    def unscaled(value: Value, factor: float) -> Value | None:
        """x, if value is x * factor or x / (1 / factor)"""
        node = state.producer.get(value.name)
        if node is None or node.op not in ("multiply", "divide") or not isinstance(node.inputs[1], Const):
            return None
        given = float(node.inputs[1].data.reshape(-1)[0])
        found = given if node.op == "multiply" else 1.0 / given if given else 0.0
        return node.inputs[0] if node.inputs[1].type.size == 1 and math.isclose(found, factor, rel_tol=1e-5) else None

    require(name == "multiply" and erf.shift == 1.0, "only in gelu")
    x = unscaled(erf.x, math.sqrt(0.5))
    require(x is not None and x in (u, unscaled(u, 0.5)), "only in gelu")
    assert x is not None
    y, factor = state.call("nn.gelu", x), erf.scale * (2.0 if x == u else 1.0)
    return y if factor == 1.0 else state.call("multiply", y, state.const(factor))


TABLE.update({f"relax.{theirs}": _unary(ours) for theirs, ours in UNARY.items()})
TABLE.update({f"relax.{name}": _binary(name) for name in ("add", "subtract", "multiply", "divide")})


@rule("nn.gelu_tanh")
def _gelu_tanh(state: Lowering, call: Any) -> Value:
    return state.call("nn.gelu", state.value(call.args[0]), approximate="tanh")


@rule("nn.relu6")
def _relu6(state: Lowering, call: Any) -> Value:
    return state.call("clip", state.value(call.args[0]), min=0.0, max=6.0)


@rule("clip")
def _clip(state: Lowering, call: Any) -> Value:
    low, high = (number(a.value) for a in call.args[1:3])
    require(low <= high, f"clip to [{low}, {high}]")
    return state.call("clip", state.value(call.args[0]), min=low, max=high)


@rule("maximum", "minimum")
def _bound(state: Lowering, call: Any) -> Value:
    """Of a tensor and a number: clamp."""
    a, b = state.value(call.args[0]), state.value(call.args[1])
    x, bound = (b, a) if isinstance(a, Const) else (a, b)
    require(isinstance(bound, Const) and bound.type.size == 1, "only with a number as one operand")
    name = "min" if call.op.name == "relax.maximum" else "max"
    return state.call("clip", x, **{name: number(bound.data.item())}, inclusive=True)


@rule("nn.leakyrelu")
def _leaky_relu(state: Lowering, call: Any) -> Value:
    return state.call("nn.leaky_relu", state.value(call.args[0]), alpha=number(call.attrs.alpha))


@rule("nn.softplus")
def _softplus(state: Lowering, call: Any) -> Value:
    beta, threshold = number(call.attrs.beta), number(call.attrs.threshold)
    return state.call("nn.softplus", state.value(call.args[0]), beta=beta, threshold=threshold)


@rule("greater")
def _greater(state: Lowering, call: Any) -> Greater:
    bound = state.value(call.args[1])
    require(isinstance(bound, Const) and bound.type.size == 1, "only with a number, in softplus")
    return Greater(state.value(call.args[0]), float(bound.data.item()))


@rule("where")
def _where(state: Lowering, call: Any) -> Value:
    """where(beta * x > threshold, x, softplus(beta * x) / beta), as PyTorch's exporter writes softplus"""
    condition, x, y = state.operand(call.args[0]), state.value(call.args[1]), state.value(call.args[2])
    beta, node = 1.0, state.producer.get(y.name)
    if node and node.op == "divide" and isinstance(node.inputs[1], Const) and node.inputs[1].type.size == 1:
        beta, node = float(node.inputs[1].data.item()), state.producer.get(node.inputs[0].name)
    found = node is not None and node.op == "nn.softplus" and isinstance(condition, Greater)
    require(found and node.inputs[0] == condition.x, "only in softplus")  # type: ignore[union-attr]
    scaled = state.producer.get(condition.x.name)
    by_beta = scaled and scaled.op == "multiply" and scaled.inputs[0] == x
    require(condition.x == x if beta == 1.0 and not by_beta else bool(by_beta), "only in softplus")
    return state.call("nn.softplus", x, beta=number(beta), threshold=number(condition.bound))


@rule("power")
def _power(state: Lowering, call: Any) -> Value:
    x, exponent = state.value(call.args[0]), state.value(call.args[1])
    require(isinstance(exponent, Const) and exponent.type.size == 1, "only with a number as exponent")
    power = float(exponent.data.item())
    if power == 2.0:
        return state.call("multiply", x, x)
    if power == 3.0:
        return state.call("multiply", state.call("multiply", x, x), x)
    require(power in (0.5, -0.5), f"exponent {power}: only 3, 2, 0.5 and -0.5")
    return state.call("sqrt" if power > 0 else "rsqrt", x)


# Quantisation


@rule("quantize")
def _quantize(state: Lowering, call: Any) -> Value:
    scale, zero_point = _grid(state, call)
    unsigned = _kind(call.ty) == "uint8"
    return state.call("qnn.quantize", state.value(call.args[0]), scale=scale, zero_point=zero_point, unsigned=unsigned)


@rule("dequantize")
def _dequantize(state: Lowering, call: Any) -> Value:
    source = call.args[0]
    if type(source).__name__ in ("Var", "DataflowVar") and source.name in state.imported.weights:
        return state.quantized_weight(source.name, call, source.name in state.operands)
    scale, zero_point = _grid(state, call)
    return state.call("qnn.dequantize", state.value(source), scale=scale, zero_point=zero_point)


def _grid(state: Lowering, call: Any) -> tuple[float, int]:
    """(scale, zero point) of activations; uint8 counts from 128 less, which is the same number as int8."""
    scale, zero = (_constant(state, a) for a in call.args[1:3])
    kind = _kind(call.args[0].ty if call.op.name.endswith("dequantize") else call.ty)
    require(kind in ("int8", "uint8"), f"{kind} activations; only int8 and uint8")
    require(scale.size == 1 and zero.size == 1, "activations with a scale per channel; quantise them per tensor")
    value, start = float(np.float32(scale.item())), 128 if kind == "uint8" else 0
    require(0 < value < math.inf, f"the scale {value}")
    require(-128 <= zero.item() - start <= 127, f"the zero point {zero.item()} is no {kind}")
    return value, int(zero.item()) - start


def _kind(type: Any) -> str:
    return str(type.dtype).replace('"', "")


def _constant(state: Lowering, expression: Any) -> np.ndarray:
    if type(expression).__name__ in ("Var", "DataflowVar") and expression.name in state.imported.weights:
        return np.asarray(state.imported.weights[expression.name].data)
    require(type(expression).__name__ == "GenericConst", "a scale or zero point that the model computes")
    return np.asarray(expression.value.numpy())


@rule("astype")
def _astype(state: Lowering, call: Any) -> Value:
    target = str(call.attrs.dtype)
    require("float32" in target, f"a cast to {target}")
    x: Value = state.value(call.args[0])
    return x


@rule("nn.dropout")
def _dropout(state: Lowering, call: Any) -> Any:
    x = state.value(call.args[0])
    return (x, x)


@rule("reshape", "flatten", "squeeze", "expand_dims")
def _reshape(state: Lowering, call: Any) -> Value:
    return state.moved("reshape", state.value(call.args[0]), newshape=result_shape(call))


@rule("permute_dims")
def _permute(state: Lowering, call: Any) -> Value:
    x = state.value(call.args[0])
    axes = ints(call.attrs.axes) if call.attrs.axes is not None else tuple(range(x.type.rank))[::-1]
    return state.moved("transpose", x, axes=tuple(a % x.type.rank for a in axes))


@rule("broadcast_to")
def _broadcast(state: Lowering, call: Any) -> Value:
    return state.call("broadcast_to", state.value(call.args[0]), shape=result_shape(call))


@rule("concat")
def _concat(state: Lowering, call: Any) -> Value:
    parts = state.value(call.args[0])
    return state.call("concatenate", *parts, axis=int(call.attrs.axis or 0) % parts[0].type.rank)


@rule("stack")
def _stack(state: Lowering, call: Any) -> Value:
    parts, out = state.value(call.args[0]), result_shape(call)
    axis = int(call.attrs.axis or 0) % len(out)
    one = (*out[:axis], 1, *out[axis + 1 :])
    return state.call("concatenate", *(state.call("reshape", p, newshape=one) for p in parts), axis=axis)


def _section(state: Lowering, x: Value, axis: int, start: int, stop: int, step: int = 1) -> Value:
    begin, end, strides = [0] * x.type.rank, list(x.type.shape), [1] * x.type.rank
    begin[axis], end[axis], strides[axis] = start, stop, step
    return state.call("slice", x, begin=tuple(begin), end=tuple(end), strides=tuple(strides))


@rule("split")
def _split(state: Lowering, call: Any) -> Any:
    x = state.value(call.args[0])
    if not hasattr(call.ty, "fields"):  # into one part: no tuple
        return x
    axis = int(call.attrs.axis) % x.type.rank
    sizes = [tensor_type_of(t).shape[axis] for t in call.ty.fields]
    starts = np.cumsum([0, *sizes]).tolist()
    return tuple(_section(state, x, axis, a, b) for a, b in zip(starts, starts[1:], strict=False))


@rule("strided_slice")
def _slice(state: Lowering, call: Any) -> Value:
    x: Value = state.value(call.args[0])
    axes, begin, end = (ints(a.value if hasattr(a, "value") else a for a in call.args[i].fields) for i in (1, 2, 3))
    steps = ints(a.value if hasattr(a, "value") else a for a in call.args[4].fields) if len(call.args) > 4 else ()
    for axis, start, stop, step in zip(axes, begin, end, steps or (1,) * len(axes), strict=True):
        require(step > 0, f"a slice with step {step}")
        start, stop, _ = slice(start, stop).indices(x.type.shape[axis])
        require(start < stop, "an empty slice")
        if (start, stop, step) != (0, x.type.shape[axis], 1):
            x = _section(state, x, axis % x.type.rank, start, stop, step)
    return x


@rule("take")
def _take(state: Lowering, call: Any) -> Value:
    """Indexing with numbers."""
    x, given = state.value(call.args[0]), call.args[1]
    require(type(given).__name__ in ("GenericConst", "IntImm", "PrimValue"), "only with constant indices")
    numbers = np.asarray(given.value.numpy() if hasattr(given.value, "numpy") else given.value)
    axis = int(call.attrs.axis or 0) % x.type.rank
    require(numbers.ndim <= 1, "only with one list of indices")
    indices = [int(i) % x.type.shape[axis] for i in numbers.reshape(-1)]
    first, step = indices[0], indices[1] - indices[0] if len(indices) > 1 else 1
    if step > 0 and indices == list(range(first, indices[-1] + 1, step)):
        y = _section(state, x, axis, first, indices[-1] + 1, step)
    else:
        y = state.call("take", x, axis=axis, indices=tuple(indices))
    return state.call("reshape", y, newshape=result_shape(call)) if numbers.ndim == 0 else y


@rule("nn.pad")
def _pad(state: Lowering, call: Any) -> Value:
    require(str(call.attrs.pad_mode) == "constant", f"padding mode {call.attrs.pad_mode}")
    width = ints(call.attrs.pad_width)
    x, value = state.value(call.args[0]), number(call.attrs.pad_value)
    pairs = [(width[2 * d], width[2 * d + 1]) for d in range(x.type.rank)]
    if min(width) < 0:  # negative padding crops
        begin, end = (
            [max(-b, 0) for b, _ in pairs],
            [n - max(-a, 0) for n, (_, a) in zip(x.type.shape, pairs, strict=True)],
        )
        x = state.call("slice", x, begin=tuple(begin), end=tuple(end), strides=(1,) * x.type.rank)
    return state.call("pad", x, pad_width=tuple((max(b, 0), max(a, 0), 0) for b, a in pairs), value=value)


@rule("mean", "sum")
def _reduce(state: Lowering, call: Any) -> Value:
    x: Value = state.value(call.args[0])
    axes = range(x.type.rank) if call.attrs.axis is None else ints(call.attrs.axis)
    axis = tuple(sorted(a % x.type.rank for a in axes))
    if not axis:
        return x
    return state.call(call.op.name.removeprefix("relax."), x, axis=axis, keepdims=bool(call.attrs.keepdims))


@rule("max")
def _max(state: Lowering, call: Any) -> Value:
    """Over rows and columns: global max pooling."""
    x = state.value(call.args[0])
    axes = () if call.attrs.axis is None else tuple(sorted(a % x.type.rank for a in ints(call.attrs.axis)))
    require(x.type.rank == 4 and axes == (2, 3), "only over the rows and columns of a picture")
    y = state.call(
        "nn.max_pool2d", state.call("transpose", x, axes=NHWC), pool_size=x.type.shape[2:], strides=x.type.shape[2:]
    )
    return state.call("reshape", state.call("transpose", y, axes=NCHW), newshape=result_shape(call))


@rule("matmul")
def _matmul(state: Lowering, call: Any) -> Value:
    a, b = state.value(call.args[0]), state.value(call.args[1])
    require(a.type.rank >= 2 and b.type.rank >= 2, "an operand has only one dimension")
    return state.call("matmul", a, b)


@rule("nn.softmax", "nn.log_softmax")
def _softmax(state: Lowering, call: Any) -> Value:
    x = state.value(call.args[0])
    axis, last = int(call.attrs.axis) % x.type.rank, x.type.rank - 1
    name = call.op.name.removeprefix("relax.")
    if axis == last:
        return state.call(name, x)
    axes = tuple(last if d == axis else axis if d == last else d for d in range(x.type.rank))
    return state.call("transpose", state.call(name, state.call("transpose", x, axes=axes)), axes=axes)


# Spatial operators. One dimension is a picture of one row.


def _picture(state: Lowering, x: Value) -> Value:
    """(N, C, H, W) or (N, C, L) -> (N, H, W, C)"""
    require(x.type.rank in (3, 4), f"an input with {x.type.rank} dimensions")
    if x.type.rank == 3:
        x = state.call("reshape", x, newshape=(*x.type.shape[:2], 1, x.type.shape[2]))
    return state.call("transpose", x, axes=NHWC)


def _unpicture(state: Lowering, y: Value, rank: int) -> Value:
    y = state.call("transpose", y, axes=NCHW)
    return y if rank == 4 else state.call("reshape", y, newshape=(*y.type.shape[:2], y.type.shape[3]))


def _pair(values: Any, rank: int, fill: int = 1) -> tuple[int, int]:
    numbers = ints(values)
    return (fill, numbers[0]) if rank == 3 else (numbers[0], numbers[-1])


def _padding(values: Any, rank: int) -> tuple[int, int, int, int]:
    numbers = ints(values)
    if rank == 3:
        return (0, numbers[0], 0, numbers[-1])
    numbers = numbers * (4 // len(numbers)) if len(numbers) != 2 else numbers * 2
    return (numbers[0], numbers[1], numbers[2], numbers[3])


@rule("nn.conv1d", "nn.conv2d", "nn.conv1d_transpose", "nn.conv2d_transpose")
def _conv(state: Lowering, call: Any) -> Value:
    x, w, attrs = state.value(call.args[0]), state.value(call.args[1]), call.attrs
    rank = x.type.rank
    require(str(attrs.data_layout) in ("NCHW", "NCW"), f"layout {attrs.data_layout}")
    if rank == 3:
        w = state.moved("reshape", w, newshape=(*w.type.shape[:2], 1, w.type.shape[2]))
    options: dict[str, Any] = {
        "strides": _pair(attrs.strides, rank),
        "padding": _padding(attrs.padding, rank),
        "dilation": _pair(attrs.dilation, rank),
        "groups": int(attrs.groups),
    }
    name = "nn.conv2d"
    if call.op.name.endswith("transpose"):
        name = "nn.conv2d_transpose"
        options["output_padding"] = _pair(attrs.output_padding, rank, 0)
    y = state.call(name, _picture(state, x), state.moved("transpose", w, axes=NHWC), **options)
    return _unpicture(state, y, rank)


@rule("nn.max_pool1d", "nn.max_pool2d", "nn.avg_pool1d", "nn.avg_pool2d")
def _pool(state: Lowering, call: Any) -> Value:
    x, attrs = state.value(call.args[0]), call.attrs
    rank = x.type.rank
    size, strides = _pair(attrs.pool_size, rank), _pair(attrs.strides, rank)
    given = _padding(attrs.padding, rank)
    require(_pair(attrs.dilation, rank) == (1, 1), "pooling with dilation")
    picture = _picture(state, x)
    out = result_shape(call)[2:] if rank == 4 else (1, result_shape(call)[2])
    # Rounding up the output (ceil_mode) is more padding at the bottom and on the right.
    end = [
        max(given[2 + d], (out[d] - 1) * strides[d] + size[d] - picture.type.shape[1 + d] - given[d]) for d in (0, 1)
    ]
    padding = (given[0], given[1], end[0], end[1])
    if "max" in call.op.name:
        y = state.call("nn.max_pool2d", picture, pool_size=size, strides=strides, padding=padding)
    else:
        include = bool(attrs.count_include_pad) and any(given)
        if include and padding != given:  # the model's own padding counts, that of ceil_mode does not
            around = ((0, 0, 0), (given[0], given[2], 0), (given[1], given[3], 0), (0, 0, 0))
            picture = state.call("pad", picture, pad_width=around)
            padding, include = (0, 0, end[0] - given[2], end[1] - given[3]), False
        y = state.call(
            "nn.avg_pool2d", picture, pool_size=size, strides=strides, padding=padding, count_include_pad=include
        )
    return _unpicture(state, y, rank)


@rule("nn.adaptive_avg_pool1d", "nn.adaptive_avg_pool2d")
def _adaptive(state: Lowering, call: Any) -> Value:
    x = state.value(call.args[0])
    size = result_shape(call)[2:] if x.type.rank == 4 else (1, result_shape(call)[2])
    y = state.call("nn.adaptive_avg_pool2d", _picture(state, x), output_size=size)
    return _unpicture(state, y, x.type.rank)


@rule("image.resize2d")
def _resize(state: Lowering, call: Any) -> Value:
    x, attrs = state.value(call.args[0]), call.attrs
    require(str(attrs.layout) == "NCHW", f"layout {attrs.layout}")
    size, coordinate = result_shape(call)[2:], str(attrs.coordinate_transformation_mode)
    if coordinate == "pytorch_half_pixel":  # of one row it takes the first; PyTorch itself takes the middle
        require(1 not in size or size == x.type.shape[2:], "pytorch_half_pixel to one row or column")
        coordinate = "half_pixel"
    method = {"nearest_neighbor": "nearest", "linear": "linear"}.get(str(attrs.method), "")
    require(
        bool(method) and coordinate in ("half_pixel", "align_corners", "asymmetric"), f"{attrs.method} {coordinate}"
    )
    if method == "nearest":
        rounding = "floor" if coordinate == "asymmetric" else "round_prefer_floor"
        require(str(attrs.rounding_method) == rounding, f"nearest {coordinate} with {attrs.rounding_method}")
    y = state.call("nn.resize2d", _picture(state, x), size=size, method=method, coordinate=coordinate)
    return _unpicture(state, y, 4)


@rule("nn.batch_norm")
def _batch_norm(state: Lowering, call: Any) -> tuple[Value, ...]:
    x, *tensors = (state.value(a) for a in call.args)
    require(not bool(call.attrs.training), "batch norm in training mode")
    axis, rank = int(call.attrs.axis) % x.type.rank, x.type.rank
    forward = (*(d for d in range(rank) if d != axis), axis)
    if axis != rank - 1:
        x = state.call("transpose", x, axes=forward)
    y = state.call("nn.batch_norm", x, *tensors, epsilon=number(call.attrs.epsilon))
    if axis != rank - 1:
        y = state.call("transpose", y, axes=tuple(int(a) for a in np.argsort(forward)))
    return (y, tensors[2], tensors[3])


def _normalize(state: Lowering, x: Value, axis: tuple[int, ...], epsilon: float) -> Value:
    """(x - mean) * rsqrt(variance + epsilon) over the axes"""
    centered = state.call("subtract", x, state.call("mean", x, axis=axis, keepdims=True))
    variance = state.call("mean", state.call("multiply", centered, centered), axis=axis, keepdims=True)
    return state.call("multiply", centered, state.call("rsqrt", state.call("add", variance, state.const(epsilon))))


@rule("nn.layer_norm")
def _layer_norm(state: Lowering, call: Any) -> Value:
    x, gamma, beta = (state.value(a) for a in call.args)
    axis = tuple(sorted(a % x.type.rank for a in ints(call.attrs.axes)))
    require(axis == tuple(range(x.type.rank - len(axis), x.type.rank)), "not over the last dimensions")
    y = _normalize(state, x, axis, number(call.attrs.epsilon))
    return state.call("add", state.call("multiply", y, gamma), beta)


@rule("nn.group_norm", "nn.instance_norm")
def _group_norm(state: Lowering, call: Any) -> Value:
    x, gamma, beta = (state.value(a) for a in call.args)
    batch, channels, *rest = x.type.shape
    groups = int(call.attrs.num_groups) if call.op.name.endswith("group_norm") else channels
    split = state.call("reshape", x, newshape=(batch, groups, channels // groups, *rest))
    y = _normalize(state, split, tuple(range(2, split.type.rank)), number(call.attrs.epsilon))
    y = state.call("reshape", y, newshape=x.type.shape)
    gamma, beta = (state.moved("reshape", t, newshape=(channels, *[1] * len(rest))) for t in (gamma, beta))
    return state.call("add", state.call("multiply", y, gamma), beta)
