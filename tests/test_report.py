"""The report: what is counted, and a page that stands alone."""

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import networks
import pytest

import tte.ops  # noqa: F401  fills the table
from tte.codegen.emit import Program
from tte.codegen.plan import plan_memory
from tte.ir import Graph, TensorType, Value, parse, rewrite, verify
from tte.ir.tiles import find_scratch
from tte.passes.inplace import work_in_place
from tte.passes.regions import enclose
from tte.report import Measured, count_saved, find_phases, list_steps, list_tensors, make_report, render_html
from tte.runner.toolchain import Firmware
from tte.target import CORTEX_M7, STM32F746

STEP = """
def @train(%x: Tensor[(1, 8), float32], %target: Tensor[(1, 4), float32]) {
  param @fc.weight: Tensor[(4, 8), float32];
  param @learning_rate: Tensor[(), float32];
  const @first.weight: Tensor[(8, 8), float32];
  %0 = nn.dense(%x, @first.weight, layer="first") /* ty=Tensor[(1, 8), float32] */;
  %1 = nn.dense(%0, @fc.weight, layer="fc") /* ty=Tensor[(1, 4), float32] */;
  %2 = nn.mse(%1, %target, layer="loss") /* ty=Tensor[(), float32] */;
  %3 = nn.mse_grad(%1, %target, layer="loss") /* ty=Tensor[(1, 4), float32] */;
  %4 = matmul(%3, %0, transpose_a=True, layer="fc") /* ty=Tensor[(4, 8), float32] */;
  %5 = nn.sgd(@fc.weight, %4, @learning_rate, layer="fc") /* ty=Tensor[(4, 8), float32] */;
  @fc.weight := %5;
  return %2;
}
"""
INFER = """
def @infer(%x: Tensor[(1, 8), float32]) {
  param @fc.weight: Tensor[(4, 8), float32];
  const @first.weight: Tensor[(8, 8), float32];
  %0 = nn.dense(%x, @first.weight, layer="first") /* ty=Tensor[(1, 8), float32] */;
  %1 = nn.dense(%0, @fc.weight, layer="fc") /* ty=Tensor[(1, 4), float32] */;
  return %1;
}
"""


def graph(text: str) -> Graph:
    return verify(parse(text))


@pytest.fixture(scope="module")
def programs() -> list[Program]:
    graphs = {"train": graph(STEP), "infer": graph(INFER)}
    return [Program(role, g, plan_memory(g)) for role, g in graphs.items()]


def test_phases_and_costs() -> None:
    step = graph(STEP)
    assert find_phases(step) == ["forward"] * 3 + ["backward"] * 2 + ["update"]
    assert [node.macs for node in step.nodes][:2] == [64, 32]


def test_what_is_planned(programs: list[Program]) -> None:
    report = make_report(programs, model="m", target=CORTEX_M7, scheme={"train": "last-layer"})
    memory = report["memory"]
    assert report["source"] == "planned"
    assert report["gradients"] == ["fc.weight"]
    assert memory["trained_bytes"] == 4 * 8 * 4
    # At the peak: activation of the first layer, gradient of the loss, gradient of the weight, the loss itself.
    assert memory["arena_bytes"] == memory["lower_bound_bytes"] >= 32 + 16 + 128 + 4
    assert memory["proved_optimal"] is True
    sizes = [t["bytes"] for t in memory["peak_tensors"]]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == memory["lower_bound_bytes"]
    assert report["flash"] == {"code_bytes": None, "const_bytes": 256, "initial_values_bytes": 128}
    assert report["infer"]["arena_bytes"] == 48
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert layers["first"] == {"name": "first", "op": "nn.dense", "shape": [1, 8], "macs": 64, "backward_macs": 0, "const_bytes": 256, "trained": []}  # fmt: skip # noqa: E501
    assert layers["fc"]["trained"] == ["fc.weight"]
    assert layers["fc"]["backward_macs"] >= 32
    json.dumps(report, allow_nan=False)


def test_what_is_linked_overrides_what_is_planned(programs: list[Program]) -> None:
    firmware = Firmware(Path("m.elf"), "gcc", STM32F746, text=1000, rodata=300, data=20, bss=5000, stack_reserved=4096)
    linked = make_report(programs, model="m", target=STM32F746, scheme={}, firmware=firmware)
    assert linked["source"] == "linked"
    assert linked["memory"]["static_ram_bytes"] == 20 + 5000 + 4096
    assert linked["flash_bytes"] == 1320
    assert linked["flash"] == {"code_bytes": 1000, "const_bytes": 192, "initial_values_bytes": 128}
    measured = Measured(stack_infer=64, stack_train_step=96, instructions_train_step=216_000)
    report = make_report(
        programs, model="m", target=STM32F746, scheme={}, firmware=firmware, measured=measured, clock_hz=216_000_000
    )
    assert report["memory"]["static_ram_bytes"] == 20 + 5000 + 96
    assert report["train_step"]["ms_estimate"] == 1.0
    assert report["infer"]["ms_estimate"] is None


def test_the_page_stands_alone_and_draws_every_tensor(programs: list[Program]) -> None:
    report = make_report(programs, model="<m> & co", target=CORTEX_M7, scheme={})
    page = render_html(report, programs)
    assert page == render_html(report, programs)
    assert not re.search(r"(src|href)=|https?://", page)
    assert "<m>" not in page
    drawing = re.search(r"<svg.*</svg>", page, re.S)
    assert drawing
    boxes = ElementTree.fromstring(drawing[0]).findall(".//*[@id='boxes']/g/rect")
    sides = sorted(tuple(int(box.attrib[side]) for side in ("x", "y", "width", "height")) for box in boxes)
    plan = programs[0].plan
    top = plan.arena_bytes
    assert sides == sorted((b.birth, top - b.end, b.death - b.birth + 1, b.size) for b in plan.buffers)


def test_what_is_alive_and_what_nothing_can_save(programs: list[Program]) -> None:
    """At the loss: the first layer's result and the prediction, which the backward reads."""
    report = make_report(programs, model="m", target=CORTEX_M7, scheme={}, unfused_macs=120)
    memory = report["memory"]
    assert memory["gap_bytes"] == 0 and memory["proof"] == "bound"
    assert (memory["saved_bytes"], memory["floor_bytes"]) == (32 + 16, 32 + 16 + 128)
    assert memory["extra_macs"] == sum(node.macs for node in programs[0].graph.nodes) - 120 == 8
    assert [step["live_bytes"] for step in report["steps"]] == [32, 48, 52, 68, 180, 132 + 128]
    last = {"step": 5, "layer": "fc", "op": "nn.sgd", "phase": "update", "live_bytes": 260}
    assert report["steps"][5] == last
    unproved = replace(programs[0].plan, arena_bytes=300, proof="")
    memory = make_report([replace(programs[0], plan=unproved), programs[1]], model="m", target=CORTEX_M7, scheme={})[
        "memory"
    ]
    assert (memory["gap_bytes"], memory["proved_optimal"], memory["proof"]) == (300 - 260, False, None)
    assert memory["extra_macs"] is None


def test_the_input_in_the_arena_is_saved_too() -> None:
    held = graph(STEP.replace("matmul(%3, %0,", "matmul(%3, %x,"))
    program = Program("train", held, plan_memory(held, hold_input=True))
    assert count_saved(program) == 32 + 16


def test_regions_in_pieces_say_from_where_to_where() -> None:
    """And of a result that leaves such a region, which of its layers made it."""
    residual = networks.residual()
    middle = next(node for node in residual.nodes if (node.layer, node.op) == ("a", "nn.relu"))
    residual = replace(residual, outputs=(*residual.outputs, middle.output))
    region = enclose(residual, range(8), {"strategy": "rows"})
    streamed = verify(rewrite(residual, [region, *residual.nodes[8:]]))
    program = Program("infer", streamed, plan_memory(streamed))
    first = list_steps(program)[0]
    assert (first["layer"], first["op"]) == ("stem .. depthwise", "row by row")
    found = {t["name"]: (t["layer"], t["op"], t["bytes"]) for t in list_tensors(program)}
    assert found["scratch.0"] == ("stem .. depthwise, row by row", "scratch", find_scratch(streamed)[0])
    assert {found[v.name][:2] for v in streamed.nodes[0].outputs} == {("depthwise", "nn.conv2d"), ("a", "nn.relu")}


def test_results_in_place_are_told() -> None:
    """Views are not: they are the same bytes."""
    net = networks.Network()
    x = Value("x", TensorType((1, 8)))
    flat = net.call("nn.relu", net.dense("first", x, 8), layer="first")
    tall = net.call("reshape", flat, newshape=(1, 2, 4), layer="tall")
    placed = work_in_place(net.graph(x, net.call("sigmoid", tall, layer="tall")))
    tensors = list_tensors(Program("infer", placed, plan_memory(placed)))
    told = [[(v["step"], v["name"], v["layer"], v["op"]) for v in t["inplace"]] for t in tensors]
    assert told == [[(1, "1", "first", "nn.relu"), (3, "3", "tall", "sigmoid")]]
