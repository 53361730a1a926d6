"""The program: a straight line of typed calls. Node order is execution order."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, TypeVar, TypeVarTuple, cast

import numpy as np

from tte.ir.op import OPS, Attrs, InvalidType, Op
from tte.ir.types import TensorType


@dataclass(frozen=True)
class Value:
    """A name with a type. Names are unique in a graph; node outputs are numbered by position ("0", "1", ...)."""

    name: str
    type: TensorType


@dataclass(frozen=True, eq=False)
class Origin:
    """Where the elements of a weight came from in the user's model, so that what was learned can be put back.

    Element i of our tensor is ``scale.flat[i] * user_tensor.flat[index.flat[i]]`` plus something that never learns.
    Every compile-time change of a weight (permutation, split, batch-norm folding) is applied to index and scale too.

    name   the user's own name of the tensor ("blocks.3.conv1.weight")
    shape  its shape in the user's layout
    index  int64, our shape: flat positions in the user's tensor
    scale  float64, our shape, or None for 1
    quantized  the user's tensor itself, flat, where it is stored as integers: ours is then scale * quantized[index],
               until ``lower_qdq`` takes the integers themselves
    """

    name: str
    shape: tuple[int, ...]
    index: np.ndarray
    scale: np.ndarray | None = None
    quantized: np.ndarray | None = None


@dataclass(frozen=True)
class Const(Value):
    """Lives in flash. The program is its text: equality of graphs looks at names and types, not at data."""

    data: np.ndarray = field(compare=False, repr=False)
    origin: Origin | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Param(Value):
    """Outlives a step: a trained weight, the learning rate, optimizer state. ``data`` is its initial value."""

    data: np.ndarray = field(compare=False, repr=False)
    origin: Origin | None = field(default=None, compare=False, repr=False)


class Subject:
    """What is asked of it is remembered with it, but does not go along when it is pickled: see ``remembered``."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_known"}


@dataclass(frozen=True)
class Node(Subject):
    """One call. ``layer`` is the user's name of the layer it came from.

    inplace: of each output, from the first, the input (by number) whose buffer it takes over, which must die here, or
    None.
    body: the inner graph of a region (op == "region"); its inputs correspond to ``inputs`` one by one.
    """

    op: str
    inputs: tuple[Value, ...]
    attrs: Attrs
    outputs: tuple[Value, ...]
    layer: str = ""
    inplace: tuple[int | None, ...] = ()
    body: "Graph | None" = None

    @property
    def output(self) -> Value:
        return self.outputs[0]

    @property
    def arguments(self) -> dict[str, Value]:
        """Of a region: name inside -> the operand that it stands for."""
        return dict(zip([v.name for v in self.body.inputs], self.inputs, strict=True)) if self.body else {}

    @property
    def results(self) -> dict[str, Value]:
        """Of a region: name inside -> the result that it is outside."""
        return dict(zip([v.name for v in self.body.outputs], self.outputs, strict=True)) if self.body else {}

    @property
    def overwrites(self) -> dict[str, Value]:
        """Name of an output -> the operand whose buffer it takes over."""
        pairs = zip(self.outputs, self.inplace, strict=False)
        return {output.name: self.inputs[k] for output, k in pairs if k is not None}

    @property
    def definition(self) -> Op:
        return OPS[self.op]

    @property
    def macs(self) -> int:
        """Multiply-accumulates; of a region, those of all its members."""
        if self.body:
            return sum(node.macs for node in self.body.nodes)
        rule = self.definition.macs
        return rule(*(v.type for v in self.inputs), **self.attrs) if rule else 0


def find_anchor(nodes: Sequence[Node]) -> int | None:
    """Of fused operators the one with loops of its own, if there is one: it is not elementwise, or writes bits."""
    for i, node in enumerate(nodes):
        joins = node.op == "concatenate" and i < len(nodes) - 1  # weights, which are read where they lie
        if not joins and (OPS[node.op].kind != "elementwise" or node.output.type.dtype == "bit"):
            return i
    return None


S = TypeVar("S", bound=Subject)
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


def remembered(function: Callable[[S, *Ts], T]) -> Callable[[S, *Ts], T]:
    """The function, but asked once for each node or graph, with each of the other arguments: these never change."""

    @wraps(function)
    def ask(subject: S, *others: *Ts) -> T:
        known = subject.__dict__.setdefault("_known", {})
        key = (function, *others)
        if key not in known:
            known[key] = function(subject, *others)
        return cast(T, known[key])

    return ask


@dataclass(frozen=True)
class Graph(Subject):
    """inputs -> nodes in execution order -> outputs, and the parameters that a step replaces: (Param, new Value)."""

    name: str
    inputs: tuple[Value, ...] = ()
    params: tuple[Param, ...] = ()
    consts: tuple[Const, ...] = ()
    nodes: tuple[Node, ...] = ()
    outputs: tuple[Value, ...] = ()
    updates: tuple[tuple[Param, Value], ...] = ()

    def __str__(self) -> str:
        from tte.ir.text import print_graph

        return print_graph(self)

    def values(self) -> Iterator[Value]:
        """Everything that has a name, in order of definition."""
        yield from self.inputs
        yield from self.params
        yield from self.consts
        for node in self.nodes:
            yield from node.outputs

    @property
    def trained_bytes(self) -> int:
        """Of the params that a step replaces."""
        return sum(param.type.nbytes for param, _ in self.updates)

    @property
    def lasting(self) -> tuple[Value, ...]:
        """What outlives the line: outputs, and what params become."""
        return *self.outputs, *(v for _, v in self.updates)

    def find(self, name: str) -> Value:
        return next(v for v in self.values() if v.name == name)

    def producer(self) -> dict[str, Node]:
        """Name of a value -> the node that makes it."""
        return {v.name: node for node in self.nodes for v in node.outputs}

    def owners(self) -> dict[str, str]:
        """Name of a value -> name of the value whose buffer it lives in, through views and in-place results."""
        owners = {v.name: v.name for v in self.values()}
        for node in self.nodes:
            if node.body is None and OPS[node.op].kind == "view":
                owners[node.output.name] = owners[node.inputs[0].name]
            owners |= {name: owners[taken.name] for name, taken in node.overwrites.items()}
        return owners

    def last_use(self) -> dict[str, int]:
        """Name -> index of the last node that reads it; len(nodes) for what outlives the line (outputs, updates)."""
        last = {v.name: i for i, node in enumerate(self.nodes) for v in node.inputs}
        for value in self.lasting:
            last[value.name] = len(self.nodes)
        return last

    def uses(self) -> dict[str, list[int]]:
        """Name -> indices of the nodes that read it."""
        result: dict[str, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for name in dict.fromkeys(v.name for v in node.inputs):
                result.setdefault(name, []).append(i)
        return result

    def renumbered(self) -> "Graph":
        """The same program with node outputs numbered by position."""
        if _is_numbered(self):
            return self
        names: dict[str, Value] = {}
        nodes = []
        count = 0
        for node in self.nodes:
            outputs = []
            for value in node.outputs:
                outputs.append(Value(str(count), value.type))
                names[value.name] = outputs[-1]
                count += 1
            body = node.body.renumbered() if node.body else None
            inputs = tuple(names.get(v.name, v) for v in node.inputs)
            same = body is node.body and inputs == node.inputs and tuple(outputs) == node.outputs
            nodes.append(node if same else replace(node, inputs=inputs, outputs=tuple(outputs), body=body))
        return replace(
            self,
            nodes=tuple(nodes),
            outputs=tuple(names.get(v.name, v) for v in self.outputs),
            updates=tuple((p, names.get(v.name, v)) for p, v in self.updates),
        )


@remembered
def _is_numbered(graph: Graph) -> bool:
    names = (v.name for node in graph.nodes for v in node.outputs)
    bodies = (node.body for node in graph.nodes if node.body)
    return all(name == str(i) for i, name in enumerate(names)) and all(map(_is_numbered, bodies))


class Builder:
    """Appends nodes; every pass that rebuilds a graph writes through one.

    Fresh names carry a ``~`` until ``Graph.renumbered`` numbers them, so old and new values never collide.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.consts: dict[str, Const] = {}
        self._count = 0

    def call(self, op: str, *inputs: Value, layer: str = "", **attrs: Any) -> Value:
        """Append a call with one output and return it. Raises InvalidType when the operands do not fit."""
        return self.calls(op, *inputs, layer=layer, **attrs)[0]

    def calls(self, op: str, *inputs: Value, layer: str = "", **attrs: Any) -> tuple[Value, ...]:
        """Append a call and return all its outputs."""
        if op not in OPS:
            raise InvalidType(f"no operator named {op!r}")
        definition = OPS[op]
        complete = definition.complete(attrs)
        types = definition.infer_types(tuple(v.type for v in inputs), complete)
        return self.append(Node(op, inputs, complete, tuple(self.fresh(t) for t in types), layer))

    def append(self, node: Node) -> tuple[Value, ...]:
        self.nodes.append(node)
        return node.outputs

    def fresh(self, type: TensorType) -> Value:
        self._count += 1
        return Value(f"~{self._count}", type)

    def const(self, data: np.ndarray | float, name: str | None = None, origin: Origin | None = None) -> Const:
        """A constant; a nameless one gets its name from its content, so equal constants are one."""
        from tte.ir.types import tensor_type

        array = np.asarray(data, np.float32) if isinstance(data, float) else np.asarray(data, order="C")
        if name is None:
            import hashlib

            digest = hashlib.sha256(str((array.shape, array.dtype.str)).encode() + array.tobytes()).hexdigest()
            name = f"const.{digest[:10]}"
        self.consts[name] = Const(name, tensor_type(array), array, origin)
        return self.consts[name]


def rewrite(graph: Graph, nodes: Iterable[Node], **changes: Any) -> Graph:
    """The graph with other nodes; drops params (unless updated) and consts that nobody reads any more.

    Constants of one name are one: nameless ones are named by their content.
    """
    result = replace(graph, nodes=tuple(nodes), **changes)
    used = {v.name for node in result.nodes for v in node.inputs} | {v.name for v in result.outputs}
    used |= {p.name for p, _ in result.updates} | {v.name for _, v in result.updates}
    return replace(
        result,
        params=tuple(p for p in result.params if p.name in used),
        consts=tuple({c.name: c for c in result.consts if c.name in used}.values()),
    ).renumbered()
