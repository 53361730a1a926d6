"""The transfer benchmark: its mistakes are what they are called, and nothing runs twice."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qdq
import transfer

import tte
from tte.runner.board import unpack_state


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stem, an inverted residual with a skip, one without, a classifier."""
    recipe = qdq.Recipe(lambda: qdq.Mobile(8, [(8, 2, 3, 1), (12, 2, 5, 2)], 16), (1, 3, 16, 16))
    return qdq.quantize(recipe, tmp_path_factory.mktemp("transfer"))


def step(model: Path, wrong: str, rate: float) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What is stored before and after one step."""
    with transfer.mistake(wrong):
        artifact = tte.compile(model, update_scheme="full", target="host")
        assert artifact.build
    board = artifact.host()
    before = board.save_state()
    board.set_learning_rate(rate)
    x = np.random.default_rng(0).standard_normal(artifact.build.input.shape).astype(np.float32)
    assert board.train_step(x, np.asarray([3], np.int32)).status == 0
    return unpack_state(before, artifact.build), unpack_state(board.save_state(), artifact.build)


def test_mistakes_change_what_they_say(model: Path) -> None:
    _, right = step(model, "", 0.01)
    changed = {}
    for wrong in ("noskip", "rawdw"):
        _, values = step(model, wrong, 0.01)
        changed[wrong] = [name for name in right if not np.array_equal(right[name], values[name])]
    stem = list(right)[:2]
    assert changed["noskip"] == stem  # all that comes before the only skip
    assert len(changed["rawdw"]) > 5
    assert all(right[name].ndim > 1 for name in changed["rawdw"])  # weights, never biases


def test_truncated_steps_pull_weights_to_zero(model: Path) -> None:
    before, after = step(model, "trunc", 1e-4)
    names = [name for name in before if before[name].dtype == np.int8 and before[name].ndim == 4]
    old, new = (np.concatenate([values[name].ravel().astype(int) for name in names]) for values in (before, after))
    assert (np.abs(new) <= np.abs(old)).all()
    assert (new != old).mean() > 0.2


def test_what_is_finished_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[transfer.Job] = []

    def run(job: transfer.Job) -> dict[str, Any]:
        ran.append(job)
        return transfer.asdict(job) | {"accuracy": 50.0 + job.seed}

    monkeypatch.setattr(transfer, "run", run)
    jobs = [transfer.Job("signdigits", "99kb", lr, seed) for seed in (0, 1) for lr in (0.002, 0.004)]
    path = tmp_path / "build" / "results.jsonl"
    transfer.run_missing(jobs[:3], path, 1)
    transfer.run_missing(jobs, path, 1)
    assert ran == jobs
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 4
    results = transfer.Results(path)
    assert results.mean(jobs[0]) == 50.5
    assert "| signdigits | 99 KB | 0.002: 50.5 · 0.004: 50.5 | **50.5 ± 0.7** | 2 |" in results.table()
    page = tmp_path / "page.md"
    page.write_text(f"before\n{transfer.BEGIN}\nold\n{transfer.END}\nafter\n")
    monkeypatch.setattr(transfer, "check", lambda _: [("A1 name", "1", "<= 2", "ok")])
    transfer.write_tables(results, page)
    lines = page.read_text().splitlines()
    assert lines[:2] == ["before", transfer.BEGIN] and lines[-2:] == [transfer.END, "after"]
    assert "| name | 1 | <= 2 | ok |" in lines and "old" not in lines


def test_jobs_answer_for_every_seed_and_need_no_more_than_known_schemes() -> None:
    jobs = transfer.list_jobs()
    assert len(set(jobs)) == len(jobs) and len(jobs) % transfer.SEEDS == 0
    assert {job.scheme for job in jobs} == set(transfer.TRAIN)
    assert {job.wrong for job in jobs} == {"", *transfer.MISTAKES}
