"""The command line: what it says, where it says it, and with which exit status."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import networks
import numpy as np
import pytest
from typer.testing import CliRunner

import tte
from tte.artifact import Artifact
from tte.cli import app, main
from tte.weights import require_writable

COMMANDS = (
    "analyze",
    "compile",
    "run",
    "bench",
    "verify",
    "state",
    "ops",
    "targets",
    "tune",
    "merge-schedules",
    "serve",
)


def spawn(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "tte.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def call(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has imported everything already."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["tte", *map(str, arguments)])
        if cwd:
            patch.chdir(cwd)
        with pytest.raises(SystemExit) as end:
            main()
    return subprocess.CompletedProcess(arguments, end.value.code or 0, out.getvalue(), err.getvalue())


def test_help_is_fast_because_it_imports_nothing_heavy() -> None:
    program = "import sys, tte.cli\ntry: tte.cli.app(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *text, modules = result.stdout.splitlines()
    assert not {"numpy", "torch", "tvm", "onnx", "ortools", "pydantic", "jinja2"} & set(modules.split())
    assert all(any(f" {command} " in line for line in text) for command in COMMANDS)


def succeed(*arguments: object) -> str:
    result = call(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_speaks_json(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], terminal_width=200)
    assert result.exit_code == 0
    assert "--json" in result.stdout or command == "serve"  # which prints nothing but where it is


def test_ops_lists_every_operator() -> None:
    import tte.ops  # noqa: F401  fills the table
    from tte.ir import OPS

    rows = json.loads(call("ops", "--json").stdout)["ops"]
    assert [row["name"] for row in rows] == sorted(OPS)
    assert next(row for row in rows if row["name"] == "nn.conv2d")["differentiable"] is True
    root = Path(__file__).parent.parent
    imports = "".join((root / file).read_text() for file in ("frontends/lower.py", "passes/canonicalize.py"))
    imported = {row["name"] for row in rows if f'"{row["name"]}"' in imports}
    assert {row["name"] for row in rows if row["use"] == "model"} == imported - {"cast"}  # named, not imported
    assert {row["name"] for row in rows if row["use"] == "loss"} >= {"nn.mse", "nn.cross_entropy"}
    assert "nn.conv2d_weight_grad" in call("ops").stdout


def test_targets_lists_boards_with_their_memories() -> None:
    rows = {row["name"]: row for row in json.loads(call("targets", "--json").stdout)["targets"]}
    assert {"cortex-m7", "cortex-m4", "cortex-m33", "stm32f746", "stm32h743", "stm32f446", "host"} <= set(rows)
    assert "stm32f746" in call("targets").stdout


@pytest.mark.parametrize("command", [("analyze",), ("compile", "-o", "out"), ("verify",)])
def test_a_mistake_is_three_lines_on_stderr(tmp_path: Path, command: tuple[str, ...]) -> None:
    result = call(command[0], "missing.onnx", *command[1:], cwd=tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    what, where, fix = result.stderr.splitlines()
    assert what.startswith("error[TTE-E02")
    assert "missing.onnx" in where
    assert fix.strip().startswith("fix:")
    assert not list(tmp_path.iterdir())


def onnx_model(path: Path) -> Path:
    import onnx
    import torch

    torch.onnx.export(torch.nn.Linear(3, 2), (torch.zeros(1, 3),), path, dynamo=False)
    external = onnx.load(path)
    onnx.save(external, path, save_as_external_data=True, location="w.data", size_threshold=0)
    return path


NO_MODELS = {
    "folder": (lambda path: path.mkdir(), "a folder is not a model"),
    "empty.onnx": (lambda path: path.touch(), "it holds no graph"),
    "empty.pt2": (lambda path: path.touch(), "exported program"),
    "weights.pt": (lambda path: path.touch(), "torch.export.save"),
    "lost.onnx": (lambda path: onnx_model(path).with_name("w.data").unlink(), "w.data, which is not there"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("name", "make", "text"), [(name, *rest) for name, rest in NO_MODELS.items()], ids=NO_MODELS)
def test_what_is_no_model(name: str, make: Callable[[Path], object], text: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    result = call("analyze", tmp_path / name)
    what, where, fix = result.stderr.splitlines()
    assert result.returncode == 1 and "TTE-E020" in what and name in where and text in what + fix


def test_example_inputs() -> None:
    import torch

    module, x = torch.nn.Linear(3, 2).eval(), torch.zeros(1, 3)
    for given in (x, x.numpy(), [x], (x,)):
        assert tte.analyze(module, given).layers[0].shape == (1, 2)
    for wrong in ("x", {"x": x}, (1, 3), ()):
        with pytest.raises(tte.TTEError) as caught:
            tte.analyze(module, wrong)
        assert caught.value.code == "TTE-E021" and "example_inputs=(x,)" in caught.value.fix


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network in tte's own text, its weights beside it, and some data."""
    folder = tmp_path_factory.mktemp("model")
    graph = networks.residual()
    (folder / "net.ir").write_text(str(graph))
    np.savez(folder / "net.npz", **{c.name: c.data for c in graph.consts})
    rng = np.random.default_rng(0)
    np.savez(folder / "data.npz", x=rng.standard_normal((6, 8, 8, 2)).astype(np.float32), y=np.arange(6) % 5)
    return folder / "net.ir"


def test_from_model_to_trained_weights(model: Path, tmp_path: Path) -> None:
    """analyze -> scheme -> compile -> run -> state; the first as a user types it."""
    scheme, build, saved = tmp_path / "scheme.yaml", tmp_path / "build", tmp_path / "weights.npz"
    analyzed = spawn("analyze", model, "--write-scheme", scheme, "--json")
    assert analyzed.returncode == 0, analyzed.stderr
    analysis = json.loads(analyzed.stdout)
    assert [row["name"] for row in analysis["layers"]] == ["stem", "a", "b", "depthwise", "narrow", "head"]
    text = succeed("compile", model, "--update-scheme", scheme, "--target", "stm32f746", "-o", build)
    assert "head" in text and "proved optimal" in text
    report = json.loads((build / "report.json").read_text())
    assert report["gradients"] == ["head.weight", "head.bias"]
    data = model.parent / "data.npz"
    arguments = ("run", build, "--data", data, "--eval", data, "--host", "--epochs", "2", "--save", saved)
    result = json.loads(succeed(*arguments, "--json"))
    assert result["steps"] == len(result["loss"]) == 12
    assert 0.0 <= result["accuracy_after"] <= 1.0
    with np.load(model.with_suffix(".npz")) as before, np.load(saved) as after:
        assert sorted(after.files) == ["head.bias", "head.weight"]
        assert not np.array_equal(before["head.weight"], after["head.weight"])
    blob = tmp_path / "state.bin"
    blob.write_bytes(b"TTES")
    assert "TTE-E060" in call("state", blob, "--build", build, "-o", saved).stderr
    assert "TTE-E060" in call("state", tmp_path / "nothing", "--build", build, "-o", saved).stderr


def test_a_scheme_that_is_there_is_not_overwritten(model: Path, tmp_path: Path) -> None:
    scheme = tmp_path / "scheme.yaml"
    scheme.write_text("mine")
    result = CliRunner().invoke(app, ["analyze", str(model), "--write-scheme", str(scheme)])
    assert isinstance(result.exception, tte.TTEError) and result.exception.code == "TTE-E045"
    assert scheme.read_text() == "mine" and "layer" not in result.stdout


def test_a_wrong_head_is_named_with_its_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("train: full\nhead:\n  classes: 3\n  layer: heat\n")
    with pytest.raises(tte.TTEError) as caught:
        tte.compile(model, update_scheme=tmp_path / "s.yaml")
    assert caught.value.where.endswith("s.yaml:4, head.layer") and "did you mean head?" in caught.value.fix


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("loss:\n  name: cross_entropy\n  class_weights: [1.0, 2.0]\n", "4, loss.class_weights", "2 class weights for"),
        ("loss: mse\nio:\n  target: input\n", "4, io.target", "needs an output like the input"),
        ("io:\n  input:\n    layout: nlc\n", "4, io.input.layout", "which is not nlc"),
        ("budget:\n  flash: 1MB\n  sram: 1KB\n", "4, budget.sram; at the peak: ", "of sram are needed"),
        ("budget:\n  sram: 1MB\n  flash: 1KB\n", "4, budget.flash; weights", "of flash are needed"),
    ],
)
def test_what_does_not_fit_the_model_is_named_with_its_line(
    text: str, place: str, said: str, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "s.yaml").write_text(f"train: full\n{text}")
    with pytest.raises(tte.TTEError, match=said) as caught:
        tte.compile(model, update_scheme=tmp_path / "s.yaml", target="host")
    assert f"s.yaml:{place}" in caught.value.where


def test_compile_prints_the_report_as_json(model: Path, tmp_path: Path) -> None:
    out = succeed("compile", model, "-u", "bias-only", "-t", "host", "-o", tmp_path / "b", "--json")
    assert json.loads(out) == json.loads((tmp_path / "b" / "report.json").read_text())


def test_memory_of_the_caller_changes_no_bit(model: Path, tmp_path: Path) -> None:
    hashes, bytes_ = set(), {}
    for arena, place in (("static", "caller"), ("extern", "caller"), ("extern", "arena")):
        build = tmp_path / f"{arena}-{place}"
        report = succeed("compile", model, "-t", "host", "-o", build, "--arena", arena, "--input", place, "--json")
        bytes_[place] = json.loads(report)["memory"]["arena_bytes"]
        arguments = ("run", build, "--data", model.parent / "data.npz", "--host", "--json")
        hashes.add(json.loads(succeed(*arguments))["weights_sha256"])
    assert len(hashes) == 1
    assert "void *arena" in (tmp_path / "extern-caller/Core/Inc/net.h").read_text()
    assert "net_input_t *net_input(void);" in (tmp_path / "extern-arena/Core/Inc/net.h").read_text()
    assert bytes_["caller"] < bytes_["arena"] <= bytes_["caller"] + 8 * 8 * 2 * 4
    refused = call("compile", model, "-o", tmp_path / "x", "--input", "heap")
    assert "TTE-E044" in refused.stderr and not (tmp_path / "x").exists()


def test_verify_exits_with_1_beyond_the_tolerance(model: Path) -> None:
    proof = json.loads(succeed("verify", model, "-u", "last-layer", "--steps", 2, "--json"))
    assert proof["ok"] and {row["name"] for row in proof["tensors"]} == {"head.weight", "head.bias"}
    strict = call("verify", model, "-u", "last-layer", "--steps", 2, "--tolerance", 1e-12)
    assert strict.returncode == 1
    assert "head.weight" in strict.stdout and strict.stderr == ""


def test_passes_can_be_left_out_and_dumped(model: Path, tmp_path: Path) -> None:
    arguments = ("compile", model, "-u", "full", "-t", "host", "--json", "--dump-ir", tmp_path / "ir")
    plain = json.loads(succeed(*arguments, "-o", tmp_path / "a"))
    names = sorted(path.name for path in (tmp_path / "ir").iterdir())
    bare = json.loads(succeed(*arguments, "-o", tmp_path / "b", "--disable-pass", "work_in_place"))
    assert bare["memory"]["arena_bytes"] > plain["memory"]["arena_bytes"]
    assert any("work_in_place" in name for name in names)
    assert "TTE-E044" in call("compile", model, "-o", tmp_path / "c", "--disable-pass", "nothing").stderr


def test_our_own_bugs_are_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    import tte.ops  # noqa: F401
    from tte.ir import OPS

    monkeypatch.setitem(OPS, "broken", None)
    result = CliRunner().invoke(app, ["ops"])
    assert isinstance(result.exception, AttributeError)


USAGE = {
    "bogus": ("no such command 'bogus'", "tte --help"),
    "run": ("missing argument 'build'", "tte run --help"),
    "run b": ("missing option '--data'", "tte run --help"),
    "run b --data d --fooo": ("no such option: --fooo", "tte run --help"),
    "run b --data d --epochs 0": ("'--epochs'", "tte run --help"),
    "run b --data d --seed -1": ("'--seed'", "tte run --help"),
    "tune m --seed -1": ("'--seed'", "tte tune --help"),
    "run b --data d --host --emulator qemu": ("without an emulator", "one of them"),
}


@pytest.mark.parametrize(("line", "texts"), USAGE.items(), ids=USAGE)
def test_usage_errors_are_three_lines_too(
    line: str, texts: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tte", *line.split()])
    with pytest.raises(SystemExit) as caught:
        main()
    what, where, fix = capsys.readouterr().err.splitlines()
    assert caught.value.code == 1 and what.startswith("error[TTE-E059]")
    assert texts[0] in what.lower() and where.startswith("  where: ") and texts[1] in fix


@pytest.mark.parametrize(("line", "text"), [("--version", f"tte {tte.__version__}\n"), ("", "Usage: ")])
def test_without_a_command(
    line: str, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tte", *line.split()])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code and text in capsys.readouterr().out


def test_epochs_and_steps_exclude_each_other() -> None:
    result = call("run", "build", "--data", "d.npz", "--epochs", "1", "--steps", "2")
    assert result.returncode == 1
    assert "TTE-E059" in result.stderr


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"steps": -1}, {"epochs": 0}, {"epochs": 1, "steps": 1}, {"seed": -1}], ids=str
)
def test_numbers_out_of_range_are_refused(options: dict[str, int], model: Path) -> None:
    artifact = tte.compile(model, update_scheme="last-layer", target="host")
    with pytest.raises(tte.TTEError) as caught:
        artifact.run(model.parent / "data.npz", runner="host", **options)
    assert caught.value.code == "TTE-E059"


@pytest.mark.parametrize("place", ["no/w.npz", "file/w.npz", "folder.npz", "w.txt"])
def test_a_place_for_the_weights_is_found_before_training(place: str, tmp_path: Path) -> None:
    """There is not even a project: the first thing that is looked at is the place."""
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").write_text("in the way")
    arguments = ["run", str(tmp_path / "build"), "--data", "d.npz", "--save", str(tmp_path / place)]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, tte.TTEError) and result.exception.code == "TTE-E062"
    require_writable(tmp_path / "file")
    require_writable(tmp_path / "new")


SAMPLES = np.zeros((4, 8, 8, 2), np.float32)
LABELS = np.arange(4)
MISFITS = {
    "other axes": (SAMPLES.transpose(0, 3, 1, 2), LABELS, "transpose x"),
    "flat": (SAMPLES.reshape(4, -1), LABELS, "reshape x to (-1, 8, 8, 2)"),
    "one sample": (SAMPLES[0], LABELS[:1], "x[None]"),
    "another size": (SAMPLES[:, 1:], LABELS, "samples of 128 elements, not 112"),
    "a number": (np.float32(1), LABELS, "samples of 128"),
    "no samples": (SAMPLES[:0], LABELS[:0], "at least one"),
    "one-hot": (SAMPLES, np.eye(5)[:4], "argmax"),
    "too few labels": (SAMPLES, LABELS[:3], "one target per sample"),
    "one label": (SAMPLES, np.int64(1), "one target per sample"),
    "labels as floats": (SAMPLES, LABELS / 2, "integers"),
}


@pytest.fixture(scope="module")
def head_only(model: Path) -> Artifact:
    return tte.compile(model, update_scheme="last-layer", target="host")


@pytest.mark.parametrize(("x", "y", "fix"), MISFITS.values(), ids=MISFITS)
def test_data_that_do_not_fit_are_told_what_to_do(head_only: Artifact, x: np.ndarray, y: np.ndarray, fix: str) -> None:
    with pytest.raises(tte.TTEError) as caught:
        head_only.run({"x": x, "y": y}, runner="host")
    assert caught.value.code == "TTE-E057" and fix in caught.value.fix


@pytest.mark.parametrize("rate", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_learning_rate_is_a_number_above_0(head_only: Artifact, rate: float) -> None:
    with pytest.raises(tte.TTEError, match="learning rate") as caught:
        head_only.run({"x": SAMPLES, "y": LABELS}, runner="host", rate=rate)
    assert caught.value.code == "TTE-E059"


def test_missing_data_are_missing(head_only: Artifact, tmp_path: Path) -> None:
    with pytest.raises(tte.TTEError, match="no such file") as caught:
        head_only.run(tmp_path / "d.npz", runner="host")
    assert "check the path" in caught.value.fix
