"""Mappings that make their tensors when they are asked for: no more than a few are alive at once."""

from __future__ import annotations

import weakref
from collections import UserDict
from collections.abc import Iterator, Mapping
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import freemerge as fm
from freemerge.checkpoint import Checkpoint

SHAPE = (32, 48)
NAMES = [f"layers.{i:02}.weight" for i in range(12)]


class Made(Mapping[str, Tensor]):
    """Makes each tensor anew, and counts those that are alive."""

    alive: ClassVar[weakref.WeakSet[torch.UntypedStorage]] = weakref.WeakSet()
    most = 0

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __getitem__(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(NAMES.index(name))
        tensor = torch.randn(SHAPE, generator=generator)
        tensor += 0.1 * torch.randn(SHAPE, generator=generator.manual_seed(100 * self.seed + NAMES.index(name)))
        Made.alive.add(tensor.untyped_storage())
        Made.most = max(Made.most, len(Made.alive))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


def test_it_is_read_a_few_tensors_at_a_time() -> None:
    base, models = Made(0), [Made(1), Made(2)]
    expected = fm.merge(dict(base), [dict(model) for model in models])
    Made.most = len(Made.alive)
    assert Made.most == 0
    merged = fm.merge(base, models)
    assert Made.most <= 4  # one of each, and the one that is about to be read
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    Made.most = 0
    fm.inspect(base, models)
    assert Made.most <= 4
    experts = fm.extract_experts(base, {"task": models[0]})
    assert experts["task"].tensors.keys() == set(NAMES)
    assert Made.most <= 4


def test_ties_of_tensors_that_it_holds_are_found() -> None:
    weight = torch.randn(6, 4)
    held = UserDict({"embed.weight": weight, "head.weight": weight, "other.weight": torch.randn(6, 4)})
    model = {name: tensor + 1 for name, tensor in held.items()}
    merged = fm.merge(held, [{**model, "head.weight": model["embed.weight"]}])
    assert merged["head.weight"] is merged["embed.weight"]
    assert merged["other.weight"] is not merged["embed.weight"]


def test_tensors_made_anew_are_not_taken_for_tied() -> None:
    """Their memory is reused, so that addresses say nothing."""
    merged = fm.merge(Made(0), [Made(1)])
    assert len({tensor.data_ptr() for tensor in merged.values()}) == len(NAMES)


def test_a_mapping_that_changes_its_mind_is_found_out() -> None:
    class Fickle(UserDict[str, Tensor]):
        reads = 0

        def __getitem__(self, name: str) -> Tensor:
            Fickle.reads += 1
            return torch.zeros(2, 2 if Fickle.reads < 4 else 3)

    with pytest.raises(fm.CheckpointError, match="'w' has changed"):
        fm.merge(Fickle({"w": torch.zeros(2, 2)}), [{"w": torch.ones(2, 2)}])


def test_foreign_entries_are_named() -> None:
    with pytest.raises(fm.CheckpointError, match="not a state dict"):
        fm.merge(UserDict({"w": torch.zeros(2), 3: torch.zeros(2)}), [{"w": torch.zeros(2)}])
    with pytest.raises(fm.CheckpointError, match="'v' is a int"):
        fm.merge(UserDict({"w": torch.zeros(2), "v": 3}), [{"w": torch.zeros(2)}])


def test_what_is_no_weight_is_left_out_and_told() -> None:
    weights = {"layer.weight": torch.ones(4, 4), "layer.bias": torch.ones(4)}
    extra = UserDict({**weights, "layer._extra_state": None})
    averaged = UserDict({"n_averaged": torch.tensor(3), **{f"module.{name}": t for name, t in weights.items()}})
    for held, name in ((extra, "layer._extra_state"), (averaged, "n_averaged")):
        with Checkpoint.open(held) as opened:
            assert len(opened.specs) == 2
            assert f"{name} is no weight and left out" in opened.set_aside[0]
            assert all(torch.equal(opened.read(name), held[name]) for name in opened.specs)
    own = UserDict({**weights, "n_averaged": torch.ones(4, 4)})  # of a model that no wrapper is around
    with Checkpoint.open(own) as opened:
        assert opened.read("n_averaged").shape == (4, 4)
