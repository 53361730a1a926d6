"""Whatever a user gives: a project, or three lines that say what is wrong. Never a traceback, a hang, half a folder."""

import copy
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnx
import pytest
import yaml
from onnx import helper, numpy_helper

import tte
from tte.cli import main
from tte.codegen.emit import emit
from tte.codegen.export import write_tree
from tte.errors import TTEError

SECONDS = 20  # one case of the corpus


def weight(name: str, *shape: int) -> onnx.TensorProto:
    rng = np.random.default_rng(len(name) + sum(shape))
    return numpy_helper.from_array((rng.random(shape) + 0.2).astype(np.float32), name)


def network(batch: int | str = 1) -> onnx.ModelProto:
    """(1, 2, 6, 6) -> 4 classes: convolution, batch norm, depthwise with a sibling, pooling, dense."""
    nodes = [
        helper.make_node("Conv", ["x", "c1.weight", "c1.bias"], ["a"], pads=[1] * 4, strides=[1, 1], dilations=[1, 1]),
        helper.make_node("BatchNormalization", ["a", "bn.weight", "bn.bias", "bn.mean", "bn.var"], ["b"], epsilon=1e-5),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Conv", ["c", "c2.weight"], ["d"], pads=[1] * 4, group=3),
        helper.make_node("Add", ["c", "d"], ["e"]),
        helper.make_node("MaxPool", ["e"], ["f"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Concat", ["f", "f"], ["f2"], axis=1),
        helper.make_node("Slice", ["f2", "begin", "end", "axes"], ["f3"]),
        helper.make_node("Reshape", ["f3", "shape"], ["g"]),
        helper.make_node("Gemm", ["g", "fc.weight", "fc.bias"], ["y"], transB=1, alpha=1.0),
    ]
    stored = [weight("c1.weight", 3, 2, 3, 3), weight("c1.bias", 3), weight("c2.weight", 3, 1, 3, 3)]
    stored += [weight(f"bn.{kind}", 3) for kind in ("weight", "bias", "mean", "var")]
    stored += [weight("fc.weight", 4, 27), weight("fc.bias", 4)]
    numbers = {"begin": [1], "end": [4], "axes": [1], "shape": [1, -1]}
    stored += [numpy_helper.from_array(np.asarray(value), name) for name, value in numbers.items()]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [batch, 2, 6, 6])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [batch, 4])
    graph = helper.make_graph(nodes, "net", [x], [y], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


SCHEME: dict[str, Any] = {
    "version": 1,
    "loss": {"name": "cross_entropy", "label_smoothing": 0.1, "class_weights": [1.0, 1.0, 2.0, 1.0]},
    "optimizer": {"name": "sgd", "lr": 0.01, "clip_loss_grad": 4.0},
    "train": [
        {"layer": "*", "bias": True},
        {"layer": "c1", "weight": {"in_channels": 0.5, "select": "l2"}},
        {"layer": "fc", "weight": {"select": [0, 5, 2]}, "bias": True},
    ],
    "head": {"layer": "fc", "classes": 4},
    "io": {"input": {"dtype": "uint8", "layout": "nhwc", "mean": [1.0, 2.0], "std": [3.0]}, "target": "label"},
    "budget": {"sram": "256KB", "flash": "1MB"},
}


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ends_well(model: Any, scheme: Any, folder: Path) -> str:
    """Compile up to the C and write it; the code of the error, or "" for success."""
    code = ""
    with limit(SECONDS):
        try:
            artifact = tte.compile(model, update_scheme=scheme, target="host")
            files = emit(artifact.compiled.programs, artifact.compiled.interface)
            write_tree(folder / "out", {path: text.encode() for path, text in files.items()})
        except TTEError as error:
            assert error.code.startswith("TTE-E0") and error.what and error.where and error.fix, str(error)
            code = error.code
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith((".", "out"))) == ([] if code else ["out"])
    return code


# Numbers and values that have broken compilers before.
NUMBERS = (0, -1, 1, 2, 3, 7, 1000, -1000, 2**31 - 1, 2**31, 2**40, -(2**63))
NAMES = ("", "x", "a*/b", 'a"b', "a\\\nb", "ä", "%0", "a b", "*", "{1..3}", "\0", "n" * 500)
Draw = Callable[[Any], Any]


def pick(rng: np.random.Generator) -> Draw:
    """One of several things, or None where there are none."""

    def draw(things: Any) -> Any:
        things = list(things)
        return things[int(rng.integers(len(things)))] if things else None

    return draw


def change_onnx(model: onnx.ModelProto, draw: Draw) -> None:
    graph = model.graph
    node, tensor = draw(graph.node), draw(graph.initializer)
    names = [name for n in graph.node for name in (*n.input, *n.output)] + [t.name for t in graph.initializer]
    kind = draw(
        "remove operator operator reads writes attribute attribute attribute no_attribute more_attributes dims dims"
        " kind content shorter rename in out inputs outputs opset order cycle initializer forget twice layer".split()
    )
    if node is None or tensor is None:
        return
    attribute = draw(node.attribute)
    value: Any = draw((*NUMBERS, 0, 1, 2, 3, 4, 5, 6))
    if kind == "remove":
        graph.node.remove(node)
    elif kind == "operator":
        node.op_type = draw(
            "Add Mul Sub Gemm MatMul Relu MaxPool AveragePool Reshape Transpose Concat Slice Gather Pad Resize Clip"
            " Split ReduceMean Softmax LayerNormalization Squeeze Unsqueeze Expand ConvTranspose Where Greater Pow Cast"
            " Range Flatten Identity Shape ConstantOfShape GlobalAveragePool Conv If Loop Sin Nothing".split()
        )
    elif kind == "reads" and node.input:
        node.input[draw(range(len(node.input)))] = draw([*names, *NAMES])
    elif kind == "writes":
        node.output[0] = draw([*names, *NAMES])
    elif kind == "attribute" and attribute:
        if attribute.ints:
            attribute.ints[draw(range(len(attribute.ints)))] = value
        elif attribute.type == attribute.INT:
            attribute.i = value
        else:
            attribute.f = draw((0.0, -1.0, 1e38, float("nan"), float("inf")))
    elif kind == "no_attribute" and attribute:
        node.attribute.remove(attribute)
    elif kind == "more_attributes":
        other = copy.deepcopy(draw(graph.node))
        node.attribute.extend(other.attribute)
    elif kind in ("dims", "kind"):  # another tensor, in itself as it should be; its dimensions may also lie
        dims = list(tensor.dims) or [1]
        dims[draw(range(len(dims)))] = value
        if kind == "dims" and (draw((True, False)) or not 0 <= np.prod(dims, dtype=float) < 1e5):
            tensor.dims[:] = dims
        else:
            shape = dims if kind == "dims" else tensor.dims
            element = draw("float32 float64 int32 int64 bool float16 uint8".split() if kind == "kind" else ["float32"])
            tensor.CopyFrom(numpy_helper.from_array(np.ones(shape, element), tensor.name))
    elif kind == "content" and tensor.raw_data:
        wide = tensor.data_type == onnx.TensorProto.INT64
        array = np.frombuffer(tensor.raw_data, np.int64 if wide else np.uint8).copy()
        array[draw(range(len(array)))] = value if wide else draw((0x7F, 0xFF, 0x80))
        tensor.raw_data = array.tobytes()
    elif kind == "shorter":
        tensor.raw_data = tensor.raw_data[: draw(range(len(tensor.raw_data) + 1))]
    elif kind == "rename":
        old, new = tensor.name, draw([*names, *NAMES])
        tensor.name = new
        if draw((True, False)):
            for reader in graph.node:
                reader.input[:] = [new if name == old else name for name in reader.input]
    elif kind == "in" or kind == "out":
        shape = (graph.input if kind == "in" else graph.output)[0].type.tensor_type
        dim = draw(shape.shape.dim)
        how = draw(("value", "name", "gone", "less", "type"))
        if dim is None or how == "gone":
            shape.ClearField("shape")
        elif how == "value":
            dim.dim_value = value
        elif how == "name":
            dim.dim_param = draw(NAMES)
        elif how == "less":
            del shape.shape.dim[-1]
        else:
            shape.elem_type = draw(range(17))
    elif kind == "inputs":
        graph.input.append(helper.make_tensor_value_info(draw(names), 1, [1, 2]))
    elif kind == "outputs":
        graph.output[0].name = draw(names)
    elif kind == "opset":
        model.opset_import[0].version = draw((*range(24), 2**40))
    elif kind == "order":
        nodes = [copy.deepcopy(n) for n in graph.node]
        del graph.node[:]
        graph.node.extend(nodes[::-1])
    elif kind == "cycle":
        graph.node[0].input[0] = graph.node[-2].output[0]
    elif kind == "initializer":
        graph.initializer.append(tensor)
    elif kind == "forget":
        graph.initializer.remove(tensor)
    elif kind == "twice":
        graph.node.append(node)
    elif kind == "layer":
        node.name = draw(NAMES)


def damage(data: bytes, draw: Draw) -> bytes:
    changed = bytearray(data)
    for _ in range(draw((1, 2, 3))):
        at = draw(range(len(changed)))
        kind = draw(range(4))
        if kind == 0:
            changed[at] ^= 1 << draw(range(8))
        elif kind == 1:
            del changed[at : at + draw(range(20))]
        elif kind == 2:
            changed[at:at] = changed[at : at + draw(range(20))]
        else:
            del changed[at:]
        if not changed:
            break
    return bytes(changed)


@pytest.mark.parametrize("seed", range(6))
def test_changed_onnx_models(seed: int, tmp_path: Path) -> None:
    draw = pick(np.random.default_rng(seed))
    codes = set()
    for i in range(25):
        model = network()
        for _ in range(draw((1, 1, 2))):
            change_onnx(model, draw)
        data = model.SerializeToString()
        path = tmp_path / f"{i}" / "m.onnx"
        path.parent.mkdir()
        path.write_bytes(damage(data, draw) if i % 5 == 4 else data)
        codes.add(ends_well(path, "full", path.parent))
    assert "" in codes and len(codes) > 2  # the corpus reaches both ends


LITERALS = (*map(str, NUMBERS), "()", "(1,)", "(0, 0, 0, 0)", "(1, 2)", "True", "None", '"x"', "1.5", "inf", "-inf",
            "nan", "[1]", "{}", "(1, (2, 3))", "1e400", "(-1, 2)", "(1.5, 2)", "b'x'")  # fmt: skip


def change_text(text: str, draw: Draw) -> str:
    """One change of the kind that people and programs make: of a line, a reference, a number, an operator, a value."""
    import re

    import tte.ops  # noqa: F401  fills the table
    from tte.ir import OPS

    lines = text.splitlines()
    at = draw(range(len(lines)))
    line = lines[at]

    def swap(pattern: str, choices: Any) -> str:
        found = draw(re.finditer(pattern, line))
        return line if found is None else line[: found.start()] + str(draw(choices)) + line[found.end() :]

    kind = draw("number number reference operator operator value value value remove twice move cut insert".split())
    if kind == "number":
        lines[at] = swap(r"(?<=[( ])\d+(?=[,)])", NUMBERS)
    elif kind == "reference":
        lines[at] = swap(r"[@%][\w.]+", re.findall(r"[@%][\w.]+", text))
    elif kind == "operator":
        lines[at] = swap(r"(?<== )[a-z0-9_.]+(?=\()", sorted(OPS))
    elif kind == "value":
        lines[at] = swap(r"(?<=[a-z]=)(\([^)]*\)|[^,()]+)", LITERALS)
    elif kind == "remove":
        del lines[at]
    elif kind == "twice":
        lines.insert(at, line)
    elif kind == "move":
        lines.insert(draw(range(len(lines))), lines.pop(at))
    elif kind == "cut":
        start = draw(range(len(line)))
        lines[at] = line[:start] + line[start + draw(range(6)) :]
    else:
        start = draw(range(len(line) + 1))
        lines[at] = line[:start] + draw("(){}[],:;@%=/*\"'\\\n\0äa0-. ") + line[start:]
    return "\n".join(lines)


@pytest.mark.parametrize("seed", range(6))
def test_changed_texts(seed: int, tmp_path: Path) -> None:
    draw = pick(np.random.default_rng(seed))
    graph = networks.residual() if seed % 2 else networks.split(())
    codes = set()
    for i in range(30):
        text = str(graph)
        for _ in range(draw((1, 1, 2))):
            text = change_text(text, draw)
        path = tmp_path / f"{i}" / "m.ir"
        path.parent.mkdir()
        path.write_text(text)
        arrays = {c.name: c.data for c in graph.consts}
        if i % 6 == 5:
            name = draw(arrays)
            arrays[name] = draw(
                (arrays[name].astype(np.float64), arrays[name] * np.nan, arrays[name][..., :1], np.zeros(0))
            )
        np.savez(path.with_suffix(".npz"), **arrays)
        codes.add(ends_well(path, draw(("full", "bias-only", "last-layer")), path.parent))
    assert "" in codes and len(codes) > 1


PLACES: dict[tuple[str | int, ...], list[Any]] = {
    ("train",): ["full", "bias-only", "last-layer", "last-k:2", "last-k:99", [{"layer": "*", "weight": "all"}]],
    ("train", 0, "layer"): ["c1", "{c1,fc}", "[!f]*", "bn", "c*"],
    ("train", 1, "weight"): ["all", "none", {"in_channels": 1}, {"in_channels": 1.0}, {"select": [1]}],
    ("train", 1, "weight", "in_channels"): [1, 2, 3, 0.1, 0.9, 1.0, 10**9],
    ("train", 1, "weight", "select"): ["first", "l2", [0], [1], [1, 0], [2]],
    ("train", 2, "weight", "select"): [[26], [0], list(range(27)), [27], [1, 1]],
    ("loss",): ["mse", "l1", "huber", "bce_with_logits", "cross_entropy", {"name": "huber", "delta": 1e-9}],
    ("loss", "reduction"): ["mean", "sum"],
    ("loss", "class_weights"): [[1.0] * 4, [1.0], [1.0] * 5, [0.0, 0.0, 0.0, 1.0], [0.0] * 4],
    ("loss", "label_smoothing"): [0.0, 0.5, 0.999, 1.0],
    ("optimizer", "lr"): [1e-30, 1e6, 1, 0.5],
    ("optimizer", "clip_loss_grad"): [1e-9, 1e9, 1],
    ("head",): [{"layer": "c1", "classes": 3}, {"layer": "fc", "classes": 1}, {"layer": "fc", "classes": 100_000}],
    ("head", "layer"): ["c1", "c2", "bn", "*"],
    ("head", "classes"): [1, 2, 5, 100_000, 100_001],
    ("io",): [{"target": "float"}, {"target": "input"}, {"input": {"dtype": "int8"}}],
    ("io", "target"): ["label", "float", "input"],
    ("io", "input"): [{}, {"layout": "nchw"}, {"mean": [0.5]}],
    ("io", "input", "dtype"): ["int8", "uint8", "float32", "model"],
    ("io", "input", "layout"): ["nhwc", "nchw", "nlc", "ncl", "model"],
    ("io", "input", "mean"): [[0.0], [1.0, 2.0, 3.0], [1e9, -1e9], [1, 2]],
    ("io", "input", "std"): [[1e-9], [0.0], [1e9], [1.0, 2.0]],
    ("budget",): [{"sram": "1KB"}, {"flash": 100}, {"sram": "1MB"}],
    ("budget", "sram"): ["1KB", "64KB", 1, 10**9],
}
VALUES = [None, True, 0, 1, 3, 7, -1, 0.5, 1.0, 1e-300, 1e9, float("nan"), 10**40, "", "all", "*", "c1", "fc", "bn",
          "b", "nhwc", "nchw", "ncl", "int8", "float32", "model", "label", "float", "input", "mse", "l1", "huber",
          "sum", "bce_with_logits", "cross_entropy", "full", "bias-only", "last-layer", "last-k:2", "last-k:99", "1KB",
          [], [1.0], [0.5] * 4, [0, 2], [5], {}, {"in_channels": 0.5}, {"name": "huber", "delta": 2.0}]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "net.onnx"
    onnx.save(network(), path)
    return path


@pytest.mark.parametrize("seed", range(4))
def test_changed_schemes(seed: int, model: Path, tmp_path: Path) -> None:
    draw = pick(np.random.default_rng(seed))
    codes = set()
    for i in range(30):
        scheme = copy.deepcopy(SCHEME)
        for _ in range(draw((1, 2, 3))):
            (*path, last), values = draw(PLACES.items())
            place: Any = scheme
            try:
                for key in path:
                    place = place[key]
                how = draw(range(5))
                if how:
                    place[last] = draw(values if how > 1 else VALUES)
                else:
                    del place[last]
            except (KeyError, IndexError, TypeError):
                continue  # an earlier change took the place away
        folder = tmp_path / f"{i}"
        folder.mkdir()
        text = yaml.safe_dump(scheme, sort_keys=False)
        (folder / "s.yaml").write_bytes(damage(text.encode(), draw) if i % 5 == 4 else text.encode())
        codes.add(ends_well(model, folder / "s.yaml", folder))
    assert "" in codes and len(codes) > 3


def refuse(capfd: pytest.CaptureFixture[str], code: str, *arguments: object) -> str:
    """The command as the shell calls it: exit status 1, nothing on stdout, three lines on stderr; returns those."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["tte", *map(str, arguments)])
        main()
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert (end.value.code, out) == (1, "")
    assert [line[:9] for line in lines] == ["error[TTE", "  where: ", "  fix:   "], err
    assert lines[0].startswith(f"error[{code}]: "), err
    return err


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def weights_with(value: float) -> onnx.ModelProto:
    changed = network()
    array = numpy_helper.to_array(changed.graph.initializer[0]).copy()
    array[1, 1, 0, 2] = value
    changed.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "c1.weight"))
    return changed


def flipped() -> bytes:
    data = bytearray(network().SerializeToString())
    at = data.index(b"MaxPool")
    data[at] ^= 0x80
    return bytes(data)


def nameless() -> onnx.ModelProto:
    """Passes onnx's checker; TVM crashes on it."""
    changed = network()
    next(node for node in changed.graph.node if node.op_type == "Concat").input[1] = ""
    return changed


def overflowing() -> onnx.ModelProto:
    """A variance below zero: every weight is finite until batch norm is folded."""
    changed = network()
    var = next(tensor for tensor in changed.graph.initializer if tensor.name == "bn.var")
    var.CopyFrom(numpy_helper.from_array(np.full(3, -1.0, np.float32), "bn.var"))
    return changed


TRAIN = "version: 1\ntrain:\n  - {layer: fc, weight: all}\n"
MISTAKES: dict[str, tuple[bytes | onnx.ModelProto | str, str, str]] = {  # what is given, code, what must be said
    "truncated": (network().SerializeToString()[:-100], "TTE-E020", "not a valid ONNX model"),
    "bit-flipped": (flipped(), "TTE-E020", "not a valid ONNX model"),
    "not-a-number": (weights_with(float("nan")), "TTE-E028", "c1.weight"),
    "infinite": (weights_with(float("-inf")), "TTE-E028", "c1.weight"),
    "nameless": (nameless(), "TTE-E020", "m.onnx, "),
    "overflow": (overflowing(), "TTE-E028", "folded"),
    "batch": (network(batch=8), "TTE-E027", "export again with batch 1, shape (1, 2, 6, 6)"),
    "unknown-key": (TRAIN + "lr: 0.1\n", "TTE-E031", "s.yaml:4"),
    "unknown-layer": (TRAIN + "  - {layer: c11, bias: true}\n", "TTE-E032", "did you mean c1?"),
    "wrong-type": (TRAIN + "optimizer: {lr: fast}\n", "TTE-E031", "s.yaml:4"),
    "ratio-0": (TRAIN + "  - {layer: c1, weight: {in_channels: 0.0}}\n", "TTE-E031", "(0, 1]"),
    "ratio-2": (TRAIN + "  - {layer: c1, weight: {in_channels: 2.0}}\n", "TTE-E031", "(0, 1]"),
    "trains-nothing": ("train:\n  - {layer: '*', weight: none}\n", "TTE-E034", "trains nothing"),
    "no-yaml": ("train: [", "TTE-E030", "s.yaml"),
    "ram": (TRAIN + "budget: {sram: 1KB}\n", "TTE-E049", "at the peak: c"),
    "flash": (TRAIN + "budget: {flash: 100}\n", "TTE-E049", "--optimize size"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_three_lines(kind: str, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given, code, said = MISTAKES[kind]
    scheme, path = "full", tmp_path / "m.onnx"
    if isinstance(given, str):
        (tmp_path / "s.yaml").write_text(given)
        scheme, path = str(tmp_path / "s.yaml"), model
    else:
        path.write_bytes(given if isinstance(given, bytes) else given.SerializeToString())
    build = tmp_path / "build"
    before = tree(tmp_path)
    assert said in refuse(capfd, code, "compile", path, "-u", scheme, "-t", "host", "-o", build, "--json")
    assert tree(tmp_path) == before
    build.mkdir()
    (build / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    refuse(capfd, code, "compile", path, "-u", scheme, "-t", "host", "-o", build)
    refuse(capfd, code, "verify", path, "-u", scheme)
    assert tree(tmp_path) == before


TEXT = "def @main(%x: Tensor[(1, 4), float32]) {{\n  {}\n  return %0;\n}}\n"
RELU = "%0 = nn.relu(%x) /* ty=Tensor[(1, 4), float32] */;"


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        (TEXT.format(RELU).replace("(1, 4)", "(2, 4)"), "TTE-E027", "the batch"),
        (TEXT.format(RELU).replace("(1, 4)", "(1, 0)"), "TTE-E010", "no elements"),
        (TEXT.format(RELU).replace("float32", "int8"), "TTE-E010", "float32"),
        (TEXT.format(f"param @w: Tensor[(4,), float32];\n  {RELU}"), "TTE-E010", "params"),
        (TEXT.format(f"const @w: Tensor[(99999, 99999), float32];\n  {RELU}"), "TTE-E010", "larger"),
        (TEXT.format(RELU.replace("(%x)", "(%x, %x)")), "TTE-E010", "not 2 operands"),
        (TEXT.format(RELU.replace("relu(%x)", "leaky_relu(%x, alpha=(1,))")), "TTE-E010", "is not float"),
        (TEXT.format(RELU.replace("nn.relu(%x)", "sum(%x, axis=1)")), "TTE-E010", "is not tuple[int, ...]"),
        (TEXT.format(RELU).replace("%x:", "%y: Tensor[(1,), int32], %x:"), "TTE-E023", "one float32 tensor"),
    ],
)
def test_texts_that_are_no_models(text: str, code: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "m.ir").write_text(text)
    with pytest.raises(TTEError) as caught:
        tte.compile(tmp_path / "m.ir", target="host")
    assert caught.value.code == code and said in str(caught.value) and str(tmp_path / "m.ir") in caught.value.where


@pytest.mark.parametrize("form", ["last-k:0", "last-k", "last-k:x"])
def test_a_short_form_is_no_file(form: str, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = refuse(capfd, "TTE-E031", "compile", model, "-u", form, "-o", tmp_path / "build")
    assert f"'{form}' is not a short form" in said and "last-k:N" in said


def test_output_that_cannot_be_written(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ("compile", model, "-u", "last-layer", "-t", "host", "-o")
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.json").write_text("{}")
    before = tree(tmp_path)
    refuse(capfd, "TTE-E045", *arguments, tmp_path / "file")
    for below in ("below", "far/below"):
        assert "file is a file, not a folder" in refuse(capfd, "TTE-E045", *arguments, tmp_path / "file" / below)
    refuse(capfd, "TTE-E046", *arguments, tmp_path / "other")
    refuse(capfd, "TTE-E045", "compile", model, "-o", tmp_path / "build", "--dump-ir", tmp_path / "file")
    refuse(capfd, "TTE-E045", "analyze", model, "--write-scheme", tmp_path / "no" / "s.yaml")
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        before = tree(tmp_path)
        refuse(capfd, "TTE-E045", *arguments, tmp_path / "locked")
        refuse(capfd, "TTE-E045", *arguments, tmp_path / "locked" / "new")
    assert tree(tmp_path) == before


def test_state_of_another_model(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    artifacts = [tte.compile(model, update_scheme=scheme, target="host") for scheme in ("last-layer", "bias-only")]
    other = weights_with(0.5)
    artifacts.append(tte.compile(other, update_scheme="last-layer", target="host", name="net"))
    for i, artifact in enumerate(artifacts):
        artifact.export(tmp_path / f"{i}")
    board = artifacts[0].host()
    blob = board.save_state()
    states = {"other": artifacts[2].host().save_state(), "short": blob[:-1], "long": blob + b"0", "none": b""}
    states |= {"scheme": artifacts[1].host().save_state(), "flipped": blob[:40] + bytes([blob[40] ^ 1]) + blob[41:]}
    for name, state in states.items():
        assert board.load_state(state) != 0, name
        assert board.save_state() == blob
        (tmp_path / name).write_bytes(state)
        said = refuse(capfd, "TTE-E060", "state", tmp_path / name, "--build", tmp_path / "0", "-o", tmp_path / "w.npz")
        assert f"where: {tmp_path / name}\n" in said
    assert not (tmp_path / "w.npz").exists()
    assert board.load_state(blob) == 0
    damage = {"": "no such file", "{\n": "line 2, column 1", "[]": "was changed", "\xff": "not JSON"}
    for content, reason in damage.items():
        if content:
            (tmp_path / "build.json").write_text(content, "latin-1")
        said = refuse(capfd, "TTE-E050", "state", tmp_path / "other", "--build", tmp_path, "-o", tmp_path / "w.npz")
        assert reason in said and "Error" not in said


def test_data_that_do_not_fit(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build, x, y = tmp_path / "build", np.zeros((3, 2, 6, 6), np.float32), np.arange(3)
    tte.compile(model, update_scheme="last-layer", target="host").export(build)
    before = tree(build)
    cases = {
        "shape": {"x": x[:, :1], "y": y}, "label": {"x": x, "y": y + 2}, "float": {"x": x, "y": y * 1.5},
        "count": {"x": x, "y": y[:2]}, "no-y": {"x": x}, "nan": {"x": x * np.nan, "y": y},
        "empty": {"x": x[:0], "y": y[:0]}, "text": {"x": x.astype(str), "y": y},
        "scalar": {"x": np.float32(1), "y": y},
    }  # fmt: skip
    for name, arrays in cases.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        refuse(capfd, "TTE-E057", "run", build, "--data", tmp_path / f"{name}.npz", "--host")
    (tmp_path / "words.npz").write_text("x,y\n1,2\n")
    said = refuse(capfd, "TTE-E057", "run", build, "--data", tmp_path / "words.npz", "--host")
    assert "not a readable .npz file: nothing that numpy wrote" in said
    np.savez(tmp_path / "fits.npz", x=x, y=y)
    refuse(capfd, "TTE-E058", "run", build, "--data", tmp_path / "fits.npz", "--emulator", "bochs")
    assert tree(build) == before
    np.savez(tmp_path / "large.npz", x=x + np.float32(3e38), y=y)
    said = refuse(capfd, "TTE-E055", "run", build, "--data", tmp_path / "large.npz", "--host")
    assert "training step 0 returned NONFINITE" in said and "of the training data" in said
