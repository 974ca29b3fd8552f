"""Experts against the formulas in float64: mu by every rule, exact counts, ties, edge cases, streaming."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import freemerge.experts as fx
from freemerge.errors import ArgumentError, CheckpointError
from freemerge.experts.extract import Scope, kept_entries

State = dict[str, Tensor]
Source = Callable[[], tuple[State, dict[str, State]]]
SHAPES = {"a.weight": (40, 37), "b.weight": (7, 5, 3, 3), "b.bias": (7,), "c.weight": (300, 11), "n.weight": (64,)}


def state(seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * scale).to(dtype) for name, shape in SHAPES.items()}


def family(dtype: torch.dtype = torch.float32, models: int = 3) -> tuple[State, dict[str, State]]:
    base = state(0, dtype=dtype)
    tuned = {
        f"t{i}": {name: (base[name].float() + delta).to(dtype) for name, delta in state(i + 1, 0.02 * (i + 1)).items()}
        for i in range(models)
    }
    return base, tuned


@functools.cache
def trained() -> tuple[State, dict[str, State]]:
    """A classifier of handwritten digits, and what it becomes when it is trained on for three other questions."""
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)

    def fit(start: State | None, target: Tensor, steps: int) -> State:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
        if start is not None:
            model.load_state_dict(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), target).backward()
            optimizer.step()
        return {name: value.detach().clone() for name, value in model.state_dict().items()}

    base = fit(None, labels, 60)
    tasks = {"odd": labels % 2, "large": (labels > 4).long(), "tripled": labels * 3 % 10}
    return base, {task: fit(base, target, 30) for task, target in tasks.items()}


def vectors(base: State, model: State) -> dict[str, np.ndarray]:
    return {name: (model[name].float() - base[name].float()).double().numpy() for name in sorted(base)}


def largest(v: np.ndarray, keep: int, skip: int) -> np.ndarray:
    """v with everything but ranks skip .. skip + keep - 1 set to zero; flat, stable."""
    order = np.argsort(-np.abs(v), kind="stable")[skip : skip + keep]
    kept = np.zeros_like(v)
    kept[order] = v[order]
    return kept


def reference_kept(v: dict[str, np.ndarray], density: float, scope: Scope, trim: float = 0.0) -> dict[str, np.ndarray]:
    def counts(n: int) -> tuple[int, int]:
        return max(1, int(density * n + 1e-9)), int(trim * n + 1e-9)

    if scope == "model":
        whole = np.concatenate([x.reshape(-1) for x in v.values()])
        pieces = np.split(largest(whole, *counts(whole.size)), np.cumsum([x.size for x in v.values()])[:-1])
        return {name: piece.reshape(x.shape) for (name, x), piece in zip(v.items(), pieces, strict=True)}
    if scope == "tensor":
        return {name: largest(x.reshape(-1), *counts(x.size)).reshape(x.shape) for name, x in v.items()}
    by_row = {}
    for name, x in v.items():
        rows = x.reshape(x.shape[0] if x.ndim > 1 else 1, -1)
        by_row[name] = np.stack([largest(row, *counts(row.size)) for row in rows]).reshape(x.shape)
    return by_row


def dense(expert: fx.Expert, base: State) -> dict[str, np.ndarray]:
    """M(v, d) of an expert as dense arrays, all tensors."""
    zeros = {name: np.zeros(tuple(base[name].shape)) for name in sorted(base)}
    return zeros | {name: tensor.dense().double().numpy() for name, tensor in expert.tensors.items()}


SOURCES = [
    pytest.param(family, id="random"),
    pytest.param(functools.partial(family, torch.bfloat16), id="random bf16"),
    pytest.param(trained, id="trained"),
]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("scope", ["tensor", "row", "model"])
@pytest.mark.parametrize(("density", "trim"), [(0.01, 0.0), (0.29, 0.0), (0.05, 0.02), (0.9, 0.5)])
def test_kept_entries_are_the_reference_s(scope: Scope, density: float, trim: float, source: Source) -> None:
    base, models = source()
    experts = fx.extract_experts(base, models, density=density, scope=scope, trim=trim, values="fp32")
    assert list(experts) == list(models)
    for task, model in models.items():
        expected = reference_kept(vectors(base, model), density, scope, trim)
        kept = dense(experts[task], base)
        for name in base:
            np.testing.assert_array_equal(kept[name], expected[name], err_msg=f"{task} {name}")
        assert experts[task].entries == sum(np.count_nonzero(x) for x in expected.values())


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


@pytest.mark.parametrize(
    ("n", "density", "k"), [(1, 0.01, 1), (99, 0.01, 1), (100, 0.29, 29), (768, 0.01, 7), (700, 0.01, 7), (50, 0.5, 25)]
)
def test_number_of_kept_entries(n: int, density: float, k: int) -> None:
    assert kept_entries(n, density) == k


@pytest.mark.parametrize("rescale", ["released", "paper", "projection"])
def test_a_zero_task_vector_gives_an_empty_expert(rescale: str) -> None:
    base, models = family(models=1)
    models["same"] = dict(base)
    backbone = base if rescale == "projection" else None
    expert = fx.extract_experts(base, models, rescale=rescale, backbone=backbone)["same"]
    assert (expert.entries, expert.mu, dict(expert.tensors)) == (0, 0.0, {})


def test_fewer_non_zeros_than_k_are_all_kept() -> None:
    base = {"w": torch.zeros(100, 10)}
    model = {"w": base["w"].clone()}
    model["w"].view(-1)[[3, 500]] = torch.tensor([1.0, -2.0])
    expert = fx.extract_experts(base, {"t": model}, density=0.1, values="fp32")["t"]
    assert expert.tensors["w"].indices.tolist() == [3, 500]
    assert expert.tensors["w"].sparse().values.tolist() == [1.0, -2.0]


def test_ties_take_the_lowest_index_and_the_first_tensor() -> None:
    base = {"b": torch.zeros(10), "a": torch.zeros(10)}
    model = {name: torch.ones(10) for name in base}
    by_tensor = fx.extract_experts(base, {"t": model}, density=0.3)["t"]
    assert {name: tensor.indices.tolist() for name, tensor in by_tensor.tensors.items()} == {
        "a": [0, 1, 2],
        "b": [0, 1, 2],
    }
    by_model = fx.extract_experts(base, {"t": model}, density=0.3, scope="model")["t"]
    assert {name: tensor.indices.tolist() for name, tensor in by_model.tensors.items()} == {"a": [0, 1, 2, 3, 4, 5]}


def test_what_gets_no_expert() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    base = {**module.state_dict(), "logit_scale": torch.tensor(2.0), "none": torch.empty(0, 3)}
    head = torch.randn(5, 4)
    base |= {"embed": head, "head": head}
    changed = head + 1
    model = {name: tensor + 1 for name, tensor in base.items()} | {"embed": changed, "head": changed}
    expert = fx.extract_experts(base, {"t": model})["t"]
    assert sorted(expert.tensors) == ["0.bias", "0.weight", "1.bias", "1.weight", "embed"]


def test_checkpoints_on_disk_modules_and_state_dicts_give_the_same_experts(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base, models = family(torch.bfloat16, models=2)
    save_file(base, tmp_path / "base.safetensors")
    (tmp_path / "cooking").mkdir()
    save_file(models["t0"], tmp_path / "cooking" / "model.safetensors")
    save_file(models["t1"], tmp_path / "law.safetensors")
    on_disk = fx.extract_experts(
        tmp_path / "base.safetensors", [tmp_path / "cooking", str(tmp_path / "law.safetensors")]
    )
    in_memory = fx.extract_experts(base, list(models.values()))
    assert list(on_disk) == ["cooking", "law"]
    assert list(in_memory) == ["task0", "task1"]
    for one, two in zip(on_disk.values(), in_memory.values(), strict=True):
        assert one.mu == two.mu
        for name, tensor in one.tensors.items():
            assert torch.equal(tensor.dense(), two.tensors[name].dense())


def test_threads_do_not_matter() -> None:
    base, models = family()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(
                fx.extract_experts(
                    base, models, rescale="projection", backbone=models["t0"], scope="model", density=0.1
                )
            )
    finally:
        torch.set_num_threads(threads)
    for task in models:
        assert results[0][task].mu == results[1][task].mu
        for name, tensor in results[0][task].tensors.items():
            assert torch.equal(tensor.indices, results[1][task].tensors[name].indices)


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("where", [0, 3299])
def test_non_finite_values_are_named(scope: Scope, where: int) -> None:
    base, models = family()
    models["t1"]["c.weight"].view(-1)[where] = math.nan
    with pytest.raises(CheckpointError, match=r"'c\.weight' is not finite"):
        fx.extract_experts(base, models, scope=scope)


def test_a_non_finite_backbone_is_named() -> None:
    base, models = family()
    backbone = {**base, "n.weight": torch.full((64,), math.inf)}
    with pytest.raises(CheckpointError, match=r"'n\.weight' is not finite"):
        fx.extract_experts(base, models, rescale="projection", backbone=backbone)


def test_bad_arguments_are_named_before_anything_is_read() -> None:
    base, models = family()
    for message, options in [
        ("density must be between", {"density": 0.0}),
        ("density must be between", {"density": 1.0}),
        ("trim must be", {"trim": -0.1}),
        ("scope must be one of", {"scope": "layer"}),
        ("rescale must be one of", {"rescale": "best"}),
        ("rescale must be one of", {"rescale": math.nan}),
        ("values must be one of", {"values": "fp8"}),
        ("backbone must be given", {"rescale": "projection"}),
        ("backbone must be given", {"backbone": base}),
    ]:
        with pytest.raises(ArgumentError, match=message):
            fx.iter_experts(base, models, **options)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="models must hold at least one"):
        fx.iter_experts(base, {})
    for name in ("a/b", ".hidden", ""):
        with pytest.raises(ArgumentError, match="cannot name a task"):
            fx.iter_experts(base, {name: base})
    with pytest.raises(CheckpointError, match="lacks"):
        fx.iter_experts(base, {"t": {"a.weight": base["a.weight"]}})
