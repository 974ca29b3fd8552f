"""The command tune."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import run

import freemerge as fm


def test_its_own_method_is_one_that_it_takes(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.py").write_text("def logits(state):\n    yield state['a.weight']\n")
    arguments = ["tune", *files, "--function", f"{tmp_path / 'data.py'}:logits", "--iterations", 1]
    assert run(*arguments, "-o", tmp_path / "recipe.yml") == 0
    assert fm.Recipe.from_yaml(tmp_path / "recipe.yml").method.name == "task_arithmetic"
    (tmp_path / "given.yml").write_text("method: average\nfilter: before\n")
    assert run(*arguments, "-o", tmp_path / "other.yml", "--recipe", tmp_path / "given.yml") == 0
    assert fm.Recipe.from_yaml(tmp_path / "other.yml").method.name == "average"
    assert run(*arguments, "-o", tmp_path / "third.yml", "--method", "fr") == 2
    assert "give it renormalize none" in capsys.readouterr().err
