"""mu by every rule, against the formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from task_vectors import SOURCES, Source, dense, family, reference_kept, vectors

import freemerge.experts as fx
from freemerge.errors import ArgumentError
from freemerge.experts.rescale import RULES, Statistics, check_rescale, rule
from freemerge.methods.rules import Scope


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("scope", ["tensor", "row", "model"])
@pytest.mark.parametrize("rescale", ["released", "paper", "projection", 7])
def test_mu_follows_its_rule_in_float64(scope: Scope, rescale: str | float, source: Source) -> None:
    density = 0.03
    base, models = source()
    merged = {name: base[name] + sum(model[name] - base[name] for model in models.values()) / 5 for name in base}
    backbone = merged if rescale == "projection" else None
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
        else:
            expected = 7.0
        assert expert.mu == pytest.approx(expected, rel=1e-6)


def test_projection_accounts_for_the_rounding_of_the_values() -> None:
    base, models = family()
    expert = fx.extract_experts(base, models, density=0.05, rescale="projection", values="sign", backbone=base)["t1"]
    v, rounded = vectors(base, models["t1"]), dense(expert, base)
    reached = sum((expert.mu * rounded[name] * v[name]).sum() for name in v)
    assert reached == pytest.approx(sum((x * x).sum() for x in v.values()), rel=1e-6)


@pytest.mark.parametrize("rescale", ["released", "paper", "projection"])
def test_a_zero_task_vector_gives_an_empty_expert(rescale: str) -> None:
    base, models = family(models=1)
    models["same"] = dict(base)
    backbone = base if rescale == "projection" else None
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
    with pytest.raises(ArgumentError, match="released, paper, projection, kept_share or a finite number"):
        check_rescale("best", backbone=False)
