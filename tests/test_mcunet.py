"""The published int8 models: import, and every tensor of their forward pass."""

import importlib.util
import pickle
import platform
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from data import load_pictures
from onnx import TensorProto, helper, numpy_helper

import tte
from tte.compiler import lower
from tte.ir import Graph, evaluate, verify
from tte.passes.quantized import Settings, lower_qdq
from tte.scheme import UpdateScheme, resolve

EXAMPLE = Path(__file__).parents[1] / "examples" / "mcunet"
MODELS = ("mcunet-5fps", "mbv2-w0.35")
PICTURES = 20


def load(path: Path) -> Any:
    """A Python file that is no part of a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load(EXAMPLE / "import_model.py")


@pytest.fixture(scope="module")
def pictures(pack: Path) -> np.ndarray:
    """(20, 3, 128, 128) int8: the middle of pictures of flowers, as the models were calibrated for."""
    images, _ = load_pictures("flowers5", 0)
    step = len(images) // PICTURES
    crops = images[: PICTURES * step : step, 50:178, 50:178].astype(np.float32)
    return np.trunc(crops - 127.5).transpose(0, 3, 1, 2).astype(np.int8)


@pytest.fixture(scope="module", params=MODELS)
def published(request: pytest.FixtureRequest, pack: Path) -> tuple[list[Any], Any, onnx.ModelProto]:
    steps, tensors = example.read_model(pack / "models" / request.param)
    return steps, tensors, example.convert(steps, tensors, classes=5)


def exact_step(step: Any, tensors: Any, values: dict[str, np.ndarray]) -> np.ndarray:
    """What an operator's result is before rounding, in float64, from exact sums; without limits and zero point."""
    if step["op"] == "conv2d":
        x = torch.from_numpy(values[step["input"]]) - step["x_zero"]
        w = torch.from_numpy(tensors[f"{step['name']}.weight"].astype(np.float64))
        acc = torch.nn.functional.conv2d(x, w, None, step["stride"], tuple(step["pad"]), 1, step["groups"]).numpy()
        acc = acc + tensors[f"{step['name']}.bias"].astype(np.float64)[:, None, None]
        scale = np.broadcast_to(tensors[f"{step['name']}.w_scales"], len(w)).astype(np.float64)[:, None, None]
        return acc * (step["x_scale"] * scale / step["y_scale"])
    if step["op"] == "add":
        a, b = (values[name] for name in step["inputs"])
        total = (a - step["x1_zero"]) * step["x1_scale"] + (b - step["x2_zero"]) * step["x2_scale"]
        return total / step["y_scale"]
    return values[step["input"]].mean((2, 3), keepdims=True)


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
def test_every_tensor_agrees_with_exact_rounding(mode: str, published: Any, pictures: np.ndarray, pack: Path) -> None:
    """Each tensor of the pack's reference, from its operands: only what float32 takes for a half may differ.

    Global averages are 16ths, so that true halves are frequent; the original rounds them to the even integer counted
    from zero, onnxruntime to the even one counted from the zero point.
    """
    steps, tensors, model = published
    reference = load(pack / "reference" / "packlib.py")
    graph = lower_qdq(lower(model), Settings(mode))
    seen = different = 0
    for picture in pictures:
        x = picture[None] * np.float32(steps[0]["x_scale"])
        env = {v.name: v.data for v in graph.consts} | {graph.inputs[0].name: x}
        values = {
            name: v.astype(np.float64)
            for name, v in reference.forward_q({"ops": steps}, tensors, picture[None]).items()
        }
        ends = iter(steps[:-1])
        for node in graph.nodes:
            distinct = {v.name: v for v in node.inputs}
            alone = Graph("main", tuple(distinct.values()), nodes=(node,), outputs=node.outputs)
            result = evaluate(alone, [env[name] for name in distinct]).outputs[0]
            if node.op in ("qnn.requantize", "qnn.add"):
                step = next(ends)
                real = exact_step(step, tensors, values)
                exact = values[step["output"]]
                ours = result.transpose(0, 3, 1, 2)
                wrong = ours != exact
                halves = np.abs(np.abs(real[wrong]) % 1 - 0.5)
                assert np.abs(ours - exact).max() <= 1, step["name"]
                assert (halves < 1e-4).all() or not wrong.any(), (step["name"], halves.max())
                seen += ours.size
                different += 0 if step["op"] == "global_avgpool" else int(wrong.sum())
                result = exact.transpose(0, 2, 3, 1).astype(np.int8)
            env[node.output.name] = result
        assert next(ends, None) is None
    assert seen > 15_000_000 and different < 1e-5 * seen, (different, seen)


def test_new_head_answers_zero_and_learns(published: Any, pictures: np.ndarray) -> None:
    _, _, model = published
    artifact = tte.compile(model, update_scheme="last-layer")
    host = artifact.host()
    x = (pictures * np.float32(example.INPUT_SCALE)).astype(np.float32)
    np.testing.assert_array_equal(host.infer(x[0]).reshape(-1), np.zeros(5))
    losses = artifact.run({"x": x[:8], "y": np.arange(8) % 5}, runner="host", epochs=8).loss
    assert np.mean(losses[-8:]) < 0.7 * np.log(5) == pytest.approx(0.7 * losses[0])


def test_generated_c_agrees_with_the_references(published: Any, pictures: np.ndarray) -> None:
    """With a head that is not zero: one integer that differs on the way moves the answers by much more than allowed."""
    _, _, model = published
    head = next(t for t in model.graph.initializer if t.name == "classifier.weight")
    drawn = np.random.default_rng(0).standard_normal(tuple(head.dims)).astype(np.float32)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    changed.graph.initializer.remove(head)
    changed.graph.initializer.append(numpy_helper.from_array(drawn, head.name))
    for mode in ("fixed", "float"):
        host = tte.compile(changed, update_scheme={"train": "last-layer", "quantized": {"requantize": mode}}).host()
        graph = lower_qdq(lower(changed), Settings(mode))
        for picture in pictures[:5]:
            x = picture * np.float32(example.INPUT_SCALE)
            expected = evaluate(graph, [x[None]]).outputs[0]
            np.testing.assert_allclose(host.infer(x), expected, rtol=0, atol=1e-4)


def test_pictures_of_a_folder_are_what_the_models_saw(pack: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from PIL import Image

    reference = load(pack / "reference" / "packlib.py")
    for label, shape in (("daisy", (150, 227)), ("tulip", (300, 227))):
        (tmp_path / "flowers" / label).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(i).integers(0, 256, (*shape, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "flowers" / label / f"{i}.png")
    monkeypatch.setattr(
        "sys.argv", ["pictures.py", str(tmp_path / "flowers"), "-o", str(tmp_path / "out"), "--test", "0.25"]
    )
    load(EXAMPLE / "pictures.py").main()
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


@pytest.mark.parametrize("name", MODELS)
def test_schemes_name_layers_of_the_model(name: str, pack: Path) -> None:
    steps, tensors = example.read_model(pack / "models" / name)
    graph = lower(example.convert(steps, tensors, classes=5))
    convolutions = [step["name"] for step in steps if step["op"] == "conv2d"][:-1]
    schemes = sorted((EXAMPLE / "schemes").glob(f"{name}-*.yaml"))
    assert len(schemes) == 5
    for scheme in schemes:
        rules = UpdateScheme.load(scheme)
        layers = resolve(rules, graph).layers
        trained = [layer.layer for layer in layers if layer.bias and layer.layer != "classifier"]
        assert trained == convolutions[-len(trained) :], scheme.name
        assert sum(layer.weight is not None for layer in layers) == sum(r.weight != "none" for r in rules.train)


def test_fifteen_schemes_are_shipped() -> None:
    assert len(list((EXAMPLE / "schemes").glob("*.yaml"))) == 15
