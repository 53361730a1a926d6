from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tte.ops  # noqa: F401  fills the table of operators
from tte.arrays import read_npz
from tte.errors import TTEError
from tte.ir import Builder, Const, Graph, Origin, TensorType, Value, evaluate
from tte.passes.batch_norm import fold_batch_norm
from tte.weights import checksum, export_weights, load_weights, save_weights

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def test_what_did_not_learn_keeps_its_bits() -> None:
    user = normal(4, 6)
    index = np.arange(24).reshape(4, 6).T[:3]  # our layout is transposed, and only a part learns
    scale = RNG.uniform(0.3, 3, index.shape)
    before = (user.reshape(-1)[index] * scale).astype(np.float32)
    after = before.copy()
    after[1] += 0.5
    new = export_weights({"w": after}, {"w": before}, {"w": Origin("user.w", (4, 6), index, scale)}, {"user.w": user})
    moved = np.zeros(24, bool)
    moved[index[1]] = True
    assert np.array_equal(new["user.w"].reshape(-1)[~moved], user.reshape(-1)[~moved])
    expected = user.reshape(-1)[index[1]] + 0.5 / scale[1]
    np.testing.assert_allclose(new["user.w"].reshape(-1)[index[1]], expected, rtol=1e-5)


def test_unscaled_weights_come_back_to_the_bit() -> None:
    user, after = normal(5, 3) * np.float32(1e10), normal(5, 3) * np.float32(1e-10)
    origin = Origin("w", (5, 3), np.arange(15).reshape(5, 3))
    new = export_weights({"w": after}, {"w": user}, {"w": origin}, {"w": user})
    assert np.array_equal(new["w"], after)


def test_dead_channels_stay() -> None:
    user = normal(2, 2)
    scale = np.array([[0.0, 0.0], [2.0, 2.0]])
    origin = Origin("w", (2, 2), np.arange(4).reshape(2, 2), scale)
    old = (user * scale).astype(np.float32)
    new = export_weights({"w": old + 1}, {"w": old}, {"w": origin}, {"w": user})["w"]
    assert np.array_equal(new[0], user[0])
    np.testing.assert_allclose(new[1], user[1] + 0.5, rtol=1e-6)


def test_parts_of_one_tensor_meet_again() -> None:
    user, after = normal(6), normal(6)
    origins = {"a": Origin("w", (6,), np.array([5, 1, 3])), "b": Origin("w", (6,), np.array([0, 2]))}
    trained = {name: after[o.index] for name, o in origins.items()}
    initial = {name: user[o.index] for name, o in origins.items()}
    new = export_weights(trained, initial, origins, {"w": user})["w"]
    assert np.array_equal(new, np.concatenate([after[:4], user[4:5], after[5:]]))


def folded(conv: torch.nn.Conv2d, norm: torch.nn.BatchNorm2d) -> tuple[Graph, dict[str, np.ndarray]]:
    """Convolution and batch norm as the compiler folds them, and the user's tensors."""
    builder, users = Builder(), {}

    def const(name: str, tensor: torch.Tensor, axes: tuple[int, ...] = (0,)) -> Const:
        users[name] = tensor.detach().numpy().copy()
        index = np.arange(tensor.numel()).reshape(tensor.shape).transpose(axes)
        data = np.ascontiguousarray(users[name].transpose(axes))
        return builder.const(data, name, Origin(name, tuple(tensor.shape), index))

    x = Value("x", TensorType((1, 5, 5, 3)))
    h = builder.call("nn.conv2d", x, const("conv.weight", conv.weight, (0, 2, 3, 1)), const("conv.bias", conv.bias))
    statistics = (const("bn.running_mean", norm.running_mean), const("bn.running_var", norm.running_var))
    y = builder.call("nn.batch_norm", h, const("bn.weight", norm.weight), const("bn.bias", norm.bias), *statistics)
    graph = Graph("main", (x,), (), tuple(builder.consts.values()), tuple(builder.nodes), (y,))
    return fold_batch_norm(graph.renumbered()), users


def test_the_module_computes_what_the_device_computes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    conv, norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4).eval()
    module = torch.nn.Module()
    module.conv, module.bn = conv, norm
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 3)
        norm.weight.normal_()
        norm.bias.normal_()
    graph, users = folded(conv, norm)
    initial = {c.name: c.data for c in graph.consts}
    trained = {name: data + 0.1 * normal(*data.shape) for name, data in initial.items()}
    device = replace(graph, consts=tuple(replace(c, data=trained[c.name]) for c in graph.consts))
    x = normal(1, 5, 5, 3)
    expected = evaluate(device, [x]).outputs[0]

    origins = {c.name: c.origin for c in graph.consts if c.origin}
    weights = export_weights(trained, initial, origins, users)
    assert sorted(weights) == ["bn.bias", "conv.weight"]
    save_weights(tmp_path / "w.npz", weights)
    load_weights(module, tmp_path / "w.npz")
    with torch.no_grad():
        y = norm(conv(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))).numpy()
    np.testing.assert_allclose(y.transpose(0, 2, 3, 1), expected, rtol=1e-4, atol=1e-4)


def refuse(module: torch.nn.Module, path: Path) -> TTEError:
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(TTEError) as caught:
        load_weights(module, path)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    return caught.value


def test_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    path = tmp_path / "w.npz"
    save_weights(path, {"weight": normal(2, 3), "biass": normal(2)})
    error = refuse(module, path)
    assert error.code == "TTE-E063" and "did you mean bias?" in error.fix
    save_weights(path, {"bias": normal(2), "weight": normal(5, 3)})
    error = refuse(module, path)
    assert error.code == "TTE-E064" and "(5, 3)" in error.what
    save_weights(path, {"bias": np.array(["a", "b"])})
    assert refuse(module, path).code == "TTE-E064"
    save_weights(path, {"bias": np.zeros(2, np.int32)}, {"bias": 1})
    error = refuse(module, path)
    assert error.code == "TTE-E064" and "of a quantised model" in error.what and "--model" in error.fix
    assert refuse(module, tmp_path / "nowhere.npz").code == "TTE-E061"
    with pytest.raises(TTEError):
        save_weights(tmp_path / "no" / "folder.npz", {})


def test_only_the_module_that_was_compiled(tmp_path: Path) -> None:
    module, path = torch.nn.Linear(3, 2), tmp_path / "w.npz"
    before = {name: checksum(tensor.detach().numpy()) for name, tensor in module.named_parameters()}
    save_weights(path, {"weight": normal(2, 3), "bias": normal(2)}, before)
    assert sorted(np.load(path).files) == ["bias", "weight"]
    for _ in range(2):  # what is there already is no mistake
        load_weights(module, path)
    with torch.no_grad():
        module.bias += 1
    error = refuse(module, path)
    assert error.code == "TTE-E065" and "1 of 2" in error.what and "bias" in error.what
    load_weights(module, path, strict=False)
    assert np.array_equal(module.bias.detach().numpy(), np.load(path)["bias"])
    save_weights(path, {"bias": normal(2)}, {})  # a new head: there is nothing to compare
    load_weights(module, path)
    save_weights(path, {"weight_bias": normal(2)}, {"weight_bias": 0})
    error = refuse(module, path)
    assert error.code == "TTE-E063" and "--model" in error.fix


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 2000), st.integers(0, 255), st.booleans())
def test_damaged_files(tmp_path_factory, position: int, byte: int, truncate: bool) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    save_weights(path, {"weight": np.zeros((2, 3), np.float32), "bias": np.zeros(2, np.float32)})
    content = bytearray(path.read_bytes())
    position %= len(content)
    if truncate:
        del content[position:]
    else:
        content[position] = byte
    path.write_bytes(content)
    try:
        read_npz(path, "TTE-E061", "")
    except TTEError as problem:
        assert problem.code == "TTE-E061"
