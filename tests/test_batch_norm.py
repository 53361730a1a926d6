"""Folded batch norm: the same function, and a step on the folded weights is a step of SGD on the user's own."""

import numpy as np
import pytest
import torch
from torch import nn

import tte.ops  # noqa: F401
from tte.frontends import import_model
from tte.ir import Const, Graph, evaluate, verify
from tte.passes.batch_norm import fold_batch_norm
from tte.passes.canonicalize import canonicalize
from tte.passes.layout import to_nhwc
from tte.scheme import find_layers


def simplified(module: nn.Module, shape: tuple[int, ...]) -> Graph:
    """Of the module with statistics and parameters that are not the initial ones."""
    torch.manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            tensors = [layer.running_mean, layer.running_var, layer.weight, layer.bias]
            for tensor in (t.data for t in tensors if t is not None):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    graph = import_model(module.eval(), (torch.zeros(shape),))
    for step in (canonicalize, to_nhwc, fold_batch_norm):
        graph = verify(step(graph))
    assert "nn.batch_norm" not in {n.op for n in graph.nodes}
    x = torch.randn(shape)
    np.testing.assert_allclose(evaluate(graph, [x.numpy()]).outputs[0], module(x).detach(), atol=1e-5)
    return graph


def constants(graph: Graph) -> dict[str, Const]:
    return {c.name: c for c in graph.consts}


LAYERS = {
    "conv": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (1, 4, 8, 8)),
    "conv-bias": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), (1, 4, 8, 8)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8, eps=1e-3), (1, 4, 8, 8)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (1, 4, 8, 8)),
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (1, 4, 8)),
    "dense": (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), (1, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_step_on_folded_weights_is_sgd_on_the_users_own(name: str) -> None:
    """w' moves by lr * scale^2 * g' and beta' by lr * g': both back in the user's terms are torch's own step."""
    linear, norm, shape = LAYERS[name]
    module = nn.Sequential(linear, norm)
    folded = constants(simplified(module, shape))
    weight, shift = folded["0.weight"], folded["1.bias"]
    assert set(folded) == {"0.weight", "1.bias"}
    assert weight.origin is not None and weight.origin.scale is not None and shift.origin is not None
    assert shift.origin.scale is None and shift.origin.name == "1.bias"
    user = linear.weight.detach().numpy()
    np.testing.assert_allclose(weight.data, weight.origin.scale * user.flat[weight.origin.index], rtol=1e-6)
    assert sorted(weight.origin.index.flat) == list(range(user.size))

    x = torch.randn(shape, requires_grad=False)
    loss = (module(x) ** 2).sum()
    loss.backward()
    assert linear.weight.grad is not None and norm.bias.grad is not None
    # the folded layer in torch, its weight made from the user's layout
    s = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
    per_weight = torch.zeros(user.size, dtype=torch.float64)
    per_weight[torch.from_numpy(weight.origin.index.reshape(-1))] = torch.from_numpy(weight.origin.scale.reshape(-1))
    per_weight = per_weight.reshape(user.shape).float()
    folded_weight = (linear.weight.detach() * per_weight).requires_grad_()
    bias = torch.from_numpy(shift.data.copy()).requires_grad_()
    twin = {**linear.__dict__}
    run = type(linear).__new__(type(linear))
    run.__dict__ = {**twin, "_parameters": {"weight": folded_weight, "bias": bias}}
    (run(x) ** 2).sum().backward()
    assert folded_weight.grad is not None and bias.grad is not None
    np.testing.assert_allclose(folded_weight.grad * per_weight, linear.weight.grad, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(bias.grad, norm.bias.grad, rtol=1e-4, atol=1e-4)
    assert s.shape == bias.shape


def test_without_affine_parameters_the_bias_is_the_layers() -> None:
    module = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False))
    bias = constants(simplified(module, (1, 4, 3, 3)))["0.bias"]
    assert bias.origin is not None and bias.origin.name == "0.bias" and bias.origin.scale is not None
    module = nn.Sequential(nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6, affine=False))
    found = constants(simplified(module, (1, 4, 3, 3)))
    assert "0.bias" not in found and [layer.bias for layer in find_layers(simplified(module, (1, 4, 3, 3)))] == [None]


class TwoReaders(nn.Module):
    """The convolution's result is read beside the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class SharedNorm(nn.Module):
    """One norm after two convolutions: its parameters cannot be in both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.a(x)) * self.norm(self.b(x))


@pytest.mark.parametrize("module", [nn.BatchNorm2d(4), TwoReaders(), SharedNorm()], ids=["alone", "readers", "shared"])
def test_where_it_cannot_be_folded(module: nn.Module) -> None:
    graph = simplified(module, (1, 4, 8, 8))
    norm = next(m for m in module.modules() if isinstance(m, nn.BatchNorm2d))
    assert [n.op for n in graph.nodes if n.op in ("subtract", "multiply", "add")][:3] == ["subtract", "multiply", "add"]
    path = "" if module is norm else "norm."
    gamma, beta = constants(graph)[path + "weight"], constants(graph)[path + "bias"]
    assert gamma.origin is not None and gamma.origin.scale is not None and beta.origin is not None
    np.testing.assert_allclose(gamma.data, gamma.origin.scale * norm.weight.detach().numpy(), rtol=1e-6)
    np.testing.assert_array_equal(beta.data, norm.bias.detach().numpy())


class Fork(nn.Module):
    """A folded batch norm with two readers, one of which is another batch norm (a residual network v2)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(self.conv(x))
        return y + self.second(y)


@pytest.mark.parametrize(
    "module",
    [
        Fork(),
        nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)),
    ],
    ids=["fork", "chain", "chain behind a layer"],
)
def test_several_batch_norms(module: nn.Module) -> None:
    simplified(module, (1, 4, 5, 5))
