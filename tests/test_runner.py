"""One project in every place it can run: the same bits, the same memory, and no byte outside of it."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import networks
import numpy as np
import pytest

import tte
from tte.artifact import Artifact
from tte.cli import main
from tte.errors import TTEError
from tte.ir import Graph, TensorType, Value
from tte.runner import Board, Build, open_host, open_qemu, open_unicorn
from tte.runner.qemu import find_qemu
from tte.runner.toolchain import build_firmware, build_host, find_toolchains
from tte.runner.train import draw_samples, run_training
from tte.target import STM32F746, TARGETS, Region, find_target

if not find_toolchains() or not importlib.util.find_spec("unicorn"):
    pytest.skip("no compiler or emulator: pip install 'tte[emulate]'", allow_module_level=True)

OK, SELFTEST = 0, 11
EMULATED = ("unicorn-zig", "unicorn-gcc", "qemu-zig", "qemu-gcc")
STEPS = 10


def autoencoder() -> Graph:
    net = networks.Network()
    x = Value("x", TensorType((1, 12)))
    return net.graph(x, net.dense("decode", net.call("nn.relu", net.dense("encode", x, 4), layer="code"), 12))


@dataclass(frozen=True)
class Project:
    """How a network is compiled; together they have every kind of target, input and place for the arena."""

    network: Callable[[], Graph]
    scheme: dict[str, object]
    target: str
    arena: str = "static"


SPARSE = [{"layer": "b", "weight": {"in_channels": 0.5}, "bias": True}, {"layer": "head", "weight": "all"}]
PROJECTS = {
    "labels": Project(networks.residual, {"train": "full", "loss": "cross_entropy"}, "stm32f746"),
    "autoencoder": Project(autoencoder, {"train": "full", "loss": "mse", "io": {"target": "input"}}, "cortex-m4"),
    "uint8": Project(
        networks.residual,
        {"train": "bias-only", "loss": "mse", "io": {"input": {"dtype": "uint8", "mean": [99], "std": [64]}}},
        "cortex-m33",
    ),
    "extern": Project(networks.residual, {"train": SPARSE}, "stm32h743", "extern"),
}


def write_model(graph: Graph, folder: Path) -> None:
    (folder / "net.ir").write_text(str(graph))
    np.savez(folder / "net.npz", **{c.name: c.data for c in graph.consts})


def compile_project(name: str, folder: Path, **options: str) -> Artifact:
    project = PROJECTS[name]
    write_model(project.network(), folder)
    defaults = {"update_scheme": project.scheme, "target": project.target, "arena": project.arena}
    return tte.compile(folder / "net.ir", name="net", **(defaults | options))


@pytest.fixture(scope="module", params=PROJECTS)
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return compile_project(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return compile_project("autoencoder", tmp_path_factory.mktemp("small"), target="stm32f746")


def start(build: Build, place: str) -> Board:
    """The project at a place; skips where a tool is missing."""
    if place == "host":
        return open_host(build, selftest=True)
    emulator, toolchain = place.split("-")
    if toolchain not in find_toolchains():
        pytest.skip("arm-none-eabi-gcc is not installed" if toolchain == "gcc" else "ziglang is not installed")
    if emulator == "qemu" and not find_qemu():
        pytest.skip("qemu-system-arm is not installed")
    machine = "qemu" if emulator == "qemu" else "board"
    firmware = build_firmware(build, find_target(build.target_name), toolchain, machine, selftest=True)
    return (open_qemu if emulator == "qemu" else open_unicorn)(build, firmware)


def train(board: Board, steps: int = STEPS) -> dict[str, object]:
    """Some steps and an inference: all the numbers that must be the same everywhere."""
    samples = draw_samples(board.build, steps)
    result = run_training(board, samples, steps=steps, evaluation=samples)
    output = board.infer(samples.x[0])
    return {
        "loss": result.loss,
        "metric": result.metric,
        "sha256": result.weights_sha256,
        "state": result.state.hex(),
        "output": output.tobytes().hex(),
    }


@pytest.mark.parametrize("place", EMULATED)
def test_the_same_bits_on_every_emulator(project: Artifact, place: str) -> None:
    board = start(project.build, place)
    try:
        found = train(board)
        assert board.selftest() == OK
        assert board.save_state().hex() == found["state"]  # the self-test leaves no trace
    finally:
        board.close()
    expected = train(open_host(project.build))
    assert found == expected
    assert len(set(expected["loss"])) == STEPS  # something is learned


SANITIZED = """
import json, sys
sys.path[:0] = sys.argv[2:]
from test_runner import train
from tte.runner import Build, open_host
board = open_host(Build.open(sys.argv[1]), sanitize=True, selftest=True)
result = train(board)
state = bytes.fromhex(result["state"])
status = [board.selftest(), board.reset_state(), board.load_state(state), board.load_state(b"")]
print(json.dumps(result | {"status": status, "trained": board.save_state().hex()}))
"""


def run_sanitized(build: Build) -> subprocess.CompletedProcess[str]:
    """Train under AddressSanitizer and UndefinedBehaviorSanitizer; Python itself must start with the former."""
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    build_host(build, sanitize=True, selftest=True)  # here: the compiler need not run under its own sanitizers
    runtime = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    if not Path(runtime.stdout.strip()).is_absolute():
        pytest.skip("gcc has no libasan.so")
    environment = os.environ | {"LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", SANITIZED, str(build.folder), str(Path(__file__).parent)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_same_bits_under_sanitizers(project: Artifact) -> None:
    result = run_sanitized(project.build)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found.pop("status") == [OK, OK, OK, 9]
    assert found.pop("trained") == found["state"]
    assert found == json.loads(json.dumps(train(open_host(project.build))))


def change(build: Build, folder: Path, file: str, old: str, new: str) -> Build:
    """A copy of a project with one place in its C changed."""
    shutil.copytree(build.folder, folder, ignore=shutil.ignore_patterns(".cache"))
    path = folder / "Core" / "Src" / file
    text, count = re.subn(old, new, path.read_text(), count=1)
    assert count == 1, f"no {old} in {file}"
    path.write_text(text)
    return Build.open(folder)


def break_step(build: Build, folder: Path, statement: str) -> Build:
    return change(build, folder, "net.c", r"(static int run_train\(.*\) \{\n)", rf"\1    {statement}\n")


@pytest.mark.parametrize("arena", ["static", "extern"])
def test_sanitizers_stop_a_write_past_the_arena(arena: str, tmp_path: Path) -> None:
    artifact = compile_project("autoencoder", tmp_path, arena=arena)
    # The pointer is hidden from the compiler, which would refuse it.
    statement = "float *volatile end = (float *)(void *)(arena + NET_ARENA_BYTES); *end = 1.0f;"
    result = run_sanitized(break_step(artifact.build, tmp_path / "broken", statement))
    assert result.returncode != 0
    assert "AddressSanitizer: " in result.stderr and "WRITE of size 4" in result.stderr


def test_sanitizers_stop_undefined_behaviour(small: Artifact, tmp_path: Path) -> None:
    broken = break_step(small.build, tmp_path / "b", "volatile int most = 0x7fffffff; most = most + 1;")
    assert "signed integer overflow" in run_sanitized(broken).stderr


def test_sanitizers_must_be_there_from_the_start(small: Artifact) -> None:
    with pytest.raises(TTEError) as caught:
        small.host(sanitize=True)
    assert caught.value.code == "TTE-E051" and "LD_PRELOAD" in caught.value.fix


BREAKAGES = {
    "outside of the memory": "*(volatile float *)(void *)(arena + (64u << 20)) = 1.0f;",
    "null": "volatile size_t nowhere = 0x10000000; (void)*(volatile int *)nowhere;",
    "into the flash": "volatile size_t rom = 0x08000000; *(volatile int *)rom = 1;",
    "stack": "volatile uint8_t all[4200]; for (size_t i = sizeof all; i-- > 0;) all[i] = 0;",
}


@pytest.mark.parametrize(
    ("place", "what"),
    [*(("unicorn-zig", what) for what in BREAKAGES), ("qemu-zig", "outside of the memory"), ("qemu-zig", "stack")],
)
def test_emulators_stop_what_the_board_has_no_memory_for(
    small: Artifact, place: str, what: str, tmp_path: Path
) -> None:
    board = start(break_step(small.build, tmp_path / "broken", BREAKAGES[what]), place)
    try:
        with pytest.raises(TTEError) as caught:
            train(board)
    finally:
        board.close()
    assert caught.value.code == "TTE-E056"
    if place == "unicorn-zig":
        assert "net_train_step" in caught.value.what, "names the function"


@pytest.mark.parametrize("project", ["uint8"], indirect=True)
@pytest.mark.parametrize(
    ("place", "array"),
    [
        ("host", "net_w_head_weight"),
        ("host", "net_initial_0"),
        ("unicorn-zig", "net_initial_0"),
        ("qemu-zig", "net_w_head_weight"),
    ],
)
def test_selftest_notices_a_changed_weight(project: Artifact, place: str, array: str, tmp_path: Path) -> None:
    first = rf"({array}\[\d+\] = \{{\n *)([^,]+)"
    board = start(change(project.build, tmp_path / "b", "net_weights.c", first, r"\1 0.5f + \2"), place)
    try:
        assert board.init() == OK
        before = board.save_state()
        assert board.selftest() == SELFTEST
        assert board.save_state() == before
    finally:
        board.close()


@pytest.mark.parametrize(
    ("toolchain", "flash", "ram"),
    [("zig", 1 << 20, 4200), ("zig", 2000, 1 << 18), ("gcc", 2000, 4200)],
)
def test_firmware_that_does_not_fit(
    small: Artifact, toolchain: str, flash: int, ram: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    if toolchain not in find_toolchains():
        pytest.skip(f"{toolchain} is not installed")
    monkeypatch.setattr("tte.runner.toolchain.find_toolchains", lambda: [toolchain])
    memory = (Region("flash", 0x08000000, flash, "rx"), Region("ram", 0x20000000, ram, "rwx"))
    monkeypatch.setitem(TARGETS, "tiny", replace(STM32F746, name="tiny", memory=memory))
    write_model(autoencoder(), tmp_path)
    (tmp_path / "scheme.yaml").write_text("{train: full, loss: mse, io: {target: input}}")
    command = f"tte compile {tmp_path}/net.ir -u {tmp_path}/scheme.yaml -t tiny --name net -o {tmp_path}/out"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    what, where, fix = capsys.readouterr().err.splitlines()
    fits = build_firmware(small.build, STM32F746, toolchain)
    needed = fits.data + fits.bss + fits.stack_reserved
    assert what.startswith("error[TTE-E053]") and "fix:" in fix
    assert (f"RAM needs {needed:,} bytes, has {ram:,}" in what) == (ram < needed)
    held = r" *where: arena [\d,]+ B, trained parameters [\d,]+ B; at the peak: (en|de)code.* B"
    assert (re.match(held, where) is not None) == ("budget: {sram: 4200}" in fix) == (ram < needed)
    full = re.search(rf"FLASH needs (\S+) bytes, has {flash:,}", what)
    assert bool(full) == ("--optimize size" in fix) == (flash < fits.flash_bytes)
    if full:  # sections are aligned to 8
        assert 0 <= int(full[1].replace(",", "")) - fits.flash_bytes < 16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.ir", "net.npz", "scheme.yaml"]


def test_a_bare_core_may_be_larger_than_the_board_it_is_taken_for(tmp_path: Path) -> None:
    """It runs with the memory of QEMU's machine when the STM32F746 is too small; the board itself refuses."""
    net = networks.Network()
    x = Value("x", TensorType((1, 300, 300, 1)))
    write_model(net.graph(x, net.dense("head", net.call("mean", x, axis=(1, 2)), 3)), tmp_path)
    artifact = tte.compile(tmp_path / "net.ir", update_scheme="last-layer", target="cortex-m7")
    board = artifact.report["memory"]
    assert board["static_ram_bytes"] > STM32F746.ram.size
    with pytest.raises(TTEError, match="RAM needs"):
        _ = tte.compile(tmp_path / "net.ir", update_scheme="last-layer", target="stm32f746").report


@pytest.mark.parametrize("project", ["labels", "extern"], indirect=True)
def test_high_water_marks(project: Artifact) -> None:
    """Unicorn and QEMU agree to the byte; the report says what a run says."""
    marks = {}
    for place in ("unicorn-zig", "qemu-zig"):
        board = start(project.build, place)
        try:
            samples = draw_samples(project.build, STEPS)
            result = run_training(board, samples, steps=STEPS)
            marks[place] = (result.stack_bytes, result.arena_bytes)
        finally:
            board.close()
        report = project.report
        # QEMU's timer ticks every 0.6 to 0.8 instructions, and reading it takes some.
        assert result.instructions_per_step == pytest.approx(report["train_step"]["instructions"], rel=0.01)
    assert marks["unicorn-zig"] == marks["qemu-zig"]
    assert marks["unicorn-zig"] == (report["train_step"]["stack_bytes"], report["memory"]["arena_bytes"])
    assert 0 < report["infer"]["arena_bytes"] <= report["memory"]["arena_bytes"]


def test_a_tensor_that_ends_within_a_word_counts_as_planned(tmp_path: Path) -> None:
    net = networks.Network()
    x = Value("x", TensorType((1, 6, 6, 1)))
    pooled = net.call("nn.max_pool2d", net.conv("c", x, 1, 1), pool_size=(2, 2), strides=(2, 2), padding=(0,) * 4)
    write_model(net.graph(x, pooled), tmp_path)
    artifact = tte.compile(tmp_path / "net.ir", update_scheme={"train": "full", "loss": "mse"}, target="cortex-m4")
    highest = max(artifact.report["memory"]["peak_tensors"], key=lambda t: t["offset"])
    assert highest["dtype"] == "uint8" and int(np.prod(highest["shape"])) % 4  # where the greatest was
    result = artifact.run({"x": np.zeros((1, 6, 6, 1)), "y": np.ones((1, 3, 3, 1))}, runner="unicorn")
    assert result.arena_bytes == artifact.report["memory"]["arena_bytes"]


def test_high_water_marks_move(small: Artifact, tmp_path: Path) -> None:
    """Nothing is used before anything runs; an array on the stack is seen to the byte."""
    plain = start(small.build, "unicorn-zig")
    assert plain.init() == OK
    idle = plain.high_water()
    assert idle is not None and idle[0] < 400 and idle[1] == 0
    statement = "volatile uint8_t more[1024]; for (size_t i = 0; i < sizeof more; i++) more[i] = 0;"
    deep = start(break_step(small.build, tmp_path / "deep", statement), "unicorn-zig")
    used = []
    for board in (plain, deep):
        samples = draw_samples(board.build, 1)
        used.append(run_training(board, samples, steps=1).stack_bytes)
        board.close()
    assert 1024 <= np.subtract(used[1], used[0]) < 1024 + 64


def test_an_interrupt_stops_the_emulator(small: Artifact, tmp_path: Path) -> None:
    """It comes while C runs, and is seen at the next callback, which must not swallow it."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        pytest.skip("SIGINT is ignored here, as in a shell's background")
    slow = break_step(small.build, tmp_path / "b", "for (volatile uint32_t i = 0; i < 20000000u; i++) {}")
    board = start(slow, "unicorn-zig")
    x = draw_samples(slow, 1).x[0]
    assert board.init() == OK
    timer = threading.Timer(0.1, signal.raise_signal, (signal.SIGINT,))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        board.train_step(x, None)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    timer.join()
    board.close()


@pytest.mark.parametrize("place", ["host", "unicorn-zig", "qemu-zig"])
def test_a_closed_board_says_so(small: Artifact, place: str) -> None:
    board = start(small.build, place)
    assert board.init() == OK
    board.close()
    board.close()
    for call in (board.init, board.save_state, board.selftest, lambda: board.load_state(b"TTES")):
        with pytest.raises(TTEError, match="closed"):
            call()


@pytest.mark.parametrize("place", ["host", "unicorn-zig"])
def test_a_board_refuses_a_rate_that_nothing_learns_with(small: Artifact, place: str) -> None:
    board = start(small.build, place)
    try:
        assert board.init() == OK
        for rate in (-1.0, np.nan, np.inf, 1e39):
            with pytest.raises(TTEError, match="the learning rate is") as caught:
                board.set_learning_rate(rate)
            assert caught.value.code == "TTE-E059" and "not negative" in caught.value.fix
        board.set_learning_rate(0)
    finally:
        board.close()


def test_public_names_are_listed() -> None:
    assert set(tte.__all__) <= set(dir(tte)) and not [name for name in tte.__all__ if not hasattr(tte, name)]


FITTING = {
    "float32": (np.zeros((8, 8, 2)), 1),
    "with its batch dimension": (np.zeros((1, 8, 8, 2), np.float32), np.array([1])),
    "integers for floats": (np.zeros((8, 8, 2), int).tolist(), np.int64(4)),
    "a label out of range": (np.zeros((8, 8, 2)), 5),
}
UNFITTING = {
    "size": (np.zeros((8, 8, 3)), 1),
    "another layout": (np.zeros((2, 8, 8)), 1),
    "flat": (np.zeros(128), 1),
    "two samples": (np.zeros((2, 8, 8, 2)), [1, 1]),
    "text": (np.full((8, 8, 2), "0"), 1),
    "no input": (None, 1),
    "no label": (np.zeros((8, 8, 2)), None),
    "a label between classes": (np.zeros((8, 8, 2)), np.array([1.7])),
    "one-hot": (np.zeros((8, 8, 2)), np.eye(5, dtype=int)[1]),
    "a label that overflows": (np.zeros((8, 8, 2)), 2**32),
}


@pytest.mark.parametrize("project", ["labels"], indirect=True)
@pytest.mark.parametrize("place", ["host", "unicorn-zig"])
def test_samples_are_held_against_the_model(project: Artifact, place: str) -> None:
    board = start(project.build, place)
    try:
        assert board.init() == OK
        for name, (x, y) in FITTING.items():
            assert board.train_step(x, y).status == (3 if "range" in name else OK), name
            assert board.infer(x).shape == (1, 5)
        before = board.save_state()
        for name, (x, y) in UNFITTING.items():
            calls = [(board.train_step, x, y), (board.evaluate, x, y)]
            for call, *arguments in calls if "label" in name or name == "one-hot" else [*calls, (board.infer, x)]:
                with pytest.raises(TTEError) as caught:
                    call(*arguments)
                assert caught.value.code == "TTE-E057" and "the model wants" in caught.value.what, name
        assert board.save_state() == before
    finally:
        board.close()


@pytest.mark.parametrize("project", ["uint8"], indirect=True)
def test_targets_and_integers_are_held_against_the_model(project: Artifact) -> None:
    board, x, y = project.host(), np.zeros((8, 8, 2), np.uint8), np.zeros(5)
    assert board.train_step(x, y).status == board.train_step(x, y[None]).status == OK
    for x_, y_ in ((x / 2, y), (x + 256.0, y), (x.astype(int) + 256, y), (x, y[:, None]), (x, 0.0)):
        with pytest.raises(TTEError, match="the model wants"):
            board.train_step(x_, y_)
    data = {"x": x[None], "y": y[None]}
    assert project.run(data, runner="host").steps == 1
    with pytest.raises(TTEError, match="the model wants"):
        project.run(data | {"y": y.reshape(1, 5, 1)}, runner="host")


def test_selftest_of_a_model_that_diverges(tmp_path: Path) -> None:
    """The made-up data of the self-test may not suit the learning rate: fewer steps, but a self-test."""
    net = networks.Network()
    x = Value("x", TensorType((1, 4)))
    graph = net.graph(x, net.dense("b", net.dense("a", x, 5), 3))
    (tmp_path / "net.ir").write_text(str(graph))
    np.savez(tmp_path / "net.npz", **{c.name: c.data for c in graph.consts})
    scheme = {"train": "full", "loss": "mse", "optimizer": {"lr": 1e6}}
    artifact = tte.compile(tmp_path / "net.ir", update_scheme=scheme)
    text = (artifact.build.folder / "Core/Src/net_selftest.c").read_text()
    assert re.search("#define STEPS [012]\n", text)
    assert artifact.host(selftest=True).selftest() == OK
