"""What tte.compile gives: the same bytes everywhere, sizes of the linked program, names that never clash."""

import ctypes
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import networks
import numpy as np
import pytest
import torch
from elftools.elf.elffile import ELFFile
from torch import nn

import tte
from tte.artifact import _meet_budget
from tte.runner.toolchain import build_firmware, build_host, find_toolchains

BOARDS = ("cortex-m7", "cortex-m4", "cortex-m33", "cortex-m55", "stm32f746", "stm32h743", "stm32f446", "rp2040")
SCHEME = """\
train:
  - {layer: "*", bias: true}
  - {layer: "1", weight: {in_channels: 0.5, select: l2}, bias: true}
"""


class Net(nn.Sequential):
    """(1, 2, 8, 8) -> 3 classes, with everything that passes through sets and dictionaries of the compiler."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        tail = (nn.ReLU6(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3))
        super().__init__(nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), *tail)
        self.eval()


X = torch.zeros(1, 2, 8, 8)

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import test_artifact, tte
model, scheme, dumping = sys.argv[2:]
net = test_artifact.Net()
for kind, given, target in (("onnx", (model, None), "cortex-m7"), ("torch", (net, (test_artifact.X,)), "host")):
    made = tte.compile(*given, scheme, target, name="net", dump_ir=f"ir/{kind}")
    (made if dumping else tte.compile(*given, scheme, target, name="net")).export(f"out/{kind}")
"""


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_input_same_bytes(tmp_path: Path) -> None:
    """Two processes, two hash seeds, two folders; --dump-ir changes nothing of the project."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Net(), (X,), tmp_path / "net.onnx", dynamo=False)
    (tmp_path / "s.yaml").write_text(SCHEME)
    trees = []
    for seed, place, dumping in (("0", "a", ""), ("1", "b/deeper", "yes")):
        here = tmp_path / place
        here.mkdir(parents=True)
        model, scheme = (os.path.relpath(tmp_path / name, here) for name in ("net.onnx", "s.yaml"))
        command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), model, scheme, dumping]
        subprocess.run(command, cwd=here, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        trees.append(tree(here))
    assert trees[0] == trees[1]
    files = "report.json report.html model.npz weights.npz model.ir build.json manifest.json Core/Src/net_selftest.c"
    assert {f"out/{kind}/{file}" for kind in ("onnx", "torch") for file in files.split()} <= set(trees[0])
    assert sum(path.startswith("ir/torch/") for path in trees[0]) > 10
    places = (str(tmp_path), str(Path(__file__).parents[1]), "/tmp/", "/home/", "/usr/")
    for path, content in trees[0].items():
        assert not any(place.encode() in content for place in places), path
        assert not re.search(rb"\b20\d\d-\d\d-\d\d\b|\b\d\d:\d\d:\d\d\b", content), path


@pytest.fixture(scope="module")
def ir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network in tte's own text: no importer has to be started for it."""
    folder = tmp_path_factory.mktemp("ir")
    graph = networks.residual()
    (folder / "model.ir").write_text(str(graph))  # a model may well be called "model"
    np.savez(folder / "model.npz", **{c.name: c.data for c in graph.consts})
    return folder / "model.ir"


REPORT = {
    "": "schema_version tte_version model target scheme toolchain source memory flash_bytes flash infer train_step"
    " layers gradients",
    "memory": "arena_bytes lower_bound_bytes proved_optimal trained_bytes static_ram_bytes peak_tensors input_bytes",
    "flash": "code_bytes const_bytes initial_values_bytes",
    "infer": "arena_bytes stack_bytes instructions ms_estimate",
    "train_step": "arena_bytes stack_bytes instructions ms_estimate",
}


def test_artifact(ir: Path, tmp_path: Path) -> None:
    artifact = tte.compile(ir, update_scheme="last-layer", target="host")
    arena = artifact.report["memory"]["arena_bytes"]
    assert repr(artifact) == f"<tte.Artifact model for host: arena {arena:,} bytes, learns head>"
    assert artifact.graph.updates and artifact.plan.arena_bytes == artifact.report["memory"]["arena_bytes"]
    for part, keys in REPORT.items():
        assert set(keys.split()) <= set(artifact.report[part] if part else artifact.report), part
    assert artifact.report["gradients"] == ["head.weight", "head.bias"]
    assert artifact.report["model"] == "model"
    x, y = np.ones((4, 8, 8, 2), np.float32), np.arange(4)
    board = artifact.host()
    first = board.train_step(x[0], y[0])
    assert first.status == 0 and board.train_step(x[0], y[0]).loss < first.loss
    result = artifact.run({"x": x, "y": y}, runner="host", steps=3, evaluation={"x": x, "y": y})
    assert result.steps == 3 and result.accuracy_after is not None
    assert artifact.verify(steps=2)["ok"]

    out = tmp_path / "out"
    artifact.export(out)
    (out / "mine.c").write_text("int x;")
    assert json.loads((out / "report.json").read_text()) == artifact.report
    other = tte.compile(ir, update_scheme="bias-only", target="host", name="other")
    other.export(out)
    found = tree(out)
    assert found.pop("mine.c") == b"int x;" and "Core/Src/other.c" in found and "Core/Src/model.c" not in found
    other.export(tmp_path / "fresh")
    assert found == tree(tmp_path / "fresh")


def section_sizes(elf: Path) -> tuple[int, int, int, int]:
    """(RAM but for the stack, reserved stack, flash, flash by segments), from the flags of sections alone."""
    with elf.open("rb") as file:
        read = ELFFile(file)
        allocated = [s for s in read.iter_sections() if s["sh_flags"] & 2 and s["sh_size"]]
        stack = sum(s["sh_size"] for s in allocated if s.name == ".stack")
        ram = sum(s["sh_size"] for s in allocated if s["sh_flags"] & 1 or s["sh_type"] == "SHT_NOBITS")
        flash = sum(s["sh_size"] for s in allocated if s["sh_type"] != "SHT_NOBITS")
        return ram - stack, stack, flash, sum(s["p_filesz"] for s in read.iter_segments("PT_LOAD"))


@pytest.mark.skipif(not find_toolchains(), reason="no compiler for boards")
@pytest.mark.parametrize("target", BOARDS)
def test_sizes_are_those_of_the_linked_program(target: str, ir: Path) -> None:
    artifact = tte.compile(ir, update_scheme="last-layer", target=target)
    report = artifact.report
    ram, stack, flash, loaded = section_sizes(build_firmware(artifact.build, artifact.target).elf)
    assert report["source"] == "linked" and report["toolchain"].split()[0] in ("zig", "arm-none-eabi-gcc")
    assert report["flash_bytes"] == flash == sum(report["flash"].values())
    assert flash <= loaded < flash + 64  # and gaps for alignment
    measured = max(report[part]["stack_bytes"] or stack for part in ("infer", "train_step"))
    assert 0 < measured <= stack
    assert report["memory"]["static_ram_bytes"] == ram + measured
    planned = report["memory"]["arena_bytes"] + report["memory"]["trained_bytes"]
    assert planned <= ram < planned + 4096
    assert report["train_step"]["instructions"] > report["infer"]["instructions"] > 1000
    assert (report["train_step"]["ms_estimate"] is None) == (artifact.target.clock_hz is None)


def test_without_a_compiler_nothing_pretends(ir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tte.artifact.find_toolchains", lambda: [])
    report = tte.compile(ir, update_scheme="last-layer", target="stm32f746").report
    assert report["source"] == "planned" and report["toolchain"] is None
    assert report["flash"]["code_bytes"] is None
    for part in ("infer", "train_step"):
        assert report[part]["stack_bytes"] is report[part]["instructions"] is report[part]["ms_estimate"] is None
    memory = report["memory"]
    assert memory["static_ram_bytes"] == memory["arena_bytes"] + memory["trained_bytes"]


def test_without_a_compiler_for_this_computer_there_is_no_selftest(
    ir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tte.artifact.host_compiler", lambda: None)
    tte.compile(ir, update_scheme="last-layer", target="host", name="net").export(tmp_path / "p")
    texts = {f.name: f.read_text() for f in (tmp_path / "p").rglob("*") if f.suffix in (".c", ".h", ".txt")}
    assert "net_weights.c" in texts["CMakeLists.txt"] and "net_weights.c" in texts
    assert not any("selftest(void)" in text or "_selftest.c" in text for text in texts.values())


def symbols(elf: Path) -> set[str]:
    """Global symbols that a file defines."""
    with elf.open("rb") as file:
        table: Any = ELFFile(file).get_section_by_name(".symtab") or ELFFile(file).get_section_by_name(".dynsym")
        return {
            s.name
            for s in table.iter_symbols()
            if s["st_info"]["bind"] in ("STB_GLOBAL", "STB_WEAK") and s["st_shndx"] != "SHN_UNDEF"
        }


MAIN = """
#include "one.h"
#include "two.h"
#include <stdio.h>
int main(void) {
    static one_input_t x[ONE_INPUT_SIZE];
    static one_output_t y1[ONE_OUTPUT_SIZE];
    static two_output_t y2[TWO_OUTPUT_SIZE];
    one_result_t r1;
    two_result_t r2;
    const one_target_t label = 1;
    if (one_init() || two_init() || one_train_step(x, &label, &r1) || two_train_step(x, &label, &r2)) return 1;
    if (one_infer(x, y1) || two_infer(x, y2) || one_selftest() || two_selftest()) return 2;
    printf("%a %a", (double)r1.loss, (double)r2.loss);
    return 0;
}
"""


def test_two_models_in_one_program(ir: Path, tmp_path: Path) -> None:
    """The prefix is on every file, symbol and macro; both models live in one program, with their own state."""
    losses, objects, includes = [], [], []
    zig = [sys.executable, "-m", "ziglang", "cc", "-std=c99", "-O2", "-march=native"]
    for name, scheme in (("one", "full"), ("two", "last-layer")):
        artifact = tte.compile(ir, update_scheme=scheme, target="host", name=name)
        folder = tmp_path / name
        artifact.export(folder)
        for path in (folder / "Core").rglob("*"):
            assert path.is_dir() or path.name.startswith(name)
            for macro in re.findall(r"^\s*#\s*define\s+(\w+)", path.read_text() if path.suffix == ".h" else "", re.M):
                assert macro.startswith(f"{name.upper()}_"), (path, macro)
        includes.append(f"-I{folder / 'Core/Inc'}")
        for source in sorted((folder / "Core/Src").glob("*.c")):
            objects.append(tmp_path / f"{source.stem}.o")
            subprocess.run([*zig, includes[-1], "-c", source, "-o", objects[-1]], check=True)
            assert {s for s in symbols(objects[-1]) if not s.startswith(f"{name}_")} == set()
        losses.append(artifact.host().train_step(np.zeros((8, 8, 2), np.float32), np.asarray(1)).loss)
    (tmp_path / "main.c").write_text(MAIN)
    program = tmp_path / "main"
    subprocess.run([*zig, *includes, tmp_path / "main.c", *objects, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=True)
    assert [float.fromhex(word) for word in result.stdout.split()] == losses


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("net", "net"),
        ("My Net-2.v1", "my_net_2_v1"),
        ("2d", "m_2d"),
        ("é*", "m"),
        ("stdint", "m_stdint"),
        ("x" * 300, "x" * 64),
    ],
)
def test_names(given: str, name: str, ir: Path) -> None:
    artifact = tte.compile(ir, update_scheme="last-layer", target="host", name=given)
    assert artifact.report["model"] == name
    assert [f"begin with {name}: {given!r}" in note for note in artifact.compiled.notes] == [True] * (given != name)
    library = ctypes.CDLL(str(build_host(artifact.build)))
    assert library[f"{name}_init"]() == 0


@pytest.mark.skipif(not find_toolchains(), reason="no compiler for boards")
@pytest.mark.parametrize("name", ["model", "null"])
def test_names_of_macros(name: str, ir: Path) -> None:
    assert tte.compile(ir, update_scheme="last-layer", name=name).report["source"] == "linked"


@pytest.mark.parametrize(
    ("option", "code"),
    [
        ({"target": 5}, "TTE-E048"),
        ({"target": None}, "TTE-E048"),
        ({"name": 5}, "TTE-E044"),
        ({"name": ""}, "TTE-E044"),
        ({"arena": 5}, "TTE-E044"),
        ({"clock": "fast"}, "TTE-E044"),
        ({"clock": float("nan")}, "TTE-E044"),
        ({"clock": -216e6}, "TTE-E044"),
    ],
    ids=str,
)
def test_options_of_a_wrong_kind(option: dict[str, Any], code: str, ir: Path) -> None:
    with pytest.raises(tte.TTEError) as caught:
        tte.compile(ir, **option)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("linked", "budget", "board", "limits", "arena"),
    [
        (1000, 11_500, 64_000, [7404, 10_500], 10_000),  # less is linked than was reserved: nothing twice
        (1000, 14_096, 64_000, [10_000], 10_000),  # nothing is: nobody asks again
        (1000, 10_900, 64_000, [6804, 9900], 6804),  # the smallest plan that computes nothing twice does not fit
        (5000, 13_000, 64_000, [8904, 8000], 8000),  # more is linked
        (1000, 11_500, 10_000, [7404, 10_500], 7404),  # the board has less than the budget
    ],
)
def test_a_budget_is_what_is_linked(linked: int, budget: int, board: int, limits: list[int], arena: int) -> None:
    """Below 10,000 bytes of arena something is computed twice."""
    asked = []

    def make(reserved: int) -> Any:
        limit = budget - reserved
        asked.append(limit)
        arena = min(limit, 10_000)
        memory = {"arena_bytes": arena, "trained_bytes": 0, "static_ram_bytes": arena + linked}
        if arena + linked > board:
            raise tte.TTEError("TTE-E053", "RAM needs more")
        report = {"source": "linked", "memory": memory | {"extra_macs": 77 if arena < 10_000 else 0}}
        return SimpleNamespace(report=report)

    made = _meet_budget(make, budget)
    assert (asked, made.report["memory"]["arena_bytes"]) == (limits, arena)


@pytest.mark.parametrize("clock", ["216MHz", "0.216 GHz", "216000000", 216e6, 216_000_000])
def test_clocks(clock: str | float, ir: Path) -> None:
    assert tte.compile(ir, target="host", clock=clock).clock_hz == 216_000_000


HOSTILE = ('a*/b', 'a"b', "a\\", "??/", "a//b", "//* \\", "%s", "{{ x }}", "ä\u2028", "</svg><script>")  # fmt: skip


def test_layers_may_be_called_anything(tmp_path: Path) -> None:
    """The user's names end up in comments of C, in YAML and in HTML, and break none of them."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, stored = [], []
    for i, name in enumerate(HOSTILE):
        stored.append(numpy_helper.from_array(np.full((4, 4), 0.1 * i, np.float32), f"{name}.weight"))
        nodes.append(helper.make_node("Gemm", [f"v{i}", f"{name}.weight"], [f"v{i + 1}"], name=name))
    ends = [helper.make_tensor_value_info(v, TensorProto.FLOAT, [1, 4]) for v in ("v0", f"v{len(nodes)}")]
    graph = helper.make_graph(nodes, "*/", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    artifact = tte.compile(model, update_scheme="full", target="host")
    assert len(artifact.report["gradients"]) == len(HOSTILE)
    artifact.export(tmp_path / "out")
    assert artifact.host(selftest=True).selftest() == 0
    assert b"</svg><script>" not in tree(tmp_path / "out")["report.html"]
    again = tte.compile(model, update_scheme=tmp_path / "out" / "scheme.resolved.yaml", target="host")
    assert again.report["gradients"] == artifact.report["gradients"]
