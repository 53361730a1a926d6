"""Single int8 layers on an emulated Cortex-M55: instructions per multiply-accumulate, or per element."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

import tte
from tte.codegen.emit import emit_kernels
from tte.codegen.fast import MVE
from tte.codegen.schedule import schedule
from tte.ir import Builder, Graph, TensorType, Value
from tte.passes.regions import wrap
from tte.runner.calls import CalledCore
from tte.runner.train import draw_samples, open_board
from tte.target import CORTEX_M55

EVERYTHING = 1 << 20  # bytes of scratch
Shape = tuple[int, ...]
# ARM-software/CMSIS-NN 99f736a, built for and run on the same emulated core.
CMSIS_NN: dict[str, tuple[float, Shape, Shape, int]] = {
    # name: its figure, input, weights, stride
    "1x1 20x20x16->96": (1.05, (20, 20, 16), (96, 1, 1, 16), 1),
    "1x1 20x20x96->16": (0.325, (20, 20, 96), (16, 1, 1, 96), 1),
    "1x1 10x10x40->240": (0.56, (10, 10, 40), (240, 1, 1, 40), 1),
    "depthwise 3x3 20x20x96": (2.17, (20, 20, 96), (96, 3, 3, 1), 1),
    "depthwise 5x5 10x10x240": (1.62, (10, 10, 240), (240, 5, 5, 1), 1),
    "depthwise 7x7 10x10x240": (1.46, (10, 10, 240), (240, 7, 7, 1), 1),
    "3x3 stride 2 128x128x3->16": (1.36, (128, 128, 3), (16, 3, 3, 3), 2),
    "dense 640->128": (0.49, (1, 1, 640), (128, 1, 1, 640), 1),
    "sum 10x10x40, per element": (13.8, (10, 10, 40), (), 1),
}


def make_layer(x: Shape, w: Shape, stride: int) -> Graph:
    """A convolution whose sums become int8 again by integers; the sum of two tensors where there are no weights."""
    builder = Builder()
    inputs = [Value("x", TensorType((1, *x), "int8"))]
    if not w:
        inputs.append(Value("other", inputs[0].type))
        scales = {
            "a_scale": 0.1,
            "a_zero": -7,
            "b_scale": 0.08,
            "b_zero": 11,
            "scale": 0.11,
            "zero_point": -2,
            "bits": 19,
        }
        y = builder.call("qnn.add", *inputs, **scales)
        return Graph("main", tuple(inputs), nodes=tuple(builder.nodes), outputs=(y,)).renumbered()
    inputs += [Value("w", TensorType(w, "int8"))]
    inputs += [Value(name, TensorType((w[0],), "int32")) for name in ("bias", "multiplier")]
    groups, half = w[0] if w[3] < x[2] else 1, w[1] // 2
    attrs = {"groups": groups, "strides": (stride, stride), "padding": (half,) * 4, "zero_point": -5}
    acc = builder.call("qnn.conv2d", *inputs[:3], **attrs)
    y = builder.call("qnn.requantize", acc, inputs[3], scale=0.1, zero_point=3)
    whole = wrap(builder.nodes, [y], {"strategy": "fused"}, "layer")
    return Graph("main", tuple(inputs), nodes=(whole,), outputs=(y,)).renumbered()


def count_layers(toolchain: str) -> dict[str, float]:
    """Instructions per multiply-accumulate, or per element of a sum."""
    graphs = {name: make_layer(*shape) for name, (_, *shape) in CMSIS_NN.items()}
    calls = {name: schedule(graph, {0: EVERYTHING}, forms=MVE)[0] for name, graph in graphs.items()}
    names = {}
    for call in calls.values():
        names |= {
            kernel: f"t_k{len(names) + i}" for i, kernel in enumerate(call.kernel.family()) if kernel not in names
        }
    rng, requests = np.random.default_rng(0), []
    for call in calls.values():
        buffers = [rng.integers(-128, 128, v.type.nbytes).astype(np.int8) for v in (*call.inputs, *call.outputs)]
        scratch = [np.zeros(call.kernel.scratch, np.uint8)] if call.kernel.scratch else []
        requests.append((names[call.kernel], (), [*buffers, *scratch]))
    with tempfile.TemporaryDirectory() as folder:
        core = CalledCore(Path(folder), emit_kernels(names, "t"), [*names.values()], CORTEX_M55, toolchain)
        counted = core.call(requests)
    macs = [sum(node.macs for node in graph.nodes) or graph.outputs[0].type.size for graph in graphs.values()]
    return {name: count / n for name, (_, count), n in zip(graphs, counted, macs, strict=True)}


def count_network(artifact: tte.Artifact, toolchain: str) -> tuple[int, int]:
    """Instructions of an inference and of a training step of a project, whatever core it was compiled for."""
    board = open_board(replace(artifact.build, target_name=CORTEX_M55.name), "qemu", toolchain)
    try:
        assert board.init() == 0
        samples = draw_samples(artifact.build, 1)
        _, inference = board.infer_counted(samples.x[0])
        step = board.train_step(samples.x[0], None if samples.y is None else samples.y[0])
        assert step.status == 0
        return inference, step.instructions
    finally:
        board.close()
