"""Switching experts on a model: exact arithmetic, exact undo."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from expert_models import TASKS, Text, Vision, assert_same, make, snapshot, untied
from torch import nn

import freemerge.experts as fx
from freemerge.errors import ArgumentError, CheckpointError
from freemerge.experts.bank import Combine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", [Text, Vision])
def test_active_adds_mu_times_the_expert_and_undoes_it(kind: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    model, experts, _ = make(kind, dtype)
    bank = fx.ExpertBank(model, experts)
    before = snapshot(model)
    compute = torch.promote_types(dtype, torch.float32)
    for task, expert in experts.items():
        with bank.active(task):
            for name, value in untied(model.state_dict()).items():
                expected = before[name]
                if name in expert.tensors:
                    added = expert.tensors[name].dense().to(compute) * expert.mu
                    expected = (before[name].to(compute) + added).to(dtype)
                elif name in expert.statistics:
                    way = expert.statistics[name].to(compute) - before[name].to(compute)
                    expected = (before[name].to(compute) + 0.75 * way).to(dtype)
                torch.testing.assert_close(value, expected, rtol=0, atol=0)
        assert_same(model, before)


def test_thousand_switches_over_eight_experts_leave_every_weight_bit_identical() -> None:
    model, experts, base = make(Text, torch.bfloat16)
    bank = fx.ExpertBank(model, experts, base=untied(base))
    before = snapshot(model)
    picks = random.Random(0)
    for _ in range(1000):
        chosen = picks.sample(TASKS, picks.choice([1, 1, 1, 2, 3]))
        weights = {task: picks.uniform(-1, 1) for task in chosen}
        with bank.active(weights, combine=picks.choice(["add", "replace"])):
            pass
    assert_same(model, before)


def test_a_mixture_adds_the_weighted_experts_in_float32_and_rounds_once() -> None:
    model, experts, _ = make(Vision, torch.bfloat16)
    before = snapshot(model)
    weights = {"task1": 0.7, "task4": 0.2, "task2": 0.1, "task0": 0.0}
    with fx.ExpertBank(model, experts).active(weights):
        for name, value in model.state_dict().items():
            if not value.is_floating_point() or name in experts["task1"].statistics:
                continue
            total = torch.zeros(value.shape)
            for task, weight in weights.items():
                if name in experts[task].tensors:
                    factor = torch.tensor(weight * experts[task].mu, dtype=torch.float32)
                    total = total + experts[task].tensors[name].dense() * factor
            assert torch.equal(value, (before[name].float() + total).bfloat16()), name
    assert_same(model, before)


def test_replace_counts_from_the_base_where_an_expert_has_an_entry() -> None:
    model, experts, base = make(Text)
    before = snapshot(model)
    bank = fx.ExpertBank(model, experts, base=untied(base))
    for weights in ({"task3": 1.0}, {"task3": 0.5, "task5": 0.5}):
        with bank.active(weights, combine="replace"):
            for name, value in untied(model.state_dict()).items():
                touched = torch.zeros(value.shape, dtype=torch.bool)
                total = torch.zeros(value.shape)
                for task, weight in weights.items():
                    dense = experts[task].tensors[name].dense()
                    touched |= dense != 0
                    total += dense * (weight * experts[task].mu)
                expected = torch.where(touched, base[name] + total, before[name])
                torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
                assert torch.equal(value[~touched], before[name][~touched])
        assert_same(model, before)


def test_blocks_nest_and_survive_exceptions() -> None:
    model, experts, _ = make(Text)
    bank = fx.ExpertBank(model, experts)
    before = snapshot(model)
    with bank.active("task0"):
        outer = snapshot(model)
        with pytest.raises(RuntimeError, match="inside"), bank.active("task1"):
            raise RuntimeError("inside")
        assert_same(model, outer)
    assert_same(model, before)


def test_an_expert_within_itself_and_at_changing_weights() -> None:
    model, experts, base = make(Text)
    bank = fx.ExpertBank(model, experts, base=untied(base))
    before = snapshot(model)
    steps: list[tuple[float, Combine]] = [(1.0, "add"), (0.5, "add"), (1.0, "replace"), (1.0, "add"), (0.5, "replace")]
    for weight, combine in steps:
        fresh = fx.ExpertBank(model, experts, base=untied(base))
        with fresh.active({"task0": weight}, combine=combine), fresh.active({"task0": weight}, combine=combine):
            want = snapshot(model)
        with bank.active({"task0": weight}, combine=combine), bank.active({"task0": weight}, combine=combine):
            assert_same(model, want)
        assert_same(model, before)


def replace_parameter(model: nn.Module) -> None:
    up = model.get_submodule("up")
    up.register_parameter("weight", nn.Parameter(torch.randn(48, 24)))


def replace_module(model: nn.Module) -> None:
    model.register_module("down", nn.Linear(48, 24))


def replace_data(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter * 2


def transpose_memory(model: nn.Module) -> None:
    weight = model.get_parameter("up.weight")
    weight.data = weight.data.t().contiguous().t()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to(torch.float64),
        lambda model: model.load_state_dict(Text().state_dict()),
        replace_parameter,
        replace_module,
        replace_data,
        transpose_memory,
    ],
)
@pytest.mark.parametrize("combine", ["add", "replace"])
def test_the_model_may_change_between_switches(change: Callable[[nn.Module], object], combine: Combine) -> None:
    model, experts, base = make(Text)
    bank = fx.ExpertBank(model, experts, base=untied(base))
    with bank.active("task0", combine=combine):
        pass
    change(model)
    before = snapshot(model)
    with fx.ExpertBank(model, experts, base=untied(base)).active("task0", combine=combine):
        want = snapshot(model)
    for _ in range(2):
        with bank.active("task0", combine=combine):
            assert_same(model, want)
        assert_same(model, before)
    assert not all(torch.equal(want[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model.down.weight, "data", torch.ones(3)), r"'down\.weight' has shape \(3,\) now"),
        (lambda model: setattr(model, "up", nn.Linear(12, 48)), r"'up\.weight' has shape \(48, 12\) now"),
        (lambda model: setattr(model, "positions", nn.Embedding(20, 24)), r"the bank was attached to \(12, 24\)"),
        (lambda model: delattr(model.up, "weight"), r"'up\.weight', which the bank was attached to, is gone"),
        (lambda model: setattr(model, "up", None), r"'up\.\w+', which the bank was attached to, is gone"),
    ],
)
@pytest.mark.parametrize("low_rank", [False, True])
def test_a_parameter_that_no_longer_fits_is_refused(
    change: Callable[[nn.Module], object], message: str, low_rank: bool
) -> None:
    model, experts, base = make(Text)
    if low_rank:
        base = untied(base)
        tasks = {"task0": {name: tensor + 1 for name, tensor in base.items()}}
        experts = fx.extract_experts(base, tasks, backbone=base, rank=1)
    bank = fx.ExpertBank(model, experts)
    with bank.active("task0"):
        pass
    change(model)
    before = snapshot(model)
    with pytest.raises(ArgumentError, match=message):
        bank.active("task0").__enter__()
    with pytest.raises(ArgumentError, match=r"'(up|down|positions)\.\w+'"):
        bank.deltas(["task0"]).__enter__()
    assert_same(model, before)


def test_a_tensor_that_is_gone_from_a_state_dict_is_named() -> None:
    model, experts, _ = make(Text)
    state = snapshot(model)
    bank = fx.ExpertBank(state, experts)
    del state["up.bias"]
    with pytest.raises(ArgumentError, match=r"'up\.bias', which the bank was attached to, is gone"):
        bank.active("task0").__enter__()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_traced_model_is_switched() -> None:
    model, experts, _ = make(Text)
    x = torch.arange(20).view(2, 10)
    traced = torch.jit.trace(model, x)
    with torch.no_grad():
        backbone = model(x)
        with fx.ExpertBank(model, experts).active("task1"):
            expected = model(x)
        with fx.ExpertBank(traced, experts).active("task1"):
            torch.testing.assert_close(traced(x), expected)
        torch.testing.assert_close(traced(x), backbone)


def test_weights_that_overlap_themselves_are_refused() -> None:
    """Their entries change more than once, and what is put back is not what was there."""
    experts = fx.extract_experts({"w": torch.zeros(2, 3)}, {"t": {"w": torch.ones(2, 3)}})
    with pytest.raises(ArgumentError, match="'w' of the model may overlap itself"):
        fx.ExpertBank({"w": torch.zeros(4).as_strided((2, 3), (1, 1))}, experts)


def test_weights_that_overlap_others_are_refused() -> None:
    """A fused tensor and a view of a part of it: what they have in common would change twice."""
    fused = torch.zeros(6, 3)
    views = {"k": fused[2:4], "qkv": fused, "v": fused[4:]}
    models = {"t": {name: value + 1 for name, value in views.items()}}
    with pytest.raises(ArgumentError, match="'k' and 'qkv', which share memory"):
        fx.ExpertBank(views, fx.extract_experts(views, models))
    apart = {name: views[name] for name in "kv"}
    fx.ExpertBank(apart, fx.extract_experts(apart, {"t": {name: models["t"][name] for name in apart}}))


def test_channels_last_weights_and_state_dicts() -> None:
    model, experts, _ = make(Vision)
    reference = snapshot(model)
    with fx.ExpertBank(model, experts).active("task2"):
        expected = snapshot(model)
    state = {name: value.clone() for name, value in reference.items()}
    with fx.ExpertBank(state, experts).active("task2"):
        for name, value in state.items():
            assert torch.equal(value, expected[name])
    model.to(memory_format=torch.channels_last)
    with fx.ExpertBank(model, experts).active("task2"):
        assert_same(model, expected)
    assert_same(model, reference)


def test_a_backward_pass_through_switched_weights_is_an_error() -> None:
    model, experts, _ = make(Text)
    with fx.ExpertBank(model, experts).active("task0"):
        loss = model(torch.arange(10)[None]).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_experts_are_on_under_autocast() -> None:
    model, experts, _ = make(Text)
    bank = fx.ExpertBank(model, experts)
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad(), bank.active("task0"), torch.autocast("cpu", torch.bfloat16):
        expected = model(ids)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # keeps copies of the weights
        backbone = model(ids)
        with bank.active("task0"):
            assert torch.equal(model(ids), expected)
        assert torch.equal(model(ids), backbone)
    assert not torch.equal(backbone, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank))])
def test_a_copy_has_a_model_of_its_own(copied: Callable[[fx.ExpertBank], fx.ExpertBank]) -> None:
    model, experts, base = make(Text)
    before = snapshot(model)
    whole = {"model": model, "bank": fx.ExpertBank(model, experts, base=untied(base))}
    with whole["bank"].active("task1", combine="replace"):
        expected = snapshot(model)
    other = copied(whole)
    with other["bank"].active("task1", combine="replace"):
        assert_same(other["model"], expected)
        assert_same(model, before)
    assert_same(other["model"], before)


def test_load_takes_every_file_of_a_folder(tmp_path: Path) -> None:
    model, experts, _ = make(Vision)
    for task, expert in experts.items():
        expert.save(tmp_path / f"{task}.safetensors")
    bank = fx.ExpertBank.load(model, tmp_path)
    assert list(bank) == TASKS
    assert len(bank) == 8
    assert bank["task1"].mu == experts["task1"].mu
    with fx.ExpertBank(model, experts).active("task5"):
        expected = snapshot(model)
    with bank.active("task5"):
        assert_same(model, expected)
    with pytest.raises(CheckpointError, match="holds no expert files"):
        fx.ExpertBank.load(model, tmp_path / "nothing")


def test_misfits_are_named() -> None:
    model, experts, base = make(Text)
    with pytest.raises(ArgumentError, match="no expert 'poetry'"):
        fx.ExpertBank(model, experts).active("poetry").__enter__()
    with pytest.raises(ArgumentError, match="weight of 'task0' must be a finite number"):
        fx.ExpertBank(model, experts).active({"task0": float("nan")}).__enter__()
    with pytest.raises(ArgumentError, match="needs the base"):
        fx.ExpertBank(model, experts).active("task0", combine="replace").__enter__()
    with pytest.raises(ArgumentError, match="combine must be"):
        fx.ExpertBank(model, experts).active("task0", combine="multiply").__enter__()  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="which the model lacks"):
        fx.ExpertBank(nn.Linear(3, 3), experts)
    computed = Text()
    nn.utils.parametrizations.weight_norm(computed.up)
    with pytest.raises(ArgumentError, match=r"'up\.weight', which the model lacks"):
        fx.ExpertBank(computed, experts)
    narrow = Text()
    narrow.up = nn.Linear(24, 47)
    with pytest.raises(ArgumentError, match=r"'up\.bias' of 'task0' has shape \(48,\)"):
        fx.ExpertBank(narrow, experts)
    with pytest.raises(CheckpointError, match=r"'down\.bias' is missing"):
        fx.ExpertBank(model, experts, base={"up.weight": base["up.weight"]})
    clone = {**base, "head.weight": base["tokens.weight"].clone()}
    both = fx.extract_experts(clone, {"t": {name: value + 1 for name, value in clone.items()}})
    with pytest.raises(ArgumentError, match=r"'head\.weight' and 'tokens\.weight', which share memory"):
        fx.ExpertBank(model, both)
