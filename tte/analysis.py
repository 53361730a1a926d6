"""Looks at a model before any scheme: which layers it has, what they cost, and what could learn."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tte.compiler import lower
from tte.ir import Const, Graph, Node
from tte.scheme import Layer, Learned, Resolved, find_layers


@dataclass(frozen=True)
class LayerRow:
    """One layer with weights. name: as schemes call it; shape: of its output, channels last.

    trainable: "weight and bias", "weight", "bias"; backward: whether a gradient can pass through everything behind it
    analytic_extra_bytes: its part of ``extra_memory`` if all of it learns
    """

    name: str
    op: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    in_channels: int | None
    trainable: str
    forward: bool
    backward: bool
    int8: bool
    analytic_extra_bytes: int | None


@dataclass(frozen=True)
class Analysis:
    """The layers of a model in the order of execution."""

    graph: Graph
    layers: tuple[LayerRow, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "input": {"shape": list(self.graph.inputs[0].type.shape), "dtype": self.graph.inputs[0].type.dtype},
            "output": {"shape": list(self.graph.outputs[0].type.shape), "dtype": self.graph.outputs[0].type.dtype},
            "parameters": sum(row.parameters for row in self.layers),
            "macs": sum(row.macs for row in self.layers),
            "layers": [asdict(row) for row in self.layers],
        }

    def scheme_yaml(self) -> str:
        """A scheme to start from: the last layer learns, the rest is there as comments."""
        lines = [
            "# What learns on the device. Names are the model's own; patterns like blocks.{9..13}.* work.",
            "version: 1",
            "loss: cross_entropy        # mse, l1, huber, bce_with_logits",
            "optimizer: {name: sgd, lr: 0.01}",
            "train:                     # the last rule that matches a layer decides",
        ]
        trainable = [row for row in self.layers if row.backward]
        for row in trainable:
            weight = (
                "{in_channels: 0.25}" if row.in_channels and row.in_channels > 3 and row is not trainable[-1] else "all"
            )
            bias = ", bias: true" if "bias" in row.trainable else ""
            rule = f"- {{layer: {row.name}, weight: {weight}{bias}}}"
            cost = f"# {row.op.removeprefix('nn.')}, {row.parameters:,} parameters"
            lines.append(f"  {rule}  {cost}" if row is trainable[-1] else f"  # {rule}  {cost}")
        lines.append("# budget: {sram: 256KB, flash: 1MB}")
        return "\n".join(lines) + "\n"


def analyze(model: Any, example_inputs: Sequence[Any] | None = None) -> Analysis:
    """The layers of a model; arguments as for ``tte.compile``. Raises TTEError."""
    graph = lower(model, example_inputs)
    passable, layers = _passable(graph), find_layers(graph)
    extra = _extra_bits(graph, {layer.name: _all_of(layer) for layer in layers})
    return Analysis(graph, tuple(_row(graph, layer, passable, extra) for layer in layers))


def extra_memory(graph: Graph, resolved: Resolved) -> int | None:
    """What training needs beside inference by the analytic model of arXiv:2206.15472, in bytes; None for float models.

    A sum over layers, from shapes alone; graph: what the scheme was resolved against. From the first convolution that
    learns to the classifier a bit per output, for its clamp; of biases that learn 32 bits each; of weights that learn
    8 bits each, and 8 bits for each element of the input channels that they read; and the classifier's input. It knows
    no plan, no gradients, and counts nothing for the classifier's own weights.
    """
    extra = _extra_bits(graph, {entry.layer: entry for entry in resolved.layers})
    return -(-sum(extra.values()) // 8) if _is_quantized(graph) else None


def _is_quantized(graph: Graph) -> bool:
    return any(node.op.startswith("qnn.") for node in graph.nodes)


def _extra_bits(graph: Graph, learned: Mapping[str, Learned]) -> dict[str, int]:
    """Of each layer that gradients reach."""
    reader = {v.name: node for node in graph.nodes for v in node.inputs[1:]}
    layers = [layer for layer in find_layers(graph) if layer.op.startswith("nn.")]
    first = next((i for i, layer in enumerate(layers) if layer.name in learned), len(layers))
    bits = {}
    for layer in layers[first:]:
        stored = layer.weight or layer.bias
        assert stored is not None
        node, entry = reader[stored.name], learned.get(layer.name)
        if layer is layers[-1]:
            bits[layer.name] = 8 * node.inputs[0].type.size if entry and entry.weight else 0
        else:
            bits[layer.name] = node.output.type.size + (_learned_bits(layer, entry, node) if entry else 0)
    return bits


def _learned_bits(layer: Layer, entry: Learned, node: Node) -> int:
    bits = 32 * layer.bias.type.size if entry.bias and layer.bias else 0
    if entry.weight and layer.weight:
        elements = layer.weight.type.size + node.inputs[0].type.size
        bits += 8 * (elements if entry.channels is None else elements * len(entry.channels) // layer.channels)
    return bits


def _all_of(layer: Layer) -> Learned:
    weight, bias = (stored.name if stored else None for stored in (layer.weight, layer.bias))
    return Learned(layer.name, weight, bias)


def _row(graph: Graph, layer: Layer, passable: set[str], extra: Mapping[str, int]) -> LayerRow:
    weights = [w for w in (layer.weight, layer.bias) if w is not None]
    kinds = [kind for kind, w in (("weight", layer.weight), ("bias", layer.bias)) if w is not None]
    nodes = [n for n in graph.nodes if any(v.name == w.name for v in n.inputs for w in weights)]
    return LayerRow(
        name=layer.name,
        op=layer.op,
        shape=nodes[-1].output.type.shape,
        parameters=sum(w.type.size for w in weights),
        macs=sum(n.macs for n in nodes),
        in_channels=layer.channels if layer.axis is not None else None,
        trainable=" and ".join(kinds),
        forward=True,
        backward=all(n.output.name in passable for n in nodes),
        int8=all(w.origin is not None and w.origin.quantized is not None for w in weights),
        analytic_extra_bytes=-(-extra[layer.name] // 8) if _is_quantized(graph) and layer.name in extra else None,
    )


def _passable(graph: Graph) -> set[str]:
    """Values from which a gradient can flow: everything between them and the output is differentiable."""
    good = {graph.outputs[0].name}
    for node in reversed(graph.nodes):
        if node.definition.grad is not None and node.output.name in good:
            good |= {v.name for v in node.inputs if not isinstance(v, Const)}
    return good
