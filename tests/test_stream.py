"""Regions that run row by row: the same bits in less memory, and rings of just as many rows as are needed."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import qdq
import torch
from random_networks import Network, draw_scheme
from torch import nn

import tte
from tte.artifact import Artifact
from tte.codegen import check
from tte.codegen.check import PlanError, check_plan
from tte.codegen.emit import HERE
from tte.codegen.plan import find_pairs
from tte.compiler import lower
from tte.ir import OPS, Node, evaluate, parse, verify
from tte.ir.rows import find_stream

pytestmark = pytest.mark.usefixtures("import_once")


class Block(nn.Module):
    """Expand, depthwise, project; with a residual addition where the shapes allow it."""

    def __init__(self, channels: int, kernel: int = 3, stride: int = 1, padding: int = 1, dilation: int = 1) -> None:
        super().__init__()
        wide = 3 * channels
        self.expand, self.project = nn.Conv2d(channels, wide, 1), nn.Conv2d(wide, channels, 1)
        self.depthwise = nn.Conv2d(wide, wide, kernel, stride, padding, dilation, groups=wide)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(torch.relu(self.depthwise(torch.relu(self.expand(x)))))
        return x + y if y.shape == x.shape else y


class Fork(nn.Module):
    """Two branches of different reach that meet again."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = (
            nn.Conv2d(4, 4, 1),
            nn.Sequential(nn.Conv2d(4, 4, 5, padding=2), nn.Conv2d(4, 4, 3, padding=1)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.near(x)) * self.far(x)


def network(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5))
    module = nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.ReLU(), *layers, *head)
    module(torch.zeros(1, 2, 24, 20))
    return module.eval()


NETWORKS = {
    "blocks": network(Block(4), Block(4, 5, padding=2), Block(4, stride=2)),
    "pools": network(Block(4), nn.MaxPool2d(3, 2, 1), Block(4), nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
    "no padding": network(Block(4, 3, 1, 0), Block(4, 3, 2, 0)),
    "rows that nobody reads": network(Block(4), nn.Conv2d(4, 4, 1, 5), nn.Conv2d(4, 4, 2, 2)),
    "more padding than kernel": network(Block(4, 3, 1, 2), nn.Conv2d(4, 4, 1, padding=1)),
    "dilation": network(Block(4, 3, 1, 3, 3), nn.Hardswish()),
    "fork": network(Fork(), Block(4)),
}
EXAMPLE = (torch.zeros(1, 2, 24, 20),)
LAST = {"train": "last-layer"}


def both(module: nn.Module, scheme: object, example: tuple[torch.Tensor, ...] = EXAMPLE) -> list[Artifact]:
    """Row by row, and layer by layer."""
    return [
        tte.compile(module, example, scheme, "host", "net", disable_passes=off) for off in ((), ("stream_forward",))
    ]


@cache
def built(name: str) -> list[Artifact]:
    return both(NETWORKS[name], LAST)


def regions(artifact: Artifact) -> list[Node]:
    return [node for node in artifact.graph.nodes if node.attrs.get("strategy") == "rows"]


def assert_same_bits(rows: Artifact, layers: Artifact) -> None:
    boards = [artifact.host() for artifact in (rows, layers)]
    rng = np.random.default_rng(0)
    for i in range(3):
        given = rows.build.input
        x = rng.uniform(*((0, 100) if given.dtype.kind in "iu" else (-2, 2)), given.shape).astype(given.dtype)
        y = (
            np.asarray([i % rows.build.classes], np.int32)
            if rows.build.classes
            else rng.random(rows.build.output.shape).astype(np.float32)
        )
        one, other = (board.train_step(x, y) for board in boards)
        assert one == other and one.status == 0
        np.testing.assert_array_equal(*(board.infer(x) for board in boards))
    assert boards[0].save_state() == boards[1].save_state()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_bits_in_less_memory(name: str) -> None:
    rows, layers = built(name)
    assert regions(rows) and not regions(layers)
    assert rows.plan.arena_bytes < layers.plan.arena_bytes and rows.plan.proved
    assert_same_bits(rows, layers)


@pytest.mark.parametrize("seed", range(3))
def test_random_networks(seed: int) -> None:
    module = Network(seed)
    example = (torch.zeros(module.shape),)
    scheme = draw_scheme(lower(module, example), seed, module.classes) | {"train": "last-layer"}
    rows, layers = both(module, scheme, example)
    assert rows.plan.arena_bytes <= layers.plan.arena_bytes
    assert_same_bits(rows, layers)


@pytest.mark.parametrize("train", ["last-k:3"])
def test_integers_and_an_emulated_board(train: str, tmp_path: Path) -> None:
    """Saturation masks of what learns are kept whole, bit by bit."""
    model = qdq.quantize(qdq.RECIPES["mcunet"], tmp_path)
    rows, layers = (
        tte.compile(model, update_scheme={"train": train}, target="stm32f746", name="net", disable_passes=off)
        for off in ((), ("stream_forward",))
    )
    assert regions(rows) and rows.plan.arena_bytes < layers.plan.arena_bytes
    data = {"x": qdq.inputs(qdq.RECIPES["mcunet"], 4)[:, 0], "y": np.arange(4)}
    expected = layers.run(data, runner="host")
    for place in ("host", "unicorn"):
        result = rows.run(data, runner=place)
        assert (result.loss, result.weights_sha256) == (expected.loss, expected.weights_sha256)


@pytest.mark.parametrize("name", NETWORKS)
def test_rings_are_as_small_as_they_can_be(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one row less in any ring some row is overwritten before it is read."""
    program = built(name)[0].compiled.train
    for node in program.graph.nodes:
        if node.attrs.get("strategy") != "rows":
            continue
        stream = find_stream(node)
        assert stream
        for ring, count in stream.rings.items():
            if count > 1:
                smaller = replace(stream, rings=stream.rings | {ring: count - 1})
                monkeypatch.setattr(check, "find_stream", lambda n, s=smaller, m=node: s if n is m else find_stream(n))
                with pytest.raises(PlanError, match=f"reads row .* of %{ring}, which is not there"):
                    check_plan(program.graph, program.plan)


@pytest.mark.parametrize("name", NETWORKS)
def test_results_are_not_written_over_rows_that_are_read(name: str) -> None:
    """A result that lies exactly as far below a dying operand as it must: four bytes higher is too high."""
    program = built(name)[0].compiled.train
    graph, plan = program.graph, program.plan
    pairs = find_pairs(graph, graph.owners(), plan.buffers)
    tight = [p for p in pairs if plan.buffers[p.born].offset + p.shift == plan.buffers[p.dying].offset]
    for pair in tight:
        born = plan.buffers[pair.born]
        higher = replace(plan, arena_bytes=plan.arena_bytes + 4, offsets=plan.offsets | {born.name: born.offset + 4})
        with pytest.raises(PlanError):
            check_plan(graph, higher)


def test_the_text_of_a_region() -> None:
    """It reads back, and means its inner program as it stands."""
    artifact = built("pools")[0]
    graph = artifact.compiled.programs[1].graph
    assert any(node.attrs.get("strategy") == "rows" for node in graph.nodes)
    consts = {c.name: c.data for c in (*graph.consts, *graph.params)}
    again = verify(parse(str(graph), consts))
    assert str(again) == str(graph)
    x = np.random.default_rng(0).standard_normal((1, 2, 24, 20)).astype(np.float32)
    np.testing.assert_allclose(evaluate(again, [x]).outputs[0], artifact.host().infer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", [op.name for op in OPS.values() if op.rows])
def test_operators_that_go_by_rows_have_kernels_that_do(op: str) -> None:
    name = op.removeprefix("q").removeprefix("nn.")
    templates = {"conv2d": ("", "depthwise_"), "conv2d_transpose": ("", "depthwise_")}.get(name, ("",))
    for prefix in templates:
        text = (HERE / "kernels" / f"{prefix}{'reduce' if name == 'sum' else name}.c.j2").read_text()
        assert "{{ each_row(" in text
        assert not OPS[op].columns or "{{ each_column(" in text


def test_layers_keep_their_names_and_their_work() -> None:
    rows, layers = built("blocks")
    assert rows.report["layers"] == layers.report["layers"]


def test_where_the_backward_is_the_peak_nothing_is_streamed() -> None:
    rows, layers = both(NETWORKS["blocks"], {"train": "full"})
    assert not regions(rows) and rows.plan.arena_bytes == layers.plan.arena_bytes
