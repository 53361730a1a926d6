"""`gradients: int8`: bits that repeat, gradients beside those in float32, ranges that follow and outlive a switch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qdq
import torch
from torch import nn

import tte
from tte.artifact import Artifact
from tte.errors import TTEError
from tte.ir import OPS, Graph, evaluate, verify
from tte.ops.gradients import integer_multiplier
from tte.ops.loss import exponentials
from tte.passes.integer_gradients import RANGE, quantize_gradients
from tte.runner.board import unpack_state
from tte.runner.qemu import find_qemu
from tte.runner.toolchain import build_firmware, find_toolchains
from tte.target import CORTEX_M55

SPARSE = [
    {"layer": "blocks.*", "bias": True},
    {"layer": "blocks.5.body.0.0", "weight": {"in_channels": 5}, "bias": True},
    {"layer": "blocks.4.body.2.0", "weight": {"in_channels": 0.5, "select": "l2"}, "bias": True},
    {"layer": "classifier", "weight": "all", "bias": True},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Inverted residual blocks with skips, in integers to the end; forks, concatenations and pools; hard-swish."""
    folder = tmp_path_factory.mktemp("models")
    return {name: qdq.quantize(qdq.RECIPES[name], folder / name) for name in ("mcunet", "branches", "pools", "swish")}


def compile_int8(model: Path, train: Any = "full", loss: str = "mse", lr: float = 0.01, **quantized: Any) -> Artifact:
    """mse, since its gradient has the same bits in numpy as in C."""
    settings = {"gradients": "int8"} | quantized
    scheme = {"train": train, "loss": loss, "optimizer": {"lr": lr}, "quantized": settings}
    return tte.compile(model, update_scheme=scheme, target="cortex-m7")


def draw(graph: Graph, step: int) -> list[np.ndarray]:
    rng = np.random.default_rng(step)
    return [rng.standard_normal(v.type.shape).astype(np.float32) for v in graph.inputs]


def pick_ranges(params: Any) -> dict[str, np.ndarray]:
    return {name: data for name, data in params.items() if name.startswith(RANGE)}


@pytest.mark.parametrize(
    ("name", "train", "storage"),
    [
        ("mcunet", "full", "int8_sr"),
        ("mcunet", SPARSE, "int16_ef"),
        ("mcunet", "full", "fp32"),
        ("branches", "full", "int8_nearest"),
    ],
)
def test_c_learns_as_the_reference_does(models: dict[str, Path], name: str, train: Any, storage: str) -> None:
    """Every stored number and every range, after every step; where no float stands between integers."""
    artifact = compile_int8(models[name], train, weight_storage=storage)
    graph, board = artifact.compiled.train.graph, artifact.host()
    params: dict[str, np.ndarray] = {}
    for step in range(4):
        arrays = draw(graph, step)
        taken = board.train_step(*arrays)
        assert taken.status == 0
        params = evaluate(graph, arrays, params).params
        state = unpack_state(board.save_state(), board.build)
        assert pick_ranges(state)
        for key, data in state.items():
            if data.dtype == np.float32:
                np.testing.assert_allclose(data, params[key], rtol=1e-5, atol=1e-6)
            else:
                assert np.array_equal(data, params[key]), (step, key)
        params |= state


def test_every_machine_learns_the_same(models: dict[str, Path]) -> None:
    artifact = compile_int8(models["mcunet"], SPARSE, "cross_entropy")
    data = {"x": qdq.inputs(qdq.RECIPES["mcunet"], 8)[:, 0], "y": np.arange(8)}
    emulators = ["unicorn", *(["qemu"] if find_qemu() else [])]
    hashes = {artifact.run(data, runner=runner).weights_sha256 for runner in ("host", *emulators)}
    assert len(hashes) == 1


def follow(graph: Graph, arrays: list[np.ndarray], octaves: int, steps: int) -> list[dict[str, np.ndarray]]:
    """The ranges before and after each step that teaches nothing else; they begin by so much too large."""
    given = {p.name: p.data for p in graph.params if p.name.startswith(RANGE)}
    states = [{name: data + np.asarray([256 * octaves, 0], np.int32) for name, data in given.items()}]
    for _ in range(steps):
        states.append(pick_ranges(evaluate(graph, arrays, states[-1]).params))
    return states


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("mcunet", 0.97, 0.3), ("branches", 0.998, 0.06), ("pools", 0.999, 0.05), ("swish", 0.999, 0.05)],
)
def test_gradients_point_where_those_in_float32_do(
    models: dict[str, Path], name: str, least: float, most: float
) -> None:
    """Cosine and relative error of each tensor, once the ranges fit; mcunet is 19 layers deep."""
    exact = compile_int8(models[name]).compiled.gradients
    rounded = verify(quantize_gradients(exact))
    arrays = draw(exact, 0)
    params = follow(rounded, arrays, -6, 12)[-1]
    ours, theirs = evaluate(rounded, arrays, params).outputs, evaluate(exact, arrays).outputs
    assert ours[0] == theirs[0]
    for param, g, true in zip(exact.params, ours[1:], theirs[1:], strict=True):
        cosine = float((g * true).sum()) / float(np.linalg.norm(g) * np.linalg.norm(true))
        error = float(np.linalg.norm(g - true) / np.linalg.norm(true))
        assert cosine >= least and error <= most, (param.name, cosine, error)


@pytest.mark.parametrize("scale", [0.003, 0.06, 1.0])
def test_a_loss_of_integers_is_as_exact_as_is_said(scale: float) -> None:
    rng = np.random.default_rng(1)
    q, factors = rng.integers(-128, 128, (300, 10)).astype(np.int8), exponentials(scale)
    x = q * scale - q.max(-1, keepdims=True) * scale
    p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    label = rng.integers(0, 10, 300).astype(np.int32)
    g = OPS["qnn.integer_cross_entropy_grad"].ref(q, label, factors)
    assert np.abs(g * 2.0**-30 - (p - np.eye(10)[label])).max() < 2.0**-27
    assert not g.sum(-1).any()
    for row, at, of in zip(q, label, p, strict=True):
        loss = OPS["qnn.integer_cross_entropy"].ref(row[None], at[None], factors, scale=scale, reduction="mean")
        exact = -np.log(of[at])
        assert abs(loss - exact) < 2e-7 + 2.0**-24 * exact


def test_steps_of_integers_are_right_in_the_mean() -> None:
    """Of weights and sums that differ, whether steps are small or large; int16 keeps what int8 has to draw lots for."""
    rng = np.random.default_rng(2)
    w = rng.integers(-100, 101, 200_000).astype(np.int8)
    v = rng.integers(-3000, 3001, w.size).astype(np.int32)
    for scale in (1e-6, 1e-4, 3e-3):
        multiplier, bits = integer_multiplier(np.full(1, 1.7))
        attrs = {"room": 16, "bits": bits, "limit": 2**31 - 1}
        real = -1.7 * np.float32(scale) * v
        step = OPS["qnn.integer_sgd"].ref(
            w, v, np.float32(scale), multiplier, rounding="stochastic", **attrs
        ) - w.astype(int)
        for part in (v > 0, v < 0):  # a mean of n draws of a fraction is off by less than 4 / sqrt(4 n)
            assert abs((step - real)[part].mean()) < 2 / np.sqrt(part.sum()), scale
        fine = OPS["qnn.integer_sgd"].ref(
            w.astype(np.int16), v, np.float32(scale), multiplier, rounding="nearest", **attrs
        )
        assert np.abs(fine - w - real).max() <= 0.5 + 1e-3


def test_the_size_of_the_loss_does_not_matter(models: dict[str, Path]) -> None:
    """Exponents are counted from the unit of the step: the mean of a loss gives the same integers as its sum."""
    base = {"train": "full", "quantized": {"gradients": "int8"}}
    graphs = []
    for reduction in ("mean", "sum"):
        scheme = base | {"loss": {"name": "mse", "reduction": reduction}}
        artifact = tte.compile(models["mcunet"], update_scheme=scheme, target="host")
        graphs.append(verify(quantize_gradients(artifact.compiled.gradients)))
    arrays = draw(graphs[0], 0)
    small, large = (follow(graph, arrays, 0, 3)[-1] for graph in graphs)
    assert small and all(np.array_equal(small[k], large[k]) for k in small)


def test_ranges_follow_what_they_see(models: dict[str, Path]) -> None:
    """Those that are far too small grow until hardly anything is saturated, which is counted; too large ones fall."""
    graph = verify(quantize_gradients(compile_int8(models["mcunet"]).compiled.gradients))
    arrays = draw(graph, 0)
    states = follow(graph, arrays, -6, 12)
    counts = [sum(int(v[1]) for v in state.values()) for state in states]
    assert counts[1] > 100 and counts[-1] == counts[-2]
    assert all(states[-1][name][0] > states[0][name][0] for name in states[0])
    before, after = follow(graph, arrays, 4, 3)[-2:]
    assert {int(before[name][0] - after[name][0]) for name in before} <= {7, 256}


def test_a_step_without_a_gradient_changes_nothing(models: dict[str, Path]) -> None:
    """A new head of zeros sends nothing back; its ranges wait."""
    scheme = {
        "train": "full",
        "head": {"layer": "classifier", "classes": 5},
        "quantized": {"gradients": "int8"},
    }
    artifact = tte.compile(models["mcunet"], update_scheme=scheme, target="host")
    board = artifact.host()
    before = unpack_state(board.save_state(), board.build)
    board.train_step(qdq.inputs(qdq.RECIPES["mcunet"], 1)[0], np.asarray([3], np.int32))
    after = unpack_state(board.save_state(), board.build)
    for key in before:
        changed = not np.array_equal(before[key], after[key])
        assert changed == key.startswith("classifier"), key


def test_ranges_survive_the_power_switch(models: dict[str, Path]) -> None:
    """Six steps, and three, a saved state and three more on another device, end in the same bits."""
    artifact = compile_int8(models["mcunet"])
    graph = artifact.compiled.train.graph

    def learn(board: Any, steps: range) -> bytes:
        for step in steps:
            assert board.train_step(*draw(graph, step)).status == 0
        return board.save_state()

    whole = learn(artifact.host(), range(6))
    saved = learn(artifact.host(), range(3))
    other = artifact.host()
    assert other.load_state(saved) == 0
    assert learn(other, range(3, 6)) == whole
    assert pick_ranges(unpack_state(whole, artifact.build)) != {}


def test_what_is_not_integer_is_not_asked_for(models: dict[str, Path]) -> None:
    with pytest.raises(TTEError, match="'int4' is no value of gradients"):
        compile_int8(models["mcunet"], gradients="int4")
    with pytest.raises(TTEError, match="TTE-E035"):
        compile_int8(models["mcunet"].with_name("float.onnx"))
    with pytest.raises(TTEError, match="float32 gradients"):
        compile_int8(models["mcunet"]).verify(steps=1)


class Weighted(nn.Module):
    """What is multiplied by a constant that differs from pixel to pixel, and learns on both sides of that."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.register_buffer("map", torch.linspace(0.5, 1.5, 36).reshape(1, 1, 6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu() * self.map).mean((2, 3))


def test_a_factor_for_each_pixel_stays_float(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((8, 2, 6, 6)).astype(np.float32)
    tte.quantize(Weighted().eval(), {"x": x}, tmp_path / "net.onnx")
    nodes = compile_int8(tmp_path / "net.onnx").compiled.train.graph.nodes
    assert any("multiply" in str(node) for node in nodes)


def test_gnu_tools_build_it_for_a_cortex_m55(models: dict[str, Path]) -> None:
    """Their assembler does not know a conversion of a float under a condition (VCVTNE)."""
    if "gcc" not in find_toolchains():
        pytest.skip("no arm-none-eabi-gcc")
    scheme = {"train": "full", "quantized": {"gradients": "int8"}}
    artifact = tte.compile(models["swish"], update_scheme=scheme, target="cortex-m55")
    assert build_firmware(artifact.build, CORTEX_M55, "gcc", machine="qemu").text
