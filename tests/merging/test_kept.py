"""Matrices that were merged to find the scale are kept for the merge, and nothing depends on it."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from tempfile import TemporaryFile
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import freemerge as fm
from freemerge.checkpoint import CheckpointWriter
from freemerge.merging.kept import Kept
from freemerge.merging.progress import Progress, Style
from freemerge.methods import Merged
from freemerge.methods.iso import IsoC
from freemerge.methods.vectors import TaskVectors

SHAPES = {"a.weight": (24, 40), "b.weight": (40, 24), "x.q.weight": (16, 24), "x.k.weight": (8, 24), "a.bias": (24,)}
MATRICES = ("a.weight", "b.weight", "x.q.weight")  # the first names of units
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "filtered before": {"filter": "before"},
    "filtered after": {"filter": "after"},
    "stacked": {"views": [{"stack": ("*.q.weight", "*.k.weight")}]},
    "tsv_m": {"method": "tsv_m"},
    "wudi": {"method": "wudi"},
    "float64": {"compute_dtype": "float64"},
}


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    paths = [tmp_path / f"{i}.safetensors" for i in range(4)]
    for path in paths:
        state = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
        save_file({name: tensor.bfloat16() for name, tensor in state.items()}, path)
    return paths


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often Iso-C merges the matrices of a unit."""
    counted: Counter[str] = Counter()
    combine = IsoC.combine

    def counting(self: IsoC, vectors: TaskVectors) -> list[Tensor]:
        counted[vectors.tensors[0].name] += 1
        return combine(self, vectors)

    monkeypatch.setattr(IsoC, "combine", counting)
    return counted


def merged(models: list[Path], out: Path, recipe: fm.Recipe, **options: Any) -> dict[str, Tensor]:
    fm.merge_checkpoints(models[0], models[1:], out, recipe, progress=False, **options)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("options", RECIPES.values(), ids=RECIPES)
def test_the_same_bits_as_in_memory_where_all_is_merged_twice(
    options: dict[str, Any], models: list[Path], tmp_path: Path
) -> None:
    recipe = fm.Recipe(**{"method": "iso_c", **options})
    found = merged(models, tmp_path / "out", recipe)
    expected = fm.merge(models[0], models[1:], recipe)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "freemerge.json", "model.safetensors",
    ]  # fmt: skip


def test_every_matrix_is_merged_once(models: list[Path], merges: Counter[str], tmp_path: Path) -> None:
    merged(models, tmp_path / "out", fm.Recipe(method="iso_c"))
    assert {merges[name] for name in MATRICES} == {1}
    merges.clear()
    fm.merge(models[0], models[1:], fm.Recipe(method="iso_c"))
    assert {merges[name] for name in MATRICES} == {2}, "in memory there is no file for it"
    merges.clear()
    merged(models, tmp_path / "known", fm.Recipe(method="iso_c", scale=1.0))
    assert {merges[name] for name in MATRICES} == {1}


class _Full:
    """A file on a disk that has room for one matrix."""

    def __init__(self) -> None:
        self._file = TemporaryFile(buffering=0)  # noqa: SIM115
        self.closed = False

    def write(self, raw: memoryview) -> int:
        if self._file.tell() >= 4 * 24 * 40:
            raise OSError(28, "No space left on device")
        return self._file.write(raw[: 4 * 24 * 40 - self._file.tell()])

    def seek(self, offset: int) -> int:
        return self._file.seek(offset)

    def close(self) -> None:
        self.closed = True
        self._file.close()

    def __enter__(self) -> _Full:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def test_a_disk_that_fills_up_costs_time_only(
    models: list[Path], merges: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = fm.Recipe(method="iso_c")
    expected = merged(models, tmp_path / "expected", recipe)
    merges.clear()
    file = _Full()
    monkeypatch.setattr(CheckpointWriter, "scratch", lambda self, nbytes: file)
    found = merged(models, tmp_path / "out", recipe)
    assert file.closed, "its room is free again"
    assert {merges[name] for name in MATRICES} == {2}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_output_comes_first_where_the_disk_has_no_room_for_both(
    models: list[Path], merges: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    output = 6000  # bytes that it takes, header and all, and a few more
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=output))
    merged(models, tmp_path / "out", fm.Recipe(method="iso_c"))
    assert {merges[name] for name in MATRICES} == {2}
    matrices = sum(4 * torch.Size(shape).numel() for shape in SHAPES.values() if len(shape) == 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=output + matrices))
    merges.clear()
    merged(models, tmp_path / "both", fm.Recipe(method="iso_c"))
    assert {merges[name] for name in MATRICES} == {1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_what_is_taken_is_what_was_put(dtype: torch.dtype) -> None:
    tensors = [torch.randn(3, 5).to(dtype), torch.randn(7, 2).to(dtype).mT, torch.randn(0, 4).to(dtype)]
    with TemporaryFile(buffering=0) as file:
        kept = Kept(file)
        kept.put(["a", "b", "c"], Merged(tensors, [{"energy_factor": 2.0}, {}, {}], 2.0))
        kept.put(["d"], Merged(tensors[:1]))
        assert ("a", "b", "c") in kept
        assert kept.take(("a",)) is None
        taken = kept.take(("a", "b", "c"))
        assert taken is not None
        assert taken.notes[0] == {"energy_factor": 2.0}
        assert taken.factor == 2.0
        assert all(torch.equal(was, now) for was, now in zip(tensors, taken.tensors, strict=True))
        kept.put(["e"], Merged(tensors[1:2]))
        for names, tensor in ((["d"], tensors[0]), (["e"], tensors[1])):
            again = kept.take(names)
            assert again is not None
            assert torch.equal(again.tensors[0], tensor), "put after another was taken"
        file.truncate(0)
        assert kept.take(["d"]) is None, "a file that has failed is no error"


def test_a_single_file(models: list[Path], merges: Counter[str], tmp_path: Path) -> None:
    recipe = fm.Recipe(method="iso_c")
    fm.merge_checkpoints(models[0], models[1:], tmp_path / "out.safetensors", recipe, progress=False)
    assert {merges[name] for name in MATRICES} == {1}
    found, expected = load_file(tmp_path / "out.safetensors"), fm.merge(models[0], models[1:], recipe)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_that_is_resumed_merges_again(
    models: list[Path], merges: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = fm.Recipe(method="iso_c")
    expected = merged(models, tmp_path / "expected", recipe)
    with monkeypatch.context() as patch:  # a process that is killed when the scale is known
        patch.setattr(CheckpointWriter, "write", lambda *_: (_ for _ in ()).throw(SystemExit(1)))

        def leave(writer: CheckpointWriter, *_: object) -> None:
            assert writer._journal is not None
            writer._journal.close()
            writer._staging.end(keep=True)

        patch.setattr(CheckpointWriter, "__exit__", leave)
        with pytest.raises(SystemExit):
            merged(models, tmp_path / "out", recipe)
    merges.clear()
    found = merged(models, tmp_path / "out", recipe, resume=True)
    assert {merges[name] for name in MATRICES} == {1}, "the scale is in the journal"
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_stages_and_the_time_left_know_of_it(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios: list[float] = []
    made = Progress.__init__

    def watching(self: Progress, *sizes: int, ratio: float, style: Style) -> None:
        ratios.append(ratio)
        made(self, *sizes, ratio=ratio, style=style)

    monkeypatch.setattr(Progress, "__init__", watching)
    clock, combine = SimpleNamespace(now=0.0), IsoC.combine

    def in_a_second(self: IsoC, vectors: TaskVectors) -> list[Tensor]:
        clock.now += 1
        return combine(self, vectors)

    monkeypatch.setattr(IsoC, "combine", in_a_second)
    monkeypatch.setattr("freemerge.merging.stages.time", SimpleNamespace(perf_counter=lambda: clock.now))
    report = fm.merge_checkpoints(models[0], models[1:], tmp_path / "out", fm.Recipe(method="iso_c"))
    assert ratios == [0.0], "nothing is left to be merged, and no small merge is timed to tell"
    assert clock.now == 4, "so many matrices"
    stages = {stage.name: stage for stage in report.stages}
    numel = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    assert stages["merge"].nbytes == 4 * (numel + 24), "matrices once, the vector for the scale and for the merge"
    assert (stages["merge"].seconds, stages["read"].seconds, stages["round"].seconds) == (4.0, 0.0, 0.0)
