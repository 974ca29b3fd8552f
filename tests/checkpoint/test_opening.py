"""What a path means: a full model, an adapter, or both at once, which is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import freemerge as fm
from freemerge.checkpoint import Checkpoint, open_model
from in_memory import same

BASE = {"layer.weight": torch.arange(32.0).reshape(4, 8), "norm.weight": torch.ones(8)}
FULL = {name: tensor + 1 for name, tensor in BASE.items()}
ADAPTER = {
    "base_model.model.layer.lora_A.weight": torch.ones(2, 8),
    "base_model.model.layer.lora_B.weight": torch.ones(4, 2),
}


def directory(folder: Path, *, full: str = "", adapter: str = "", config: bool = True) -> Path:
    folder.mkdir()
    if config:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    for name, tensors in ((full, FULL), (adapter, ADAPTER)):
        if name.endswith(".index.json"):
            save_file(tensors, folder / "part.safetensors")
            weight_map = {"weight_map": dict.fromkeys(tensors, "part.safetensors")}
            (folder / name).write_text(json.dumps(weight_map))
        elif name.endswith(".safetensors"):
            save_file(tensors, folder / name)
        elif name:
            torch.save(tensors, folder / name)
    return folder


def read(source: object) -> dict[str, Tensor]:
    opened = open_model(source, Checkpoint.open(BASE))  # type: ignore[arg-type]
    return {name: opened.read(name) for name in opened.specs}


FULL_WEIGHTS = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
ADAPTED = {**BASE, "layer.weight": BASE["layer.weight"] + 2}


@pytest.mark.parametrize("full", FULL_WEIGHTS)
@pytest.mark.parametrize("adapter", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_full_model_and_an_adapter_at_once_are_refused_and_either_can_be_named(
    full: str, adapter: str, tmp_path: Path
) -> None:
    folder = directory(tmp_path / "m", full=full, adapter=adapter)
    for attempt in (lambda: fm.merge(BASE, [folder]), lambda: fm.merge(folder, [FULL])):
        with pytest.raises(
            fm.CheckpointError, match=r"holds a full model .* and an adapter .*whichever is meant"
        ) as refusal:
            attempt()
    named = re.search(r"give (\S+) or (\S+), whichever", str(refusal.value))
    assert named is not None
    assert same(read(named.group(1)), FULL)
    assert same(read(named.group(2)), ADAPTED)


@pytest.mark.parametrize("full", [*FULL_WEIGHTS, "weights.safetensors"])
def test_a_leftover_config_makes_no_adapter(full: str, tmp_path: Path) -> None:
    assert same(read(directory(tmp_path / "m", full=full)), FULL)


@pytest.mark.parametrize("adapter", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_by_directory_and_by_file(adapter: str, tmp_path: Path) -> None:
    folder = directory(tmp_path / "m", adapter=adapter)
    assert same(read(folder), ADAPTED)
    assert same(read(str(folder / adapter)), ADAPTED)


def test_an_adapter_is_no_base_and_a_config_alone_is_nothing(tmp_path: Path) -> None:
    folder = directory(tmp_path / "adapter", adapter="adapter_model.safetensors")
    with pytest.raises(fm.CheckpointError, match="is a PEFT adapter, not a full model; it can be one of the models"):
        fm.merge(folder, [BASE])
    with pytest.raises(
        fm.CheckpointError, match=r"PEFT adapter without adapter_model\.safetensors or adapter_model\.bin"
    ):
        fm.merge(BASE, [directory(tmp_path / "nothing")])


def test_messages_name_the_argument_of_a_source_in_memory() -> None:
    wrong = {**BASE, "extra": torch.ones(1)}
    with pytest.raises(fm.CheckpointError, match=r"^models\[1\] \(in-memory state dict\)"):
        fm.merge(BASE, [FULL, wrong])
    with pytest.raises(fm.CheckpointError, match=r"^models\[0\] \(in-memory Linear\)"):
        fm.merge(BASE, [torch.nn.Linear(2, 2)])
    with pytest.raises(fm.CheckpointError, match=r"^base \(in-memory state dict\): not a state dict"):
        fm.merge({"a": 1}, [FULL])  # type: ignore[dict-item]
    with pytest.raises(fm.CheckpointError, match=r"^models\['math'\] \(in-memory state dict\)"):
        fm.extract_experts(BASE, {"code": FULL, "math": wrong})
    with pytest.raises(fm.CheckpointError, match=r"^models\[1\] \(in-memory state dict\)"):
        fm.extract_experts(BASE, [FULL, wrong])
