"""How much memory the arena may take: as little as possible, as the budget allows, or whatever is fastest."""

import numpy as np
import pytest
import torch
from torch import nn

import tte
from tte.artifact import Artifact
from tte.errors import TTEError

pytestmark = pytest.mark.usefixtures("import_once")


class Block(nn.Module):
    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.expand, self.project = nn.Conv2d(channels, wide, 1), nn.Conv2d(wide, channels, 1)
        self.depthwise = nn.Conv2d(wide, wide, 3, 1, 1, groups=wide)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.relu6(self.depthwise(nn.functional.relu6(self.expand(x))))
        return x + self.project(y)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(3)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), Block(8, 48), Block(8, 48), *head).eval()


def make(network: nn.Module, scheme: object = "full", **options: object) -> Artifact:
    return tte.compile(network, (torch.zeros(1, 3, 32, 32),), scheme, "host", **options)  # type: ignore[arg-type]


def size(artifact: Artifact) -> int:
    return max(program.plan.arena_bytes for program in artifact.compiled.programs)


def strategies(artifact: Artifact) -> int:
    """How many regions save memory."""
    return sum(n.attrs.get("strategy") in ("rows", "tiles") for p in artifact.compiled.programs for n in p.graph.nodes)


def test_each_size_gets_the_cheapest_plan_that_fits(network: nn.Module) -> None:
    smallest, fastest = (make(network, memory_plan=plan) for plan in ("smallest", "fastest"))
    low, high = size(smallest), size(fastest)
    assert low < 0.9 * high
    assert strategies(fastest) == 0 < strategies(smallest)
    between = [make(network, memory_plan=low + (high - low) * k // 4) for k in range(5)]
    for k, artifact in enumerate(between):
        assert size(artifact) <= low + (high - low) * k // 4
    counts = [strategies(artifact) for artifact in between]
    assert counts == sorted(counts, reverse=True) and counts[-1] == 0
    data = {"x": np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32), "y": np.arange(4)}
    assert len({a.run(data, runner="host").weights_sha256 for a in (smallest, fastest, *between)}) == 1


def test_a_budget_is_met_with_no_more_than_it_takes(network: nn.Module) -> None:
    low, high = size(make(network)), size(make(network, memory_plan="fastest"))
    trained = make(network).report["memory"]["trained_bytes"]
    roomy = make(network, {"train": "full", "budget": {"sram": high + trained + 8192}})
    assert strategies(roomy) == 0
    tight = make(network, {"train": "full", "budget": {"sram": low + trained + 8192}})
    assert size(tight) <= low + 4096 and strategies(tight)
    fixes = set()
    for sram in (trained + 24_000, 1024):
        with pytest.raises(TTEError, match="bytes of sram are needed") as refused:
            make(network, {"train": "full", "budget": {"sram": sram}})
        assert refused.value.code == "TTE-E049" and "multiply-accumulates are computed twice" in refused.value.fix
        fixes.add(refused.value.fix)
    least = int(fixes.pop().split(",")[0].removeprefix("raise the budget to "))
    assert not fixes  # whatever is asked for
    assert make(network, {"train": "full", "budget": {"sram": least}}).report["memory"]["static_ram_bytes"] <= least


@pytest.mark.parametrize("sram", [200_000, 20_000])
def test_a_plan_that_is_asked_for_does_not_serve_the_budget(sram: int, network: nn.Module) -> None:
    """That it fits is checked, and said."""
    scheme = {"train": "last-layer", "budget": {"sram": sram}}
    if sram == 200_000:
        assert any("fastest; that the budget" in n for n in make(network, scheme, memory_plan="fastest").compiled.notes)
        assert not make(network, scheme).compiled.notes
    else:
        with pytest.raises(TTEError, match="sram are needed") as refused:
            make(network, scheme, memory_plan="fastest")
        assert refused.value.fix.startswith("leave out --memory-plan fastest")


def test_less_than_possible_is_refused(network: nn.Module) -> None:
    """With the least that is known to do."""
    with pytest.raises(TTEError, match="20,000 are allowed") as refused:
        make(network, memory_plan=20_000)
    assert refused.value.code == "TTE-E049"
    least = int(refused.value.what.split(" bytes")[0].rpartition(" ")[2].replace(",", ""))
    assert 20_000 < size(make(network, memory_plan=least)) <= least
    assert f"--memory-plan {least} computes" in refused.value.fix and "at the peak: " in refused.value.where
    assert f"with {size(make(network, memory_plan='smallest')):,} bytes (smallest) none are" in refused.value.fix


@pytest.mark.parametrize("plan", ["small", "", 0, -5, 1.5, True, None])
def test_other_plans_are_refused(network: nn.Module, plan: object) -> None:
    with pytest.raises(TTEError, match="no memory plan") as refused:
        make(network, memory_plan=plan)
    assert refused.value.code == "TTE-E044"


def test_where_nothing_else_helps_the_forward_is_computed_twice(network: nn.Module) -> None:
    smallest = make(network, memory_plan="smallest")
    low = size(smallest)
    less = make(network, memory_plan=low * 3 // 4)
    assert size(less) <= low * 3 // 4
    macs = smallest.report["memory"]["extra_macs"], less.report["memory"]["extra_macs"]
    assert macs[0] == 0 < macs[1] < 0.25 * sum(node.macs for node in smallest.graph.nodes)
    data = {"x": np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32), "y": np.arange(4)}
    assert less.run(data, runner="host").weights_sha256 == smallest.run(data, runner="host").weights_sha256
