"""MIT's int8 MCUNet learns new pictures: whole runs of the generated C on this computer, batch 1.

    python benchmarks/transfer.py                 # all runs, in two processes; continues where it was stopped
    python benchmarks/transfer.py --table         # writes the tables of docs/accuracy.md from what is finished
    python benchmarks/transfer.py --check         # what these runs have to show, and whether they do

One line of JSON per finished run goes to build/transfer.jsonl. Every run: four epochs at a constant rate from a head
of zeros, the order of epoch e being the e-th torch.randperm of the seed's generator; accuracy is measured at the end.
"""

import argparse
import contextlib
import json
import multiprocessing
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import torch
import yaml
from data import MCUNET, import_published, load_module, read_published, require_pack

import tte
import tte.artifact
from tte.compiler import lower
from tte.ir import OPS, Graph, evaluate
from tte.ops.quantized import _conv2d_grad
from tte.passes.quantized import Settings, lower_qdq
from tte.runner.host import HostBoard

ROOT = Path(__file__).resolve().parents[1]
EPOCHS, SEEDS = 4, 3
BEGIN, END = "<!-- begin of the tables -->", "<!-- end of the tables -->"


def numbers(count: int, *weights: int) -> dict[str, Any]:
    return {"n_bias_update": count, "weight_idx": list(weights), "ratio": [1.0] * len(weights)}


TRAIN: dict[str, Any] = {
    "head": "last-layer",
    "bias22": numbers(22),
    **{f"{kb}kb": f"mcunet-5fps-{kb}kb.yaml" for kb in (49, 99, 148)},
    "last6": numbers(6, *range(36, 42)),
    "last12": numbers(12, *range(30, 42)),
}
TITLES = {"head": "head only", "bias22": "22 biases", "last6": "last 6", "last12": "last 12"}
MISTAKES = {
    "noskip": "no gradient along the skips",
    "rawdw": "zero points left out of weight gradients",
    "trunc": "steps truncated, integers wrap around",
}
Variant = tuple[str, str, str, bool, str]  # all of a job that the generated C depends on


@dataclass(frozen=True)
class Job:
    """One run. wrong: "" or a key of MISTAKES, a mistake that is made on purpose."""

    data: str
    scheme: str
    lr: float
    seed: int = 0
    storage: str = "int8_sr"
    qas: bool = True
    wrong: str = ""
    gradients: str = "float32"

    @property
    def variant(self) -> Variant:
        return self.scheme, self.storage, self.gradients, self.qas, self.wrong

    @property
    def title(self) -> str:
        storage = "" if self.storage == "int8_sr" else self.storage
        gradients = "" if self.gradients == "float32" else f"{self.gradients} gradients"
        details = [storage, gradients, "" if self.qas else "no scaling", MISTAKES.get(self.wrong, "")]
        return ", ".join([TITLES.get(self.scheme, self.scheme.replace("kb", " KB")), *filter(None, details)])


def over(rates: tuple[float, ...], data: str, scheme: str, **others: Any) -> list[Job]:
    return [Job(data, scheme, lr, **others) for lr in rates]


def list_jobs() -> list[Job]:
    """What checks ask for comes first, then the rest of the table; each for one seed after another."""
    signs, flowers = "signdigits", "flowers5"
    grid = (0.001, 0.002, 0.004)
    asked = [
        *over((0.002, 0.004, 0.0005, 0.001), signs, "99kb"),
        *over((0.003,), signs, "head"),
        *over((0.0005, 0.001), signs, "99kb", storage="int8_nearest"),
        *over((0.002, 0.004), signs, "99kb", storage="fp32"),
        *over((0.002,), signs, "99kb", storage="int16_ef"),
        *over((0.002, 0.004), signs, "99kb", gradients="int8"),
        *over((0.002,), signs, "99kb", wrong="trunc"),
        *over((0.002,), signs, "99kb", wrong="noskip"),
        *over((0.002, 0.01, 0.05), signs, "99kb", qas=False),
        *over((0.002, 0.01, 0.05), signs, "99kb", storage="fp32", qas=False),
        *over((0.002,), signs, "last6"),
        *over((0.002,), signs, "last6", wrong="rawdw"),
        *over((0.001, 0.002), flowers, "99kb"),
        *over((0.001,), flowers, "head"),
    ]
    rows = [
        *over((0.001, 0.01), signs, "head"),
        *(job for scheme in ("bias22", "49kb", "148kb", "last6", "last12") for job in over(grid, signs, scheme)),
        *over((0.008,), signs, "49kb"),
        *(job for scheme in TRAIN for job in over(grid[:2], flowers, scheme)),
        *over((0.002, 0.004), signs, "99kb", storage="int8_nearest"),
        *over((0.001, 0.004), signs, "99kb", storage="int16_ef"),
        *over((0.001,), signs, "99kb", storage="fp32"),
        *(j for kind in ("int8_nearest", "int16_ef", "fp32") for j in over(grid[:2], flowers, "99kb", storage=kind)),
        *over((0.002, 0.01), flowers, "99kb", qas=False),
    ]
    extras = [
        *over((0.002, 0.01), signs, "last6", qas=False),
        *over((0.001, 0.002), flowers, "99kb", wrong="noskip"),
        *over((0.001, 0.004), signs, "99kb", wrong="noskip"),
        *over((0.001, 0.004), signs, "last6", wrong="rawdw"),
        *over((0.001,), signs, "99kb", gradients="int8"),
        *over((0.001, 0.002), flowers, "99kb", gradients="int8"),
        *over((0.002, 0.004), signs, "49kb", gradients="int8"),
        *over((0.001, 0.002), signs, "last6", gradients="int8"),
        *(job for scheme in ("49kb", "99kb", "148kb") for job in over((0.004,), flowers, scheme)),
        *over((0.008,), signs, "bias22"),
    ]
    jobs = [replace(job, seed=seed) for part in (asked, rows, extras) for seed in range(SEEDS) for job in part]
    return list(dict.fromkeys(jobs))


# --- the model and its pictures ---------------------------------------------------------------------------------------


@cache
def load(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pictures as int8 (N, 3, 128, 128), labels, and which of them are for training and for the test."""
    packlib = load_module(require_pack() / "reference" / "packlib.py")
    with np.load(require_pack() / "data" / f"{name}.npz") as file:
        stored = dict(file)

    class Source(dict):  # type: ignore[type-arg]
        files = tuple(stored)  # packlib takes it for an open npz

    source = Source(stored)
    labels = stored["labels"].astype(np.int32)
    x = np.stack([packlib.to_int8_input(packlib.images(source, i)[0]) for i in range(len(labels))])
    test = stored.get("split")
    if test is None:  # in every class, in the order of the file: the first 60 % to learn from
        test = np.zeros(len(labels), np.uint8)
        for label in np.unique(labels):
            own = np.flatnonzero(labels == label)
            test[own[int(0.6 * len(own)) :]] = 1
    return x, labels, np.flatnonzero(test == 0), np.flatnonzero(test == 1)


def read_train(scheme: str) -> Any:
    train = TRAIN[scheme]
    published = isinstance(train, str) and train.endswith(".yaml")
    return yaml.safe_load((MCUNET / "schemes" / train).read_text())["train"] if published else train


def compile_variant(variant: Variant, classes: int, model: onnx.ModelProto | None = None) -> tte.artifact.Artifact:
    scheme, storage, gradients, qas, wrong = variant
    settings = {
        "train": read_train(scheme),
        "quantized": {"qas": qas, "weight_storage": storage, "gradients": gradients},
        "io": {"input": {"dtype": "int8", "std": [127.5]}},
    }
    with mistake(wrong):
        artifact = tte.compile(
            model or import_published("mcunet-5fps", classes), update_scheme=settings, target="host", name="mcunet"
        )
        assert artifact.build  # the C is written while the mistake is being made
    return artifact


@cache
def open_variant(variant: Variant, classes: int) -> HostBoard:
    return compile_variant(variant, classes).host()


# --- mistakes, to show that they matter -------------------------------------------------------------------------------


# An integer takes its step: rounded at random, and saturating.
STEP = re.compile(
    r"\(int(8|32)_t\)(\w+)_saturate\((?:\(int64_t\))?(.+?) \+ \2_floor\((.+?), \2_fraction\(.+?\)\), [^;]*?\)(?=;)"
)


@contextlib.contextmanager
def mistake(name: str) -> Iterator[None]:
    """What is compiled inside has a mistake of MISTAKES."""
    add, conv = OPS["qnn.add"], OPS["qnn.conv2d"]

    def add_gradient(backward: Any, dy: Any, *operands: Any, **attrs: Any) -> Any:
        assert add.grad
        entry, branch = add.grad(backward, dy, *operands, **attrs)
        return backward.call("multiply", entry, backward.const(0.0)), branch

    def conv_gradient(backward: Any, dy: Any, *operands: Any, zero_point: int, **attrs: Any) -> Any:
        return _conv2d_grad(backward, dy, *operands, zero_point=0, **attrs)

    emit = tte.artifact.emit

    def emit_truncating(*arguments: Any) -> dict[str, str]:
        texts, count = emit(*arguments), 0
        for path, text in texts.items():
            if path.endswith(".c"):
                texts[path], n = STEP.subn(r"(int\1_t)(int64_t)((double)\3 + (double)(\4))", text)
                count += n
                assert "_fraction(-" not in texts[path], "a step is still rounded"
        assert count, "no step was found in the C"
        return texts

    changes = {
        "noskip": lambda: mock.patch.dict(OPS, {"qnn.add": replace(add, grad=add_gradient)}),
        "rawdw": lambda: mock.patch.dict(OPS, {"qnn.conv2d": replace(conv, grad=conv_gradient)}),
        "trunc": lambda: mock.patch.object(tte.artifact, "emit", emit_truncating),
    }
    with changes[name]() if name else contextlib.nullcontext():
        yield


# --- running ----------------------------------------------------------------------------------------------------------


def run(job: Job) -> dict[str, Any]:
    started = time.time()
    x, y, train, test = load(job.data)
    board = open_variant(job.variant, int(y.max()) + 1)
    assert board.init() == 0
    board.set_learning_rate(job.lr)
    generator = torch.Generator().manual_seed(job.seed)
    losses = []
    failed = None
    for _ in range(EPOCHS):
        total = 0.0
        for i in train[torch.randperm(len(train), generator=generator).numpy()]:
            step = board.train_step(x[i], y[i])
            if step.status != 0:
                failed = step.status  # a loss that is not a number; such a step changes nothing
            total += step.loss
        losses.append(round(total / len(train), 4))
    right = sum(board.evaluate(x[i], y[i]).predicted == y[i] for i in test)
    record = asdict(job) | {"accuracy": round(100 * float(right) / len(test), 2), "loss": losses}
    return record | ({"status": failed} if failed else {}) | {"seconds": round(time.time() - started, 1)}


def read_results(path: Path) -> dict[Job, dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    return {Job(**{k: r[k] for k in Job.__dataclass_fields__ if k in r}): r for r in records}


def run_missing(jobs: list[Job], path: Path, processes: int) -> None:
    """Run what has no result yet; each result is on the disk as soon as it is there."""
    done = read_results(path)
    missing = [job for job in jobs if job not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if processes > 1:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(processes))
            records: Any = pool.imap_unordered(run, missing)
        else:
            records = map(run, missing)
        file = stack.enter_context(path.open("a"))
        for i, record in enumerate(records):
            print(json.dumps(record), file=file, flush=True)
            print(f"{i + 1}/{len(missing)} {record}", flush=True)


# --- what it shows ----------------------------------------------------------------------------------------------------


class Results:
    """Accuracies in percent of finished runs, over their seeds."""

    def __init__(self, path: Path) -> None:
        self.of: dict[Job, list[float]] = {}
        for job, record in sorted(read_results(path).items(), key=lambda item: item[0].seed):
            self.of.setdefault(replace(job, seed=0), []).append(record["accuracy"])

    def mean(self, job: Job) -> float:
        """nan when there is no such run."""
        return statistics.mean(self.of.get(job, [float("nan")]))

    def best(self, jobs: list[Job]) -> float:
        return max((self.mean(job) for job in jobs if job in self.of), default=float("nan"))

    def table(self) -> str:
        rows: dict[tuple[Any, ...], list[Job]] = {}
        for job in dict.fromkeys(replace(j, seed=0) for j in list_jobs()):
            if job in self.of:
                rows.setdefault((job.data, job.variant), []).append(job)

        def place(key: tuple[Any, ...]) -> tuple[Any, ...]:
            data, (scheme, storage, gradients, qas, wrong) = key
            plain = (storage, gradients, qas, wrong) == ("int8_sr", "float32", True, "")
            return data != "signdigits", not plain, wrong, not qas, list(TRAIN).index(scheme), gradients, storage

        lines = [
            "| pictures | what learns | top-1 at each rate, mean of seeds | best | seeds |",
            "|---|---|---|---|---|",
        ]
        for key in sorted(rows, key=place):
            jobs = sorted(rows[key], key=lambda job: job.lr)
            points = " · ".join(f"{job.lr:g}: {self.mean(job):.1f}" for job in jobs)
            best = max(jobs, key=self.mean)
            values = self.of[best]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            seeds = sorted({len(self.of[job]) for job in jobs})
            count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
            lines.append(f"| {best.data} | {best.title} | {points} | **{self.mean(best):.1f}{spread}** | {count} |")
        return "\n".join(lines)


def write_tables(results: Results, page: Path) -> None:
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    lines = ["| signdigits, 99 KB, unless said otherwise | measured | required | |", "|---|---|---|---|"]
    for name, measured, required, verdict in check(results):
        lines.append(f"| {name.split(' ', 1)[1]} | {measured} | {required} | {verdict} |")
    checks = "\n".join(lines)
    page.write_text(f"{before}{BEGIN}\n{checks}\n\n{results.table()}\n{END}{after}")


def check(results: Results) -> list[tuple[str, str, str, str]]:
    """(name, what is measured, what is required, verdict) of everything that the runs have to show."""
    signs, flowers, mean, best = "signdigits", "flowers5", results.mean, results.best
    least, most = (lambda *limits: (limits, np.inf)), (lambda *limits: (-np.inf, limits))

    def means(rates: tuple[float, ...], data: str = signs, scheme: str = "99kb", **others: Any) -> np.ndarray:
        return np.array([mean(job) for job in over(rates, data, scheme, **others)])

    low, high, unscaled = (0.0005, 0.001), (0.002, 0.004), (0.002, 0.01, 0.05)
    scaling = [
        best(over(high, signs, "99kb", storage=kind)) - best(over(unscaled, signs, "99kb", storage=kind, qas=False))
        for kind in ("int8_sr", "fp32")
    ]
    forward, backward = compare_with_references()
    no_zero_points = means((0.002,), scheme="last6", wrong="rawdw")
    rows: list[tuple[str, Any, tuple[Any, Any]]] = [
        ("ACC1 99 KB at 0.002, 0.004", means(high), least(97, 97)),
        ("ACC2 99 KB at 0.001, 0.002, flowers5", means((0.001, 0.002), flowers), least(87, 87)),
        ("ACC3 head only at 0.003", means((0.003,), scheme="head"), (82, 87)),
        ("ACC4 int8_sr - int8_nearest at 0.0005, 0.001", means(low) - means(low, storage="int8_nearest"), least(5, 2)),
        ("ACC5 fp32 - int8_sr at 0.002, 0.004", means(high, storage="fp32") - means(high), most(1.5, 1.5)),
        ("ACC6 int16_ef at 0.002", means((0.002,), storage="int16_ef"), least(97)),
        ("ACC7 truncated steps at 0.002", means((0.002,), wrong="trunc"), most(20)),
        (
            "ACC8 right - without the skips' gradient, at 0.002",
            means((0.002,)) - means((0.002,), wrong="noskip"),
            least(5),
        ),
        ("ACC9 int8 gradients at 0.002, 0.004", means(high, gradients="int8"), least(96.5, 96.5)),
        ("ACC10 scaling - none, each at its best rate; int8_sr, fp32", scaling, least(8, 8)),
        (
            "ACC11 last 6, right - without zero points, at 0.002",
            means((0.002,), scheme="last6") - no_zero_points,
            least(10),
        ),
        ("ACC12 values that differ from the reference forward, of a million", [forward], most(0)),
        ("ACC12 gradients beside autograd, relative", [backward], most(1e-5)),
    ]
    judged = []
    for name, values, (floor, ceiling) in rows:
        texts = [
            f"{sign} {', '.join(f'{v:g}' for v in np.atleast_1d(limit))}"
            for sign, limit in ((">=", floor), ("<=", ceiling))
            if np.isfinite(limit).all()
        ]
        holds = bool(np.all(np.asarray(values) >= floor) and np.all(np.asarray(values) <= ceiling))
        verdict = "ok" if holds else "not run yet" if np.isnan(values).any() else "MISS"
        judged.append((name, ", ".join(f"{v:.3g}" for v in values), " and ".join(texts), verdict))
    return judged


def compare_with_references() -> tuple[float, float]:
    """Two pictures: how many in a million of all int8 values of the forward pass differ from the data pack's reference,
    and the largest relative error of a gradient of the 99 KB scheme, against autograd; with a classifier that is drawn.

    The reference gets the scales in float32, as QDQ ONNX holds them. Means of 16 integers that are true halves do not
    count: it rounds those to even, requantize: fixed rounds them up.
    """
    packlib = load_module(require_pack() / "reference" / "packlib.py")
    steps, tensors = read_published("mcunet-5fps")
    for step in steps:
        step |= {key: float(np.float32(step[key])) for key in step if key.endswith("_scale")}
    model = import_published("mcunet-5fps", 10)
    head = next(t for t in model.graph.initializer if t.name == "classifier.weight")
    drawn = np.random.default_rng(0).standard_normal(tuple(head.dims)).astype(np.float32)
    head.CopyFrom(onnx.numpy_helper.from_array(drawn / np.sqrt(drawn.shape[-1], dtype=np.float32), head.name))
    x, y, train, _ = load("signdigits")
    pictures = x[train[[0, -1]]], y[train[[0, -1]]]
    graph = lower_qdq(lower(model), Settings("fixed"))
    ends = tuple(n.output for n in graph.nodes if n.op in ("qnn.requantize", "qnn.add"))
    graph = Graph("main", graph.inputs, graph.params, graph.consts, graph.nodes, ends)
    seen = different = 0
    for picture in pictures[0]:
        reference = packlib.forward_q({"ops": steps}, tensors, picture[None])
        ours = evaluate(graph, [picture[None] * np.float32(steps[0]["x_scale"])]).outputs
        for step, values in zip(steps[:-1], ours, strict=True):
            wrong = values.transpose(0, 3, 1, 2) != reference[step["output"]]
            if step["op"] == "global_avgpool":
                wrong &= reference[step["input"]].mean((2, 3), keepdims=True) % 1 != 0.5
            seen += values.size
            different += int(wrong.sum())
    proof = compile_variant(("99kb", "int8_sr", "float32", True, ""), 10, model).verify(
        1, dict(zip("xy", pictures, strict=True))
    )
    return 1e6 * different / seen, max(row["gradient_error"] for row in proof["tensors"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "transfer.jsonl")
    parser.add_argument("--table", action="store_true", help="only write the tables of docs/accuracy.md")
    parser.add_argument("--check", action="store_true", help="only hold the results against what is required of them")
    arguments = parser.parse_args()
    if not (arguments.table or arguments.check):
        run_missing(list_jobs(), arguments.results, arguments.jobs)
    results = Results(arguments.results)
    if arguments.table:
        write_tables(results, ROOT / "docs" / "accuracy.md")
    if arguments.check:
        for name, measured, required, verdict in check(results):
            print(f"{name}: {measured} (required: {required}): {verdict}")


if __name__ == "__main__":
    main()
