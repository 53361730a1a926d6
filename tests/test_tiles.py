"""Regions that run tile by tile along the channels: the same bits in less memory."""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qdq
import torch
from random_networks import Network, draw_scheme
from test_runner import run_sanitized
from test_runner import train as run
from torch import nn

import tte
from tte import compiler
from tte.artifact import Artifact
from tte.codegen import schedule
from tte.codegen.check import PlanError, check_tiles
from tte.compiler import lower
from tte.ir import Graph, Node, inplace_inputs, parse, verify
from tte.ir.tiles import Cut, find_line, find_start, find_tiles, scratch_bytes
from tte.ir.verify import InvalidGraph
from tte.passes import tile
from tte.passes.costs import ANY, Costs
from tte.passes.fuse import fuse_producers
from tte.passes.reorder import reorder
from tte.runner import open_host
from tte.runner.board import unpack_state

pytestmark = pytest.mark.usefixtures("import_once")


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

    @functools.cached_property
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
    "resnet8": Case(lambda: (qdq.small_resnet8(),), exact=False, shape=(1, 3, 16, 16), head=False),
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
    "transposed": Case(lambda: (conv(2, 4, 3, 2), up(4, 24), nn.ReLU(), conv(24, 4), inverted(4, 24, 4))),
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


def tile_everything(pick: Callable[[int, int], int], slim: bool) -> Callable[[Graph], Graph]:
    """``tile_backward`` without its aim: all groups there are; ``pick``, of a region, one of so many widths.

    slim: what is cheap is made where it is read
    """

    def tile_backward(graph: Graph) -> Graph:
        if not graph.updates:
            return graph
        graph = fuse_producers(graph) if slim else graph
        grouped = tile.contract(graph, tile.find_groups(graph, Costs(graph, ANY).forward))
        assert grouped
        graph = reorder(grouped)
        nodes = list(graph.nodes)
        for i, node in enumerate(nodes):
            if node.attrs.get("strategy") == "tiles":
                assert node.body
                widths = find_line(node.body).widths
                nodes[i] = replace(node, attrs=node.attrs | {"width": widths[pick(i, len(widths))]})
        return replace(graph, nodes=tuple(nodes))

    return tile_backward


@contextmanager
def tiled(pick: Callable[[int, int], int] = lambda i, count: i % count, slim: bool = False) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        passes = tuple(tile_everything(pick, slim) if p is tile.tile_backward else p for p in compiler.SHRINK)
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


def assert_same_training(tiles: Artifact, whole: Artifact, exact: bool = True, steps: int = 3) -> None:
    (losses, state), (expected, other) = train(tiles, steps), train(whole, steps)
    if exact:
        assert losses == expected and state == other
        return
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    weights = [unpack_state(s, tiles.build) for s in (state, other)]
    for name, weight in weights[1].items():
        difference = weights[0][name].astype(np.float64) - weight
        if weight.dtype == np.float32:
            assert np.linalg.norm(difference) <= 1e-6 * np.linalg.norm(weight), name
        else:  # what is rounded differently is another integer
            assert np.abs(difference).max() <= 1, name


@pytest.mark.parametrize("name", CASES)
def test_the_same_training_in_no_more_memory(name: str) -> None:
    case = CASES[name]
    inputs = (case.module, (torch.zeros(case.shape),), case.scheme)
    with tiled(slim=name not in SMALLER):
        tiles = compile_one(*inputs)
    normal, whole = compile_one(*inputs), compile_one(*inputs, "tile_backward")
    assert regions(tiles) and not regions(whole)
    assert_same_training(tiles, whole, case.exact)
    assert normal.plan.arena_bytes <= whole.plan.arena_bytes and normal.plan.proved
    owners = normal.graph.owners()
    assert all(owners[value.name] == param.name for param, value in normal.graph.updates), "updates are in place"
    assert name not in SMALLER or (regions(normal) and normal.plan.arena_bytes < whole.plan.arena_bytes)


# --- integers, a board, sanitizers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def integers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")
    return functools.cache(lambda name: qdq.quantize(qdq.RECIPES[name], folder / name))


SPLIT = learn(
    {"layer": "blocks.1.body.1.0", "weight": {"in_channels": 20, "select": "l2"}, "bias": True},
    {"layer": "blocks.1.body.0.0", "weight": {"in_channels": 3, "select": "l2"}},
    {"layer": "blocks.2.body.2.0", "weight": {"in_channels": 7, "select": "first"}, "bias": True},
)
INTEGERS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("mcunet", {"train": "last-k:12", "quantized": {"weight_storage": "int8_sr"}}),
    "int16": ("mobilenet-v2-uint8", {"train": "full", "quantized": {"weight_storage": "int16_ef"}}),
    "parts": ("mcunet", SPLIT),
    "resnet8": ("resnet8", {"train": "full", "quantized": {"weight_storage": "fp32"}}),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str, integers: Callable[[str], Path]) -> None:
    recipe, scheme = INTEGERS[name]
    model = integers(recipe)
    with tiled():
        tiles = compile_one(model, None, scheme)
    assert regions(tiles)
    whole = compile_one(model, None, scheme, "tile_backward")
    if recipe == "resnet8":  # what is rounded differently may be an integer
        assert_same_training(tiles, whole, exact=False, steps=1)
    else:
        assert_same_training(tiles, whole)


def test_an_emulated_board(integers: Callable[[str], Path]) -> None:
    recipe = qdq.RECIPES["mcunet"]
    scheme = {"train": "last-k:12"}
    tiles, whole = (
        compile_one(integers("mcunet"), None, scheme, *off, target="stm32f746") for off in ((), ("tile_backward",))
    )
    assert regions(tiles) and tiles.plan.proved
    assert tiles.plan.arena_bytes < 0.7 * whole.plan.arena_bytes
    data = {"x": qdq.inputs(recipe, 3)[:, 0], "y": np.arange(3)}
    expected = whole.run(data, runner="host")
    for place in ("host", "unicorn"):
        result = tiles.run(data, runner=place)
        assert (result.loss, result.weights_sha256) == (expected.loss, expected.weights_sha256)


@pytest.mark.parametrize("name", ["parts of weights", "u"])
def test_the_same_bits_under_sanitizers(name: str) -> None:
    case = CASES[name]
    with tiled():
        artifact = compile_one(case.module, (torch.zeros(case.shape),), case.scheme)
    assert regions(artifact)
    result = run_sanitized(artifact.build)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["state"] == run(open_host(artifact.build))["state"]


# --- the calculus -----------------------------------------------------------------------------------------------------

# The backward of expand @e (6 to 12 channels), depthwise @d and project @p (12 to 4): from %g to what is added to %y.
TEXT = """
def @train(%g: Tensor[(1, 4, 4, 4), float32], %h: Tensor[(1, 4, 4, 12), float32], %x: Tensor[(1, 4, 4, 6), float32]) {
  param @e: Tensor[(12, 1, 1, 6), float32];
  param @d: Tensor[(12, 3, 3, 1), float32];
  const @p: Tensor[(4, 1, 1, 12), float32];
  %0 = nn.relu(%x) /* ty=Tensor[(1, 4, 4, 6), float32] */;
  %1, %2, %3 = region(a0=%g, a1=@p, a2=@d, a3=@e, a4=%0, a5=%h, a6=%x, STRATEGY) {
    %0 = nn.conv2d_transpose(%a0, %a1) /* ty=Tensor[(1, 4, 4, 12), float32] */;
    %1 = nn.conv2d_transpose(%0, %a2, padding=(1, 1, 1, 1), groups=12) /* ty=Tensor[(1, 4, 4, 12), float32] */;
    %2 = nn.conv2d_transpose(%1, %a3, %a4) /* ty=Tensor[(1, 4, 4, 6), float32] */;
    %3 = region(a0=%a6, a1=%1, a2=%a3, strategy='fused') {
      %0 = nn.conv2d_weight_grad(%a0, %a1, kernel_size=(1, 1)) /* ty=Tensor[(12, 1, 1, 6), float32] */;
      %1 = subtract(%a2, %0) /* ty=Tensor[(12, 1, 1, 6), float32] */;
      return %1;
    } /* ty=Tensor[(12, 1, 1, 6), float32] */;
    %4 = region(a0=%a5, a1=%0, a2=%a2, strategy='fused') {
      %0 = nn.conv2d_weight_grad(%a0, %a1, GEOMETRY) /* ty=Tensor[(12, 3, 3, 1), float32] */;
      %1 = subtract(%a2, %0) /* ty=Tensor[(12, 3, 3, 1), float32] */;
      return %1;
    } /* ty=Tensor[(12, 3, 3, 1), float32] */;
    return %2, %3, %4;
  } /* ty=Tensor[(1, 4, 4, 6), float32], Tensor[(12, 1, 1, 6), float32], Tensor[(12, 3, 3, 1), float32] */;
  @e := %2;
  @d := %3;
  return %1;
}
"""
IN_PLACE = "strategy='tiles', width=4, inplace=(4, 3, 2)"


def parse_region(strategy: str = IN_PLACE, text: str = TEXT) -> Graph:
    geometry = "kernel_size=(3, 3), padding=(1, 1, 1, 1), groups=12"
    return parse(text.replace("STRATEGY", strategy).replace("GEOMETRY", geometry))


def test_how_a_region_is_cut() -> None:
    graph = verify(parse_region())
    assert parse(str(graph)) == graph
    node = graph.nodes[1]
    tiles = find_tiles(node)
    assert node.body and tiles
    assert find_line(node.body).widths == [1, 2, 3, 4, 6]
    assert tiles.cuts == {name: Cut(3) for name in ("0", "1", "a1", "a5")} | {n: Cut(0) for n in ("3", "4", "a2", "a3")}
    assert tiles.spans == ((0, 12),) * 5
    assert tiles.sizes == {"0": 16 * 4 * 4, "1": 16 * 4 * 4} and tiles.nbytes == scratch_bytes(node) == 512
    assert find_start(node) == graph.nodes[0].output
    assert inplace_inputs(node, 0) == (4,) and inplace_inputs(node, 1) == (3,) and inplace_inputs(node, 2) == (2,)
    check_tiles(node, tiles, "")


CONVOLUTION = "nn.conv2d_transpose(%0, %a2, padding=(1, 1, 1, 1), groups=12)"
REFUSED = {
    "a convolution is no sum that goes on": ("nn.conv2d_transpose(%1, %a3, %a4)", "nn.conv2d(%1, %w)", "6, 1, 1, 12"),
    "two groups": (CONVOLUTION, "nn.conv2d_transpose(%0, %w, padding=(1, 1, 1, 1), groups=2)", "12, 3, 3, 6"),
    "softmax": (CONVOLUTION, "nn.softmax(%0)", "1"),
    "what is cut is summed over": (CONVOLUTION, "nn.conv2d_transpose(%0, %w)", "12, 1, 1, 12"),
    "a sum that a member reads": ("region(a0=%a6,", "region(a0=%2,", "1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_by_tiles(name: str) -> None:
    old, new, shape = REFUSED[name]
    assert old in TEXT
    text = TEXT.replace(old, new).replace("a6=%x,", "a6=%x, w=@w,")
    text = text.replace("  const @p", f"  const @w: Tensor[({shape},), float32];\n  const @p")
    graph = parse_region("strategy='tiles', width=4", text)
    body = graph.nodes[1].body
    assert body and find_line(body).widths == []
    with pytest.raises(InvalidGraph, match="cannot run in tiles of 4"):
        verify(graph)


@pytest.mark.parametrize("width", [0, 5, -4, 24, 2.0])
def test_widths_that_do_not_divide_the_line(width: float) -> None:
    with pytest.raises(InvalidGraph, match="cannot run in tiles"):
        verify(parse_region(f"strategy='tiles', width={width}"))


# --- what the checks must see -----------------------------------------------------------------------------------------


def changed(node: Node, order: Sequence[int], **changes: Any) -> Node:
    """The region with its members in another order."""
    assert node.body
    body = replace(node.body, nodes=tuple(node.body.nodes[i] for i in order))
    return replace(node, body=body, **changes)


@pytest.mark.parametrize(
    "order, what",
    [
        ((1, 0, 2, 3, 4), "for tile 0, member 0 .* reads %0, which is not there"),
        ((0, 1, 3, 2, 4), "for tile 0, member 3 .* reads %a3, which is not there"),
        ((0, 4, 1, 2, 3), "for tile 0, member 2 .* reads %a2, which is not there"),
    ],
)
def test_members_in_a_wrong_order(order: Sequence[int], what: str) -> None:
    node = changed(parse_region().nodes[1], order)
    tiles = find_tiles(node)
    if order[0] == 0:  # what is made in place is made too early
        with pytest.raises(InvalidGraph, match="works in place on input [23] against its contract"):
            graph = parse_region()
            verify(replace(graph, nodes=(graph.nodes[0], node)))
    assert tiles
    with pytest.raises(PlanError, match=what):
        check_tiles(node, tiles, "")


def test_a_sum_that_begins_with_what_another_member_reads() -> None:
    """As long as it is not in place of that, all is well."""
    text = TEXT.replace("region(a0=%a6,", "region(a0=%a4,")
    verify(parse_region("strategy='tiles', width=4, inplace=(None, 3, 2)", text))
    graph = parse_region(IN_PLACE, text)
    node = graph.nodes[1]
    tiles = find_tiles(node)
    assert tiles
    with pytest.raises(PlanError, match="for tile 0, member 3 .region. reads %a4, which is not there"):
        check_tiles(node, tiles, "")
    with pytest.raises(InvalidGraph, match="works in place on input 4 against its contract"):
        verify(graph)


@pytest.mark.parametrize("member", range(2, 5))
def test_a_span_that_is_cut_short(member: int) -> None:
    node = parse_region().nodes[1]
    tiles = find_tiles(node)
    assert tiles
    spans = tuple((0, 8) if i == member else span for i, span in enumerate(tiles.spans))
    with pytest.raises(PlanError, match=rf"of member {member}, %{member}, only tiles \[0, 4\]"):
        check_tiles(node, replace(tiles, spans=spans), "")


def test_a_tile_that_was_not_made() -> None:
    node = parse_region().nodes[1]
    tiles = find_tiles(node)
    assert tiles
    with pytest.raises(PlanError, match="for tile 8, member 1 .* reads %0, which is not there"):
        check_tiles(node, replace(tiles, spans=((0, 8), *tiles.spans[1:])), "")


@pytest.mark.parametrize("broken", ["tile", "sum"])
def test_a_wrong_kernel_is_seen(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of bits is worth something: reading the first tile for all, or forgetting a sum so far."""
    case = CASES["relu6"]
    inputs = (case.module, (torch.zeros(case.shape),), case.scheme)
    whole = compile_one(*inputs, "tile_backward")
    with tiled():
        if broken == "tile":
            monkeypatch.setattr(schedule, "_from", lambda type, cut, c: {"c": c})
        else:
            monkeypatch.setattr(schedule, "_Tile", lambda *args: _Forgetful(*args))
        tiles = compile_one(*inputs)
        train(tiles)
    with pytest.raises(AssertionError):
        assert_same_training(tiles, whole)


class _Forgetful(schedule._Tile):
    """Begins every sum with the last tile."""

    def spread(self, node: Node) -> schedule._Tile:
        tile = super().spread(node)
        return replace(tile, span=(tile.span[1] - tile.width, tile.span[1]))


# --- random networks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_random_networks(seed: int) -> None:
    module = Network(seed + 40)
    inputs = (module, (torch.zeros(module.shape),))
    scheme = draw_scheme(lower(*inputs), seed, module.classes)
    with tiled(lambda i, count: (i + seed) % count):
        tiles = compile_one(*inputs, scheme)
    assert_same_training(tiles, compile_one(*inputs, scheme, "tile_backward"))
