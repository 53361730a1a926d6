"""Kernels for cores with vectors (MVE), alone on an emulated Cortex-M55, against the interpreter: every bit."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from bare import EVERYTHING, Case
from test_fast import backward, chain, convolution, depthwise, draw, matrix, pack

from tte.codegen.emit import emit_kernels
from tte.codegen.fast import MVE
from tte.codegen.kernel import Kernel
from tte.ir import Builder, Graph, TensorType, Value, evaluate
from tte.ir.tiles import scratch_bytes
from tte.runner.calls import CalledCore, Request
from tte.runner.qemu import find_qemu
from tte.runner.toolchain import find_toolchains
from tte.target import CORTEX_M55

if not find_toolchains() or not find_qemu():
    pytest.skip("no compiler for Cortex-M, or no qemu-system-arm", allow_module_level=True)


def product_cases() -> Iterator[Case]:
    """1 x 1: numbers of pixels, channels in and out, ends."""
    for turn, ((h, w), c, o) in enumerate(product([(1, 2), (5, 5)], [1, 3, 15, 16, 17, 32, 40, 81], [4, 5, 7])):
        scale = ("float", "fixed")[turn % 2]
        yield Case(f"1x1 {h}x{w} {c}->{o} {scale}", convolution((h, w, c), o, (1, 1), scale))
    for c, o in ((300, 6), (176, 7), (130, 132), (250, 16)):
        yield Case(f"1x1 4x4 {c}->{o}", convolution((4, 4, c), o, (1, 1)))
    for stride in ((2, 2), (1, 2), (3, 1)):
        yield Case(f"1x1 7x6 5->4 stride {stride}", convolution((7, 6, 5), 4, (1, 1), strides=stride))
    for o, limits, scale in product((8, 12), ((-128, 127), (-7, 60)), ("float", "fixed")):
        yield Case(
            f"1x1 6x5 8->{o} mask {limits} {scale}",
            convolution((6, 5, 8), o, (1, 1), scale, mask=True, limits=limits),
        )
    for shift, mask in product((-1, -7, 2), (False, True)):
        yield Case(
            f"1x1 5x5 8->8 shift {shift} mask {mask}",
            convolution((5, 5, 8), 8, (1, 1), "fixed", shift=shift, mask=mask),
        )
    for scale, mask, room in product(("float", "fixed"), (False, True), (EVERYTHING, 400)):
        graph = convolution((9, 15, 6), 5, (1, 1), scale, mask=mask, add=True)
        yield Case(f"1x1 9x15 6->5 {scale} mask {mask} add in {room}", graph, room)
    for weights, split, depth in product(("int8", "int16"), (None, (3, 4), (3, 5), (0, 3), (0, 4)), (12, 13)):
        graph = convolution((4, 5, depth), 7, (1, 1), weights=weights, split=split)
        yield Case(f"1x1 4x5 {depth}->7 {weights} split {split}", graph)


def vector_cases() -> Iterator[Case]:
    """Matrix times vector; pixels without scratch."""
    for (n, depth), channels in product([(1, 1), (2, 15), (1, 16), (3, 23), (1, 640), (2, 48)], [4, 5, 12]):
        yield Case(f"dense {n}x{depth}->{channels}", matrix(n, depth, channels))
    for turn, (zero, mask) in enumerate(product((0, -128, 127, -1), (False, True))):
        more = {"zero": zero, "mask": mask, "strides": (1 + mask, 1), "add": turn > 3}
        graph = convolution((3, 5, 300), 6, (1, 1), ("float", "fixed")[turn % 2], **more)
        yield Case(f"1x1 3x5 300->6 {more}, no room", graph, 0)
    yield Case("1x1 1x1 9->8", convolution((1, 1, 9), 8, (1, 1)))


def window_cases() -> Iterator[Case]:
    """k x k: strides, paddings, dilations."""
    sizes, kernels = [(5, 5), (8, 3), (9, 12)], [(3, 3), (1, 5), (2, 2), (5, 3)]
    for (h, w), c, kernel in product(sizes, [1, 6], kernels):
        for stride, padding in (((1, 1), (1, 1, 1, 1)), ((2, 2), (0, 1, 1, 0)), ((1, 2), (0, 0, 0, 0))):
            if kernel[0] <= h + padding[0] + padding[2] and kernel[1] <= w + padding[1] + padding[3]:
                graph = convolution((h, w, c), 5, kernel, strides=stride, padding=padding)
                pixels = graph.outputs[0].type.size // 5
                if pixels > 1:
                    yield Case(f"{kernel} {h}x{w} {c}->5 {stride} {padding}", graph)
    graph = convolution((9, 9, 4), 6, (3, 3), dilation=(2, 3), padding=(2, 3, 2, 3))
    yield Case("3x3 dilated", graph)
    for split in ((3, 2), (0, 3)):
        yield Case(f"3x3 split {split}", convolution((6, 6, 4), 6, (3, 3), padding=(1, 1, 1, 1), split=split))
    graph = convolution((6, 6, 4), 8, (3, 3), "fixed", mask=True, padding=(1, 1, 1, 1), weights="int16")
    yield Case("3x3 int16 mask", graph)
    for room in (800, 2000):
        yield Case(f"3x3 16x17 8->6 in {room} bytes", convolution((16, 17, 8), 6, (3, 3)), room)


def depthwise_cases() -> Iterator[Case]:
    """One filter per channel: windows, strides, paddings of each side, holes, numbers of channels."""
    sizes = [(1, 1), (1, 4), (4, 1), (2, 3), (5, 5), (6, 7), (9, 12)]
    kernels = [(3, 3), (5, 5), (7, 7), (1, 3), (3, 1), (2, 2), (1, 1), (4, 4), (1, 8), (9, 2), (8, 8), (2, 11)]
    paddings = [(0, 0, 0, 0), (1, 1, 1, 1), (2, 0, 1, 2), (0, 3, 3, 0)]
    strides = [(1, 1), (2, 2), (1, 2), (2, 1), (3, 3)]
    fitting = [
        (x, kernel, padding, stride)
        for x, kernel, padding, stride in product(sizes, kernels, paddings, strides)
        if kernel[0] <= x[0] + padding[0] + padding[2] and kernel[1] <= x[1] + padding[1] + padding[3]
    ]
    for turn, ((h, w), kernel, padding, stride) in enumerate(fitting[::17]):
        scale, zero, c = ("float", "fixed")[turn % 2], (3, -128, 127)[turn % 3], (2, 3, 5, 8)[turn // 5 % 4]
        yield depthwise((h, w, c), kernel, scale, strides=stride, padding=padding, zero=zero)
    for size, stride in product((3, 5, 7), ((1, 1), (2, 2))):
        more = {"padding": (size // 2,) * 4, "strides": stride}
        yield depthwise((25, 5, 12), (size, size), "fixed", zero=-128, shift=-size, **more)
        yield depthwise((11, 31, 6), (size, size), "float", zero=127, **more)
        for mask, limits in ((True, (-128, 127)), (True, (-7, 60)), (False, (-7, 60))):
            more |= {"mask": mask, "limits": limits, "weights": "int16", "split": (0, 3)}
            yield depthwise(
                (14, 13, 8), (size, size), *(("fixed", EVERYTHING) if stride == (1, 1) else ("float", 700)), **more
            )
    for size in (3, 5, 7):
        yield depthwise((15, 13, 6), (size, size), "fixed", 700, padding=(size // 2,) * 4, add=True)
        yield depthwise((6, 6, 5), (size, size), "fixed", padding=(size // 2,) * 4, shift=2)
    for dilation in ((2, 2), (1, 2), (3, 1)):
        yield depthwise((9, 9, 4), (3, 3), dilation=dilation, padding=(2, 1, 0, 2))


def exponent_cases() -> Iterator[Case]:
    """Results scaled as CMSIS-NN does."""
    for depth, mask, limits in product((3, 16, 40, 300), (False, True), ((-128, 127), (-7, 60))):
        for room in (EVERYTHING, 0):
            graph = convolution((3, 5, depth), 8, (1, 1), "tflite", mask=mask, limits=limits)
            yield Case(f"1x1 3x5 {depth}->8 tflite {mask} {limits} in {room}", graph, room)
    for size, mask in product((3, 5, 7), (False, True)):
        yield depthwise((8, 7, 8), (size, size), "tflite", mask=mask, padding=(size // 2,) * 4)
    yield Case("3x3 tflite add", convolution((9, 15, 6), 5, (3, 3), "tflite", add=True))


def sum_cases() -> Iterator[Case]:
    """Two int8 of different scales, alone and behind a convolution."""
    ways = {
        "fixed": {"bits": 19},
        "float": {"bits": 0},
        "unsigned": {"bits": 0, "unsigned": True},
        "tflite": {"tflite": True},
    }
    for (name, way), shape, mine in product(ways.items(), [(1, 1, 1, 1), (1, 3, 5, 7)], (None, 0, 1)):
        builder = Builder()
        a, b = (Value(name, TensorType(shape, "int8")) for name in "xy")
        terms = {"a_scale": 0.1, "a_zero": -7, "b_scale": 0.083, "b_zero": 127, "scale": 0.14, "zero_point": -128}
        y = builder.call("qnn.add", a, b, **terms, **({"bits": 0} | way))
        node = replace(builder.nodes[0], inplace=() if mine is None else (mine,))
        yield Case(f"add {name} {shape} {mine}", Graph("main", (a, b), nodes=(node,), outputs=(y,)).renumbered())


def backward_cases() -> Iterator[Case]:
    """Input gradients of pointwise and depthwise convolutions, in integers."""
    for pixels, depth, channels in product([(1, 3), (5, 5)], [1, 16, 17, 40], [4, 7]):
        yield Case(f"back {pixels} {depth}->{channels}", backward(pixels, depth, channels, "masked"))
    for end, single, (depth, channels) in product(("sums", "added", "rescaled"), (False, True), [(6, 8), (97, 10)]):
        yield Case(f"back 4x5 {depth}->{channels} {end} {single}", backward((4, 5), depth, channels, end, single))
    for split in ((3, 2), (3, 5), (0, 4), (0, 1)):
        yield Case(f"back 4x4 9->7 split {split}", backward((4, 4), 9, 7, "masked", split=split))
    yield Case("back 16x17 8->6 in 700 bytes", backward((16, 17), 8, 6, "added"), 700)
    for (h, w), kernel, (turn, padding) in product(
        [(4, 4), (5, 7)], [(3, 3), (5, 5), (2, 3), (1, 1)], enumerate([(0, 0, 0, 0), (1, 1, 1, 1), (2, 0, 1, 2)])
    ):
        if max(padding[:2]) < min(kernel):
            more = {"padding": padding, "kernel": kernel, "weights": ("int8", "int16")[turn % 2]}
            end = ("masked", "added", "sums")[turn]
            graph = backward((h, w), 3 + 5 * (h % 2), 1, end, bool(turn % 2), groups=3 + 5 * (h % 2), **more)
            yield Case(f"back {h}x{w} depthwise {kernel} {padding} {end}", graph)
    for (h, w), c, o, part in product([(1, 3), (5, 5)], [2, 3, 8], [6, 12], (0, 1)):
        builder = Builder()
        inputs = [Value("x", TensorType((1, h, w, c), "int8")), Value("g", TensorType((1, h, w, o), "int8"))]
        options = {"kernel_size": (1, 1), "zero_point": -5, "out_channels": o - part}
        y = builder.call("qnn.conv2d_weight_grad", *inputs, **options)
        graph = Graph("main", tuple(inputs), nodes=tuple(builder.nodes), outputs=(y,)).renumbered()
        yield Case(f"weight gradient {h}x{w} {c}x{o - part} of {o}", graph, (EVERYTHING, 600)[part])
    for kernel, strides, dilation in product([(3, 3), (5, 5)], [(2, 2), (3, 1), (1, 2)], [(1, 1), (1, 2)]):
        more = {"groups": 5, "kernel": kernel, "strides": strides, "dilation": dilation, "padding": (1, 1, 1, 1)}
        graph = backward((4, 7), 5, 1, "masked", **more)
        yield Case(f"back 4x7 depthwise {kernel} {strides} {dilation}", graph)


def piece_cases() -> Iterator[Case]:
    """Layers that run row by row, from ring to ring, or by tiles of channels."""
    for width in (4, 2):
        first = {"channels": 8, "kernel": (3, 3), "padding": (1, 1, 1, 1), "groups": 8}
        layers = [first, first | {"kernel": (5, 5)}, first | {"kernel": (5, 3)}]
        yield Case(f"tiles of {width}", chain((7, 6, 8), layers, strategy="tiles", width=width))
    for c, size, scale in product((5, 8), (3, 5), ("fixed", "float")):
        first = {"channels": c, "groups": c, "kernel": (size, size), "padding": (size // 2,) * 4, "scale": scale}
        layers = [first, first | {"strides": (2, 2)}, first | {"mask": True}]
        yield Case(f"rows {c} channels {size} {scale}", chain((13, 9, c), layers, strategy="rows"))
    for c, scale in product((5, 8), ("fixed", "float")):
        wide = {"channels": c, "kernel": (3, 3), "padding": (1, 1, 1, 1), "zero": -128, "scale": scale}
        narrow = {"channels": 6, "kernel": (1, 1), "scale": scale}
        layers = [wide, narrow, wide | {"strides": (2, 2)}, narrow | {"strides": (1, 2), "mask": True}]
        yield Case(f"rows {c} {scale}", chain((13, 9, c), layers, strategy="rows"))


CASES = [
    *product_cases(),
    *vector_cases(),
    *window_cases(),
    *depthwise_cases(),
    *exponent_cases(),
    *sum_cases(),
    *backward_cases(),
    *piece_cases(),
]
NAMES: dict[Kernel, str] = {}
for _case in CASES:
    for _kernel in _case.choose(MVE).kernel.family():
        NAMES.setdefault(_kernel, f"t_k{len(NAMES)}")
BUILDS = [(c, o) for c, o in [("zig", "-O2"), ("gcc", "-O2"), ("gcc", "-O0")] if c in find_toolchains()]
SPREADS = ("all", "ends", "flat", "flat")


def test_each_case_has_its_vectors() -> None:
    kernels = {case.id: case.choose(MVE).kernel for case in CASES}
    leaves = {name: k.parts if k.template in ("stream", "tiles") else (k,) for name, k in kernels.items()}
    assert {name for name, parts in leaves.items() if not all(k.template.startswith("mve/") for k in parts)} == set()


@pytest.fixture(scope="module")
def requests() -> list[tuple[str, Request, slice, list[bytes]]]:
    """Of each case, with several data: its call, which buffers are its results, and what they are to hold."""
    result = []
    for case, (seed, spread) in product(CASES, enumerate(SPREADS)):
        call = case.choose(MVE)
        assert call.kernel.scratch <= case.room + scratch_bytes(case.graph.nodes[0])
        arrays = draw(case.graph, seed, spread)
        packed = [np.frombuffer(pack(a, v), np.uint8) for a, v in zip(arrays, case.graph.inputs, strict=True)]
        values = dict(zip([v.name for v in case.graph.inputs], packed, strict=True))
        taken = [case.graph.nodes[0].overwrites.get(v.name) for v in call.outputs]
        made = [
            values[old.name] if old else np.full(v.type.nbytes, 0 if v.type.dtype == "bit" else 0xA5, np.uint8)
            for v, old in zip(call.outputs, taken, strict=True)
        ]
        scratch = [np.full(call.kernel.scratch, 0xA5, np.uint8)] if call.kernel.scratch else []
        request = (NAMES[call.kernel], [], [values[v.name] for v in call.inputs] + made + scratch)
        outputs = [pack(a, v) for a, v in zip(evaluate(case.graph, arrays).outputs, case.graph.outputs, strict=True)]
        first = len(call.inputs)
        result.append((f"{case.id}, {spread}", request, slice(first, first + len(outputs)), outputs))
    return result


@pytest.mark.parametrize("build", BUILDS, ids=" ".join)
def test_every_bit(build: tuple[str, str], requests, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    core = CalledCore(tmp_path, emit_kernels(NAMES, "t"), [*NAMES.values()], CORTEX_M55, *build)
    found = core.call([request for _, request, _, _ in requests])
    wrong = [
        name
        for (name, _, results, outputs), (memory, _) in zip(requests, found, strict=True)
        if memory[results] != outputs
    ]
    assert wrong == []
