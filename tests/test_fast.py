"""Kernels for cores with the DSP extension, alone on an emulated core, against the interpreter: every bit."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
import pytest
from bare import COMPILERS, Core, compile_kernels

from tte.codegen.kernel import Kernel
from tte.codegen.schedule import Call, schedule
from tte.ir import Builder, Graph, TensorType, Value, evaluate, verify
from tte.passes.regions import wrap

pytest.importorskip("unicorn", reason="pip install 'tte[emulate]'")

EVERYTHING = 1 << 20  # bytes of scratch


@dataclass(frozen=True)
class Case:
    """A graph of one node, and by how much scratch its kernel is limited."""

    id: str
    graph: Graph = field(repr=False)
    room: int = EVERYTHING
    fast: bool = True  # there is a faster form

    @property
    def call(self) -> Call:
        (call,) = schedule(self.graph, {0: self.room})
        return call


def convolution(
    x: tuple[int, int, int],
    channels: int,
    kernel: tuple[int, int],
    scale: str = "float",
    mask: bool = False,
    limits: tuple[int, int] = (-128, 127),
    weights: str = "int8",
    split: tuple[int, int] | None = None,
    zero: int = 3,
    shift: int = 0,
    add: bool = False,
    **attrs: object,
) -> Graph:
    """int8 (H, W, C) by ``channels`` filters, as int8 again. split: axis and place at which the weights are cut."""
    builder = Builder()
    groups = int(str(attrs.get("groups", 1)))
    inputs = [Value("x", TensorType((1, *x), "int8"))]
    shape = (channels, *kernel, x[2] // groups)
    if split is None:
        inputs.append(Value("w", TensorType(shape, weights)))
        w = inputs[1]
    else:
        axis, at = split
        for name, n in (("w0", at), ("w1", shape[axis] - at)):
            inputs.append(Value(name, TensorType((*shape[:axis], n, *shape[axis + 1 :]), weights)))
        w = builder.call("concatenate", *inputs[1:], axis=axis)
    inputs.append(Value("b", TensorType((channels,), "int32")))
    inputs.append(Value("m", TensorType((channels,), "float32" if scale == "float" else "int32")))
    acc = builder.call("qnn.conv2d", inputs[0], w, inputs[-2], zero_point=zero, **attrs)
    limit = {"low": limits[0], "high": limits[1], "mask": mask, "shift": shift}
    made = builder.calls("qnn.requantize", acc, inputs[-1], scale=0.1, zero_point=-7, **limit)
    if add:
        inputs.append(Value("other", made[0].type))
        terms = {"a_scale": 0.1, "a_zero": -7, "b_scale": 0.08, "b_zero": 11, "scale": 0.11, "bits": 19}
        made = (builder.call("qnn.add", made[0], inputs[-1], **terms), *made[1:])
    whole = wrap(builder.nodes, made, {"strategy": "fused"}, "layer")
    if add:  # in place
        whole = replace(whole, inplace=(whole.inputs.index(inputs[-1]), *[None] * (len(made) - 1)))
    return Graph("main", tuple(inputs), nodes=(whole,), outputs=made).renumbered()


def matrix(n: int, depth: int, channels: int) -> Graph:
    """int8 (n, depth) by (channels, depth), as int8 again."""
    builder = Builder()
    types = {"x": ((n, depth), "int8"), "w": ((channels, depth), "int8"), "b": ((channels,), "int32")}
    inputs = [Value(name, TensorType(*of)) for name, of in (types | {"m": ((channels,), "float32")}).items()]
    acc = builder.call("qnn.dense", *inputs[:3], zero_point=-9)
    made = builder.call("qnn.requantize", acc, inputs[3], scale=0.1, zero_point=4)
    whole = wrap(builder.nodes, [made], {"strategy": "fused"}, "layer")
    return verify(Graph("main", tuple(inputs), nodes=(whole,), outputs=(made,)).renumbered())


def draw(graph: Graph, seed: int, extreme: bool) -> list[np.ndarray]:
    """Operands of all values; extreme: of the largest and smallest alone. Scales bring most sums into int8."""
    rng = np.random.default_rng(seed)
    shift = next(n.attrs["shift"] for n in graph.nodes[0].body.nodes if n.op == "qnn.requantize")
    arrays = []
    for value in graph.inputs:
        shape, dtype = value.type.shape, value.type.dtype
        if value.name == "m":
            depth = np.sqrt(graph.inputs[1].type.size / shape[0])
            m = rng.uniform(0.2, 1.5, shape) / (128 * 74 * depth / 60)
            arrays.append(
                m.astype(np.float32) if dtype == "float32" else np.rint(m * 2.0 ** (32 - shift)).astype(np.int32)
            )
        elif dtype == "int32":
            arrays.append(rng.integers(-20000, 20000, shape, np.int32))
        elif extreme:
            ends = np.iinfo(dtype)
            arrays.append(rng.choice(np.asarray([ends.min, ends.max], dtype), shape))
        else:
            ends = np.iinfo(dtype)
            arrays.append(rng.integers(ends.min, ends.max + 1, shape, dtype))
    return arrays


def product_cases() -> Iterator[Case]:
    """1 x 1: numbers of pixels, channels in and out."""
    for (h, w), c, o in product([(1, 2), (1, 3), (5, 5), (16, 9)], [1, 2, 3, 4, 8, 17], [2, 3, 8, 11]):
        for scale in ("float", "fixed"):
            yield Case(f"1x1 {h}x{w} {c}->{o} {scale}", convolution((h, w, c), o, (1, 1), scale))
    for c, o in ((96, 16), (97, 10), (256, 24), (1040, 4)):
        yield Case(f"1x1 4x4 {c}->{o}", convolution((4, 4, c), o, (1, 1)))
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
    for room in (300, 700, 2000):
        yield Case(f"1x1 16x17 8->6 in {room} bytes", convolution((16, 17, 8), 6, (1, 1)), room)
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
    for split in ((3, 2), (0, 3)):
        graph = convolution((6, 6, 4), 6, (3, 3), padding=(1, 1, 1, 1), split=split)
        yield Case(f"3x3 split {split}", graph)
    graph = convolution((6, 6, 4), 8, (3, 3), "fixed", mask=True, padding=(1, 1, 1, 1), weights="int16")
    yield Case("3x3 int16 mask", graph)


def vector_cases() -> Iterator[Case]:
    """Matrix times vector."""
    for n, depth, channels in product([1, 2], [4, 5, 10, 16, 23, 640], [4, 5, 7, 12]):
        yield Case(f"dense {n}x{depth}->{channels}", matrix(n, depth, channels))
    yield Case("dense 1x3->4", matrix(1, 3, 4), fast=False)
    yield Case("dense 1x8->3", matrix(1, 8, 3), fast=False)


CASES = [*product_cases(), *window_cases(), *vector_cases()]
NAMES: dict[Kernel, str] = {}
for _case in CASES:
    for _kernel in _case.call.kernel.family():
        NAMES.setdefault(_kernel, f"t_k{len(NAMES)}")
BUILDS = [("zig", "-O2"), ("gcc", "-O2"), ("gcc", "-O0")]


@pytest.fixture(scope="module")
def cores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Core]:
    """The same kernels by each compiler that is installed."""
    folder = tmp_path_factory.mktemp("fast")
    elves = {f"{c} {o}": compile_kernels(folder, NAMES, c, o) for c, o in BUILDS if c in COMPILERS}
    return {name: Core(elf) for name, elf in elves.items() if elf}


def test_each_case_has_its_faster_form() -> None:
    assert {case.id for case in CASES if (case.call.kernel.portable is not None) != case.fast} == set()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_bit(case: Case, cores: dict[str, Core]) -> None:
    if not cores:
        pytest.skip("no C compiler for Cortex-M: pip install 'tte[emulate]'")
    call = case.call
    assert call.kernel.scratch <= case.room
    for seed, extreme in ((0, False), (1, True)):
        arrays = draw(case.graph, seed, extreme)
        values = dict(zip([v.name for v in case.graph.inputs], arrays, strict=True))
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
