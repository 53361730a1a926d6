"""Appends the loss to a forward graph."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from tte.errors import TTEError
from tte.ir import Builder, Graph, TensorType, Value, rewrite
from tte.scheme import Loss

TARGET = "target"


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
    nodes = list(graph.nodes)
    prediction = graph.outputs[0]
    if loss.name == "cross_entropy":
        last = graph.producer().get(prediction.name)
        builder.nodes.extend(nodes)
        if last and last.op in ("nn.softmax", "nn.log_softmax"):
            logits = last.inputs[0]
            prediction = builder.call("nn.log_softmax", logits, layer=last.layer) if clipped else logits
    else:
        builder.nodes.extend(nodes)
    inputs = graph.inputs
    layer = "loss"
    if loss.name == "cross_entropy":
        if prediction.type.rank < 1 or prediction.type.shape[-1] < 2:
            raise TTEError(
                "TTE-E042",
                f"cross entropy needs at least 2 classes on the last axis, the model's output is {prediction.type}",
                where="loss",
                fix="use `loss: mse` or `loss: bce_with_logits`, or give the model a head with classes",
            )
        target = Value(TARGET, TensorType(prediction.type.shape[:-1], "int32"))
        operands = [prediction, target]
        classes = prediction.type.shape[-1]
        if loss.class_weights:
            if len(loss.class_weights) != classes:
                raise TTEError(
                    "TTE-E042",
                    f"{len(loss.class_weights)} class weights for {classes} classes",
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
