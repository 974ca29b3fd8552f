"""The programs in examples/ run, and do what they say."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import freemerge as fm

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_is_tested_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"library.py", "latents.py", "models.py", "router.py"}


def test_a_library_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"a.weight": torch.randn(40, 30), "a.bias": torch.randn(40)}
    models = [{name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in base.items()} for _ in range(2)]
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for path, state in zip(paths, [base, *models], strict=True):
        save_file(state, path)
    run("library.py", *paths, tmp_path / "out.safetensors", monkeypatch=monkeypatch)
    expected = fm.merge(base, models, fm.Recipe(cutoff=0.3))
    merged = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(tensor, merged[name]) for name, tensor in expected.items())


def test_gains_on_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("latents.py", monkeypatch=monkeypatch)
    assert names["roughness"](names["sharper"]) > names["roughness"](names["plain"]) + 0.005


def test_experts_and_a_router() -> None:
    found = runpy.run_path(str(EXAMPLES / "router.py"))["main"]()
    means = {setting: sum(row.values()) / len(row) for setting, row in found.items()}
    assert means["merged"] + 0.05 < means["with its expert"]
    assert means["merged"] + 0.05 < means["with a router"]
