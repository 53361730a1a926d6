"""Kernels of floats for cores with an FPU, alone on an emulated core, against the portable ones: every bit."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from bare import EVERYTHING, Case, open_cores, vary

from tte.codegen.kernel import Kernel
from tte.ir import Builder, Graph, TensorType, Value, verify
from tte.passes.regions import wrap
from tte.runner.bare import Core

pytest.importorskip("unicorn", reason="pip install 'tte[emulate]'")


class Region:
    """A graph of one region in the making."""

    def __init__(self) -> None:
        self.builder = Builder()
        self.inputs: list[Value] = []

    def input(self, shape: tuple[int, ...], dtype: str = "float32") -> Value:
        self.inputs.append(Value(f"x{len(self.inputs)}", TensorType(shape, dtype)))
        return self.inputs[-1]

    def weights(self, shape: tuple[int, ...], dtype: str = "int8", split: tuple[int, int] | None = None) -> Value:
        """split: axis and place at which they are cut in two."""
        if split is None:
            return self.input(shape, dtype)
        axis, at = split
        pieces = [self.input((*shape[:axis], n, *shape[axis + 1 :]), dtype) for n in (at, shape[axis] - at)]
        return self.builder.call("concatenate", *pieces, axis=axis)

    def finish(self, y: Value, tail: str) -> Value:
        """``tail``: m: a mask, s: a factor for each channel, r: relu, one after the other."""
        for step in tail:
            if step == "m":
                y = self.builder.call("nn.apply_mask", y, self.input(y.type.shape, "bit"))
            elif step == "s":
                y = self.builder.call("multiply", y, self.input(y.type.shape[-1:]))
            elif step == "r":
                y = self.builder.call("nn.relu", y)
        return y

    def graph(self, *outputs: Value, **attrs: object) -> Graph:
        whole = wrap(self.builder.nodes, outputs, {"strategy": "fused"} | attrs, "layer")
        return verify(Graph("main", tuple(self.inputs), nodes=(whole,), outputs=outputs).renumbered())


def transposed(
    x: tuple[int, int, int],
    channels: int,
    kernel: tuple[int, int] = (1, 1),
    weights: str = "int8",
    split: tuple[int, int] | None = None,
    begin: str = "",
    tail: str = "",
    made: str = "",
    depthwise: bool = False,
    **attrs: object,
) -> Graph:
    """(OH, OW, O) to (H, W, channels). begin: "bias" or "whole"; made: as a tail, of x as it is read, b: of
    one pixel."""
    region = Region()
    source = region.input((1, 1, 1, x[2]) if "b" in made else (1, *x))
    if "b" in made:
        source = region.builder.call("broadcast_to", source, shape=(1, *x))
    source = region.finish(source, made)
    shape = (x[2], *kernel, 1 if depthwise else channels)
    w = region.weights(shape, weights, split)
    attrs |= {"groups": x[2]} if depthwise else {}
    y = Builder().call("nn.conv2d_transpose", source, w, **attrs)
    more = [region.input(y.type.shape if begin == "whole" else y.type.shape[-1:])] if begin else []
    y = region.builder.call("nn.conv2d_transpose", source, w, *more, **attrs)
    return region.graph(region.finish(y, tail))


def forward(
    x: tuple[int, int, int],
    channels: int,
    kernel: tuple[int, int] = (1, 1),
    split: tuple[int, int] | None = None,
    tail: str = "",
    bias: bool = True,
    depthwise: bool = False,
    residual: bool = False,
    **attrs: object,
) -> Graph:
    """(H, W, I) to (OH, OW, channels). residual: something is added, in place."""
    region = Region()
    attrs |= {"groups": x[2]} if depthwise else {}
    operands = [region.input((1, *x)), region.weights((channels, *kernel, 1 if depthwise else x[2]), "float32", split)]
    if bias:
        operands.append(region.input((channels,)))
    y = region.builder.call("nn.conv2d", *operands, **attrs)
    if residual:
        y = region.builder.call("add", y, region.input(y.type.shape))
    graph = region.graph(region.finish(y, tail))
    if not residual:
        return graph
    (node,) = graph.nodes
    return replace(graph, nodes=(replace(node, inplace=(len(region.inputs) - 1,)),))


def rows(height: int, depthwise: bool, narrow: int, **attrs: object) -> Graph:
    """Convolutions one after the other, row by row."""
    region = Region()
    call = region.builder.call
    y = region.input((1, height, 7, narrow))
    for channels, kernel, groups in ((12, 3, 1), (12, 3, 12 if depthwise else 1), (narrow, 1, 1)):
        w = region.input((channels, kernel, kernel, y.type.shape[3] // groups))
        padding = (kernel // 2,) * 4
        y = call("nn.relu", call("nn.conv2d", y, w, region.input((channels,)), padding=padding, groups=groups, **attrs))
    return region.graph(y, strategy="rows")


def weight_gradient(
    x: tuple[int, int, int],
    outputs: int,
    kernel: tuple[int, int],
    dtype: str = "int8",
    sgd: bool = False,
    zero: int = 5,
    **attrs: object,
) -> Graph:
    """(H, W, I) and (OH, OW, outputs), in place of weights where ``sgd``."""
    region = Region()
    source = region.input((1, *x), dtype)
    w = TensorType((outputs, *kernel, x[2]), "float32")
    y = Builder().call("nn.conv2d", Value("p", TensorType((1, *x), "float32")), Value("q", w), **attrs)
    counted = {"zero_point": zero} if dtype == "int8" else {}
    g = region.builder.call(
        "nn.conv2d_weight_grad", source, region.input(y.type.shape), kernel_size=kernel, **counted, **attrs
    )
    if sgd:
        g = region.builder.call("nn.sgd", region.input(g.type.shape), g, region.input(()))
    return region.graph(g)


def chain(
    pixels: int,
    narrow: int,
    wide: int,
    kernel: int,
    tile: int,
    tail: str,
    begin: bool,
    kept: bool = False,
    strides: tuple[int, int] = (1, 1),
) -> Graph:
    """The gradient through an inverted bottleneck, ``tile`` of its ``wide`` channels at a time. kept: the gradients
    between the convolutions are results, too."""
    region = Region()
    builder = region.builder
    half = kernel // 2
    y = region.input((1, pixels, pixels, narrow))
    y = region.finish(builder.call("nn.conv2d_transpose", y, region.weights((narrow, 1, 1, wide))), tail)
    g = y
    w = region.weights((wide, kernel, kernel, 1))
    y = builder.call("nn.conv2d_transpose", y, w, groups=wide, padding=(half,) * 4, strides=strides)
    y = region.finish(y, tail)
    whole = (*y.type.shape[:3], narrow)
    more = [region.input(whole)] if begin else []
    dx = builder.call("nn.conv2d_transpose", y, region.weights((wide, 1, 1, narrow)), *more)
    x = region.input(whole, "int8")
    dw = builder.call("nn.conv2d_weight_grad", x, y, kernel_size=(1, 1), zero_point=3)
    db = builder.call("sum", g, axis=(0, 1, 2), keepdims=False)
    return region.graph(dx, dw, db, *([g, y] if kept else []), strategy="tiles", width=tile)


def masked_rows(depthwise: bool) -> Graph:
    """Row by row, a mask among what rings hold."""
    region = Region()
    call, nodes = region.builder.call, region.builder.nodes
    y = call("nn.conv2d", region.input((1, 9, 7, 8)), region.input((8, 3, 3, 8)), padding=(1,) * 4)
    mask = call("nn.mask", y, lower=0.0, upper=float("inf"))
    w = region.input((8, 3, 3, 1 if depthwise else 8))
    y = call("nn.apply_mask", call("nn.conv2d", y, w, padding=(1,) * 4, groups=8 if depthwise else 1), mask)
    z = call("nn.conv2d", y, region.input((4, 3, 3, 8)), padding=(1,) * 4)
    nodes[2:4] = [wrap(nodes[2:4], [y], {"strategy": "fused"}, "layer")]
    return region.graph(z, strategy="rows")


def quantized() -> Graph:
    """A float convolution whose result is int8."""
    region = Region()
    y = region.builder.call("nn.conv2d", region.input((1, 3, 4, 6)), region.input((8, 3, 3, 6)), padding=(1,) * 4)
    return region.graph(region.builder.call("qnn.quantize", y, scale=0.1, zero_point=3))


def sum_of_batch() -> Graph:
    region = Region()
    return region.graph(region.builder.call("sum", region.input((2, 3, 4, 8)), axis=(0, 1, 2), keepdims=False))


def transposed_cases() -> Iterator[Case]:
    for (h, w), o, c in product([(1, 1), (1, 3), (4, 4), (5, 3)], [2, 3, 4, 10, 16], [1, 2, 3, 5, 8, 12, 24]):
        yield Case(f"1x1 {h}x{w} {o}->{c}", transposed((h, w, o), c))
    for tail, begin in product(["", "m", "s", "ms", "sm", "r", "msr"], ["", "bias", "whole"]):
        for c in (8, 16, 11):
            yield Case(f"1x1 4->{c} {tail} {begin}", transposed((3, 5, 4), c, tail=tail, begin=begin))
    for room, begin in product([32 * 9, 32 * 20, 32 * 48], ["", "whole"]):
        yield Case(f"1x1 {room} bytes {begin}", transposed((3, 3, 50), 16, tail="ms", begin=begin), room)
        yield Case(f"3x3 {room} bytes {begin}", transposed((3, 3, 10), 9, (3, 3), tail="r", begin=begin), room + 72)
    for room, tail in product([648, 1200], ["s", "ms"]):  # some taps and a part of the products at once
        yield Case(f"3x3 50->16 {tail} in {room} bytes", transposed((3, 3, 50), 16, (3, 3), tail=tail), room)
    for weights, split in product(["int8", "int16", "float32"], [None, (3, 3), (3, 8), (3, 12), (0, 4), (0, 5)]):
        for kernel in ((1, 1), (2, 3)):
            yield Case(f"{kernel} {weights} {split}", transposed((4, 4, 9), 21, kernel, weights, split))
    for (o, c), made in product([(6, 8), (5, 13), (8, 5), (24, 16)], ["ms", "m", "s", "bms"]):
        for room in (EVERYTHING, 1120):
            yield Case(f"made {o}->{c} {made} {room}", transposed((3, 4, o), c, tail="ms", made=made), room)
    for kernel, stride, padding, dilation in product(
        [(3, 3), (5, 2), (1, 7)], [(1, 1), (2, 2), (3, 1)], [(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 1, 0)], [(1, 1), (1, 2)]
    ):
        geometry = {"strides": stride, "padding": padding, "dilation": dilation}
        name = f"{kernel} {stride} {padding} {dilation}"
        for begin, tail in (("", "ms"), ("whole", "")):
            if min(transposed((5, 4, 6), 8, kernel, **geometry).outputs[0].type.shape) > 0:
                yield Case(f"{name} {begin}", transposed((5, 4, 6), 8, kernel, begin=begin, tail=tail, **geometry))
                graph = transposed((5, 4, 12), 12, kernel, begin=begin, tail=tail, depthwise=True, **geometry)
                yield Case(f"depthwise {name} {begin}", graph)
    for stride in ((2, 2), (3, 2)):
        geometry = {"strides": stride, "padding": (1, 1, 1, 1), "output_padding": (1, 1)}
        for depthwise in (False, True):
            graph = transposed((4, 4, 16), 16, (3, 3), tail="ms", depthwise=depthwise, **geometry)
            yield Case(f"{stride} output padding {depthwise}", graph)


def depthwise_cases() -> Iterator[Case]:
    for c, k in product([2, 3, 8, 11, 16, 24, 32], [3, 5, 7]):
        for tail in ("", "ms", "m", "r"):
            graph = transposed((4, 4, c), c, (k, k), depthwise=True, tail=tail, padding=(k // 2,) * 4)
            yield Case(f"depthwise {k}x{k} {c} {tail}", graph)
    for weights, split in product(["int8", "int16", "float32"], [None, (0, 4), (0, 16)]):
        graph = transposed((5, 5, 32), 32, (3, 3), weights, split, depthwise=True, begin="bias", padding=(1, 1, 1, 1))
        yield Case(f"depthwise {weights} {split}", graph)
    for (h, w), k, stride in product([(1, 1), (4, 4), (5, 19)], [3, 5], [1, 2, 3]):
        for tail, dilation in (("", 1), ("ms", 2)):
            geometry = {"strides": (stride, stride), "padding": (k // 2,) * 4, "dilation": (dilation, dilation)}
            if h > 1 or dilation == 1:
                for c in (1, 2, 3, 4) if stride == 1 else (1,):
                    graph = transposed((h, w, c), c, (k, k), depthwise=True, tail=tail, **geometry)
                    yield Case(f"columns {h}x{w} {c} {k} {stride} {tail}", graph)
    for room in (0, 40, 200, 400):
        graph = transposed((5, 5, 12), 12, (5, 5), depthwise=True, begin="whole", tail="r", padding=(2, 2, 2, 2))
        yield Case(f"depthwise in {room} bytes", graph, room)


def weight_cases() -> Iterator[Case]:
    for i, o in product([1, 2, 3, 4, 7], [2, 5, 8, 11, 16]):
        for dtype in ("int8", "float32"):
            yield Case(f"dw 1x1 {i} {o} {dtype}", weight_gradient((4, 3, i), o, (1, 1), dtype))
    for kernel, stride, padding, dilation in product(
        [(3, 3), (2, 5)], [(1, 1), (2, 2), (1, 3)], [(0, 0, 0, 0), (1, 1, 1, 1), (2, 3, 0, 1)], [(1, 1), (2, 1)]
    ):
        geometry = {"strides": stride, "padding": padding, "dilation": dilation}
        for dtype in ("int8", "int16", "float32"):
            graph = weight_gradient((7, 6, 3), 9, kernel, dtype, sgd=dtype == "float32", **geometry)
            yield Case(f"dw {kernel} {stride} {padding} {dilation} {dtype}", graph)
    for i, o, zero in product([4, 7, 8, 19], [1, 2, 3, 4], [-128, 0, 127]):
        yield Case(f"dw few {i} {o} from {zero}", weight_gradient((4, 3, i), o, (1, 1), zero=zero))
        if zero == 0:
            graph = weight_gradient((7, 6, i), o, (3, 3), sgd=True, padding=(1, 1, 1, 1), strides=(2, 1))
            yield Case(f"dw few 3x3 {i} {o}", graph)
            yield Case(f"dw few 3x3 {i} {o} in 144 bytes", graph, 144)
    for room in (400, 600, 1000):
        for kernel in ((1, 1), (3, 3)):
            graph = weight_gradient((7, 6, 3), 16, kernel, padding=(1, 1, 1, 1), sgd=True)
            yield Case(f"dw {kernel} in {room} bytes", graph, room)


def tile_cases() -> Iterator[Case]:
    for tile, tail, begin in product([1, 2, 3, 4, 8, 16], ["", "ms", "s"], [False, True]):
        for room in (EVERYTHING, 600, 0):
            graph = chain(4, 10, 48, 3, tile, tail, begin)
            yield Case(f"tiles of {tile} {tail} {begin} {room}", graph, room)
    for strides, kernel in product([(2, 2), (3, 2), (1, 19)], [3, 5]):
        yield Case(f"tiles of 1 {kernel} {strides}", chain(16, 2, 2, kernel, 1, "ms", False, strides=strides))
    for tail in ("r", "ms"):
        yield Case(f"tiles that are kept {tail}", chain(4, 10, 48, 3, 8, tail, False, kept=True))


def forward_cases() -> Iterator[Case]:
    for (h, w), i, o in product([(1, 1), (1, 3), (4, 4), (5, 3)], [1, 3, 4, 10], [1, 2, 5, 8, 12, 24]):
        yield Case(f"forward 1x1 {h}x{w} {i}->{o}", forward((h, w, i), o, bias=o != 5))
    for kernel, stride, padding, dilation in product(
        [(3, 3), (5, 2), (1, 7)], [(1, 1), (2, 2), (3, 1)], [(0, 0, 0, 0), (1, 1, 1, 1), (0, 3, 1, 0)], [(1, 1), (1, 2)]
    ):
        geometry = {"strides": stride, "padding": padding, "dilation": dilation}
        name = f"forward {kernel} {stride} {padding} {dilation}"
        if 6 + padding[1] + padding[3] > dilation[1] * (kernel[1] - 1):
            yield Case(name, forward((5, 6, 3), 9, kernel, tail="r", **geometry))
            yield Case(f"{name} depthwise", forward((5, 6, 11), 11, kernel, tail="r", depthwise=True, **geometry))
    for split, kernel in product([(3, 4), (3, 5)], [(1, 1), (3, 2)]):
        for room in (EVERYTHING, 32 * 10):
            graph = forward((4, 4, 9), 21, kernel, split, padding=(1, 1, 1, 1))
            yield Case(f"forward {kernel} split {split} {room}", graph, room)
    for room in (32 * 7, 32 * 20, 32 * 40, 32 * 60, 32 * 110):
        graph = forward((4, 5, 17), 9, (3, 3), tail="r", padding=(1, 1, 1, 1))
        yield Case(f"forward 3x3 {room} bytes", graph, room + 72)
    for o, kernel in product([8, 11], [1, 3]):
        graph = forward((4, 5, 6), o, (kernel, kernel), tail="r", residual=True, padding=(kernel // 2,) * 4)
        yield Case(f"forward {kernel} {o} in place", graph)
    for height, depthwise, narrow in product([5, 8], [False, True], [3, 8]):
        yield Case(f"rows {height} {narrow} {depthwise}", rows(height, depthwise, narrow))
    for depthwise in (False, True):
        yield Case(f"rows with a mask {depthwise}", masked_rows(depthwise))
    yield Case("result of int8", quantized(), fast=False)
    yield Case("sum of two", sum_of_batch(), fast=False)


CASES = [*forward_cases(), *transposed_cases(), *depthwise_cases(), *weight_cases(), *tile_cases()]
CASES += vary(CASES, 15)
NAMES: dict[Kernel, str] = {}
for _case in CASES:
    for _call in (_case.call, _case.portable):
        for _kernel in _call.kernel.family():
            NAMES.setdefault(_kernel, f"t_k{len(NAMES)}")
BUILDS = [("zig", "-O2"), ("gcc", "-O0")]


@pytest.fixture(scope="module")
def cores(shared: Path) -> dict[str, Core]:
    """The same kernels by each compiler that is installed."""
    return open_cores(shared, NAMES, BUILDS)


def draw(value: Value, rng: np.random.Generator, extreme: bool) -> np.ndarray:
    """extreme: so large and so small that sums round, underflow and are infinite; negative zeros."""
    shape, dtype = value.type.shape, value.type.dtype
    if dtype == "bit":
        return np.packbits(rng.integers(0, 2, value.type.size), bitorder="little")
    if dtype != "float32":
        ends = np.iinfo(dtype)
        return rng.integers(ends.min, ends.max + 1, shape, dtype)
    x = rng.normal(size=shape)
    if extreme:
        x = x * 10.0 ** rng.choice([-38, -44, 0, 18], shape) * rng.choice([0, 1], shape)
    return np.asarray(x, np.float32)


def test_each_case_has_its_faster_form() -> None:
    """Whole regions are of parts of which some have none."""
    same = {case.id for case in CASES if case.portable.kernel == case.call.kernel}
    assert same <= {case.id for case in CASES if case.room < 300 or not case.fast}
    assert not {case.id for case in CASES if not case.fast} - same


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_bit(case: Case, cores: dict[str, Core]) -> None:
    if not cores:
        pytest.skip("no C compiler for Cortex-M: pip install 'tte[emulate]'")
    call, portable = case.call, case.portable
    assert call.kernel.scratch <= case.room + portable.kernel.scratch
    for seed, extreme in ((0, False), (1, True)):
        rng = np.random.default_rng(seed)
        arrays = {v.name: draw(v, rng, extreme) for v in case.graph.inputs}
        results = {}
        for name, core in cores.items():
            for kind, c in (("fast", call), ("portable", portable)):
                made = [np.full(v.type.nbytes, 0xA5, np.uint8) for v in c.outputs]
                for result, operand in case.graph.nodes[0].overwrites.items():
                    made[[v.name for v in c.outputs].index(result)][:] = arrays[operand.name].view(np.uint8).reshape(-1)
                scratch = [np.full(c.kernel.scratch, 0xA5, np.uint8)] if c.kernel.scratch else []
                memory = core.call(NAMES[c.kernel], [], [*(arrays[v.name] for v in c.inputs), *made, *scratch])
                results[f"{name} {kind}"] = memory[len(c.inputs) : len(c.inputs) + len(made)]
        for name, result in results.items():
            assert result == next(iter(results.values())), f"{name}, seed {seed}"
