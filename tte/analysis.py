"""Looks at a model before any scheme: which layers it has, what they cost, and what could learn."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tte.compiler import lower
from tte.ir import Const, Graph
from tte.scheme import Layer, find_layers


@dataclass(frozen=True)
class LayerRow:
    """One layer with weights. name: as schemes call it; shape: of its output, channels last.

    trainable: "weight and bias", "weight", "bias"; backward: whether a gradient can pass through everything behind it
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
    passable = _passable(graph)
    return Analysis(graph, tuple(_row(graph, layer, passable) for layer in find_layers(graph)))


def _row(graph: Graph, layer: Layer, passable: set[str]) -> LayerRow:
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
        int8=all(w.type.dtype == "int8" for w in weights),
    )


def _passable(graph: Graph) -> set[str]:
    """Values from which a gradient can flow: everything between them and the output is differentiable."""
    good = {graph.outputs[0].name}
    for node in reversed(graph.nodes):
        if node.definition.grad is not None and node.output.name in good:
            good |= {v.name for v in node.inputs if not isinstance(v, Const)}
    return good
