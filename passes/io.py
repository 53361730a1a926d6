"""Puts the caller's input format in front of a model: element type, layout, normalisation."""

import numpy as np

from tte.document import tally
from tte.errors import TTEError
from tte.ir import Builder, Graph, TensorType, Value, rewrite
from tte.scheme import InputFormat, InputOutput

# The model's own layout by rank; the other name of the same data puts channels last.
OWN_LAYOUT = {4: "nchw", 3: "ncl"}
CHANNELS_LAST = {"nhwc": (0, 3, 1, 2), "nlc": (0, 2, 1)}


def own_layout(type: TensorType) -> str:
    """How a layout is named in headers and reports: nchw, ncl, or plain "model" where there are no channels."""
    return OWN_LAYOUT.get(type.rank, "model")


def apply_input_format(graph: Graph, format: InputFormat) -> Graph:
    """The graph that takes its input as ``format`` says: x -> transpose -> cast -> (x - mean) / std -> model."""
    value = graph.inputs[0]
    own = value.type
    layout = own_layout(own) if format.layout == "model" else format.layout
    dtype = own.dtype if format.dtype == "model" else format.dtype
    if len(layout) != own.rank and layout != "model":
        raise TTEError(
            "TTE-E043",
            f"the input has {own.rank} dimensions {own.shape}, which is not {layout}",
            where="io.input.layout",
            fix=f"use `layout: {own_layout(own)}`",
        )
    if layout == own_layout(own) and dtype == own.dtype and not format.mean and not format.std:
        return graph
    builder = Builder()
    given = Value(value.name, TensorType(_inverse(own.shape, CHANNELS_LAST.get(layout)), dtype))
    x = prepare(builder, given, own, format)
    # The model's nodes read the prepared value under the name of the old input.
    prepared = Value("prepared", x.type)
    nodes = [_renamed(node, {x.name: prepared}) for node in builder.nodes]
    nodes += [_renamed(node, {value.name: prepared}) for node in graph.nodes]
    outputs = tuple(prepared if v.name == value.name else v for v in graph.outputs)
    return rewrite(graph, nodes, inputs=(given,), consts=(*graph.consts, *builder.consts.values()), outputs=outputs)


def require_rows(own: TensorType, io: InputOutput) -> None:
    """Raises TTEError (E043) where the input cannot come row by row. own: type of the model's input"""
    if own.rank != 4:
        what, fix = f"{own.shape} is no picture, which has rows of (width, channels)", "leave out `--input rows`"
        raise TTEError("TTE-E043", what, where="--input rows", fix=fix)
    if io.input.layout != "nhwc":
        what = "a row holds the channels of each of its pixels side by side"
        raise TTEError("TTE-E043", what, where="--input rows", fix="say `layout: nhwc` under `io: {input: ...}`")
    if io.target == "input":
        what = "a picture that comes row by row is gone when its loss is computed, so it cannot be the target"
        raise TTEError("TTE-E043", what, where="--input rows", fix="choose `--input arena`, or another `io.target`")


def take_rows(graph: Graph) -> Graph:
    """The graph whose input is not in memory: its rows are asked for."""
    x = graph.inputs[0]
    builder = Builder()
    taken = {x.name: builder.call("source", x, layer="input")}
    return rewrite(graph, [*builder.nodes, *(_renamed(node, taken) for node in graph.nodes)])


def prepare(builder: Builder, x: Value, own: TensorType, format: InputFormat) -> Value:
    """The caller's input in the form of the model's own."""
    if axes := CHANNELS_LAST.get(format.layout):
        x = builder.call("transpose", x, axes=axes, layer="input")
    if x.type.dtype != own.dtype:
        x = builder.call("cast", x, dtype=own.dtype, layer="input")
    if format.mean or format.std:
        mean, std = _per_channel(format, own)
        x = builder.call("subtract", x, builder.const(mean), layer="input")
        x = builder.call("multiply", x, builder.const((1.0 / std.astype(np.float64)).astype(np.float32)), layer="input")
    return x


def _inverse(shape: tuple[int, ...], axes: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape whose transposition by ``axes`` is ``shape``."""
    if axes is None:
        return shape
    result = [0] * len(shape)
    for position, axis in enumerate(axes):
        result[axis] = shape[position]
    return tuple(result)


def _per_channel(format: InputFormat, type: TensorType) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, shaped to broadcast along the channel axis (1) of the model's own layout."""
    channels = type.shape[1] if type.rank > 1 else 1
    arrays = []
    for name, numbers, default in (("mean", format.mean, 0.0), ("std", format.std, 1.0)):
        values = np.asarray(numbers or [default], np.float32)
        if values.size not in (1, channels):
            raise TTEError(
                "TTE-E043",
                f"{tally(values.size, 'number')} for {tally(channels, 'channel')}",
                where=f"io.input.{name}",
                fix=f"give one number, or {channels}",
            )
        arrays.append(values.reshape(-1, *(1,) * max(type.rank - 2, 0)))
    return arrays[0], arrays[1]


def _renamed(node, names):  # type: ignore[no-untyped-def]
    from dataclasses import replace

    return replace(
        node,
        inputs=tuple(names.get(v.name, v) for v in node.inputs),
        outputs=tuple(names.get(v.name, v) for v in node.outputs),
    )
