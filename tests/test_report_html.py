"""The page of a report in a browser: what is drawn, what a click lists, and that nothing is asked of the world."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tte.ops  # noqa: F401  fills the table
from tte.codegen.emit import Program
from tte.codegen.plan import plan_memory
from tte.ir import parse, verify
from tte.report import make_report, render_html
from tte.target import HOST

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not BROWSER or not DRIVER, reason="no chromium with chromedriver")

# All three phases, scratch, and a result in the place of its operand.
STEP = """
def @train(%x: Tensor[(1, 8), float32], %target: Tensor[(1, 4), float32]) {
  param @fc.weight: Tensor[(4, 8), float32];
  param @learning_rate: Tensor[(), float32];
  const @first.weight: Tensor[(8, 8), float32];
  %0 = nn.dense(%x, @first.weight, layer="first") /* ty=Tensor[(1, 8), float32] */;
  %1 = nn.relu(%0, inplace=(0,), layer="bend") /* ty=Tensor[(1, 8), float32] */;
  %2 = nn.dense(%1, @fc.weight, layer="fc") /* ty=Tensor[(1, 4), float32] */;
  %3 = nn.mse(%2, %target, layer="loss") /* ty=Tensor[(), float32] */;
  %4 = nn.mse_grad(%2, %target, layer="loss") /* ty=Tensor[(1, 4), float32] */;
  %5 = matmul(%4, %1, transpose_a=True, layer="fc") /* ty=Tensor[(4, 8), float32] */;
  %6 = nn.sgd(@fc.weight, %5, @learning_rate, layer="fc") /* ty=Tensor[(4, 8), float32] */;
  @fc.weight := %6;
  return %3;
}
"""
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --window-size=1300,1600""".split()


@pytest.fixture(scope="module")
def train() -> Program:
    graph = verify(parse(STEP))
    return Program("train", graph, plan_memory(graph, {2: 40}, hold_input=True))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, train: Program, tmp_path: Path) -> Any:
    report = make_report([train, Program("infer", train.graph, train.plan)], model="m", target=HOST, scheme={})
    file = tmp_path / "report.html"
    file.write_text(render_html(report, [train]))
    browser.get_log("performance")
    browser.get(file.as_uri())
    yield browser
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert {r["request"]["url"] for r in requests if r["documentURL"] == file.as_uri()} == {file.as_uri()}
    assert not browser.get_log("browser")


def texts(page: Any, selector: str) -> list[str]:
    """Of all elements that are to be seen."""
    return [e.text for e in page.find_elements("css selector", selector) if e.is_displayed()]


def count(page: Any, selector: str) -> int:
    return len([e for e in page.find_elements("css selector", selector) if e.is_displayed()])


def press(page: Any, selector: str, dx: float = 0) -> None:
    """Click in the middle of an element, or dx times its width beside that."""
    from selenium.webdriver import ActionChains

    element = page.find_element("css selector", selector)
    ActionChains(page).move_to_element_with_offset(element, round(dx * element.rect["width"]), 0).click().perform()


def at(page: Any, step: int, steps: int) -> None:
    """Click on a step, in the curve below the map."""
    press(page, "#live", (step + 0.5) / steps - 0.5)


def test_everything_is_drawn(page: Any, train: Program) -> None:
    assert count(page, "#boxes rect") == len(train.plan.buffers)
    assert count(page, "#boxes .scratch rect") == 1
    assert len(page.find_elements("css selector", "#boxes g path")) == 1
    assert count(page, "#strip rect") == len(train.graph.nodes)
    assert {"input", "first", "fc"} <= set(texts(page, "#labels text"))


def test_a_click_on_a_step_lists_what_is_alive_largest_first(page: Any, train: Program) -> None:
    plan = train.plan
    peak = [f"%{b.name}" for b in plan.peak]
    assert texts(page, "#alive tbody td:first-child") == peak
    for step in (0, 2, plan.peak_node):
        at(page, step, len(plan.live))
        alive = sorted((b for b in plan.buffers if b.birth <= step <= b.death), key=lambda b: (-b.size, b.offset))
        assert texts(page, "#alive tbody td:first-child") == [f"%{b.name}" for b in alive]
        assert [int(t.replace(",", "")) for t in texts(page, "#alive td:nth-child(5)")] == [b.size for b in alive]
        assert f"{plan.live[step]} bytes alive" in texts(page, "#what")[0]
        assert page.execute_script("return number.value") == str(step)
    assert peak == texts(page, "#alive tbody td:first-child")


def test_a_tensor_tells_what_it_is_and_is_found_in_the_list(page: Any, train: Program) -> None:
    first = next(b for b in train.plan.buffers if b.name == "0")
    index = [b.name for b in sorted(train.plan.buffers, key=lambda b: (-b.size, b.offset, b.birth))].index("0")
    press(page, f"#boxes g:nth-child({index + 1}) rect")
    (tip,) = texts(page, "#tip")
    for part in (
        "%0 first",
        "nn.dense, forward",
        "float32 1x8: 32 bytes",
        f"address {first.offset} to {first.end - 1}",
    ):
        assert part in tip
    assert f"steps {first.birth} to {first.death}" in tip and "from step 1 on: %1 bend nn.relu" in tip
    assert texts(page, "#alive tr.on td:first-child") == ["%0"]


def test_phases_are_filtered(page: Any) -> None:
    for phase in ("backward", "update", "forward"):
        before = count(page, "#boxes rect")
        own = count(page, f"#boxes .{phase} rect")
        assert own > 0
        press(page, f"#tools [value={phase}]")
        assert count(page, f"#boxes .{phase} rect") == 0
        assert count(page, "#boxes rect") == before - own
    assert not texts(page, "#labels text")


def test_a_search_leaves_what_it_finds(page: Any) -> None:
    page.find_element("css selector", "#search").send_keys("BEND")
    bright = page.find_elements("css selector", "#boxes g:not(.dim)")
    dim = page.find_elements("css selector", "#boxes g.dim")
    assert len(bright) == 1 and len(dim) > 3
    assert {float(e.value_of_css_property("opacity")) < 0.3 for e in dim} == {True}
    assert texts(page, "#layers tbody td:first-child") == ["bend"]


def test_a_part_is_enlarged_and_the_whole_comes_back(page: Any) -> None:
    from selenium.webdriver import ActionChains

    whole = [box.rect["width"] for box in page.find_elements("css selector", "#boxes rect")]
    element = page.find_element("css selector", "#live")
    half = round(element.rect["width"] / 4)
    drag = ActionChains(page).move_to_element_with_offset(element, -half, 0).click_and_hold()
    drag.move_by_offset(2 * half, 0).release().perform()
    first, _, count, _ = page.execute_script("return view")
    steps = page.execute_script("return N")
    assert first == pytest.approx(steps / 4, abs=0.1) and count == pytest.approx(steps / 2, abs=0.1)
    press(page, "#whole")
    assert [box.rect["width"] for box in page.find_elements("css selector", "#boxes rect")] == whole


def test_layers_are_sorted(page: Any) -> None:
    assert texts(page, "#layers tbody td:first-child") == ["first", "bend", "fc", "loss"]
    press(page, "#layers th:nth-child(4)")
    assert texts(page, "#layers tbody td:first-child")[:2] == ["first", "fc"]
    press(page, "#layers th:nth-child(4)")
    assert texts(page, "#layers tbody td:first-child")[-2:] == ["fc", "first"]
    press(page, "#layers th:nth-child(1)")
    assert texts(page, "#layers tbody td:first-child") == ["bend", "fc", "first", "loss"]


def test_without_scripts_the_drawing_stands(page: Any, train: Program) -> None:
    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page.refresh()
        assert count(page, "#boxes rect") == len(train.plan.buffers)
        assert texts(page, "#alive tbody td:first-child") == [f"%{b.name}" for b in train.plan.peak]
        assert {"input", "first", "fc"} <= set(texts(page, "#labels text"))
        assert not count(page, "#tools input") and str(train.plan.peak_node) in texts(page, "#step")
    finally:
        page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
