"""Real networks: as their authors meant them, the same from both frontends, trained as PyTorch trains them."""

import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from data import load_module
from models import Network, export_onnx, load_networks

import tte
from tte.codegen.plan import find_pairs, plan_memory
from tte.compiler import SHRINK, lower
from tte.frontends import import_model
from tte.ir import Graph
from tte.passes.optimizer import attach_sgd
from tte.passes.reorder import reorder

FROM_TORCH = ("resnet20", "resnet8", "mobilenet", "dscnn", "autoencoder")
NETWORKS = ("mnist14", *FROM_TORCH)
SCHEMES = ("full", "bias-only", "last-layer", "sparse")


@pytest.fixture(scope="module")
def known(pack: Path) -> dict[str, Network]:
    networks = {n.name: n for n in load_networks()}
    assert tuple(networks) == NETWORKS
    return networks


def run_torch(network: Network, x: np.ndarray) -> np.ndarray:
    assert isinstance(network.model, torch.nn.Module)
    with torch.no_grad():
        return np.concatenate([network.model(torch.from_numpy(row[None])).numpy() for row in x])


@pytest.mark.parametrize(
    ("name", "stem"), [("resnet8", "mlperf-resnet8-cifar10"), ("mobilenet", "imagenet-mobilenetv1-025-128")]
)
def test_networks_from_keras_compute_what_the_reference_computes(
    name: str, stem: str, known: dict[str, Network], pack: Path
) -> None:
    reference = load_module(pack / "reference" / "kerasnet.py")
    x = known[name].samples(3)["x"]
    theirs = reference.run(str(pack / "models" / stem), x)
    assert np.linalg.norm(run_torch(known[name], x) - theirs) <= 1e-5 * np.linalg.norm(theirs)


def test_resnet20_classifies_as_well_as_its_authors_say(known: dict[str, Network]) -> None:
    """81.4 % on 2500 pictures of the pack; a wrong shortcut or normalisation costs tens of points."""
    data = known["resnet20"].samples(200)
    right = run_torch(known["resnet20"], data["x"]).argmax(1) == data["y"]
    assert right.mean() > 0.75


@pytest.mark.filterwarnings("ignore:Constant folding", "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", FROM_TORCH)
def test_both_frontends_bring_the_same_program(name: str, known: dict[str, Network], tmp_path: Path) -> None:
    network = known[name]
    from_torch = lower(network.model, network.example)
    from_onnx = lower(export_onnx(network, tmp_path / "model.onnx"))
    assert str(from_onnx) == str(from_torch)
    for a, b in zip(from_onnx.consts, from_torch.consts, strict=True):
        assert np.array_equal(a.data, b.data), a.name


@cache
def imported(name: str) -> Graph:
    network = next(n for n in load_networks() if n.name == name)
    return import_model(network.model, network.example)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", NETWORKS)
def test_trains_as_pytorch_does_in_the_least_memory(
    name: str, scheme: str, known: dict[str, Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = known[name]
    # All schemes learn on one import, which takes as long as all the rest.
    monkeypatch.setattr("tte.compiler.import_model", lambda *_: imported(name))
    artifact = tte.compile(network.model, network.example, network.scheme(scheme), name=name)
    for program in artifact.compiled.programs:
        plan = program.plan
        assert plan.proved, program.role
        # Only where results are written over operands may the least arena be larger than what is alive at one node.
        over = find_pairs(program.graph, program.graph.owners(), plan.buffers)
        assert plan.arena_bytes == plan.lower_bound or over, program.role
    proof = artifact.verify(steps=10, data=network.samples(5), tolerance=1e-4)
    assert proof["tensors"] and len(proof["losses"]["torch"]) == 10
    assert proof["ok"], (proof["loss_error"], [row for row in proof["tensors"] if not row["ok"]])


def test_planning_resnet20_takes_less_than_a_second(known: dict[str, Network]) -> None:
    network = known["resnet20"]
    artifact = tte.compile(network.model, network.example, network.scheme("full"))
    graph = attach_sgd(artifact.compiled.gradients, network.rate)
    position = SHRINK.index(reorder)
    for apply in SHRINK[:position]:
        graph = apply(graph)
    start = time.process_time()
    for apply in SHRINK[position:]:
        graph = apply(graph)
    plan = plan_memory(graph)
    seconds = time.process_time() - start
    assert plan.arena_bytes == artifact.plan.arena_bytes
    assert seconds < 1
