"""What is merged on a GPU is copied to pinned memory ahead of its turn. Here the GPU is the emulated one, or none, so
that memory is as good as pinned; what is looked at is which copies are made and used, when they go, and what fails."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import wait
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import emulated
import freemerge as fm
from freemerge.backends import registry
from freemerge.backends.torch import TorchBackend
from freemerge.checkpoint import Checkpoint, Inputs
from freemerge.merging import pinned
from freemerge.merging.engine import Merger
from freemerge.merging.units import Unit
from freemerge.methods import Measured

SHAPES = {"a.weight": (48, 40), "b.bias": (40,), "c.weight": (64, 24), "d.weight": (24, 24), "e.weight": (7, 600)}
NBYTES = {name: 2 * torch.Size(shape).numel() for name, shape in SHAPES.items()}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.safetensors" for i in range(4)]
    for i, path in enumerate(paths):
        generator = torch.Generator().manual_seed(i)
        state: dict[str, Tensor] = {n: torch.randn(s, generator=generator).bfloat16() for n, s in SHAPES.items()}
        save_file(state | {"steps": torch.tensor(3)}, path)
    return paths


class Copies:
    """What was copied, and the copies that live."""

    def __init__(self) -> None:
        self.made: list[tuple[Path | str, ...]] = []
        self._alive: list[tuple[int, weakref.ref[Tensor]]] = []

    def pin(self, tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        self._alive.append((copy.nbytes, weakref.ref(copy)))
        return copy

    @property
    def nbytes(self) -> int:
        return sum(nbytes for nbytes, copy in self._alive if copy() is not None)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[Copies]:
    """Merges that take a CPU for a GPU, which can pin."""
    copies, pinned_copy = Copies(), pinned._pinned_copy

    def noted(source: Checkpoint, name: str) -> Tensor:
        copies.made.append((*source.files, name))
        return pinned_copy(source, name)

    monkeypatch.setattr(Merger, "_on_gpu", True)
    monkeypatch.setattr(Merger, "_goes_to_gpu", lambda self, unit, source: self._on_gpu and unit.action != "copy")
    monkeypatch.setattr(pinned, "_pinned_copy", noted)
    monkeypatch.setattr(pinned, "LEAST_BYTES", 0)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: copies.pin(tensor))
    with registry.using(emulated.backend(), TorchBackend()):
        yield copies


def merged(files: list[Path], method: str) -> dict[str, Tensor]:
    return fm.merge(files[0], files[1:], method=method, backend="cuda" if method == "fr" else "auto")


@pytest.mark.parametrize(("method", "count"), [("fr", 40), ("ties", 60), ("tsv_m", 28), ("average", 20)])
def test_every_tensor_is_read_from_its_copy(
    files: list[Path], method: str, count: int, copies: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 x 5 in each pass; the models' matrices once, where what they were merged to for the scale is kept."""
    found = fm.merge_checkpoints(
        files[0], files[1:], files[0].parent / "out", method=method, backend="cuda" if method == "fr" else "auto",
        progress=False,
    )  # fmt: skip
    assert set(copies.made) == {(path, name) for path in files for name in SHAPES}
    assert len(copies.made) == count
    monkeypatch.setattr(Merger, "_on_gpu", False)
    expected = merged(files, method)
    result = Checkpoint.open(found.out)
    assert {name: result.read(name).tolist() for name in result.specs} == {n: t.tolist() for n, t in expected.items()}
    gc.collect()
    assert copies.nbytes == 0


@pytest.mark.parametrize("memory", [0, 20_000, 10**9])
def test_one_unit_more_or_what_memory_takes_is_copied_ahead(files: list[Path], copies: Copies, memory: int) -> None:
    merger = Merger(Inputs(*_opened(files)), fm.Recipe(method="task_arithmetic"), memory=memory)
    units = [unit for unit in merger.steps if unit.action != "copy"]
    sizes = {unit: 4 * sum(NBYTES[name] for name in unit.names) for unit in units}
    ahead = []
    for unit in merger.ahead(units):
        wait([copy for copies in merger._pinned._copies.values() for copy in copies.values()])
        ahead.append(copies.nbytes - sizes[unit])
        merger.merged(unit, Measured((1.0, 1.0, 1.0)))
    assert copies.nbytes == 0
    b, c, d, e = (4 * NBYTES[name] for name in list(SHAPES)[1:])
    some = {0: [b, c, d, e, 0], 20_000: [b + c + d, c + d, d, e, 0]}
    assert ahead == some.get(memory, [b + c + d + e, c + d + e, d + e, e, 0])


def test_a_file_that_lost_its_end_is_named_and_nothing_is_left(files: list[Path], copies: Copies) -> None:
    merger = Merger(Inputs(*_opened(files)), fm.Recipe(method="task_arithmetic"))
    whole = files[2].read_bytes()
    files[2].write_bytes(whole[:-2000])
    with pytest.raises(fm.CheckpointError, match=r"2\.safetensors"):
        list(map(partial(merger.merged, measured=Measured((1.0, 1.0, 1.0))), merger.ahead(merger.steps)))
    assert not threads()
    gc.collect()
    assert copies.nbytes == 0


def test_who_stops_early_leaves_nothing(files: list[Path], copies: Copies) -> None:
    merger = Merger(Inputs(*_opened(files)), fm.Recipe(method="task_arithmetic"), memory=10**9)
    ahead = merger.ahead(merger.steps)
    assert isinstance(next(ahead), Unit)
    assert merger._pinned._copies
    ahead.close()
    assert not merger._pinned._copies
    assert not threads()


def test_one_pass_within_another_has_copies_of_its_own(files: list[Path], copies: Copies) -> None:
    merger = Merger(Inputs(*_opened(files)), fm.Recipe(method="task_arithmetic"))
    for unit in merger.ahead(merger.steps):
        of_outer = merger._pinned._copies
        for _ in merger.ahead(merger.steps[:2]):
            assert merger._pinned._copies is not of_outer
        assert merger._pinned._copies is of_outer
        merger.merged(unit, Measured((1.0, 1.0, 1.0)))
    assert not threads()


def test_a_model_that_is_given_twice_is_copied_once(files: list[Path], copies: Copies) -> None:
    base, (model, *_) = _opened(files)
    merger = Merger(Inputs(base, [model, model]), fm.Recipe(method="task_arithmetic"))
    for unit in merger.ahead(merger.steps):
        merger.merged(unit, Measured((1.0, 1.0)))
    assert len(copies.made) == 2 * len(SHAPES)


def test_what_goes_to_a_gpu(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """From files, and neither copies nor what is merged where it is read."""
    base, models = _opened(files)
    recipe = fm.Recipe(method="task_arithmetic")
    in_memory = Checkpoint.open(_state(files[0]))
    here = Merger(Inputs(base, models), recipe)
    monkeypatch.setattr(Merger, "_device", lambda self, name: torch.device("meta" if self is not here else "cpu"))
    there, of_memory = Merger(Inputs(base, models), recipe), Merger(Inputs(in_memory, models), recipe)
    copied = [unit for unit in there.units if unit.action == "copy"]
    assert len(copied) == 1
    for unit in there.units:
        assert [there._goes_to_gpu(unit, source) for source in (base, models[0])] == 2 * [unit not in copied]
        assert not there._goes_to_gpu(unit, in_memory)
        assert not here._goes_to_gpu(unit, base)
        assert not of_memory._goes_to_gpu(unit, models[0])  # adapters on it would read it
    most = 4 * NBYTES["e.weight"]
    assert there._memory_bytes() - of_memory._memory_bytes() == 2 * (2 * most + there.memory)


def test_small_tensors_are_not_worth_a_copy(files: list[Path], copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "LEAST_BYTES", NBYTES["a.weight"])
    merger = Merger(Inputs(*_opened(files)), fm.Recipe(method="task_arithmetic"))
    for unit in merger.ahead(merger.steps):
        merger.merged(unit, Measured((1.0, 1.0, 1.0)))
    assert {name for _, name in copies.made} == {"a.weight", "e.weight"}


def test_without_pinned_memory_tensors_are_taken_as_they_are(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensor: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(Tensor, "pin_memory", full)
    base = Checkpoint.open(files[0])
    assert torch.equal(pinned._pinned_copy(base, "a.weight"), base.read("a.weight"))


def test_what_is_merged_where_it_is_read_is_not_copied(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensor: Tensor) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(pinned, "_pinned_copy", refuse)
    merged(files, "ties")


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("freemerge-pin")]


def _state(file: Path) -> dict[str, Tensor]:
    opened = Checkpoint.open(file)
    return {name: opened.read(name) for name in opened.specs}


def _opened(files: list[Path]) -> tuple[Checkpoint, list[Checkpoint]]:
    base, *models = map(Checkpoint.open, files)
    return base, models
