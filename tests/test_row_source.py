"""Pictures that come row by row: the same bits as for one in memory, each row asked for once, and nothing half done."""

import ctypes
import importlib.util
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import mcunet_table
import numpy as np
import pytest
import qdq
import torch
from data import CAMERA, import_published
from random_networks import Network, draw_scheme
from test_stream import Block, assert_same_bits, network
from torch import nn

import tte
from tte.artifact import Artifact
from tte.codegen import check
from tte.codegen.check import PlanError, check_plan
from tte.compiler import lower
from tte.errors import TTEError
from tte.ir import Node
from tte.ir.rows import Stream, align, find_stream
from tte.runner.board import STATUS
from tte.runner.qemu import find_qemu
from tte.runner.toolchain import find_toolchains, host_compiler

pytestmark = pytest.mark.usefixtures("import_once")

OK, LABEL, SOURCE, BUSY = (STATUS.index(name) for name in ("OK", "LABEL", "SOURCE", "BUSY"))
SHAPE = (1, 2, 24, 20)
NHWC = {"layout": "nhwc"}
BYTES = NHWC | {"dtype": "uint8", "mean": [120.0, 90.0], "std": [60.0, 70.0]}


@cache
def unread() -> nn.Module:
    """Of an odd number of rows the last is in no window; rows of 15 bytes do not all begin at one of 4."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 2, 2), nn.ReLU(), nn.Conv2d(4, 8, 3, 4, 1), nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()


@cache
def keyword() -> nn.Module:
    torch.manual_seed(0)
    return qdq.DsCnn().eval()


@cache
def blocks() -> nn.Module:
    torch.manual_seed(0)
    return network(Block(4), Block(4, 5, padding=2), Block(4, stride=2))


@dataclass(frozen=True)
class Case:
    """A network, its input and what learns; streamed: its picture is nowhere as a whole."""

    module: Callable[[], nn.Module]
    shape: tuple[int, ...]
    input: dict[str, Any]
    train: str = "last-layer"
    streamed: bool = True

    def compile(self, place: str, target: str = "host") -> Artifact:
        scheme = {"train": self.train, "io": {"input": self.input}}
        return tte.compile(self.module(), (torch.zeros(self.shape),), scheme, target, "net", input=place)


CASES = {
    "float": Case(keyword, (1, 1, 49, 10), NHWC, streamed=False),
    "float with mean": Case(blocks, (1, 2, 96, 20), NHWC | {"mean": [0.1, 0.2], "std": [0.5]}),
    "uint8": Case(blocks, (1, 2, 96, 20), BYTES),
    "last row unread": Case(unread, (1, 3, 125, 5), NHWC | {"dtype": "uint8", "std": [100.0]}),
    "the stem learns": Case(blocks, SHAPE, BYTES, "full", streamed=False),
}


@cache
def build(name: str, place: str = "rows") -> Artifact:
    return CASES[name].compile(place)


def sources(artifact: Artifact) -> list[Node]:
    """The regions that take the rows as they go."""
    regions = [n for p in artifact.compiled.programs for n in p.graph.nodes if n.attrs.get("strategy") == "rows"]
    return [node for node in regions if node.body and any(m.op == "source" for m in node.body.nodes)]


def largest(artifact: Artifact) -> int:
    """Bytes of the arena that all three programs fit."""
    return max(program.plan.arena_bytes for program in artifact.compiled.programs)


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_as_from_memory(name: str) -> None:
    rows, caller = build(name), build(name, "caller")
    assert len(sources(rows)) == (3 if CASES[name].streamed else 0)
    assert_same_bits(rows, caller)
    assert rows.host(selftest=True).selftest() == OK and rows.verify(steps=2)["ok"]
    arenas = {place: largest(build(name, place)) for place in ("caller", "arena", "rows")}
    size = int(np.prod(CASES[name].shape)) * rows.build.input.dtype.itemsize
    print(name, arenas, "picture", size)
    assert arenas["arena"] <= arenas["caller"] + align(size)
    assert (rows.report["memory"]["input_bytes"], caller.report["memory"]["input_bytes"]) == (0, size)
    if CASES[name].streamed:
        assert arenas["rows"] < arenas["arena"] and arenas["rows"] < arenas["caller"] + size


@pytest.mark.parametrize("seed", range(3))
def test_random_networks(seed: int) -> None:
    module = Network(seed)
    example = (torch.zeros(module.shape),)
    scheme = draw_scheme(lower(module, example), seed, module.classes) | {"train": "last-layer", "io": {"input": NHWC}}
    assert_same_bits(*(tte.compile(module, example, scheme, "host", "net", input=p) for p in ("rows", "caller")))


@pytest.mark.parametrize("form", [NHWC, NHWC | {"dtype": "uint8", "mean": [128.0], "std": [64.0]}])
def test_integers(form: dict[str, Any], tmp_path: Path) -> None:
    recipe = replace(qdq.RECIPES["mcunet"], shape=(1, 3, 64, 64))
    model = qdq.quantize(recipe, tmp_path)
    scheme = {"train": "last-layer", "io": {"input": form}}
    rows, caller = (tte.compile(model, None, scheme, "host", "net", input=place) for place in ("rows", "caller"))
    assert len(sources(rows)) == 3
    x = np.clip(qdq.inputs(recipe, 4)[:, 0].transpose(0, 2, 3, 1) * 50 + 128, 0, 255)
    data = {"x": x.astype(rows.build.input.dtype), "y": np.arange(4)}
    one, other = (artifact.run(data, runner="host") for artifact in (rows, caller))
    assert (one.loss, one.weights_sha256) == (other.loss, other.weights_sha256)


def test_published_model(pack: Path) -> None:
    """MCUNet, of which only the last layer learns: less memory than its picture has, or hardly more."""
    model = import_published("mcunet-5fps", mcunet_table.CLASSES)
    scheme = CAMERA | {"train": "last-layer"}
    options = {"target": "stm32f746", "name": "net", "memory_plan": "smallest"}
    built = {p: tte.compile(model, None, scheme, input=p, **options) for p in ("caller", "arena", "rows")}
    arenas = {place: largest(artifact) for place, artifact in built.items()}
    print(arenas, built["rows"].report["memory"]["static_ram_bytes"])
    assert arenas["rows"] <= arenas["caller"] + 3 * 384 < 128 * 128 * 3  # the rows of the stem's window
    assert arenas["arena"] == 128 * 128 * 3 + 4 * 64 * 16  # and those of two rings
    pictures = mcunet_table.pick_pictures(2)
    runs = (("caller", "host"), ("rows", "unicorn"), ("arena", "unicorn"))
    results = [built[place].run(pictures, runner=r) for place, r in runs]
    assert len({(tuple(r.loss), r.weights_sha256) for r in results}) == 1


@dataclass
class Camera:
    """A row function in Python that remembers what it was asked for; fails at row ``fail``, calls ``inside`` first."""

    artifact: Artifact
    x: np.ndarray
    fail: int = -1
    inside: Callable[[], None] = lambda: None
    asked: list[int] = field(default_factory=list)
    aligned: int = 0  # the bits that are set in some address

    def __post_init__(self) -> None:
        rows = self.x.reshape(self.artifact.build.input.shape[1], -1)

        @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)
        def next_row(context: int, row: int, to: int) -> int:
            assert context == 42
            self.inside()
            self.asked.append(row)
            self.aligned |= to
            ctypes.memmove(to, rows[row].tobytes(), rows[row].nbytes)
            return int(row == self.fail)

        self.next_row = next_row

    def call(self, board: Any, name: str, label: int = 0) -> tuple[int, np.ndarray]:
        """The status, and what was written: the output, or the result of a step."""
        self.asked.clear()
        results = np.full(64, -7, np.float32)
        pointers = [results.ctypes.data_as(ctypes.c_void_p)]
        if name != "infer_rows":
            pointers.insert(0, np.asarray([label], np.int32).ctypes.data_as(ctypes.c_void_p))
        return board._call(name, self.next_row, ctypes.c_void_p(42), *pointers), results


def sample(artifact: Artifact) -> np.ndarray:
    x = np.random.default_rng(1).uniform(0, 200, artifact.build.input.shape)
    return x.astype(artifact.build.input.dtype)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("call", ["infer", "train_step", "evaluate"])
def test_rows_are_asked_for_in_order_once_each(name: str, call: str) -> None:
    artifact = build(name)
    x = sample(artifact)
    camera, board, other = Camera(artifact, x), artifact.host(), artifact.host()
    status, results = camera.call(board, f"{call}_rows")
    assert status == OK
    assert camera.asked == list(range(artifact.build.input.shape[1]))
    header = (artifact.build.include / "net.h").read_text()
    (alignment,) = re.findall(r"NET_ROW_ALIGN (\d)", header)
    assert camera.aligned % int(alignment) == 0 and int(alignment) == (1 if "unread" in name else 4)
    assert f"#define NET_INPUT_ROWS {len(camera.asked)} " in header
    if call == "infer":
        y = other.infer(x).reshape(-1)
        np.testing.assert_array_equal(results[: y.size], y)
    else:
        assert results[0] == getattr(other, call)(x, np.zeros(1, np.int32)).loss
    assert board.save_state() == other.save_state()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("call", ["infer", "train_step", "evaluate"])
def test_a_row_that_does_not_come_changes_nothing(name: str, call: str) -> None:
    """Not even the last one: nothing is written before all of them are there."""
    artifact = build(name)
    x = sample(artifact)
    board, last = artifact.host(), artifact.build.input.shape[1] - 1
    before = board.save_state()
    for fail in (0, 5, last):
        camera = Camera(artifact, x, fail)
        status, results = camera.call(board, f"{call}_rows")
        assert status == SOURCE and (results == -7).all()
        assert camera.asked == list(range(fail + 1))  # it is not called again
        assert board.save_state() == before
    again, fresh = Camera(artifact, x), artifact.host()
    assert again.call(board, f"{call}_rows")[0] == OK == Camera(artifact, x).call(fresh, f"{call}_rows")[0]
    assert board.save_state() == fresh.save_state()


def test_what_is_refused_asks_for_no_row() -> None:
    artifact = build("uint8")
    board = artifact.host()
    camera = Camera(artifact, sample(artifact))
    assert camera.call(board, "train_step_rows", label=99)[0] == LABEL and not camera.asked
    nested = Camera(artifact, camera.x)
    camera.inside = lambda: inner.append(nested.call(board, "infer_rows")[0])
    inner: list[int] = []
    assert camera.call(board, "train_step_rows")[0] == OK
    assert set(inner) == {BUSY} and not nested.asked


@pytest.mark.skipif(not find_toolchains(), reason="no compiler for boards")
@pytest.mark.parametrize("place", ["unicorn", "qemu"])
def test_emulated_boards_read_rows_from_a_pipe(place: str) -> None:
    """No memory of the firmware holds the picture; a refused call leaves nothing behind in the pipe."""
    if importlib.util.find_spec("unicorn") is None if place == "unicorn" else find_qemu() is None:
        pytest.skip(f"{place} is not installed")
    rows, caller = (CASES["uint8"].compile(p, "stm32f746") for p in ("rows", "caller"))
    rng = np.random.default_rng(0)
    xs = rng.integers(0, 255, (3, *rows.build.input.sample), np.uint8, endpoint=True)
    data = {"x": xs, "y": np.arange(3)}
    there, here = rows.run(data, runner=place), caller.run(data, runner="host")
    assert (there.loss, there.weights_sha256) == (here.loss, here.weights_sha256)
    board, host = tte.artifact.open_board(rows.build, place), caller.host()
    assert board.init() == OK
    assert board.train_step(xs[0], np.asarray([99])).status == LABEL
    assert board.train_step(xs[1], np.asarray([1])).loss == host.train_step(xs[1], np.asarray([1])).loss
    np.testing.assert_array_equal(board.infer(xs[2]), host.infer(xs[2]))
    board.close()
    ram = [artifact.report["memory"]["static_ram_bytes"] for artifact in (rows, caller)]
    assert ram[0] < ram[1] - 90 * 40  # of the 96 rows of 40 bytes all but a few


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.streamed])
def test_the_checker_sees_rows_that_are_lost(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a ring one row smaller a row is overwritten; without the rest of the rows the camera is not drained."""
    artifact = build(name)
    program, (node, *_) = artifact.compiled.train, sources(artifact)
    stream = find_stream(node)
    assert stream and node in program.graph.nodes

    def require_error(wrong: Stream, said: str) -> None:
        monkeypatch.setattr(check, "find_stream", lambda n: wrong if n is node else find_stream(n))
        with pytest.raises(PlanError, match=said):
            check_plan(program.graph, program.plan)

    for ring, count in stream.rings.items():
        if count > 1:
            smaller = replace(stream, rings=stream.rings | {ring: count - 1})
            require_error(smaller, f"reads row .* of %{ring}, which is not there")
    assert bool(stream.rest) == ("unread" in name)
    if stream.rest:
        require_error(replace(stream, rest=()), "only 124 rows")


@pytest.mark.parametrize(
    ("module", "shape", "io", "said"),
    [
        (unread(), (1, 3, 25, 5), {}, "say `layout: nhwc`"),
        (unread(), (1, 3, 25, 5), {"input": {"layout": "nchw"}}, "say `layout: nhwc`"),
        (nn.Conv2d(3, 3, 1), (1, 3, 8, 8), {"input": NHWC, "target": "input"}, "cannot be the target"),
        (nn.Linear(8, 3), (1, 8), {}, "is no picture"),
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(32, 3)), (1, 3, 10), {}, "is no picture"),
    ],
)
def test_inputs_without_rows(module: nn.Module, shape: tuple[int, ...], io: dict[str, Any], said: str) -> None:
    scheme = {"train": "full", "loss": "mse", "io": io}
    with pytest.raises(TTEError, match=said) as caught:
        tte.compile(module.eval(), (torch.zeros(shape),), scheme, "host", input="rows")
    assert caught.value.code == "TTE-E043" and caught.value.where == "--input rows"


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    command = host_compiler()
    if command is None:
        pytest.skip("no C compiler")
    text = (Path(__file__).parents[1] / "docs" / "c-api.md").read_text()
    (example,) = re.findall(r"```c\n(/\* A camera.*?)```", text, re.DOTALL)
    scheme = {"train": "last-layer", "io": {"input": BYTES}}
    artifact = tte.compile(blocks(), (torch.zeros(SHAPE),), scheme, "host", "m", input="rows")
    (tmp_path / "camera.c").write_text(f'#include "m.h"\n{example}')
    line = [*command, "-std=c99", "-Wall", "-Wextra", "-Werror", "-Wconversion"]
    line += [f"-I{artifact.build.include}", "-c", str(tmp_path / "camera.c"), "-o", str(tmp_path / "camera.o")]
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
