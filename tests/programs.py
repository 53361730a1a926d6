"""Random small programs with forks, views, masks and updates, for properties of passes and memory plans."""

import numpy as np
from hypothesis import strategies as st

import tte.ops  # noqa: F401  fills the table of operators
from tte.ir import Builder, Graph, InvalidType, Param, TensorType, Value, rewrite, verify

STEPS = {
    "relu": lambda b, x, y: b.call("nn.relu", x, layer="relu"),
    "add": lambda b, x, y: b.call("add", x, y, layer="add"),
    "multiply": lambda b, x, y: b.call("multiply", x, y, layer="multiply"),
    "mask": lambda b, x, y: b.call("nn.mask", x, lower=0.0, layer="mask"),
    "apply_mask": lambda b, x, y: b.call("nn.apply_mask", x, y, layer="apply_mask"),
    "flatten": lambda b, x, y: b.call("reshape", x, newshape=(x.type.size,), layer="flatten"),
    "unflatten": lambda b, x, y: b.call("reshape", x, newshape=(1, x.type.size), layer="unflatten"),
    "concatenate": lambda b, x, y: b.call("concatenate", x, y, axis=x.type.rank - 1, layer="concatenate"),
    "half": lambda b, x, y: b.call("slice", x, **_half(x.type.shape), layer="half"),
    "sum": lambda b, x, y: b.call("sum", x, axis=(x.type.rank - 1,), keepdims=True, layer="sum"),
}


def _half(shape: tuple[int, ...]) -> dict:
    end = (*shape[:-1], (shape[-1] + 1) // 2)
    return {"begin": (0,) * len(shape), "end": end, "strides": (1,) * len(shape)}


@st.composite
def programs(draw, most: int = 8, least: int = 1) -> Graph:
    """``least`` to ``most`` steps, then the updates of up to two params; everything that nobody reads is returned."""
    builder = Builder()
    x = Value("x", TensorType((draw(st.integers(1, 9)),)))
    params = [
        Param(f"w{i}", TensorType((size,)), np.linspace(-1, 1, size, dtype=np.float32))
        for i, size in enumerate(draw(st.lists(st.integers(1, 9), max_size=2)))
    ]
    values: list[Value] = [x, *params]
    for _ in range(draw(st.integers(least, most))):
        step = STEPS[draw(st.sampled_from(sorted(STEPS)))]
        one, other = (values[-1 - draw(st.integers(0, min(5, len(values) - 1)))] for _ in range(2))
        try:
            values.append(step(builder, one, other))
        except InvalidType:
            values.append(builder.call("nn.relu", x, layer="relu"))
    loss = values[1 + len(params)]
    updates = []
    for param in params:
        gradients = [v for v in values if v.type == param.type and v != param]
        if gradients:
            gradient = draw(st.sampled_from(gradients))
            updates.append((param, builder.call("subtract", param, gradient, layer="update")))
    read = {v.name for node in builder.nodes for v in node.inputs} | {v.name for _, v in updates} | {loss.name}
    rest = (n.output for n in builder.nodes if n.output.name not in read)
    graph = Graph("program", (x,), tuple(params), (), (), (loss, *rest), tuple(updates))
    return verify(rewrite(graph, builder.nodes))


def sample(graph: Graph) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(v.type.shape).astype(np.float32) for v in graph.inputs]
