"""Post-training quantisation: a float model and inputs to calibrate on -> QDQ ONNX, by onnxruntime."""

import contextlib
import io
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tte.arrays import read_npz
from tte.document import tally
from tte.errors import TTEError
from tte.frontends.onnx_model import fold_constants, is_generated, layer_of, read_onnx
from tte.frontends.pytorch import refuse_training_mode
from tte.runner.train import check_targets, refit

LAYERS = ("Conv", "Gemm", "MatMul", "ConvTranspose")
OPSET = 17

Data = Mapping[str, np.ndarray] | Path | str


@dataclass(frozen=True)
class Quantization:
    """What was written. before, after: of the float and of the int8 model, where there was something to measure on.

    metric: "accuracy", or "mse" where y are no class numbers
    head, operator: the ONNX node that stays float and what it computes, None where none does
    notes: what may make the result worse than it could be
    """

    output: Path
    samples: int
    head: str | None
    operator: str | None = None
    metric: str | None = None
    before: float | None = None
    after: float | None = None
    notes: tuple[str, ...] = ()


def quantize(
    model: Any, calibration: Data, output: Path | str, *, evaluation: Data | None = None, int8_head: bool = False
) -> Quantization:
    """Write an int8 form of a model: weights with a scale per channel, activations with one per tensor.

    model        the path of an .onnx file, an onnx.ModelProto, or a torch.nn.Module in eval mode
    calibration  x: (N, ...) in the model's own layout, as an .npz file or a dictionary; a few dozen typical inputs
    evaluation   x and y, to measure before and after on
    int8_head    quantise the last layer too; by default it stays float32, where it learns best

    Batch norm is folded into the layers in front of it first. Raises TTEError.
    """
    _require_onnxruntime()
    output = Path(output)
    if output.suffix != ".onnx":
        fix = f"name it {output.name}.onnx"
        raise TTEError("TTE-E045", "the int8 model is an .onnx file", where=str(output), fix=fix)
    samples = _read(calibration, "calibration data")
    given = _as_onnx(model, samples["x"])
    source = str(model) if isinstance(model, str | Path) else type(model).__name__
    with _translated(source):
        fold_constants(given)  # else onnxruntime quantises arithmetic on shapes
    name_biases(given)
    fold_batch_norm(given)
    name, shape = _input(given)
    calibrating = _fitting(
        samples, name, shape, "calibration data" if isinstance(calibration, Mapping) else calibration
    )
    tests, y, metric = (
        _read_tests(evaluation, given, source, name, shape) if evaluation is not None else ([], np.empty(0), None)
    )
    head = None if int8_head else _last_layer(given)
    if isinstance(model, str | Path) and output.resolve() == Path(model).resolve():
        raise TTEError("TTE-E045", "this is the float model itself", where=str(output), fix="choose another place")
    with tempfile.TemporaryDirectory() as folder:
        result = _run_onnxruntime(given, source, calibrating, head, Path(folder))
    try:
        output.write_bytes(result.SerializeToString())
    except OSError as problem:
        what = f"cannot write: {problem.strerror}"
        raise TTEError("TTE-E045", what, where=str(output), fix="choose another place") from problem
    before, after = (_measure(m, source, tests, y, metric) for m in (given, result)) if metric else (None, None)
    operator = next((str(n.op_type) for n in given.graph.node if n.name == head), None)
    return Quantization(output, len(calibrating), head, operator, metric, before, after, _warn(samples["x"]))


def _read_tests(
    data: Data, model: Any, source: str, name: str, shape: Sequence[int]
) -> tuple[list[dict[str, Any]], np.ndarray, str]:
    """Feeds, class numbers or targets, and what is measured on them."""
    where = "evaluation data" if isinstance(data, Mapping) else data
    arrays = _read(data, "evaluation data")
    feeds = _fitting(arrays, name, shape, where)
    with _translated(source):
        made = _session(model)(feeds[0]).shape[1:]
    metric = "mse" if arrays.get("y", np.empty(0, int)).dtype.kind == "f" else "accuracy"
    sample, classes = (made[:-1], made[-1]) if metric == "accuracy" and made else (made, None)
    try:
        return feeds, check_targets(arrays, len(feeds), sample, classes, np.dtype(np.float32), where), metric
    except TTEError as problem:
        raise _bad(problem.where, problem.what, problem.fix) from problem


def _warn(x: np.ndarray) -> tuple[str, ...]:
    if not (x == x[:1]).all():
        return ()
    what = "the calibration samples are all the same" if len(x) > 1 else "there is one calibration sample"
    return (f"{what}: the ranges fit this input, and what lies outside of them is cut off; give a few dozen others",)


def name_biases(model: Any) -> None:
    """A bias that an exporter computed, and named by itself, becomes one of its layer, and has its name from there."""
    import onnx

    stored = {t.name: t for t in model.graph.initializer}
    users = {t: t for t in stored if not is_generated(t)}
    for node in model.graph.node:
        if node.op_type not in LAYERS or len(node.input) < 3 or node.input[2] not in stored.keys() - users.keys():
            continue
        name = f"{layer_of(node, users)}.bias"
        if name == ".bias" or name in stored:
            continue
        stored[name] = onnx.TensorProto()
        stored[name].CopyFrom(stored[node.input[2]])
        stored[name].name = node.input[2] = name
        model.graph.initializer.append(stored[name])


def fold_batch_norm(model: Any) -> None:
    """BatchNormalization behind a layer that nothing else reads becomes part of its weight and bias; names stay."""
    import onnx

    graph = model.graph
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    makers = {n.output[0]: n for n in graph.node if n.op_type in ("Conv", "Gemm")}
    readers = Counter(tensor for node in graph.node for tensor in node.input) + Counter(o.name for o in graph.output)
    for node in [n for n in graph.node if n.op_type == "BatchNormalization"]:
        layer = makers.get(node.input[0])
        if layer is None or readers[node.input[0]] > 1:
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in (*node.attribute, *layer.attribute)}
        plain = layer.op_type == "Conv" or (
            attributes.get("transB") == 1 and {attributes.get(k, 1.0) for k in ("alpha", "beta")} == {1.0}
        )
        own = list(layer.input[1:])
        if not plain or any(t not in stored for t in (*own, *node.input[1:])) or any(readers[t] > 1 for t in own):
            continue
        gamma, beta, mean, variance = (stored[t].astype(np.float64) for t in node.input[1:5])
        factor = gamma / np.sqrt(variance + attributes.get("epsilon", 1e-5))
        weight = stored[own[0]].astype(np.float64)
        if len(own) == 1:
            layer.input.append(f"{own[0].removesuffix('.weight')}.bias")
        bias = stored.get(layer.input[2], np.zeros(len(weight)))
        stored[own[0]] = (weight * factor.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.float32)
        stored[layer.input[2]] = ((bias - mean) * factor + beta).astype(np.float32)
        layer.output[0] = node.output[0]
        graph.node.remove(node)
    read = {tensor for node in graph.node for tensor in node.input}
    del graph.initializer[:]
    graph.initializer.extend(onnx.numpy_helper.from_array(array, t) for t, array in stored.items() if t in read)


def _require_onnxruntime() -> None:
    from importlib.util import find_spec

    if find_spec("onnxruntime") is None:
        raise TTEError(
            "TTE-E082", "quantisation needs onnxruntime, which is not installed", fix="pip install 'tte[quantize]'"
        )


def _bad(where: Any, what: str, fix: str) -> TTEError:
    return TTEError("TTE-E081", what, where=str(where), fix=fix)


def _read(data: Data, name: str) -> Mapping[str, np.ndarray]:
    fix = "save it with numpy.savez(path, x=...)"
    where = name if isinstance(data, Mapping) else str(data)
    arrays = data if isinstance(data, Mapping) else read_npz(data, "TTE-E081", fix)
    if "x" not in arrays:
        raise _bad(where, f"has no array x, only {sorted(arrays)}", fix)
    x = np.asarray(arrays["x"])
    if x.ndim < 1 or len(x) == 0 or x.dtype.kind not in "fiub":
        raise _bad(where, f"x holds no samples: {x.dtype} {x.shape}", fix)
    if not np.isfinite(x).all():
        raise _bad(where, "x has values that are NaN or infinite", "remove those samples")
    return {key: np.asarray(value) for key, value in arrays.items()}


def _fitting(arrays: Mapping[str, np.ndarray], name: str, shape: Sequence[int], where: Any) -> list[dict[str, Any]]:
    """One feed per sample."""
    x = arrays["x"]
    if x.shape[1:] != tuple(shape):
        wanted = ", ".join(map(str, shape))
        raise _bad(where, f"x is {x.shape}, the model's input {name} wants (N, {wanted})", refit("x", x.shape, shape))
    return [{name: sample[None].astype(np.float32)} for sample in x]


def _as_onnx(model: Any, x: np.ndarray) -> Any:
    """A ModelProto of the caller's model, which is not changed."""
    if isinstance(model, str | Path):
        path = Path(model)
        if path.suffix != ".onnx":
            fix = "export the float model with torch.onnx.export; or, in Python, give the module to tte.quantize. "
            fix += "What PyTorch quantised itself goes to `tte compile` as it is"
            what = f"float .onnx files are quantised, not {path.suffix or 'files without an ending'}"
            raise TTEError("TTE-E020", what, where=str(path), fix=fix)
        if not path.is_file():
            raise TTEError("TTE-E020", "there is no such file", where=str(path), fix="give a float .onnx file")
        return read_onnx(path)
    if "torch.Module" in {f"{c.__module__.split('.')[0]}.{c.__name__}" for c in type(model).__mro__}:
        return _export(model, x)
    copy = type(model)()
    copy.CopyFrom(model)
    return copy


def _export(module: Any, x: np.ndarray) -> Any:
    """A torch module as ONNX with its own names, batch norm kept."""
    import onnx
    import torch

    refuse_training_mode(module)
    file = io.BytesIO()
    options: dict[str, Any] = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
    example = torch.from_numpy(x[:1].astype(np.float32))
    try:
        with _silence():
            torch.onnx.export(module, (example,), file, dynamo=False, opset_version=OPSET, **options)
    # What the exporter documents, and what the module itself may raise on an input that does not fit.
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError) as problem:
        first = next((line for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
        raise _bad(
            "calibration data",
            f"{type(module).__name__} cannot be exported for inputs of {tuple(example.shape)}: {first}",
            "x holds (N, ...), in the layout that the module takes",
        ) from problem
    return onnx.load_model_from_string(file.getvalue())


def _input(model: Any) -> tuple[str, tuple[int, ...]]:
    """The name of the one input, and its shape without the batch."""
    stored = {t.name for t in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in stored]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        what = f"the model has {tally(len(inputs), 'input')} and {tally(len(model.graph.output), 'output')}"
        raise TTEError("TTE-E023", what, fix="export a model that takes one tensor and returns one tensor")
    dims = inputs[0].type.tensor_type.shape.dim[1:]
    if not dims or any(d.dim_value < 1 for d in dims):
        what = "the input has dynamic dimensions"
        raise TTEError("TTE-E022", what, where=inputs[0].name, fix="export without dynamic axes")
    return inputs[0].name, tuple(d.dim_value for d in dims)


def _last_layer(model: Any) -> str | None:
    """The name of the last node with weights; nodes without a name get one."""
    for i, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{i}"
    return next((str(n.name) for n in reversed(model.graph.node) if n.op_type in LAYERS), None)


def _behind(model: Any, head: str) -> list[str]:
    """The head and what follows it, a softmax perhaps: its logits are not to be rounded either."""
    names, tensors = [], set[str]()
    for node in model.graph.node:
        if node.name == head or tensors & set(node.input):
            names.append(str(node.name))
            tensors |= set(node.output)
    return names


def _run_onnxruntime(model: Any, source: str, feeds: list[dict[str, Any]], excluded: str | None, folder: Path) -> Any:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    if any(n.op_type in ("QuantizeLinear", "DequantizeLinear") for n in model.graph.node):
        raise TTEError("TTE-E080", "the model is quantised already", where=source, fix="give the float model")

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter(feeds)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.rest, None)

    # A file, not the ModelProto: quantize_static would move its weights out of it.
    given, result = folder / "float.onnx", folder / "int8.onnx"
    onnx.save(model, given)
    with _silence(), _translated(source):
        quantize_static(
            given,
            result,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_behind(model, excluded) if excluded else [],
        )
    return onnx.load(result)


def _measure(model: Any, source: str, feeds: list[dict[str, Any]], y: np.ndarray, metric: str) -> float:
    """Accuracy, or the mean squared error."""
    with _translated(source):
        run = _session(model)
        outputs = [run(feed) for feed in feeds]
    if metric == "accuracy":
        right = [o.reshape(-1).argmax() == int(np.ravel(label)[-1]) for o, label in zip(outputs, y, strict=True)]
        return float(np.mean(right))
    return float(np.mean([np.mean((o.reshape(-1) - np.ravel(t)) ** 2) for o, t in zip(outputs, y, strict=True)]))


def _session(model: Any) -> Callable[[dict[str, Any]], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdqisint8allowed", "1")  # int8 activations in integers on x86 too
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return lambda feed: np.asarray(session.run(None, feed)[0])


@contextlib.contextmanager
def _translated(source: str) -> Iterator[None]:
    """What onnxruntime raises on models that it cannot run."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    problems = (state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NotImplemented)
    try:
        yield
    except (*problems, state.RuntimeException, RuntimeError, ValueError) as problem:
        first = next((line for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
        what = f"onnxruntime cannot quantise or run this model: {first}"
        raise TTEError(
            "TTE-E080", what, where=source, fix="check that the float model runs in onnxruntime"
        ) from problem


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Exporter and quantiser talk about their own insides."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
