"""Masks over the merged task vector: EMR-Merging's formula, bytes, and how models take them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from expert_models import (
    TASKS,
    Text,
    Vision,
    assert_forward_adds_what_active_does,
    assert_same,
    make,
    snapshot,
    tuned,
    untied,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import freemerge as fm
import freemerge.experts as fx
from freemerge.checkpoint.conversion import Piece
from freemerge.errors import ArgumentError, CheckpointError
from freemerge.evaluation import evaluate_experts
from freemerge.experts.payload import Reader
from freemerge.experts.placement import Part, gathered_dense, seen_by
from freemerge.experts.values.mask import Mask

SHAPES = {"a": (7, 5), "b": (13,), "c": (2, 3, 2, 2), "same": (3,)}
State = dict[str, Tensor]


def family(count: int = 3, dtype: torch.dtype = torch.float32) -> tuple[State, dict[str, State]]:
    generator = torch.Generator().manual_seed(4)
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    models = {
        f"t{i}": {
            n: (x + 0.1 * torch.randn(x.shape, generator=generator) * (n != "same")).to(dtype) for n, x in base.items()
        }
        for i in range(count)
    }
    return base, models


def flat(state: State) -> np.ndarray:
    return np.concatenate([tensor.double().numpy().ravel() for tensor in state.values()])


@pytest.mark.parametrize("method", ["emr", "average"])
def test_an_expert_makes_the_model_of_the_paper(method: str, tmp_path: Path) -> None:
    base, models = family()
    merged = fm.merge(base, list(models.values()), fm.Recipe(method=method))
    fx.save_experts(fx.iter_experts(base, models, backbone=merged, values="mask"), tmp_path / "experts")
    weights = {name: tensor.clone() for name, tensor in merged.items()}
    bank = fx.ExpertBank.load(weights, tmp_path / "experts", base=base)
    vector = flat(merged) - flat(base)
    for task, model in models.items():
        own = flat(model) - flat(base)
        if method == "emr":  # entry by entry, as in the paper
            for entry, column in zip(vector, np.stack([flat(m) - flat(base) for m in models.values()], 1), strict=True):
                sign = np.sign(column.sum())
                assert entry == pytest.approx(
                    sign * max([abs(v) for v in column if np.sign(v) == sign], default=0), abs=1e-6
                )
        masked = np.where(own * vector > 0, vector, 0)
        expected = flat(base) + np.abs(own).sum() / np.abs(masked).sum() * masked
        with bank.active(task):
            np.testing.assert_allclose(flat(weights), expected, rtol=0, atol=1e-6)
        assert all(torch.equal(weights[name], tensor) for name, tensor in merged.items())
        assert set(bank[task].tensors) == {"a", "b", "c"}, "where nothing is merged there is nothing to select"
        assert (tmp_path / "experts" / f"{task}.safetensors").stat().st_size < 600


@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=3), seed=st.integers(0, 9))
def test_masks_come_back_from_their_bytes(shape: list[int], seed: int) -> None:
    bits = torch.rand(int(np.prod(shape)), generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = Mask(tuple(shape), bits, torch.tensor([1.5]))
    raw = mask.to_bytes()
    assert raw.size == 4 + (len(bits) + 7) // 8
    again = Mask.from_bytes(tuple(shape), Reader(raw))
    assert torch.equal(again.kept, bits)
    assert again.scale.item() == 1.5
    for wrong in (raw[:-1], np.append(raw, np.uint8(0))):
        with pytest.raises(ValueError, match="bytes of values"):
            Mask.from_bytes(tuple(shape), Reader(wrong))


def test_hostile_bytes_are_refused() -> None:
    raw = Mask((3,), torch.ones(3, dtype=torch.bool), torch.tensor([1.0])).to_bytes()
    with pytest.raises(ValueError, match="stray bits"):
        Mask.from_bytes((3,), Reader(np.append(raw[:-1], np.uint8(15))))
    with pytest.raises(ValueError, match="non-finite"):
        Mask.from_bytes((3,), Reader(np.append(np.float32([np.inf]).view(np.uint8), np.uint8(7))))


def masks(kind: Callable[[], nn.Module], dtype: torch.dtype) -> tuple[nn.Module, dict[str, fx.Expert], State]:
    model, _, base = make(kind, dtype)
    base = untied({name: value.to(dtype) if value.is_floating_point() else value for name, value in base.items()})
    torch.manual_seed(0)
    origin = kind().eval()
    tasks = {task: untied(tuned(origin, i + 1)) for i, task in enumerate(TASKS[:3])}
    return model, fx.extract_experts(base, tasks, backbone=untied(model.state_dict()), values="mask"), base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", [Text, Vision])
def test_active_selects_and_undoes_it(kind: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    model, experts, base = masks(kind, dtype)
    bank = fx.ExpertBank(model, experts, base=base)
    before = snapshot(model)
    for chosen in ({"task0": 1.0}, {"task1": 0.5, "task2": 0.25}):
        with bank.active(chosen):
            for name in experts["task0"].tensors:
                vector = before[name].double() - base[name].double()
                expected = before[name].double()
                for task, weight in chosen.items():
                    mask = experts[task].tensors[name]
                    assert isinstance(mask, Mask)
                    factor = mask.scale.double() * mask.kept.view(vector.shape) - 1
                    expected = expected + weight * factor * vector
                error = {torch.float64: 1e-7, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
                torch.testing.assert_close(model.state_dict()[name].double(), expected, rtol=error, atol=error)
        assert_same(model, before)


def test_the_forward_pass_adds_what_active_does() -> None:
    model, experts, base = masks(Text, torch.float32)
    bank = fx.ExpertBank(model, experts, base=base)
    x = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(0))
    assert_forward_adds_what_active_does(model, bank, x, [{"task0": 1.0}, None, {"task1": 0.5, "task2": 0.5}])


def test_in_a_mixture_they_select_from_the_merged_model_alone() -> None:
    model, experts, base = masks(Text, torch.float32)
    _, entries, _ = make(Text)
    bank = fx.ExpertBank(model, {"mask": experts["task0"], "entries": entries["task1"]}, base=base)
    before, ids = snapshot(model), torch.arange(20).view(2, 10)
    vectors = {name: before[name] - base[name] for name in experts["task0"].tensors}
    added, kept = experts["task0"].dense(vectors), entries["task1"].dense()
    mixture = {"entries": 0.5, "mask": 1.0}
    with bank.active(mixture):
        for name, now in untied(model.state_dict()).items():
            expected = before[name] + added.get(name, 0) + 0.5 * kept.get(name, 0)
            torch.testing.assert_close(now, expected, rtol=1e-5, atol=1e-6)
    assert_same(model, before)
    assert_forward_adds_what_active_does(model, bank, ids, [mixture, "mask"])


def test_pieces_of_a_fused_tensor_are_selected_from_their_own() -> None:
    vector = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1))
    bits = torch.rand(4, 12, generator=torch.Generator().manual_seed(2)) < 0.5
    entries = {name: Mask((3, 4), own, torch.tensor([2.0])) for name, own in zip("abcd", bits, strict=True)}
    parts = [
        Part(n, Piece((3, 4), n, 0, (4, 1), "w", 24 * (i // 2) + 12 * (i % 2), (4, 1))) for i, n in enumerate("abcd")
    ]
    for laid in (vector, vector.mT.contiguous().mT):
        seen = {part.entry: seen_by(part, entries[part.entry], laid) for part in parts}
        gathered = gathered_dense(parts, entries, torch.zeros(2, 6, 4), seen)
        torch.testing.assert_close(gathered, (2.0 * bits.view(2, 6, 4) - 1) * vector)


def test_bad_arguments_are_named() -> None:
    base, models = family()
    merged = fm.merge(base, list(models.values()), fm.Recipe(method="emr"))
    experts = fx.extract_experts(base, models, backbone=merged, values="mask")
    with pytest.raises(ArgumentError, match="base must be given: 't0' is of values mask"):
        fx.ExpertBank(merged, experts)
    with pytest.raises(ArgumentError, match="vectors must be given"):
        experts["t0"].dense()
    vectors = {name: (merged[name] - base[name]).double() for name in base}
    assert all(added.dtype == torch.float32 for added in experts["t0"].dense(vectors).values())
    with pytest.raises(ArgumentError, match=r"vectors: 'a' has shape \(1, 5\), the expert's has \(7, 5\)"):
        experts["t0"].dense({**vectors, "a": vectors["a"][:1]})
    with pytest.raises(ArgumentError, match="backbone must be given for values mask: masks select from it"):
        fx.extract_experts(base, models, values="mask")
    with pytest.raises(ArgumentError, match="density is not for values mask"):
        fx.extract_experts(base, models, backbone=merged, values="mask", density=0.1)
    with pytest.raises(ArgumentError, match="rank is not for values mask"):
        fx.extract_experts(base, models, backbone=merged, values="mask", rank=1)
    bank = fx.ExpertBank(merged, experts, base=base)
    with pytest.raises(ArgumentError, match="single entries; 't0'"), bank.active("t0", combine="replace"):
        pass
    broken = {**merged, "a": merged["a"] * float("nan")}
    with pytest.raises(CheckpointError, match="'a' is not finite"):
        fx.extract_experts(base, models, backbone=broken, values="mask")


def test_they_are_scored_with_their_base() -> None:
    base, models = family()
    merged = fm.merge(base, list(models.values()), fm.Recipe(method="emr"))
    experts = fx.extract_experts(base, models, backbone=merged, values="mask")

    def score(weights: State) -> dict[str, float]:
        return {task: -float((weights["a"] - model["a"]).norm()) for task, model in models.items()}

    alone = score(merged)
    with_experts = evaluate_experts(merged, experts, score, base=base).scores
    assert all(with_experts[task] > alone[task] for task in models)
