"""mu by every rule, against the formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from task_vectors import SOURCES, Source, State, dense, family, reference_kept, state, vectors

import freemerge.experts as fx
from freemerge.errors import ArgumentError
from freemerge.experts.names import Scope
from freemerge.experts.rescale import RULES, Statistics, check_rescale, rule


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("scope", ["tensor", "row", "model"])
@pytest.mark.parametrize("rescale", ["released", "paper", "projection", "least_squares", 7])
def test_mu_follows_its_rule_in_float64(scope: Scope, rescale: str | float, source: Source) -> None:
    density = 0.03
    base, models = source()
    merged = {name: base[name] + sum(model[name] - base[name] for model in models.values()) / 5 for name in base}
    backbone = merged if rescale in ("projection", "least_squares") else None
    experts = fx.extract_experts(
        base, models, density=density, scope=scope, rescale=rescale, values="fp32", backbone=backbone
    )
    deltas = {task: vectors(base, model) for task, model in models.items()}
    entries = sum(tensor.numel() for tensor in base.values())
    means = {task: sum(np.abs(x).sum() for x in v.values()) / entries for task, v in deltas.items()}
    for task, expert in experts.items():
        kept = reference_kept(deltas[task], density, scope)
        total = sum(np.abs(x).sum() for x in kept.values())
        count = sum(np.count_nonzero(x) for x in kept.values())
        share = means[task] / sum(means.values())
        if rescale == "released":
            expected = -total / count * math.log10(density) / means[task]
        elif rescale == "paper":
            expected = -total / entries * math.log(density) / (share * means[task])
        elif rescale == "projection":
            v, m = deltas[task], vectors(base, merged)
            theta_hat = {name: m[name] + expert.mu * kept[name] for name in v}
            reached = sum((theta_hat[name] * v[name]).sum() for name in v)
            assert reached == pytest.approx(sum((x * x).sum() for x in v.values()), rel=1e-6)
            continue
        elif rescale == "least_squares":
            v, m = deltas[task], vectors(base, merged)
            overlap = sum((kept[name] * (v[name] - m[name])).sum() for name in v)
            expected = max(0.0, overlap / sum((x * x).sum() for x in kept.values()))
        else:
            expected = 7.0
        assert expert.mu == pytest.approx(expected, rel=1e-6)


def shrunk(factor: float) -> tuple[State, dict[str, State]]:
    """Models whose task vectors stay as they are while the base gets smaller."""
    base, models = family()
    smaller = {name: tensor * factor for name, tensor in base.items()}
    return smaller, {
        task: {name: smaller[name] + (model[name] - base[name]) for name in base} for task, model in models.items()
    }


def spectral(x: np.ndarray) -> float:
    return float(np.linalg.norm(x.reshape(len(x), -1), 2))


@pytest.mark.parametrize("scope", ["tensor", "row", "model"])
@pytest.mark.parametrize("factor", [2.0, 0.5, 0.15, 0.0])
def test_auto_bounds_the_released_mu_of_each_tensor_by_the_norm_of_the_weights(factor: float, scope: Scope) -> None:
    density = 0.03
    base, models = shrunk(factor)
    experts = fx.extract_experts(base, models, density=density, scope=scope, values="fp32")
    released = fx.extract_experts(base, models, density=density, scope=scope, values="fp32", rescale="released")
    frobenius = math.sqrt(sum(float(base[name].double().square().sum()) for name in base if base[name].ndim == 1))
    limited = set()
    for task, expert in experts.items():
        kept = reference_kept(vectors(base, models[task]), density, scope)
        of_vectors = math.sqrt(sum((x * x).sum() for x in kept.values() if x.ndim == 1))
        added = dense(expert, base)
        for name, m in kept.items():
            if not m.any():
                continue
            norm = spectral(base[name].double().numpy()) / spectral(m) if m.ndim > 1 else frobenius / of_vectors
            expected = min(released[task].mu, max(1.0, 0.15 * norm))
            # Three iterations find the norm of a matrix without structure to two percent.
            np.testing.assert_allclose(expert.mu * added[name], expected * m, rtol=0.02)
            limited.add("released" if expected == released[task].mu else "one" if expected == 1 else "trust")
    assert limited == {2.0: {"released"}, 0.5: {"released", "trust"}, 0.15: {"one", "trust"}, 0.0: {"one"}}[factor]


@given(seed=st.integers(0, 999), factor=st.floats(0, 2), density=st.sampled_from([0.01, 0.1, 0.9]))
def test_auto_adds_nothing_that_released_does_not_and_never_more(seed: int, factor: float, density: float) -> None:
    base, model = state(seed, factor), {name: tensor + 0.1 for name, tensor in state(seed, factor).items()}
    model["b.weight"] = base["b.weight"]  # a task vector of zero
    auto = fx.extract_experts(base, {"t": model}, density=density, values="fp32")["t"]
    released = fx.extract_experts(base, {"t": model}, density=density, values="fp32", rescale="released")["t"]
    assert auto.tensors.keys() == released.tensors.keys() == base.keys() - {"b.weight"}
    for name, added in auto.dense().items():
        assert (added.abs() <= released.dense()[name].abs() * (1 + 1e-6)).all()
        assert torch.equal(added != 0, released.dense()[name] != 0)


def test_auto_is_the_released_expert_where_the_weights_are_large() -> None:
    base, models = shrunk(2.0)
    auto, released = (fx.extract_experts(base, models, rescale=rescale) for rescale in ("auto", "released"))
    for task in models:
        assert auto[task].mu == released[task].mu
        for name, tensor in auto[task].tensors.items():
            assert np.array_equal(tensor.to_bytes(), released[task].tensors[name].to_bytes())


def test_projection_accounts_for_the_rounding_of_the_values() -> None:
    base, models = family()
    expert = fx.extract_experts(base, models, density=0.05, rescale="projection", values="sign", backbone=base)["t1"]
    v, rounded = vectors(base, models["t1"]), dense(expert, base)
    reached = sum((expert.mu * rounded[name] * v[name]).sum() for name in v)
    assert reached == pytest.approx(sum((x * x).sum() for x in v.values()), rel=1e-6)


@pytest.mark.parametrize("rescale", list(RULES))
def test_a_zero_task_vector_gives_an_empty_expert(rescale: str) -> None:
    base, models = family(models=1)
    models["same"] = dict(base)
    backbone = base if RULES[rescale].needs_backbone else None
    expert = fx.extract_experts(base, models, rescale=rescale, backbone=backbone)["same"]
    assert (expert.entries, expert.mu, dict(expert.tensors)) == (0, 0.0, {})


@pytest.fixture
def kept_share() -> Iterator[str]:
    @rule()
    def kept_share(s: Statistics) -> float:
        return s.kept_entries / s.entries

    yield "kept_share"
    del RULES["kept_share"]


def test_a_rule_is_one_function(kept_share: str) -> None:
    base, models = family()
    for task, expert in fx.extract_experts(base, models, rescale=kept_share, density=0.1).items():
        assert expert.mu == expert.entries / sum(tensor.numel() for tensor in base.values()), task
        assert expert.rescale == "kept_share"
    with pytest.raises(ArgumentError, match="projection, least_squares, kept_share or a finite number"):
        check_rescale("best", backbone=False)
