"""Pages that cannot be had are an error that says why: a file that was cut short, or a disk that fails."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import freemerge as fm
from freemerge.checkpoint import Checkpoint, mapped, open_model
from freemerge.checkpoint.mapped import fetched

NAME = "x.weight"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({NAME: torch.zeros(1024, 1024)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def adapted(file: Path) -> Checkpoint:
    """An adapter that leaves the tensor as the base has it."""
    folder = file.parent / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    save_file({"base_model.model.head.weight": torch.zeros(1)}, folder / "adapter_model.safetensors")
    return open_model(folder, Checkpoint.open(file))


def failing(address: object, nbytes: object, advice: object) -> int:
    ctypes.set_errno(errno.EFAULT)  # of a page that cannot be had, whatever the reason
    return -1


def test_a_disk_that_fails_is_not_a_file_that_was_cut_short(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Checkpoint.open(file)
    tensor = opened.read(NAME)
    monkeypatch.setattr(mapped, "_madvise", failing)
    with pytest.raises(fm.CheckpointError, match=r"cannot read .*model\.safetensors: Input/output error"):
        fetched(tensor, opened, NAME)
    file.rename(file.with_name("moved"))
    save_file({"y": torch.zeros(1)}, file)  # a shorter one in its place says nothing about that which is mapped
    with pytest.raises(fm.CheckpointError, match="Input/output error"):
        fetched(tensor, opened, NAME)
    file.unlink()
    with pytest.raises(fm.CheckpointError, match="Input/output error"):
        fetched(tensor, opened, NAME)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the pages")
@pytest.mark.parametrize("kind", ["itself", "adapter"])
def test_a_file_that_was_cut_short_is_named(kind: str, file: Path) -> None:
    opened = Checkpoint.open(file) if kind == "itself" else adapted(file)
    tensor = opened.read(NAME)
    os.truncate(file, 5000)
    with pytest.raises(fm.CheckpointError, match=r"model\.safetensors was cut short while it was being read"):
        fetched(tensor, opened, NAME)


def test_what_a_model_is_read_from_is_noted_when_it_is_opened(tmp_path: Path) -> None:
    save_file({NAME: torch.zeros(4)}, tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NAME: "a.safetensors"}}))
    (tmp_path / "config.json").write_text("{}")
    names = ["a.safetensors", "config.json", "model.safetensors.index.json"]
    before = {
        tmp_path / name: ((tmp_path / name).stat().st_size, (tmp_path / name).stat().st_mtime_ns) for name in names
    }
    opened = Checkpoint.open(tmp_path)
    for name in names:
        os.utime(tmp_path / name, ns=(0, 0))
    assert {file: known[:2] for file, known in opened.identities.items()} == before
    assert Checkpoint.open({NAME: torch.zeros(4)}).identities == {}
