"""TVM's importers, with their gaps filled: a model -> Relax. The only module that imports TVM."""

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from tte.errors import TTEError
from tte.frontends.lower import Refused

# In front of users' names: TVM calls its own variables lv, gv, ... without looking whether a parameter has that name.
GIVEN = "given:"


@contextlib.contextmanager
def translate_errors(where: str) -> Iterator[None]:
    """What TVM raises on models that it cannot import, as TTEError; its chatter is swallowed."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    # TVM has no exception of its own: these are what its importers and its type rules raise.
    except (
        ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
    ) as problem:  # fmt: skip
        lines = [line for line in str(problem).splitlines() if line.strip()]
        raise TTEError(
            "TTE-E025",
            f"TVM cannot import this model: {lines[-1] if lines else type(problem).__name__}",
            where=where,
            fix="check that the model runs by itself; if it does, simplify the operator that is named",
        ) from problem


def tidy_builder() -> Any:
    """A BlockBuilder that does not complain on stderr when an importer fails in the middle of a function."""
    from tvm import relax

    class Tidy(relax.BlockBuilder):  # type: ignore[misc]
        def _exit_function_scope(self, kind: Any, value: Any, trace: Any) -> None:
            if kind is not None:
                self._end_block()
            super()._exit_function_scope(kind, value, trace)

    return Tidy()


def import_exported_program(program: Any, path: Callable[[Any], str]) -> tuple[Any, dict[str, str]]:
    """The Relax function of a ``torch.export.ExportedProgram`` and the layer of each variable.

    All tensors are parameters of the function. ``path`` gives the module path of an fx node.
    Converters of TVM that lose arguments are replaced here.
    """
    from tvm import relax
    from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

    layers: dict[str, str] = {}

    class Importer(ExportedProgramImporter):  # type: ignore[misc]
        def create_convert_map(self) -> dict[str, Callable[[Any], Any]]:
            own = {
                "_native_batch_norm_legit_no_training.default": self.batch_norm,
                "hardtanh.default": self.hardtanh,
                "clamp.default": self.clamp,
                "clamp_min.default": self.clamp,
                "clamp_max.default": lambda n: self.limit("minimum", self.env[n.args[0]], n.args[1]),
                "max_pool2d.default": self.max_pool,
                "max_pool1d.default": self.max_pool,
                "adaptive_max_pool2d.default": self.adaptive_max_pool,
                "conv1d.padding": self.conv,
                "conv2d.padding": self.conv,
                "rsub.Tensor": self.reversed_subtract,
                "rsub.Scalar": self.reversed_subtract,
                "index.Tensor": self.index,
                "upsample_nearest2d.vec": self.resize,
                "upsample_bilinear2d.vec": self.resize,
                "quantize_per_tensor.default": self.quantize,
                "dequantize_per_tensor.default": self.dequantize,
                "dequantize_per_channel.default": self.dequantize,
                "_unsafe_view.default": self._reshape,
                "square.default": lambda n: self.emit("multiply", self.env[n.args[0]], self.env[n.args[0]]),
            }
            table = super().create_convert_map() | own
            return {name: self.recorded(convert) for name, convert in table.items()}

        def create_input_vars(self, program: Any) -> tuple[dict[str, Any], dict[str, Any], Any]:
            stored, inputs, ranges = super().create_input_vars(program)
            return stored, {name: relax.Var(GIVEN + name, v.ty) for name, v in inputs.items()}, ranges

        def recorded(self, convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def convert_and_record(node: Any) -> Any:
                result = convert(node)
                for value in result if isinstance(result, list | tuple) else [result]:
                    if isinstance(value, relax.Var):
                        layers.setdefault(value.name, path(node))
                return result

            return convert_and_record

        def emit(self, name: str, *args: Any, **attrs: Any) -> Any:
            function = relax.op
            for part in name.split("."):
                function = getattr(function, part)
            return self.block_builder.emit(function(*args, **attrs))

        def batch_norm(self, node: Any) -> Any:
            x, gamma, beta, mean, var, _, eps = node.args
            channels = int(self.shape_of(self.env[x])[1])
            default = [(gamma, 1.0), (beta, 0.0), (mean, 0.0), (var, 1.0)]
            tensors = [
                relax.const(np.full(channels, fill, np.float32)) if n is None else self.env[n] for n, fill in default
            ]
            y = self.emit("nn.batch_norm", self.env[x], *tensors, axis=1, epsilon=eps, training=False)
            return [self.block_builder.emit(y[0])]

        def hardtanh(self, node: Any) -> Any:
            low, high = arguments(node, -1.0, 1.0)
            return self.emit("clip", self.env[node.args[0]], float(low), float(high))

        def clamp(self, node: Any) -> Any:
            """Not clip: their gradients differ at the bounds."""
            low, high = arguments(node, None, None, names=("min", "max"))
            return self.limit("minimum", self.limit("maximum", self.env[node.args[0]], low), high)

        def limit(self, name: str, x: Any, bound: float | None) -> Any:
            return x if bound is None else self.emit(name, x, relax.const(float(bound), "float32"))

        def max_pool(self, node: Any) -> Any:
            size, stride, padding, dilation, ceil = arguments(node, None, (), 0, 1, False)
            name = "nn.max_pool1d" if "1d" in node.target.__name__ else "nn.max_pool2d"
            return self.emit(name, self.env[node.args[0]], size, stride or size, padding, dilation, ceil_mode=ceil)

        def conv(self, node: Any) -> Any:
            """Padding by name: "same" or "valid"."""
            x, w = self.env[node.args[0]], self.env[node.args[1]]
            bias, strides, mode, dilation, groups = arguments(node, None, (1,), "valid", (1,), 1, skip=2)
            kernel = list(self.shape_of(w))[2:]
            spread = [*dilation] * (len(kernel) // len(dilation))
            total = [d * (int(k) - 1) if mode == "same" else 0 for k, d in zip(kernel, spread, strict=True)]
            padding = [t // 2 for t in total] + [t - t // 2 for t in total]
            impl = self._conv1d_impl if len(kernel) == 1 else self._conv2d_impl
            strides = [*strides] * (len(kernel) // len(strides))
            return impl(x, w, None if bias is None else self.env[bias], strides, padding, spread, groups)

        def reversed_subtract(self, node: Any) -> Any:
            left = node.args[1]
            left = relax.const(float(left), "float32") if isinstance(left, int | float) else self.env[left]
            return self.emit("subtract", left, self.env[node.args[0]])

        def index(self, node: Any) -> Any:
            """One constant list of numbers; anything else was refused."""
            axis, numbers = constant_index(program, node)
            return self.emit("take", self.env[node.args[0]], relax.const(numbers), axis=axis)

        def quantize(self, node: Any) -> Any:
            scale, zero = quantized_grid(program, node)
            dtype = str(node.args[-1]).removeprefix("torch.")
            return self.emit(
                "quantize", self.env[node.args[0]], relax.const(scale), relax.const(zero.astype(dtype)), out_dtype=dtype
            )

        def dequantize(self, node: Any) -> Any:
            scale, zero = quantized_grid(program, node)
            x = self.env[node.args[0]]
            constants = relax.const(scale), relax.const(zero.astype(str(x.ty.dtype).strip("'\"")))
            return self.emit("dequantize", x, *constants, axis=node.args[3] if scale.ndim else -1)

        def adaptive_max_pool(self, node: Any) -> Any:
            if list(node.args[1]) != [1, 1]:
                raise ValueError(f"adaptive max pooling to {list(node.args[1])}: only (1, 1) is supported")
            y = self.emit("max", self.env[node.args[0]], axis=[2, 3], keepdims=True)
            return [y]

        def resize(self, node: Any) -> Any:
            linear = "bilinear" in node.target.__name__
            align = linear and bool(node.args[2])
            kind = "align_corners" if align else "half_pixel" if linear else "asymmetric"
            return self.emit(
                "image.resize2d",
                self.env[node.args[0]],
                tuple(int(d) for d in node.meta["val"].shape[2:]),
                layout="NCHW",
                method="linear" if linear else "nearest_neighbor",
                coordinate_transformation_mode=kind,
                rounding_method="" if linear else "floor",
            )

    def arguments(node: Any, *defaults: Any, names: tuple[str, ...] = (), skip: int = 1) -> list[Any]:
        given = list(node.args[skip:])
        keywords = [node.kwargs.get(n, d) for n, d in zip(names, defaults, strict=True)] if names else list(defaults)
        return given + keywords[len(given) :]

    importer = Importer()
    importer.block_builder = tidy_builder()
    with translate_errors("exported program"):
        importer.from_exported_program(program, True, True, False, None)
        # from_exported_program would bind the buffers as nameless constants; the builder still has them as parameters.
        return importer.block_builder.get()["main"], layers


def constant_index(program: Any, node: Any) -> tuple[int, np.ndarray]:
    """(axis, numbers) of an index.Tensor node. Raises Refused unless it is one constant list of numbers."""
    found = [(axis, index) for axis, index in enumerate(node.args[1]) if index is not None]
    constants = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.target is not None}
    if len(found) != 1:
        raise Refused("indices along more than one dimension")
    axis, source = found[0]
    while source.op == "call_function" and len(source.all_input_nodes) == 1:
        source = source.all_input_nodes[0]
    tensors = dict(program.state_dict) | dict(program.constants)
    tensor = tensors.get(constants.get(source.name, ""))
    if tensor is None or tensor.ndim != 1 or tensor.is_floating_point() or str(tensor.dtype) == "torch.bool":
        raise Refused("only with one constant list of numbers")
    return axis, tensor.detach().cpu().numpy().astype(np.int64)


def quantized_grid(program: Any, node: Any) -> tuple[np.ndarray, np.ndarray]:
    """(scale, zero point) of a node of PyTorch's decomposed quantisation. Raises Refused."""
    values = [stored_tensor(program, a) if hasattr(a, "op") else np.asarray(a) for a in node.args[1:3]]
    if any(v is None for v in values):
        raise Refused("a scale or zero point that the model computes")
    low, high, dtype = node.args[-3], node.args[-2], str(node.args[-1]).removeprefix("torch.")
    limits = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-(2**15), 2**15 - 1), "int32": (-(2**31), 2**31 - 1)}
    if dtype not in limits:
        raise Refused(f"{dtype} values")
    if node.target.__name__.startswith("quantize") and (low, high) != limits[dtype]:
        raise Refused(f"activations limited to {low} to {high}; give {dtype} its whole range")
    scale, zero = (np.asarray(v) for v in values)
    if not ((zero >= limits[dtype][0]) & (zero <= limits[dtype][1])).all():
        raise Refused(f"the zero point {zero.reshape(-1)[0]} is no {dtype}")
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise Refused(f"the scale {scale.reshape(-1)[0]}; scales are above 0 and finite")
    return scale.astype(np.float32), zero


def stored_tensor(program: Any, node: Any) -> np.ndarray | None:
    """The parameter, buffer or constant that a placeholder of an exported program stands for."""
    targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.target is not None}
    tensor = (dict(program.state_dict) | dict(program.constants)).get(targets.get(node.name, ""))
    return None if tensor is None else np.asarray(tensor.detach().cpu().numpy())


def import_onnx(model: Any, named: Mapping[str, np.ndarray], layer: Callable[[Any], str]) -> tuple[Any, dict[str, str]]:
    """The Relax function of a checked ``onnx.ModelProto`` and the layer of each variable.

    ``named`` are the initializers that become parameters; ``layer`` gives the layer of an ONNX node.
    """
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter

    layers: dict[str, str] = {}

    class Importer(ONNXGraphImporter):  # type: ignore[misc]
        def _parse_graph_initializers(self, graph: Any) -> None:
            for tensor in graph.initializer:
                array = self._parse_array(tensor)
                if tensor.name in named:
                    variable = self._new_var(GIVEN + tensor.name, shape=array.shape, dtype=array.dtype)
                    self._params[variable.name] = (variable, array)
                    self._nodes[tensor.name] = variable
                else:
                    self._nodes[tensor.name] = relax.const(array)

        def _sanitize_name(self, name: str) -> str:
            return GIVEN + name

        def _construct_nodes(self, graph: Any) -> None:
            for node in graph.node:
                super()._construct_nodes(type(graph)(node=[node]))
                for name in node.output:
                    value = self._nodes.get(name)
                    # TVM leaves the last call open; bound here, it belongs to this layer and is computed once.
                    if isinstance(value, relax.Call | relax.TupleGetItem):
                        value = self._nodes[name] = self.bb.emit(value)
                    if isinstance(value, relax.Var):
                        layers.setdefault(value.name, layer(node))

        def _convert_operator(self, op_name: str, inputs: Any, attrs: dict[str, Any], opset: int) -> Any:
            convert = {
                "Clip": self.clip,
                "Pad": self.pad,
                "Dropout": lambda inputs, attrs: inputs[0],
                "Softplus": lambda inputs, attrs: relax.op.nn.softplus(inputs[0]),
                "Gather": self.gather,
                "GatherND": self.gather_nd,
                "InstanceNormalization": self.normalize,
                "GroupNormalization": self.normalize,
            }
            if op_name in convert:
                return self.bb.normalize(convert[op_name](inputs, attrs))
            return super()._convert_operator(op_name, inputs, attrs, opset)

        def clip(self, inputs: Any, attrs: dict[str, Any]) -> Any:
            low = attrs.get("min", -math.inf) if inputs[1] is None else constant(inputs[1]).item()
            high = attrs.get("max", math.inf) if inputs[2] is None else constant(inputs[2]).item()
            return relax.op.clip(inputs[0], float(low), float(high))

        def pad(self, inputs: Any, attrs: dict[str, Any]) -> Any:
            rank = inputs[0].ty.ndim
            pads = np.asarray(attrs["pads"] if "pads" in attrs else constant(inputs[1])).reshape(2, -1)
            axes = range(rank) if inputs[3] is None else [int(a) % rank for a in constant(inputs[3])]
            value = attrs.get("value", 0.0) if inputs[2] is None else constant(inputs[2]).item()
            width = np.zeros((rank, 2), int)
            width[list(axes)] = pads.T
            mode = attrs.get("mode", b"constant").decode()
            return relax.op.nn.pad(inputs[0], width.flatten().tolist(), mode, float(value))

        def gather(self, inputs: Any, attrs: dict[str, Any]) -> Any:
            axis = attrs.get("axis", 0)
            size = int(list(inputs[0].ty.shape)[axis])
            return relax.op.take(inputs[0], relax.const(constant(inputs[1]).astype(np.int64) % size), axis)

        def gather_nd(self, inputs: Any, attrs: dict[str, Any]) -> Any:
            numbers = constant(inputs[1])
            if numbers.ndim != 2 or numbers.shape[1] != 1 or attrs.get("batch_dims", 0):
                raise ValueError("GatherND along more than one dimension")
            return self.gather([inputs[0], relax.const(numbers[:, 0].astype(np.int64))], {"axis": 0})

        def normalize(self, inputs: Any, attrs: dict[str, Any]) -> Any:
            x, gamma, beta = inputs
            axes, epsilon = list(range(2, x.ty.ndim)), attrs.get("epsilon", 1e-5)
            if "num_groups" not in attrs:
                return relax.op.nn.instance_norm(x, gamma, beta, 1, axes, epsilon)
            if int(list(gamma.ty.shape)[0]) != int(list(x.ty.shape)[1]):
                raise ValueError("GroupNormalization with one scale per group: export with opset 21")
            return relax.op.nn.group_norm(x, gamma, beta, attrs["num_groups"], 1, axes, epsilon)

    def constant(expression: Any) -> np.ndarray:
        if not isinstance(expression, tvm.ir.GenericConst):
            raise ValueError("a bound, padding or axis is computed by the model")
        return np.asarray(expression.value.numpy())

    importer = Importer({}, "float32", keep_params_in_input=True)
    importer.bb = tidy_builder()
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    with translate_errors("ONNX model"):
        module = importer.from_onnx(model.graph, opset)
    return module["main"], layers
