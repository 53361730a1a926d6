"""MIT's int8 models for microcontrollers -> QDQ ONNX with a new head.

    python examples/mcunet/import_model.py mcunet-5fps.pkl --classes 5 -o model.onnx

Reads the .pkl files of mit-han-lab/tiny-training (algorithm/assets/mcu_models), or the same as STEM.json and STEM.npz.
Layers are called first_conv, b<block>.pointwise1, b<block>.depthwise, b<block>.pointwise2 and classifier.
"""

import argparse
import io
import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PARTS = ("pointwise1", "depthwise", "pointwise2")
OPSET, IR_VERSION = 17, 8
INPUT_SCALE = 1 / 127.5  # for pictures of trunc(pixel - 127.5), pixel 0 to 255

Tensors = dict[str, np.ndarray]
Step = dict[str, Any]  # one operator: op, name, input(s), output, scales and zero points


# --- reading ----------------------------------------------------------------------------------------------------------


# What arrays and numbers name in a pickle; where it lies depends on numpy.
REBUILD = {"_reconstruct": np.empty(0).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}


class NumpyOnly(pickle.Unpickler):
    """A pickle may run anything when it is read; this one may make numpy arrays and plain Python values."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in REBUILD:
            return REBUILD[name]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # bytes, as protocol 2 writes them
            return lambda text, encoding: text.encode({"latin1": "latin1"}[encoding])
        raise SystemExit(f"refused: the pickle wants {module}.{name}, which is not needed for arrays")

    def persistent_load(self, name: Any) -> Any:
        raise SystemExit(f"refused: the pickle refers to {name!r} outside of itself")


def read_pickle(path: Path) -> tuple[list[Step], Tensors]:
    """The operators and arrays of a .pkl file, which is the zip archive that torch.save writes."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((n for n in archive.namelist() if n.endswith("/data.pkl")), "data.pkl")
            content = archive.read(name)
        config = NumpyOnly(io.BytesIO(content)).load()
        return steps_of(config)
    except (
        OSError,
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        LookupError,
        TypeError,
        ValueError,
        EOFError,
    ) as problem:
        raise SystemExit(f"{path} is not a model of mit-han-lab/tiny-training: {problem!r}") from problem


def steps_of(config: dict[str, Any]) -> tuple[list[Step], Tensors]:
    """The nested dictionaries of the .pkl as one list of operators."""
    steps: list[Step] = []
    tensors: Tensors = {}
    count = iter(range(10_000))

    def number(value: Any) -> Any:
        return np.asarray(value).reshape(()).item()

    def conv(name: str, layer: dict[str, Any], source: str) -> str:
        p = layer["params"]
        size = layer["kernel_size"]
        kernel = [int(size)] * 2 if np.ndim(size) == 0 else [int(k) for k in size]
        output = f"t{next(count)}"
        step = {"op": "conv2d", "name": name, "input": source, "output": output, "groups": int(layer["groups"])}
        step |= {"stride": int(layer["stride"]), "kernel": kernel, "pad": [(k - 1) // 2 for k in kernel]}
        step |= {key: number(p[key]) for key in ("x_scale", "x_zero", "y_scale", "y_zero")}
        tensors[f"{name}.weight"] = np.asarray(p["weight"]).astype(np.int8)
        tensors[f"{name}.bias"] = np.asarray(p["bias"]).astype(np.int32).reshape(-1)
        tensors[f"{name}.w_scales"] = np.asarray(p["w_scales"]).astype(np.float32).reshape(-1)
        steps.append(step)
        return output

    value = conv("first_conv", config["first_conv"], "input")
    for i, block in enumerate(config["blocks"]):
        if block.get("se") is not None:
            raise ValueError(f"block {i} has squeeze and excitation")
        entry = value
        for part in PARTS:
            if block[part] is not None:
                value = conv(f"b{i}.{part}", block[part], value)
        if block["residual"] is not None:
            if "kernel_size" in block["residual"]:
                raise ValueError(f"block {i} has a convolution beside it")
            p, last = block["residual"]["params"], steps[-1]
            step = {"op": "add", "name": f"b{i}.add", "inputs": [entry, value], "output": f"t{next(count)}"}
            step |= {"x1_scale": number(p["x_scale"]), "x1_zero": number(p["x_zero"])}
            step |= {"x2_scale": last["y_scale"], "x2_zero": last["y_zero"]}
            step |= {"y_scale": number(p["y_scale"]), "y_zero": number(p["y_zero"])}
            steps.append(step)
            value = step["output"]
    if config.get("feature_mix") is not None:
        value = conv("feature_mix", config["feature_mix"], value)
    steps.append({"op": "global_avgpool", "name": "avgpool", "input": value, "output": f"t{next(count)}"})
    conv("classifier", config["classifier"], steps[-1]["output"])
    return steps, tensors


def read_model(path: Path) -> tuple[list[Step], Tensors]:
    """Operators and arrays, from a .pkl or from STEM.json and STEM.npz."""
    if path.suffix == ".pkl":
        return read_pickle(path)
    stem = path.with_suffix("") if path.suffix in (".json", ".npz") else path
    try:
        steps = json.loads(stem.parent.joinpath(f"{stem.name}.json").read_text())["ops"]
        with np.load(stem.parent / f"{stem.name}.npz") as stored:
            return steps, dict(stored)
    except (OSError, ValueError, KeyError) as problem:
        raise SystemExit(f"{stem}.json and {stem}.npz are not such a model: {problem!r}") from problem


# --- writing ----------------------------------------------------------------------------------------------------------


class Writer:
    """ONNX nodes; every int8 value is known by its name and its grid (scale, zero point)."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors
        self.nodes: list[onnx.NodeProto] = []
        self.stored: dict[str, onnx.TensorProto] = {}
        self.grids: dict[str, tuple[float, int]] = {}

    def store(self, name: str, array: np.ndarray) -> str:
        self.stored[name] = numpy_helper.from_array(np.array(array, order="C"), name)
        return name

    def add(self, op: str, inputs: list[str], output: str, name: str, **attrs: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attrs))
        return output

    def grid(self, name: str, scale: float, zero: int) -> list[str]:
        scale_name = self.store(f"{name}_scale", np.float32(scale))
        return [scale_name, self.store(f"{name}_zero_point", np.int8(zero))]

    def quantize(self, source: str, name: str, scale: float, zero: int) -> None:
        self.grids[name] = (scale, zero)
        self.add("QuantizeLinear", [source, *self.grid(name, scale, zero)], f"{name}_quantized", f"{name}_quantize")

    def real(self, name: str, reader: str) -> str:
        """A value as floats, dequantised for this reader alone."""
        return self.add("DequantizeLinear", self.integers(name), f"{reader}/{name}", f"{reader}/{name}_dequantize")

    def integers(self, name: str) -> list[str]:
        """A value with its scale and zero point."""
        return [f"{name}_quantized", f"{name}_scale", f"{name}_zero_point"]

    def weights(self, layer: str, x_scale: float, x_zero: int) -> Iterator[str]:
        weight = self.tensors[f"{layer}.weight"]
        bias = limited(self.tensors[f"{layer}.bias"], weight, x_zero)
        scales = np.broadcast_to(self.tensors[f"{layer}.w_scales"].astype(np.float32), weight.shape[:1])
        for part, array, grid in (
            ("weight", weight.astype(np.int8), scales),
            ("bias", bias, scales * np.float32(x_scale)),
        ):
            name = f"{layer}.{part}"
            zeros = self.store(f"{name}_zero_point", np.zeros(grid.shape, array.dtype))
            operands = [self.store(name, array), self.store(f"{name}_scale", grid), zeros]
            yield self.add("DequantizeLinear", operands, f"{name}_real", f"{name}_dequantize", axis=0)


def limited(bias: np.ndarray, weight: np.ndarray, x_zero: int) -> np.ndarray:
    """Biases with which no sum leaves 32 bits, whatever the input is.

    Some channels are dead: their weights were so small that their scale is 4e-9, and their bias is then near 2^31: a
    sum of 32 bits wraps around, where the original adds in 64. Such a channel gives a constant, beyond the limits of
    int8, or, with weights 0, of a few steps. Moving the bias by the little that the weights need, less than 0.1
    percent, changes no result.
    """
    reach = np.abs(weight.astype(np.int64)).reshape(len(weight), -1).sum(1) * max(127 - x_zero, 128 + x_zero)
    room = 2**31 - 1 - reach
    return np.clip(bias.astype(np.int64), -room, room).astype(np.int32)


def convert(
    steps: list[Step], tensors: Tensors, classes: int, size: int = 128, int8_head: bool = False
) -> onnx.ModelProto:
    """The model as QDQ ONNX; its classifier is replaced by a new one of ``classes`` classes that answers 0.

    int8_head: in integers as all the rest, on the grids of the old one; else in float32
    """
    first, head = steps[0], steps[-1]
    new = new_head(tensors, head["name"], classes)
    writer = Writer(tensors | new)
    writer.quantize("x", "input", first["x_scale"], first["x_zero"])
    for step in steps[:-1]:
        name, output = step["name"], step["output"]
        for source, grid in sources(step):
            if grid is not None and not np.allclose(writer.grids[source], grid, rtol=1e-6):
                raise SystemExit(f"{name} reads {source} with scale and zero point {grid}, not {writer.grids[source]}")
        reals = [writer.real(source, name) for source, _ in sources(step)]
        if step["op"] == "conv2d":
            attrs = {"strides": [step["stride"]] * 2, "pads": [*step["pad"]] * 2, "group": step["groups"]}
            operands = [*reals, *writer.weights(name, step["x_scale"], step["x_zero"])]
            real = writer.add("Conv", operands, f"{output}_real", name, kernel_shape=step["kernel"], **attrs)
        elif step["op"] == "add":
            real = writer.add("Add", reals, f"{output}_real", name)
        else:
            real = writer.add("GlobalAveragePool", reals, f"{output}_real", name)
        grid = (step["y_scale"], step["y_zero"]) if "y_scale" in step else writer.grids[step["input"]]
        writer.quantize(real, output, *grid)
    name = head["name"]
    flat = writer.add("Flatten", [writer.real(head["input"], name)], "features", "flatten")
    if int8_head:
        real = writer.add(
            "Gemm", [flat, *writer.weights(name, head["x_scale"], head["x_zero"])], "answer", name, transB=1
        )
        writer.quantize(real, "logits", head["y_scale"], head["y_zero"])
        writer.add("DequantizeLinear", writer.integers("logits"), "logits", "logits_dequantize")
    else:
        weights = [writer.store(f"{name}.{part}", np.float32(new[f"{name}.{part}"])) for part in ("weight", "bias")]
        writer.add("Gemm", [flat, *weights], "logits", name, transB=1)
    graph = helper.make_graph(
        writer.nodes,
        "mcunet",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, size, size))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, (1, classes))],
        list(writer.stored.values()),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return model


def new_head(tensors: Tensors, name: str, classes: int) -> Tensors:
    """A classifier of zeros; each class has the scale of weights that is usual in the old one."""
    scale = np.median(tensors[f"{name}.w_scales"])
    return {
        f"{name}.weight": np.zeros((classes, tensors[f"{name}.weight"].shape[1]), np.int8),
        f"{name}.bias": np.zeros(classes, np.int32),
        f"{name}.w_scales": np.full(classes, scale, np.float32),
    }


def sources(step: Step) -> list[tuple[str, tuple[float, int] | None]]:
    """What a step reads, and the scale and zero point that it takes it for."""
    if step["op"] == "add":
        return [(name, (step[f"x{i}_scale"], step[f"x{i}_zero"])) for i, name in enumerate(step["inputs"], 1)]
    return [(step["input"], (step["x_scale"], step["x_zero"]) if "x_scale" in step else None)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="a .pkl of tiny-training, or the stem of a .json and a .npz")
    parser.add_argument("--classes", type=int, required=True, help="classes of the new head")
    parser.add_argument("--int8-head", action="store_true", help="the new head in int8, too; else float32")
    parser.add_argument("--size", type=int, default=128, help="rows and columns of a picture")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    steps, tensors = read_model(given.model)
    onnx.save(convert(steps, tensors, given.classes, given.size, given.int8_head), given.output)
    layers = sum(step["op"] == "conv2d" for step in steps) - 1
    print(f"{given.output}: {layers} convolutions, {given.classes} classes")


if __name__ == "__main__":
    main()
