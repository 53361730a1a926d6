"""Chooses a kernel for every node: which template, with which shapes, operands and elementwise tail."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from tte.codegen.fast import DSP, NOTHING, Forms, quicken
from tte.codegen.kernel import CTYPES, SCRATCH, Kernel
from tte.codegen.measured import Measured
from tte.ir import OPS, Const, Graph, Node, TensorType, Value, find_anchor
from tte.ir.rows import Demand, Pieces, Stream, count_rows, find_stream
from tte.ir.tiles import Cut, Tiles, find_tiles, spread_cuts
from tte.ops.resize import resize_taps


@dataclass(frozen=True)
class Call:
    """A kernel applied to values: inputs (in the order of the pointers), then outputs.

    An operand whose buffer an output takes over is reached through that output's pointer.
    members: of a region in pieces, for each part of the kernel the node that it makes pieces of
    parts: of such a kernel, its calls
    """

    node: int
    kernel: Kernel
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    members: tuple[Node, ...] = ()
    parts: tuple["Call", ...] = ()


Room = Mapping[int, int]  # node -> bytes of scratch that faster kernels may use there
UNLIMITED = 1 << 62  # bytes


@dataclass(frozen=True)
class _Choice:
    """How a call is made faster: bytes of scratch that there is room for, or None; by what is chosen."""

    room: int | None
    measured: Measured
    optimize: str
    forms: Forms

    def quicken(self, call: Call) -> Call:
        """The same by the best kernel whose scratch there is room for."""
        if self.room is None:
            return call
        return replace(call, kernel=quicken(call.kernel, self.room, self.measured, self.optimize, self.forms))


def schedule(
    graph: Graph,
    room: Room | None = None,
    measured: Measured = NOTHING,
    optimize: str = "speed",
    forms: Forms = DSP,
) -> list[Call]:
    """One call per node that does work; views (another shape for the same bytes) do none.

    room: where kernels for some cores may be chosen; None for portable ones
    measured: by what they are chosen
    optimize: "speed", or "size" for kernels whose code serves many shapes
    forms: among which
    """
    views: dict[str, str] = {}  # name of a view -> name of the value whose bytes it shows
    calls = []
    for i, node in enumerate(graph.nodes):
        choice = _Choice(room.get(i, 0) if room is not None else None, measured, optimize, forms)
        if node.body is None and OPS[node.op].kind == "view":
            views[node.output.name] = views.get(node.inputs[0].name, node.inputs[0].name)
        elif stream := find_stream(node):
            calls.append(_stream(i, node, stream, choice))
        elif tiles := find_tiles(node):
            calls.append(_tiles(i, node, tiles, choice))
        else:
            calls.append(choice.quicken(_call(i, node, views)))
    return calls


def _stream(index: int, node: Node, stream: Stream, choice: _Choice) -> Call:
    """A kernel that calls others, row by row."""
    driver = _Driver(node, stream)
    steps = []
    for k, numbers in enumerate(stream.steps):
        members = [driver.body.nodes[j] for j in numbers]
        width = members[0].output.type.shape[2] if len(members) > 1 else 0
        columns = node.attrs["columns"] if len(members) > 1 else 0
        assert isinstance(columns, int)
        calls = []
        for member in members:
            part = _Columns(columns, frozenset(stream.parts))
            call = choice.quicken(_call(index, member, {}, driver.outer, stream.rings, columns=part))
            calls.append({"part": len(driver.parts), "arguments": driver.add(member, call)})
        step = {"calls": calls, "columns": columns, "width": width, "height": count_rows(members[0])}
        step |= {"needs": _needs(stream.demands[k]), "awaits": _needs(stream.awaits.get(k, ()))}
        steps.append(step | {"follow": stream.follow(k)})
    return driver.call(index, "stream", {"steps": steps, "order": [stream.last, *stream.rest]})


def _needs(demands: Sequence[Demand]) -> list[dict[str, Any]]:
    """As the template prints them: of a maker's rows, those below (row * stride + ahead) / spread."""
    return [
        {
            "maker": d.maker,
            "height": d.height,
            "stride": d.window.stride,
            "spread": d.window.spread,
            "ahead": d.window.size - d.window.padding + d.window.spread - 1,
        }
        for d in demands
    ]


def _tiles(index: int, node: Node, tiles: Tiles, choice: _Choice) -> Call:
    """A kernel that calls others, tile by tile."""
    driver = _Driver(node, tiles)
    steps = []
    for member, span in zip(driver.body.nodes, tiles.spans, strict=True):
        taken = [driver.taken.get(v.name) for v in member.outputs]
        member = replace(
            member, inplace=tuple(member.inputs.index(v) if v else None for v in taken) if any(taken) else ()
        )
        ends = {end for v in member.inputs if v.name in tiles.cuts for end in tiles.cuts[v.name].span(v)}
        for start, stop in pairwise([span[0], *sorted(e for e in ends if span[0] < e < span[1]), span[1]]):
            tile = _Tile(tiles.width, tiles.cuts, frozenset(tiles.sizes), span, start)
            call = choice.quicken(_call(index, member, {}, driver.outer, tile=tile))
            steps.append({"arguments": driver.add(member, call), "start": start, "stop": stop})
    end = max(stop for _, stop in tiles.spans)
    return driver.call(index, "tiles", {"steps": steps, "width": tiles.width, "end": end})


class _Driver:
    """A kernel in the making that calls others: what it passes to them."""

    def __init__(self, node: Node, pieces: Pieces) -> None:
        assert node.body
        self.node, self.body, self.pieces = node, node.body, pieces
        self.outer = node.arguments
        self.expressions = {v.name: f"y{i}" for i, v in enumerate(node.body.outputs)}
        inner = dict(zip([v.name for v in node.inputs], node.body.inputs, strict=True))
        self.taken: dict[str, Value] = {}  # result of the body -> the operand whose buffer it takes over
        for result, value in node.results.items():
            if overwritten := node.overwrites.get(value.name):
                self.taken[result] = inner[overwritten.name]
                self.expressions[inner[overwritten.name].name] = self.expressions[result]
        self.args: dict[str, Value] = {}
        self.parts: list[Call] = []
        self.members: list[Node] = []

    def add(self, member: Node, call: Call) -> list[str]:
        """The arguments of a call that is to be made."""
        self.parts.append(replace(call, inputs=tuple(self.outer.get(v.name, v) for v in call.inputs)))
        self.members.append(member)
        arguments = []
        for value in (*call.inputs, *call.outputs):
            if value.name in self.outer and value.name not in self.expressions:
                self.expressions[value.name] = f"a{len(self.args)}"
                self.args[self.expressions[value.name]] = self.outer[value.name]
            if value.name in self.pieces.offsets:
                ctype, offset = CTYPES[value.type.dtype], self.pieces.offsets[value.name]
                self.expressions[value.name] = f"({ctype} *)(void *)(scratch + {offset})"
            arguments.append(self.expressions[value.name])
        if call.kernel.scratch:
            arguments.append(f"scratch + {self.pieces.nbytes}")
        return arguments

    def call(self, index: int, template: str, context: Mapping[str, Any]) -> Call:
        made = self.node.outputs
        pointers = [{"c": c, "ctype": CTYPES[v.type.dtype], "const": True} for c, v in self.args.items()]
        pointers += [{"c": f"y{i}", "ctype": CTYPES[v.type.dtype], "const": False} for i, v in enumerate(made)]
        scratch = self.pieces.nbytes + max(part.kernel.scratch for part in self.parts)
        if scratch:
            pointers.append(SCRATCH)
        own = {"args": pointers, "rows": None, "columns": None, "tile": None, "tail": []}
        text = json.dumps(own | dict(context), sort_keys=True)
        kernel = Kernel(template, text, tuple(part.kernel for part in self.parts), scratch)
        return Call(index, kernel, tuple(self.args.values()), made, tuple(self.members), tuple(self.parts))


@dataclass(frozen=True)
class _Parts:
    """A node taken apart: split weights, steps that make an operand as it is read, the operator with its own kernel
    (or none), what follows it."""

    weights: dict[str, Node]
    head: tuple[Node, ...]
    anchor: Node | None
    tail: tuple[Node, ...]


def _take_apart(node: Node) -> _Parts:
    members = node.body.nodes if node.body else (node,)
    weights = {m.output.name: m for m in members if m.op == "concatenate" and m is not members[-1]}
    rest = [m for m in members if m.output.name not in weights]
    at = find_anchor(rest)
    if at is None:
        return _Parts(weights, (), None, tuple(rest))
    return _Parts(weights, tuple(rest[:at]), rest[at], tuple(rest[at + 1 :]))


@dataclass(frozen=True)
class _Columns:
    """How many columns of a row a kernel makes; inside: of these values there are no more."""

    count: int
    inside: frozenset[str]


@dataclass(frozen=True)
class _Tile:
    """What a kernel that makes one tile knows of it.

    cuts: how values are cut; inside: those of which one tile exists; span: for which part of the line the node runs,
    and start: from where on this kernel serves it.
    """

    width: int
    cuts: Mapping[str, Cut]
    inside: frozenset[str]
    span: tuple[int, int]
    start: int

    def spread(self, node: Node) -> "_Tile":
        """The same seen from inside of a region."""
        if node.body is None:
            return self
        names = {inner: v.name for inner, v in (node.arguments | node.results).items()}
        cuts = spread_cuts(node.body, {inner: self.cuts[name] for inner, name in names.items() if name in self.cuts})
        inside = frozenset(inner for inner, name in names.items() if name in self.inside)
        return replace(self, cuts=cuts or {}, inside=inside)

    def covers(self, value: Value) -> bool:
        start, stop = self.cuts[value.name].span(value)
        return start <= self.start < stop


def _call(
    index: int,
    node: Node,
    views: Mapping[str, str],
    around: Mapping[str, Value] | None = None,
    rings: Mapping[str, int] | None = None,
    tile: _Tile | None = None,
    columns: _Columns | None = None,
) -> Call:
    """``rings``: the kernel makes one row, and of these values there are so many rows; ``tile``: it makes one tile;
    ``around``: what the operands of a node inside of a region stand for."""
    parts = _take_apart(node)
    tile = tile and tile.spread(node)
    outer = node.arguments
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

    def operand(value: Value, result: Mapping[str, Any], literal: bool) -> dict[str, Any]:
        source = outer.get(value.name, value)
        source = (around or {}).get(source.name, source)
        if literal and isinstance(source, Const) and source.type.size == 1:
            return {"kind": "literal", "value": source.data.item(), "dtype": value.type.dtype}
        return _operand(tensor(value, pointer(value)), result)

    def tensor(value: Value, c: str) -> dict[str, Any]:
        cut = tile.cuts.get(value.name) if tile else None
        if tile is None or cut is None:
            return _tensor(value.type, c)
        shape = (*value.type.shape[: cut.axis], tile.width, *value.type.shape[cut.axis + 1 :])
        if value.name in tile.inside:
            return _tensor(replace(value.type, shape=shape, quant=None), c)
        return _tensor(value.type, c) | {"shape": list(shape)} | _from(value.type, cut, c)

    out = node.body.outputs[0] if node.body else node.output
    context: dict[str, Any] = {"attrs": {}, "ins": []}
    if parts.anchor is not None:
        context["attrs"] = {k: _plain(v) for k, v in parts.anchor.attrs.items()}
        if tile and context["attrs"].get("groups", 1) > 1:
            context["attrs"]["groups"] = tile.width  # only where there is one channel to a group
        for value in parts.anchor.inputs if parts.anchor.op != "source" else ():  # what comes in by rows is nowhere
            if makers := [m for m in parts.head if m.output == value]:
                record = tensor(value, "")
                steps = _steps(parts.head, {}, record, "p", operand)
                context["ins"].append(record | {"steps": steps, "value": f"p{parts.head.index(makers[0])}"})
                continue
            joined = parts.weights.get(value.name)
            axis, pieces = (joined.attrs["axis"], joined.inputs) if joined else (0, (value,))
            assert isinstance(axis, int)
            if tile and joined and tile.cuts.get(value.name, Cut(-1)).axis == axis:
                value = next(v for v in pieces if tile.covers(v))  # no tile lies in two pieces
                pieces = (value,)
            segments, start = [], 0
            for piece in pieces:
                record = tensor(piece, pointer(piece))
                stop = start + (record["shape"][axis] if piece.type.rank else 1)
                segments.append({"c": record["c"], "strides": record["strides"], "start": start, "stop": stop})
                start = stop
            whole = tensor(value, segments[0]["c"])
            context["ins"].append(whole | {"c": segments[0]["c"], "segments": segments, "axis": axis, "steps": []})
    names: dict[str, str] = {} if parts.anchor is None else {parts.anchor.output.name: "acc"}
    context["acc"] = "" if parts.anchor is None else CTYPES[parts.anchor.output.type.dtype]
    result = tensor(out, "y0")
    tail = _steps(parts.tail, names, result, "t", operand)
    context["tile"] = None
    if tile:
        total, last = out.name not in tile.cuts, tile.span[1] - tile.width
        context["tile"] = {"sum": total, "first": tile.span[0], "last": last}
    if parts.anchor is None:
        shape = tuple(result["shape"]) if rings is None else (1, 1, *out.type.shape[2:])
        operands = [o for step in tail for o in step["operands"] if "strides" in o]
        context["loops"] = _collapse(shape, [*operands, result] if tile else operands)
    context["taps"] = _taps(parts.anchor)
    context["tail"] = tail
    context["out"] = result
    made = node.body.outputs if node.body else node.outputs
    context["outs"] = [tensor(v, f"y{i}") for i, v in enumerate(made)]
    args = [{"c": c, "ctype": CTYPES[v.type.dtype], "const": True} for c, v in pointers.items()]
    args += [{"c": f"y{i}", "ctype": CTYPES[v.type.dtype], "const": False} for i, v in enumerate(node.outputs)]
    context["args"] = args
    context["rows"] = None
    outputs = {f"y{i}": v for i, v in enumerate(node.outputs)}
    if rings is not None:
        context["rows"] = {c: rings[v.name] for c, v in (pointers | outputs).items() if v.name in rings}
    context["columns"] = None
    if columns and columns.count:
        inside = [c for c, v in (pointers | outputs).items() if v.name in columns.inside]
        context["columns"] = {"count": columns.count, "inside": inside}
    template = "elementwise_loop" if parts.anchor is None else _variant(parts.anchor)
    kernel = Kernel(template, json.dumps(context, sort_keys=True))
    return Call(index, kernel, tuple(pointers.values()), node.outputs)


def _steps(
    nodes: Sequence[Node],
    names: dict[str, str],
    result: Mapping[str, Any],
    prefix: str,
    operand: Callable[[Value, Mapping[str, Any], bool], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Elementwise operators one after the other, each on what was made before (by ``names``, which grows) and on
    operands that are read at the index of ``result``. Constant numbers are in the code, but for those of steps: layers
    of one shape share it."""
    steps = []
    for k, node in enumerate(nodes):
        arguments: list[dict[str, Any]] = []
        for value in node.inputs:
            if value.name in names:
                arguments.append({"kind": "register", "c": names[value.name]})
            else:
                arguments.append(
                    operand(value, result, node.op != "qnn.sgd") | {"name": f"{prefix}v{k}_{len(arguments)}"}
                )
        attrs = {key: _plain(v) for key, v in node.attrs.items()} | {"types": [v.type.dtype for v in node.inputs]}
        ctype, name = CTYPES[node.output.type.dtype], f"{prefix}{k}"
        steps.append(
            {"op": node.op.replace(".", "_"), "attrs": attrs, "operands": arguments, "name": name, "ctype": ctype}
        )
        names[node.output.name] = name
    return steps


def _from(type: TensorType, cut: Cut, c: str) -> dict[str, Any]:
    """Where the tile that begins at "from" lies in a whole tensor: a pointer, or an index where elements are bits."""
    stride = _strides(type.shape)[cut.axis]
    offset = f"(from - {cut.first}) * {stride}" if cut.first else f"from * {stride}"
    return {"c": c, "from": offset} if type.dtype == "bit" else {"c": f"({c} + {offset})"}


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


def _tensor(type: TensorType, c: str) -> dict[str, Any]:
    return {
        "c": c,
        "shape": list(type.shape),
        "strides": _strides(type.shape),
        "size": type.size,
        "dtype": type.dtype,
        "ctype": CTYPES[type.dtype],
        "from": "0",
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


def _operand(tensor: Mapping[str, Any], out: Mapping[str, Any]) -> dict[str, Any]:
    """How an elementwise step reads a tensor: at the flat index, or through strides (0 where it broadcasts)."""
    operand = {key: tensor[key] for key in ("c", "dtype", "strides", "from")}
    if tensor["shape"] == out["shape"] and tensor["strides"] == out["strides"]:
        return operand | {"kind": "flat"}
    shape = [1] * (len(out["shape"]) - len(tensor["shape"])) + tensor["shape"]
    strides = [0] * (len(shape) - len(tensor["strides"])) + tensor["strides"]
    return operand | {"kind": "strided", "strides": [0 if d == 1 else s for d, s in zip(shape, strides, strict=True)]}


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
