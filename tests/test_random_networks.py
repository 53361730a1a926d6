"""Random networks and schemes: the generated C trains as torch.optim.SGD does, written down here in a few lines."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_networks import Network, draw_scheme
from torch import nn

import tte
from tte.compiler import lower
from tte.runner.board import unpack_state
from tte.weights import export_weights

pytestmark = pytest.mark.usefixtures("import_once")
torch.set_num_threads(1)
STEPS = 4


@pytest.mark.parametrize("seed", range(16))
def test_training_is_that_of_torch(seed: int) -> None:
    network = Network(seed)
    example = (torch.zeros(network.shape),)
    scheme = draw_scheme(lower(network, example), seed, network.classes)
    disabled = ("fuse_elementwise", "work_in_place", "reorder", "fuse_updates")[seed % 4 :][: seed % 2]
    artifact = tte.compile(network, example, scheme, target="host", disable_passes=disabled)
    params = [p for p, _ in artifact.compiled.train.graph.updates]
    masks = {p.origin.name: torch.zeros(p.origin.shape, dtype=torch.bool) for p in params if p.origin}
    for p in params:
        assert p.origin is not None
        masks[p.origin.name].view(-1)[torch.from_numpy(p.origin.index.reshape(-1))] = True

    reference = copy.deepcopy(network).double()
    named = dict(reference.named_parameters())
    optimizer = torch.optim.SGD([named[n] for n in masks], lr=scheme["optimizer"]["lr"])
    board, rng = artifact.host(), np.random.default_rng(seed)
    for _ in range(STEPS):
        x = rng.standard_normal(network.shape).astype(np.float32)
        label = scheme["loss"]["name"] == "cross_entropy"
        y = np.asarray([rng.integers(network.classes)], np.int32) if label else rng.random((1, network.classes))
        y = y if label else y.astype(np.float32)
        optimizer.zero_grad()
        value = loss(reference, torch.from_numpy(x).double(), torch.from_numpy(y), scheme)
        value.backward()
        for name, mask in masks.items():
            named[name].grad *= mask
        step = board.train_step(x, y)
        assert step.status == 0
        assert step.loss == pytest.approx(float(value.detach()), rel=2e-4, abs=2e-6)
        optimizer.step()

    trained = unpack_state(board.save_state(), board.build)
    origins = {p.name: p.origin for p in params if p.origin}
    ours = export_weights(trained, {p.name: p.data for p in params}, origins, artifact.compiled.originals)
    for name in masks:
        before = dict(network.named_parameters())[name].detach().numpy()
        moved, theirs = ours[name] - before, named[name].detach().numpy() - before
        noise = 1e-6 * np.linalg.norm(before) + 1e-7
        assert np.linalg.norm(moved - theirs) <= 2e-3 * np.linalg.norm(theirs) + noise, name
    x = rng.standard_normal(network.shape).astype(np.float32)
    theirs = reference(torch.from_numpy(x).double()).detach().numpy()
    np.testing.assert_allclose(board.infer(x).reshape(theirs.shape), theirs, atol=1e-3 * max(1, np.abs(theirs).max()))


def loss(module: Network, x: torch.Tensor, y: torch.Tensor, scheme: dict) -> torch.Tensor:
    """As documented: of probabilities, cross entropy takes the logarithm; clipping is at the (logarithmic) output."""
    settings, clip = dict(scheme["loss"]), scheme["optimizer"].get("clip_loss_grad")
    output = module(x)
    name, reduction = settings.pop("name"), settings.pop("reduction")
    if name == "cross_entropy" and isinstance(module.ops[-1], nn.Softmax):
        output = torch.log(output)
    if clip is not None:
        output.register_hook(lambda g: g.clamp(-clip, clip))
    if name == "cross_entropy":
        weights = settings.get("class_weights")
        weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        smoothing = settings.get("label_smoothing", 0.0)
        return F.cross_entropy(output, y.long(), weight, label_smoothing=smoothing, reduction=reduction)
    functions = {
        "mse": F.mse_loss,
        "l1": F.l1_loss,
        "huber": F.huber_loss,
        "bce_with_logits": F.binary_cross_entropy_with_logits,
    }
    return functions[name](output, y.double(), reduction=reduction)
