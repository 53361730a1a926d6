"""The command line: what it says, where it says it, and with which exit status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tte.cli import app

COMMANDS = ("analyze", "compile", "run", "verify", "state", "ops", "targets")


def call(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "tte.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_help_is_fast_because_it_imports_nothing_heavy() -> None:
    program = "import sys, tte.cli\ntry: tte.cli.app(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *text, modules = result.stdout.splitlines()
    assert not {"numpy", "torch", "tvm", "onnx", "ortools", "pydantic", "jinja2"} & set(modules.split())
    assert all(any(f" {command} " in line for line in text) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_speaks_json(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], terminal_width=200)
    assert result.exit_code == 0
    assert "--json" in result.stdout


def test_ops_lists_every_operator() -> None:
    import tte.ops  # noqa: F401  fills the table
    from tte.ir import OPS

    rows = json.loads(call("ops", "--json").stdout)["ops"]
    assert [row["name"] for row in rows] == sorted(OPS)
    assert next(row for row in rows if row["name"] == "nn.conv2d")["differentiable"] is True
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


def test_our_own_bugs_are_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    import tte.ops  # noqa: F401
    from tte.ir import OPS

    monkeypatch.setitem(OPS, "broken", None)
    result = CliRunner().invoke(app, ["ops"])
    assert isinstance(result.exception, AttributeError)


def test_epochs_and_steps_exclude_each_other() -> None:
    result = call("run", "build", "--data", "d.npz", "--epochs", "1", "--steps", "2")
    assert result.returncode == 1
    assert "TTE-E059" in result.stderr
