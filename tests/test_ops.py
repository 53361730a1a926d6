"""Every operator against PyTorch: values, gradients, refusals. The rows are in samples.py."""

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from samples import SAMPLES, Operand, Sample

from tte.ir import OPS, Builder, Graph, InvalidType, Param, TensorType, Value, evaluate, tensor_type, verify
from tte.ops.resize import resize_taps
from tte.passes.autodiff import LOSSES, differentiate

torch.set_num_threads(1)


def by_id(sample: Sample) -> str:
    return sample.id


def to_torch(array: np.ndarray) -> torch.Tensor:
    """Floats in double precision: the yardstick must be finer than what it measures."""
    return torch.from_numpy(array.astype(np.float64) if array.dtype == np.float32 else array)


def close(ours: np.ndarray, theirs: np.ndarray, rtol: float) -> None:
    """Relative to the largest element: a single small one may be all rounding."""
    scale = max(1e-30, float(np.abs(theirs).max(initial=0)))
    np.testing.assert_allclose(ours / scale, theirs / scale, rtol=0, atol=rtol)


def test_every_operator_has_a_row() -> None:
    assert sorted({sample.op for sample in SAMPLES}) == sorted(OPS)


@pytest.mark.parametrize("sample", SAMPLES, ids=by_id)
def test_reference_agrees_with_type_rule_and_torch(sample: Sample) -> None:
    arrays = sample.draw()
    attrs = sample.complete_attrs
    y = OPS[sample.op].ref(*arrays, **attrs)
    (type,) = OPS[sample.op].infer_types(tuple(map(tensor_type, arrays)), attrs)
    assert (y.shape, y.dtype) == (type.shape, type.numpy)
    theirs = sample.torch(*map(to_torch, arrays)).detach().numpy()
    assert y.shape == theirs.shape
    if type.dtype != "float32":
        np.testing.assert_array_equal(y, theirs)
    else:
        close(y, theirs, 1e-5)


# Rounding is passed straight through, which is no derivative: test_quantized.py has the gradients of integers.
DIFFERENTIABLE = [s for s in SAMPLES if OPS[s.op].grad and not any("int" in o.kind for o in s.operands)]
DIFFERENTIABLE = [s for s in DIFFERENTIABLE if s.op not in ("qnn.quantize", "qnn.round")]


def gradient_graph(sample: Sample, arrays: list[np.ndarray]) -> Graph:
    """The operator's float operands as params, behind it a sum of squares unless it is a loss itself."""
    builder = Builder()
    values: list[Value] = []
    params, inputs = [], []
    trainable = arrays[:1] if sample.op in LOSSES else arrays
    for i, array in enumerate(arrays):
        type = tensor_type(array)
        if array.dtype == np.float32 and any(array is t for t in trainable):
            params.append(Param(f"p{i}", type, array))
            values.append(params[-1])
        else:
            inputs.append(Value(f"x{i}", type))
            values.append(inputs[-1])
    y = builder.call(sample.op, *values, **sample.attrs)
    if sample.op not in LOSSES:
        zero = builder.const(np.zeros(y.type.shape, np.float32))
        y = builder.call("nn.mse", y, zero, reduction="sum")
    consts = tuple(builder.consts.values())
    graph = Graph("main", tuple(inputs), tuple(params), consts, tuple(builder.nodes), (y,))
    return verify(graph.renumbered())


@pytest.mark.parametrize("sample", DIFFERENTIABLE, ids=by_id)
def test_gradient_agrees_with_autograd(sample: Sample) -> None:
    if sample.attrs.get("dtype") == "int32":
        pytest.skip("integers have no gradient")
    arrays = sample.draw(seed=1)
    graph = gradient_graph(sample, arrays)
    tensors = {f"p{i}": to_torch(a) for i, a in enumerate(arrays)}
    for param in graph.params:
        tensors[param.name].requires_grad_()
    y = sample.torch(*tensors.values())
    loss = y if sample.op in LOSSES else (y * y).sum()
    theirs = torch.autograd.grad(loss, [tensors[p.name] for p in graph.params])
    inputs = [arrays[int(v.name[1:])] for v in graph.inputs]
    ours = evaluate(verify(differentiate(graph)), inputs).outputs[1:]
    for param, mine, reference in zip(graph.params, ours, theirs, strict=True):
        assert mine.shape == param.type.shape
        close(mine, reference.numpy(), 2e-5)


BENDS = [
    ("nn.relu", {}, F.relu),
    ("nn.leaky_relu", {"alpha": 0.2}, lambda x: F.leaky_relu(x, 0.2)),
    ("nn.hard_sigmoid", {}, F.hardsigmoid),
    ("nn.hard_swish", {}, F.hardswish),
    ("abs", {}, torch.abs),
    ("clip", {"min": 0.0, "max": 6.0}, F.relu6),
    ("clip", {"min": -1.0, "max": 3.0}, lambda x: F.hardtanh(x, -1.0, 3.0)),
    ("clip", {"min": 0.0, "max": 3.0, "inclusive": True}, lambda x: torch.clamp(x, 0.0, 3.0)),
    ("clip", {"min": -1.0, "inclusive": True}, lambda x: torch.clamp(x, min=-1.0)),
    ("clip", {"max": 6.0, "inclusive": True}, lambda x: torch.clamp(x, max=6.0)),
]


@pytest.mark.parametrize(("op", "attrs", "function"), BENDS)
def test_gradient_where_a_function_bends(op: str, attrs: dict, function) -> None:
    x = np.asarray([-6, -3, -1, 0, 1, 3, 6, 7], np.float32)
    sample = Sample(op, (Operand(x.shape),), function, attrs)
    ours = evaluate(differentiate(gradient_graph(sample, [x])), []).outputs[1]
    tensor = to_torch(x).requires_grad_()
    (theirs,) = torch.autograd.grad((function(tensor) ** 2).sum(), tensor)
    close(ours, theirs.numpy(), 1e-6)


def smooth(sample: Sample) -> bool:
    return sample.op not in ("sign", "nn.l1") and sample.operands[0].kind != "integer" and "dtype" not in sample.attrs


@pytest.mark.parametrize("sample", [s for s in DIFFERENTIABLE if smooth(s)], ids=by_id)
def test_gradient_is_the_derivative_of_the_reference(sample: Sample) -> None:
    """Along a random direction, in double precision: independent of PyTorch and of its conventions."""
    arrays = [a.astype(np.float64) if a.dtype == np.float32 else a for a in sample.draw(seed=2)]
    graph = gradient_graph(sample, [a.astype(np.float32) if a.dtype == np.float64 else a for a in arrays])
    inputs = [arrays[int(v.name[1:])] for v in graph.inputs]
    gradients = evaluate(differentiate(graph), inputs).outputs[1:]
    rng = np.random.default_rng(5)
    directions = [rng.standard_normal(p.type.shape) for p in graph.params]
    values = []
    step = 1e-7
    for sign in (1, -1):
        moved = list(arrays)
        for param, direction in zip(graph.params, directions, strict=True):
            moved[int(param.name[1:])] = arrays[int(param.name[1:])] + sign * step * direction
        y = OPS[sample.op].ref(*moved, **sample.complete_attrs)
        values.append(float(y if sample.op in LOSSES else (y * y).sum()))
    expected = (values[0] - values[1]) / (2 * step)
    ours = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    size = sum(float(np.abs(g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    assert abs(ours - expected) <= 1e-4 * size + 1e-6


def test_nearest_takes_the_pixels_that_torch_takes() -> None:
    for size in range(1, 81):
        x = torch.arange(size, dtype=torch.float32).view(1, 1, size, 1)
        for parts in range(1, 81):
            ours = [low for low, _, _ in resize_taps(size, parts, "nearest", "asymmetric")]
            assert ours == F.interpolate(x, size=(parts, 1)).flatten().tolist(), (size, parts)


T = TensorType
REFUSED = [
    ("nn.conv2d", (T((1, 5, 5, 3)), T((4, 3, 3, 2))), {}, "3 channels"),
    ("nn.conv2d", (T((1, 5, 5, 3)), T((4, 3, 3))), {}, "w must have rank 4"),
    ("nn.conv2d", (T((1, 2, 2, 3)), T((4, 3, 3, 3))), {}, "larger than the padded input"),
    ("nn.conv2d", (T((1, 5, 5, 4)), T((5, 3, 3, 2))), {"groups": 2}, "do not divide"),
    ("nn.conv2d", (T((1, 5, 5, 3)), T((4, 3, 3, 3)), T((3,))), {}, "the bias must have shape"),
    ("nn.conv2d", (T((1, 5, 5, 3)), T((4, 3, 3, 3))), {"padding": (-1, 0, 0, 0)}, "padding must be"),
    ("nn.conv2d", (T((1, 5, 5, 3)), T((4, 3, 3, 3))), {"strides": (0, 1)}, "strides must be"),
    ("nn.conv2d", (T((1, 5, 5, 3), "int8"), T((4, 3, 3, 3))), {}, "x must be float32"),
    ("nn.conv2d_weight_grad", (T((1, 5, 5, 3)), T((1, 4, 4, 3))), {"kernel_size": (3, 3)}, "not the gradient"),
    ("nn.dense", (T((1, 5)), T((4, 6))), {}, "x has 5 features"),
    ("matmul", (T((2, 3)), T((2, 3))), {}, "sum over 3 and 2"),
    ("matmul", (T((2, 2, 3)), T((3, 3, 2))), {}, "leading dimensions"),
    ("add", (T((2, 3)), T((2,))), {}, "do not broadcast"),
    ("clip", (T((2,)),), {"min": 1.0, "max": 0.0}, "must be less"),
    ("nn.apply_mask", (T((2,)), T((2,))), {}, "must be bits"),
    ("nn.max_pool2d", (T((1, 4, 4, 1)),), {"pool_size": (2, 2), "padding": (2, 0, 0, 0)}, "not smaller"),
    ("nn.max_pool2d", (T((1, 4, 4, 1)),), {"pool_size": (5, 5)}, "larger than the padded input"),
    ("nn.avg_pool2d_grad", (T((1, 3, 3, 1)),), {"pool_size": (2, 2), "input_size": (9, 9)}, "not the gradient"),
    ("nn.resize2d", (T((1, 4, 4, 1)),), {"size": (2, 2), "method": "cubic"}, "method must be one of"),
    ("reshape", (T((2, 3)),), {"newshape": (4,)}, "6 elements"),
    ("transpose", (T((2, 3)),), {"axes": (0, 0)}, "not an order"),
    ("concatenate", (T((2, 3)), T((3, 3))), {"axis": 1}, "does not fit"),
    ("slice", (T((4,)),), {"begin": (0,), "end": (5,), "strides": (1,)}, "not inside"),
    ("pad", (T((4,)),), {"pad_width": ((1, -1, 0),)}, "at least 0"),
    ("broadcast_to", (T((4,)),), {"shape": (3,)}, "does not broadcast"),
    ("take", (T((4,)),), {"axis": 0, "indices": (4,)}, "outside of axis"),
    ("take_grad", (T((4,)),), {"axis": 0, "indices": (0, 1), "size": 4}, "does not fit"),
    ("take_grad", (T((2,)),), {"axis": 0, "indices": (0, 4), "size": 4}, "outside of 4"),
    ("sum", (T((4,)),), {"axis": (1,)}, "not an axis"),
    ("mean", (T((4,)),), {"axis": ()}, "distinct axes"),
    ("nn.cross_entropy", (T((1, 4)), T((1,))), {}, "labels must be int32"),
    ("nn.cross_entropy", (T((1, 4)), T((1,), "int32")), {"label_smoothing": 1.0}, "label_smoothing"),
    ("nn.mse", (T((1, 4)), T((4,))), {}, "differ"),
    ("nn.huber", (T((4,)), T((4,))), {"delta": 0.0}, "delta must be positive"),
    ("nn.sgd", (T((4,)), T((4,)), T((1,))), {}, "rate be a scalar"),
    ("nn.batch_norm", (T((1, 4)), T((4,)), T((4,)), T((4,)), T((3,))), {}, "var must have shape"),
]


@pytest.mark.parametrize(("op", "types", "attrs", "why"), REFUSED, ids=lambda v: str(v) if isinstance(v, str) else "")
def test_wrong_operands_are_refused_with_a_reason(op, types, attrs, why) -> None:
    with pytest.raises(InvalidType, match=why):
        Builder().call(op, *(Value(f"x{i}", t) for i, t in enumerate(types)), **attrs)


def test_tables_agree() -> None:
    """The networks of the other tests are made of operators of this table."""
    assert {n.op for n in networks.residual().nodes} <= set(OPS)
