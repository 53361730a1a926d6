"""Regions that run tile by tile along the channels: the same bits in less memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import qdq
import torch
from torch import nn

import tte
from tte import compiler
from tte.artifact import Artifact
from tte.ir import Graph, Node
from tte.ir.tiles import find_line
from tte.passes import tile
from tte.passes.stream import Costs
from tte.runner.board import unpack_state


def conv(i: int, o: int, kernel: int = 1, stride: int = 1, act: nn.Module | None = None, **options: Any) -> nn.Module:
    """Convolution, batch norm with statistics that are not trivial, activation."""
    norm = nn.BatchNorm2d(o)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    nn.init.normal_(norm.running_mean, 0.0, 0.2)
    layers = [nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False, **options), norm]
    return nn.Sequential(*layers, *([act] if act else []))


class Sum(nn.Module):
    """Branches whose results are added to each other, and to what they read where that fits."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = sum(branch(x) for branch in self.branches)
        assert isinstance(y, torch.Tensor)
        return x + y if x.shape == y.shape else y


class Join(Sum):
    """Branches whose results are concatenated."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def inverted(
    i: int, wide: int, o: int, kernel: int = 3, stride: int = 1, act: Callable[[], nn.Module] = nn.ReLU6
) -> nn.Module:
    """An inverted residual block."""
    deep = conv(wide, wide, kernel, stride, act(), groups=wide)
    return Sum(nn.Sequential(conv(i, wide, act=act()), deep, conv(wide, o)))


def up(i: int, o: int, **options: Any) -> nn.Module:
    return nn.ConvTranspose2d(i, o, 3, 2, 1, 1, **options)


@dataclass(frozen=True)
class Case:
    """exact: only sums of 1 x 1 kernels are cut, so that every bit is as it was; classifies: else there is no head."""

    layers: Callable[[], tuple[nn.Module, ...]]
    scheme: dict[str, Any] = field(default_factory=lambda: {"train": "full"})
    exact: bool = True
    shape: tuple[int, ...] = (1, 2, 12, 10)
    head: bool = True

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(3)) if self.head else ()
        module = nn.Sequential(*self.layers(), *head).eval()
        module(torch.zeros(self.shape))
        return module


def learn(*rules: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"train": list(rules)} | more


def blocks(act: Callable[[], nn.Module] = nn.ReLU6) -> tuple[nn.Module, ...]:
    last = inverted(6, 36, 8, 7, 2, act)
    return conv(2, 6, 3, act=act()), inverted(6, 36, 6, act=act), inverted(6, 30, 6, 5, 1, act), last


PARTS = [
    {"layer": name, "weight": {"in_channels": n, "select": select}, "bias": True}
    for name, n, select in (
        ("1.branches.0.1.0", 10, "first"),
        ("1.branches.0.2.0", 5, "first"),
        ("2.branches.0.0.0", 3, "l2"),
        ("2.branches.0.1.0", 18, "l2"),
        ("2.branches.0.2.0", 12, "l2"),
        ("3.branches.0.1.0", 9, "l2"),
    )
]
SMALL = {"loss": "mse", "train": "full"}
CASES = {
    "relu6": Case(blocks),
    "hard swish": Case(lambda: blocks(nn.Hardswish)),
    "silu": Case(lambda: blocks(nn.SiLU), {"train": "full", "optimizer": {"lr": 0.1, "clip_loss_grad": 0.1}}),
    "biases only": Case(blocks, learn({"layer": "*", "bias": True})),
    "parts of weights": Case(blocks, learn(*PARTS)),
    "the first block only": Case(blocks, learn({"layer": "1.branches.0.0.0", "weight": "all"})),
    "resnet8": Case(lambda: (qdq.ResNet8(),), exact=False, shape=(1, 3, 16, 16), head=False),
    "prime": Case(lambda: (conv(2, 5), inverted(5, 37, 5), inverted(5, 37, 5))),
    "multiplier": Case(
        lambda: (conv(2, 6), Sum(nn.Sequential(conv(6, 12), conv(12, 24, 3, groups=12, act=nn.ReLU()), conv(24, 6))))
    ),
    "grouped": Case(
        lambda: (conv(2, 6), Sum(nn.Sequential(conv(6, 24, act=nn.ReLU()), conv(24, 24, 3, groups=4), conv(24, 6))))
    ),
    "decoder": Case(
        lambda: (
            conv(2, 4, 3, 2, nn.ReLU()),
            conv(4, 32, act=nn.ReLU()),
            up(32, 32, groups=32),
            nn.ReLU(),
            nn.Conv2d(32, 2, 1),
        ),
        SMALL,
        head=False,
    ),
    "transposed": Case(lambda: (conv(2, 4, 3, 2), up(4, 24), nn.ReLU(), conv(24, 4), inverted(4, 24, 4)), exact=False),
    "twice": Case(lambda: (conv(2, 24, 3, 2), conv(24, 4), up(4, 4, bias=False), Sum(nn.Identity()), nn.ReLU())),
    "u": Case(
        lambda: (
            conv(2, 16, 3, act=nn.ReLU()),
            Join(
                nn.Identity(),
                nn.Sequential(conv(16, 24, 3, 2, nn.ReLU()), inverted(24, 48, 24), up(24, 8), nn.ReLU()),
            ),
            conv(24, 32, act=nn.ReLU()),
            nn.Conv2d(32, 2, 1),
        ),
        {"loss": "l1", "train": "full"},
        exact=False,
        head=False,
    ),
    "branches": Case(
        lambda: (
            conv(2, 4, act=nn.ReLU()),
            Sum(
                nn.Sequential(conv(4, 24, act=nn.ReLU()), conv(24, 24, 5, groups=24), conv(24, 4)),
                nn.Sequential(conv(4, 20, act=nn.Sigmoid()), conv(20, 20, 3, groups=20), conv(20, 4)),
            ),
        )
    ),
    "dense block": Case(
        lambda: (
            conv(2, 4),
            *(Join(nn.Identity(), nn.Sequential(conv(c, 24, act=nn.ReLU()), conv(24, 4, 3))) for c in (4, 8)),
        ),
        exact=False,
    ),
    "narrow in the middle": Case(
        lambda: (
            conv(2, 24),
            *(Sum(nn.Sequential(conv(24, 4, act=nn.ReLU()), conv(4, 24))) for _ in range(2)),
            conv(24, 48, act=nn.ReLU()),
            conv(48, 6),
        )
    ),
    "points": Case(lambda: (conv(16, 8, act=nn.ReLU()), inverted(8, 64, 8), inverted(8, 64, 8)), shape=(1, 16, 1, 1)),
    "bce": Case(blocks, {"loss": "bce_with_logits", "train": "full"}),
    "huber": Case(blocks, {"loss": {"name": "huber", "reduction": "sum"}, "train": "full"}),
}
SMALLER = {"relu6", "prime", "decoder", "transposed", "branches"}  # by the pass as it is


def tile_everything(pick: Callable[[int, int], int]) -> Callable[[Graph], Graph]:
    """``tile_backward`` without its aim: all groups there are; ``pick``, of a region, one of so many widths."""

    def tile_backward(graph: Graph) -> Graph:
        if not graph.updates:
            return graph
        graph = tile._contracted(graph, tile.find_groups(graph, Costs(graph).forward))
        nodes = list(graph.nodes)
        for i, node in enumerate(nodes):
            if node.attrs.get("strategy") == "tiles":
                assert node.body
                widths = find_line(node.body).widths
                nodes[i] = replace(node, attrs=node.attrs | {"width": widths[pick(i, len(widths))]})
        return replace(graph, nodes=tuple(nodes))

    return tile_backward


@contextmanager
def tiled(pick: Callable[[int, int], int] = lambda i, count: i % count) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        passes = tuple(tile_everything(pick) if p is tile.tile_backward else p for p in compiler.SHRINK)
        patch.setattr(compiler, "SHRINK", passes)
        yield


def compile_one(model: Any, example: Any, scheme: Any, *off: str, target: str = "host") -> Artifact:
    return tte.compile(model, example, scheme, target, "net", disable_passes=off)


def regions(artifact: Artifact) -> list[Node]:
    return [node for node in artifact.graph.nodes if node.attrs.get("strategy") == "tiles"]


def train(artifact: Artifact, steps: int = 3) -> tuple[list[float], bytes]:
    board, rng, build = artifact.host(), np.random.default_rng(0), artifact.build
    losses = []
    for i in range(steps):
        x = rng.standard_normal(build.input.shape).astype(np.float32)
        y = np.asarray([i % build.classes], np.int32) if build.classes else rng.random(build.output.shape, np.float32)
        step = board.train_step(x, y)
        assert step.status == 0
        losses.append(step.loss)
    assert len(set(losses)) == steps
    return losses, board.save_state()


def assert_same_training(tiles: Artifact, whole: Artifact, exact: bool = True) -> None:
    (losses, state), (expected, other) = train(tiles), train(whole)
    if exact:
        assert losses == expected and state == other
        return
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    weights = [unpack_state(s, tiles.build) for s in (state, other)]
    for name, weight in weights[1].items():
        np.testing.assert_allclose(weights[0][name], weight, rtol=1e-5, atol=1e-6 * np.abs(weight).max(), err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_the_same_training_in_no_more_memory(name: str) -> None:
    case = CASES[name]
    inputs = (case.module(), (torch.zeros(case.shape),), case.scheme)
    with tiled():
        tiles = compile_one(*inputs)
    normal, whole = compile_one(*inputs), compile_one(*inputs, "tile_backward")
    assert regions(tiles) and not regions(whole)
    assert_same_training(tiles, whole, case.exact)
    assert normal.plan.arena_bytes <= whole.plan.arena_bytes and normal.plan.proved
    assert name not in SMALLER or (regions(normal) and normal.plan.arena_bytes < whole.plan.arena_bytes)
