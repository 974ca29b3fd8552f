"""Running statistics of experts: what is kept, how models take it and give it back, files and budgets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import TASKS, Vision, assert_forward_adds_what_active_does, assert_same, make, snapshot, tuned
from safetensors.torch import save_file
from torch import Tensor, nn

import freemerge as fm
import freemerge.experts as fx
from freemerge.errors import ArgumentError, CheckpointError

State = dict[str, Tensor]
STATISTICS = ["1.running_mean", "1.running_var"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "entries": ("fr", {"density": 0.1}),
    "released mu": ("fr", {"density": 0.1, "rescale": "released"}),
    "signs": ("fr", {"density": 0.1, "values": "sign"}),
    "low rank": ("fr", {"budget": 0.9}),
    "a rank": ("fr", {"rank": 2}),
    "masks": ("emr", {"values": "mask"}),
    "gains": ("jsv", {"values": "gains"}),
    "gains and low rank": ("jsv", {"values": "gains", "budget": 0.9}),
}


def merged_vision(method: str = "fr") -> tuple[nn.Module, State, dict[str, State], State]:
    """A module with merged weights, the base, three tasks' models, the merged model."""
    torch.manual_seed(0)
    model = Vision().eval()
    base = snapshot(model)
    models = {task: tuned(model, i + 1) for i, task in enumerate(TASKS[:3])}
    merged = fm.merge(base, list(models.values()), fm.Recipe(method=method, scale=1.0))
    model.load_state_dict(merged)
    return model, base, models, merged


def extracted(base: State, models: Mapping[str, State], merged: State, **options: Any) -> dict[str, fx.Expert]:
    needed = {"budget", "rank"} & set(options) or options.get("values") in ("mask", "gains")
    return fx.extract_experts(base, models, backbone=merged if needed else None, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_computes_with_the_statistics_of_the_task(kind: str, tmp_path: Path) -> None:
    method, options = KINDS[kind]
    model, base, models, merged = merged_vision(method)
    experts = extracted(base, models, merged, **options)
    fx.save_experts(experts.items(), tmp_path / "experts")
    bank = fx.ExpertBank.load(model, tmp_path / "experts", base=base)
    share = 0.75 if "density" in options else 1.0
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    before, other = snapshot(model), Vision().eval()
    for task, expert in experts.items():
        assert list(expert.statistics) == STATISTICS
        kept = sum(tensor.entries for tensor in expert.tensors.values())
        assert (expert.entries, expert.share) == (kept + 16, share)
        added = expert.dense({name: merged[name] - base[name] for name in expert.tensors})
        hand_made = {name: tensor + added.get(name, 0) for name, tensor in merged.items()}
        for name in STATISTICS:
            hand_made[name] = (1 - share) * merged[name] + share * models[task][name].bfloat16().float()
        other.load_state_dict(hand_made)
        with torch.no_grad(), bank.active(task):
            torch.testing.assert_close(model(x), other(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(model.state_dict()["1.running_var"], hand_made["1.running_var"])
            assert model.state_dict()["1.num_batches_tracked"] == base["1.num_batches_tracked"]
        assert_same(model, before)


def test_several_experts_average_them_and_a_variance_stays_one() -> None:
    model, base, models, merged = merged_vision()
    experts = extracted(base, models, merged, rank=1)
    bank, before = fx.ExpertBank(model, experts), snapshot(model)
    for weights, shares in (
        ({"task0": 0.25, "task1": 0.5}, (0.25, 0.5)),
        ({"task0": 3.0, "task1": 1.0}, (0.75, 0.25)),
        ({"task0": -2.0, "task1": 0.5}, (0.0, 0.5)),
    ):
        with bank.active(weights):
            for name in STATISTICS:
                own = [experts[task].statistics[name].float() for task in weights]
                expected = (1 - sum(shares)) * before[name] + shares[0] * own[0] + shares[1] * own[1]
                torch.testing.assert_close(model.state_dict()[name], expected)
                assert "mean" in name or float(model.state_dict()[name].min()) >= 0
        assert_same(model, before)


def test_the_forward_pass_normalises_each_sample_by_its_own() -> None:
    model, base, models, merged = merged_vision()
    experts = extracted(base, models, merged, rank=1)
    bank, before = fx.ExpertBank(model, experts), snapshot(model)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    chosen = [{"task0": 1.0}, None, {"task1": 0.5, "task2": 0.25}, {"task2": 1.0}]
    assert_forward_adds_what_active_does(model, bank, x, chosen)
    assert_same(model, before)
    with torch.no_grad():
        alone = model(x)
        with bank.deltas(["task0"] * 4):
            assert not torch.allclose(model(x), alone, atol=1e-2)
        torch.testing.assert_close(model(x), alone, rtol=0, atol=0)
    model.train()
    assert "mixes the samples" in str(bank.serves_deltas())


def test_a_budget_holds_them(tmp_path: Path) -> None:
    class Wide(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(32, 200), nn.BatchNorm1d(200), nn.Linear(200, 64))

    base = snapshot(Wide())
    models = {task: tuned(Wide(), i + 1) for i, task in enumerate(TASKS[:2])}
    merged = fm.merge(base, list(models.values()), fm.Recipe(method="jsv"))
    nbytes = 2 * sum(tensor.numel() for name, tensor in base.items() if "running" not in name and tensor.ndim)
    for values, shares in (("svd2", (0.06, 0.1, 0.2)), ("gains", (0.08, 0.1, 0.2))):
        for share in shares:
            expert = extracted(base, models, merged, values=values, budget=share)["task0"]
            assert len(expert.statistics) == 2
            assert 0.8 * share * nbytes < expert.save(tmp_path / f"{values}{share}.safetensors") <= share * nbytes
        with pytest.raises(ArgumentError, match=r"budget: .* bytes are less than"):
            extracted(base, models, merged, values=values, budget=0.02)


def test_files_keep_them_bit_for_bit_and_old_ones_have_none(tmp_path: Path) -> None:
    model, experts, _ = make(Vision)
    expert = experts["task0"]
    expert.save(tmp_path / "new.safetensors")
    again = fx.Expert.load(tmp_path / "new.safetensors")
    assert all(torch.equal(again.statistics[name], values) for name, values in expert.statistics.items())
    assert sorted(again.tensors) == sorted(expert.tensors)
    old = fx.Expert(expert.tensors, expert.mu, expert.density, expert.scope, expert.rescale, expert.values)
    assert old.save(tmp_path / "old.safetensors") < (tmp_path / "new.safetensors").stat().st_size
    before = snapshot(model)
    with fx.ExpertBank(model, {"old": fx.Expert.load(tmp_path / "old.safetensors")}).active("old"):
        assert all(torch.equal(model.state_dict()[name], before[name]) for name in STATISTICS)


@pytest.mark.parametrize(
    "wrong", [torch.full((8,), float("inf"), dtype=torch.bfloat16), torch.ones(8), torch.ones(2, 4).bfloat16()]
)
def test_what_is_no_statistic_is_neither_written_nor_read(wrong: Tensor, tmp_path: Path) -> None:
    expert = fx.Expert({}, 1.0, 0.1, "tensor", "auto", "bf16", None, {"1.running_var": wrong})
    with pytest.raises(ArgumentError, match=r"statistics: '1\.running_var' .* a finite vector of bfloat16"):
        expert.save(tmp_path / "expert.safetensors")
    assert not list(tmp_path.iterdir())
    save_file(expert.statistics, tmp_path / "wrong", metadata={"format": "freemerge-expert", **expert.metadata})
    with pytest.raises(CheckpointError, match=r"'1\.running_var' is corrupted: .* a finite vector of bfloat16"):
        fx.Expert.load(tmp_path / "wrong")


def test_only_those_of_norms_are_kept_and_rules_leave_them_out() -> None:
    _, base, models, _ = merged_vision()
    more = {"ema.shadow": torch.ones(4), "codes.cluster_size": torch.ones(4)}
    experts = fx.extract_experts({**base, **more}, {"t": {**models["task0"], **more}})
    assert list(experts["t"].statistics) == STATISTICS
    lacking = {name: tensor for name, tensor in models["task0"].items() if name not in STATISTICS}
    with pytest.raises(CheckpointError, match=r"1\.running_mean"):
        fx.extract_experts(base, {"t": lacking})
    experts = fx.extract_experts(base, {"t": lacking}, select=[("*running*", "copy")])
    assert not experts["t"].statistics


def test_what_cannot_be_is_refused_by_name() -> None:
    model, base, models, _ = merged_vision()
    expert = fx.extract_experts(base, {"t": models["task0"]})["t"]
    negative = {**models["task0"], "1.running_var": -models["task0"]["1.running_var"]}
    with pytest.raises(CheckpointError, match=r"'1\.running_var' is a variance and holds a negative number"):
        fx.extract_experts(base, {"t": negative})
    for name in ("1.running_mean", "9.running_mean"):
        wrong = fx.Expert({}, 1.0, None, None, "number", "svd2", None, {name: torch.ones(3, dtype=torch.bfloat16)})
        with pytest.raises(ArgumentError, match=rf"'{name}'"):
            fx.ExpertBank(model, {"t": wrong})
    bare = nn.Sequential(*list(model)[:1], nn.BatchNorm2d(8, track_running_stats=False), *list(model)[2:])
    with pytest.raises(ArgumentError, match=r"'1\.running_mean', which the model lacks"):
        fx.ExpertBank(bare, {"t": expert})
