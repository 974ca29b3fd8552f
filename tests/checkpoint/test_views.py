"""Checkpoints seen otherwise tell what the checkpoint inside tells, read what it holds at once, and read ahead."""

from __future__ import annotations

import json
from collections.abc import Callable
from inspect import get_annotations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import freemerge as fm
from freemerge.checkpoint import Checkpoint
from freemerge.checkpoint.conversion import Layout, Piece
from freemerge.checkpoint.quantised import dequantised
from freemerge.checkpoint.safetensors_file import SafetensorsFile
from freemerge.checkpoint.views import InFileLayout, InModuleLayout, renamed, with_stand_ins, without

SIDE = 600  # a square of so many numbers is read ahead
BY_NAME = {"specs", "tied", "made", "copies"}


def layout() -> Layout:
    """A module that stacks two weights of its files."""
    shape, strides = (SIDE, SIDE), (SIDE, 1)
    pieces = [Piece(shape, name, 0, strides, "both", i * SIDE * SIDE, strides) for i, name in enumerate(("x", "y"))]
    return Layout({"x": shape, "y": shape}, {"both": (2 * SIDE, SIDE)}, pieces)


FILES: dict[str, dict[str, Tensor]] = {
    "plain": {"x": torch.randn(SIDE, SIDE), "y": torch.randn(SIDE, SIDE), "a": torch.ones(3), "b": torch.ones(4)},
    "float8": {"x": torch.ones(1100, 1100).to(torch.float8_e4m3fn), "x_scale": torch.ones(1)}
    | {"a": torch.ones(3), "b": torch.ones(4)},
    "memory": {"both": torch.randn(2 * SIDE, SIDE), "a": torch.ones(3), "b": torch.ones(4)},
}
# What is shown of which file, a tensor of it, and what has to be read for that.
VIEWS: dict[str, tuple[str, Callable[[Checkpoint], Checkpoint], str, list[str]]] = {
    "renamed": ("plain", lambda inner: renamed(inner, {"x": "z"}), "z", ["x"]),
    "stand-ins": ("plain", lambda inner: with_stand_ins(inner, {"head": "x"}), "head", ["x"]),
    "without": ("plain", lambda inner: without(inner, ["y"]), "x", ["x"]),
    "dequantised": ("float8", dequantised, "x", ["x", "x_scale"]),
    "in file layout": ("memory", lambda inner: InFileLayout(inner, layout()), "y", ["both"]),
    "in module layout": ("plain", lambda inner: InModuleLayout(inner, layout()), "both", ["x", "y"]),
    "renamed float8": ("float8", lambda inner: renamed(dequantised(inner), {"x": "z"}), "z", ["x", "x_scale"]),
}


@pytest.fixture(params=VIEWS)
def view(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Checkpoint, Checkpoint, str, list[str]]:
    held, show, name, parts = VIEWS[request.param]
    save_file(FILES[held], tmp_path / "model.safetensors", {"said": "so"})
    inner = Checkpoint.open(tmp_path / "model.safetensors")
    return inner, show(inner), name, parts


def test_what_a_tensor_is_made_from_is_read_ahead(view: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    _, shown, name, parts = view
    asked: list[str] = []
    monkeypatch.setattr(SafetensorsFile, "will_need", lambda self, name: asked.append(name))
    shown.will_need([name, "a"])
    assert asked == [*parts, "a"]


def test_tensors_that_are_as_they_are_in_the_file_are_read_in_one_go(
    view: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, shown, name, _ = view
    monkeypatch.setattr(SafetensorsFile, "read", None)
    assert shown.read_flat(["a", "b"]).tolist() == [1.0] * 7
    assert shown.read_rows("a", 1, 3).tolist() == [1.0, 1.0]
    monkeypatch.undo()
    values = shown.read(name)
    assert torch.equal(shown.read_flat([name, "a"]), torch.cat([values.flatten(), torch.ones(3, dtype=values.dtype)]))
    assert torch.equal(shown.read_rows(name, 2, 5), values[2:5])


def test_views_tell_everything_that_a_checkpoint_tells(view: tuple[Any, ...]) -> None:
    inner, shown, _, _ = view
    told = get_annotations(Checkpoint).keys() - BY_NAME
    assert {"label", "files", "module"} <= told
    changed = {"dequantised", "widened"} if shown.dequantised else set()
    for name in told - changed:
        assert getattr(shown, name) == getattr(inner, name), name


def test_layouts_are_inverse() -> None:
    inner = Checkpoint.open(FILES["memory"])
    there = InFileLayout(inner, layout())
    back = InModuleLayout(there, layout())
    assert back.specs == inner.specs
    assert all(torch.equal(back.read(name), tensor) for name, tensor in FILES["memory"].items())


def test_a_wrapped_module_in_float8_is_known_by_its_names() -> None:
    model = nn.Linear(4, 4, bias=False)
    model.weight = nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    model.register_buffer("weight_scale", torch.ones(1))
    inner = Checkpoint.open(nn.DataParallel(model))
    assert inner.aliases("weight") == ("module.weight",)
    assert dequantised(inner).aliases("weight") == ("module.weight",)
    assert renamed(inner, {"weight": "w"}).aliases("w") == ("module.weight",)


def test_what_an_adapter_holds_in_full_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"head.weight": torch.randn(SIDE, SIDE), "up.weight": torch.randn(8, 4)}
    factors = {"up.lora_A.weight": torch.randn(2, 4), "up.lora_B.weight": torch.randn(8, 2)}
    held = factors | {"head.weight": torch.randn(SIDE, SIDE)}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(base, tmp_path / "base.safetensors")
    save_file({f"base_model.model.{n}": t for n, t in held.items()}, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "modules_to_save": ["head"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    asked: list[str] = []
    monkeypatch.setattr(SafetensorsFile, "will_need", lambda self, name: asked.append(name))
    fm.merge_checkpoints(tmp_path / "base.safetensors", [adapter], tmp_path / "out", progress=False)
    assert "head.weight" in asked
    assert "base_model.model.head.weight" in asked
