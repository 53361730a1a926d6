"""Kernels for cores with the DSP extension, alone on an emulated core, against the interpreter: every bit."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from bare import EVERYTHING, Case, open_cores, vary

from tte.codegen.kernel import Kernel
from tte.ir import Builder, Graph, Node, TensorType, Value, evaluate, verify
from tte.ir.rows import expand
from tte.ir.tiles import scratch_bytes
from tte.passes.regions import wrap
from tte.runner.bare import Core

pytest.importorskip("unicorn", reason="pip install 'tte[emulate]'")


def is_fast(case: Case) -> bool:
    """All convolutions have their faster form."""
    kernel = case.call.kernel
    return all(k.portable for k in (kernel.parts if kernel.template in ("stream", "tiles") else (kernel,)))


def convolution(
    x: tuple[int, int, int] | TensorType,
    channels: int,
    kernel: tuple[int, int],
    scale: str = "float",
    mask: bool = False,
    limits: tuple[int, int] = (-128, 127),
    weights: str = "int8",
    split: tuple[int, int] | None = None,
    zero: int = 3,
    shift: int = 0,
    add: bool | str = False,
    **attrs: object,
) -> Graph:
    """int8 (H, W, C) by ``channels`` filters, as int8 again. split: axis and place at which the weights are cut;
    add: another tensor, which the sum takes the place of if "kept" does not say otherwise."""
    builder = Builder()
    groups = int(str(attrs.get("groups", 1)))
    inputs = [Value("x", x if isinstance(x, TensorType) else TensorType((1, *x), "int8"))]
    shape = (channels, *kernel, inputs[0].type.shape[3] // groups)
    if split is None:
        inputs.append(Value("w", TensorType(shape, weights)))
        w = inputs[1]
    else:
        axis, at = split
        for name, n in (("w0", at), ("w1", shape[axis] - at)):
            inputs.append(Value(name, TensorType((*shape[:axis], n, *shape[axis + 1 :]), weights)))
        w = builder.call("concatenate", *inputs[1:], axis=axis)
    inputs.append(Value("b", TensorType((channels,), "int32")))
    multiplier = [Value("m", TensorType((channels,), "float32" if scale == "float" else "int32"))]
    if scale == "tflite":
        multiplier.append(Value("exponent", multiplier[0].type))
    acc = builder.call("qnn.conv2d", inputs[0], w, inputs[-1], zero_point=zero, **attrs)
    inputs += multiplier
    limit = {"low": limits[0], "high": limits[1], "mask": mask, "shift": shift}
    made = builder.calls("qnn.requantize", acc, *multiplier, scale=0.1, zero_point=-7, **limit)
    if add:
        inputs.append(Value("other", made[0].type))
        terms = {"a_scale": 0.1, "a_zero": -7, "b_scale": 0.08, "b_zero": 11, "scale": 0.11, "bits": 19}
        made = (builder.call("qnn.add", made[0], inputs[-1], **terms), *made[1:])
    whole = wrap(builder.nodes, made, {"strategy": "fused"}, "layer")
    if add is True:  # in place
        whole = replace(whole, inplace=(whole.inputs.index(inputs[-1]), *[None] * (len(made) - 1)))
    return Graph("main", tuple(inputs), nodes=(whole,), outputs=made).renumbered()


def chain(shape: tuple[int, int, int], layers: Sequence[dict[str, object]], **strategy: object) -> Graph:
    """Convolutions one behind the other that run by pieces: what ``convolution`` makes of these arguments."""
    nodes: list[Node] = []
    inputs = [Value("x0", TensorType((1, *shape), "int8"))]
    last = inputs[0]
    for i, layer in enumerate(layers):
        (node,) = (graph := convolution(last.type, **layer)).nodes
        names = {v.name: replace(v, name=f"{v.name}{i}") for v in graph.inputs[1:]} | {graph.inputs[0].name: last}
        inputs += [names[v.name] for v in graph.inputs[1:]]
        made = tuple(replace(v, name=f"%{i}{j}") for j, v in enumerate(node.outputs))
        nodes.append(replace(node, inputs=tuple(names[v.name] for v in node.inputs), outputs=made))
        last = made[0]
    whole = wrap(nodes, nodes[-1].outputs, strategy, "chain")
    return verify(Graph("main", tuple(inputs), nodes=(whole,), outputs=nodes[-1].outputs).renumbered())


def matrix(
    n: int,
    depth: int,
    channels: int,
    scale: str = "float",
    single: bool = False,
    shift: int = 0,
    mask: bool = False,
    sums: bool = False,
) -> Graph:
    """int8 (n, depth) by (channels, depth), as int8 again, or sums. single: one multiplier for all channels"""
    builder = Builder()
    types = {"x": ((n, depth), "int8"), "w": ((channels, depth), "int8"), "b": ((channels,), "int32")}
    types["m"] = ((1 if single else channels,), "float32" if scale == "float" else "int32")
    inputs = [Value(name, TensorType(*of)) for name, of in types.items()]
    made = builder.calls("qnn.dense", *inputs[:3], zero_point=-9)
    if sums:
        inputs.pop()
    else:
        made = builder.calls(
            "qnn.requantize", *made, inputs[3], scale=0.1, zero_point=4, shift=shift, mask=mask, low=-128, high=127
        )
    whole = wrap(builder.nodes, made, {"strategy": "fused"}, "layer")
    return verify(Graph("main", tuple(inputs), nodes=(whole,), outputs=made).renumbered())


def draw(graph: Graph, seed: int, spread: str) -> list[np.ndarray]:
    """Operands of all values; spread: over "all" of them, the "ends" of their type, or one end for a whole picture or
    filter ("flat"), which makes the largest sums. Scales bring most of the others into int8."""
    rng = np.random.default_rng(seed)
    (first, *_) = expand(graph.nodes[0])
    members = first.body.nodes if first.body else (first,)
    shift = next((n.attrs["shift"] for n in members if n.op == "qnn.requantize"), None)
    depth, exact = 0.0, any(v.name == "exponent" for v in graph.inputs)
    arrays = []
    for value in graph.inputs:
        shape, dtype = value.type.shape, value.type.dtype
        if value.name[0] == "w":
            depth = np.sqrt(value.type.size / shape[0])
        if dtype == "bit":
            arrays.append(rng.random(shape) > 0.4)
        elif dtype == "float32" and shape == ():
            arrays.append(np.asarray(rng.integers(0, 2), np.float32))
        elif dtype == "int32" and shape == ():
            arrays.append(rng.integers(-3, 4, shape).astype(np.int32))
        elif value.name[0] == "m" and shift is None:
            arrays.append(rng.integers(-(2**30), 2**30 + 1, shape, np.int32))
        elif value.name == "exponent":
            arrays.append(rng.integers(-12, 3, shape, np.int32))
        elif value.name == "m" and exact:
            arrays.append(rng.integers(2**30, 2**31, shape, np.int32))
        elif value.name[0] == "m":
            m = rng.uniform(0.2, 1.5, shape) / (128 * 74 * depth / 60)
            arrays.append(
                m.astype(np.float32) if dtype == "float32" else np.rint(m * 2.0 ** (32 - shift)).astype(np.int32)
            )
        elif dtype == "int32":
            arrays.append(rng.integers(-20000, 20000, shape, np.int32))
        elif spread == "all":
            arrays.append(rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max + 1, shape, dtype))
        else:
            ends = np.asarray([np.iinfo(dtype).min, np.iinfo(dtype).max], dtype)
            drawn = shape if spread == "ends" else (shape[0], *[1] * (len(shape) - 1))
            arrays.append(np.array(np.broadcast_to(rng.choice(ends, drawn), shape)))
    return arrays


def product_cases() -> Iterator[Case]:
    """1 x 1: numbers of pixels, channels in and out."""
    for (h, w), c, o in product([(1, 2), (1, 3), (5, 5), (16, 9)], [1, 2, 3, 4, 8, 17], [2, 3, 8, 11]):
        for scale in ("float", "fixed"):
            yield Case(f"1x1 {h}x{w} {c}->{o} {scale}", convolution((h, w, c), o, (1, 1), scale))
    for c, o in ((96, 16), (97, 10), (256, 24), (1040, 4)):
        yield Case(f"1x1 4x4 {c}->{o}", convolution((4, 4, c), o, (1, 1)))
    yield Case("1x1 1x2 16400->2", convolution((1, 2, 16400), 2, (1, 1)))
    for stride in ((2, 2), (1, 2), (3, 1)):
        yield Case(f"1x1 7x6 5->4 stride {stride}", convolution((7, 6, 5), 4, (1, 1), strides=stride))
    for o in (8, 16, 12):
        for limits in ((-128, 127), (-7, 60)):
            graph = convolution((6, 5, 8), o, (1, 1), mask=True, limits=limits)
            yield Case(f"1x1 6x5 8->{o} mask {limits}", graph)
    for shift, mask in product((-1, -7, 2), (False, True)):
        graph = convolution((5, 5, 8), 8, (1, 1), "fixed", shift=shift, mask=mask)
        yield Case(f"1x1 5x5 8->8 shift {shift} mask {mask}", graph)
    for scale, mask in product(("float", "fixed"), (False, True)):
        graph = convolution((4, 5, 6), 8, (1, 1), scale, mask=mask, add=True)
        yield Case(f"1x1 4x5 6->8 {scale} mask {mask} add", graph)
        graph = convolution((9, 15, 6), 5, (1, 1), scale, mask=mask, add=True)
        yield Case(f"1x1 9x15 6->5 {scale} mask {mask} add", graph)
    for (h, w), depth, channels, split in product([(1, 2), (3, 5)], [3, 4, 13], [2, 7], [None, (3, 1), (3, 2)]):
        for mask, add in ((False, False), (True, True)):
            graph = convolution((h, w, depth), channels, (1, 1), split=split, mask=mask, add=add)
            yield Case(f"1x1 {h}x{w} {depth}->{channels} split {split} mask {mask}, no room", graph, 0)
    for size, (depth, o), add, room in product(
        [(16, 16), (5, 5)], [(16, 8), (7, 6), (9, 5)], (True, "kept"), (EVERYTHING, 900)
    ):
        graph = convolution((*size, depth), o, (1, 1), ("float", "fixed")[o % 2 == 0], add=add)
        yield Case(f"1x1 {size} {depth}->{o} adds {add} in {room} bytes", graph, room)
    for scale, shift in (("fixed", 2), ("tflite", 0)):  # a sum behind what is rescaled otherwise
        graph = convolution((4, 5, 6), 8, (1, 1), scale, shift=shift, add="kept")
        yield Case(f"1x1 4x5 6->8 {scale} {shift} adds", graph)
    for room, scale in product((300, 700, 2000), ("float", "fixed")):
        yield Case(f"1x1 16x17 8->6 {scale} in {room} bytes", convolution((16, 17, 8), 6, (1, 1), scale), room)
    yield Case("1x1 4x5 8->7 fixed split (0, 3)", convolution((4, 5, 8), 7, (1, 1), "fixed", split=(0, 3)))
    for turn, (size, depth, o) in enumerate(product([(3, 3), (4, 5)], [100, 101, 102, 103, 161, 403, 641], [5, 8])):
        more = ({}, {"mask": True}, {"add": True}, {"add": "kept"})[turn % 4]
        graph = convolution((*size, depth), o, (1, 1), ("float", "fixed")[turn // 2 % 2], **more)
        yield Case(f"1x1 {size} {depth}->{o} {more}, no room", graph, 0)
    for weights in ("int8", "int16"):
        for split in (None, (3, 4), (3, 8), (3, 5), (0, 3), (0, 4)):
            for depth in (12, 13):
                graph = convolution((4, 5, depth), 7, (1, 1), weights=weights, split=split)
                yield Case(f"1x1 4x5 {depth}->7 {weights} split {split}", graph)


def window_cases() -> Iterator[Case]:
    """k x k: strides, paddings, dilations."""
    for (h, w), c, kernel in product([(5, 5), (8, 3), (9, 12)], [1, 3, 4, 6], [(3, 3), (1, 5), (2, 2), (5, 3)]):
        for stride, padding in (((1, 1), (1, 1, 1, 1)), ((2, 2), (0, 1, 1, 0)), ((1, 2), (0, 0, 0, 0))):
            if kernel[0] <= h + padding[0] + padding[2] and kernel[1] <= w + padding[1] + padding[3]:
                graph = convolution((h, w, c), 5, kernel, strides=stride, padding=padding)
                pixels = graph.outputs[0].type.size // 5
                yield Case(f"{kernel} {h}x{w} {c}->5 {stride} {padding}", graph, fast=pixels > 1)
    graph = convolution((9, 9, 4), 6, (3, 3), dilation=(2, 3), padding=(2, 3, 2, 3))
    yield Case("3x3 dilated", graph)
    graph = convolution((4, 9, 3), 4, (3, 3), dilation=(2, 2), padding=(1, 2, 1, 2))
    yield Case("3x3 that never lies inside", graph)
    for split in ((3, 2), (0, 3)):
        graph = convolution((6, 6, 4), 6, (3, 3), padding=(1, 1, 1, 1), split=split)
        yield Case(f"3x3 split {split}", graph)
    graph = convolution((6, 6, 4), 8, (3, 3), "fixed", mask=True, padding=(1, 1, 1, 1), weights="int16")
    yield Case("3x3 int16 mask", graph)
    for c, split in ((5, (3, 2)), (3, (0, 3)), (48, None)):
        graph = convolution((6, 6, c), 6, (3, 3), padding=(1, 1, 1, 1), weights="int16", split=split)
        yield Case(f"3x3 {c}->6 int16 split {split}", graph)


def vector_cases() -> Iterator[Case]:
    """Matrix times vector."""
    for n, depth, channels in product([1, 2], [4, 5, 10, 16, 23, 640], [4, 5, 7, 12]):
        yield Case(f"dense {n}x{depth}->{channels}", matrix(n, depth, channels))
    for depth, channels, shift in product([8, 23, 1028], [4, 7], [0, -7]):
        yield Case(f"dense 1x{depth}->{channels} shift {shift}", matrix(1, depth, channels, "fixed", shift=shift))
    for n, single, scale, mask in product([1, 2], [False, True], ["float", "fixed"], [False, True]):
        graph = matrix(n, 40, 6, scale, single, mask=mask)
        yield Case(f"dense {n}x40->6 {scale} single {single} mask {mask}", graph)
    yield Case("dense 2x9->5 sums", matrix(2, 9, 5, sums=True))
    yield Case("dense 1x3->4", matrix(1, 3, 4), fast=False)
    yield Case("dense 1x8->3", matrix(1, 8, 3), fast=False)


def depthwise(
    x: tuple[int, int, int], kernel: tuple[int, int], scale: str = "float", room: int = EVERYTHING, **more: object
) -> Case:
    told = ", ".join(f"{name} {value}" for name, value in more.items())
    limit = f" in {room} bytes" if room < EVERYTHING else ""
    h, w, c = x
    graph = convolution(x, c, kernel, scale, groups=c, **more)
    return Case(f"depthwise {kernel[0]}x{kernel[1]} {h}x{w}x{c} {scale} {told}{limit}", graph, room)


def depthwise_cases() -> Iterator[Case]:
    """One filter per channel: windows, strides, paddings of each side, numbers of channels."""
    sizes = [(1, 1), (1, 4), (4, 1), (2, 3), (5, 5), (6, 7), (9, 12)]
    paddings = [(0, 0, 0, 0), (1, 1, 1, 1), (2, 0, 1, 2), (0, 3, 3, 0)]
    strides = [(1, 1), (2, 2), (1, 2), (2, 1), (3, 3)]
    kernels = [(3, 3), (5, 5), (7, 7), (1, 3), (3, 1), (2, 2), (1, 1), (4, 4), (1, 8), (9, 2), (8, 8), (2, 11)]
    turn = 0
    for (h, w), kernel in product(sizes, kernels):
        for padding, stride in product(paddings, strides):
            if kernel[0] <= h + padding[0] + padding[2] and kernel[1] <= w + padding[1] + padding[3]:
                turn += 1
                if turn % 5 == 0:
                    scale, zero, c = (
                        ("float", "fixed")[turn % 2],
                        (3, -128, 127)[turn % 3],
                        (2, 3, 4, 5, 8)[turn // 5 % 5],
                    )
                    yield depthwise((h, w, c), kernel, scale, strides=stride, padding=padding, zero=zero)
    same = {(3, 3): (1, 1, 1, 1), (5, 5): (2, 2, 2, 2), (7, 7): (3, 3, 3, 3)}
    for kernel, padding in same.items():
        for x, stride in product([(4, 4, 8), (8, 8, 16), (25, 5, 12), (33, 31, 6)], [(1, 1), (2, 2)]):
            yield depthwise(x, kernel, "fixed", padding=padding, strides=stride, zero=-128, shift=-(x[0] % 5))
        for c, limits, weights, scale in product(
            (8, 12), ((-128, 127), (-7, 60)), ("int8", "int16"), ("float", "fixed")
        ):
            more = {"mask": True, "limits": limits, "weights": weights, "split": (0, 3)}
            yield depthwise((7, 6, c), kernel, scale, padding=padding, **more)
        for room in (560, 800, 1000, 3000):
            for c, mask in ((6, False), (8, True)):
                yield depthwise((14, 13, c), kernel, "fixed", room, padding=padding, mask=mask)
        yield depthwise((6, 6, 5), kernel, padding=padding, add=True)
        yield depthwise((15, 13, 6), kernel, "fixed", 1000, padding=padding, add=True)
        yield depthwise((6, 6, 5), kernel, "fixed", padding=padding, shift=2)
        yield depthwise((5, 6, 1100), kernel, padding=padding)
        yield replace(depthwise((4, 300, 4), kernel, padding=padding), fast=kernel == (3, 3))
        yield depthwise((4, 128, 4), kernel, padding=padding)
    case = depthwise((9, 9, 4), (3, 3), dilation=(2, 2))
    yield replace(case, fast=False)
    yield replace(depthwise((9, 9, 4), (9, 9)), fast=False)
    yield depthwise((9, 9, 4), (1, 3), dilation=(2, 1))


def piece_cases() -> Iterator[Case]:
    """Layers that run row by row, from ring to ring, or by tiles of channels."""
    for c, stride, scale in product((5, 8), ((1, 1), (2, 2)), ("fixed", "float")):
        for size in (3, 5, 7):
            layer = {"channels": c, "groups": c, "scale": scale, "zero": -128}
            wide = layer | {"kernel": (size, size), "padding": (size // 2,) * 4}
            more = [wide, wide | {"strides": stride}, wide | {"mask": True}]
            yield Case(f"rows {c} channels {stride} {scale} {size}", chain((13, 9, c), more, strategy="rows"))
    wide = {"channels": 40, "kernel": (3, 3), "padding": (1, 1, 1, 1), "zero": -128}
    graph = chain((7, 5, 30), [wide, {"channels": 5, "kernel": (1, 1)}], strategy="rows")
    yield Case("rows of 1x1 behind 3x3, no room", graph, 0, fast=False)  # the window has none
    graph = chain(
        (7, 12, 30), [wide | {"channels": 8}, {"channels": 5, "kernel": (1, 1), "scale": "fixed"}], strategy="rows"
    )
    yield Case("rows of thin 1x1", graph)
    layers = [{"channels": 120, "kernel": (1, 1)}, {"channels": 8, "kernel": (1, 1), "strides": (1, 2)}]
    yield Case("rows of 120 channels, no room", chain((5, 19, 8), layers, strategy="rows"), 0)
    for c, more in product((3, 4), ({"strides": (2, 2)}, {"dilation": (1, 2)})):
        layers = [{"channels": c, "kernel": (2, 2)}, {"channels": 5, "kernel": (3, 3), "padding": (1, 1, 1, 1)} | more]
        yield Case(f"rows of 3x3 from a ring of {c} channels {more}", chain((9, 13, 3), layers, strategy="rows"))
    for width in (4, 2):
        first = {"channels": 8, "kernel": (3, 3), "padding": (1, 1, 1, 1), "groups": 8}
        layers = [first, first | {"kernel": (5, 5)}, first | {"kernel": (5, 3)}]
        yield Case(f"tiles of {width}", chain((7, 6, 8), layers, strategy="tiles", width=width))


def backward(
    pixels: tuple[int, int],
    depth: int,
    channels: int,
    end: str,
    single: bool = False,
    split: tuple[int, int] | None = None,
    kernel: tuple[int, int] = (1, 1),
    weights: str = "int8",
    other: str = "int8",
    **attrs: object,
) -> Graph:
    """int8 (H, W, depth) by (depth, *kernel, channels), down the columns; rescaled and masked, added in place, or sums.
    channels: of a group"""
    builder = Builder()
    inputs = [Value("x", TensorType((1, *pixels, depth), "int8"))]
    shape = (depth, *kernel, channels)
    pieces = [shape]
    if split is not None:
        axis, at = split
        pieces = [(*shape[:axis], n, *shape[axis + 1 :]) for n in (at, shape[axis] - at)]
    inputs += [Value(f"w{i}", TensorType(piece, weights)) for i, piece in enumerate(pieces)]
    w = inputs[1] if split is None else builder.call("concatenate", *inputs[1:], axis=split[0])
    y = builder.call("qnn.conv2d_transpose", inputs[0], w, **attrs)
    if end != "sums":
        named = {
            "m": TensorType((1 if single else y.type.shape[3],), "int32"),
            "e": TensorType((), "int32"),
            "to": TensorType((), "int32"),
            "bits": TensorType(y.type.shape, "bit"),
            "other": TensorType(y.type.shape, other),
        }
        given = {name: Value(name, type) for name, type in named.items()}
        m, e, to = given["m"], given["e"], given["to"]
        inputs += [m, e, to]
        if end == "added":
            inputs.append(given["other"])
            y = builder.call("qnn.add_gradients", y, m, e, given["other"], m, e, to, a_bits=41, b_bits=24)
        else:
            y = builder.call("qnn.rescale_gradient", y, m, e, to, bits=43)
        if end == "masked":
            inputs.append(given["bits"])
            y = builder.call("nn.apply_mask", y, given["bits"])
    whole = wrap(builder.nodes, [y], {"strategy": "fused"}, "layer") if len(builder.nodes) > 1 else builder.nodes[0]
    if end == "added":
        whole = replace(whole, inplace=(next(i for i, v in enumerate(whole.inputs) if v.name == "other"),))
    return Graph("main", tuple(inputs), nodes=(whole,), outputs=(y,)).renumbered()


def backward_cases() -> Iterator[Case]:
    """Input gradients of pointwise convolutions, in integers."""
    for pixels, depth, channels in product([(1, 2), (1, 3), (5, 5), (9, 15)], [1, 3, 4, 5, 8, 18], [2, 3, 8, 11]):
        yield Case(f"back {pixels} {depth}->{channels}", backward(pixels, depth, channels, "masked"))
    for end, single, (depth, channels) in product(
        ("sums", "added", "rescaled"), (False, True), [(6, 8), (97, 10), (4, 7)]
    ):
        graph = backward((4, 5), depth, channels, end, single)
        yield Case(f"back 4x5 {depth}->{channels} {end} {single}", graph)
    for split in ((3, 2), (3, 3), (3, 5), (0, 4), (0, 8)):
        yield Case(f"back 4x4 9->7 split {split}", backward((4, 4), 9, 7, "masked", split=split))
    yield Case("back 4x4 9->7 split (0, 3)", backward((4, 4), 9, 7, "masked", split=(0, 3)))
    yield Case("back 4x4 9->7 split (3, 1)", backward((4, 4), 9, 7, "masked", split=(3, 1)), fast=False)
    for room in (300, 700, 2000):
        yield Case(f"back 16x17 8->6 in {room} bytes", backward((16, 17), 8, 6, "masked"), room)
    yield from backward_window_cases()
    for (h, w), kernel, channels in product([(4, 4), (5, 7), (8, 8)], [(3, 3), (5, 5), (7, 7), (2, 3), (1, 1)], [3, 8]):
        for turn, padding in enumerate([(0, 0, 0, 0), (1, 1, 1, 1), (2, 0, 1, 2)]):
            if max(padding[:2]) < min(kernel):
                more = {
                    "groups": channels,
                    "padding": padding,
                    "kernel": kernel,
                    "weights": ("int8", "int16")[turn % 2],
                }
                end = ("masked", "added", "sums")[(turn + channels) % 3]
                graph = backward((h, w), channels, 1, end, bool(turn % 2), **more)
                yield Case(f"back {h}x{w} depthwise {kernel} {padding} {channels} {end}", graph)
    split = backward((6, 5), 6, 1, "masked", split=(0, 4), groups=6, kernel=(3, 3), padding=(1, 1, 1, 1))
    yield Case("back, depthwise split", split)
    for turn, (strides, kernel, (h, w)) in enumerate(
        product([(2, 2), (2, 1), (1, 2), (3, 3)], [(3, 3), (5, 5), (7, 7)], [(4, 4), (3, 6), (9, 5)])
    ):
        padding = (kernel[0] // 2, kernel[1] // 2, (kernel[0] - 1) // 2, (kernel[1] - 1) // 2)
        more = {"groups": (4, 8, 3)[turn % 3], "kernel": kernel, "strides": strides, "padding": padding}
        end = ("masked", "added", "sums")[turn % 3]
        graph = backward((h, w), more["groups"], 1, end, bool(turn % 2), **more)
        yield Case(f"back {h}x{w} depthwise {kernel} stride {strides} {end}", graph, (EVERYTHING, 1200)[turn % 2])
    for (h, w), c, o, part in product([(1, 1), (1, 3), (5, 5), (8, 8)], [2, 3, 8], [2, 5, 12], (0, 1)):
        yield weight_gradient((h, w), (1, 1), c, o, part)
    yield weight_gradient((16, 17), (1, 1), 8, 6, 0, 700)
    for turn, (kernel, stride, c) in enumerate(product([(3, 3), (5, 4), (1, 1)], [1, 2, 3], [2, 3, 8])):
        padding = (kernel[0] // 2, kernel[1] // 2, (kernel[0] - 1) // 2, (kernel[1] - 1) // 2)
        more = {"groups": c, "strides": (stride, stride), "padding": padding}
        yield weight_gradient(((9, 8), (12, 9))[turn % 2], kernel, c, c, 0, (EVERYTHING, 700)[turn // 2 % 2], **more)
    yield weight_gradient((6, 5), (3, 3), 2, 4, fast=False, groups=2, padding=(1, 1, 1, 1))
    windows = product(
        [(1, 9), (6, 8), (18, 12)], [(3, 3), (1, 5), (2, 2), (4, 3), (1, 1)], [(1, 1), (2, 2), (1, 2), (3, 3)]
    )
    for turn, ((h, w), kernel, strides) in enumerate(windows):
        more = {"strides": strides, "dilation": ((1, 1), (1, 1), (2, 1))[turn % 3]}
        more["padding"] = tuple(min(n, k // 2) for n, k in zip((1, 2, turn % 2, 1), kernel * 2, strict=True))
        if kernel[0] == 1 or h > 1:
            c, o = (1, 2, 3, 4)[turn // 2 % 4], (2, 5, 8)[turn % 3]
            more["fast"] = c * kernel[1] > 1
            yield weight_gradient((h, w), kernel, c, o, turn % 2, (EVERYTHING, 900)[turn % 5 < 3], **more)
    for n in (1, 3, 4, 7, 64, 1001):
        builder = Builder()
        types = {"range": ((2,), "int32"), "q": ((n,), "int8"), "e": ((), "int32"), "unit": ((), "float32")}
        inputs = [Value(name, TensorType(*of)) for name, of in types.items()]
        y = builder.call("qnn.observe_gradient", *inputs)
        for place in ((), (0,)):
            node = replace(builder.nodes[0], inplace=place)
            graph = Graph("main", tuple(inputs), nodes=(node,), outputs=(y,)).renumbered()
            yield Case(f"range of {n} {place}", graph)
    yield from (Case(f"back, tiles of {width} {stride}", fork(width, stride)) for width in (2, 4) for stride in (1, 2))


def fork(width: int, stride: int) -> Graph:
    """Two input gradients that add up, by tiles of channels."""
    more = {"kernel": (3, 3), "padding": (1, 1, 1, 1), "strides": (stride, stride)}
    graphs = [backward((4, 5), 6, 8, end, other="int32", **more) for end in ("sums", "added")]
    (first,), (last,) = (graph.nodes for graph in graphs)
    names = [{v.name: replace(v, name=f"{v.name}{i}") for v in graph.inputs} for i, graph in enumerate(graphs)]
    made = replace(first.output, name="%0")
    names[1]["other"] = made
    nodes = [
        replace(node, inputs=tuple(known[v.name] for v in node.inputs), outputs=(y,), inplace=())
        for node, known, y in zip((first, last), names, (made, replace(last.output, name="%1")), strict=True)
    ]
    whole = wrap(nodes, nodes[1].outputs, {"strategy": "tiles", "width": width}, "layer")
    inputs = tuple(v for known in names for v in known.values() if v != made)
    return verify(Graph("main", inputs, nodes=(whole,), outputs=nodes[1].outputs).renumbered())


def weight_gradient(
    pixels: tuple[int, int],
    kernel: tuple[int, int],
    channels: int,
    outputs: int,
    frozen: int = 0,
    room: int = EVERYTHING,
    fast: bool = True,
    **attrs: object,
) -> Case:
    """(H, W, channels) by a gradient of as many channels, of which the last ``frozen`` do not count."""
    x = Value("x", TensorType((1, *pixels, channels), "int8"))
    like = convolution((*pixels, channels), outputs, kernel, **attrs).outputs[0]
    inputs = x, Value("g", replace(like.type, quant=None))
    builder, options = Builder(), {"kernel_size": kernel, "zero_point": -5, "out_channels": outputs - frozen}
    y = builder.call("qnn.conv2d_weight_grad", *inputs, **options, **attrs)
    graph = Graph("main", inputs, nodes=tuple(builder.nodes), outputs=(y,)).renumbered()
    id = f"weight gradient {pixels} {kernel} {channels}x{outputs - frozen} of {outputs} {attrs} {room}"
    return Case(id, graph, room, fast=fast and outputs - frozen > 1)


def backward_window_cases() -> Iterator[Case]:
    """The same of other windows, strides, paddings and dilations."""
    kernels = [(3, 3), (1, 5), (2, 2), (5, 3), (1, 1)]
    strides = [(1, 1), (2, 2), (1, 2), (3, 2), (3, 3)]
    for turn, ((h, w), kernel, stride) in enumerate(product([(1, 4), (4, 5)], kernels, strides)):
        depth, channels, dilation = (3, 6, 8, 1)[turn % 4], (2, 4, 5)[turn % 3], ((1, 1), (1, 1), (2, 3))[turn % 3]
        more = {"kernel": kernel, "strides": stride, "dilation": dilation, "output_padding": (turn % 2, 0)}
        more["padding"] = tuple(min(n, k // 2) for n, k in zip((1, 2, turn % 2, 1), kernel * 2, strict=True))
        more["weights"] = ("int8", "int8", "int16")[turn // 5 % 3]
        more["split"] = (None, (0, depth // 2), (3, channels // 2))[turn % 3] if min(depth, channels) > 3 else None
        graph = backward((h, w), depth, channels, ("masked", "added", "sums")[turn // 2 % 3], bool(turn % 2), **more)
        room = (EVERYTHING, 1100)[turn % 2]
        yield Case(f"back {h}x{w} {depth}->{channels} {kernel} {stride} {turn}", graph, room)


EACH = 8  # of the cases, how many are one whose small code is tried, too
OTHERS = 20  # and another form

CASES = [*depthwise_cases(), *piece_cases(), *product_cases(), *window_cases(), *vector_cases(), *backward_cases()]
CASES += [
    *(replace(case, id=f"{case.id}, small", optimize="size") for case in CASES[::EACH]),
    *vary(CASES[1:], OTHERS),
]
NAMES: dict[Kernel, str] = {}
for _case in CASES:
    for _kernel in _case.call.kernel.family():
        NAMES.setdefault(_kernel, f"t_k{len(NAMES)}")
BUILDS = [("zig", "-O2"), ("gcc", "-O2"), ("gcc", "-O0")]


@pytest.fixture(scope="module")
def cores(shared: Path) -> dict[str, Core]:
    """The same kernels by each compiler that is installed."""
    return open_cores(shared, NAMES, BUILDS)


def test_each_case_has_its_faster_form() -> None:
    assert {case.id for case in CASES if is_fast(case) != case.fast} == set()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_bit(case: Case, cores: dict[str, Core]) -> None:
    if not cores:
        pytest.skip("no C compiler for Cortex-M: pip install 'tte[emulate]'")
    call = case.call
    assert call.kernel.scratch <= case.room + scratch_bytes(case.graph.nodes[0])
    for seed, spread in enumerate(("all", "ends", "flat", "flat")):
        arrays = draw(case.graph, seed, spread)
        packed = [np.frombuffer(pack(a, v), np.uint8) for a, v in zip(arrays, case.graph.inputs, strict=True)]
        values = dict(zip([v.name for v in case.graph.inputs], packed, strict=True))
        expected = evaluate(case.graph, arrays).outputs
        taken = [case.graph.nodes[0].overwrites.get(v.name) for v in call.outputs]
        made = [
            values[old.name] if old else np.full(v.type.nbytes, 0 if v.type.dtype == "bit" else 0xA5, np.uint8)
            for v, old in zip(call.outputs, taken, strict=True)
        ]
        scratch = [np.full(call.kernel.scratch, 0xA5, np.uint8)] if call.kernel.scratch else []
        for name, core in cores.items():
            buffers = [values[v.name] for v in call.inputs] + made + scratch
            memory = core.call(NAMES[call.kernel], [], buffers)[len(call.inputs) :]
            for value, want, got in zip(call.outputs, expected, memory, strict=False):
                assert got == pack(want, value), f"{name}: {value.name}, seed {seed}"


def pack(array: np.ndarray, value: Value) -> bytes:
    if value.type.dtype == "bit":
        return np.packbits(np.asarray(array, bool).reshape(-1), bitorder="little").tobytes()
    return np.ascontiguousarray(array).tobytes()
