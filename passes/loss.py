"""Appends the loss to a forward graph."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from tte.document import tally
from tte.errors import TTEError
from tte.ir import Builder, Graph, Node, TensorType, Value, rewrite
from tte.scheme import Loss

TARGET = "target"
ROUNDING = ("qnn.quantize", "qnn.dequantize", "qnn.requantize")


def append_loss(
    graph: Graph,
    loss: Loss,
    target_is_input: bool = False,
    prepared: Callable[[Builder, Value], Value] = lambda builder, x: x,
    clipped: bool = False,
) -> Graph:
    """The graph with a scalar loss as its only output and, unless the input is its own target, an input ``target``.

    A softmax at the end is absorbed: cross entropy works on logits, and softmax + cross entropy of probabilities is
    the same function, computed without losing digits.
    clipped: the gradient of the loss will be limited; then it is that of the logarithms of the probabilities.
    prepared: brings the caller's input into the form of the model's own, which is what an autoencoder is to give back.
    """
    builder = Builder()
    builder.nodes.extend(graph.nodes)
    prediction = graph.outputs[0]
    inputs = graph.inputs
    layer = "loss"
    if loss.name == "cross_entropy":
        prediction = _logits(builder, graph, clipped)
        target = Value(TARGET, TensorType(prediction.type.shape[:-1], "int32"))
        operands = [prediction, target]
        classes = prediction.type.shape[-1]
        if loss.class_weights:
            if len(loss.class_weights) != classes:
                raise TTEError(
                    "TTE-E042",
                    f"{tally(len(loss.class_weights), 'class weight')} for {classes} classes",
                    where="loss.class_weights",
                    fix=f"give {classes} numbers",
                )
            operands.append(builder.const(np.asarray(loss.class_weights, np.float32)))
        value = builder.call(
            "nn.cross_entropy",
            *operands,
            layer=layer,
            label_smoothing=float(loss.label_smoothing),
            reduction=loss.reduction,
        )
    else:
        if target_is_input:
            target = prepared(builder, graph.inputs[0])
            if target.type.size != prediction.type.size:
                raise TTEError(
                    "TTE-E042",
                    f"`target: input` needs an output like the input, but {prediction.type} is not {target.type}",
                    where="io.target",
                    fix="use `target: float`, or an autoencoder",
                )
            operand: Value = target
            if target.type.shape != prediction.type.shape:
                operand = builder.call("reshape", target, newshape=prediction.type.shape, layer=layer)
        else:
            target = operand = Value(TARGET, prediction.type)
        extra = {"delta": float(loss.delta)} if loss.name == "huber" else {}
        value = builder.call(f"nn.{loss.name}", prediction, operand, layer=layer, reduction=loss.reduction, **extra)
    if not (target_is_input and loss.name != "cross_entropy"):
        inputs = (*graph.inputs, target)
    with_loss = replace(graph, inputs=inputs, consts=(*graph.consts, *builder.consts.values()), outputs=(value,))
    return rewrite(with_loss, builder.nodes)


def last_softmax(graph: Graph) -> Node | None:
    """The softmax or log-softmax that makes the output; behind it at most a reshape that keeps its rows whole, and, of
    quantised models, the rounding of the probabilities."""
    output, producer = graph.outputs[0], graph.producer()
    shape, node = output.type.shape, producer.get(output.name)
    classes = shape[1:2] if len(shape) > 2 else shape[-1:]

    def keeps_rows(node: Node) -> bool:
        reshaped = node.op == "reshape" and node.inputs[0].type.shape[-1:] == classes
        return reshaped or node.op in ROUNDING or (node.op == "qnn.sum" and not node.attrs["axis"])

    while node and keeps_rows(node):
        node = producer.get(node.inputs[0].name)
    return node if node and node.op in ("nn.softmax", "nn.log_softmax") else None


def skip_last_rounding(graph: Graph) -> Graph:
    """The output as the last softmax makes it, in the same shape, but not rounded: what the loss is a function of."""
    last, builder = last_softmax(graph), Builder()
    behind: dict[str, Value] = {} if last is None else {last.output.name: last.output}
    for node in graph.nodes:
        source = behind.get(node.inputs[0].name) if node.inputs else None
        if source is None:
            builder.append(node)
        elif node.op == "reshape":
            behind[node.output.name] = builder.call("reshape", source, layer=node.layer, **node.attrs)
        else:
            behind[node.output.name] = source
    return rewrite(graph, builder.nodes, outputs=tuple(behind.get(v.name, v) for v in graph.outputs))


def _rows(type: TensorType) -> tuple[int, ...]:
    """The shape with the classes last: of (1, C, 1, 1) it is (1, C). Raises TTEError."""
    shape = type.shape
    if type.rank > 2 and type.size != shape[1]:
        raise TTEError(
            "TTE-E042",
            f"PyTorch's cross entropy has its classes on axis 1, with a label for each of the others: {type}",
            where="loss",
            fix="flatten the output to (1, classes)",
        )
    return shape if type.rank <= 2 else shape[:2]


def _logits(builder: Builder, graph: Graph, clipped: bool) -> Value:
    """What cross entropy works on: (classes,) or (rows, classes)."""
    output, shape = graph.outputs[0], _rows(graph.outputs[0].type)
    if not shape or shape[-1] < 2:
        raise TTEError(
            "TTE-E042",
            f"cross entropy needs at least 2 classes, the model's output is {output.type}",
            where="loss",
            fix="use `loss: mse` or `loss: bce_with_logits`, or give the model a head with classes",
        )
    softmax, logits = last_softmax(graph), output
    if softmax:
        logits = softmax.inputs[0]
        logits = builder.call("nn.log_softmax", logits, layer=softmax.layer) if clipped else logits
    return logits if logits.type.shape == shape else builder.call("reshape", logits, newshape=shape, layer="loss")
