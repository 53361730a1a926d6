"""Integers in place of floats that are rounded to integers anyway: a quantised model as the device computes it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from tte.errors import TTEError
from tte.ir import Builder, Const, Graph, Node, Param, TensorType, Value, rewrite
from tte.ir.types import Quant
from tte.ops.quantized import tflite_scale
from tte.passes.autodiff import find_wanted
from tte.passes.simplify import eliminate_dead_code

LOW, HIGH = -128, 127
ACTIVATIONS = ("nn.relu", "clip")
LAYERS = ("nn.conv2d", "nn.dense", "nn.conv2d_transpose", "matmul")
NORMALISING = ("cast", "subtract", "multiply")  # what an input format puts in front of a model
MOVES = ("reshape", "transpose", "slice", "pad", "concatenate")
FRACTION = 20  # bits of fraction in integer additions
NO_INPUT = "its input is not quantised"
NO_ROOM = "32 bits do not hold the sums of so many products"
FLOAT_LAYER = "leave this layer in float32 when the model is quantised, or freeze its weights"


@dataclass(frozen=True)
class Settings:
    """requantize: "fixed" (integers only), "float" (onnxruntime's bits) or "tflite" (CMSIS-NN's).

    storage: of weights that learn.
    """

    requantize: str = "fixed"
    storage: str = "int8_sr"


def lower_qdq(graph: Graph, settings: Settings) -> Graph:
    """Every island between dequantize and quantize that integers can compute becomes integer operators.

        quantize(relu(conv2d(dequantize(x), W, B)))  ->  requantize(qnn.conv2d(x, w, b))

    W and B are float constants or params whose origin knows the user's integers; activations become limits of the
    result. What is no such island stays float32 between explicit conversions.
    """
    return lower_with_notes(graph, settings)[0]


def lower_with_notes(graph: Graph, settings: Settings) -> tuple[Graph, list[str]]:
    """``lower_qdq``, and of what reads int8 but computes in float32: why."""
    state = _State(Builder(), graph, settings)
    for node in graph.nodes:
        result = state.lower(node) if node.op == "qnn.quantize" else None
        if result is None:
            state.keep(node)
        else:
            state.env[node.output.name] = result
    stored = {v.name: v for v in (*graph.params, *graph.consts)} | state.builder.consts | state.stored
    lowered = rewrite(
        graph,
        state.builder.nodes,
        params=tuple(v for v in stored.values() if isinstance(v, Param)),
        consts=tuple(v for v in stored.values() if isinstance(v, Const)),
        outputs=tuple(state.env.get(v.name, v) for v in graph.outputs),
    )
    lowered = eliminate_dead_code(lowered)  # the float form of an island reads weights that are integers now
    return lowered, _write_notes(lowered, state.reasons)


def _write_notes(graph: Graph, reasons: Mapping[tuple[str, str], str]) -> list[str]:
    """One note for each layer whose weights are int8 in the model; one for all other operators of a kind.

    reasons: (layer, operator) -> why no rule made integers of it
    """
    weights: list[Param | Const] = [*graph.params, *graph.consts]
    stored = {v.name for v in weights if v.origin is not None and v.origin.quantized is not None}
    producer = graph.producer()

    def is_stored(value: Value) -> bool:
        node = producer.get(value.name)
        return value.name in stored or (
            node is not None and node.op == "concatenate" and all(map(is_stored, node.inputs))
        )

    def is_integer(value: Value) -> bool:
        node = producer.get(value.name)
        return node is not None and (
            node.op == "qnn.dequantize" or (node.op in (*MOVES, "take") and any(map(is_integer, node.inputs)))
        )

    layers: dict[str, str] = {}
    others: dict[tuple[str, str], int] = {}
    for node in graph.nodes:
        reason = reasons.get((node.layer, node.op))
        if node.op in LAYERS and any(map(is_stored, node.inputs[1:])):
            layers[node.layer] = reason or "its result is not quantised"
        elif reason and node.op not in MOVES and any(map(is_integer, node.inputs)):
            others[node.op, reason] = others.get((node.op, reason), 0) + 1
    notes = [f"{name}: computes in float32, though its weights are int8: {why}" for name, why in layers.items()]
    return notes + [f"{op} ({count} in the model) computes in float32: {why}" for (op, why), count in others.items()]


def keep_saturation_masks(graph: Graph) -> Graph:
    """Where the backward program has to pass a clamp, the forward program notes what the clamp let through."""
    wanted = find_wanted(graph)
    builder = Builder()
    nodes = []
    for node in graph.nodes:
        if "mask" in node.attrs and any(v.name in wanted for v in node.inputs):
            bits = builder.fresh(TensorType(node.output.type.shape, "bit"))
            node = replace(node, attrs=node.attrs | {"mask": True}, outputs=(node.output, bits))
        nodes.append(node)
    return rewrite(graph, nodes)


def drop_saturation_masks(graph: Graph) -> Graph:
    """Nobody notes what a clamp let through where nobody reads it."""
    read = graph.uses().keys() | {v.name for v in graph.lasting}
    nodes = []
    for node in graph.nodes:
        if len(node.outputs) == 2 and node.outputs[1].type.dtype == "bit" and node.outputs[1].name not in read:
            node = _drop_mask(node)
        nodes.append(node)
    return rewrite(graph, nodes)


def _drop_mask(node: Node) -> Node:
    """``node``, or the last member of a region, without its second result."""
    if node.body is None:
        return replace(node, attrs=node.attrs | {"mask": False}, outputs=node.outputs[:1])
    *members, last = node.body.nodes
    body = replace(node.body, nodes=(*members, _drop_mask(last)), outputs=node.body.outputs[:1])
    return replace(node, body=body, outputs=node.outputs[:1])


@dataclass
class _State:
    """The graph that is being written; ``env`` maps old values to new ones."""

    builder: Builder
    graph: Graph
    settings: Settings
    env: dict[str, Value] = field(default_factory=dict)
    stored: dict[str, Param | Const] = field(default_factory=dict)
    reasons: dict[tuple[str, str], str] = field(default_factory=dict)
    layer: str = ""

    def __post_init__(self) -> None:
        self.producer = self.graph.producer()
        self.uses = self.graph.uses()
        self.outputs = {v.name for v in self.graph.outputs}

    @property
    def as_onnxruntime(self) -> bool:
        """Its bits are wanted: it averages in float32, but for global average pooling."""
        return self.settings.requantize == "float"

    def call(self, op: str, *inputs: Value, **attrs: object) -> Value:
        return self.builder.call(op, *inputs, layer=self.layer, **attrs)

    def keep(self, node: Node) -> None:
        outputs = tuple(self.builder.fresh(v.type) for v in node.outputs)
        inputs = tuple(self.env.get(v.name, v) for v in node.inputs)
        self.builder.append(replace(node, inputs=inputs, outputs=outputs))
        self.env |= {old.name: new for old, new in zip(node.outputs, outputs, strict=True)}

    def lower(self, node: Node) -> Value | None:
        """The integer form of what ends in this quantize node, or None."""
        target = _Target.of(node)
        value = node.inputs[0]
        while (source := self.producer.get(value.name)) and source.op in ACTIVATIONS and self.read_once(value):
            target = target.limited(source)
            value = source.inputs[0]
        if source is None:
            return None
        self.layer = source.layer
        rules: dict[str, Callable[[Node, _Target], Value | str]]
        rules = {"nn.conv2d": self.linear, "nn.dense": self.linear, "add": self.add, "mean": self.mean}
        rules |= {"nn.avg_pool2d": self.average, "nn.max_pool2d": self.maximum, "qnn.dequantize": self.rescale}
        rules |= dict.fromkeys(MOVES, self.move) | dict.fromkeys(NORMALISING, self.normalised)
        if not self.read_once(value):
            while source.op in ACTIVATIONS and source.inputs[0].name in self.producer:
                source = self.producer[source.inputs[0].name]
            found: Value | str = "something reads its result before it is quantised"
        else:
            rule = rules.get(source.op)
            found = rule(source, target) if rule else f"integers do not compute {source.op}"
        if isinstance(found, Value):
            return found
        self.reasons[source.layer, source.op] = found
        return None

    def read_once(self, value: Value) -> bool:
        return len(self.uses[value.name]) == 1 and value.name not in self.outputs

    def integers(self, value: Value) -> Value | None:
        """The int8 value that ``value`` is the real form of: dequantized, and moved since then perhaps."""
        node = self.producer.get(value.name)
        if node is None:
            return None
        if node.op == "qnn.dequantize":
            return self.env.get(node.inputs[0].name, node.inputs[0])
        if node.op not in ("reshape", "transpose", "slice", "take") or (x := self.integers(node.inputs[0])) is None:
            return None
        return self.call(node.op, x, **node.attrs)

    # --- one rule per operator: (node in front of the activations, what its result becomes) -> int8 value, or why not

    def linear(self, node: Node, target: "_Target") -> Value | str:
        x = self.integers(node.inputs[0])
        weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
        if x is None:
            return NO_INPUT
        if not self.has_grid(weight):
            shared = len(self.uses[weight.name]) > 1
            return "another layer reads its weight too" if shared else "its weight has no scale per output channel"
        x_scale, zero_point = _scale(x), _zero(x)
        scales = np.asarray(self.grid(weight))
        if bias is not None and not self.has_unit(bias, scales * x_scale):
            shared = len(self.uses[bias.name]) > 1
            return "another layer learns its bias too" if shared else "its bias is not in units of its products"
        limit = bias_limit(weight, self.producer)
        if limit < 0:
            raise _refuse(NO_ROOM, self.layer, FLOAT_LAYER)
        b = None if bias is None else self.bias(bias, scales * x_scale, limit, target.scale)
        w = self.weight(weight)
        attrs = dict(node.attrs) | {"zero_point": zero_point}
        acc = self.call(f"q{node.op}", x, w, *([b] if b else []), **attrs)
        return self.requantize(acc, scales * x_scale, target)

    def add(self, node: Node, target: "_Target") -> Value | str:
        a, b = (self.integers(v) for v in node.inputs)
        if a is None or b is None:
            return NO_INPUT
        if a.type.shape != b.type.shape:
            return "its operands differ in shape"
        bits = 0
        if self.settings.requantize == "fixed":
            largest = max(_scale(a), _scale(b)) / target.scale
            bits = min(FRACTION, 20 - max(0, int(np.ceil(np.log2(largest)))))
            if bits < 8:
                return "its result is too fine for its operands"
        scales = {"a_scale": _scale(a), "a_zero": _zero(a), "b_scale": _scale(b), "b_zero": _zero(b)}
        return self.call("qnn.add", a, b, **scales, **target.attrs, bits=bits,
                         unsigned=target.unsigned, tflite=self.settings.requantize == "tflite")  # fmt: skip

    def mean(self, node: Node, target: "_Target") -> Value | str:
        x = self.integers(node.inputs[0])
        if x is None:
            return NO_INPUT
        if self.as_onnxruntime and not node.attrs["keepdims"]:
            return "so does onnxruntime's"
        attrs = {"axis": node.attrs["axis"], "keepdims": node.attrs["keepdims"]}
        return self.averaged("qnn.sum", x, attrs, x.type.size // node.output.type.size, target)

    def average(self, node: Node, target: "_Target") -> Value | str:
        x = self.integers(node.inputs[0])
        attrs = dict(node.attrs)
        if x is not None and self.as_onnxruntime:
            return self.quantized(self.env[node.output.name], target, zero_first=True)
        if x is None:
            return NO_INPUT
        if any(attrs["padding"]) and not attrs["count_include_pad"]:  # type: ignore[arg-type]
            return "its windows differ in size"
        attrs.pop("count_include_pad")
        count = int(np.prod(attrs["pool_size"]))  # type: ignore[arg-type]
        return self.averaged("qnn.sum_pool2d", x, attrs, count, target)

    def normalised(self, node: Node, target: "_Target") -> Value | str:
        """(x - mean) / std of an input that is bytes."""
        factor, offset, x = np.ones(1), np.zeros(1), node.output
        while (source := self.producer.get(x.name)) and source.op != "cast":
            constant = source.inputs[1] if source.op in NORMALISING else x
            if not isinstance(constant, Const) or not self.read_once(x):
                return NO_INPUT
            by = constant.data.astype(np.float64)
            if source.op == "multiply":
                factor = factor * by
            else:
                offset = offset - by * factor
            x = source.inputs[0]
        if source is None or source.inputs[0].type.dtype not in ("uint8", "int8"):
            return NO_INPUT
        if self.as_onnxruntime:
            return "onnxruntime's bits are wanted"
        factor, offset = factor / target.scale, offset / target.scale
        largest = 255 * float(np.abs(factor).max()) + float(np.abs(offset).max()) + 1
        bits = 30 - math.ceil(math.log2(largest))
        if bits < 8:
            return "its result is too fine for bytes"
        constants = [self.builder.const(np.rint(v * 2.0**bits).astype(np.int32)) for v in (factor, offset)]
        return self.call("qnn.affine", source.inputs[0], *constants, **target.attrs, bits=bits)

    def maximum(self, node: Node, target: "_Target") -> Value | str:
        x = self.integers(node.inputs[0])
        return NO_INPUT if x is None else self.rescaled(self.call(node.op, x, **node.attrs), target)

    def move(self, node: Node, target: "_Target") -> Value | str:
        """Operators that only move elements; what differs in scale is brought to the result's before."""
        found = [self.integers(v) for v in node.inputs]
        xs = [x for x in found if x is not None]
        attrs = dict(node.attrs)
        if len(xs) < len(found) or (node.op == "pad" and attrs["value"] != 0.0):
            return NO_INPUT
        if any(not target.holds(x) for x in xs):
            xs = [self.rescaled(x, target) for x in xs]
        if node.op == "pad":
            attrs["value"] = float(_zero(xs[0]))
        return self.call(node.op, *xs, **attrs)

    def rescale(self, node: Node, target: "_Target") -> Value:
        return self.rescaled(self.env.get(node.inputs[0].name, node.inputs[0]), target)

    def rescaled(self, x: Value, target: "_Target") -> Value:
        """x with another scale or other limits: itself where nothing changes."""
        if target.holds(x):
            return x
        if self.as_onnxruntime:
            real = self.call("qnn.dequantize", x, scale=_scale(x), zero_point=_zero(x))
            return self.quantized(real, target)
        acc = self.call("qnn.sum", x, axis=(), zero_point=_zero(x))
        return self.requantize(acc, np.asarray([_scale(x)]), target)

    def quantized(self, x: Value, target: "_Target", zero_first: bool = False) -> Value:
        return self.call("qnn.quantize", x, **target.attrs, unsigned=target.unsigned, zero_first=zero_first)

    def averaged(self, sums: str, x: Value, attrs: Mapping[str, object], count: int, target: "_Target") -> Value:
        """Means of ``count`` elements each; ``sums``: the operator that adds them up."""
        if self.settings.requantize == "tflite" and (_scale(x), _zero(x)) == (target.scale, target.zero_point):
            acc = self.call(sums, x, **attrs)
            shift = 2 if count < 3 else 0
            multiplier = np.asarray([-(-(2 ** (32 - shift)) // count)], np.int32)
            constants = self.builder.const(multiplier)
            ratio = {"shift": shift, "ratio": 1.0 / count}
            return self.call("qnn.requantize", acc, constants, **target.attrs, **ratio, average=True)
        acc = self.call(sums, x, **attrs, zero_point=_zero(x))
        # In float32 the order of the divisions is onnxruntime's.
        mean = np.float32(_scale(x)) / np.float32(count) if self.as_onnxruntime else _scale(x) / count
        return self.requantize(acc, np.asarray([mean]), target, ratio=1.0 / count)

    def requantize(self, acc: Value, scales: np.ndarray, target: "_Target", ratio: float = 1.0) -> Value:
        """Accumulators, each standing for ``scales`` times itself, as int8."""
        if self.as_onnxruntime:
            multiplier = scales.astype(np.float32) / np.float32(target.scale)
            return self.call("qnn.requantize", acc, self.builder.const(multiplier), **target.attrs, ratio=ratio)
        real = scales / target.scale
        attrs = target.attrs | {"ratio": ratio}
        largest = float(real.max())
        if largest >= 128:
            raise _refuse(
                f"the scale of the result, {target.scale:g}, is {largest:.3g} times finer than that of the sums",
                self.layer,
                "use `requantize: float`, or calibrate again",
            )
        if self.settings.requantize == "tflite":
            parts = [self.builder.const(v) for v in tflite_scale(real)]
            return self.call("qnn.requantize", acc, *parts, **attrs)
        multiplier, shift = fixed_scale(real)
        return self.call("qnn.requantize", acc, self.builder.const(multiplier), **attrs, shift=shift)

    # --- weights ------------------------------------------------------------------------------------------------

    def has_grid(self, value: Value) -> bool:
        """Weights whose integers are known, one scale per output channel, read here only."""
        node = self.producer.get(value.name)
        if node is not None and node.op == "concatenate":
            return all(self.has_grid(v) for v in node.inputs)
        stored = isinstance(value, Param | Const) and value.origin is not None and value.origin.quantized is not None
        return stored and value.name not in self.outputs and len(self.uses[value.name]) == 1 and _per_channel(value)  # type: ignore[arg-type]

    def grid(self, value: Value) -> list[float]:
        """One scale per output channel."""
        node = self.producer.get(value.name)
        if node is None:
            return _channel_grid(value)  # type: ignore[arg-type]
        parts = [self.grid(v) for v in node.inputs]
        return [s for part in parts for s in part] if node.attrs["axis"] == 0 else parts[0]

    def weight(self, value: Value, fraction: bool = False) -> Value:
        """The integers of a weight: int8, or what the scheme stores in place of a param's.

        fraction: int16 with eight bits of fraction, as another part of the same weight has them.
        """
        storage = self.settings.storage
        node = self.producer.get(value.name)
        if node is not None:
            parts = [self.weight(v, storage == "int16_ef") for v in node.inputs]
            return self.call("concatenate", *parts, **node.attrs)
        assert isinstance(value, Param | Const)
        integers = _integers(value)
        if integers.min(initial=0) < LOW or integers.max(initial=0) > HIGH:
            raise _refuse("weights beyond int8", value.name, "quantise weights to int8")
        learns = isinstance(value, Param)
        data: np.ndarray = integers.astype(np.int8)
        if fraction or (learns and storage == "int16_ef"):
            data = integers.astype(np.int16) * 256 + 128
        elif learns and storage == "fp32":
            data = integers.astype(np.float32)
        stored = self.stored[value.name] = _store(value, data, Quant(tuple(_channel_grid(value)), 0, 0))
        return self.call("qnn.round", stored) if stored.type.dtype == "float32" else stored

    def has_unit(self, bias: Value, scales: np.ndarray) -> bool:
        """Whether a bias is real numbers, or integers in units of the accumulators."""
        shared = len(self.uses[bias.name]) > 1  # several layers, each with its own units
        if not isinstance(bias, Const if shared else Param | Const):
            return False
        if bias.origin is None or bias.origin.quantized is None:
            return True
        return np.allclose(_channel_grid(bias), scales, rtol=1e-5, atol=0)

    def bias(self, value: Value, scales: np.ndarray, limit: int, step: float) -> Value:
        """The bias as int32 in units of the accumulators, whose sums have room beside it up to ``limit``.

        step: of the result. Channels that mean nothing have biases at the ends of int32: what they lose is less.
        """
        assert isinstance(value, Param | Const)
        if value.origin is not None and value.origin.quantized is not None:
            integers = _integers(value).astype(np.int64)
        else:
            integers = np.rint(value.data.astype(np.float64) / scales).astype(np.int64)
        if ((np.abs(integers) - limit) * scales > step / 2).any():
            raise _refuse(NO_ROOM, self.layer, FLOAT_LAYER)
        data = np.clip(integers, -limit, limit).astype(np.int32)
        if len(self.uses[value.name]) > 1:
            value = replace(value, name=f"{value.name}.{self.layer}.{len(self.stored)}")
        self.stored[value.name] = _store(value, data, Quant(tuple(float(s) for s in scales), 0, 0))
        return self.stored[value.name]


def bias_limit(weight: Value, producer: Mapping[str, Node]) -> int:
    """How far a bias goes while the largest sum of |w| |x - z| still fits beside it into 32 bits; negative: nowhere.

    What any weights of this shape leave, unless that is less than half: layers of one shape share a kernel for steps.
    """
    worst = 255 * 128 * (weight.type.size // weight.type.shape[0])
    return 2**31 - 1 - (worst if worst <= 2**30 else _reach(weight, producer))


def _reach(weight: Value, producer: Mapping[str, Node]) -> int:
    """The largest sum of |w| |x - z| of any output. What learns may become whatever int8 holds."""
    if (node := producer.get(weight.name)) is not None:
        parts = [_reach(v, producer) for v in node.inputs]
        return max(parts) if node.attrs.get("axis") == 0 else sum(parts)
    if isinstance(weight, Const):
        return 255 * int(np.abs(_integers(weight).astype(np.int64)).reshape(weight.type.shape[0], -1).sum(1).max())
    return 255 * 128 * (weight.type.size // weight.type.shape[0])


def fixed_scale(real: np.ndarray) -> tuple[np.ndarray, int]:
    """(multiplier, shift): real = multiplier / 2^(32 - shift), for reals below 128.

    With 22 bits fewer than 1e-5 of int8 results are off by one. A negative shift costs an instruction: there is none
    where all channels, but for those 4096 times finer than the coarsest, have those bits without it.
    """
    shift = int(np.clip(np.ceil(np.log2(real.max() * 2 + 2**-40)), -16, 8))
    if real[real > real.max() * 2**-12].min() >= 2**-10:
        shift = max(shift, 0)
    multiplier: np.ndarray = np.rint(real * 2.0 ** (32 - shift)).clip(0, 2**31 - 1).astype(np.int32)
    return multiplier, shift


@dataclass(frozen=True)
class _Target:
    """What a quantize node makes of real numbers."""

    scale: float
    zero_point: int
    low: int
    high: int
    unsigned: bool

    @staticmethod
    def of(node: Node) -> "_Target":
        a = node.attrs
        low, high, unsigned = int(a["low"]), int(a["high"]), bool(a["unsigned"])  # type: ignore[arg-type]
        return _Target(float(a["scale"]), int(a["zero_point"]), low, high, unsigned)  # type: ignore[arg-type]

    @property
    def attrs(self) -> dict[str, object]:
        return {"scale": self.scale, "zero_point": self.zero_point, "low": self.low, "high": self.high}

    def limited(self, activation: Node) -> "_Target":
        """With the limits of an activation in front of it."""
        low = float(activation.attrs.get("min", 0.0))  # type: ignore[arg-type]
        high = float(activation.attrs.get("max", np.inf))  # type: ignore[arg-type]
        return replace(self, low=max(self.low, self.integer(low)), high=min(self.high, self.integer(high)))

    def integer(self, real: float) -> int:
        if np.isinf(real):
            return LOW if real < 0 else HIGH
        return int(np.clip(np.rint(np.float32(real) / np.float32(self.scale)) + self.zero_point, LOW, HIGH))

    def holds(self, x: Value) -> bool:
        """x has this scale, and limits change nothing."""
        return (_scale(x), _zero(x), self.low, self.high) == (self.scale, self.zero_point, LOW, HIGH)


def _scale(x: Value) -> float:
    assert x.type.quant is not None
    return x.type.quant.scale[0]


def _zero(x: Value) -> int:
    assert x.type.quant is not None
    return x.type.quant.zero_point


def _per_channel(value: Param | Const) -> bool:
    """One scale per output channel, which is the first axis."""
    assert value.origin is not None and value.origin.scale is not None
    rows = value.origin.scale.reshape(value.type.shape[0], -1)
    return bool((rows == rows[:, :1]).all())


def _channel_grid(value: Param | Const) -> list[float]:
    assert value.origin is not None and value.origin.scale is not None
    return [float(row[0]) for row in value.origin.scale.reshape(value.type.shape[0], -1)]


def _integers(value: Param | Const) -> np.ndarray:
    assert value.origin is not None and value.origin.quantized is not None
    integers: np.ndarray = value.origin.quantized.reshape(-1)[value.origin.index]
    return integers


def _store(value: Param | Const, data: np.ndarray, quant: Quant) -> Param | Const:
    """The same weight as integers. What the user has are integers too, or else reals: then ours are reals / scale."""
    origin = value.origin
    if origin is not None:
        scale = None
        if origin.quantized is None:
            scale = (1.0 if origin.scale is None else origin.scale) / np.asarray(quant.scale)
        origin = replace(origin, scale=scale)
    type = TensorType(value.type.shape, str(data.dtype), quant)
    return (Param if isinstance(value, Param) else Const)(value.name, type, np.ascontiguousarray(data), origin)


def _refuse(what: str, where: str, fix: str) -> TTEError:
    return TTEError("TTE-E080", f"quantisation that tte does not compute: {what}", where=where, fix=fix)
