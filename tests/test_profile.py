"""Instructions by layer: every one of them is counted once, and for the layer that executed it."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import call, succeed
from torch import nn

import tte
from tte.artifact import Artifact
from tte.errors import TTEError
from tte.runner import Build, open_unicorn
from tte.runner.build import Call
from tte.runner.cycles import find_estimator
from tte.runner.profile import Cost, _split_region, profile
from tte.runner.qemu import find_qemu
from tte.runner.toolchain import build_firmware, find_toolchains
from tte.runner.train import draw_samples
from tte.runner.unicorn_board import Frame
from tte.target import STM32F746

if not find_toolchains() or not importlib.util.find_spec("unicorn"):
    pytest.skip("no compiler or emulator: pip install 'tte[emulate]'", allow_module_level=True)

WAYS = [(toolchain, optimize) for toolchain in find_toolchains() for optimize in ("-O0", "-O2", "-Os")]


class Twins(nn.Module):
    """Two convolutions that are equal but for their weights, and a dense head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, 2, 1)
        self.left, self.right = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.right(torch.relu(self.left(torch.relu(self.stem(x))))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module", params=["fastest", "smallest"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    options = {"update_scheme": "last-k:2", "target": "stm32f746", "memory_plan": request.param}
    artifact = tte.compile(Twins().eval(), (torch.zeros(1, 2, 16, 12),), name="net", **options)
    artifact.export(folder)
    return artifact, folder


def flatten(cost: Cost) -> list[Cost]:
    return [cost, *(inner for part in cost.parts for inner in flatten(part))]


def test_what_the_report_says_layer_by_layer(built: tuple[Artifact, Path]) -> None:
    artifact, folder = built
    found = profile(folder)
    report = artifact.report
    assert (found.toolchain, found.flash_bytes) == (report["toolchain"], report["flash_bytes"])
    for name, role in (("infer", "infer"), ("train_step", "train")):
        program = found.programs[name]
        graph = next(p.graph for p in artifact.compiled.programs if p.role == role)
        assert program.instructions == report[name]["instructions"]
        assert program.macs == sum(node.macs for node in graph.nodes) == sum(call.macs for call in program.parts)
        assert 0 < program.own < 2500  # all else is in the calls
        assert all(cost.own > 0 for cost in flatten(program))
    layers = dict.fromkeys(cost.layer for cost in found.programs["infer"].parts)
    assert list(layers) == ["stem", "left", "right", "-", "head"]


@pytest.mark.parametrize(("toolchain", "optimize"), WAYS)
def test_every_instruction_has_its_call(built: tuple[Artifact, Path], toolchain: str, optimize: str) -> None:
    """Against a slow hook that knows only where the kernels and the program begin and end."""
    import unicorn

    artifact, folder = built
    build = Build.open(folder)
    costs = profile(folder, toolchain, optimize).programs["train_step"]
    board = open_unicorn(build, build_firmware(build, STM32F746, toolchain, optimize=optimize))
    functions = [(start, end, names) for start, end, names in board._symbols]
    where = {a: (a == start, names) for start, end, names in functions for a in range(start, end, 2)}
    kernels = {c.kernel for c in build.calls["train"]}
    counts: list[int] = []
    inside = False

    def enter(engine: Any, address: int, size: int, user: Any) -> None:
        nonlocal inside
        begins, names = where[address]
        if names[0] in ("net_train_step", "run_train"):
            inside = False
        elif begins and not inside and not kernels.isdisjoint(names):
            counts.append(0)
            inside = True
        if inside:
            code, at = bytes(engine.mem_read(address, size)), 0
            while at < size:
                at += 4 if code[at + 1] >= 0xE8 else 2
                counts[-1] += 1

    samples = draw_samples(build, 1)
    board._engine.hook_add(unicorn.UC_HOOK_BLOCK, enter)
    board.init()
    counted = board.train_step(samples.x[0], samples.y[0]).instructions
    assert [cost.instructions for cost in costs.parts] == counts
    assert board.profile().instructions == counted == costs.instructions
    board.close()


def test_boards_count_for_themselves(built: tuple[Artifact, Path]) -> None:
    build = Build.open(built[1])
    firmware = build_firmware(build, STM32F746)
    busy, idle = open_unicorn(build, firmware), open_unicorn(build, firmware)
    samples = draw_samples(build, 1)
    counts = []
    for board in (busy, idle):
        board.init()
        counts.append(board.infer_counted(samples.x[0])[1])
    idle.close()
    assert counts == [busy.profile().instructions] * 2
    with pytest.raises(tte.TTEError, match="E055"):
        idle.profile()
    assert busy.infer_counted(samples.x[0])[1] == counts[0]
    busy.close()


@pytest.mark.parametrize(("toolchain", "optimize"), WAYS)
def test_equal_layers_cost_the_same(built: tuple[Artifact, Path], toolchain: str, optimize: str) -> None:
    """Whether they are calls or, with nothing inlined, members of a region."""
    program = profile(built[1], toolchain, optimize).programs["infer"]
    costs = {cost.layer: cost for cost in flatten(program)}
    left, right = costs["left"], costs["right"]
    assert left.macs == right.macs == 8 * 6 * 4 * 4 * 9
    assert abs(left.instructions - right.instructions) < 0.02 * left.instructions
    assert left.instructions > left.macs


def test_members_that_cannot_be_told_apart_stay_in_their_region() -> None:
    def frame(name: str, own: int, *calls: Frame) -> Frame:
        return Frame((name, f"{name}_alias"), (own, 0), calls)

    parts = tuple(Call(layer, "conv2d", 10, kernel) for layer, kernel in (("a", "k1"), ("b", "k2"), ("c", "k1")))
    region = Call("a to c", "row by row", 30, "k3", parts)
    places = frame("k1", 5, frame("helper", 2)), frame("k2", 3), frame("k1_alias", 11), frame("k2", 4)

    def split(*calls: Frame) -> dict[str, int]:
        return {cost.layer: cost.instructions for cost in _split_region(region, frame("k3", 100, *calls))}

    assert split(places[0], places[1], frame("k1", 11), places[3]) == {"a": 7, "b": 7, "c": 11}
    assert split(places[0], places[1], frame("k1", 11), frame("k1", 1)) == {"b": 3}
    assert split(places[1]) == {"b": 3}


def test_on_the_command_line(built: tuple[Artifact, Path], tmp_path: Path) -> None:
    _, folder = built
    printed = json.loads(succeed("bench", folder, "--json"))
    assert printed["target"] == "stm32f746" and printed["optimize"] == "-O2"
    step = printed["programs"]["train_step"]
    assert sum(part["share"] for part in step["parts"]) + step["own_instructions"] / step[
        "instructions"
    ] == pytest.approx(1)
    assert step["instructions_per_mac"] == step["instructions"] / step["macs"]
    table = succeed("bench", folder)
    assert f"{step['instructions']:,}" in table and "100.00" in table and "checks, copies, harness" in table
    assert all(part["layer"] in table for part in step["parts"])


MISTAKES = {
    "E050": ("nothing",),
    "E058": ("host",),
    "E058 ": ("corstone-300", "--metric=cycles"),
    "E059": ("board", "--toolchain", "msvc"),
    "E059 ": ("board", "--optimize=-Ofast"),
    "E059  ": ("board", "--metric=time"),
}


@pytest.mark.parametrize(("code", "arguments"), MISTAKES.items(), ids=MISTAKES)
def test_mistakes(code: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    for target, folder in (("host", "host"), ("stm32f746", "board"), ("corstone-300", "corstone-300")):
        artifact = tte.compile(nn.Linear(3, 2).eval(), (torch.zeros(1, 3),), target=target)
        artifact.export(tmp_path / folder)
    result = call("bench", *arguments, cwd=tmp_path)
    what, _, fix = result.stderr.splitlines()
    assert result.returncode == 1 and f"TTE-{code.strip()}" in what and not result.stdout
    assert "Ofast" not in what or "-Ofast" in what
    assert arguments != ("host",) or "compile it for a board; " in fix


@pytest.mark.skipif(not find_qemu(), reason="no qemu-system-arm")
def test_what_unicorn_does_not_know_is_counted_as_a_whole(tmp_path: Path) -> None:
    artifact = tte.compile(nn.Linear(3, 2).eval(), (torch.zeros(1, 3),), target="cortex-m55")
    artifact.export(tmp_path / "build")
    counted = profile(tmp_path / "build").programs
    assert all(cost.instructions > 0 and not cost.parts for cost in counted.values())
    assert counted["train_step"].instructions == artifact.report["train_step"]["instructions"]
    printed = succeed("bench", tmp_path / "build")
    assert f"{counted['infer'].instructions:,}" in printed and "counted by QEMU" in printed and "checks" not in printed


def test_cycles_beside_instructions(built: tuple[Artifact, Path]) -> None:
    try:
        find_estimator(STM32F746)
    except TTEError as problem:
        pytest.skip(str(problem))
    _, folder = built
    plain, found = profile(folder), profile(folder, metric="cycles")
    for name, program in found.programs.items():
        assert [cost.instructions for cost in flatten(program)] == [
            cost.instructions for cost in flatten(plain.programs[name])
        ]
        costs = flatten(program)
        assert all(cost.cycles and 0.5 < cost.cycles / cost.instructions < 5 for cost in costs)
        assert sum(part.cycles or 0 for part in program.parts) < (program.cycles or 0)
    printed = succeed("bench", folder, "--metric", "cycles")
    step = found.programs["train_step"]
    assert f"{step.cycles:,}" in printed and "cycles, about" in printed
