"""The caller's input format: element type, layout and normalisation in C give what they give in front of the model."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qdq
import torch
from torch import nn

import tte
from tte.compiler import lower
from tte.errors import TTEError
from tte.runner.board import STATE_HEADER

PICTURE, LINE, ROW = (1, 3, 6, 5), (1, 3, 10), (1, 8)
MODULES = {
    PICTURE: lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)),
    LINE: lambda: nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(40, 3)),
    ROW: lambda: nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)),
}


def build(shape: tuple[int, ...], input: dict[str, Any], **scheme: Any) -> tte.Artifact:
    torch.manual_seed(0)
    module, settings = MODULES[shape]().eval(), {"train": "full", "io": {"input": input}, **scheme}
    return tte.compile(module, (torch.zeros(shape),), settings, target="host", name="net")


@cache
def plain(shape: tuple[int, ...]) -> tte.Artifact:
    return build(shape, {})


def draw(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    rng = np.random.default_rng(1)
    if dtype in ("int8", "uint8"):
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, shape, endpoint=True).astype(dtype)
    return rng.standard_normal(shape).astype(np.float32)


CASES: list[tuple[tuple[int, ...], dict[str, Any], tuple[int, ...]]] = [  # model's input, format, caller's input
    (PICTURE, {"dtype": "uint8", "layout": "nhwc", "mean": [120.0, 60.0, 9.5], "std": [60.0, 9e1, 70.0]}, (1, 6, 5, 3)),
    (PICTURE, {"dtype": "int8", "layout": "nchw", "std": [64.0]}, PICTURE),
    (PICTURE, {"dtype": "float32", "layout": "nhwc", "mean": [0.5]}, (1, 6, 5, 3)),
    (PICTURE, {"layout": "nhwc"}, (1, 6, 5, 3)),
    (PICTURE, {"mean": [0.1, 0.2, 0.3], "std": [2.0]}, PICTURE),
    (LINE, {"dtype": "int8", "layout": "nlc", "mean": [1.0, 2.0, 3.0], "std": [50.0]}, (1, 10, 3)),
    (LINE, {"dtype": "uint8", "layout": "ncl", "std": [99.0, 100.0, 200.0]}, LINE),
    (ROW, {"dtype": "int8", "mean": [3.0], "std": list(map(float, range(50, 58)))}, ROW),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "format", "given"), CASES)
def test_the_format_is_part_of_the_model(
    shape: tuple[int, ...], format: dict[str, Any], given: tuple[int, ...]
) -> None:
    artifact = build(shape, format)
    dtype, layout = format.get("dtype", "float32"), format.get("layout", "model")
    own = {4: "nchw", 3: "ncl"}.get(len(shape), "model")
    described = artifact.build
    assert (described.input.shape, described.input.dtype) == (given, np.dtype(dtype))
    assert described.input_layout == (own if layout == "model" else layout)
    header = (described.include / "net.h").read_text()
    ctype = {"float32": "float", "int8": "int8_t", "uint8": "uint8_t"}[dtype]
    assert f"typedef {ctype} net_input_t;" in header
    assert f'#define NET_INPUT_LAYOUT "{described.input_layout}"' in header
    assert f"#define NET_INPUT_SIZE {np.prod(given)}\n" in header
    assert artifact.report["memory"]["input_bytes"] == np.prod(given) * np.dtype(dtype).itemsize

    board, reference = artifact.host(), plain(shape).host()
    for i, x in enumerate(draw((6, *given[1:]), dtype)):
        moved = np.moveaxis(x, -1, 0) if layout in ("nhwc", "nlc") else x
        wide = (-1, *(1,) * (moved.ndim - 1))
        mean, std = (np.asarray(format.get(k, [d])).reshape(wide) for k, d in (("mean", 0.0), ("std", 1.0)))
        prepared = ((moved - mean) / std).astype(np.float32)
        np.testing.assert_allclose(board.infer(x), reference.infer(prepared), rtol=1e-5, atol=1e-5)
        steps = board.train_step(x, np.asarray(i % 3)), reference.train_step(prepared, np.asarray(i % 3))
        assert [s.status for s in steps] == [0, 0]
        np.testing.assert_allclose(steps[0].loss, steps[1].loss, rtol=1e-4)
    assert artifact.verify(steps=2)["ok"]


@pytest.mark.parametrize(
    "format",
    [
        {},
        {"layout": "nhwc"},
        {"mean": [0.5, 0.0, -1.0], "std": [2.0]},
        {"dtype": "uint8", "layout": "nhwc", "std": [90.0]},
    ],
)
def test_an_autoencoder_gives_back_the_prepared_input(format: dict[str, Any]) -> None:
    """Not the caller's bytes: what the model itself would have been given."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 3, 1)).eval()
    scheme = {"train": "full", "loss": "mse", "io": {"input": format, "target": "input"}}
    artifact = tte.compile(module, (torch.zeros(PICTURE),), scheme, target="host")
    assert artifact.build.target is None
    x = draw(artifact.build.input.shape, str(artifact.build.input.dtype))
    moved = np.moveaxis(x, -1, 1) if "layout" in format else x
    mean = np.asarray(format.get("mean", [0.0])).reshape(1, -1, 1, 1)
    prepared = torch.from_numpy(((moved - mean) / format.get("std", [1.0])[0]).astype(np.float32))
    expected = torch.nn.functional.mse_loss(module(prepared), prepared)
    assert artifact.host().train_step(x, None).loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert artifact.verify(steps=3)["ok"]


def test_integers_of_the_model_are_read_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion that gives back every number costs nothing, and changes no bit."""
    model = qdq.quantize(qdq.RECIPES["mcunet"], tmp_path)
    quantize = next(n for n in lower(model).nodes if n.op == "qnn.quantize")
    scale, zero = quantize.attrs["scale"], quantize.attrs["zero_point"]
    scheme = {"train": "last-k:2", "io": {"input": {"dtype": "int8", "mean": [zero], "std": [1 / scale]}}}
    artifacts = [tte.compile(model, update_scheme=scheme, target="host")]
    monkeypatch.setattr("tte.compiler.drop_identity", lambda graph: graph)
    artifacts.append(tte.compile(model, update_scheme=scheme, target="host"))
    ops = [[n.op for n in artifact.compiled.forward.nodes] for artifact in artifacts]
    assert ["qnn.affine", *ops[0]] == ops[1]
    boards = [artifact.host() for artifact in artifacts]
    for i, x in enumerate(draw((3, *artifacts[0].build.input.shape[1:]), "int8")):
        one, other = (board.train_step(x, np.asarray(i)) for board in boards)
        assert one == other
    states = [board.save_state()[STATE_HEADER:-4] for board in boards]
    assert states[0] == states[1]
    assert artifacts[0].verify(steps=2)["ok"]


def test_run_takes_the_callers_format(tmp_path: Path) -> None:
    shape, format, given = CASES[0]
    artifact = build(shape, format)
    x, y = draw((8, *given[1:]), "uint8"), np.arange(8) % 3
    result = artifact.run({"x": x, "y": y}, runner="host", epochs=4, evaluation={"x": x, "y": y})
    assert result.loss[-1] < result.loss[0]
    for wrong in (np.moveaxis(x, -1, 1), x / 255.0 - 0.5, x.astype(np.int16) * 2):
        with pytest.raises(TTEError) as caught:
            artifact.run({"x": wrong, "y": y}, runner="host")
        assert caught.value.code == "TTE-E057"


@pytest.mark.parametrize(
    ("shape", "format", "code", "said"),
    [
        (PICTURE, {"mean": [1.0, 2.0]}, "TTE-E043", "2 numbers for 3 channels"),
        (PICTURE, {"std": [1.0] * 5}, "TTE-E043", "one number, or 3"),
        (LINE, {"layout": "nhwc"}, "TTE-E043", "use `layout: ncl`"),
        (PICTURE, {"layout": "nlc"}, "TTE-E043", "use `layout: nchw`"),
        (ROW, {"layout": "nchw"}, "TTE-E043", "layout: model"),
        (ROW, {"mean": [1.0] * 7}, "TTE-E043", "7 numbers for 8 channels"),
        (PICTURE, {"std": [1.0, 0.0, 1.0]}, "TTE-E031", "above 0"),
        (PICTURE, {"dtype": "int16"}, "TTE-E031", "did you mean int8?"),
    ],
)
def test_formats_that_do_not_fit(shape: tuple[int, ...], format: dict[str, Any], code: str, said: str) -> None:
    with pytest.raises(TTEError) as caught:
        build(shape, format)
    assert caught.value.code == code and said in str(caught.value) and "io" in caught.value.where
