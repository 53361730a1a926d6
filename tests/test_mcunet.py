"""The published int8 models: import, and every tensor of their forward pass."""

import io
import pickle
import platform
import re
import zipfile
from pathlib import Path
from typing import Any

import mcunet_table
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from data import import_published, load_module
from onnx import TensorProto, helper

import tte
from tte.analysis import extra_memory
from tte.compiler import lower
from tte.ir import Graph, evaluate, verify
from tte.passes.quantized import Settings, lower_qdq
from tte.scheme import Resolved, UpdateScheme, find_layers, resolve

EXAMPLE = Path(__file__).parents[1] / "examples" / "mcunet"
MODELS = ("mcunet-5fps", "mbv2-w0.35")


example = load_module(EXAMPLE / "import_model.py")


@pytest.fixture(scope="module")
def pictures(pack: Path) -> np.ndarray:
    """(20, 3, 128, 128) int8: the middle of pictures of flowers, as the models were calibrated for."""
    return mcunet_table.pick_crops()


@pytest.fixture(scope="module", params=MODELS)
def published(request: pytest.FixtureRequest, pack: Path) -> tuple[list[Any], Any, onnx.ModelProto]:
    steps, tensors = example.read_model(pack / "models" / request.param)
    return steps, tensors, example.convert(steps, tensors, classes=5)


def integer_graph(model: onnx.ModelProto, mode: str) -> Graph:
    """The lowered graph; its outputs are the int8 tensors, one per operator of the model, in order."""
    graph = lower_qdq(lower(model), Settings(mode))
    ends = tuple(n.output for n in graph.nodes if n.op in ("qnn.requantize", "qnn.add"))
    return verify(Graph("main", graph.inputs, graph.params, graph.consts, graph.nodes, ends))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="onnxruntime's bits on x86 are claimed")
def test_every_tensor_agrees_with_onnxruntime(published: Any, pictures: np.ndarray) -> None:
    steps, _, model = published
    graph = integer_graph(model, "float")
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    names = [f"{step['output']}_quantized" for step in steps[:-1]]
    watched.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.INT8, None) for n in names)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdqisint8allowed", "1")  # convolutions in integers, see test_qdq
    session = onnxruntime.InferenceSession(watched.SerializeToString(), options)
    for picture in pictures:
        x = picture[None] * np.float32(steps[0]["x_scale"])
        theirs = session.run(names, {"x": x})
        ours = evaluate(graph, [x]).outputs
        assert len(ours) == len(theirs)
        for name, a, b in zip(names, ours, theirs, strict=True):
            np.testing.assert_array_equal(a.transpose(0, 3, 1, 2), b, name)


@pytest.mark.parametrize("mode", ["float", "fixed"])
def test_every_tensor_agrees_with_exact_rounding(mode: str, published: Any, pictures: np.ndarray) -> None:
    """Each tensor of the pack's reference, from its operands: only what float32 takes for a half may differ.

    Global averages are 16ths, so that true halves are frequent; the original rounds them to the even integer counted
    from zero, onnxruntime to the even one counted from the zero point.
    """
    steps, tensors, model = published
    found = mcunet_table.compare_integers(steps, tensors, model, pictures, mode)
    assert found["largest"] <= 1 and found["from_half"] < 1e-4
    assert found["values"] > 15_000_000 and found["different"] < 1e-5 * found["values"], found


@pytest.mark.parametrize("int8_head", [False, True])
def test_new_head_answers_zero_and_learns(published: Any, pictures: np.ndarray, int8_head: bool) -> None:
    steps, tensors, _ = published
    model = example.convert(steps, tensors, classes=5, int8_head=int8_head)
    artifact = tte.compile(model, update_scheme="last-layer")
    size = 1 if int8_head else 4  # of a weight; biases have 4 bytes
    assert artifact.report["memory"]["trained_bytes"] == 5 * steps[-1]["in_channels"] * size + 5 * 4
    assert not int8_head or artifact.verify(steps=2)["ok"]
    host = artifact.host()
    x = (pictures * np.float32(example.INPUT_SCALE)).astype(np.float32)
    np.testing.assert_array_equal(host.infer(x[0]).reshape(-1), np.zeros(5))
    losses = artifact.run({"x": x[:8], "y": np.arange(8) % 5}, runner="host", epochs=8).loss
    assert np.mean(losses[-8:]) < 0.7 * np.log(5) == pytest.approx(0.7 * losses[0])


def test_generated_c_agrees_with_the_references(published: Any, pictures: np.ndarray) -> None:
    """With a head that is not zero: one integer that differs on the way moves the answers by much more than allowed."""
    _, _, model = published
    changed = mcunet_table.draw_head(model)
    host, graph = tte.compile(changed, update_scheme="last-layer").host(), lower_qdq(lower(changed), Settings())
    for picture in pictures[:2]:
        x = picture * np.float32(example.INPUT_SCALE)
        np.testing.assert_allclose(host.infer(x), evaluate(graph, [x[None]]).outputs[0], rtol=0, atol=1e-4)


# Whole layers, and parts of their channels; the benchmark's own list has more of both.
@pytest.mark.parametrize(
    ("stem", "train"),
    [("mcunet-5fps", "49kb"), ("mcunet-5fps", "full"), ("mbv2-w0.35", "99kb"), ("mbv2-w0.35", "full")],
)
def test_gradients_are_those_of_the_oracle(stem: str, train: str, pack: Path) -> None:
    worst = mcunet_table.compare_gradients(
        stem, train, mcunet_table.draw_head(import_published(stem, mcunet_table.CLASSES))
    )
    assert worst["ok"] and max(worst["gradient_error"], worst["weight_error"]) < 1e-5 and worst["apart"] <= 1.0001


def test_pictures_of_a_folder_are_what_the_models_saw(pack: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from PIL import Image

    reference = load_module(pack / "reference" / "packlib.py")
    for label, shape in (("daisy", (150, 227)), ("tulip", (300, 227))):
        (tmp_path / "flowers" / label).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(i).integers(0, 256, (*shape, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "flowers" / label / f"{i}.png")
    monkeypatch.setattr(
        "sys.argv", ["pictures.py", str(tmp_path / "flowers"), "-o", str(tmp_path / "out"), "--test", "0.25"]
    )
    load_module(EXAMPLE / "pictures.py").main()
    train, test = (np.load(tmp_path / f"out-{part}.npz") for part in ("train", "test"))
    assert train["y"].tolist() == [0, 0, 0, 1, 1, 1] and test["y"].tolist() == [0, 1]
    for x, label, i in ((test["x"][0], "daisy", 0), (train["x"][3], "tulip", 1)):
        image = np.asarray(Image.open(tmp_path / "flowers" / label / f"{i}.png"))
        np.testing.assert_array_equal(
            np.rint(x * 127.5).astype(np.int8), reference.to_int8_input(image).astype(np.int8)
        )


# --- the pickles ------------------------------------------------------------------------------------------------------


def as_pickle(steps: list[Any], tensors: Any, path: Path) -> None:
    """The model as tiny-training stores it."""

    def conv(step: Any) -> dict[str, Any]:
        keys = {key: np.asarray(step[key]) for key in ("x_scale", "x_zero", "y_scale", "y_zero")}
        arrays = {key: tensors[f"{step['name']}.{key}"] for key in ("weight", "bias", "w_scales")}
        kernel = step["kernel"][0]
        shape = {"in_channel": step["in_channels"], "out_channel": step["out_channels"], "kernel_size": kernel}
        return shape | {"stride": step["stride"], "groups": step["groups"], "params": keys | arrays}

    by_name = {step["name"]: step for step in steps}
    config: dict[str, Any] = {key: conv(by_name[key]) for key in ("first_conv", "classifier")} | {"feature_mix": None}
    config["blocks"] = []
    while f"b{len(config['blocks'])}.depthwise" in by_name:
        i = len(config["blocks"])
        block = {p: conv(by_name[f"b{i}.{p}"]) if f"b{i}.{p}" in by_name else None for p in example.PARTS}
        add = by_name.get(f"b{i}.add")
        names = {"x_scale": "x1_scale", "x_zero": "x1_zero", "y_scale": "y_scale", "y_zero": "y_zero"}
        block["residual"] = add and {"params": {key: np.asarray(add[name]) for key, name in names.items()}}
        config["blocks"].append(block)
    torch.save(config, path)


def test_pickle_gives_the_same_model(published: Any, tmp_path: Path) -> None:
    steps, tensors, model = published
    as_pickle(steps, tensors, tmp_path / "model.pkl")
    read = example.read_model(tmp_path / "model.pkl")
    assert example.convert(*read, classes=5) == model


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("run by a pickle",))


@pytest.mark.parametrize("written", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize("missing", ["core", "_core"])
def test_pickles_of_both_numpys_are_read_by_both(written: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = pickle.dumps([np.arange(3), np.float32(0.5)], protocol=2)
    content = re.sub(rb"numpy\._?core\.", f"{written}.".encode(), content)
    monkeypatch.delattr(np, missing, raising=False)
    array, number = example.NumpyOnly(io.BytesIO(content)).load()
    assert array.tolist() == [0, 1, 2] and number == np.float32(0.5)


@pytest.mark.parametrize("content", [Evil(), {"first_conv": Evil()}, np.array([Evil()], object)])
def test_pickle_that_wants_more_than_arrays_is_refused(content: Any, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "evil.pkl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content))
    with pytest.raises(SystemExit, match="refused: the pickle wants builtins.print"):
        example.read_model(path)
    assert "run by" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"PK", b"not a pickle" * 100])
def test_damaged_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(content)
    with pytest.raises(SystemExit, match="is not a model of mit-han-lab/tiny-training"):
        example.read_model(path)


# --- the schemes ------------------------------------------------------------------------------------------------------

# As published: biases of the last so many convolutions; weights by number, and the part of their input channels; what
# training needs beside inference by the analytic model, in KB.
H, Q, E = 0.5, 0.25, 0.125
LATE = (27, 30, 33, 36, 39, 42, 45, 48)
PROXYLESS = (36, 39, 42, 45, 48, 51, 54, 57)
PUBLISHED: dict[str, tuple[int, tuple[int, ...], tuple[float, ...], float]] = {
    "mbv2-w0.35-49kb": (16, (36, 39, 40, 41, 42, 45, 48, 49), (1, 1, 0, Q, E, E, E, E), 49.8),
    "mbv2-w0.35-73kb": (20, (32, 33, 36, 39, 41, 42, 45, 48), (E, H, H, 1, Q, E, E, 1), 73.9),
    "mbv2-w0.35-99kb": (25, LATE, (1, 1, 1, 1, 1, E, H, 1), 99.4),
    "mbv2-w0.35-123kb": (31, LATE, (1, 1, 1, 1, 1, H, 1, 1), 123.6),
    "mbv2-w0.35-138kb": (34, LATE, (1, 1, 1, 1, 1, 1, 1, 1), 138.2),
    "mcunet-5fps-49kb": (20, (23, 24, 27, 30, 33, 39), (0, Q, H, H, 0, 0), 49.8),
    "mcunet-5fps-74kb": (21, (21, 23, 24, 26, 27, 30), (1, 0, 1, 0, H, 1), 74.8),
    "mcunet-5fps-99kb": (22, (21, 24, 27, 30, 36, 39), (1, 1, 1, 1, E, Q), 99.8),
    "mcunet-5fps-124kb": (24, (21, 24, 27, 30, 33, 39), (Q, 1, 1, 1, H, H), 125.0),
    "mcunet-5fps-148kb": (23, (21, 24, 27, 30, 36, 39), (1, 1, 1, 1, 1, H), 148.4),
    "proxyless-w0.3-49kb": (21, (39, 42, 44, 45, 50, 51, 54, 57), (Q, 1, 0, 1, 0, E, Q, Q), 49.7),
    "proxyless-w0.3-74kb": (28, (33, 36, 39, 42, 45, 51, 54, 57), (H, Q, 1, 1, 1, H, Q, H), 74.9),
    "proxyless-w0.3-98kb": (25, PROXYLESS, (1, H, 1, 1, Q, H, 1, 1), 98.5),
    "proxyless-w0.3-120kb": (32, PROXYLESS, (1, 1, 1, 1, H, 1, 1, 1), 120.2),
    "proxyless-w0.3-148kb": (45, PROXYLESS, (1, 1, 1, 1, 1, 1, 1, 1), 148.2),
}
# Of each model: what the last 6, the last 12 and all convolutions need, and all biases.
LAST = {
    "mbv2-w0.35": (129.5, 223.7, 1306, 134),
    "mcunet-5fps": (276.3, 448.0, 1400, 121),
    "proxyless-w0.3": (139.3, 266.4, 1211, 113),
}


def proxyless() -> tuple[list[Any], Any]:
    """ProxylessNAS-Mobile at width 0.3, which the pack does not have: its shapes, with numbers that mean nothing."""
    stages = [(8, 1, "3:1"), (16, 2, "5:3 3:3"), (16, 2, "7:3 3:3 5:3 5:3"), (24, 2, "7:6 5:3 5:3 5:3"),
              (32, 1, "5:6 5:3 5:3 5:3"), (64, 2, "7:6 7:6 7:3 7:3"), (96, 1, "7:6")]  # fmt: skip
    rng = np.random.default_rng(0)

    def conv(i: int, o: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> dict[str, Any]:
        grid = {"x_scale": 0.05, "x_zero": 0, "y_scale": 0.05, "y_zero": 0}
        weight = rng.integers(-127, 128, (o, i // groups, kernel, kernel)).astype(np.int8)
        arrays = {"weight": weight, "bias": np.zeros(o, np.int32), "w_scales": np.full(o, 1e-3, np.float32)}
        shape = {"in_channel": i, "out_channel": o, "kernel_size": kernel, "stride": stride, "groups": groups}
        return shape | {"params": grid | arrays}

    channels = 16
    config: dict[str, Any] = {"first_conv": conv(3, channels, 3, 2), "blocks": [], "feature_mix": None}
    for width, stride, blocks in stages:
        for kernel, expand in (map(int, block.split(":")) for block in blocks.split()):
            wide, same = channels * expand, stride == 1 and channels == width
            grid = {"x_scale": 0.05, "x_zero": 0, "y_scale": 0.05, "y_zero": 0}
            config["blocks"].append(
                {
                    "pointwise1": conv(channels, wide) if expand > 1 else None,
                    "depthwise": conv(wide, wide, kernel, stride, wide),
                    "pointwise2": conv(wide, width),
                    "residual": {"params": grid} if same else None,
                }
            )
            channels, stride = width, 1
    config["classifier"] = conv(channels, 10)
    return example.steps_of(config)


@pytest.fixture(scope="module", params=LAST)
def known(request: pytest.FixtureRequest, pack: Path) -> tuple[str, onnx.ModelProto, Graph]:
    """Name, model and graph of a published network."""
    name = request.param
    steps, tensors = proxyless() if name == "proxyless-w0.3" else example.read_model(pack / "models" / name)
    model = example.convert(steps, tensors, classes=5)
    return name, model, lower(model)


def learned(graph: Graph, scheme: Any) -> Resolved:
    return resolve(UpdateScheme.load(scheme), graph)


def test_schemes_are_the_published_ones(known: Any) -> None:
    """By name or by number: the same layers and channels; what training needs beside inference is what is published."""
    name, _, graph = known
    files = sorted((EXAMPLE / "schemes").glob(f"{name}-*.yaml"))
    assert [file.stem for file in files] == sorted(n for n in PUBLISHED if n.startswith(name))
    for file in files:
        count, numbers, ratios, kilobytes = PUBLISHED[file.stem]
        resolved = learned(graph, file)
        by_number = {"n_bias_update": count, "weight_idx": list(numbers), "ratio": [float(r) for r in ratios]}
        assert learned(graph, {"train": by_number}).layers == resolved.layers
        convolutions = [layer.name for layer in find_layers(graph)][:-1]
        assert [entry.layer for entry in resolved.layers] == [*convolutions[-count:], "classifier"]
        parts = {entry.layer: len(entry.channels or ()) for entry in resolved.layers if entry.weight}
        channels = {layer.name: layer.channels for layer in find_layers(graph)}
        wanted = {convolutions[i]: r for i, r in zip(numbers, ratios, strict=True) if r}
        assert parts == {n: 0 if r == 1 else int(r * channels[n]) for n, r in wanted.items()} | {"classifier": 0}
        assert extra_memory(graph, resolved) / 1024 == pytest.approx(kilobytes, abs=0.0501), file.stem


def test_analytic_memory_of_the_last_layers(known: Any) -> None:
    name, model, graph = known
    count = len(find_layers(graph)) - 1
    forms = ("last-k:7", "last-k:13", "full", {"n_bias_update": count, "weight_idx": [], "ratio": []})
    for form, kilobytes in zip(forms, LAST[name], strict=True):
        extra = extra_memory(graph, learned(graph, form if isinstance(form, str) else {"train": form}))
        assert extra is not None and extra / 1024 == pytest.approx(kilobytes, abs=0.0501 if kilobytes % 1 else 0.501)
    rows = [row.analytic_extra_bytes for row in tte.analyze(model).layers]
    assert sum(r for r in rows[-13:] if r) / 1024 == pytest.approx(LAST[name][1], abs=0.06)


@pytest.mark.parametrize("number", range(5))
def test_schemes_compile(known: Any, number: int) -> None:
    """The analytic model stands in the report, beside what is true. Of a weight with ratio 0 only the bias learns."""
    name, model, graph = known
    file = sorted((EXAMPLE / "schemes").glob(f"{name}-*.yaml"))[number]
    artifact = tte.compile(model, update_scheme=file, target="host")
    memory = artifact.report["memory"]
    assert memory["analytic_extra_bytes"] == extra_memory(graph, learned(graph, file))
    ranks = [p.type.rank for p, _ in artifact.compiled.train.graph.updates]
    count, _, ratios, _ = PUBLISHED[file.stem]
    assert (ranks.count(4), ranks.count(1)) == (sum(r > 0 for r in ratios), count + 1)
