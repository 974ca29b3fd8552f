"""Merging into a module that is there already."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import freemerge as fm


class Tied(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6, dtype=dtype)
        self.norm = nn.BatchNorm1d(6, dtype=dtype)
        self.head = nn.Linear(6, 12, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight


def tuned(model: nn.Module, seed: int) -> Tied:
    generator, copy = torch.Generator().manual_seed(seed), Tied()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_receives_the_merge(dtype: torch.dtype) -> None:
    base, target = Tied(), Tied(dtype)
    models = [tuned(base, 1), tuned(base, 2)]
    expected = fm.merge(base, models)
    parameters = {name: (id(p), p.data_ptr()) for name, p in target.named_parameters()}
    fm.merge(base, models, into=target)
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    assert {name: (id(p), p.data_ptr()) for name, p in target.named_parameters()} == parameters
    assert target.head.weight is target.embed.weight
    assert all(p.requires_grad for p in target.parameters())


def test_it_may_be_the_base_or_a_model() -> None:
    base = Tied()
    models = [tuned(base, 1), tuned(base, 2)]
    expected = fm.merge(base, models)
    fm.merge(base, models, into=models[1])
    assert torch.equal(models[1].embed.weight, expected["embed.weight"])


def test_names_of_tied_tensors_may_be_left_out() -> None:
    base, target = Tied(), Tied()
    model = tuned(base, 1)

    def stored(module: nn.Module) -> dict[str, torch.Tensor]:
        return {name: t for name, t in module.state_dict().items() if name != "head.weight"}

    expected = fm.merge(stored(base), [stored(model)], into=target)
    assert torch.equal(target.head.weight, expected["embed.weight"])


def test_what_does_not_fit_changes_nothing() -> None:
    base = nn.Linear(4, 3)
    model = {name: tensor + 1 for name, tensor in base.state_dict().items()}
    for target, message in (
        (nn.Linear(4, 5), r"'bias' \(3,\), the module has shape \(5,\)"),
        (nn.Linear(4, 3, bias=False), "the module lacks it"),
        (nn.Sequential(nn.Linear(4, 3)), "the module lacks it"),
    ):
        before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
        with pytest.raises(fm.CheckpointError, match=message):
            fm.merge(base, [model], into=target)
        assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    target = nn.Linear(4, 3)
    before = target.weight.detach().clone()
    with pytest.raises(fm.CheckpointError, match="lacks"):
        fm.merge({"weight": base.weight}, [{"weight": model["weight"]}], into=target)
    with pytest.raises(fm.CheckpointError):
        fm.merge(base, [{**model, "weight": model["weight"] * float("nan")}], into=target)
    assert torch.equal(target.weight, before)
    with pytest.raises(fm.CheckpointError, match="into: tensor 'weight' must be a dense tensor"):
        fm.merge(base, [model], into=nn.Linear(4, 3, device="meta"))


def test_a_head_of_its_own_does_not_replace_the_embeddings_of_a_module_that_ties_them() -> None:
    base, target = Tied(), Tied()
    model = {name: tensor.clone() for name, tensor in tuned(base, 1).state_dict().items()}
    model["head.weight"] += 1
    before = target.embed.weight.detach().clone()
    with pytest.raises(fm.CheckpointError, match=r"the module ties 'head\.weight' to 'embed\.weight'"):
        fm.merge(base, [model], into=target)
    assert torch.equal(target.embed.weight, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e5m2])
def test_what_a_module_cannot_hold_is_not_written(dtype: torch.dtype) -> None:
    target = nn.Linear(2, 2, bias=False).to(dtype)
    before = target.weight.detach().clone().float()
    with pytest.raises(fm.CheckpointError, match=f"'weight' does not fit into {dtype}"):
        fm.merge({"weight": torch.full((2, 2), 1e5)}, [{"weight": torch.full((2, 2), 2e5)}], into=target)
    assert torch.equal(target.weight.float(), before)
    merged = fm.merge({"weight": torch.ones(2, 2)}, [{"weight": torch.full((2, 2), 2.0)}], into=target)
    assert torch.equal(target.weight.float(), merged["weight"].to(dtype).float())


@pytest.mark.parametrize(
    ("value", "dtype", "held"),
    [
        (0.5, torch.float32, torch.int64),
        (2**24 + 1, torch.int64, torch.float32),
        (300, torch.int64, torch.uint8),
    ],
)
def test_integers_are_not_rounded_nor_cut(value: float, dtype: torch.dtype, held: torch.dtype) -> None:
    target = nn.Linear(2, 2, bias=False)
    target.register_buffer("x", torch.zeros(2, dtype=held))
    state = {"weight": torch.ones(2, 2), "x": torch.tensor([1, value], dtype=dtype)}
    with pytest.raises(fm.CheckpointError, match=f"'x' does not fit into {held}"):
        fm.merge(state, [state], into=target)
    assert not target.x.any()
    state["x"] = torch.tensor([1, 7], dtype=dtype)
    fm.merge(state, [state], into=target)
    assert target.x.tolist() == [1, 7]


def test_what_a_module_keeps_beside_tensors_is_left_alone() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"amax": 3}

    base, target = Extra(2, 2), Extra(2, 2)
    fm.merge(base, [base], into=target)
    assert torch.equal(target.weight, base.weight)


def test_tensors_of_inference_mode_are_written_and_those_that_overlap_are_not() -> None:
    base, models = {"weight": torch.zeros(2, 2)}, [{"weight": torch.ones(2, 2)}]
    with torch.inference_mode():
        target = nn.Linear(2, 2, bias=False)
    expected = fm.merge(base, models, into=target)
    assert torch.equal(target.weight, expected["weight"])
    target = nn.Linear(2, 2, bias=False)
    target.weight = nn.Parameter(torch.zeros(1).expand(2, 2))
    with pytest.raises(fm.CheckpointError, match="into: tensor 'weight' may overlap itself"):
        fm.merge(base, models, into=target)
