"""Regions of the backward that compute parts of the forward again: the same bits in less memory."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qdq
import torch
from test_runner import run_sanitized
from test_tiles import CASES, assert_same_training, integers  # noqa: F401

import tte
from tte.artifact import Artifact
from tte.codegen.check import PlanError, check_plan
from tte.codegen.plan import plan_memory
from tte.errors import TTEError
from tte.ir import Graph, Window, parse, verify
from tte.ir.rows import find_stream, stream_rows

FULL = {"train": "full"}


def macs(artifact: Artifact) -> int:
    return sum(node.macs for node in artifact.graph.nodes)


def again(artifact: Artifact) -> set[Any]:
    """How regions run that compute something again."""
    return {node.attrs["strategy"] for node in artifact.graph.nodes if "again" in node.attrs}


def compile_within(share: float, *model: Any, target: str = "host") -> tuple[Artifact, Artifact]:
    """Without a limit, and with one: a share of the smallest arena in which nothing is computed twice."""
    plain = tte.compile(*model, target=target, name="net")
    limit = int(plain.plan.arena_bytes * share)
    small = tte.compile(*model, target=target, name="net", memory_plan=limit)
    assert small.plan.arena_bytes <= limit and macs(small) >= macs(plain)
    return plain, small


FLOATS = {
    "hard swish": (0.5, {"tiles"}),
    "grouped": (0.6, {"rows"}),
    "resnet8": (0.8, {"rows"}),
    "silu": (0.5, {"tiles"}),
}


@pytest.mark.parametrize("name", FLOATS)
def test_floats_learn_the_same(name: str) -> None:
    case, (share, ways) = CASES[name], FLOATS[name]
    plain, small = compile_within(share, case.module, (torch.zeros(case.shape),), case.scheme)
    assert again(small) >= ways
    assert_same_training(small, plain, case.exact)


@pytest.mark.parametrize("share", [0.7, 0.5])
@pytest.mark.parametrize("storage", ["int8_sr", "int16_ef"])
def test_integers_learn_the_same(share: float, storage: str, integers: Callable[[str], Path]) -> None:  # noqa: F811
    scheme = FULL | {"quantized": {"weight_storage": storage}}
    plain, small = compile_within(share, integers("mcunet"), None, scheme)
    assert again(small)
    assert_same_training(small, plain)


def test_an_emulated_board(integers: Callable[[str], Path]) -> None:  # noqa: F811
    plain, small = compile_within(0.4, integers("mcunet"), None, FULL, target="stm32f746")
    assert again(small) & {"rows", "tiles"}
    data = {"x": qdq.inputs(qdq.RECIPES["mcunet"], 3)[:, 0], "y": np.arange(3)}
    expected = plain.run(data, runner="host")
    for place in ("host", "unicorn"):
        result = small.run(data, runner=place)
        assert (result.loss, result.weights_sha256) == (expected.loss, expected.weights_sha256)


def test_sanitizers(integers: Callable[[str], Path]) -> None:  # noqa: F811
    _, small = compile_within(0.4, integers("mcunet"), None, FULL)
    result = run_sanitized(small.build)
    assert result.returncode == 0, result.stderr


def test_what_cannot_be_done_says_what_can() -> None:
    case = CASES["grouped"]
    model = (case.module, (torch.zeros(case.shape),), FULL, "host", "net")
    with pytest.raises(TTEError, match="the smallest arena found for this has ([0-9,]+) bytes") as refused:
        tte.compile(*model, memory_plan=1000)
    least = int(str(refused.value).partition("this has ")[2].partition(" bytes")[0].replace(",", ""))
    assert tte.compile(*model, memory_plan=least).plan.arena_bytes <= least


# --- rows of the backward ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "stride", "padding", "height"), [(3, 1, 1, 6), (3, 2, 1, 5), (7, 3, 2, 4), (1, 2, 0, 4)]
)
def test_windows_of_transposed_convolutions(size: int, stride: int, padding: int, height: int) -> None:
    """Row h reads what has written to it: row r writes rows r * stride - padding to r * stride - padding + size - 1."""
    window = Window(size, 1, size - 1 - padding, stride)
    for h in range((height - 1) * stride - 2 * padding + size):
        readers = [r for r in range(height) if 0 <= h + padding - r * stride < size]
        assert [r for r in range(height) if window.start(h) <= r < window.stop(h)] == readers


# The gradient %g of a strided convolution passes a depthwise and a 1 x 1 convolution; two weights learn from %x.
TEXT = """
def @train(%g: Tensor[(1, 8, 8, 4), float32], %x: Tensor[(1, 16, 16, 8), float32]) {
  const @d: Tensor[(4, 3, 3, 1), float32];
  const @e: Tensor[(4, 1, 1, 8), float32];
  %0 = nn.relu(%g) /* ty=Tensor[(1, 8, 8, 4), float32] */;
  %1, %2, %3 = region(a0=%0, a1=@d, a2=@e, a3=%x, strategy='rows', columns=COLUMNS) {
    %0 = nn.conv2d_transpose(%a0, %a1, strides=(2, 2), padding=(1, 1, 1, 1), groups=4, output_padding=(1, 1)) TILE;
    %1 = nn.conv2d_transpose(%0, %a2) /* ty=Tensor[(1, 16, 16, 8), float32] */;
    %2 = nn.conv2d_weight_grad(%a3, %0, kernel_size=(1, 1)) /* ty=Tensor[(4, 1, 1, 8), float32] */;
    %3 = sum(%0, axis=(0, 1, 2)) /* ty=Tensor[(4,), float32] */;
    return %1, %2, %3;
  } /* ty=Tensor[(1, 16, 16, 8), float32], Tensor[(4, 1, 1, 8), float32], Tensor[(4,), float32] */;
  return %1, %2, %3;
}
"""


def region(columns: int = 4) -> Graph:
    text = TEXT.replace("COLUMNS", str(columns)).replace("TILE", "/* ty=Tensor[(1, 16, 16, 4), float32] */")
    return verify(parse(text))


def test_sums_follow_what_they_add() -> None:
    node = region().nodes[1]
    stream = find_stream(node)
    assert node.body and stream
    assert stream.steps == ((0, 1, 2, 3),) and stream.parts == {"0": 4 * 4 * 4}
    whole = stream_rows(node.body.nodes, frozenset(v.name for v in node.body.outputs))
    assert whole.rings == {"0": 1} and whole.nbytes == 16 * 4 * 4
    assert whole.follow(0) == [2, 3] and (whole.last, whole.rest) == (1, ())


# A mask that is made again is read where %0 exists by columns; a padded gradient reads only the inner rows of %0.
MASKED = """
def @train(%g: Tensor[(1, 8, 8, 4), float32], %x: Tensor[(1, SIZE, SIZE, 8), float32]) {
  const @d: Tensor[(4, 1, 1, 16), float32];
  const @e: Tensor[(16, 1, 1, 8), float32];
  %0, %1 = region(a0=%g, a1=@d, a2=@e, a3=%x, strategy='rows', columns=8) {
    %0 = nn.conv2d_transpose(%a0, %a1) /* ty=Tensor[(1, 8, 8, 16), float32] */;
    %1 = nn.mask(%a3, lower=0.0, upper=6.0) /* ty=Tensor[(1, SIZE, SIZE, 8), bit] */;
    %2 = region(a0=%0, a1=%a2, a2=%1, strategy='fused') {
      %0 = nn.conv2d_transpose(%a0, %a1, padding=(PAD, PAD, PAD, PAD)) /* ty=Tensor[(1, SIZE, SIZE, 8), float32] */;
      %1 = nn.apply_mask(%0, %a2) /* ty=Tensor[(1, SIZE, SIZE, 8), float32] */;
      return %1;
    } /* ty=Tensor[(1, SIZE, SIZE, 8), float32] */;
    %3 = sum(%0, axis=(0, 1, 2)) /* ty=Tensor[(16,), float32] */;
    return %2, %3;
  } /* ty=Tensor[(1, SIZE, SIZE, 8), float32], Tensor[(16,), float32] */;
  return %0, %1;
}
"""


@pytest.mark.parametrize(("padding", "steps"), [(0, ((0, 2, 3), (1,))), (1, ((0,), (1,), (2,), (3,)))])
def test_what_comes_last_reads_the_others_and_sums_read_all(padding: int, steps: tuple[tuple[int, ...], ...]) -> None:
    graph = verify(parse(MASKED.replace("SIZE", str(8 - 2 * padding)).replace("PAD", str(padding))))
    stream = find_stream(graph.nodes[0])
    assert stream and stream.steps == steps and 2 in steps[stream.last] and stream.rings["1"] == 1
    check_plan(graph, plan_memory(graph))


def test_a_sum_that_is_written_over_is_found() -> None:
    graph = region()
    plan = plan_memory(graph)
    check_plan(graph, plan)
    node = graph.nodes[1]
    for value, over in (("2", "1"), ("3", "2")):
        made = dict(zip("123", [v.name for v in node.outputs], strict=True))
        broken = replace(plan, offsets=plan.offsets | {made[value]: plan.offsets[made[over]]})
        with pytest.raises(PlanError):
            check_plan(graph, broken)


def test_columns_that_are_too_few_are_found() -> None:
    graph = region()
    plan = plan_memory(graph)
    broken = replace(plan, offsets=plan.offsets | {graph.nodes[1].outputs[2].name: plan.scratch[1]})
    with pytest.raises(PlanError):
        check_plan(graph, broken)


def test_a_region_does_not_run_before_all_its_members_can() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            nn = torch.nn
            self.stem = nn.Conv2d(1, 4, 3, stride=2, padding=1)
            self.expand = nn.Sequential(nn.Conv2d(4, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
            self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
            self.project = nn.Sequential(
                nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 4, 1, bias=False), nn.BatchNorm2d(4)
            )
            self.head = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).relu()
            return self.head((x + self.project(self.depthwise(self.expand(x)))).mean((2, 3)))

    scheme = {
        "train": [
            {"layer": "head", "weight": "all", "bias": True},
            {"layer": "depthwise", "weight": {"in_channels": 3}},
        ]
    }
    with pytest.raises(TTEError, match="E049"):
        tte.compile(Net().eval(), (torch.zeros(1, 1, 8, 8),), target="host", update_scheme=scheme, memory_plan=16)
