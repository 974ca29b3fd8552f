"""What a merge tells while it runs and afterwards: bytes, the time that is left, stages, memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import freemerge as fm
from freemerge.cli import main
from freemerge.merging import progress
from freemerge.merging.estimate import pace
from freemerge.merging.progress import Progress


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    paths = []
    for index in range(3):
        generator = torch.Generator().manual_seed(index)
        state = {f"{i}.w": torch.randn(64, 48, generator=generator) for i in range(5)} | {"b": torch.ones(7) * index}
        paths.append(str(tmp_path / f"{index}.safetensors"))
        save_file(state, paths[-1])
    return paths


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_the_time_left_follows_the_pace_of_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    told = Progress(1000, 500, ratio=4.0, style="none")
    assert told.seconds_left() == 0
    clock.now = 10.0
    told.advance("measure", 500, 1)  # 0.02 s a byte, and a byte takes 4 times as long to merge
    assert told.seconds_left() == pytest.approx(500 * 0.02 + 500 * 0.08)
    clock.now = 20.0
    told.advance("measure", 500, 1)
    assert told.seconds_left() == pytest.approx(500 * 0.08)
    clock.now = 30.0
    told.advance("merge", 250, 1)  # it takes 0.04 s
    assert told.seconds_left() == pytest.approx(250 * 0.04)
    clock.now = 40.0
    told.advance("merge", 250, 1)
    assert told.seconds_left() == 0


def test_a_merge_tells_all_bytes_and_counts_tensors_once(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    assert main(["merge", *models, "-o", str(tmp_path / "out"), "--log-json", "--cutoff", "0.8"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "start"
    assert kinds[-1] == "done"
    assert any("removes more than" in event["text"] for event in events if event["event"] == "warning")
    last = [event for event in events if event["event"] == "progress"][-1]
    assert (last["bytes"], last["tensors"], last["seconds_left"]) == (last["total_bytes"], 6, 0)
    assert last["total_bytes"] == events[0]["read_bytes"]
    assert {event["name"] for event in events if event["event"] == "stage"} >= {
        "read",
        "merge",
        "round",
        "write",
        "hash",
    }


def test_quiet_prints_nothing(models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", *models, "-o", str(tmp_path / "out"), "--quiet", "--cutoff", "0.8"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_stages_move_the_bytes_that_they_say(models: list[str], tmp_path: Path) -> None:
    report = fm.merge_checkpoints(models[0], models[1:], tmp_path / "out", progress=False)
    stages = {stage.name: stage for stage in report.stages}
    matrices, small = 5 * 64 * 48 * 4, 7 * 4
    assert stages["read"].nbytes == 2 * 3 * (matrices + small), "measured and merged"
    assert stages["merge"].nbytes == matrices + small
    size = Path(models[0]).stat().st_size
    assert stages["hash"].nbytes == 3 * size + stages["write"].nbytes
    assert stages["write"].nbytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert all(stage.seconds >= 0 for stage in report.stages)
    assert "GB/s" in str(stages["read"])


def test_memory_counts_the_largest_unit(models: list[str]) -> None:
    plain = fm.inspect(models[0], models[1:], fm.Recipe())
    held = fm.inspect(models[0], models[1:], fm.Recipe(sign_election=True))
    unit = 64 * 48 * 4
    assert held.memory_bytes - plain.memory_bytes >= 2 * unit, "every filtered task vector is held"
    assert plain.memory_bytes >= 128_000_000 + 3 * unit


@pytest.mark.parametrize("recipe", [fm.Recipe(), fm.Recipe(method="average"), fm.Recipe(method="tsv_m")])
def test_the_pace_of_a_recipe(recipe: fm.Recipe) -> None:
    found = pace(recipe, 2, "auto")
    assert found is not None
    assert found.merge > 0
    assert found.hash > 0
    assert (found.measure > 0) == (recipe.method.passes > 0 or recipe.method.default_scale(2) is None)
    assert found.seconds(2000, 1000, 500) > found.seconds(1000, 1000, 500) - 1e-12


@pytest.mark.parametrize(
    "recipe",
    [
        fm.Recipe(method="task_arithmetic", weights=(0.5, 0.5), layers=[("*.w", (1.0, 0.0))]),
        fm.Recipe(method="task_arithmetic", weights=(1e30, 1e30), scale="interference", filter="before"),
        fm.Recipe(method="average", scale=1e6, out_dtype="float16"),
        fm.Recipe(weights=(1e30, 1e30), scale=1e30),
        fm.Recipe(rename=[("model.", "")], select=[("*.w", "merge")], views=[{"split": "*.w", "parts": 2}]),
    ],
)
def test_an_estimate_goes_by_no_name_and_overflows_nothing(recipe: fm.Recipe) -> None:
    found = pace(recipe, 2, "auto")
    assert found is not None
    assert found.merge > 0


def test_a_fault_of_ours_is_no_missing_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    from freemerge.merging.engine import Merger

    monkeypatch.setattr(Merger, "measure", lambda self: {}["name"])
    with pytest.raises(KeyError):
        pace(fm.Recipe(), 2, "auto")


def test_without_an_estimate_a_merge_runs(models: list[str], tmp_path: Path) -> None:
    recipe = fm.Recipe(fm.Custom(torch.ones(64, 48).numpy()))  # a mask for these matrices alone
    assert pace(recipe, 2, "auto") is None
    assert fm.inspect(models[0], models[1:], recipe, out=tmp_path / "out").seconds is None
    assert fm.merge_checkpoints(models[0], models[1:], tmp_path / "out", recipe).out.is_dir()


@pytest.mark.parametrize("stderr", [None, object()])
def test_a_program_without_standard_error(stderr: object, models: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", stderr)
    fm.merge_checkpoints(models[0], models[1:], Path(models[0]).parent / "out", progress=False)
