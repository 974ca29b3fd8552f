"""Folders of expert files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import freemerge.experts as fx
from freemerge.errors import ArgumentError, CheckpointError, RefusedError


def experts(made: list[str]) -> Iterator[tuple[str, fx.Expert]]:
    base = {"w": torch.zeros(20, 20)}
    for task in ("cooking", "law"):
        made.append(task)
        yield from fx.iter_experts(base, {task: {"w": torch.full((20, 20), 2.0)}})


def test_a_folder_holds_a_file_for_each_task(tmp_path: Path) -> None:
    saved = fx.save_experts(experts([]), tmp_path / "out")
    assert [(expert.task, expert.entries) for expert in saved] == [("cooking", 4), ("law", 4)]
    for expert in saved:
        file = tmp_path / "out" / f"{expert.task}.safetensors"
        assert file.stat().st_size == expert.nbytes
        assert fx.Expert.load(file).mu == expert.mu


def test_the_longest_name_of_a_task_is_written(tmp_path: Path) -> None:
    """Nothing longer gets so far: experts take long to make."""
    for name in ("x" * 228, "ü" * 114):
        fx.save_experts(fx.iter_experts({"w": torch.zeros(20)}, {name: {"w": torch.ones(20)}}), tmp_path / name[0])
        assert [path.stem for path in (tmp_path / name[0]).iterdir()] == [name]


def test_tasks_that_cannot_be_files_of_their_own_are_refused(tmp_path: Path) -> None:
    expert = next(expert for _, expert in experts([]))
    with pytest.raises(ArgumentError, match="experts: 'a/b' cannot name a task"):
        fx.save_experts({"a/b": expert}, tmp_path / "out")
    with pytest.raises(ArgumentError, match="experts: two are called 'law'"):
        fx.save_experts([("law", expert), ("law", expert)], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[str, fx.Expert]]:
        yield from experts([])
        raise CheckpointError("unreadable")

    with pytest.raises(CheckpointError, match="unreadable"):
        fx.save_experts(failing(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    made: list[str] = []
    with pytest.raises(RefusedError):
        fx.save_experts(experts(made), tmp_path)
    assert made == []


def test_force_replaces_a_folder_of_experts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fx.save_experts(experts([]), out)
    with pytest.raises(RefusedError, match="use --force"):
        fx.save_experts(experts([]), out)
    new = {"math": next(expert for _, expert in experts([]))}
    fx.save_experts(new.items(), out, force=True)
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "math.safetensors"]


@pytest.mark.parametrize("foreign", ["notes.txt", "model.safetensors", "folder", "link.safetensors"])
def test_force_deletes_nothing_else(foreign: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fx.save_experts(experts([]), out)
    if foreign == "model.safetensors":
        save_file({"w": torch.ones(2)}, out / foreign)
    elif foreign == "folder":
        (out / foreign).mkdir()
    elif foreign == "link.safetensors":
        (out / foreign).symlink_to(out / "law.safetensors")
    else:
        (out / foreign).write_text("mine")
    before = sorted(out.iterdir())
    made: list[str] = []
    with pytest.raises(RefusedError, match=f"{foreign} is no expert file.*even force"):
        fx.save_experts(experts(made), out, force=True)
    assert (made, sorted(out.iterdir())) == ([], before)


def test_an_error_leaves_what_force_would_have_replaced(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[str, fx.Expert]]:
        yield from experts([])
        raise CheckpointError("unreadable")

    fx.save_experts(experts([]), tmp_path / "out")
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(CheckpointError, match="unreadable"):
        fx.save_experts(failing(), tmp_path / "out", force=True)
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
