"""Moves the channels that learn together, so that they come first: at compile time wherever the graph allows it.

Every tensor has a channel axis whose order nobody outside can see, as long as whoever makes the tensor and whoever
reads it agree. Tensors that must agree (both sides of an addition, both ends of a pooling) share *spaces*; each space
has one order, chosen so that the wanted channels of the layers that read it come first. Weights are permuted to fit, in
data and origin, so that export undoes it. Inputs and outputs of the model keep their order.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tte.errors import TTEError
from tte.ir import OPS, Builder, Const, Graph, Node, Value, rewrite
from tte.scheme import Learned, Resolved

# Operators that leave the channel axis of their one tensor where it is.
KEEP = ("nn.max_pool2d", "nn.avg_pool2d", "nn.adaptive_avg_pool2d", "nn.resize2d")
LAYERS = ("nn.conv2d", "nn.conv2d_transpose", "nn.dense")


def select_channels(graph: Graph, resolved: Resolved) -> tuple[Graph, list[str]]:
    """The graph in which the input channels that learn come first, and notes on what has to be copied at run time.

    It computes the same as before (sums run in another order). Where a layer's channels cannot be moved, a ``take``
    in front of it copies them.
    """
    wanted = {e.weight: e for e in resolved.layers if e.weight and e.channels is not None}
    if all(e.is_prefix for e in wanted.values()):
        return graph, []
    for node in graph.nodes:
        for i, value in enumerate(node.inputs):
            if value.name in wanted and (node.op not in LAYERS or i != 1):
                raise TTEError(
                    "TTE-E033",
                    f"{value.name} is read by {node.op} too, so its channels cannot be moved",
                    where=f"layer {wanted[value.name].layer}",
                    fix="use `select: first`",
                )
    learned = {n for e in resolved.layers for n in (e.weight, e.bias) if n}
    owned = learned | {c.name for c in graph.consts if c.origin is not None}
    spaces = _Spaces(graph, owned)
    wants = [
        (spaces.layouts[n.inputs[0].name], wanted[n.inputs[1].name])
        for n in graph.nodes
        if n.op in LAYERS and n.inputs[1].name in wanted
    ]
    spaces.choose_orders(wants)
    return _Rebuild(graph, spaces, wanted, owned).run()


@dataclass(frozen=True)
class _Block:
    """``size`` channels of a space, each of which stands for ``inner`` neighbouring positions (1 unless flattened)."""

    space: int
    size: int
    inner: int = 1


@dataclass(frozen=True)
class _Layout:
    """The channel axis of a tensor, and the blocks that lie on it one after the other."""

    axis: int
    blocks: tuple[_Block, ...]


class _Spaces:
    """Which tensors must agree on an order of channels: one walk over the graph, with union-find.

    layouts: name -> layout, None where the order must stay as it is and nothing is known.
    """

    def __init__(self, graph: Graph, owned: set[str]) -> None:
        self.parent: list[int] = []
        self.pinned: dict[int, str] = {}  # space -> why its order must stay
        self.cells: dict[int, list[list[int]]] = {}  # space -> its channels in order, as sets whose order is free
        self.layouts: dict[str, _Layout | None] = dict.fromkeys((v.name for v in graph.inputs), None)
        uses = graph.uses()
        for node in graph.nodes:
            # A constant that the user knows has one order: with several readers it stays.
            shared = any(isinstance(v, Const) and v.name in owned and len(uses[v.name]) > 1 for v in node.inputs)
            layout = None if shared else self._walk(node)
            if layout is None:
                why = f"{node.layer or node.op} ({node.op})" + (" shares its weights" if shared else "")
                self._pin((v.name for v in node.inputs), why)
            for value in node.outputs:
                self.layouts[value.name] = layout
        self._pin((v.name for v in graph.outputs), "the model's output")

    def find(self, space: int) -> int:
        while self.parent[space] != space:
            space = self.parent[space]
        return space

    def _new(self) -> int:
        self.parent.append(len(self.parent))
        return self.parent[-1]

    def _pin(self, names: Iterable[str], why: str) -> None:
        for name in names:
            layout = self.layouts.get(name)
            for block in layout.blocks if layout else ():
                self.pinned.setdefault(self.find(block.space), why)

    def _fixed(self, size: int, why: str) -> _Block:
        space = self._new()
        self.pinned[space] = why
        return _Block(space, size)

    def _unite(self, names: list[str]) -> _Layout | None:
        """The one layout of tensors whose channels stand for each other; None if they cannot agree."""
        layouts = [self.layouts.get(name) for name in names]
        first = layouts[0]
        shapes = [x and (x.axis, [(b.size, b.inner) for b in x.blocks]) for x in layouts]
        if first is None or any(shape != shapes[0] for shape in shapes):
            return None
        for other in layouts[1:]:
            assert other is not None
            for a, b in zip(first.blocks, other.blocks, strict=True):
                root, child = self.find(a.space), self.find(b.space)
                self.parent[child] = root
                if child in self.pinned:
                    self.pinned.setdefault(root, self.pinned[child])
        return first

    def _walk(self, node: Node) -> _Layout | None:
        """The layout of the node's output; None pins everything that it reads."""
        op, attrs = node.op, dict[str, Any](node.attrs)
        tensors = [v for v in node.inputs if not isinstance(v, Const)]
        if node.body or not tensors:
            return None
        x = self.layouts.get(tensors[0].name)
        if op in LAYERS:
            return self._walk_layer(node, x)
        if op == "concatenate":
            return self._walk_concatenate(node)
        if OPS[op].kind == "elementwise":
            return self._walk_elementwise(node, tensors)
        if x is None or len(tensors) != 1:
            return None
        rank, old, new = tensors[0].type.rank, tensors[0].type.shape, node.output.type.shape
        if op in KEEP:
            return x if x.axis == 3 else None
        if op in ("mean", "sum"):
            axes = [a % rank for a in attrs["axis"]]
            removed = 0 if attrs["keepdims"] else sum(a < x.axis for a in axes)
            return None if x.axis in axes else replace(x, axis=x.axis - removed)
        if op == "transpose":
            return replace(x, axis=attrs["axes"].index(x.axis))
        if op == "reshape":
            return _reshaped(x, old, new)
        if op == "slice":
            return x if old[x.axis] == new[x.axis] else None
        if op == "pad":
            before, after, interior = attrs["pad_width"][x.axis]
            if interior or min(before, after) < 0:
                return None
            low, high = ([self._fixed(n, "padding")] if n else [] for n in (before, after))
            return replace(x, blocks=(*low, *x.blocks, *high))
        return None

    def _walk_elementwise(self, node: Node, tensors: list[Value]) -> _Layout | None:
        """Operands that run along the channels must agree; operands that are repeated along them need not."""
        out = node.output.type
        known = [(v, x) for v in tensors if (x := self.layouts.get(v.name)) is not None]
        axes = {x.axis + out.rank - v.type.rank for v, x in known}
        if len(axes) != 1:
            return None
        (axis,) = axes
        along = [v for v in tensors if ((1,) * out.rank + v.type.shape)[axis - out.rank] == out.shape[axis]]
        if not along or any(v.type.rank != out.rank for v in along):
            return None
        return self._unite([v.name for v in along])

    def _walk_layer(self, node: Node, x: _Layout | None) -> _Layout | None:
        last = node.output.type.rank - 1
        channels = node.inputs[0].type.shape[-1]
        if isinstance(node.inputs[0], Const) or not all(isinstance(v, Const) for v in node.inputs[1:]):
            return None
        if x is not None and x.axis != node.inputs[0].type.rank - 1:
            return None
        if node.attrs.get("groups", 1) == 1:
            return _Layout(last, (_Block(self._new(), node.output.type.shape[-1]),))
        depthwise = node.op == "nn.conv2d" and node.attrs["groups"] == channels == node.output.type.shape[3]
        return x if depthwise else None

    def _walk_concatenate(self, node: Node) -> _Layout | None:
        axis = node.attrs["axis"]
        assert isinstance(axis, int)
        axis %= node.output.type.rank
        layouts = [self.layouts.get(v.name) for v in node.inputs]
        known = [x for x in layouts if x is not None]
        if not known or any(x.axis != known[0].axis for x in known):
            return None
        if axis != known[0].axis:
            return self._unite([v.name for v in node.inputs])
        parts = [x.blocks if x else None for x in layouts]
        rest = [
            b or (self._fixed(v.type.shape[axis], "a part of a concatenation"),)
            for b, v in zip(parts, node.inputs, strict=True)
        ]
        return _Layout(axis, tuple(b for blocks in rest for b in blocks))

    def choose_orders(self, wants: list[tuple[_Layout | None, Learned]]) -> None:
        """Give each free space an order with the wanted channels first; small wants first, so that they can nest."""
        for layout, learned in sorted(wants, key=lambda w: len(w[1].channels or ())):
            if layout is None or len(layout.blocks) != 1 or layout.blocks[0].inner != 1:
                continue
            space = self.find(layout.blocks[0].space)
            if space not in self.pinned:
                assert learned.channels is not None
                cells = self.cells.get(space, [list(range(layout.blocks[0].size))])
                self.cells[space] = _refine(cells, set(learned.channels))

    def order(self, layout: _Layout | None, size: int) -> np.ndarray:
        """Of each position on the channel axis: the original position of what lies there now."""
        if layout is None:
            return np.arange(size)
        parts, start = [], 0
        for block in layout.blocks:
            cells = self.cells.get(self.find(block.space), [list(range(block.size))])
            channels = np.asarray([c for cell in cells for c in cell])
            parts.append(start + (channels[:, None] * block.inner + np.arange(block.inner)).reshape(-1))
            start += block.size * block.inner
        assert start == size, (layout, size)
        return np.concatenate(parts)

    def reason(self, layout: _Layout | None) -> str:
        """Why the channels of this layout cannot be moved as wanted."""
        if layout is None:
            return "its input has a fixed order"
        pins = [self.pinned[s] for b in layout.blocks if (s := self.find(b.space)) in self.pinned]
        if pins:
            return f"their order is fixed by {pins[0]}"
        several = len(layout.blocks) > 1 or layout.blocks[0].inner > 1
        return "each lies in several places" if several else "another layer wants other channels first"


def _refine(cells: list[list[int]], wanted: set[int]) -> list[list[int]]:
    """Split one cell so that ``wanted`` are the first channels, as far as the cells allow."""
    for i, cell in enumerate(cells):
        if not wanted >= set(cell):
            inside, outside = [c for c in cell if c in wanted], [c for c in cell if c not in wanted]
            return [*cells[:i], inside, outside, *cells[i + 1 :]]
        wanted = wanted - set(cell)
    return cells


def _reshaped(x: _Layout, old: tuple[int, ...], new: tuple[int, ...]) -> _Layout | None:
    """The channel axis after a reshape: kept, or merged with whole neighbours (flattened)."""
    before, channels, after = math.prod(old[: x.axis]), old[x.axis], math.prod(old[x.axis + 1 :])
    for axis, size in enumerate(new):
        outer, inner = math.prod(new[:axis]), math.prod(new[axis + 1 :])
        # The new axis runs over (before / outer) repetitions of all channels of (after / inner) positions each.
        if before % outer or after % inner or size != (before // outer) * channels * (after // inner):
            continue
        if channels == 1 or (size == 1 and channels != 1):
            return None
        blocks = tuple(replace(b, inner=b.inner * (after // inner)) for b in x.blocks)
        return _Layout(axis, blocks * (before // outer))
    return None


class _Rebuild:
    """Writes the graph anew with weights in the chosen orders."""

    def __init__(self, graph: Graph, spaces: _Spaces, wanted: dict[str, Learned], owned: set[str]) -> None:
        self.graph, self.spaces, self.wanted, self.owned = graph, spaces, wanted, owned
        self.builder = Builder()
        self.values: dict[str, Value] = {}
        self.notes: list[str] = []

    def run(self) -> tuple[Graph, list[str]]:
        for node in self.graph.nodes:
            inputs = [self.values.get(v.name, v) for v in node.inputs]
            if node.op in LAYERS:
                inputs, back = self.permute_layer(node, inputs)
            else:
                inputs, back = [self.permute_operand(node, v) for v in inputs], None
            result: tuple[Value, ...] = self.builder.append(replace(node, inputs=tuple(inputs)))
            if back is not None:
                result = (self.builder.call("take", *result, axis=3, indices=back, layer=node.layer),)
                self.values[node.output.name] = result[0]
        outputs = tuple(self.values.get(v.name, v) for v in self.graph.outputs)
        consts = {c.name: c for c in self.graph.consts} | self.builder.consts
        return rewrite(self.graph, self.builder.nodes, consts=tuple(consts.values()), outputs=outputs), self.notes

    def permute_layer(self, node: Node, inputs: list[Value]) -> tuple[list[Value], tuple[int, ...] | None]:
        """Operands of a layer with channels in order; also the take that must follow it, if any."""
        x, weight = inputs[0], inputs[1]
        if not isinstance(weight, Const):
            return inputs, None
        layout = self.spaces.layouts.get(node.inputs[0].name)
        if layout is not None and layout.axis != x.type.rank - 1:
            layout = None  # what is tracked is another axis
        order = self.spaces.order(layout, x.type.shape[-1])
        moved = np.arange(len(order))
        learned = self.wanted.get(weight.name)
        if learned is not None and learned.channels is not None:
            chosen = set(learned.channels)
            if set(order[: len(chosen)].tolist()) != chosen:
                moved = np.argsort([c not in chosen for c in order], kind="stable")
                x = self.builder.call("take", x, axis=x.type.rank - 1, indices=_ints(moved), layer=node.layer)
                why = self.spaces.reason(layout)
                self.notes.append(f"{node.layer}: the channels that learn are copied together at run time: {why}")
        order_in = order[moved]
        order_out = self.spaces.order(self.spaces.layouts[node.output.name], node.output.type.shape[-1])
        groups, back = node.attrs.get("groups", 1), None
        if groups == 1:
            axis, rows = {"nn.conv2d": (3, 0), "nn.dense": (1, 0), "nn.conv2d_transpose": (0, 3)}[node.op]
            weight = self.permute(self.permute(weight, axis, order_in), rows, order_out)
        elif node.op == "nn.conv2d" and groups == len(order):
            # Depthwise: filters follow the channels that they see; several filters of a channel stay together.
            per = weight.type.shape[0] // groups
            filters = (order_in[:, None] * per + np.arange(per)).reshape(-1)
            weight = self.permute(weight, 0, filters)
            if not np.array_equal(filters, order_out):
                back = _ints(np.argsort(filters)[order_out])
            order_out = filters
        bias = [self.permute(b, 0, order_out) for b in inputs[2:] if isinstance(b, Const)]
        return [x, weight, *bias], back

    def permute_operand(self, node: Node, value: Value) -> Value:
        """A constant that is applied to each channel, in the order of the channels."""
        layout = self.spaces.layouts[node.output.name]
        if not isinstance(value, Const) or layout is None or OPS[node.op].kind != "elementwise":
            return value
        axis = layout.axis - node.output.type.rank + value.type.rank
        if axis < 0 or value.type.shape[axis] == 1:
            return value
        return self.permute(value, axis, self.spaces.order(layout, value.type.shape[axis]))

    def permute(self, const: Const, axis: int, order: np.ndarray) -> Const:
        if np.array_equal(order, np.arange(len(order))):
            return const
        data, origin = np.take(const.data, order, axis), const.origin
        if origin is not None:
            scale = None if origin.scale is None else np.take(origin.scale, order, axis)
            origin = replace(origin, index=np.take(origin.index, order, axis), scale=scale)
        # Others may want a constant that nobody knows by name in another order: it is named by its content.
        return self.builder.const(data, const.name if const.name in self.owned else None, origin)


def _ints(array: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in array)
