"""PyTorch -> Relax -> tte IR: a module with example inputs, an exported program, or a .pt2 file."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tte.document import tally
from tte.errors import TTEError
from tte.frontends.lower import Imported, Refused, Unsupported, Weight, lower, refuse_nonfinite, refuse_unsupported
from tte.frontends.relax import GIVEN, constant_index, import_exported_program, quantized_grid
from tte.ir import Graph

# ATen operators that go all the way through. Others are decomposed by PyTorch, and refused if that does not help.
SUPPORTED = frozenset(
    """
    conv1d.default conv2d.default conv2d.padding conv1d.padding conv_transpose1d.default conv_transpose2d.input
    linear.default addmm.default
    matmul.default mm.default bmm.default relu.default relu6.default hardtanh.default clamp.default clamp_min.default
    clamp_max.default leaky_relu.default hardsigmoid.default hardswish.default sigmoid.default tanh.default silu.default
    gelu.default erf.default softplus.default neg.default exp.default log.default sqrt.default rsqrt.default abs.default
    sign.default square.default pow.Tensor_Scalar add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Tensor rsub.Scalar
    mul.Tensor mul.Scalar div.Tensor div.Scalar reciprocal.default maximum.default minimum.default
    max_pool1d.default max_pool2d.default avg_pool1d.default avg_pool2d.default adaptive_avg_pool1d.default
    adaptive_avg_pool2d.default adaptive_max_pool2d.default view.default _unsafe_view.default reshape.default
    flatten.using_ints unflatten.int permute.default transpose.int cat.default chunk.default split.Tensor
    split_with_sizes.default slice.Tensor select.int index_select.default narrow.default stack.default pad.default
    constant_pad_nd.default
    upsample_nearest2d.vec upsample_bilinear2d.vec mean.dim mean.default sum.default sum.dim_IntList softmax.int
    log_softmax.int _native_batch_norm_legit_no_training.default
    dropout.default layer_norm.default group_norm.default instance_norm.default
    squeeze.default squeeze.dim squeeze.dims unsqueeze.default expand.default expand_as.default contiguous.default
    clone.default alias.default detach.default to.dtype getitem sym_size.int _assert_tensor_metadata.default
    lift_fresh_copy.default index.Tensor
    quantize_per_tensor.default dequantize_per_tensor.default dequantize_per_channel.default
    """.split()
)


def import_module(module: Any, example_inputs: Sequence[Any] | None, name: str) -> Graph:
    """The forward graph of an ``nn.Module`` in eval mode.

    example_inputs: what its forward takes, batch 1. Raises TTEError.
    """
    import torch

    refuse_training_mode(module)
    arrays = (torch.Tensor, np.ndarray)
    given = (example_inputs,) if isinstance(example_inputs, arrays) else example_inputs
    if not given or not isinstance(given, tuple | list) or not all(isinstance(x, arrays) for x in given):
        what = f"{type(module).__name__} needs example inputs: a module alone does not say what it takes"
        raise TTEError(
            "TTE-E021",
            f"example_inputs is no tuple of tensors: {type(given).__name__}" if given else what,
            fix="give example_inputs=(x,) with a tensor of the shape that the device will see, batch 1",
        )
    inputs = tuple(torch.as_tensor(x) for x in given)
    for x in inputs:
        if x.ndim and x.shape[0] != 1:
            raise _batch_error(tuple(x.shape))
    try:
        with _quiet(), torch.enable_grad():  # else a no_grad() of the model's own leaves no trace
            program = torch.export.export(module, inputs, strict=False)
    # What torch.export documents for data-dependent control flow and inputs that do not fit; the model itself may
    # raise anything of these too.
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, NotImplementedError) as e:
        first = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise TTEError(
            "TTE-E026",
            f"torch.export cannot trace {type(module).__name__}: {first}",
            where=type(e).__name__,
            fix="the forward must run on the example inputs, without `if` or loops that depend on tensor values",
        ) from e
    return import_program(program, name)


def read_program(path: Path) -> Any:
    """The exported program of a .pt2 file. Raises TTEError."""
    import pickle
    import zipfile

    import torch

    if not path.is_file():
        raise TTEError("TTE-E020", "there is no such file", where=str(path), fix="check the path")
    # Programs of PT2E quantisation use operators that are known when this module has been imported.
    import torch.ao.quantization.fx._decomposed  # noqa: F401

    try:
        with _quiet():
            return torch.export.load(path)
    except (
        RuntimeError, OSError, ValueError, TypeError, LookupError, AttributeError, AssertionError, EOFError,
        zipfile.BadZipFile, pickle.UnpicklingError,
    ) as e:  # fmt: skip
        raise TTEError(
            "TTE-E020",
            "this is not a readable exported program",
            where=str(path),
            fix="write it again with torch.export.save",
        ) from e


def import_program(program: Any, name: str) -> Graph:
    """The forward graph of a ``torch.export.ExportedProgram``. Raises TTEError."""
    _refuse_signature(program)
    _refuse_control_flow(program)
    _refuse_active_layers(program)
    stops = _gradient_stops(program)  # decompositions dissolve no_grad()
    with _quiet():
        program = program.run_decompositions({})  # makes in-place operators functional
        program = _decompose_unsupported(program)
    refuse_unsupported(stops + _unsupported(program))
    tensors = dict(program.state_dict) | dict(program.constants)
    targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.target is not None}
    integers = _integer_weights(program)
    weights = {
        variable: Weight(integers.get(variable, target), _array(tensors[target], target))
        for variable, target in targets.items()
        if target in tensors and (tensors[target].is_floating_point() or variable in integers)
    }
    function, layers = import_exported_program(program, module_path)
    return lower(Imported(function, GIVEN + program.graph_signature.user_inputs[0], weights, layers), name)


def module_path(node: Any) -> str:
    """The path of the module that an fx node was traced in: "layer1.0.conv1"."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    return str(path).removeprefix("L['self']").lstrip(".").split("@")[0]


def _integer_weights(program: Any) -> dict[str, str]:
    """Variable -> the user's name, of weights that were quantised and folded (PT2E): "conv1.weight" of its module."""
    names = {}
    for node in program.graph.nodes:
        if _name(node).startswith("dequantize") and node.args[0].op == "placeholder":
            reader = next(iter(node.users), node)
            names[node.args[0].name] = f"{module_path(reader)}.weight".lstrip(".")
    return names


def _array(tensor: Any, name: str) -> np.ndarray:
    if not tensor.is_floating_point():
        return np.asarray(tensor.detach().cpu().numpy())
    array = np.asarray(tensor.detach().cpu().float().numpy())
    refuse_nonfinite(array, name)
    return array


def _batch_error(shape: tuple[int, ...]) -> TTEError:
    return TTEError(
        "TTE-E027",
        f"the input has batch {shape[0]}: {shape}",
        where="first dimension of the input",
        fix=f"export again with batch 1, shape {(1, *shape[1:])}: the device learns from one sample at a time",
    )


def refuse_training_mode(module: Any) -> None:
    """Dropout and batch norm behave differently in training mode; a module without them may stay in it."""
    import torch

    kinds = (torch.nn.modules.batchnorm._BatchNorm, torch.nn.modules.dropout._DropoutNd)
    active = [f"{path or 'model'} ({type(m).__name__})" for path, m in module.named_modules()
              if m.training and isinstance(m, kinds)]  # fmt: skip
    if active:
        raise TTEError(
            "TTE-E029",
            f"the model is in training mode: {tally(len(active), 'layer')} would be random or change statistics",
            where=", ".join(active[:5]) + (", ..." if len(active) > 5 else ""),
            fix="call model.eval() first: tte trains with frozen batch-norm statistics and without dropout",
        )


def _refuse_active_layers(program: Any) -> None:
    """The same, of a program that was exported in training mode."""
    active = []
    for node in program.graph.nodes:
        target = getattr(node.target, "__name__", "")
        training = {"dropout.default": 2, "batch_norm.default": 5}.get(target)
        if training is not None and node.args[training]:
            active.append(f"{module_path(node) or 'model'} ({target.split('.')[0]})")
        if target.startswith(("_native_batch_norm_legit_functional", "_native_batch_norm_legit.no_stats", "bernoulli")):
            active.append(f"{module_path(node) or 'model'} ({target.split('.')[0]})")
    if active:
        raise TTEError(
            "TTE-E029",
            "the program was exported in training mode: dropout or batch norm is active",
            where=", ".join(active),
            fix="call model.eval() before torch.export.export",
        )


def _refuse_signature(program: Any) -> None:
    """One input of float32 with batch 1 and known shape, one output."""
    import torch

    signature = program.graph_signature
    if len(signature.user_inputs) != 1 or len(signature.user_outputs) != 1:
        raise TTEError(
            "TTE-E023",
            f"the model has {tally(len(signature.user_inputs), 'input')} and "
            f"{tally(len(signature.user_outputs), 'output')}",
            where=f"inputs {list(signature.user_inputs)}, outputs {list(signature.user_outputs)}",
            fix="wrap it in a module that takes one tensor and returns one tensor",
        )
    value = next(n.meta["val"] for n in program.graph.nodes if n.name == signature.user_inputs[0])
    if not isinstance(value, torch.Tensor):
        raise TTEError("TTE-E023", "the input is not a tensor", fix="wrap the model: one tensor in, one tensor out")
    if not all(isinstance(d, int) for d in value.shape):
        raise TTEError(
            "TTE-E022",
            f"the input has dynamic dimensions: {tuple(value.shape)}",
            where=str(signature.user_inputs[0]),
            fix="export without dynamic_shapes: memory is planned at compile time",
        )
    if value.dtype != torch.float32:
        raise TTEError("TTE-E023", f"the input is {value.dtype}", fix="give a float32 input")
    if value.ndim and value.shape[0] != 1:
        raise _batch_error(tuple(value.shape))


def _refuse_control_flow(program: Any) -> None:
    """cond, while_loop, map, scan: operators that take functions."""
    from torch._ops import HigherOrderOperator

    found = [n for n in program.graph.nodes if isinstance(n.target, HigherOrderOperator)
             and n.target.__name__ not in ("wrap_with_set_grad_enabled", "wrap_with_autocast")]  # fmt: skip
    if found:
        raise TTEError(
            "TTE-E026",
            f"the model has control flow: {', '.join(sorted({n.target.__name__ for n in found}))}",
            where=", ".join(module_path(n) or "model" for n in found),
            fix="a device's graph is a straight line: choose the branch at export time",
        )


def _gradient_stops(program: Any) -> list[Unsupported]:
    """detach() and no_grad() behind parameters: the scheme says what learns, and gradients go all the way there."""
    learns = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "PARAMETER"}
    found = []
    for node in program.graph.nodes:
        if not any(n.name in learns for n in node.all_input_nodes):
            continue
        learns.add(node.name)
        name = _name(node)
        if name in ("detach.default", "detach_.default"):
            what = "detach"
        elif name == "wrap_with_set_grad_enabled" and not node.args[0]:
            what = "no_grad"
        else:
            continue
        why = "stops the gradient of parameters: remove it, and let the scheme say what learns"
        found.append(Unsupported(module_path(node), what, "", why))
    return found


def _decompose_unsupported(program: Any) -> Any:
    """Let PyTorch take apart what is not in the table; what is in the table stays whole."""
    import torch

    known = torch.export.default_decompositions()
    table = {n.target: known[n.target] for n in program.graph.nodes
             if _name(n) not in SUPPORTED and n.target in known}  # fmt: skip
    return program.run_decompositions(table) if table else program


def _name(node: Any) -> str:
    return str(getattr(node.target, "__name__", node.target)) if node.op == "call_function" else "getitem"


def _unsupported(program: Any) -> list[Unsupported]:
    found = []
    for node in program.graph.nodes:
        why = ""
        if _name(node) == "adaptive_max_pool2d.default":
            indices = [u for u in node.users if u.args[1:] == (1,) and u.users]
            why = "its indices are used" if indices else "only to (1, 1)" if list(node.args[1]) != [1, 1] else ""
        check = quantized_grid if "quantize_per_" in _name(node) else constant_index
        if _name(node) == "index.Tensor" or check is quantized_grid:
            try:
                check(program, node)
            except Refused as problem:
                why = str(problem)
        if _name(node).startswith("upsample_") and node.args[-1] and node.args[2] is not True:
            # align_corners (args[2] of bilinear) does not look at the factor
            size = node.args[0].meta["val"].shape[2:]
            exact = all(int(n * s) == n * s for n, s in zip(size, node.args[-1], strict=True))
            why = "" if exact else "the scale factor does not divide: give size= or recompute_scale_factor=True"
        if _name(node) not in SUPPORTED or why:
            types = ", ".join(_type(a) for a in node.args if hasattr(a, "meta"))
            found.append(Unsupported(module_path(node), _name(node).split(".")[0], f"({types})", why))
    return found


def _type(node: Any) -> str:
    value = node.meta.get("val")
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if hasattr(value, "dtype") else "?"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export warns about its own insides, and logs them."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
