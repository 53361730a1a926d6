"""`requantize: tflite` against the test vectors of CMSIS-NN: numpy and generated C."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_kernels import COMPILERS, Case, build

from tte.codegen.emit import emit_kernels
from tte.codegen.schedule import schedule
from tte.ir import Builder, Graph, TensorType, Value, evaluate, verify
from tte.ir.types import Quant
from tte.passes.quantized import Settings, lower_qdq

COUNT = 33  # in the pack

Vector = tuple[dict[str, Any], dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def vectors(pack: Path) -> dict[str, Vector]:
    stem = pack / "vectors" / "cmsis-nn-int8"
    cases = json.loads(stem.with_suffix(".json").read_text())["cases"]
    stored = np.load(stem.with_suffix(".npz"))
    return {
        name: (case["config"], {k.split("/")[1]: stored[k] for k in stored.files if k.startswith(f"{name}/")})
        for name, case in cases.items()
    }


def window(c: dict[str, Any], kernel: tuple[int, int], out: tuple[int, int]) -> dict[str, Any]:
    """Attributes of a convolution; the padding at the end is what the given output needs."""
    strides, dilation = (c["STRIDE_Y"], c["STRIDE_X"]), (c.get("DILATION_Y", 1), c.get("DILATION_X", 1))
    top, left = c["PAD_Y"], c["PAD_X"]
    need = [
        max(0, (n - 1) * s + (k - 1) * d + 1 - size - pad)
        for n, s, k, d, size, pad in zip(
            out, strides, kernel, dilation, (c["INPUT_H"], c["INPUT_W"]), (top, left), strict=True
        )
    ]
    return {"strides": strides, "dilation": dilation, "padding": (top, left, *need)}


def layer(c: dict[str, Any], a: dict[str, np.ndarray]) -> tuple[Graph, list[list[np.ndarray]], np.ndarray]:
    """A convolution or dense layer and its requantisation; inputs one by one."""
    builder, dense = Builder(), "ACCUMULATION_DEPTH" in c
    outputs, batches = c["OUT_CH"], c["INPUT_BATCHES"]
    zero = {"zero_point": -c["INPUT_OFFSET"]}
    if dense:
        x = a["input"].reshape(batches, 1, -1)
        w = a["weights"].reshape(outputs, -1)
        constants = np.asarray([c["OUTPUT_MULTIPLIER"]], np.int32), np.asarray([c["OUTPUT_SHIFT"]], np.int32)
    else:
        channels, out = c["IN_CH"], (c["OUTPUT_H"], c["OUTPUT_W"])
        x = a["input"].reshape(batches, 1, c["INPUT_H"], c["INPUT_W"], channels)
        kernel = c["FILTER_Y"], c["FILTER_X"]
        if "CH_MULT" in c:
            w = a["weights"].reshape(*kernel, outputs).transpose(2, 0, 1)[..., None]
        else:
            w = a["weights"].reshape(outputs, *kernel, -1)
        zero |= window(c, kernel, out) | {"groups": channels // w.shape[3]}
        constants = a["output_mult"], a["output_shift"]
    source = Value("x", TensorType(x.shape[1:], "int8", Quant((1.0,), -c["INPUT_OFFSET"])))
    bias = a["biases"] if a.get("biases", np.zeros(0)).size == outputs else np.zeros(outputs, np.int32)
    acc = builder.call(
        "qnn.dense" if dense else "qnn.conv2d", source, builder.const(np.array(w)), builder.const(bias), **zero
    )
    limits = {"low": c["OUT_ACTIVATION_MIN"], "high": c["OUT_ACTIVATION_MAX"], "zero_point": c["OUTPUT_OFFSET"]}
    y = builder.call("qnn.requantize", acc, *map(builder.const, constants), scale=1.0, **limits)
    expected = a["output_ref"].reshape(batches, *y.type.shape)
    return finished(builder, (source,), y), [[picture] for picture in x], expected


def finished(builder: Builder, inputs: tuple[Value, ...], y: Value) -> Graph:
    consts = tuple(builder.consts.values())
    return verify(Graph("main", inputs, (), consts, tuple(builder.nodes), (y,)))


def lowered(op: str, operands: list[np.ndarray], zeros: list[int], c: dict[str, Any], **attrs: Any) -> Graph:
    """operator between dequantize and quantize, as ``requantize: tflite`` lowers it."""
    builder = Builder()
    inputs = tuple(
        Value(f"x{i}", TensorType(o.shape, "int8", Quant((1.0,), z)))
        for i, (o, z) in enumerate(zip(operands, zeros, strict=True))
    )
    reals = [builder.call("qnn.dequantize", x, scale=1.0, zero_point=z) for x, z in zip(inputs, zeros, strict=True)]
    y = builder.call(op, *reals, **attrs)
    scale, zero = (2.0, c["OUTPUT_OFFSET"]) if op == "add" else (1.0, zeros[0])
    low, high = (c.get(f"OUT_ACTIVATION_{k}", c.get(f"ACTIVATION_{k}")) for k in ("MIN", "MAX"))
    y = builder.call("qnn.quantize", y, scale=scale, zero_point=zero, low=low, high=high)
    return verify(lower_qdq(finished(builder, inputs, y), Settings("tflite")))


def arithmetic(c: dict[str, Any], a: dict[str, np.ndarray]) -> tuple[Graph, list[list[np.ndarray]], np.ndarray]:
    """Addition of equal scales into twice that scale, and pooling, which any zero point leaves alone."""
    if "LEFT_SHIFT" in c:
        assert c["INPUT1_MULT"] == c["INPUT2_MULT"] == c["OUTPUT_MULT"] == 2**30 and c["OUTPUT_SHIFT"] == -19
        operands = [a["input1"].reshape(1, -1), a["input2"].reshape(1, -1)]
        graph = lowered("add", operands, [-c["INPUT1_OFFSET"], -c["INPUT2_OFFSET"]], c)
        return graph, [operands], a["output_ref"].reshape(1, 1, -1)
    x = a["input_tensor"].reshape(1, c["INPUT_H"], c["INPUT_W"], c["INPUT_C"])
    size, strides = (c["FILTER_H"], c["FILTER_W"]), (c["STRIDE_H"], c["STRIDE_W"])
    op = "nn.avg_pool2d" if c["kind"].startswith("avg") else "nn.max_pool2d"
    graph = lowered(op, [x], [7], c, pool_size=size, strides=strides)
    return graph, [[x]], a["output"].reshape(1, *graph.outputs[0].type.shape)


@pytest.fixture(scope="module")
def made(vectors: dict[str, Vector]) -> dict[str, Any]:
    return {
        name: layer(c, a) if "OUT_CH" in c else arithmetic(c | {"kind": name}, a) for name, (c, a) in vectors.items()
    }


def test_references_reproduce_every_vector(made: dict[str, Any]) -> None:
    assert len(made) == COUNT
    for name, (graph, samples, expected) in made.items():
        for inputs, y in zip(samples, expected, strict=True):
            np.testing.assert_array_equal(evaluate(graph, inputs).outputs[0], y, name)


def test_generated_c_reproduces_every_vector(made: dict[str, Any], tmp_path: Path) -> None:
    command = next((c for c in (COMPILERS["gcc"], COMPILERS["zig"]) if c), None)
    if command is None:
        pytest.skip("no C compiler: pip install 'tte[emulate]'")
    names = {call.kernel: "" for graph, _, _ in made.values() for call in schedule(graph)}
    names = {kernel: f"t_k{i}" for i, kernel in enumerate(names)}
    for file, text in emit_kernels(names, "t").items():
        (tmp_path / file).write_text(text)
    library = build(tmp_path, "vectors", command)
    for name, (graph, samples, expected) in made.items():
        for inputs, y in zip(samples, expected, strict=True):
            env = {v.name: v.data for v in graph.consts} | {
                v.name: x for v, x in zip(graph.inputs, inputs, strict=True)
            }
            for node in graph.nodes:
                call = schedule(Graph("main", graph.inputs, (), graph.consts, (node,)))[0]
                case = Case(name, call, {v.name: env[v.name] for v in node.inputs}, y)
                env[node.output.name] = case.run(library, names[call.kernel])
            np.testing.assert_array_equal(env[graph.outputs[0].name], y, name)
