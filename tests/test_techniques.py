"""Every way of saving memory, on every kind of network: the logits, losses and trained weights of the plain program."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from math import inf
from pathlib import Path
from typing import Any

import mcunet_table
import numpy as np
import pytest
import qdq
import test_tiles
import torch
from data import find_pack, import_published, load_scheme
from models import ResNet20
from torch import nn

import tte
from tte import compiler
from tte.artifact import Artifact
from tte.codegen.emit import Program
from tte.codegen.plan import find_pairs, plan_memory
from tte.codegen.schedule import schedule
from tte.ir import Graph, rewrite
from tte.passes import stream
from tte.passes.costs import ANY, Costs
from tte.passes.inplace import work_in_place
from tte.passes.recompute import recompute
from tte.passes.regions import enclose
from tte.runner import Build
from tte.runner.board import Board, unpack_state
from tte.runner.toolchain import find_toolchains
from tte.runner.train import open_board

pytestmark = pytest.mark.usefixtures("import_once")


@dataclass(frozen=True)
class Case:
    """A network and what learns. shape: of the example, None for a file

    sums: tiles cut sums of kernels larger than 1 x 1, whose order changes
    """

    model: Callable[[], Any]
    shape: tuple[int, ...] | None
    scheme: dict[str, Any] = field(default_factory=lambda: {"train": "full", "io": {"input": {"layout": "nhwc"}}})
    sums: bool = False

    @property
    def streams(self) -> bool:
        return self.scheme["io"].get("target") != "input"

    def compile(self, **options: Any) -> Artifact:
        example = None if self.shape is None else (torch.zeros(self.shape),)
        return tte.compile(self.model(), example, self.scheme, **({"target": "host", "name": "net"} | options))


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    @cache
    def get() -> nn.Module:
        torch.manual_seed(0)
        return make().eval()

    return get


def published(stem: str) -> Callable[[], Any]:
    """With a head that sends gradients back in the first step."""

    @cache
    def get() -> Any:
        if find_pack() is None:
            pytest.skip("no data pack")
        return mcunet_table.draw_head(import_published(stem, mcunet_table.CLASSES))

    return get


def tiled(name: str) -> Case:
    case = test_tiles.CASES[name]
    io = {"io": {"input": {"layout": "nhwc"}}}
    return Case(lambda: case.module, case.shape, case.scheme | io)


VECTOR = {"train": "full", "loss": "mse", "io": {"target": "input"}}
CASES = {
    "mcunet": Case(published("mcunet-5fps"), None, load_scheme("mcunet-5fps-49kb")),
    "mbv2": Case(published("mbv2-w0.35"), None, load_scheme("mbv2-w0.35-49kb")),
    "resnet8": Case(seeded(qdq.small_resnet8), (1, 3, 16, 16), sums=True),
    "resnet20": Case(seeded(ResNet20), (1, 3, 16, 16), sums=True),
    "ds-cnn": Case(seeded(qdq.DsCnn), (1, 1, 49, 10)),
    "autoencoder": Case(seeded(qdq.autoencoder), (1, 96), VECTOR),
    "u": tiled("u"),
    "branches": tiled("branches"),
}


def stream_everything(graph: Graph) -> Graph:
    """``stream_forward`` without its aim: chains as long as they can be."""
    costs = Costs(graph, ANY)
    chains = stream._Chains(costs)
    found = [(a, b) for b, starts in enumerate(chains.starts) for a in starts if chains.cost(a, b) < inf]
    assert all(costs.chain_bound(a, b) <= chains.cost(a, b) for a, b in found)
    nodes, at = [], 0
    while at < len(graph.nodes):
        end = max((b for a, b in found if a == at), default=at)
        region = end > at
        nodes.append(enclose(graph, range(at, end + 1), {"strategy": "rows"}) if region else graph.nodes[at])
        at = end + 1
    return rewrite(graph, nodes)


def compute_twice(graph: Graph) -> Graph:
    """Something of the forward, for nine tenths of what is alive at the peak."""
    if not graph.updates:
        return graph
    again = recompute(graph, plan_memory(work_in_place(graph)).lower_bound * 9 // 10)
    assert len(again.nodes) > len(graph.nodes)
    return again


# What stands for tile_backward, recompute_forward and stream_forward, which else have an aim; and where the picture is.
TECHNIQUES: dict[str, tuple[dict[str, Callable[[Graph], Graph]], str]] = {
    "forward by rows": ({"stream_forward": stream_everything}, "caller"),
    "picture by rows": ({"stream_forward": stream_everything}, "rows"),
    "tiles of channels": ({"tile_backward": test_tiles.tile_everything(lambda i, count: i % count, True)}, "caller"),
    "computed twice": ({"recompute_forward": compute_twice}, "caller"),
}


@contextmanager
def only(passes: Mapping[str, Callable[[Graph], Graph]]) -> Iterator[None]:
    """Of the passes that save memory only these; results in place and over what dies as always."""
    saving = {p.__name__ for p in compiler.SAVING} - set(passes)
    with pytest.MonkeyPatch.context() as patch:
        kept = (p for p in compiler.SHRINK if p.__name__ not in saving)
        patch.setattr(compiler, "SHRINK", tuple(passes.get(p.__name__, p) for p in kept))
        yield


@dataclass(frozen=True)
class Course:
    """What a board answers, and the weights behind every step."""

    losses: list[float]
    logits: list[np.ndarray]
    weights: list[dict[str, np.ndarray]]


def follow(artifact: Artifact, board: Board | None = None, steps: int = 2) -> Course:
    board, build, rng = board or artifact.host(), artifact.build, np.random.default_rng(0)
    course = Course([], [], [unpack_state(board.save_state(), build)])
    for i in range(steps):
        given = build.input
        x = rng.uniform(*((-100, 100) if given.dtype.kind == "i" else (-2, 2)), given.shape).astype(given.dtype)
        y = None if build.target is None else rng.random(build.target.shape).astype(np.float32)
        y = np.asarray([i % build.classes], np.int32) if build.classes else y
        course.logits.append(board.infer(x))
        course.losses.extend(call(x, y).loss for call in (board.evaluate, board.train_step))
        course.weights.append(unpack_state(board.save_state(), build))
    assert len(set(course.losses)) == steps
    return course


@cache
def plain(name: str, accumulates: bool = True) -> Course:
    """Node by node: nothing fused, in place, over what dies, in regions or in another order.

    accumulates: where gradients meet, one is added to while the other is computed, as always
    """
    left_out = set(compiler.OPTIONAL) - ({"accumulate"} if accumulates else set())
    artifact = CASES[name].compile(disable_passes=tuple(left_out))
    for program in artifact.compiled.programs:
        assert not any(node.body for node in program.graph.nodes)
        assert not find_pairs(program.graph, program.graph.owners(), program.plan.buffers)
    return follow(artifact)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Euclidean, relative to ``b``."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def assert_same(found: Course, expected: Course, sums: bool = False) -> None:
    """To the bit; sums: to 1e-6 of every tensor, and of its first gradient as far as rounded weights show it."""
    if not sums:
        assert found.losses == expected.losses
        np.testing.assert_array_equal(found.logits, expected.logits)
        for a, b in zip(found.weights, expected.weights, strict=True):
            assert {n: w.tobytes() for n, w in a.items()} == {n: w.tobytes() for n, w in b.items()}
        return
    assert found.losses[:2] == expected.losses[:2] and found.logits[0].tobytes() == expected.logits[0].tobytes()
    for a, b in ((found.losses, expected.losses), (found.logits, expected.logits)):
        assert distance(np.asarray(a), np.asarray(b)) <= 1e-6
    for name, begin in expected.weights[0].items():
        assert distance(found.weights[-1][name], expected.weights[-1][name]) <= 1e-6, name
        steps = [c.weights[1][name] - begin.astype(np.float64) for c in (found, expected)]
        rounding = np.linalg.norm(begin) * 2.0**-23  # a weight is rounded when its step is taken
        assert np.linalg.norm(steps[0] - steps[1]) <= 1e-6 * np.linalg.norm(steps[1]) + rounding, name


# Published schemes leave little to the backward, none of it worth computing twice; tests/test_recompute.py has a small
# network of that kind.
PAIRS = [
    (name, technique)
    for name in CASES
    for technique in [*TECHNIQUES, "all"]
    if not (name in ("mcunet", "mbv2") and technique == "computed twice")
]


@pytest.mark.parametrize(("name", "technique"), PAIRS)
def test_the_numbers_of_the_plain_program(name: str, technique: str) -> None:
    case = CASES[name]
    passes, place = TECHNIQUES.get(technique, ({}, "rows"))
    options = {"input": place if case.streams else "caller", "memory_plan": "smallest"}
    if technique == "all":
        artifact = case.compile(**options)
    else:
        with only(passes):
            artifact = case.compile(**options)
    assert_same(follow(artifact), plain(name), case.sums and technique in ("tiles of channels", "all"))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.shape])
def test_gradients_that_meet(name: str) -> None:
    """The only pass, but for such tiles, that changes the order of a sum."""
    assert_same(plain(name), plain(name, accumulates=False), sums=True)


# --- poison -----------------------------------------------------------------------------------------------------------

HOOK = """
static const struct { char role; int node; uint32_t first, end; } dead[] __attribute__((unused)) = { ROWS };
#define NET_ON_NODE(i, n) \\
    for (size_t d = 0; d < sizeof dead / sizeof *dead; d++) \\
        if (dead[d].role == __func__[sizeof "run"] && dead[d].node == (i)) \\
            for (uint32_t at = dead[d].first; at < dead[d].end; at++) \\
                arena[at] = 0x7f
#ifndef NET_ON_NODE"""  # of a float, an integer and eight bits something large


def find_dead(program: Program, lost: str = "") -> Iterator[tuple[int, int, int]]:
    """Of every call but the last: its number, from 1, and the bytes [first, end) that hold nothing to be read later.

    lost: a buffer that is taken for dead
    """
    nodes = [call.node for call in schedule(program.graph)]
    for number, (node, after) in enumerate(zip(nodes, nodes[1:], strict=False), 1):
        reported = program.graph.nodes[node].output == program.graph.outputs[0]  # the loss: logits are read once more
        kept = [b for b in program.plan.buffers if b.birth <= node and b.death >= (node if reported else after)]
        at = 0
        for buffer in sorted((b for b in kept if b.name != lost), key=lambda b: b.offset):
            if at < buffer.offset:
                yield number, at, buffer.offset
            at = max(at, buffer.end)
        if at < program.plan.arena_bytes:
            yield number, at, program.plan.arena_bytes


def poison(artifact: Artifact, folder: Path, lost: str = "") -> Build:
    """The project with a hook that overwrites what is dead behind every node."""
    rows = [(p.role[0], *row) for p in artifact.compiled.programs for row in find_dead(p, lost)]
    shutil.copytree(artifact.build.folder, folder, ignore=shutil.ignore_patterns(".cache"))
    header = folder / "Core" / "Inc" / "net.h"
    hook = HOOK.replace("ROWS", ", ".join(f"{{'{role}', {n}, {first}, {end}}}" for role, n, first, end in rows))
    text = header.read_text()
    assert text.count("#ifndef NET_ON_NODE") == 1
    header.write_text(text.replace("#ifndef NET_ON_NODE", hook))
    return Build.open(folder)


def follow_at(artifact: Artifact, build: Build, place: str, steps: int = 1) -> Course:
    board = open_board(build, place)
    try:
        assert board.init() == 0
        return follow(artifact, board, steps)
    finally:
        board.close()


@pytest.mark.skipif(not find_toolchains(), reason="no compiler for boards")
@pytest.mark.parametrize("name", ["mcunet", "u", "branches", "resnet8"])
def test_nothing_reads_what_is_dead(name: str, tmp_path: Path) -> None:
    """On an emulated board, with poison in all of the arena that the plan takes for free."""
    case = replace(CASES[name], scheme=CASES[name].scheme | ({} if name == "mcunet" else {"train": "last-k:3"}))
    artifact = case.compile(target="stm32f746", input="rows", memory_plan="smallest")
    strategies = {node.attrs.get("strategy") for node in artifact.graph.nodes}
    assert strategies & {"rows", "tiles"} and (name != "mcunet" or {"rows", "tiles"} <= strategies)
    assert_same(follow_at(artifact, poison(artifact, tmp_path / "p"), "unicorn"), follow(artifact, steps=1))


def test_poison_is_noticed(tmp_path: Path) -> None:
    """In whatever buffer of a training step that a later node reads."""
    artifact = CASES["branches"].compile(memory_plan="smallest")
    nodes = [call.node for call in schedule(artifact.graph)]
    read = [b for b in artifact.plan.buffers if any(b.birth <= n < b.death for n in nodes[:-1])]
    expected = follow(artifact, steps=1)
    assert_same(follow_at(artifact, poison(artifact, tmp_path / "none"), "host"), expected)
    for buffer in sorted(read, key=lambda b: b.size)[-3:]:
        with pytest.raises(AssertionError):
            assert_same(follow_at(artifact, poison(artifact, tmp_path / buffer.name, buffer.name), "host"), expected)
