"""Every core and every board, with every compiler, on every emulator that knows it: the bits of the host."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import networks
import numpy as np
import onnx
import pytest
import torch
from data import load_module
from test_runner import break_step, start, train, write_model

import tte
from tte.artifact import Artifact
from tte.cli import main
from tte.codegen.schedule import schedule
from tte.errors import TTEError
from tte.ir import TensorType, Value
from tte.ir.rows import expand
from tte.ops.rules import computes_floats
from tte.runner import Board, open_host
from tte.runner.qemu import find_qemu
from tte.runner.toolchain import build_firmware, find_toolchains
from tte.target import CORTEX_M0PLUS, CORTEX_M7, CORTEX_M55, TARGETS, Target, find_target

# One process, so that zig makes its library for floats once.
pytestmark = pytest.mark.xdist_group("boards")
if not find_toolchains() or not importlib.util.find_spec("unicorn"):
    pytest.skip("no compiler or emulator: pip install 'tte[emulate]'", allow_module_level=True)

RUNTIME = Path(tte.__file__).parent / "runtime_c"
DIGITS = Path(__file__).parents[1] / "examples" / "digits" / "demo.py"
DEVICES = [t for t in TARGETS.values() if t.machine]
PLACES = [(t.name, f"{emulator}-{tool}") for t in DEVICES for emulator in t.emulators for tool in ("zig", "gcc")]
SCHEME = {
    "train": [
        {"layer": "block.conv2", "weight": {"in_channels": 0.5}, "bias": True},
        {"layer": "fc", "weight": "all", "bias": True},
    ],
}


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network of the example, not trained, as `tte quantize` makes integers of it; with an int8 head beside it."""
    folder = tmp_path_factory.mktemp("digits")
    demo = load_module(DIGITS)
    torch.manual_seed(0)
    calibration = {"x": demo.load(0)[0]["x"][:32]}
    for name in ("digits", "int8"):
        tte.quantize(demo.Digits(8).eval(), calibration, folder / f"{name}.onnx", int8_head=name == "int8")
    return folder


@pytest.fixture(scope="module")
def compiled(digits: Path) -> Callable[[str], tuple[Artifact, dict[str, object]]]:
    """The project of a core and what it computes on this computer. Its boards differ in memory alone."""

    @cache
    def compile_for(cpu: str) -> tuple[Artifact, dict[str, object]]:
        artifact = tte.compile(digits / "digits.onnx", update_scheme=SCHEME, target=cpu)
        return artifact, train(open_host(artifact.build), steps=2)

    return compile_for


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_the_same_bits_on_every_board(compiled, name: str, place: str) -> None:  # type: ignore[no-untyped-def]
    artifact, expected = compiled(find_target(name).cpu)
    board = start(replace(artifact.build, target_name=name), place)
    try:
        assert train(board, steps=2) == expected
        assert board.selftest() == 0
    finally:
        board.close()
    assert len(set(expected["loss"])) == 2


def test_a_board_is_its_core_with_another_memory() -> None:
    for board in (t for t in DEVICES if t.board):
        core = find_target(board.cpu)
        assert (board.dsp, board.fpu, board.machine) == (core.dsp, core.fpu, core.machine), board.name
        assert board.clock_hz


def test_digits_learn_on_a_core_without_fpu(digits: Path, tmp_path: Path, capsys, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """From the command line; every digit that was never seen is told from the others."""
    demo = load_module(DIGITS)
    data, held_back = demo.load(5)
    np.savez(tmp_path / "train.npz", x=data["x"][:60], y=data["y"][:60])
    np.savez(tmp_path / "eval.npz", x=held_back["x"][:30], y=held_back["y"][:30])
    (tmp_path / "scheme.yaml").write_text("{train: last-layer, optimizer: {name: sgd, lr: 0.1}}")
    run_command = f"tte run {tmp_path}/out --data {tmp_path}/train.npz --eval {tmp_path}/eval.npz --json"
    commands = [f"tte compile {digits}/digits.onnx -u {tmp_path}/scheme.yaml -t rp2040 -o {tmp_path}/out"]
    texts = []
    for command in [*commands, run_command, f"{run_command} --host"]:
        monkeypatch.setattr(sys, "argv", command.split())
        with pytest.raises(SystemExit) as caught:
            main()
        assert not caught.value.code
        texts.append(capsys.readouterr().out)
    assert "note: rp2040 has no FPU and computes floats in software" in texts[0]
    there, here = map(json.loads, texts[1:])
    assert (there["runner"], here["runner"]) == ("unicorn", "host")
    assert there["weights_sha256"] == here["weights_sha256"] and there["loss"] == here["loss"]
    assert there["metric"]["after"] > there["metric"]["before"] + 0.2


FLOAT = re.compile("__aeabi_(f|i2f|ui2f|l2f|ul2f|d)|__(add|sub|mul|div|lt|le|gt|ge|eq|ne|unord)sf|__fix|__float|fmaf")


def find_calls(objects: list[Path]) -> dict[str, set[str]]:
    """What each function of the objects refers to, and what that refers to in turn."""
    from elftools.elf.elffile import ELFFile

    found: dict[str, set[str]] = {}
    for path in objects:
        with path.open("rb") as file:
            elf = ELFFile(file)
            symbols = elf.get_section_by_name(".symtab")
            for section in elf.iter_sections("SHT_REL"):
                targets = (symbols.get_symbol(r["r_info_sym"]) for r in section.iter_relocations())
                names = {s.name or elf.get_section(s["st_shndx"]).name for s in targets if s["st_shndx"] != "SHN_ABS"}
                found[section.name.removeprefix(".rel.text.")] = {n.removeprefix(".text.") for n in names}
    while True:
        wider = {f: calls.union(*(found.get(c, set()) for c in calls)) for f, calls in found.items()}
        if wider == found:
            return found
        found = wider


@pytest.mark.parametrize(
    ("requantize", "toolchain"), [("fixed", "zig"), ("fixed", "gcc"), ("tflite", "zig"), ("float", "zig")]
)
def test_an_int8_forward_is_of_integers(digits: Path, requantize: str, toolchain: str) -> None:
    """All but its two ends, which are float32. What objects ask a library for is what is said to compute floats."""
    if toolchain not in find_toolchains():
        pytest.skip(f"{toolchain} is not installed")
    scheme = {"train": "last-layer", "quantized": {"requantize": requantize}}
    artifact = tte.compile(digits / "int8.onnx", update_scheme=scheme, target="cortex-m0plus", name="net")
    infer = next(p for p in artifact.compiled.programs if p.role == "infer")
    elf = build_firmware(artifact.build, CORTEX_M0PLUS, toolchain).elf
    calls = find_calls(list(elf.parent.glob("net_kernels-*.o")))
    text = (
        (artifact.build.folder / "Core/Src/net.c").read_text().partition("static int run_infer")[2].partition("\n}")[0]
    )
    asked = [{name for name in calls.get(k, ()) if FLOAT.match(name)} for k in re.findall(r"    (net_k\w+)\(", text)]
    nodes = [infer.graph.nodes[call.node] for call in schedule(infer.graph, infer.room)]
    assert [bool(names) for names in asked] == [any(map(computes_floats, expand(node))) for node in nodes]
    if requantize == "float":
        assert all(asked)
    else:
        assert len(asked) >= 4 and not any(asked[1:-1])
        assert asked[-1] == {"__aeabi_i2f", "__aeabi_fmul"}  # the scores become float32
