"""The interpreter: runs a graph in numpy. It is the semantics of the language and the oracle for the generated C."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tte.ir.graph import Graph
from tte.ir.op import OPS


@dataclass(frozen=True, eq=False)
class Result:
    """outputs: in the order of ``graph.outputs``; params: every param after the step, by name."""

    outputs: list[np.ndarray]
    params: dict[str, np.ndarray]


def evaluate(graph: Graph, inputs: Sequence[np.ndarray], params: Mapping[str, np.ndarray] | None = None) -> Result:
    """Run once. ``params`` replaces initial values; nothing given is changed.

    Updates take effect at the end; ``verify`` makes sure that writing them in place gives the same.
    """
    state = {p.name: np.asarray((params or {}).get(p.name, p.data)) for p in graph.params}
    env = dict(state) | {c.name: c.data for c in graph.consts}
    for value, array in zip(graph.inputs, inputs, strict=True):
        array = np.asarray(array)
        assert array.shape == value.type.shape, f"%{value.name}: {value.type} given {array.shape}"
        env[value.name] = array.astype(value.type.numpy, copy=False)
    for node in graph.nodes:
        arguments = [env[v.name] for v in node.inputs]
        if node.body:
            results = evaluate(node.body, arguments).outputs
        else:
            result = OPS[node.op].ref(*arguments, **node.attrs)
            results = list(result) if isinstance(result, tuple) else [result]
        for value, array in zip(node.outputs, results, strict=True):
            assert array.shape == value.type.shape, f"{node.op}: {value.type} computed {array.shape}"
            env[value.name] = array
    new = {p.name: env[v.name] for p, v in graph.updates}
    return Result([env[v.name] for v in graph.outputs], state | new)
