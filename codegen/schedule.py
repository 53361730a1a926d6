"""Chooses a kernel for every node: which template, with which shapes, operands and elementwise tail."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tte.ir import OPS, Const, Graph, Node, TensorType, Value
from tte.ir.rows import Stream, find_stream
from tte.ops.resize import resize_taps

CTYPES = {
    "float32": "float",
    "int8": "int8_t",
    "uint8": "uint8_t",
    "int16": "int16_t",
    "int32": "int32_t",
    "bit": "uint8_t",
}


@dataclass(frozen=True)
class Kernel:
    """A C function to be: equal (template, context) are one function.

    context: all the template may know (JSON-like):
      ins     one record per operand of the anchor: {c, shape, dtype, segments: [{c, start, stop}], axis, literal}
      out     {shape, dtype, ctype} of the value that is stored
      attrs   of the anchor
      acc     C type of the anchor's result
      tail    elementwise steps behind the anchor: {op, attrs, operands}; see ``_operand``
      args    pointers in the order of the call: {c, ctype, const}
      rows    of a kernel that makes one row: pointer -> how many rows there are, where it is a ring
    parts: kernels that it calls
    """

    template: str
    context: str
    parts: tuple["Kernel", ...] = ()

    def arguments(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(self.context)
        return result


@dataclass(frozen=True)
class Call:
    """A kernel applied to values: inputs (in the order of the pointers), then outputs.

    taken: the operand whose buffer the first output takes over; it is reached through the output's pointer.
    scratch: it has memory of its own, by a last pointer.
    """

    node: int
    kernel: Kernel
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    taken: Value | None = None
    scratch: bool = False


def schedule(graph: Graph) -> list[Call]:
    """One call per node that does work; views (another shape for the same bytes) do none."""
    views: dict[str, str] = {}  # name of a view -> name of the value whose bytes it shows
    calls = []
    for i, node in enumerate(graph.nodes):
        if node.body is None and OPS[node.op].kind == "view":
            views[node.output.name] = views.get(node.inputs[0].name, node.inputs[0].name)
        elif stream := find_stream(node):
            calls.append(_stream(i, node, stream))
        else:
            calls.append(_call(i, node, views))
    return calls


def _stream(index: int, node: Node, stream: Stream) -> Call:
    """A kernel that calls others, row by row."""
    assert node.body
    outer = dict(zip([v.name for v in node.body.inputs], node.inputs, strict=True))
    expressions = {v.name: f"y{i}" for i, v in enumerate(node.body.outputs)}
    args: dict[str, Value] = {}
    parts, steps = [], []
    for member, demands in zip(node.body.nodes, stream.demands, strict=True):
        call = _call(index, member, {}, outer, stream.rings)
        arguments = []
        for value in (*call.inputs, *call.outputs):
            if value.name in outer and value.name not in expressions:
                expressions[value.name] = f"a{len(args)}"
                args[expressions[value.name]] = outer[value.name]
            if value.name in stream.rings:
                ctype, offset = CTYPES[value.type.dtype], stream.offsets[value.name]
                expressions[value.name] = f"({ctype} *)(void *)(scratch + {offset})"
            arguments.append(expressions[value.name])
        parts.append(call.kernel)
        height = member.output.type.shape[1]
        needs = [{"maker": d.maker, "height": d.height} | asdict(d.window) for d in demands]
        steps.append({"arguments": arguments, "height": height, "needs": needs})
    pointers = [{"c": c, "ctype": CTYPES[v.type.dtype], "const": True} for c, v in args.items()]
    pointers += [{"c": f"y{i}", "ctype": CTYPES[v.type.dtype], "const": False} for i, v in enumerate(node.outputs)]
    if stream.rings:
        pointers.append({"c": "scratch", "ctype": "uint8_t", "const": False})
    context = {"args": pointers, "steps": steps, "rest": stream.rest, "rows": None, "tail": []}
    kernel = Kernel("stream", json.dumps(context, sort_keys=True), tuple(parts))
    return Call(index, kernel, tuple(args.values()), node.outputs, scratch=bool(stream.rings))


@dataclass(frozen=True)
class _Parts:
    """A node taken apart: split weights, the operator with a kernel of its own (or none), what follows it."""

    weights: dict[str, Node]
    anchor: Node | None
    tail: tuple[Node, ...]


def _take_apart(node: Node) -> _Parts:
    members = node.body.nodes if node.body else (node,)
    weights = {m.output.name: m for m in members if m.op == "concatenate" and m is not members[-1]}
    rest = [m for m in members if m.output.name not in weights]
    anchor = None if OPS[rest[0].op].kind == "elementwise" and rest[0].output.type.dtype != "bit" else rest[0]
    return _Parts(weights, anchor, tuple(rest if anchor is None else rest[1:]))


def _call(
    index: int,
    node: Node,
    views: Mapping[str, str],
    around: Mapping[str, Value] | None = None,
    rings: Mapping[str, int] | None = None,
) -> Call:
    """``rings``: the kernel makes one row, and of these values there are so many rows; ``around``: what the operands of
    a node inside of a region stand for."""
    parts = _take_apart(node)
    outer = dict(zip([v.name for v in node.body.inputs], node.inputs, strict=True)) if node.body else {}
    pointers: dict[str, Value] = {}  # C name -> value
    taken = node.overwrites.get(node.output.name)

    def bytes_of(value: Value) -> str:
        return views.get(value.name, value.name)

    def pointer(value: Value) -> str:
        value = outer.get(value.name, value)
        if taken is not None and bytes_of(value) == bytes_of(taken):
            return "y0"  # two restrict pointers must not meet
        for c, known in pointers.items():
            if known.name == value.name:
                return c
        pointers[f"a{len(pointers)}"] = value
        return f"a{len(pointers) - 1}"

    def literal(value: Value) -> float | int | None:
        value = outer.get(value.name, value)
        value = (around or {}).get(value.name, value)
        return value.data.item() if isinstance(value, Const) and value.type.size == 1 else None

    out = node.output.type
    context: dict[str, Any] = {"attrs": {}, "ins": []}
    if parts.anchor is not None:
        context["attrs"] = {k: _plain(v) for k, v in parts.anchor.attrs.items()}
        for value in parts.anchor.inputs:
            whole = value.name not in parts.weights
            pieces = (value,) if whole else parts.weights[value.name].inputs
            axis = 0 if whole else parts.weights[value.name].attrs["axis"]
            assert isinstance(axis, int)
            segments, start = [], 0
            for piece in pieces:
                stop = start + (piece.type.shape[axis] if piece.type.rank else 1)
                segments.append({"c": pointer(piece), "start": start, "stop": stop})
                start = stop
            context["ins"].append(_tensor(value.type) | {"c": segments[0]["c"], "segments": segments, "axis": axis})
    names = {} if parts.anchor is None else {parts.anchor.output.name: "acc"}
    context["acc"] = "" if parts.anchor is None else CTYPES[parts.anchor.output.type.dtype]
    operands: list[dict[str, Any]] = []
    tail = []
    for k, step in enumerate(parts.tail):
        arguments: list[dict[str, Any]] = []
        for value in step.inputs:
            if value.name in names:
                arguments.append({"kind": "register", "c": names[value.name]})
            elif (number := literal(value)) is not None:
                arguments.append({"kind": "literal", "value": number, "dtype": value.type.dtype})
            else:
                operand = _operand(value.type, out) | {"c": pointer(value), "name": f"v{k}_{len(arguments)}"}
                arguments.append(operand)
                operands.append(operand)
        attrs = {key: _plain(v) for key, v in step.attrs.items()} | {"types": [v.type.dtype for v in step.inputs]}
        ctype = CTYPES[step.output.type.dtype]
        macro = step.op.replace(".", "_")
        tail.append({"op": macro, "attrs": attrs, "operands": arguments, "name": f"t{k}", "ctype": ctype})
        names[step.output.name] = f"t{k}"
    if parts.anchor is None:
        shape = out.shape if rings is None else (1, 1, *out.shape[2:])
        context["loops"] = _collapse(shape, operands)
    context["taps"] = _taps(parts.anchor)
    context["tail"] = tail
    context["out"] = _tensor(out)
    context["outs"] = [_tensor(v.type) for v in node.outputs]
    args = [{"c": c, "ctype": CTYPES[v.type.dtype], "const": True} for c, v in pointers.items()]
    args += [{"c": f"y{i}", "ctype": CTYPES[v.type.dtype], "const": False} for i, v in enumerate(node.outputs)]
    context["args"] = args
    context["rows"] = None
    if rings is not None:
        outputs = {f"y{i}": v for i, v in enumerate(node.outputs)}
        context["rows"] = {c: rings[v.name] for c, v in (pointers | outputs).items() if v.name in rings}
    template = "elementwise_loop" if parts.anchor is None else _variant(parts.anchor)
    kernel = Kernel(template, json.dumps(context, sort_keys=True))
    return Call(index, kernel, tuple(pointers.values()), node.outputs, taken)


def _variant(anchor: Node) -> str:
    """The template of an operator; a depthwise convolution has its own."""
    name = anchor.op.removeprefix("q").removeprefix("nn.")
    if name in ("conv2d", "conv2d_transpose"):
        groups = anchor.attrs["groups"]
        if groups != 1 and groups == anchor.inputs[0].type.shape[3]:
            return f"depthwise_{name}"
    return name


def _taps(anchor: Node | None) -> list[dict[str, Any]]:
    """For resizing: per axis, which two input elements each output element mixes, and the weight of the second."""
    if anchor is None or anchor.op not in ("nn.resize2d", "nn.resize2d_grad"):
        return []
    small, large = anchor.inputs[0].type.shape, anchor.output.type.shape
    if anchor.op == "nn.resize2d_grad":
        small, large = large, small
    method, coordinate = str(anchor.attrs["method"]), str(anchor.attrs["coordinate"])
    axes = (resize_taps(small[d], large[d], method, coordinate) for d in (1, 2))
    return [
        {"low": [t[0] for t in taps], "high": [t[1] for t in taps], "weight": [t[2] for t in taps]} for taps in axes
    ]


def _tensor(type: TensorType) -> dict[str, Any]:
    return {
        "shape": list(type.shape),
        "strides": _strides(type.shape),
        "size": type.size,
        "dtype": type.dtype,
        "ctype": CTYPES[type.dtype],
    }


def _plain(value: Any) -> Any:
    """An attribute as JSON holds it; C prints numbers as Python's, so none may be numpy's, or too large for an int."""
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    assert type(value) in (str, int, float, bool), f"an attribute is {value!r}, a {type(value).__name__}"
    assert not isinstance(value, int) or -(2**31) <= value < 2**31, f"the attribute {value} does not fit int32_t"
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value


def _operand(type: TensorType, out: TensorType) -> dict[str, Any]:
    """How an elementwise step reads a tensor: at the flat index, or through strides (0 where it broadcasts)."""
    if type.shape == out.shape:
        return {"kind": "flat", "dtype": type.dtype, "strides": _strides(out.shape)}
    shape = (1,) * (len(out.shape) - type.rank) + type.shape
    strides = [0 if d == 1 else s for d, s in zip(shape, _strides(shape), strict=True)]
    return {"kind": "strided", "dtype": type.dtype, "strides": strides}


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _collapse(shape: tuple[int, ...], operands: list[dict[str, Any]]) -> list[int]:
    """Fewest nested loops that serve all operands: merges neighbouring dimensions where every stride allows it.

    Rewrites the operands' strides to the merged dimensions; returns their lengths.
    """
    strides = [_strides(shape), *(o["strides"] for o in operands)]
    dims = [d for d in range(len(shape)) if shape[d] != 1]
    merged: list[list[int]] = []
    for d in dims:
        outer = merged[-1][-1] if merged else None
        if outer is not None and all(s[outer] == s[d] * shape[d] for s in strides):
            merged[-1].append(d)
        else:
            merged.append([d])
    for operand in operands:
        operand["strides"] = [operand["strides"][group[-1]] for group in merged]
    return [math.prod(shape[d] for d in group) for group in merged]
