"""The update scheme: what learns, with which loss and optimizer, and what it may cost. A YAML file or a short form."""

import difflib
import fnmatch
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard

import numpy as np
import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from tte.document import Document, Place, read_yaml, show, suggest, tally
from tte.errors import TTEError
from tte.ir import Const, Graph, Node, Value

MAX_PATTERNS = 1000
SHORT_FORM = re.compile(r"full|last-layer|bias-only|last-k: ?[1-9][0-9]{0,5}")
SHORT_FORMS = "full, last-layer, bias-only, last-k:N"


def parse_size(value: Any) -> int:
    """Bytes from 262144, "256KB", "1.5 MB"; KB is 1024 bytes."""
    match = (
        re.fullmatch(r"(\d{1,10}(?:\.\d{1,6})?) ?(B|KB|KiB|MB|MiB)?", str(value)) if type(value) in (int, str) else None
    )
    if not match:
        raise ValueError(f"{show(value)} is not a size; write 256KB, 1MB or a number of bytes")
    size = int(float(match[1]) * {"K": 1024, "M": 1024 * 1024}.get((match[2] or "B")[0], 1))
    if size < 1:
        raise ValueError("a budget is at least one byte")
    return size


def _parse_count(value: Any) -> int | float:
    if type(value) is float and 0.0 < value <= 1.0:
        return value
    if type(value) is int and value >= 1:
        return value
    fix = f"which ones is said by select: {show(value)}" if isinstance(value, list | tuple) else "1 is one, 1.0 is all"
    raise ValueError(f"{show(value)} is neither a fraction in (0, 1] nor a number of channels; {fix}")


def _parse_select(value: Any) -> str | tuple[int, ...]:
    if value in ("first", "l2"):
        return str(value)
    if not isinstance(value, list | tuple):
        raise ValueError(f"{show(value)} is not first, l2 or a list of channels")
    if not value or not all(type(i) is int and i >= 0 for i in value) or len(set(value)) != len(value):
        raise ValueError("a list of channels holds different numbers from 0, at least one")
    return tuple(value)


def _parse_loss(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _parse_train(value: Any) -> Any:
    return f"last-k:{value['last-k']}" if isinstance(value, dict) and list(value) == ["last-k"] else value


def _kind_of_train(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "<rules>"
    by_number = isinstance(value, dict) and any(key in Indices.model_fields for key in value)
    return "<indices>" if by_number or isinstance(value, Indices) else "<short form>"


def _parse_short_form(value: Any) -> str:
    if isinstance(value, str) and SHORT_FORM.fullmatch(value):
        return value.replace(" ", "")
    near = difflib.get_close_matches(str(value)[:50], ("full", "last-layer", "bias-only", "last-k:6"), 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"{show(value)} is neither a list of rules nor one of {SHORT_FORMS}{hint}")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Numbers = Annotated[tuple[Annotated[float, Field(ge=-1e9, le=1e9)], ...], Field(strict=False, min_length=1)]


class Loss(_Model):
    """The loss; semantics of torch.nn.functional. ``class_weights``: one per class."""

    name: Literal["cross_entropy", "mse", "l1", "huber", "bce_with_logits"]
    reduction: Literal["mean", "sum"] = "mean"
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    class_weights: Numbers | None = None
    delta: float = Field(default=1.0, gt=0.0, le=1e9)

    @model_validator(mode="after")
    def _fits(self) -> "Loss":
        for key, losses in (
            ("label_smoothing", "cross_entropy"),
            ("class_weights", "cross_entropy"),
            ("delta", "huber"),
        ):
            if key in self.model_fields_set and self.name != losses:
                raise ValueError(f"{key} belongs to {losses}, not to {self.name}")
        if self.class_weights and (min(self.class_weights) < 0 or max(self.class_weights) <= 0):
            raise ValueError("class_weights are not negative, and one is above 0")
        return self


class Optimizer(_Model):
    """``clip_loss_grad``: the loss's gradient with respect to the output is limited to [-c, c], element by element."""

    name: Literal["sgd"] = "sgd"
    lr: float = Field(default=0.01, gt=0.0, le=1e6)
    momentum: float = Field(default=0.0, ge=0.0, lt=1.0)
    accumulate: int = Field(default=1, ge=1)
    clip_loss_grad: float | None = Field(default=None, gt=0.0, le=1e9)


class Channels(_Model):
    """Part of a weight's input channels: a fraction or a number of them, chosen by ``select``."""

    in_channels: Annotated[int | float, BeforeValidator(_parse_count)] | None = None
    select: Annotated[str | tuple[int, ...], BeforeValidator(_parse_select)] = "first"

    @model_validator(mode="after")
    def _counts(self) -> "Channels":
        if self.in_channels is None and isinstance(self.select, str):
            raise ValueError("in_channels is missing; add a fraction (0.25) or a number of input channels")
        if (
            isinstance(self.in_channels, int)
            and not isinstance(self.select, str)
            and self.in_channels != len(self.select)
        ):
            raise ValueError(f"in_channels is {self.in_channels}, but select lists {len(self.select)}")
        return self


class Rule(_Model):
    """What learns of the layers that ``layer`` (a name or a pattern) matches."""

    layer: str = Field(min_length=1, max_length=300)
    weight: Annotated[
        Annotated[Literal["all", "none"], Tag("<text>")] | Annotated[Channels, Tag("<channels>")],
        Discriminator(lambda v: "<channels>" if isinstance(v, dict | Channels) else "<text>"),
    ] = "none"
    bias: bool = False

    @model_validator(mode="after")
    def _says_something(self) -> "Rule":
        if not {"weight", "bias"} & self.model_fields_set:
            raise ValueError("the rule says neither what the weight does nor the bias; add weight: all or bias: true")
        return self


class Indices(_Model):
    """Layers by number, as schemes are published: the convolutions in the order of execution, from 0.

    The biases of the last ``n_bias_update`` learn, and of the weights ``weight_idx`` the part ``ratio`` of the input
    channels, those with the largest weights; 0: only the bias. The classifier has no number, and learns.
    """

    n_bias_update: int = Field(ge=0, le=10_000)
    weight_idx: Annotated[tuple[Annotated[int, Field(ge=0, le=10_000)], ...], Field(strict=False)]
    ratio: Annotated[tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...], Field(strict=False)]

    @model_validator(mode="after")
    def _fits(self) -> "Indices":
        if len(self.weight_idx) != len(self.ratio):
            raise ValueError(f"{tally(len(self.weight_idx), 'number')} in weight_idx, but {len(self.ratio)} in ratio")
        if len(set(self.weight_idx)) != len(self.weight_idx):
            raise ValueError("a number stands twice in weight_idx")
        return self


class Head(_Model):
    """The model's last layer is replaced by a new one of the same kind."""

    layer: str = Field(min_length=1, max_length=300)
    classes: int = Field(ge=1, le=100_000)
    init: Literal["zero"] = "zero"


class InputFormat(_Model):
    """What the caller passes. ``mean`` and ``std``: one number, or one per channel; x -> (x - mean) / std."""

    dtype: Literal["model", "int8", "uint8", "float32"] = "model"
    layout: Literal["model", "nhwc", "nchw", "nlc", "ncl"] = "model"
    mean: Numbers | None = None
    std: Numbers | None = None

    @field_validator("std")
    @classmethod
    def _positive(cls, std: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if std and min(std) < 1e-9:
            raise ValueError("a standard deviation is above 0")
        return std


class InputOutput(_Model):
    """``target``: None is what the loss needs: a label for cross_entropy, else float."""

    input: InputFormat = InputFormat()
    target: Literal["label", "float", "input"] | None = None


class Quantized(_Model):
    """How int8 models learn."""

    qas: bool = True
    weight_storage: Literal["int8_sr", "int8_nearest", "int16_ef", "fp32"] = "int8_sr"
    gradients: Literal["float32", "int8"] = "float32"
    requantize: Literal["fixed", "float", "tflite"] = "fixed"

    @property
    def rounding(self) -> str:
        """How an integer weight takes a step, see qnn.sgd."""
        return "nearest" if self.weight_storage == "int8_nearest" else "stochastic"


class Budget(_Model):
    """Bytes; None is no limit but the target's own."""

    sram: Annotated[int, BeforeValidator(parse_size)] | None = None
    flash: Annotated[int, BeforeValidator(parse_size)] | None = None


class UpdateScheme(_Model):
    """A validated scheme. ``train``: a short form, numbers of layers, or rules of which the last that matches holds."""

    version: Literal[1] = 1
    loss: Annotated[Loss, BeforeValidator(_parse_loss)] = Loss(name="cross_entropy")
    optimizer: Optimizer = Optimizer()
    train: Annotated[
        Annotated[str, BeforeValidator(_parse_short_form), Tag("<short form>")]
        | Annotated[tuple[Rule, ...], Field(strict=False), Tag("<rules>")]
        | Annotated[Indices, Tag("<indices>")],
        Discriminator(_kind_of_train),
        BeforeValidator(_parse_train),
    ]
    head: Head | None = None
    io: InputOutput = InputOutput()
    quantized: Quantized = Quantized()
    budget: Budget = Budget()

    _document: "Document | None" = PrivateAttr(None)

    @classmethod
    def load(cls, source: "UpdateScheme | Path | str | Mapping[str, Any]") -> "UpdateScheme":
        """Read a scheme: a YAML file, a short form ("full", "last-layer", "bias-only", "last-k:6"), or a dictionary.

        Raises TTEError (E030 unreadable, E031 not valid, E035 not available yet) with file, line and nearest name.
        """
        if isinstance(source, UpdateScheme):
            source._check()
            return source
        if source == "":
            fix = f"give a YAML file, or a short form: {SHORT_FORMS}"
            raise TTEError("TTE-E030", "the update scheme has no name: it is ''", where="--update-scheme", fix=fix)
        if isinstance(source, str) and SHORT_FORM.fullmatch(source):
            document = Document("update scheme", {"train": source})
        elif isinstance(source, str) and source.startswith("last-k") and not Path(source).exists():
            what = f"{show(source)} is not a short form"
            raise TTEError("TTE-E031", what, where="update scheme", fix="write last-k:N, the last N layers, N from 1")
        elif isinstance(source, str | Path):
            near = difflib.get_close_matches(str(source), ("full", "last-layer", "bias-only", "last-k:6"), 1)
            hint = f"did you mean {near[0]}? " if near else ""
            document = read_yaml(Path(source), f"{hint}give a YAML file, or a short form: {SHORT_FORMS}")
        else:
            document = Document("update scheme", source)
        if not isinstance(document.data, Mapping):
            raise TTEError(
                "TTE-E031",
                f"an update scheme is a mapping of keys to values, not {show(document.data)}",
                where=document.where(()),
                fix=f"begin with `version: 1`, or use a short form: {SHORT_FORMS}",
            )
        try:
            scheme = cls.model_validate(dict(document.data))
        except ValidationError as problem:
            raise _explain(problem, document) from problem
        scheme._document = document
        scheme._check()
        return scheme

    def _check(self) -> None:
        """What no single section can know, and what does not exist yet."""
        if self.io.target is not None and (self.io.target == "label") != (self.loss.name == "cross_entropy"):
            what = f"io.target is {self.io.target}, which does not fit {self.loss.name}"
            fix = (
                "use `target: label`" if self.loss.name == "cross_entropy" else "use `target: float` or `target: input`"
            )
            raise TTEError("TTE-E031", what, where=self.where("io", "target"), fix=fix)
        for key, plain in (("momentum", 0.0), ("accumulate", 1)):
            if getattr(self.optimizer, key) != plain:
                raise TTEError(
                    "TTE-E035",
                    f"not available yet: optimizer.{key}",
                    where=self.where("optimizer", key),
                    fix=f"remove it; plain sgd is {key}: {plain}",
                )

    def where(self, *path: str | int) -> str:
        """File, line and place of a value, for error messages."""
        return (self._document or Document("update scheme", None)).where(path)


# Where each model stands, so that an unknown key is answered with the keys that are valid there.
_PLACES: dict[Place, type[BaseModel]] = {
    (): UpdateScheme,
    ("loss",): Loss,
    ("optimizer",): Optimizer,
    ("train",): Indices,
    ("train", 0): Rule,
    ("train", 0, "weight"): Channels,
    ("head",): Head,
    ("io",): InputOutput,
    ("io", "input"): InputFormat,
    ("quantized",): Quantized,
    ("budget",): Budget,
}


_MISSING = {
    "train": f"add `train: full` ({SHORT_FORMS}), or a list of rules",
    "layer": "add the layer's name, as `tte analyze` lists it",
    "classes": "add the number of classes of the new head",
    "name": "add the name of the loss",
}


_FORMS = {"bool_type": "values: true, false", "float_type": "a number: 0.01", "int_type": "a whole number"}


def _explain(problem: ValidationError, document: Document) -> TTEError:
    errors = problem.errors(include_url=False)
    # A misspelt key is the cause where another is missing.
    error = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    path = tuple(p for p in error["loc"] if isinstance(p, int) or not p.startswith("<"))
    key = "update scheme" if not path else f"item {path[-1]}" if isinstance(path[-1], int) else path[-1]
    value, context, fix = error["input"], error.get("ctx", {}), "see docs/scheme.md for the format"
    if error["type"] == "extra_forbidden":
        what, fix = f"unknown key {show(key)}", suggest(key, _list_keys(path[:-1]), "keys")
    elif error["type"] == "missing":
        what, fix = f"{key} is missing", _MISSING.get(key, fix)
    elif error["type"] == "literal_error":
        what = f"{show(value)} is no value of {key}"
        values = re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]]
        fix = suggest(str(value)[:50], values + ["{in_channels: 0.25}"] * (key == "weight"), "values")
    elif error["type"] == "value_error":
        what, _, hint = str(context["error"]).partition("; ")
        what, fix = what if path and isinstance(path[-1], int) else f"{key}: {what}", hint or fix
    elif error["type"] == "model_type":
        what, fix = f"{key} is a mapping of keys to values, not {show(value)}", f"keys: {', '.join(_list_keys(path))}"
    else:
        what = f"{error['msg'].replace('Input', str(key), 1)}, not {show(value)}"
        fix = _FORMS.get(error["type"]) or _limits(path) or fix
        if isinstance(value, list | tuple):
            several = "a pattern for several layers: {a,b}, or a rule for each"
            fix = several if key == "layer" else "one value, not a list"
    return TTEError("TTE-E031", what, where=document.where(path), fix=fix)


def _limits(path: Place) -> str:
    """Between what the number there may be; nothing where it has no limits."""
    words = {"gt": "above", "ge": "from", "lt": "below", "le": "at most"}
    place, key = tuple(0 if isinstance(p, int) else p for p in path[:-1]), path[-1] if path else ""
    field = _PLACES[place].model_fields.get(str(key)) if place in _PLACES else None
    limits = field.metadata if field else []
    said = [f"{word} {getattr(x, k):g}" for x in limits for k, word in words.items() if hasattr(x, k)]
    return f"a number {', '.join(said)}" if said else ""


def _list_keys(path: Place) -> list[str]:
    """What is valid there."""
    return list(_PLACES[tuple(0 if isinstance(p, int) else p for p in path)].model_fields)


# What a scheme means for a given model.


@dataclass(frozen=True)
class Layer:
    """A layer of the forward graph that has something to learn.

    op           its operator; "multiply" is a scale and shift (batch norm that is not folded)
    weight, bias constants of the graph; None: it has none
    axis         axis of the weight along which its input channels lie; None: cannot be trained in part
    channels     number of input channels (of a depthwise convolution: of its channels)
    """

    name: str
    op: str
    weight: Const | None
    bias: Const | None
    axis: int | None = None
    channels: int = 0

    @property
    def folded(self) -> str | None:
        """The name of the batch norm that was folded into this layer, if its bias came from there."""
        owner = self.bias.origin.name.rpartition(".")[0] if self.bias and self.bias.origin else ""
        return owner if owner and owner != self.name else None


@dataclass(frozen=True)
class Learned:
    """What learns of one layer.

    weight    name of the weight, or None: frozen
    channels  the input channels of it that learn, ascending, as the weight lies in the graph; None: all
    axis, of  the axis they lie on, and how many input channels the layer has
    own       the same channels as the user's tensor numbers them (behind a flattened picture this is another order)
    bias      name of the bias, or None: frozen
    """

    layer: str
    weight: str | None
    bias: str | None
    channels: tuple[int, ...] | None = None
    axis: int | None = None
    of: int = 0
    own: tuple[int, ...] = field(default=(), compare=False)

    @property
    def is_prefix(self) -> bool:
        """The channels that learn come first, so that nothing has to be moved."""
        return self.channels is None or self.channels == tuple(range(len(self.channels)))


@dataclass(frozen=True)
class Resolved:
    """A scheme applied to a model: every layer that learns, by name, in the order of execution."""

    scheme: UpdateScheme
    layers: tuple[Learned, ...]
    notes: tuple[str, ...] = ()

    def to_yaml(self) -> str:
        """A scheme that says the same without patterns, short forms and defaults."""
        # Only quantised models may have that section.
        data = self.scheme.model_dump(
            mode="json", exclude_none=True, exclude={"quantized"} - self.scheme.model_fields_set
        )
        rules: dict[str, dict[str, Any]] = {}
        for learned in self.layers:
            weight: Any = "all" if learned.weight else "none"
            if learned.channels is not None:
                first = learned.is_prefix
                weight = {"in_channels": len(learned.channels), "select": "first" if first else list(learned.own)}
            rules[learned.layer] = {"layer": learned.layer, "weight": weight, "bias": learned.bias is not None}
        defaults = {"cross_entropy": ("label_smoothing",), "huber": ("delta",)}.get(self.scheme.loss.name, ())
        data["loss"] = {k: v for k, v in data["loss"].items() if k not in ("label_smoothing", "delta") or k in defaults}
        data["train"] = list(rules.values())
        data = {key: value for key, value in data.items() if value != {}}
        return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)


def find_layers(graph: Graph) -> list[Layer]:
    """The layers with constants that can learn, in the order of execution.

    Convolutions and dense layers; per-channel multiply and add whose constants are the user's own.
    """
    layers: list[Layer] = []
    for node in graph.nodes:
        if node.op in ("nn.conv2d", "nn.conv2d_transpose", "nn.dense"):
            weight = node.inputs[1]
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            if not _has_name(weight) and not _has_name(bias):
                continue
            name = node.layer or weight.name.removesuffix("_quantized").removesuffix(".weight")
            stored = (weight if _has_name(weight) else None, bias if _has_name(bias) else None)
            layers.append(Layer(name, node.op, *stored, *_part_axis(node)))
        elif node.op in ("multiply", "add"):
            constant = _channel_constant(node)
            if constant is None:
                continue
            before = layers[-1] if layers else None
            if node.op == "multiply":
                layers.append(Layer(node.layer, node.op, constant, None))
            elif before and before.op == "multiply" and before.name == node.layer and before.bias is None:
                layers[-1] = Layer(node.layer, "multiply", before.weight, constant)
            else:
                layers.append(Layer(node.layer, node.op, None, constant))
    return layers


def _has_name(value: Value | None) -> TypeGuard[Const]:
    """A tensor of the model itself: constants that were computed from such have no name of their own."""
    return isinstance(value, Const) and not value.name.startswith("const.")


def _part_axis(node: Node) -> tuple[int | None, int]:
    """The axis of a weight's input channels, and how many there are; None where a part of them cannot be trained."""
    shape = node.inputs[1].type.shape
    if node.op == "nn.dense":
        return 1, shape[1]
    groups = node.attrs["groups"]
    if node.op == "nn.conv2d" and groups == node.inputs[0].type.shape[3] != 1:
        return 0, node.inputs[0].type.shape[3]
    if groups != 1:
        return None, 0
    return (3, shape[3]) if node.op == "nn.conv2d" else (0, shape[0])


def _channel_constant(node: Node) -> Const | None:
    """The user's own constant that a multiply or add applies to each channel."""
    constants = [v for v in node.inputs if isinstance(v, Const) and v.origin is not None]
    if len(constants) != 1 or not node.layer:
        return None
    channels = node.output.type.shape[-1:]
    return constants[0] if constants[0].type.shape[-1:] == channels and (constants[0].type.size,) == channels else None


@dataclass
class _Decision:
    """What the rules so far say of one layer; ``place`` is where the last one speaks of its weight."""

    weight: str | Channels = "none"
    bias: bool = False
    place: Place = ()


def resolve(scheme: UpdateScheme, graph: Graph) -> Resolved:
    """Apply a scheme to a forward graph.

    ``select: l2`` takes the channels whose slice of the weight has the largest L2 norm; the weight as it is compiled,
    so with a folded batch norm in it. A new head learns, unless a rule says otherwise.
    Raises TTEError: E032 unknown layer, E033 a rule that the layer cannot follow, E034 nothing learns, E035 settings
    for quantised models only, E036 a new head that cannot learn.
    """
    if "quantized" in scheme.model_fields_set and not any(n.op.startswith("qnn.") for n in graph.nodes):
        raise TTEError(
            "TTE-E035",
            "the section `quantized` is for quantised models; this one is float32",
            where=scheme.where("quantized"),
            fix="remove the section, or give the model as quantised ONNX",
        )
    layers = find_layers(graph)
    decisions = {layer.name: _Decision() for layer in layers}
    if scheme.head is not None and scheme.head.layer in decisions:
        decisions[scheme.head.layer] = _Decision("all", True)
    if isinstance(scheme.train, str):
        _apply_short_form(scheme, layers, decisions)
    elif isinstance(scheme.train, Indices):
        _apply_indices(scheme, scheme.train, layers, decisions)
    else:
        for i, rule in enumerate(scheme.train):
            _apply_rule(scheme, i, rule, layers, decisions)
    notes: list[str] = []
    learned = [_decide(scheme, layer, decisions[layer.name], notes) for layer in layers]
    if isinstance(scheme.train, str) and scheme.train != "bias-only":
        notes = []  # these forms ask for what there is
    result = tuple(entry for entry in learned if entry.weight or entry.bias)
    if not result:
        raise TTEError(
            "TTE-E034",
            "the update scheme trains nothing" + (f" ({'; '.join(notes[:3])})" if notes else ""),
            where=scheme.where("train"),
            fix="name at least one layer with `weight: all` or, if it has a bias, `bias: true`",
        )
    if scheme.head is not None and not any(e.layer == scheme.head.layer and e.weight for e in result):
        raise TTEError(
            "TTE-E036",
            f"the new head {scheme.head.layer} starts at zero, but its weight does not learn",
            where=scheme.where("head"),
            fix=f"end `train` with {{layer: {scheme.head.layer}, weight: all, bias: true}}",
        )
    return Resolved(scheme, result, tuple(dict.fromkeys(notes)))


def _apply_short_form(scheme: UpdateScheme, layers: list[Layer], decisions: dict[str, _Decision]) -> None:
    names = list(dict.fromkeys(layer.name for layer in layers if layer.weight))
    form, _, count = str(scheme.train).partition(":")
    last = int(count or 1)
    if last > len(names):
        raise TTEError(
            "TTE-E033",
            f"the model has {tally(len(names), 'layer')} with weights, not {last}",
            where=scheme.where("train"),
            fix="use `full`" if names else "choose another model",
        )
    if form == "bias-only":
        for name, decision in decisions.items():
            if scheme.head is None or name != scheme.head.layer:
                decision.bias = True
        return
    for name in decisions if form == "full" else names[-last:]:
        decisions[name] = _Decision("all", True)


def _apply_indices(scheme: UpdateScheme, train: Indices, layers: list[Layer], decisions: dict[str, _Decision]) -> None:
    with_weights = list({layer.name: layer for layer in layers if layer.weight}.values())
    numbered = [layer.name for layer in with_weights[:-1] if layer.op == "nn.conv2d"]
    count, first = len(numbered), len(numbered) - train.n_bias_update
    if first < 0 or not with_weights:
        raise TTEError(
            "TTE-E033",
            f"the model has {tally(count, 'convolution')} before its classifier, not {train.n_bias_update}",
            where=scheme.where("train", "n_bias_update"),
            fix=f"use at most {count}",
        )
    decisions[with_weights[-1].name] = _Decision("all", True)
    for name in numbered[first:]:
        decisions[name] = _Decision("none", True)
    for i, (number, ratio) in enumerate(zip(train.weight_idx, train.ratio, strict=True)):
        if not first <= number < count:
            raise TTEError(
                "TTE-E033",
                f"convolution {number} is not among the last {train.n_bias_update} of {count}, whose biases learn",
                where=scheme.where("train", "weight_idx", i),
                fix=f"use numbers from {first} to {count - 1}, or raise n_bias_update"
                if train.n_bias_update
                else "raise n_bias_update",
            )
        if ratio:
            weight = "all" if ratio == 1.0 else Channels(in_channels=ratio, select="l2")
            decisions[numbered[number]] = _Decision(weight, True, ("train", "ratio", i))


def _apply_rule(scheme: UpdateScheme, i: int, rule: Rule, layers: list[Layer], decisions: dict[str, _Decision]) -> None:
    folded = {layer.folded: layer.name for layer in layers if layer.folded and layer.folded not in decisions}
    names = _match(rule.layer, decisions, scheme, i)
    for name in names:
        decisions[name] = _Decision(rule.weight, rule.bias, ("train", i, "weight"))
    # A folded batch norm is named for its bias; a pattern that also matches the convolution means the convolution.
    aliases = [alias for alias in _match(rule.layer, folded, scheme, i) if folded[alias] not in names]
    if aliases and not names and rule.weight != "none":
        raise TTEError(
            "TTE-E033",
            f"the batch norm {aliases[0]} is folded into {folded[aliases[0]]}: it has no weight of its own any more",
            where=scheme.where("train", i, "weight"),
            fix=f"train the weight of {folded[aliases[0]]}; {aliases[0]} can have `bias: true`",
        )
    for alias in aliases:
        decisions[folded[alias]].bias = rule.bias
        decisions[folded[alias]].place = ("train", i, "weight")
    if not names and not aliases:
        raise TTEError(
            "TTE-E032",
            f"no layer {'matches' if set(rule.layer) & set('*?[{') else 'is called'} {show(rule.layer)}",
            where=scheme.where("train", i, "layer"),
            fix=suggest(rule.layer, [*decisions, *folded], "layers"),
        )


def _match(pattern: str, names: Any, scheme: UpdateScheme, i: int) -> list[str]:
    if pattern in names:
        return [pattern]
    patterns = list(itertools.islice(expand_braces(pattern), MAX_PATTERNS + 1))
    if len(patterns) > MAX_PATTERNS:
        raise TTEError(
            "TTE-E031",
            f"{show(pattern)} stands for more than {MAX_PATTERNS} names",
            where=scheme.where("train", i, "layer"),
            fix="use * in place of a large range",
        )
    return [name for name in names if any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def expand_braces(pattern: str) -> Iterator[str]:
    """Every name that {9..13} (a range) and {a,b} (a choice) stand for; braces of another form stay as they are."""
    match = re.search(r"\{([^{}]*,[^{}]*|\d{1,9}\.\.\d{1,9})\}", pattern)
    if not match:
        yield pattern
        return
    low, dots, high = match[1].partition("..")
    numbers = dots and "," not in match[1]
    choices = map(str, range(int(low), int(high) + 1)) if numbers else iter(match[1].split(","))
    # The rest is expanded once per choice, lazily: a range of a billion costs nothing until it is walked through.
    for choice in choices:
        for rest in expand_braces(pattern[match.end() :]):
            yield pattern[: match.start()] + choice + rest


def _decide(scheme: UpdateScheme, layer: Layer, decision: _Decision, notes: list[str]) -> Learned:
    bias = layer.bias.name if layer.bias and decision.bias else None
    if decision.bias and not layer.bias:
        notes.append(f"{layer.name} has no bias")
    if decision.weight == "none" or not layer.weight:
        if decision.weight != "none":
            notes.append(f"{layer.name} has no weight")
        return Learned(layer.name, None, bias)
    if isinstance(decision.weight, str):
        return Learned(layer.name, layer.weight.name, bias)
    where = scheme.where(*decision.place)
    if layer.axis is None:
        what = "scale and shift" if layer.op == "multiply" else "grouped convolution"
        raise TTEError(
            "TTE-E033",
            f"{layer.name} is a {what}: it cannot be trained in part",
            where=where,
            fix="use `weight: all` or `weight: none`",
        )
    channels = _choose(layer, decision.weight, where)
    if len(channels) == layer.channels:
        return Learned(layer.name, layer.weight.name, bias)
    own = tuple(int(_own_numbers(layer)[c]) for c in channels)
    return Learned(layer.name, layer.weight.name, bias, channels, layer.axis, layer.channels, own)


def _own_numbers(layer: Layer) -> np.ndarray:
    """Of each input channel: its number in the user's tensor. Only the columns of dense layers are ever reordered."""
    origin = layer.weight.origin if layer.weight else None
    if layer.op == "nn.dense" and origin is not None:
        for place in np.unravel_index(origin.index, origin.shape):
            if np.all(place == place[0]) and np.array_equal(np.sort(place[0]), np.arange(layer.channels)):
                return np.asarray(place[0])
    return np.arange(layer.channels)


def _choose(layer: Layer, wanted: Channels, where: str) -> tuple[int, ...]:
    """The input channels that learn, ascending."""
    assert layer.weight is not None and layer.axis is not None
    select = wanted.select
    count = len(select) if wanted.in_channels is None else wanted.in_channels
    if isinstance(count, float):
        count = int(np.floor(count * layer.channels + 1e-9))
    if isinstance(select, tuple) and max(select) >= layer.channels:
        raise TTEError(
            "TTE-E033",
            f"{layer.name} has {tally(layer.channels, 'input channel')}: select names number {show(max(select))}",
            where=where,
            fix=f"list numbers from 0 to {layer.channels - 1}",
        )
    if not 1 <= count <= layer.channels:
        raise TTEError(
            "TTE-E033",
            f"{layer.name} has {layer.channels} input channels: {show(wanted.in_channels)} of them cannot learn",
            where=where,
            fix=f"in_channels from 1 to {layer.channels}, or a fraction of at least {1 / layer.channels:.3g}",
        )
    if isinstance(select, tuple):
        if len(select) != count:
            raise TTEError(
                "TTE-E033",
                f"select lists {tally(len(select), 'channel')}, in_channels takes {count} of the {layer.channels} that "
                f"{layer.name} has",
                where=where,
                fix="leave out in_channels: the list says how many",
            )
        return tuple(sorted(int(c) for c in np.argsort(_own_numbers(layer))[list(select)]))
    if select == "first":
        return tuple(range(count))
    weight = np.moveaxis(layer.weight.data.astype(np.float64), layer.axis, 0).reshape(layer.channels, -1)
    order = np.argsort(-np.square(weight).sum(axis=1), kind="stable")
    return tuple(sorted(int(c) for c in order[:count]))
