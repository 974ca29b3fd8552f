"""Running statistics are averaged, never extrapolated: a variance stays one, whatever the method and its scale."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import freemerge as fm
from freemerge.merging.statistics_buffers import convex, is_statistic
from freemerge.methods import METHODS

STATISTICS = [
    *("1.running_mean", "1.running_var", "running_var", "bn.num_batches_tracked", "a.b.running_std"),
    *("bn.moving_mean", "bn.moving_variance", "codebook.cluster_size", "codebook.embed_avg", "model_ema.decay"),
    *("ema.layer.weight", "layers.0.ema_weight", "norm.ema.shadow", "obs_rms.var", "normalizer.variance"),
    *("quantizer._amax", "observer.min_val", "observer.max_val", "vq._ema_cluster_size", "vq._ema_w"),
]
WEIGHTS = ["running.weight", "layer.weight", "schema.weight", "lemma", "norm.bias", "embed_tokens.weight", "variance"]


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_by_name(name: str) -> None:
    assert is_statistic(name)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_by_name(name: str) -> None:
    assert not is_statistic(name)


@given(weights=st.lists(st.floats(-3, 3), min_size=1, max_size=6), scale=st.floats(0, 9))
def test_weights_of_an_average(weights: list[float], scale: float) -> None:
    averaging, factor = convex(weights, scale)
    shares = [factor * weight for weight in averaging]
    assert all(share >= 0 for share in shares)
    assert sum(shares) <= 1 + 1e-9
    if min(weights) >= 0 and scale * sum(weights) <= 1:
        assert (averaging, factor) == (weights, scale)


def network(kind: Any = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(0)
    options = {"track_running_stats": True} if "Instance" in kind.__name__ else {}
    network = nn.Sequential(nn.Conv2d(3, 8, 3), kind(8, affine=True, **options))
    network[1].running_mean.normal_()
    network[1].running_var.uniform_(0.5, 2)
    return network.eval()


def tuned(base: nn.Module, count: int, seed: int = 1) -> list[nn.Module]:
    generator = torch.Generator().manual_seed(seed)
    models = []
    for _ in range(count):
        model = copy.deepcopy(base)
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(0.2 + torch.rand(tensor.shape, generator=generator))
            else:
                tensor += 100
        models.append(model)
    return models


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d])
@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("source", ["modules", "state dicts"])
def test_every_method_keeps_them_within_the_inputs(kind: Any, method: str, source: str) -> None:
    base = network(kind)
    models = tuned(base, 5)
    for scale in ("auto", 0.3, 7.0):
        recipe = fm.Recipe(method=method, scale=scale)
        inputs: list[Any] = [model if source == "modules" else model.state_dict() for model in (base, *models)]
        merged = fm.merge(inputs[0], inputs[1:], recipe)
        for name in ("1.running_mean", "1.running_var"):
            values = torch.stack([model.state_dict()[name] for model in (base, *models)])
            assert (merged[name] >= values.min(0).values - 1e-6).all()
            assert (merged[name] <= values.max(0).values + 1e-6).all()
        assert torch.equal(merged["1.num_batches_tracked"], base.state_dict()["1.num_batches_tracked"])
        network_ = copy.deepcopy(base)
        network_.load_state_dict(merged)
        assert network_(torch.randn(2, 3, 8, 8)).isfinite().all()


def test_beyond_one_they_are_the_mean_of_the_models() -> None:
    base = network()
    models = tuned(base, 4)
    merged = fm.merge(base, models, fm.Recipe(weights="uniform", scale=6.0))
    expected = torch.stack([model.state_dict()["1.running_var"] for model in models]).mean(0)
    torch.testing.assert_close(merged["1.running_var"], expected)
    weighted = fm.merge(base, models[:2], fm.Recipe(weights=(3.0, 1.0), scale=1.0))
    pair = [model.state_dict()["1.running_mean"] for model in models[:2]]
    torch.testing.assert_close(weighted["1.running_mean"], 0.75 * pair[0] + 0.25 * pair[1])
    negative = fm.merge(base, models[:2], fm.Recipe(weights=(-1.0, 0.5), scale=1.0))
    torch.testing.assert_close(negative["1.running_mean"], 0.5 * (base.state_dict()["1.running_mean"] + pair[1]))


def test_within_the_inputs_they_merge_as_other_vectors_do() -> None:
    base = network()
    models = tuned(base, 3)
    renamed = [
        {
            name.replace("running_", "learned_"): tensor
            for name, tensor in model.state_dict().items()
            if "num" not in name
        }
        for model in (base, *models)
    ]
    recipe = fm.Recipe(weights="uniform", scale=0.9)
    merged, others = fm.merge(base, models, recipe), fm.merge(renamed[0], renamed[1:], recipe)
    for name in ("running_mean", "running_var"):
        assert torch.equal(merged[f"1.{name}"], others[f"1.{name.replace('running_', 'learned_')}"])


@pytest.mark.parametrize("scale", ["auto", "interference"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_they_decide_nothing_about_weights(method: str, scale: Any) -> None:
    base = network()
    models = tuned(base, 3)
    recipe = fm.Recipe(method=method, scale=scale)
    merged = fm.merge(base, models, recipe)
    models[1].state_dict()["1.running_var"].mul_(1e6)
    shifted = fm.merge(base, models, recipe)
    changed = [name for name, tensor in merged.items() if not torch.equal(tensor, shifted[name])]
    assert changed == ["1.running_var"]
    without = [
        {name: t for name, t in model.state_dict().items() if "running" not in name} for model in (base, *models)
    ]
    assert fm.inspect(base, models, recipe).measured_bytes == fm.inspect(without[0], without[1:], recipe).measured_bytes
    only = [{name: t for name, t in model.state_dict().items() if "running" in name} for model in (base, *models)]
    assert torch.equal(fm.merge(only[0], only[1:], recipe)["1.running_var"].isfinite().all(), torch.tensor(True))


def test_rules_can_copy_and_drop_them_but_not_extrapolate() -> None:
    base = network()
    models = tuned(base, 4)
    every: list[Any] = ["merge", "filter", "average"]
    for action in every:
        merged = fm.merge(base, models, fm.Recipe(scale=9.0, select=[("*running_var", action)]))
        assert (merged["1.running_var"] > 0).all()
    copied = fm.merge(base, models, fm.Recipe(scale=9.0, select=[("*running_*", "copy")]))
    assert torch.equal(copied["1.running_var"], base.state_dict()["1.running_var"])
    dropped = fm.merge(base, models, fm.Recipe(select=[("*num_batches_tracked", "drop")]))
    assert "1.num_batches_tracked" not in dropped


def test_a_negative_variance_is_refused_and_its_source_named() -> None:
    base = network()
    models = tuned(base, 2)
    models[1].state_dict()["1.running_var"][3] = -50.0
    with pytest.raises(fm.CheckpointError, match=r"^models\[1\] \(in-memory Sequential\): .*1\.running_var.* negative"):
        fm.merge(base, models)


class WithBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("scales", torch.rand(20, 20) + 0.1)
        self.register_buffer("steps", torch.tensor(3))


def test_buffers_of_modules_stay_positive_under_any_name() -> None:
    base = WithBuffers()
    models = [copy.deepcopy(base) for _ in range(6)]
    for model in models:
        model.scales.mul_(0.1)  # type: ignore[operator]
    merged = fm.merge(base, models)
    torch.testing.assert_close(merged["scales"], 0.1 * base.scales)  # type: ignore[operator]
    inspection = fm.inspect(base, models)
    actions = {decision.name: decision.action for decision in inspection.decisions}
    assert actions == {"layer.bias": "merge", "layer.weight": "filter", "scales": "average", "steps": "copy"}


def test_any_tensor_can_be_averaged_by_a_rule() -> None:
    base = {"gate": torch.ones(4), "other": torch.ones(4)}
    models = [{name: tensor * factor for name, tensor in base.items()} for factor in (3.0, 5.0)]
    merged = fm.merge(base, models, fm.Recipe(scale=4.0, weights="uniform", select=[("gate", "average")]))
    assert torch.equal(merged["gate"], torch.full((4,), 4.0))
    assert torch.equal(merged["other"], torch.full((4,), 13.0))


def test_experts_leave_them_alone() -> None:
    base = network()
    experts = fm.extract_experts(base, tuned(base, 2), density=0.5)
    for expert in experts.values():
        assert not any("running" in name for name in expert.tensors)
    with_buffers, model = WithBuffers(), WithBuffers()
    assert set(fm.extract_experts(with_buffers, {"a": model}, density=0.5)["a"].tensors) == {
        "layer.weight",
        "layer.bias",
    }
