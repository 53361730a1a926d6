"""What the generated code costs, to the byte and to the instruction, against what it cost before."""

import json
from pathlib import Path
from typing import Any

import mcunet_table
import mlperf
import networks
import numpy as np
import pytest
import torch
from data import import_published, load_module
from models import load_networks

import tte

FILE = Path(__file__).with_name("baseline.json")
DIGITS = FILE.parents[1] / "examples" / "digits" / "demo.py"
Model = tuple[Any, tuple[torch.Tensor, ...] | None]


def residual(folder: Path) -> Model:
    """A network in tte's own text, its weights beside it."""
    graph = networks.residual()
    (folder / "net.ir").write_text(str(graph))
    np.savez(folder / "net.npz", **{c.name: c.data for c in graph.consts})
    return folder / "net.ir", None


def digits(folder: Path) -> Model:
    """The network of the example, not trained."""
    demo = load_module(DIGITS)
    torch.manual_seed(0)
    return demo.Digits().eval(), (torch.zeros(1, 1, 8, 8),)


SPARSE = {
    "residual": {"train": [{"layer": "{a,b}", "weight": {"in_channels": 0.5}, "bias": True}]},
    "digits": DIGITS.with_name("sparse.yaml"),
}
SMALL = [(name, scheme, "stm32f746") for name in SPARSE for scheme in ("full", "bias-only", "sparse")]
LARGE = [("resnet8", scheme, "cortex-m7") for scheme in ("full", "last-k:3", "sparse", "bias-only", "last-layer")]


def costs(artifact: tte.Artifact) -> dict[str, Any]:
    """Of the firmware by zig, which is preferred wherever it is installed: "toolchain" is compared like the rest."""
    report = artifact.report
    return {
        "toolchain": report["toolchain"],
        "instructions_per_step": report["train_step"]["instructions"],
        "instructions_per_inference": report["infer"]["instructions"],
        "arena_bytes": report["memory"]["arena_bytes"],
        "static_ram_bytes": report["memory"]["static_ram_bytes"],
        "flash_bytes": report["flash_bytes"],
        "trained_bytes": report["memory"]["trained_bytes"],
    }


def compare(pair: str, new: dict[str, Any], update: bool, file: Path = FILE) -> None:
    """Fails where ``new`` is not what the file says; with ``update`` writes it there."""
    known = json.loads(file.read_text()) if file.exists() else {}
    if update:
        file.write_text(json.dumps(dict(sorted((known | {pair: new}).items())), indent=2) + "\n")
        return
    old = known.get(pair, {})
    changed = [f"{key}: {old.get(key)} -> {value}" for key, value in new.items() if old.get(key) != value]
    if changed:
        lines = "\n  ".join(changed)
        pytest.fail(f"{pair}\n  {lines}\nrun `make golden` and state the reason in the change", pytrace=False)


@pytest.mark.parametrize(("name", "scheme", "target"), [*SMALL, ("digits", "sparse", "cortex-m4")])
def test_small_networks(name: str, scheme: str, target: str, tmp_path: Path, update_golden: bool) -> None:
    model, example = {"residual": residual, "digits": digits}[name](tmp_path)
    artifact = tte.compile(model, example, SPARSE[name] if scheme == "sparse" else scheme, target, name)
    compare(f"{name} {scheme} {target}", costs(artifact), update_golden)


@pytest.mark.parametrize(("name", "scheme", "target"), LARGE)
def test_real_networks(name: str, scheme: str, target: str, pack: Path, update_golden: bool) -> None:
    network = next(n for n in load_networks() if n.name == name)
    artifact = tte.compile(network.model, network.example, network.scheme(scheme), target, name)
    compare(f"{name} {scheme} {target}", costs(artifact), update_golden)


@pytest.mark.parametrize("name", mlperf.SHAPES)
def test_inference_in_integers(name: str, tmp_path: Path, update_golden: bool) -> None:
    """The networks of MLPerf Tiny, which take as many multiply-accumulates as is published."""
    artifact = mlperf.compile_int8(name, tmp_path)
    infer = next(program.graph for program in artifact.compiled.programs if program.role == "infer")
    assert sum(node.macs for node in infer.nodes) == mlperf.SHAPES[name].macs
    compare(f"{name} int8 cortex-m7", costs(artifact), update_golden)


def test_published_model_learns_on_its_board(pack: Path, update_golden: bool) -> None:
    """MCUNet on an STM32F746, whose memory map the linker keeps to: the same weights as here; they tell kinds apart."""
    artifact = mcunet_table.compile_for_board("mcunet-5fps-49kb", import_published("mcunet-5fps", mcunet_table.CLASSES))
    compare("mcunet-5fps 49kb stm32f746", costs(artifact), update_golden)
    flowers = mcunet_table.pick_pictures(3)
    there, here = (artifact.run(flowers, runner=runner, steps=2) for runner in ("unicorn", "host"))
    assert there.weights_sha256 == here.weights_sha256 and there.loss == here.loss
    learned = artifact.run(flowers, evaluation=flowers, runner="host", epochs=5)
    assert learned.metric["before"] < 0.6 and learned.metric["after"] == 1.0


def test_a_difference_is_shown_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    compare("a", {"flash_bytes": 1, "arena_bytes": 2}, True, file)
    compare("b", {"flash_bytes": 5}, True, file)
    compare("a", {"flash_bytes": 1, "arena_bytes": 2}, False, file)
    with pytest.raises(pytest.fail.Exception, match=r"a\n  arena_bytes: 2 -> 3\nrun `make golden` and state"):
        compare("a", {"flash_bytes": 1, "arena_bytes": 3}, False, file)
    with pytest.raises(pytest.fail.Exception, match="flash_bytes: None -> 1"):
        compare("new", {"flash_bytes": 1}, False, file)
