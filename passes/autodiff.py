"""Compile-time reverse-mode differentiation: appends the backward program of exactly what the scheme wants."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from tte.errors import TTEError
from tte.ir import Builder, Const, Graph, Node, Param, Value, rewrite

LOSSES = ("nn.cross_entropy", "nn.mse", "nn.l1", "nn.huber", "nn.bce_with_logits")


@dataclass(frozen=True)
class Whole:
    """The gradient of all elements is wanted."""


@dataclass(frozen=True)
class Part:
    """Only elements start <= i < stop along ``axis`` learn; the gradient has the shape of that slice."""

    axis: int
    start: int
    stop: int


Wanted = Whole | Part


class Backward:
    """What a gradient rule sees: which inputs of its node are wanted, and a pen to write the answer with."""

    def __init__(self, builder: Builder, node: Node, wanted: dict[str, Wanted]) -> None:
        self._builder, self._node, self._wanted = builder, node, wanted

    def wants(self, i: int) -> bool:
        return self.wanted(i) is not None

    def wanted(self, i: int) -> Wanted | None:
        """None, Whole, or (for weights that are trained in part) Part."""
        inputs = self._node.inputs
        return self._wanted.get(inputs[i].name) if i < len(inputs) else None

    @property
    def output(self) -> Value:
        """The node's own output, for rules that are cheaper in terms of y than of x."""
        return self._node.output

    @property
    def outputs(self) -> tuple[Value, ...]:
        """All of them, where a node makes more than its result."""
        return self._node.outputs

    def call(self, op: str, *inputs: Value, **attrs: Any) -> Value:
        return self._builder.call(op, *inputs, layer=self._node.layer, **attrs)

    def const(self, data: np.ndarray | float) -> Const:
        return self._builder.const(data)


def differentiate(graph: Graph, clip_loss_grad: float | None = None) -> Graph:
    """Append the gradient of outputs[0], a scalar loss, with respect to every param.

    The result's outputs are the loss followed by one gradient per param, in the order of ``graph.params``.
    Gradients are summed at forks. Nothing is built for a value that no param influences.
    clip_loss_grad: clamp the gradient that the loss sends back, element by element, to [-c, c].
    """
    wanted = find_wanted(graph)
    builder = Builder()
    builder.nodes.extend(graph.nodes)
    gradients: dict[str, Value] = {}
    for node in reversed(graph.nodes):
        if node.output.name not in wanted:
            continue
        if node.op == "concatenate" and isinstance(wanted[node.output.name], Part):
            # The gradient of the trained part *is* the gradient of its one operand that learns.
            param = next(v for v in node.inputs if v.name in wanted)
            _accumulate(builder, gradients, param, gradients[node.output.name], node)
            continue
        rule = node.definition.grad
        if rule is None:
            raise TTEError(
                "TTE-E040",
                f"{node.op} has no gradient, but a trained layer stands before it",
                where=f"layer {node.layer or '(unnamed)'}",
                fix="train only layers behind it, or replace the operator",
            )
        is_loss = node.output == graph.outputs[0]
        if not is_loss and node.output.name not in gradients:
            continue  # computed, but the loss does not depend on it
        dy = None if is_loss else gradients[node.output.name]
        results = rule(Backward(builder, node, wanted), dy, *node.inputs, **node.attrs)
        results = results if isinstance(results, tuple) else (results,)
        assert len(results) == len(node.inputs), f"{node.op}: {len(results)} gradients for {len(node.inputs)} inputs"
        for value, gradient in zip(node.inputs, results, strict=True):
            if value.name not in wanted:
                continue
            assert gradient is not None, f"{node.op} owes the gradient of %{value.name}"
            if is_loss and clip_loss_grad is not None:
                gradient = builder.call("clip", gradient, min=-clip_loss_grad, max=clip_loss_grad, layer=node.layer)
            part = wanted[value.name]
            if isinstance(part, Part) and gradient.type.shape == value.type.shape:
                gradient = _slice(builder, gradient, part, node.layer)
            _accumulate(builder, gradients, value, gradient, node)
    for param in graph.params:
        if param.name not in gradients:
            raise TTEError(
                "TTE-E041",
                f"the loss does not depend on {param.name}, so it cannot learn",
                where=f"update scheme, parameter {param.name}",
                fix="remove its layer from the scheme",
            )
    return rewrite(
        graph,
        builder.nodes,
        consts=(*graph.consts, *builder.consts.values()),
        outputs=(graph.outputs[0], *(gradients[p.name] for p in graph.params)),
    )


def find_wanted(graph: Graph) -> dict[str, Wanted]:
    """For every value that some param influences: how much of its gradient is needed."""
    wanted: dict[str, Wanted] = {p.name: Whole() for p in graph.params}
    rounded: set[str] = set()  # params that are rounded before they are read
    for node in graph.nodes:
        if not any(v.name in wanted for v in node.inputs):
            continue
        if node.op == "qnn.round":
            rounded.add(node.output.name)
        for value in node.outputs:
            wanted[value.name] = _trained_part(node, rounded) or Whole()
    return wanted


def _trained_part(node: Node, rounded: set[str]) -> Part | None:
    """A weight put together from one trained param and frozen rest is wanted in part."""
    if node.op != "concatenate":
        return None
    trained = [v for v in node.inputs if isinstance(v, Param) or v.name in rounded]
    if not all(isinstance(v, Const) or v in trained for v in node.inputs):
        return None
    if len(trained) != 1:
        return None
    axis = node.attrs["axis"]
    assert isinstance(axis, int)
    start = 0
    for value in node.inputs:
        if value == trained[0]:
            return Part(axis, start, start + value.type.shape[axis])
        start += value.type.shape[axis]
    raise AssertionError("unreachable")


def _accumulate(builder: Builder, gradients: dict[str, Value], value: Value, gradient: Value, node: Node) -> None:
    """Sum at forks: a value that is read twice gets both gradients."""
    if value.name in gradients:
        gradient = builder.call("add", gradients[value.name], gradient, layer=node.layer)
    gradients[value.name] = gradient


def _slice(builder: Builder, gradient: Value, part: Part, layer: str) -> Value:
    rank = gradient.type.rank
    begin, end = [0] * rank, list(gradient.type.shape)
    begin[part.axis], end[part.axis] = part.start, part.stop
    return builder.call("slice", gradient, begin=tuple(begin), end=tuple(end), strides=(1,) * rank, layer=layer)
