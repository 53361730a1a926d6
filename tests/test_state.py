"""What was learned: it moves between places and updates of the firmware; what does not belong changes nothing."""

import copy
import ctypes
import importlib.util
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import networks
import numpy as np
import onnx
import pytest
import qdq
import torch
from typer.testing import CliRunner

import tte
from tte.artifact import Artifact
from tte.cli import _require_foreign, app
from tte.compiler import OPTIONAL
from tte.ir import Graph, TensorType, Value
from tte.runner import Board, HostBoard, open_host
from tte.runner.board import STATUS
from tte.runner.toolchain import find_toolchains
from tte.runner.train import draw_samples, open_board
from tte.saved import write_onnx

if not find_toolchains():
    pytest.skip("no compiler: pip install 'tte[emulate]'", allow_module_level=True)

WRITE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
READ = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t)


def autoencoder() -> Graph:
    net = networks.Network()
    x = Value("x", TensorType((1, 12)))
    return net.graph(x, net.dense("decode", net.call("nn.relu", net.dense("encode", x, 4), layer="code"), 12))


def pooled() -> Graph:
    net = networks.Network()
    x = Value("x", TensorType((1, 6, 6, 2)))
    h = net.call("nn.relu", net.conv("first", x, 4), layer="first")
    h = net.call("nn.max_pool2d", h, pool_size=(2, 2), strides=(2, 2), layer="pool")
    return net.graph(x, net.dense("head", net.call("reshape", h, newshape=(1, 36), layer="flat"), 5))


def compile_graph(graph: Graph, folder: Path, **options: object) -> Artifact:
    folder.mkdir(exist_ok=True)
    (folder / "net.ir").write_text(str(graph))
    np.savez(folder / "net.npz", **{c.name: c.data for c in graph.consts})
    return tte.compile(folder / "net.ir", name="net", **({"target": "stm32f746"} | options))


ENCODE = {"train": "full", "loss": "mse", "io": {"target": "input"}}


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A project whose state fits its arena."""
    artifact = compile_graph(networks.residual(), tmp_path_factory.mktemp("fits"))
    assert artifact.build.state_bytes <= artifact.build.arena_bytes
    return artifact


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A project with more state than arena."""
    artifact = compile_graph(autoencoder(), tmp_path_factory.mktemp("wide"), update_scheme=ENCODE)
    assert artifact.build.state_bytes > artifact.build.arena_bytes
    return artifact


@pytest.fixture(params=["fits", "wide"])
def artifact(request: pytest.FixtureRequest) -> Artifact:
    return request.getfixturevalue(request.param)


def name(status: int) -> str:
    return STATUS[status]


def train(board: Board, first: int, last: int) -> list[float]:
    samples = draw_samples(board.build, last)
    steps = [board.train_step(samples.x[i], None if samples.y is None else samples.y[i]) for i in range(first, last)]
    assert all(step.status == 0 for step in steps)
    return [step.loss for step in steps]


def learned(artifact: Artifact, steps: int = 3) -> HostBoard:
    """A board that is no longer in its initial state."""
    board = artifact.host(selftest=True)
    train(board, 0, steps)
    return board


@pytest.mark.parametrize(("first", "second"), [("host", "unicorn"), ("unicorn", "host"), ("unicorn", "unicorn")])
def test_learning_goes_on_elsewhere(artifact: Artifact, first: str, second: str) -> None:
    if not importlib.util.find_spec("unicorn"):
        pytest.skip("unicorn is not installed")
    uninterrupted = artifact.host()
    losses = train(uninterrupted, 0, 6)
    one, other = open_board(artifact.build, first), open_board(artifact.build, second)
    try:
        assert one.init() == other.init() == 0
        assert train(one, 0, 3) == losses[:3]
        train(other, 0, 1)  # forgotten again
        assert name(other.load_state(one.save_state())) == "OK"
        assert train(other, 3, 6) == losses[3:]
        assert other.save_state() == uninterrupted.save_state()
    finally:
        one.close()
        other.close()


def test_reset_is_the_initial_state(artifact: Artifact) -> None:
    board = artifact.host()
    initial = board.save_state()
    losses = train(board, 0, 3)
    assert board.save_state() != initial
    assert board.reset_state() == 0
    assert board.save_state() == initial
    assert train(board, 0, 3) == losses


def damage(blob: bytes) -> Iterator[tuple[bytes, str]]:
    """Every flipped bit, every length, and what the status must be."""
    fields = {(0, 8): "STATE_VERSION", (8, 24): "STATE_MODEL", (24, 28): "STATE_SIZE", (28, len(blob)): "STATE_CRC"}
    for (start, end), status in fields.items():
        for bit in range(8 * start, 8 * end):
            flipped = bytearray(blob)
            flipped[bit // 8] ^= 1 << bit % 8
            yield bytes(flipped), status
    for length in range(len(blob)):
        yield blob[:length], "STATE_SIZE"
    for more in (b"\0", blob[-4:], blob):
        yield blob + more, "STATE_SIZE"


def test_every_damage_is_refused_and_nothing_changes(wide: Artifact) -> None:
    blob = learned(wide, 5).save_state()
    board = learned(wide)
    before = board.save_state()
    assert blob != before
    for damaged, status in damage(blob):
        assert name(board.load_state(damaged)) == status
        assert board.save_state() == before
    assert name(board.load_state(blob)) == "OK"
    assert board.save_state() == blob


@pytest.mark.parametrize("runner", ["unicorn", "qemu"])
def test_a_board_refuses_the_same(fits: Artifact, runner: str) -> None:
    try:
        board = open_board(fits.build, runner)
    except tte.TTEError as problem:
        pytest.skip(str(problem))
    try:
        assert board.init() == 0
        train(board, 0, 1)
        before, blob = board.save_state(), learned(fits).save_state()
        cases = list(damage(blob))
        for damaged, status in (*cases[:: len(cases) // 40], *cases[-3:]):
            assert name(board.load_state(damaged)) == status
        assert board.save_state() == before
        assert name(board.load_state(blob)) == "OK"
    finally:
        board.close()


def test_states_of_others_are_refused(fits: Artifact, wide: Artifact, tmp_path: Path) -> None:
    """Another model, another scheme of the same model, other initial values, a channel that moved."""
    moved = {"layer": "b", "weight": {"in_channels": 0.5, "select": [0, 1, 2, 3]}}
    other = {"layer": "b", "weight": {"in_channels": 0.5, "select": [0, 1, 2, 7]}}
    reseeded = networks.residual()
    reseeded.consts[0].data[0, 0, 0, 0] += 1
    bias = compile_graph(networks.residual(), tmp_path / "a", update_scheme="bias-only")
    others = [
        wide,
        bias,
        compile_graph(reseeded, tmp_path / "b"),
        compile_graph(networks.residual(), tmp_path / "c", update_scheme={"train": [moved]}),
        compile_graph(networks.residual(), tmp_path / "d", update_scheme={"train": [other]}),
    ]
    hashes = [a.compiled.interface.model_hash for a in (fits, *others)]
    assert len(set(hashes)) == len(hashes)
    board = learned(fits)
    before = board.save_state()
    same_size = before[:8] + bytes.fromhex(hashes[3]) + before[24:-4]
    blobs = [learned(wide).save_state(), learned(bias).save_state()]
    for blob in (*blobs, same_size + zlib.crc32(same_size).to_bytes(4, "little")):
        assert name(board.load_state(blob)) == "STATE_MODEL"
        assert board.save_state() == before


UPDATES = {
    "other board": {"target": "cortex-m4"},
    "this computer": {"target": "host"},
    "arena of the caller": {"arena": "extern"},
    "input in the arena": {"input": "arena"},
    **{f"without pass {name}": {"disable_passes": [name]} for name in OPTIONAL},
    "bare": {"disable_passes": list(OPTIONAL)},
}


@pytest.mark.parametrize("update", UPDATES)
def test_an_update_of_the_firmware_keeps_what_was_learned(fits: Artifact, update: str, tmp_path: Path) -> None:
    updated = compile_graph(networks.residual(), tmp_path, **UPDATES[update])
    new, old = updated.compiled, fits.compiled
    assert new.interface.model_hash == old.interface.model_hash
    assert [(p.name, at) for p, at in new.state.slots] == [(p.name, at) for p, at in old.state.slots]
    if "pass" in update:  # shown by the hash and the layout
        return
    board = updated.host()
    blob = learned(fits).save_state()
    assert name(board.load_state(blob)) == "OK"
    assert board.save_state() == blob


class Source:
    """Reads a blob; call number ``bad`` fails, or gives other bytes."""

    def __init__(self, blob: bytes, bad: int = -1, change: bool = False) -> None:
        self.blob, self.bad, self.change, self.calls = blob, bad, change, 0

    def load(self, board: HostBoard) -> str:
        return name(board._call("state_load", READ(self.read), None, ctypes.c_size_t(len(self.blob))))

    def read(self, _: object, offset: int, to: int, n: int) -> int:
        assert 0 < n <= 256
        self.calls += 1
        data = bytearray(self.blob[offset : offset + n])
        if self.calls - 1 == self.bad:
            if not self.change:
                ctypes.memmove(to, bytes(n), n // 2)  # it breaks off in the middle
                return 1
            data[n // 2] ^= 4
        ctypes.memmove(to, bytes(data), n)
        return 0


@pytest.mark.parametrize("change", [False, True], ids=["fails", "gives other bytes"])
def test_a_source_that_breaks_while_it_is_read(artifact: Artifact, change: bool) -> None:
    """Refused wherever it happens. Only where the state does not fit the arena, a second pass that breaks resets it."""
    blob = learned(artifact, 5).save_state()
    board = learned(artifact)
    before, initial = board.save_state(), artifact.host().save_state()
    source = Source(blob)
    assert source.load(artifact.host()) == "OK"
    assert source.calls > 3
    for bad in range(source.calls):
        assert name(board.load_state(before)) == "OK"
        status = Source(blob, bad, change).load(board)
        assert status.startswith("STATE_") if change else status == "IO"
        second_pass = bad >= source.calls - -(-artifact.build.state_bytes // 256)
        lost = second_pass and artifact.build.state_bytes > artifact.build.arena_bytes
        assert board.save_state() == (initial if lost else before)


def test_a_sink_that_fails(artifact: Artifact) -> None:
    board = learned(artifact)
    before = board.save_state()
    for good in range(2 + -(-artifact.build.state_bytes // 256)):
        left = [good]

        def write(_: object, data: int, n: int, left: list[int] = left) -> int:
            left[0] -= 1
            return int(left[0] < 0)

        assert name(board._call("state_save", WRITE(write), None)) == "IO"
        assert board.save_state() == before


def call_all(board: HostBoard) -> list[str]:
    """The status of every call of the API."""
    samples = draw_samples(board.build, 1)
    x, y, result = samples.x[0].copy(), np.empty(board.build.output.shape, np.float32), np.zeros(3, np.int32)
    target = np.zeros(1, np.int32) if samples.y is None else samples.y[:1].copy()
    x_, y_, target_, result_ = (a.ctypes.data_as(ctypes.c_void_p) for a in (x, y, target, result))
    calls: list[tuple[object, ...]] = [("infer", x_, y_), ("train_step", x_, target_, result_)]
    calls += [("evaluate", x_, target_, result_), ("state_save", WRITE(lambda *_: 0), None)]
    calls += [("state_load", READ(lambda *_: 0), None, ctypes.c_size_t(99)), ("state_reset",), ("selftest",)]
    return [name(board._call(*call)) for call in calls]


def test_nothing_works_before_init(artifact: Artifact) -> None:
    board = open_host(artifact.build, selftest=True)
    assert call_all(board) == ["NOT_INIT"] * 7
    assert board.init() == 0
    assert set(call_all(board)) == {"OK", "STATE_VERSION"}


def test_memory_of_the_caller_is_checked(tmp_path: Path) -> None:
    artifact = compile_graph(autoencoder(), tmp_path, update_scheme=ENCODE, arena="extern")
    board = open_host(artifact.build, selftest=True)
    size = artifact.build.arena_bytes
    memory = np.zeros(size + 16, np.uint8).ctypes.data
    for address, n in ((None, size), (memory, size - 1), (memory + 4, size)):
        assert name(board._call("init", ctypes.c_void_p(address), ctypes.c_size_t(n))) == "NOT_INIT"
    assert call_all(board) == ["NOT_INIT"] * 7
    assert board.init() == 0


def test_a_second_entry_is_refused(artifact: Artifact) -> None:
    """From the functions that are called back: every call, init too; and the call that runs is not disturbed."""
    board = learned(artifact)
    before = board.save_state()
    seen: list[str] = []

    def again() -> int:
        seen.extend(call_all(board))
        seen.append(name(board.init()))
        return 0

    assert name(board._call("state_save", WRITE(lambda *_: again()), None)) == "OK"
    source = Source(before)
    read = READ(lambda *arguments: again() or source.read(*arguments))
    assert name(board._call("state_load", read, None, ctypes.c_size_t(len(before)))) == "OK"
    assert len(seen) > 8 * 4
    assert set(seen) == {"BUSY"}
    assert board.save_state() == before
    train(board, 3, 4)


PROBE = """#include "net.h"
int net_probe_calls, net_probe_status[3];
void net_probe(int i, int n);
void net_probe(int i, int n) {
    static net_input_t x[NET_INPUT_SIZE];
    static net_output_t y[NET_OUTPUT_SIZE];
    net_probe_status[0] = net_infer(x, y);
    net_probe_status[1] = net_state_reset();
    net_probe_status[2] = i <= n ? NET_OK : NET_ERR_IO;
    net_probe_calls++;
}
"""


def test_the_hook_runs_after_every_node_and_cannot_enter(artifact: Artifact, tmp_path: Path) -> None:
    artifact.export(tmp_path / "p")
    (tmp_path / "p/Core/Src/net_probe.c").write_text(PROBE)
    header = tmp_path / "p/Core/Inc/net.h"
    hook = "void net_probe(int i, int n);\n#define NET_ON_NODE(i, n) net_probe(i, n)\n#ifndef NET_ON_NODE"
    header.write_text(header.read_text().replace("#ifndef NET_ON_NODE", hook))
    board = open_host(tte.runner.Build.open(tmp_path / "p"))
    assert board.init() == 0
    plain = artifact.host()
    assert train(board, 0, 2) == train(plain, 0, 2)
    assert board.save_state() == plain.save_state()
    calls = ctypes.c_int.in_dll(board._library, "net_probe_calls").value
    assert calls >= 2 * len([n for n in artifact.graph.nodes if n.op != "reshape"]) > 0
    assert [name(s) for s in (ctypes.c_int * 3).in_dll(board._library, "net_probe_status")] == ["BUSY", "BUSY", "OK"]


class Normed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = torch.nn.Conv2d(2, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(64, 3)
        torch.nn.init.normal_(self.norm.weight)
        torch.nn.init.normal_(self.norm.running_mean)
        torch.nn.init.uniform_(self.norm.running_var, 0.2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).flatten(1))


LEARN_FAST = {"train": "full", "optimizer": {"lr": 0.2}}


def run_state(blob: bytes, artifact: Artifact, folder: Path, *options: object) -> str | None:
    """`tte state` on the blob; the code of its error."""
    (folder / "blob").write_bytes(blob)
    result = CliRunner().invoke(app, ["state", f"{folder}/blob", "-b", str(artifact.build.folder), *map(str, options)])
    assert result.exception is None or isinstance(result.exception, tte.TTEError), result.exception
    return result.exception and result.exception.code


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_saved_states_become_the_users_own_weights(tmp_path: Path) -> None:
    """The device, the PyTorch module with its weights, and the ONNX model with its weights compute the same."""
    torch.manual_seed(0)
    module, x = Normed().eval(), torch.randn(1, 2, 6, 6)
    keep = torch.onnx.TrainingMode.PRESERVE  # and with it the batch norm
    torch.onnx.export(module, (x,), tmp_path / "m.onnx", dynamo=False, do_constant_folding=False, training=keep)
    expected = module(x).detach().numpy()
    for source, example in ((module, (x,)), (tmp_path / "m.onnx", None)):
        artifact = tte.compile(source, example, LEARN_FAST, target="host", name="net")
        board = learned(artifact, 5)
        blob, output = board.save_state(), board.infer(x.numpy())
        assert np.abs(output - expected).max() > 0.01
        assert run_state(blob, artifact, tmp_path, "-o", tmp_path / "w.npz") is None
        loaded = copy.deepcopy(module)
        tte.load_weights(loaded, tmp_path / "w.npz")
        np.testing.assert_allclose(loaded(x).detach().numpy(), output, rtol=1e-5, atol=1e-5)
    options = ("--model", tmp_path / "m.onnx", "-o", tmp_path / "new.onnx")
    assert run_state(blob, artifact, tmp_path, *options) is None
    session = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "new.onnx")
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(found, output, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_weights_of_another_parametrisation_are_refused(tmp_path: Path) -> None:
    """The exporter folds the batch norm: its convolution is not the module's. A new head is nobody's yet."""
    torch.manual_seed(0)
    module, x = Normed().eval(), torch.randn(1, 2, 6, 6)
    torch.onnx.export(module, (x,), tmp_path / "m.onnx", dynamo=True, verbose=False)
    head = {"train": "last-layer", "head": {"layer": "head", "classes": 7}}
    for source, scheme, code in ((tmp_path / "m.onnx", LEARN_FAST, "TTE-E065"), (module, head, None)):
        example = None if isinstance(source, Path) else (x,)
        artifact = tte.compile(source, example, scheme, target="host", name="net")
        assert run_state(learned(artifact).save_state(), artifact, tmp_path, "-o", tmp_path / "w.npz") is None
        loaded = copy.deepcopy(module)
        if code is None:
            loaded.head = torch.nn.Linear(64, 7)
            tte.load_weights(loaded, tmp_path / "w.npz")
            continue
        with pytest.raises(tte.TTEError) as caught:
            tte.load_weights(loaded, tmp_path / "w.npz")
        assert caught.value.code == code


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_states_that_cannot_be_turned_into_a_model(fits: Artifact, tmp_path: Path) -> None:
    torch.onnx.export(torch.nn.Linear(6, 5), (torch.zeros(1, 6),), tmp_path / "m.onnx", dynamo=False)
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    blob, model = learned(fits).save_state(), ("--model", tmp_path / "m.onnx")
    for code, *options in (
        ("TTE-E062", "-o", tmp_path / "new.txt"),
        ("TTE-E059", "-o", tmp_path / "new.onnx"),
        ("TTE-E059", *model, "-o", tmp_path / "new.npz"),
        ("TTE-E020", "--model", tmp_path / "bad.onnx", "-o", tmp_path / "new.onnx"),
        ("TTE-E063", *model, "-o", tmp_path / "new.onnx"),
    ):
        assert run_state(blob, fits, tmp_path, *options) == code
    weights = {"weight": np.zeros((5, 6), np.float32), "bias": np.zeros(4, np.float32)}
    with pytest.raises(tte.TTEError, match="shape"):
        write_onnx(tmp_path / "new.onnx", weights, tmp_path / "m.onnx")
    assert not list(tmp_path.glob("new.*"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_another_model_and_a_file_of_the_project_are_refused(tmp_path: Path) -> None:
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.onnx.export(torch.nn.Linear(6, 5), (torch.zeros(1, 6),), tmp_path / f"{seed}.onnx", dynamo=False)
    artifact = tte.compile(tmp_path / "0.onnx", update_scheme="full", target="host")
    blob, project = learned(artifact).save_state(), artifact.build.folder
    before = (project / "weights.npz").read_bytes()
    for number, expected in ((1, "TTE-E065"), (0, None)):
        options = ("--model", tmp_path / f"{number}.onnx", "-o", tmp_path / "new.onnx")
        assert run_state(blob, artifact, tmp_path, *options) == expected
        assert (tmp_path / "new.onnx").exists() == (expected is None)
    frozen = qdq.quantize(qdq.RECIPES["mcunet"], tmp_path)
    last = tte.compile(frozen, update_scheme="last-layer", target="host")
    kept, fresh = learned(last).save_state(), onnx.load(frozen)
    for changed in ("", "onnx::Conv_204_quantized", "onnx::Conv_204_scale", "input.1_scale"):
        other = onnx.ModelProto()
        other.CopyFrom(fresh)
        for tensor in (t for t in other.graph.initializer if t.name == changed):
            array = onnx.numpy_helper.to_array(tensor).copy()
            array.flat[0] += 1
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, changed))
        assert not changed or other != fresh
        onnx.save(other, tmp_path / "other.onnx")
        options = ("--model", tmp_path / "other.onnx", "-o", tmp_path / "same.onnx")
        assert run_state(kept, last, tmp_path, *options) == ("TTE-E065" if changed else None)
    artifact.export(tmp_path / "p")
    with pytest.raises(tte.TTEError, match="belongs to the project"):
        _require_foreign(tmp_path / "p" / ".." / "p" / "weights.npz", tmp_path / "p")
    np.savez(project / "weights.npz", weight=np.zeros(3, np.float32))
    assert run_state(blob, artifact, tmp_path, "-o", tmp_path / "w.npz") == "TTE-E061"
    (project / "weights.npz").write_bytes(before)


@pytest.mark.parametrize("label", [-1, 5, 2**31 - 1, -(2**31)])
def test_a_wrong_label_is_found_before_anything_is_written(fits: Artifact, label: int) -> None:
    board = learned(fits)
    before = board.save_state()
    x = draw_samples(fits.build, 1).x[0]
    for step in (board.train_step, board.evaluate):
        assert name(step(x, np.array([label])).status) == "LABEL"
    assert board.save_state() == before


NETWORKS: dict[str, tuple[Callable[[], Graph], object]] = {
    "residual": (networks.residual, "full"),
    "autoencoder": (autoencoder, ENCODE),
    "pooled": (pooled, "full"),
    "pooled, sparse": (pooled, {"train": [{"layer": "first", "weight": "all"}], "loss": "mse"}),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_loss_that_is_not_finite_is_found_before_anything_is_written(kind: str, tmp_path: Path) -> None:
    """NaN anywhere in the input, and numbers so large that the loss overflows."""
    graph, scheme = NETWORKS[kind]
    artifact = compile_graph(graph(), tmp_path, update_scheme=scheme)
    board = learned(artifact)
    before = board.save_state()
    samples = draw_samples(artifact.build, 1)
    y = None if samples.y is None else samples.y[0]
    for position in range(samples.x[0].size):
        x = samples.x[0].copy()
        x.reshape(-1)[position] = np.nan
        for step in (board.evaluate, board.train_step):
            assert name(step(x, y).status) == "NONFINITE", position
        assert board.save_state() == before
    train(board, 3, 4)


@pytest.mark.parametrize("rate", [np.nan, np.inf])
def test_a_rate_that_is_not_finite_is_found_before_anything_is_written(rate: float, artifact: Artifact) -> None:
    board = learned(artifact)
    before = board.save_state()
    samples = draw_samples(artifact.build, 1)
    y = None if samples.y is None else samples.y[0]
    board._call("set_learning_rate", ctypes.c_float(rate))  # Python would refuse it
    assert name(board.train_step(samples.x[0], y).status) == "NONFINITE"
    assert name(board.evaluate(samples.x[0], y).status) == "OK"
    assert board.save_state() == before
