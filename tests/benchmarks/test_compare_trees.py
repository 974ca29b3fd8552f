"""The comparison of two source trees: its verdicts, and a run of a tree against itself."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import freemerge as fm
from benchmarks import compare, suites

ROOT = Path(__file__).parents[2]
ONLY = "64x64-float32-HighPass(0.4)"


def times(seed: int, factor: float = 1.0, scatter: float = 0.02, rounds: int = 21) -> list[float]:
    noise = random.Random(seed)
    return [factor * (1 + abs(noise.gauss(0, scatter))) for _ in range(rounds)]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "same"), (1.1, "slower"), (0.9, "faster")])
def test_a_change_of_ten_percent_is_found_and_noise_is_not(seed: int, factor: float, verdict: str) -> None:
    found = compare.judge(times(3 * seed), times(3 * seed + 1), times(3 * seed + 2, factor))
    assert found["verdict"] == verdict
    assert found["ratio"] == pytest.approx(factor, abs=0.03)


def test_a_moment_that_slows_a_whole_round_changes_nothing() -> None:
    rounds = [times(seed) for seed in range(3)]
    slow = [[t * (5 if i % 3 == 0 else 1) for i, t in enumerate(series)] for series in rounds]
    assert compare.judge(*slow)["ratio"] == pytest.approx(compare.judge(*rounds)["ratio"])


def test_a_difference_of_the_control_counts_as_noise() -> None:
    assert compare.judge(times(0), times(1, 1.1), times(2, 1.1))["verdict"] == "same"


def test_a_row_is_slower_only_if_it_is_so_twice() -> None:
    verdicts = {"a": "slower", "b": "slower", "c": "same"}
    first = [{"row": row, "step": "", "verdict": verdict} for row, verdict in verdicts.items()]
    again = [{"row": "a", "step": "", "verdict": "same"}, {"row": "b", "step": "", "verdict": "slower"}]
    assert [row["verdict"] for row in compare.settle(first, again)] == ["same", "slower", "same"]


def test_a_turn_runs_every_step_as_often_as_asked_and_tells_parts() -> None:
    ran: list[str] = []
    job = suites.Job({"on": lambda: ran.append("on"), "off": lambda: ran.append("off")}, "", together=True)
    assert set(suites.turn(job, 3)) == {"on", "off"}
    assert ran == ["on", "off"] * 3
    split = suites.Job({"": lambda: None, "native": lambda: None}, "", parts={"python": ("", "native")})
    found = suites.turn(split, 100)
    assert found["python"][1] == found[""][1] - found["native"][1]


def test_the_native_part_of_a_call_does_its_work() -> None:
    if not fm.backends()["cpu"].available:
        pytest.skip("no native CPU backend")
    data, response = torch.randn(64, 64), fm.HighPass(0.4)
    x = data.clone()
    native = suites.native_call(lambda: fm.filter_(x, response, backend="cpu"))
    assert native is not None
    x.copy_(data)
    native()
    assert torch.equal(x, fm.filtered(data, response, backend="cpu"))


def test_a_tree_against_itself(tmp_path: Path) -> None:
    tree, report = tmp_path / "tree", tmp_path / "report.json"
    (tree / "python").mkdir(parents=True)
    (tree / "python" / "freemerge").symlink_to(Path(fm.__file__).parent)  # which may be installed, without a tree
    command = ["-m", "benchmarks.compare", tree, tree, "--suite", "calls", "--only", ONLY, "--seconds", "0.1"]
    command = [sys.executable, *command, "--report", report]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr  # 1: slower, which is not this test's concern
    rows = json.loads(report.read_text(encoding="utf-8"))["rows"]
    assert {row["row"] for row in rows} == {name for name in suites.SUITES["calls"] if ONLY in name}
    assert all(row["same_result"] and row["before_ms"] > 0 for row in rows)
    assert "other bytes than before: none" in done.stdout


def test_a_package_from_elsewhere_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.suites", tmp_path], cwd=ROOT, input="", capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode != 0
    assert f"not from {tmp_path}" in done.stderr
