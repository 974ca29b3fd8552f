"""The benchmark of the engine checks what it times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import engine


def test_small_tensors_are_timed_and_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "report.json"
    arguments = ["engine", "--small", "40", "--models", "2", "--rounds", "1", "--report", str(report)]
    monkeypatch.setattr("sys.argv", [*arguments, "--jobs", "copy", "average"])
    engine.main()
    told = capsys.readouterr().out
    assert "x copy" in told
    rows = json.loads(report.read_text())["rows"]
    assert [row["what"] for row in rows] == ["copy", "average"]
    assert all(row["wall"] > 0 and row["memory"] > 0 for row in rows)


def test_a_wrong_result_is_refused(tmp_path: Path) -> None:
    engine.write_models(tmp_path, 3, {"a.weight": (64, 48), "b": (16,)})
    recipe = engine.RECIPES["FR-Merging, default"]
    engine.merge(tmp_path, tmp_path / "out", recipe)
    engine.check(tmp_path, tmp_path / "out", recipe)
    state = load_file(tmp_path / "out" / "model.safetensors")
    state["a.weight"] += 0.01 * torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    save_file(state, tmp_path / "out" / "model.safetensors")
    with pytest.raises(AssertionError, match=r"relative error .* of a\.weight"):
        engine.check(tmp_path, tmp_path / "out", recipe)
