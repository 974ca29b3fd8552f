"""A copy of the base among the models, one model twice: told, wherever the copy lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import freemerge as fm
from freemerge.checkpoint import Checkpoint, open_model
from freemerge.checkpoint.adapter import AdaptedCheckpoint
from freemerge.checkpoint.alike import alike

BASE = {"a.weight": torch.arange(256.0).reshape(16, 16), "b.bias": torch.ones(16), "n": torch.arange(3)}
RECIPE = fm.Recipe(weights="uniform", select=[fm.Rule("*", "merge")])


def changed(where: str, by: float = 1.0) -> dict[str, Tensor]:
    tensors = {name: tensor.clone() for name, tensor in BASE.items()}
    tensors[where].view(-1)[-1] += by
    return tensors


def stored(form: str, tensors: dict[str, Tensor], path: Path) -> Any:
    if form == "memory":
        return {name: tensor.clone() for name, tensor in tensors.items()}
    if form == "torch":
        torch.save(tensors, path.with_suffix(".pt"))
        return path.with_suffix(".pt")
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    return path


def notices(base: Any, models: list[Any]) -> list[str]:
    return [warning for warning in fm.inspect(base, models, RECIPE).warnings if "spectrum" not in warning]


@pytest.mark.parametrize("form", ["memory", "torch", "directory"])
def test_copies_are_told_and_small_changes_are_not_copies(form: str, tmp_path: Path) -> None:
    base = stored(form, BASE, tmp_path / "base")
    copy = stored("memory" if form == "torch" else "torch", BASE, tmp_path / "copy")
    one = stored(form, changed("a.weight"), tmp_path / "one")
    twin = stored("directory", changed("a.weight"), tmp_path / "twin")
    other = stored(form, changed("b.bias", 1e-6), tmp_path / "other")
    assert notices(base, [one, other]) == []
    assert notices(base, [one, copy]) == ["models[1] has the same weights as base and changes nothing"]
    assert notices(base, [one, other, twin]) == ["models[2] has the same weights as models[0] and counts twice"]
    assert notices(base, [one, one]) == ["models[1] is the same as models[0]"]


def test_one_model_in_two_precisions_is_one_model(tmp_path: Path) -> None:
    half = {name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor for name, tensor in BASE.items()}
    full = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in half.items()}
    assert "models[0] has the same weights as base and changes nothing" in notices(half, [full])


def test_an_adapter_that_was_not_trained_changes_nothing(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.a.lora_A.weight": torch.ones(2, 16),
        "base_model.model.a.lora_B.weight": torch.zeros(16, 2),
    }
    for change, expected in ((0.0, ["models[0] has the same weights as base and changes nothing"]), (0.5, [])):
        folder = tmp_path / str(change)
        folder.mkdir()
        tensors["base_model.model.a.lora_B.weight"][15, 1] = change
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
        assert notices(BASE, [folder]) == expected


def test_many_models_are_read_once_each_and_by_first_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    kind = type(Checkpoint.open(BASE))
    monkeypatch.setattr(kind, "read", lambda self, name, read=kind.read: reads.append(name) or read(self, name))
    models = {f"models[{i}]": {**BASE, "b.bias": torch.full((16,), float(i % 3 + 2))} for i in range(8)}
    sources = {name: Checkpoint.open(state) for name, state in {"base": BASE, **models}.items()}
    told = [*alike(sources)]
    firsts = {i: i % 3 for i in range(3, 8)}
    assert sorted(told) == [
        f"models[{i}] has the same weights as models[{j}] and counts twice" for i, j in firsts.items()
    ]
    assert len(reads) == 2 * 9 + 2 * 8, "first rows of all, then the whole of those that agree in them"


@pytest.mark.parametrize("turned", [False, True])
def test_adapters_are_not_applied_to_whole_weights(
    turned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"a.weight": torch.randn(16, 8), "b.weight": torch.randn(16, 8)}
    rank, sides = 2, (16, 8) if turned else (8, 16)
    folders = [tmp_path / str(i) for i in range(3)]
    for i, folder in enumerate(folders):
        folder.mkdir()
        factors = {"A": torch.full((rank, sides[0]), 1.0 + i), "B": torch.ones(sides[1], rank)}
        named = {f"base_model.model.a.lora_{name}.weight": factor for name, factor in factors.items()}
        save_file(named, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "fan_in_fan_out": turned}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    with Checkpoint.open(base) as opened, open_model(folders[1], opened) as adapted:
        for name in base:
            assert torch.equal(adapted.read_rows(name, 3, 7), adapted.read(name)[3:7])
    monkeypatch.setattr(AdaptedCheckpoint, "read", None)
    assert notices(base, folders) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("base", [{}, {"n": torch.arange(3)}, {"mask": torch.ones(2, dtype=torch.bool)}])
def test_a_base_without_anything_to_merge_is_refused(base: dict[str, Tensor]) -> None:
    for run in (lambda: fm.merge(base, [base]), lambda: fm.extract_experts(base, {"a": base})):
        with pytest.raises(fm.CheckpointError, match=r"^base \(in-memory state dict\) holds no tensor in float32"):
            run()


def test_models_that_share_no_tensor_get_no_advice_that_would_give_the_base() -> None:
    for model in ({}, {"x": torch.ones(3)}):
        with pytest.raises(fm.CheckpointError, match="the two have no tensor in common") as refusal:
            fm.merge(BASE, [model])
        assert "copy" not in str(refusal.value)


@pytest.mark.parametrize("model", [None, 3, [("a.weight", torch.ones(2))]])
def test_the_argument_is_named(model: Any) -> None:
    with pytest.raises(fm.ArgumentError, match=r"^models\[1\] must be a path, a state dict or a module, got"):
        fm.merge(BASE, [changed("b.bias"), model])
    with pytest.raises(fm.ArgumentError, match=r"^base must be a path"):
        fm.merge(model, [BASE])
