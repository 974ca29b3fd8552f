"""Gains of the merged task vector's singular directions: formula, bytes, budget, and how models take them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from task_vectors import family, vectors
from torch import Tensor, nn

import freemerge as fm
import freemerge.experts as fx
from freemerge.checkpoint.conversion import Piece
from freemerge.errors import ArgumentError, CheckpointError
from freemerge.experts.payload import Reader
from freemerge.experts.placement import Part, gathered_dense, seen_by
from freemerge.experts.values.gains import Gains, coded, directions
from freemerge.experts.values.svd2 import Svd2
from in_memory import noise

State = dict[str, Tensor]
NORM = torch.tensor([3.0])


def merged_of(base: State, models: dict[str, State], scale: float = 1.0) -> State:
    return fm.merge(base, list(models.values()), fm.Recipe(method="jsv", scale=scale))


def as_matrix(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x) if x.ndim > 1 else 1, -1)


def apart(count: int = 3) -> tuple[State, dict[str, State]]:
    """Models whose task vectors have no singular directions in common."""
    left, right = (torch.linalg.qr(noise(24, 24, seed=seed).double()).Q for seed in (1, 2))
    base = {"w": noise(24, 24), "b": noise(24, seed=5)}
    models = {}
    for i in range(count):
        own = slice(8 * i, 8 * i + 8)
        strength = torch.diag(0.2 / (1 + torch.arange(8.0, dtype=torch.float64)))
        vector = left[:, own] @ strength @ right[own]
        models[f"t{i}"] = {"w": (base["w"] + vector).float(), "b": base["b"] + 0.1 * i}
    return base, models


def test_tasks_that_share_no_direction_are_told_apart(tmp_path: Path) -> None:
    base, models = apart()
    merged = merged_of(base, models, scale=1.4)
    fx.save_experts(fx.iter_experts(base, models, backbone=merged, values="gains"), tmp_path / "experts")
    weights = {name: tensor.clone() for name, tensor in merged.items()}
    bank = fx.ExpertBank.load(weights, tmp_path / "experts", base=base)
    for task, model in models.items():
        vector = model["w"] - base["w"]
        assert float((merged["w"] - model["w"]).norm()) > float(vector.norm())
        with bank.active(task):
            assert float((weights["w"] - model["w"]).norm()) < 0.1 * float(vector.norm())
            assert torch.equal(weights["b"], merged["b"])
        assert all(torch.equal(weights[name], tensor) for name, tensor in merged.items())
        assert (tmp_path / "experts" / f"{task}.safetensors").stat().st_size < 250


@pytest.mark.parametrize("method", ["jsv", "tsv_m"])
def test_the_formula_in_float64(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as v_i where that is nearer to it than nothing, else in least squares."""
    monkeypatch.setattr("freemerge.experts.gains.LEAST_COSINE", 0.0)  # however little they tell
    base, models = family()
    merged = fm.merge(base, list(models.values()), fm.Recipe(method=method))
    for task, expert in fx.extract_experts(base, models, backbone=merged, values="gains").items():
        assert sorted(expert.tensors) == ["a.weight", "c.weight"], "only matrices have gains"
        own, whole = vectors(base, models[task]), vectors(base, merged)
        dense = expert.dense({name: merged[name] - base[name] for name in base})
        for name, tensor in expert.tensors.items():
            assert isinstance(tensor, Gains)
            u, s, w = np.linalg.svd(whole[name], full_matrices=False)
            count = int((s > 1e-5 * s[0]).sum())
            u, w = u[:, :count], w[:count]
            projected = np.diag(u.T @ own[name] @ w.T)
            rounded, length = coded_gains(projected), np.linalg.norm(own[name])
            near = rounded @ projected > 0.5 * length * np.linalg.norm(rounded)
            factor = length / np.linalg.norm(rounded) if near else (rounded @ projected) / (rounded @ rounded)
            gains = tensor.gains.numpy()
            np.testing.assert_allclose(gains, factor * rounded, rtol=1e-5, atol=1e-6 * length)
            result = dense[name].double().numpy() + whole[name]
            np.testing.assert_allclose(result, (u * gains) @ w, rtol=0, atol=1e-5 * length)
            assert np.linalg.norm(result - own[name]) < length


@pytest.mark.parametrize("method", ["iso_c", "task_arithmetic"])
def test_a_merged_model_of_other_directions_is_left_as_it_is(method: str) -> None:
    """Twelve tasks that share their directions: the few numbers on the diagonal say next to nothing of each."""
    base, models = family(models=12)
    merged = fm.merge(base, list(models.values()), fm.Recipe(method=method))
    for task, expert in fx.extract_experts(base, models, backbone=merged, values="gains").items():
        assert not expert.tensors, "rather than the pretrained model with little of the task"
        near = fx.extract_experts(base, {task: models[task]}, backbone=merged, values="gains", budget=0.3)[task]
        added = near.dense({name: merged[name] - base[name] for name in base})
        assert any(isinstance(tensor, Gains) and len(tensor.codes) for tensor in near.tensors.values())
        for name in ("a.weight", "c.weight"):
            vector = models[task][name] - base[name]
            assert float((merged[name] + added[name] - models[task][name]).norm()) < float(vector.norm())


def test_where_gains_do_not_help_a_budget_goes_to_what_is_missing() -> None:
    base, models = family(models=12)
    merged = fm.merge(base, list(models.values()), fm.Recipe(method="iso_c"))
    for name in ("b.weight", "b.bias", "n.weight"):  # of matrices alone a small budget makes no near model
        merged[name] = base[name]
    for budget in (0.05, 0.055):
        expert = fx.extract_experts(base, {"t": models["t0"]}, backbone=merged, values="gains", budget=budget)["t"]
        assert expert.tensors
        for name, change in expert.dense().items():
            missing = models["t0"][name] - merged[name]
            assert float((missing - change).norm()) < float(missing.norm())


def coded_gains(gains: np.ndarray) -> np.ndarray:
    """At four bits, by trying scales."""
    scales = np.linspace(1.0, 0.3, 15) * np.abs(gains).max() / 7
    tried = [np.clip(np.round(gains / scale), -7, 7) * scale for scale in scales]
    return min(tried, key=lambda x: ((x - gains) ** 2).sum())


@given(
    shape=st.one_of(st.tuples(st.integers(1, 9)), st.tuples(st.integers(1, 9), st.integers(1, 9))),
    share=st.floats(0, 1), rank=st.integers(0, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_they_come_back_from_their_bytes(shape: tuple[int, ...], share: float, rank: int, seed: int) -> None:
    codes, scale = coded(noise(round(share * min(shape)) if len(shape) == 2 else 0, seed=seed).double())
    rest = None
    if rank or not len(codes):
        rest = Svd2.encode(shape, *directions(noise(*shape, seed=seed).view(-1, shape[-1])))
    tensor = Gains(shape, codes, scale, NORM, rest)
    raw = tensor.to_bytes()
    again = Gains.from_bytes(shape, Reader(raw))
    assert torch.equal(again.codes, codes)
    assert torch.equal(again.scale, scale)
    assert (again.rest is None) == (rest is None)
    assert again.entries == tensor.entries
    vector = noise(*shape, seed=seed + 1)
    seen = Gains.seen(vector * (float(NORM) / vector.norm())) if len(codes) else ()
    assert torch.equal(again.dense(None, seen), tensor.dense(None, seen))
    assert np.array_equal(again.to_bytes(), raw)
    for wrong in (raw[:-1], np.append(raw, np.uint8(0))):
        with pytest.raises(ValueError, match=r"bytes|header|gains"):
            Gains.from_bytes(shape, Reader(wrong))


def test_hostile_bytes_are_refused() -> None:
    raw = Gains(
        (3, 5), torch.tensor([1, -7, 7], dtype=torch.int8), torch.tensor([0.5]), torch.tensor([2.0]), None
    ).to_bytes()
    assert raw.size == 2 + 4 + 4 + 2
    with pytest.raises(ValueError, match="3 gains and 0 remainders"):
        Gains.from_bytes((2, 5), Reader(raw))
    for place, value, message in (
        (1, 2, "2 remainders"),
        (5, 0x7F, "non-finite"),
        (10, 0xFF, "above 14"),
        (11, 0x0E, "stray bits"),
    ):
        wrong = raw.copy()
        wrong[place] = value
        if place == 5:
            wrong[4] = 0x80
        with pytest.raises(ValueError, match=message):
            Gains.from_bytes((3, 5), Reader(wrong))


def test_a_budget_brings_them_nearer_and_is_kept_to(tmp_path: Path) -> None:
    base, models = family()
    merged = merged_of(base, models)
    dense = sum(2 * tensor.numel() for tensor in base.values())
    whole = {name: merged[name] - base[name] for name in base}
    distances = []
    for share in (None, 0.06, 0.12, 0.2):
        expert = fx.extract_experts(base, models, backbone=merged, values="gains", budget=share)["t1"]
        path = tmp_path / f"{share}.safetensors"
        size = expert.save(path)
        assert share is None or 0.9 * share * dense < size <= share * dense
        again = fx.Expert.load(path)
        assert (again.budget, again.density, again.values, again.mu) == (share, None, "gains", 1.0)
        added, loaded = expert.dense(whole), again.dense(whole)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in added.items())
        nothing = torch.zeros(())
        distances.append(
            sum(float((merged[name] + added.get(name, nothing) - models["t1"][name]).square().sum()) for name in base)
        )
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.5 * distances[0]


@given(more=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_file_is_never_larger_than_its_budget(
    more: float, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = {"a": noise(30, 20, seed=seed), "bias": noise(50, seed=seed), "b": noise(3, 2, 4, seed=seed)}
    models = {t: {n: x + noise(*x.shape, seed=seed + i) for n, x in base.items()} for i, t in ((50, "s"), (60, "t"))}
    dense = sum(2 * tensor.numel() for tensor in base.values())
    budget = (700 + more * (dense - 701)) / dense
    expert = fx.extract_experts(base, models, backbone=merged_of(base, models), values="gains", budget=budget)["t"]
    assert expert.save(tmp_path_factory.mktemp("budget") / "t.safetensors") <= budget * dense


def experts_of(kind: Callable[[], nn.Module], dtype: torch.dtype) -> tuple[nn.Module, dict[str, fx.Expert], State]:
    model, _, base = make(kind, dtype)
    base = untied({name: value.to(dtype) if value.is_floating_point() else value for name, value in base.items()})
    torch.manual_seed(0)
    origin = kind().eval()
    tasks = {task: untied(tuned(origin, i + 1)) for i, task in enumerate(TASKS[:3])}
    backbone = merged_of(base, tasks)
    model.load_state_dict(backbone, strict=False)
    backbone = {n: t.float() if t.dtype.itemsize == 2 else t for n, t in untied(model.state_dict()).items()}
    experts = {}
    for i, (task, own) in enumerate(tasks.items()):
        options = {"budget": 0.4} if i == 1 else {}
        experts |= fx.extract_experts(base, {task: own}, backbone=backbone, values="gains", **options)  # type: ignore[arg-type]
    return model, experts, base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", [Text, Vision])
def test_active_replaces_what_was_merged_and_undoes_it(
    kind: Callable[[], nn.Module], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freemerge.experts.gains.LEAST_COSINE", 0.0)
    model, experts, base = experts_of(kind, dtype)
    assert all(len(tensor.codes) for tensor in experts["task0"].tensors.values() if isinstance(tensor, Gains))
    assert experts["task0"].tensors
    bank = fx.ExpertBank(model, experts, base=base)
    before = snapshot(model)
    whole = {name: before[name].to(torch.promote_types(dtype, torch.float32)) - base[name] for name in base}
    added = {task: expert.dense({n: whole[n] for n in expert.tensors}) for task, expert in experts.items()}
    for chosen in ({"task0": 1.0}, {"task1": 1.0}, {"task1": 0.5, "task2": 0.25}):
        with bank.active(chosen):
            for name in {name for task in chosen for name in added[task]}:
                expected = before[name].double()
                for task, weight in chosen.items():
                    expected = expected + weight * added[task].get(name, torch.zeros(())).double()
                error = {torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
                torch.testing.assert_close(model.state_dict()[name].double(), expected, rtol=error, atol=error)
        assert_same(model, before)


def test_inside_another_block_they_are_of_the_merged_model() -> None:
    """The directions are those that the bank found, whatever an outer block has changed since."""
    model, experts, base = experts_of(Text, torch.float32)
    bank = fx.ExpertBank(model, experts, base=base)
    before = snapshot(model)
    with bank.active("task0"):
        first = snapshot(model)
        with bank.active("task2"):
            both = snapshot(model)
        assert_same(model, first)
    assert_same(model, before)
    with bank.active({"task0": 1.0, "task2": 1.0}):
        for name in experts["task0"].tensors:
            torch.testing.assert_close(model.state_dict()[name], both[name], rtol=1e-5, atol=1e-6)


def test_the_forward_pass_adds_what_active_does() -> None:
    model, experts, base = experts_of(Text, torch.float32)
    bank = fx.ExpertBank(model, experts, base=base)
    x = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(0))
    assert_forward_adds_what_active_does(model, bank, x, [{"task0": 1.0}, None, {"task1": 0.5, "task2": 0.5}])


def test_pieces_of_a_fused_tensor_have_their_own_directions() -> None:
    vector = noise(2, 6, 4, seed=1)
    pieces = {n: Piece((3, 4), n, 0, (4, 1), "w", 24 * (i // 2) + 12 * (i % 2), (4, 1)) for i, n in enumerate("abcd")}
    entries = {}
    for i, name in enumerate(pieces):
        norm = vector[i // 2, 3 * (i % 2) : 3 * (i % 2) + 3].norm().view(1)
        entries[name] = Gains((3, 4), *coded(noise(3, seed=i).double()), norm, None)
    parts = [Part(n, piece) for n, piece in pieces.items()]
    seen = {part.entry: seen_by(part, entries[part.entry], vector) for part in parts}
    gathered = gathered_dense(parts, entries, torch.zeros(2, 6, 4), seen) + vector
    for i, name in enumerate(pieces):
        left, _, right = directions(vector[i // 2, 3 * (i % 2) : 3 * (i % 2) + 3])
        expected = (left * entries[name].gains) @ right
        torch.testing.assert_close(
            gathered[i // 2, 3 * (i % 2) : 3 * (i % 2) + 3].double(), expected, rtol=0, atol=1e-5
        )


def test_a_merged_tensor_without_change_is_left_alone() -> None:
    base, models = apart()
    experts = fx.extract_experts(base, models, backbone=base, values="gains")
    assert all(not expert.tensors for expert in experts.values())
    experts = fx.extract_experts(base, models, backbone=base, values="gains", budget=0.5)
    tensor = experts["t1"].tensors["w"]
    assert isinstance(tensor, Gains)
    assert not len(tensor.codes)
    assert tensor.rest is not None, "low rank on the base"


def test_files_memory_and_threads_give_the_same_bytes(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base, models = family(torch.bfloat16, models=2)
    merged = {name: tensor.float() for name, tensor in merged_of(base, models).items()}
    paths = {}
    for name, state in {"base": base, "merged": merged, **models}.items():
        paths[name] = tmp_path / f"{name}.safetensors"
        save_file(state, paths[name])
    threads, written = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for b, m, own in ((base, merged, models), (paths["base"], paths["merged"], {t: paths[t] for t in models})):
                expert = fx.extract_experts(b, own, backbone=m, values="gains", budget="20%")["t1"]
                expert.save(tmp_path / "expert.safetensors", force=True)
                written.append((tmp_path / "expert.safetensors").read_bytes())
    finally:
        torch.set_num_threads(threads)
    assert len(set(written)) == 1


def test_another_merged_model_or_a_rounded_one_is_noticed() -> None:
    base, models = family()
    merged = merged_of(base, models)
    experts = fx.extract_experts(base, models, backbone=merged, values="gains")
    rounded = {name: tensor.bfloat16() for name, tensor in merged.items()}
    half = {name: tensor.half() for name, tensor in merged.items()}
    for wrong in (rounded, half, merged_of(base, models, scale=1.1)):
        with pytest.raises(ArgumentError, match=r"experts: 't0', 'a\.weight': theta_m - theta_0 has norm"):
            fx.ExpertBank(wrong, experts, base=base)
    for wrong, dtype in ((rounded, "bfloat16"), (half, "float16")):
        with pytest.raises(ArgumentError, match=rf"backbone: a\.weight is stored in {dtype}; gains need .* out_dtype"):
            fx.extract_experts(base, models, backbone=wrong, values="gains")
    bank = fx.ExpertBank(rounded, experts, base=base, backbone=merged)
    added = experts["t1"].dense({name: merged[name] - base[name] for name in base})
    with bank.active("t1"):
        for name, change in added.items():
            torch.testing.assert_close(rounded[name].float(), merged[name] + change, rtol=2e-2, atol=2e-2)
    with pytest.raises(CheckpointError, match=r"backbone .*: tensor 'a"):
        fx.ExpertBank(rounded, experts, base=base, backbone={"b.weight": merged["b.weight"]})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank))])
def test_a_copy_has_the_directions_that_were_found_before_rounding(copied: Callable[[fx.ExpertBank], Any]) -> None:
    base, models = apart()
    module = nn.Linear(24, 24)
    names = {"w": "weight", "b": "bias"}
    start, *others = [{names[name]: t for name, t in state.items()} for state in (base, *models.values())]
    merged = fm.merge(start, others, fm.Recipe(method="jsv"), into=module)
    experts = fx.extract_experts(start, dict(zip(models, others, strict=True)), values="gains", backbone=merged)
    bank = fx.ExpertBank(module, experts, base=start)
    module.to(torch.bfloat16).to(torch.float32)
    other = copied(bank)
    with bank.active("t0"), other.active("t1"):  # the models are two
        assert not torch.equal(bank._model.weight, other._model.weight)
    with bank.active("t1"), other.active("t1"):
        assert torch.equal(bank._model.weight, other._model.weight)


def test_a_task_that_was_not_merged_has_no_gains() -> None:
    base, models = family(models=4)
    merged = merged_of(base, {task: models[task] for task in ("t0", "t1", "t2")})
    assert not fx.extract_experts(base, {"t3": models["t3"]}, backbone=merged, values="gains")["t3"].tensors


def test_autocast_does_not_lower_them() -> None:
    model, experts, base = experts_of(Text, torch.float32)
    bank = fx.ExpertBank(model, experts, base=base)
    with bank.active("task0"):
        exact = snapshot(model)
    with torch.autocast("cpu", torch.bfloat16), bank.active("task0"):
        assert_same(model, exact)


def test_tensors_that_are_no_matrices_get_components_of_what_is_missing() -> None:
    """A stack of matrices or a convolution is merged as other matrices than its rows make, and a vector as none."""
    base, models = family()
    merged = merged_of(base, models)
    expert = fx.extract_experts(base, models, backbone=merged, values="gains", budget=0.2)["t0"]
    for name, tensor in expert.tensors.items():
        assert isinstance(tensor, Gains)
        assert (len(tensor.codes) > 0) == (base[name].ndim == 2)
        if base[name].ndim != 2:
            missing = vectors(merged, models["t0"])[name]
            assert np.linalg.norm(missing - tensor.dense().double().numpy()) < 0.98 * np.linalg.norm(missing)
    assert len(expert.tensors) > 2


def test_bad_arguments_are_named() -> None:
    base, models = family()
    merged = merged_of(base, models)
    experts = fx.extract_experts(base, models, backbone=merged, values="gains")
    with pytest.raises(ArgumentError, match="base must be given: 't0' is of values gains"):
        fx.ExpertBank(merged, experts)
    with pytest.raises(ArgumentError, match="vectors must be given"):
        experts["t0"].dense()
    with pytest.raises(ArgumentError, match="backbone must be given for values gains"):
        fx.extract_experts(base, models, values="gains")
    with pytest.raises(ArgumentError, match="density is not for values gains"):
        fx.extract_experts(base, models, backbone=merged, values="gains", density=0.1)
    with pytest.raises(ArgumentError, match="rank is not for values gains"):
        fx.extract_experts(base, models, backbone=merged, values="gains", rank=1)
    with pytest.raises(ArgumentError, match="less than the gains alone take"):
        fx.extract_experts(base, models, backbone=merged, values="gains", budget=0.01)
    broken = {**merged, "a.weight": merged["a.weight"] * float("nan")}
    with pytest.raises(CheckpointError, match=r"'a\.weight' is not finite"):
        fx.extract_experts(base, models, backbone=broken, values="gains")
