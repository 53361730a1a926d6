"""Differentiation of whole graphs: forks, pruning, parts, refusals. Single rules are tested operator by operator."""

from dataclasses import replace

import networks
import numpy as np
import pytest

from tte.errors import TTEError
from tte.ir import Builder, Graph, Origin, Param, TensorType, Value, evaluate, rewrite, verify
from tte.passes.autodiff import Part, differentiate, find_wanted
from tte.passes.optimizer import attach_sgd
from tte.passes.simplify import eliminate_dead_code


def gradients(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    backward = verify(differentiate(graph))
    results = evaluate(backward, networks.sample(graph, seed)).outputs
    return dict(zip([p.name for p in graph.params], results[1:], strict=True))


def finite_difference(graph: Graph, name: str, direction: np.ndarray, seed: int = 0) -> float:
    """Directional derivative in float64."""
    wide = replace(
        graph,
        params=tuple(replace(p, data=p.data.astype(np.float64)) for p in graph.params),
        consts=tuple(replace(c, data=c.data.astype(np.float64)) for c in graph.consts),
    )
    step = 1e-6
    losses = []
    for sign in (1, -1):
        moved = {p.name: p.data + (sign * step * direction if p.name == name else 0) for p in wide.params}
        losses.append(float(_evaluate_wide(wide, networks.sample(graph, seed), moved)))
    return (losses[0] - losses[1]) / (2 * step)


def _evaluate_wide(graph: Graph, inputs: list[np.ndarray], params: dict[str, np.ndarray]) -> np.ndarray:
    from tte.ir import OPS

    env = dict(params) | {c.name: c.data for c in graph.consts}
    env |= {
        v.name: a.astype(np.float64) if a.dtype == np.float32 else a for v, a in zip(graph.inputs, inputs, strict=True)
    }
    for node in graph.nodes:
        env[node.output.name] = OPS[node.op].ref(*(env[v.name] for v in node.inputs), **node.attrs)
    return env[graph.outputs[0].name]


@pytest.mark.parametrize("name", networks.RESIDUAL_WEIGHTS)
def test_gradient_is_the_derivative(name: str) -> None:
    graph = networks.with_loss(networks.residual(networks.RESIDUAL_WEIGHTS))
    gradient = gradients(graph, seed=1)[name]
    direction = np.random.default_rng(3).standard_normal(gradient.shape)
    expected = finite_difference(graph, name, direction, seed=1)
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_forks_are_summed() -> None:
    """y = w + w + relu(w): the classic fault is to keep only the last of the three."""
    builder = Builder()
    w = Param("w", TensorType((1, 3)), np.asarray([[1, 2, 3]], np.float32))
    x = Value("x", TensorType((1, 3)))
    twice = builder.call("add", w, w)
    y = builder.call("add", twice, builder.call("nn.relu", w))
    loss = builder.call("nn.mse", y, x, reduction="sum")
    graph = Graph("main", (x,), (w,), (), tuple(builder.nodes), (loss,)).renumbered()
    np.testing.assert_array_equal(gradients(graph)["w"], 3 * 2 * (3 * w.data - networks.sample(graph)[0]))


def test_pruned_graph_is_the_masked_full_graph() -> None:
    """What a sparse scheme builds is bit for bit what the full backward pass computes."""
    full = gradients(networks.with_loss(networks.residual(networks.RESIDUAL_WEIGHTS)))
    rng = np.random.default_rng(0)
    for _ in range(20):
        chosen = tuple(n for n in networks.RESIDUAL_WEIGHTS if rng.random() < 0.3) or ("head.bias",)
        graph = networks.with_loss(networks.residual(chosen))
        for name, gradient in gradients(graph).items():
            np.testing.assert_array_equal(gradient, full[name], err_msg=f"{name} of {chosen}")


def test_nothing_is_built_below_the_lowest_trained_layer() -> None:
    forward = networks.with_loss(networks.residual(("narrow.bias", "head.weight")))
    graph = eliminate_dead_code(differentiate(forward))
    added = [n.op for n in graph.nodes[len(forward.nodes) :]]
    assert "nn.conv2d_transpose" not in added
    assert "nn.conv2d_weight_grad" not in added
    assert {n.layer for n in graph.nodes[len(forward.nodes) :]} == {"loss", "head", "pool", "narrow"}


def test_bias_only_needs_no_weight_gradient() -> None:
    biases = tuple(n for n in networks.RESIDUAL_WEIGHTS if n.endswith("bias"))
    graph = eliminate_dead_code(differentiate(networks.with_loss(networks.residual(biases))))
    assert not any(n.op in ("nn.conv2d_weight_grad",) for n in graph.nodes)
    assert not any(n.attrs.get("transpose_a") for n in graph.nodes if n.op == "matmul")


def test_a_split_weight_is_differentiated_in_part() -> None:
    graph = networks.with_loss(networks.split())
    wanted = find_wanted(graph)
    assert Part(3, 0, 3) in wanted.values()
    part = gradients(graph)["wide.weight"]
    whole = networks.with_loss(networks.split(("wide.weight", "wide.weight.frozen", "wide.bias")))
    both = gradients(whole)
    np.testing.assert_allclose(part, both["wide.weight"], rtol=1e-5, atol=1e-6)
    backward = differentiate(graph)
    shapes = [n.output.type.shape for n in backward.nodes if n.op == "nn.conv2d_weight_grad"]
    assert shapes == [(4, 3, 3, 3)]
    saved = next(n for n in backward.nodes if n.op == "slice")
    assert saved.output.type.shape == (1, 6, 6, 3)


def test_loss_gradient_is_clipped_before_anything_sees_it() -> None:
    graph = networks.with_loss(networks.residual(("head.bias",)))
    free = gradients(graph)["head.bias"]
    clipped = evaluate(differentiate(graph, clip_loss_grad=0.1), networks.sample(graph)).outputs[1]
    np.testing.assert_array_equal(clipped, np.clip(free, -0.1, 0.1).astype(np.float32))
    assert (clipped != free).any()


def test_operator_without_gradient_is_named() -> None:
    builder = Builder()
    w = Param("w", TensorType((1, 3)), np.ones((1, 3), np.float32))
    label = Value("target", TensorType((1,), "int32"))
    y = builder.call("nn.apply_mask", w, builder.call("nn.mask", w, lower=0.0), layer="blocks.3.gate")
    loss = builder.call("nn.cross_entropy", y, label)
    graph = Graph("main", (label,), (w,), (), tuple(builder.nodes), (loss,)).renumbered()
    with pytest.raises(TTEError, match="nn.apply_mask has no gradient") as problem:
        differentiate(graph)
    assert "blocks.3.gate" in problem.value.where


def test_param_without_influence_is_refused() -> None:
    graph = networks.with_loss(networks.residual(("head.bias",)))
    idle = Param("idle.weight", TensorType((2,)), np.ones(2, np.float32))
    with pytest.raises(TTEError, match="idle.weight"):
        differentiate(replace(graph, params=(*graph.params, idle)))


def test_a_folded_scale_does_not_change_the_users_step() -> None:
    """w = s * u: after one step, w / s is where SGD on u would have gone."""
    graph = networks.with_loss(networks.residual(("narrow.weight",)))
    (param,) = graph.params
    scale = np.broadcast_to(np.linspace(0.5, 2, 6).reshape(6, 1, 1, 1), param.type.shape)
    index = np.arange(param.type.size).reshape(param.type.shape)
    scaled = replace(param, origin=Origin(param.name, param.type.shape, index, scale))
    nodes = [replace(n, inputs=tuple(scaled if v.name == param.name else v for v in n.inputs)) for n in graph.nodes]
    graph = verify(rewrite(replace(graph, params=(scaled,)), nodes))
    gradient = gradients(graph)[param.name]
    step = attach_sgd(differentiate(graph), 0.25)
    factor = next(c for c in step.consts if c.type.shape == (6, 1, 1, 1))
    np.testing.assert_allclose(factor.data.reshape(-1), np.linspace(0.5, 2, 6) ** 2, rtol=1e-6)
    new = evaluate(step, networks.sample(graph)).params[param.name]
    user = param.data / scale - 0.25 * gradient * scale
    np.testing.assert_allclose(new / scale, user, rtol=1e-5, atol=1e-6)
