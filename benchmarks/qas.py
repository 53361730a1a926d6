"""How large weights are beside their gradients: a float network, its int8 form, and int8 with scaled gradients.

The plot of docs/quantized.md: python benchmarks/qas.py MODEL.int8.onnx --data pictures.npz --plot docs/images/qas.png
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from tte.compiler import lower
from tte.ir import Builder, Const, Graph, Node, Param, evaluate, rewrite, verify
from tte.ops.quantized import DEAD
from tte.passes.autodiff import differentiate
from tte.passes.loss import append_loss
from tte.passes.optimizer import attach_sgd, step_size
from tte.passes.quantized import Settings, keep_saturation_masks, lower_qdq
from tte.passes.select_updates import select_updates
from tte.passes.simplify import eliminate_dead_code
from tte.scheme import UpdateScheme, resolve


def without_rounding(graph: Graph) -> Graph:
    """The float network: where activations were rounded to int8, only the limits of int8 stay."""
    builder = Builder()
    names = {}
    for node in graph.nodes:
        node = replace(node, inputs=tuple(names.get(v.name, v) for v in node.inputs))
        if node.op == "qnn.quantize":
            scale, zero = float(node.attrs["scale"]), int(node.attrs["zero_point"])  # type: ignore[arg-type]
            limits = {"min": scale * (-128 - zero), "max": scale * (127 - zero)}
            names[node.output.name] = builder.call("clip", *node.inputs, **limits, layer=node.layer)
        elif node.op == "qnn.dequantize":
            names[node.output.name] = node.inputs[0]
        else:
            new: Node = replace(node, outputs=tuple(builder.fresh(v.type) for v in node.outputs))
            builder.append(new)
            names |= {old.name: v for old, v in zip(node.outputs, new.outputs, strict=True)}
    return rewrite(graph, builder.nodes, outputs=tuple(names.get(v.name, v) for v in graph.outputs))


def start_head(graph: Graph) -> Graph:
    """A classifier of zeros sends no gradients back: small random numbers in its place."""
    rng = np.random.default_rng(0)

    def fill(const: Const) -> Const:
        if const.type.rank < 2 or const.data.any():
            return const
        data = rng.standard_normal(const.type.shape) / np.sqrt(const.type.shape[-1])
        return replace(const, data=data.astype(np.float32))

    nodes = {c.name: fill(c) for c in graph.consts}
    inputs = (replace(n, inputs=tuple(nodes.get(v.name, v) for v in n.inputs)) for n in graph.nodes)
    return rewrite(graph, inputs, consts=tuple(nodes.values()))


def differentiated(forward: Graph, scheme: UpdateScheme) -> Graph:
    with_loss = append_loss(forward, scheme.loss)
    return verify(eliminate_dead_code(differentiate(keep_saturation_masks(with_loss))))


def measure(source: Graph, pictures: list[list[np.ndarray]]) -> dict[str, dict[str, float]]:
    """Per curve and tensor: log10 of |w| / |step at learning rate 1|, both as the real numbers that they stand for.

    A tensor with a scale per channel has no other common unit. Channels whose scale says that they are zero are left
    out. Steps are root mean squares over the pictures.
    """
    scheme = UpdateScheme.load("full")
    chosen = select_updates(source, resolve(scheme, source))
    int8 = differentiated(verify(lower_qdq(chosen, Settings())), scheme)
    graphs = {"float": (differentiated(verify(without_rounding(chosen)), scheme), True)}
    graphs |= {"int8": (int8, False), "int8, scaled gradients": (int8, True)}
    stored = {p.name: p for p in int8.params if p.type.quant is not None}
    readers = {v.name: node for node in int8.nodes for v in node.inputs}
    curves: dict[str, dict[str, float]] = {}
    for curve, (graph, qas) in graphs.items():
        steps = attach_sgd(graph, 1.0, qas)
        producer = steps.producer()
        calls = {p.name: producer[v.name] for p, v in steps.updates if p.name in stored}
        wanted = replace(steps, outputs=tuple(call.inputs[1] for call in calls.values()), updates=())
        squares = dict.fromkeys(calls, 0.0)
        for arrays in pictures:
            for (name, call), gradient in zip(calls.items(), evaluate(wanted, arrays).outputs, strict=True):
                alive, real = units(stored[name], readers[name])
                # A float network takes the gradient itself; integers take steps of a scale each.
                step = gradient * (step_size(call, np.float32(1.0)) * real if call.op == "qnn.sgd" else 1.0)
                squares[name] += float(((step * alive) ** 2).sum()) / len(pictures)
        curves[curve] = {}
        for name, square in squares.items():
            alive, real = units(stored[name], readers[name])
            curves[curve][name] = float(np.log10(np.linalg.norm(stored[name].data * real * alive) / np.sqrt(square)))
    return curves


def units(param: Param, reader: Node) -> tuple[np.ndarray, np.ndarray]:
    """Per channel: 1 where it lives, else 0; the real number that one integer stands for."""
    weight = reader.inputs[1].type.quant if param in reader.inputs[2:] else param.type.quant
    assert weight is not None and param.type.quant is not None
    shape = (-1, *[1] * (param.type.rank - 1))
    alive = (np.asarray(weight.scale) >= DEAD).astype(np.float64)
    return alive.reshape(shape), np.asarray(param.type.quant.scale).reshape(shape)


def draw(curves: dict[str, dict[str, float]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.6), dpi=80)
    for (name, points), style in zip(curves.items(), ("k-", "r-", "b--"), strict=True):
        axes.plot(list(points.values()), style, label=name, linewidth=1)
    axes.set_xlabel("tensor, from input to output (weights and biases)")
    axes.set_ylabel("log10 |w| / |step|")
    axes.set_title(title)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a quantised ONNX model")
    parser.add_argument("--data", type=Path, help=".npz with x, as the model takes it, and y; made up when not given")
    parser.add_argument("--count", type=int, default=16, help="pictures")
    parser.add_argument("--plot", type=Path, default=Path("build/qas.png"))
    arguments = parser.parse_args()
    source = start_head(lower(arguments.model))
    shape, classes = source.inputs[0].type.shape, source.outputs[0].type.shape[-1]
    rng = np.random.default_rng(0)
    if arguments.data:
        data = np.load(arguments.data)
        x, y = data["x"], data["y"]
    else:
        x, y = rng.standard_normal((arguments.count, *shape[1:])), rng.integers(0, classes, arguments.count)
    chosen = rng.permutation(len(x))[: arguments.count]
    pictures = [[x[i : i + 1].astype(np.float32), np.asarray([y[i] % classes], np.int32)] for i in chosen]
    curves = measure(source, pictures)
    draw(curves, arguments.plot, arguments.model.stem)
    for name in list(curves)[1:]:
        distance = {n: abs(v - curves["float"][n]) for n, v in curves[name].items()}
        worst = max(distance, key=distance.__getitem__)
        print(json.dumps({"curve": name, "tensors": len(distance), "largest": distance[worst], "tensor": worst,
                          "median": float(np.median(list(distance.values())))}))  # fmt: skip


if __name__ == "__main__":
    main()
