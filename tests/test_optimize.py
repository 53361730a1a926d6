"""Code for speed or for size: the same bits, from less code."""

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import tte
from tte.artifact import Artifact
from tte.cli import app
from tte.codegen.emit import Program
from tte.codegen.plan import plan_memory
from tte.codegen.share import share
from tte.compiler import make_room
from tte.errors import TTEError
from tte.passes.costs import Arena
from tte.report import find_cramped
from tte.runner import Board
from tte.runner.profile import profile
from tte.runner.toolchain import find_toolchains
from tte.runner.train import open_board

pytestmark = pytest.mark.usefixtures("import_once")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """int8: pointwise and depthwise convolutions of several shapes."""
    torch.manual_seed(5)
    layers: list[nn.Module] = [nn.Conv2d(2, 8, 3, 2, 1), nn.ReLU()]
    for i, o, k, stride in ((8, 12, 3, 1), (12, 16, 5, 2), (16, 24, 7, 1), (24, 20, 3, 2)):
        layers += [nn.Conv2d(i, i, k, stride, k // 2, groups=i), nn.ReLU(), nn.Conv2d(i, o, 1), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 5)).eval()
    path = tmp_path_factory.mktemp("optimize") / "net.onnx"
    tte.quantize(network, {"x": np.random.default_rng(0).standard_normal((8, 2, 24, 20)).astype(np.float32)}, path)
    return path


@pytest.fixture(scope="module")
def built(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Artifact, Path]]:
    made = {}
    for optimize in ("speed", "size"):
        options = {"target": "stm32f746", "name": "net", "memory_plan": "fastest", "optimize": optimize}
        artifact = tte.compile(model, update_scheme="last-k:5", **options)
        folder = tmp_path_factory.mktemp(optimize)
        artifact.export(folder)
        made[optimize] = artifact, folder
    return made


def learn(board: Board) -> bytes:
    """What three steps teach."""
    rng = np.random.default_rng(1)
    assert board.init() == 0
    for label in range(3):
        x = rng.standard_normal((1, 2, 24, 20)).astype(np.float32)
        assert board.train_step(x, np.asarray([label], np.int32)).status == 0
    return board.save_state()


def test_small_code_learns_the_same_bits(built: dict[str, tuple[Artifact, Path]]) -> None:
    boards = [("host", "auto"), *(("unicorn", toolchain) for toolchain in find_toolchains())]
    states = {learn(open_board(artifact.build, *board)) for artifact, _ in built.values() for board in boards}
    assert len(states) == 1


@pytest.mark.parametrize("toolchain", find_toolchains())
def test_small_code_is_smaller(built: dict[str, tuple[Artifact, Path]], toolchain: str) -> None:
    speed, size = (profile(folder, toolchain) for _, folder in built.values())
    assert (speed.optimize, size.optimize) == ("-O2", "-Os")
    assert size.flash_bytes < 0.9 * speed.flash_bytes
    for program, cost in size.programs.items():
        assert cost.instructions < 2 * speed.programs[program].instructions


def test_only_one_form_of_a_function_may_be_given_numbers(model: Path) -> None:
    """As two programs have blocks of different sizes of a layer: the compiler does not refuse the other form."""
    scheme = {"train": "full", "quantized": {"gradients": "int8"}}
    artifact = tte.compile(model, update_scheme=scheme, target="stm32f746", memory_plan=5000, optimize="size")
    assert artifact.host().init() == 0


def test_no_constant_is_stored_twice(built: dict[str, tuple[Artifact, Path]]) -> None:
    """Of each integer layer that learns one vector of floats: steps and gradients read the same scales."""
    for _, folder in built.values():
        text = (folder / "Core" / "Src" / "net_weights.c").read_text()
        arrays = re.findall(r"const (\w+) net_w_\w+\[(\d+)\] = \{(.*?)\};", text, re.S)
        assert len(set(arrays)) == len(arrays)
        assert sum(ctype == "float" and int(size) > 1 for ctype, size, _ in arrays) == 4


def test_what_says_for_what(built: dict[str, tuple[Artifact, Path]]) -> None:
    for optimize, flag in (("speed", "-O2"), ("size", "-Os")):
        artifact, folder = built[optimize]
        assert artifact.report["optimize"] == optimize
        assert f"PRIVATE {flag} " in (folder / "CMakeLists.txt").read_text()


def test_the_command_line(model: Path, tmp_path: Path) -> None:
    words = ["compile", model, "--update-scheme", "last-layer", "--optimize", "size", "-o", tmp_path / "build"]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    assert '"optimize": "size"' in (tmp_path / "build" / "build.json").read_text()
    with pytest.raises(TTEError, match="nothing optimizes for 'beauty'"):
        tte.compile(model, optimize="beauty")
    with pytest.raises(TTEError, match="not chosen by schedules"):
        tte.compile(model, optimize="size", schedules=tmp_path / "s.json")


def function(name: str, body: str, parts: Sequence[str] = (), assembly: Sequence[str] = ()) -> dict[str, object]:
    called = {"args": [], "rows": None, "columns": None, "tile": None, "stack": 0, "guard": ""}
    return called | {"name": name, "assembly": assembly, "parts": parts, "body": body, "portable": ""}


@pytest.mark.parametrize(
    ("first", "second", "shared", "shapes"),
    [
        ("y[3] = x + 40;", "y[5] = x + 40;", "y[shape[0]] = x + 40;", [[3], [5]]),
        ("f(3, 7, 3);", "f(5, 9, 5);", "f(shape[0], shape[1], shape[0]);", [[3, 7], [5, 9]]),
        ("f(8u);", "f(4294967295u);", "f((uint32_t)shape[0]);", [[8], [-1]]),
        ("f(70000);", "f(6);", "f((int32_t)((uint32_t)shape[0] << 16 | (uint16_t)shape[1]));", [[1, 4464], [0, 6]]),
        ("f(3000065535u);", "f(0u);", "f(((uint32_t)shape[0] << 16 | (uint16_t)shape[1]));", [[-19759, 24063], [0, 0]]),
        ("f(-4);", "f(6);", "f(+shape[0]);", [[-4], [6]]),
        ("a[i] -3;", "a[i] -5;", "a[i] +shape[0];", [[-3], [-5]]),
        ("(x)-3;", "(x)-5;", "(x)-shape[0];", [[3], [5]]),
        ("(int32_t)3;", "(int32_t)-5;", "(int32_t)shape[0];", [[3], [-5]]),
        ("f(4);", "f(4);", "f(4);", [[], []]),
        ("    int8_t a[3];", "    int8_t a[4];", None, None),
        ("#pragma GCC unroll 2", "#pragma GCC unroll 4", None, None),
        ("y = 1.5f;", "y = 2.5f;", None, None),
        ("f(a0, 1);", "f(a1, 1);", None, None),
    ],
)
def test_what_is_shared(first: str, second: str, shared: str | None, shapes: list[list[int]] | None) -> None:
    made = share([function("a", first), function("b", second)])
    assert [f["name"] for f in made] == (["a_any", "a", "b"] if shared else ["a", "b"])
    if shared:
        assert made[0]["body"] == shared and [f["shape"] for f in made[1:]] == shapes


def test_what_lacks_scratch_is_known_and_what_it_takes(model: Path) -> None:
    def find_size(programs: Sequence[Program]) -> int:
        return max(program.plan.arena_bytes for program in programs)

    compiled = tte.compile(model, update_scheme="last-k:5", memory_plan="smallest").compiled
    cramped = find_cramped(compiled.programs)
    assert cramped and cramped["infer"] and cramped["arena_bytes"] > find_size(compiled.programs)
    bare = [Program(p.role, p.graph, plan_memory(p.graph)) for p in compiled.programs]
    assert find_cramped(bare) is None  # nothing would be faster
    roomy, less = (make_room(bare, Arena(cramped["arena_bytes"] - n), {}, compiled.target) for n in (0, 4))
    assert find_size(roomy) == cramped["arena_bytes"] and find_cramped(roomy) is None
    assert find_cramped(less)


def test_a_budget_pays_for_all_that_is_linked(model: Path) -> None:
    """Stack, library and the caller's buffers are more than what is reserved before their size is known."""
    options = {"target": "cortex-m7", "update_scheme": "last-k:5"}
    needed = tte.compile(model, **options, memory_plan="smallest").report["memory"]["static_ram_bytes"]
    within = tte.compile(model, **options | {"update_scheme": {"train": "last-k:5", "budget": {"sram": needed}}})
    assert within.report["memory"]["static_ram_bytes"] <= needed


def test_plans_between_the_smallest_and_the_fastest(model: Path) -> None:
    done = CliRunner().invoke(app, ["analyze", str(model), "-u", "last-k:5", "-t", "cortex-m7", "--json"])
    assert done.exit_code == 0, done.output
    table = json.loads(done.output)
    rows = table["plans"]
    assert len(rows) > 3 and rows[0]["extra_macs"] > 0
    for before, after in pairwise(rows):
        assert before["arena_bytes"] < after["arena_bytes"] and before["cost"] > after["cost"]
    assert (rows[-1]["cramped"], rows[-1]["regions"], rows[-1]["extra_macs"]) == (0, 0, 0)
    plain = next(row for row in rows if not row["extra_macs"])
    assert all(row["arena_bytes"] >= plain["arena_bytes"] for row in table["left_out"].values())
    refused = CliRunner().invoke(app, ["analyze", str(model), "-t", "cortex-m7"])
    assert isinstance(refused.exception, TTEError) and refused.exception.where == "--target"


def test_assembly_is_given_to_what_differs_in_it_alone() -> None:
    made = share([
        function("p", "", (), ["int *a"]), function("q", "", (), ["int *a"]), function("r", "", (), ["int a"]),
        function("a", "p(x, 3); q(x);", ["p", "q"]), function("b", "q(x, 5); q(x);", ["q", "q"]),
        function("c", "q(x, 5); p(x);", ["q", "p"]), function("d", "r(x, 7); q(x);", ["r", "q"]),
        function("e", "p(x, 3); q(x); y();", ["p", "q"]), function("f", "p(x, 5); q(x); y();", ["p", "q"]),
    ])  # fmt: skip
    assert [f["name"] for f in made] == ["p", "q", "r", "a_any", "a", "b", "c", "d", "e_any", "e", "f"]
    whole, same = made[3], made[8]
    assert whole["body"] == "part0(x, shape[0]); part1(x);" and whole["given"] == {
        "part0": ["int *a"],
        "part1": ["int *a"],
    }
    assert [f["given"] for f in (made[4], made[6])] == [["p", "q"], ["q", "p"]]
    assert same["body"] == "p(x, shape[0]); q(x); y();" and same["given"] == {}
