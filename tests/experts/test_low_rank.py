"""Low-rank experts: their codings against the formula, their bytes against the budget, and how models take them."""

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
from task_vectors import counted_reads, family, vectors
from torch import Tensor, nn

import freemerge.experts as fx
from freemerge.checkpoint.conversion import Piece
from freemerge.errors import ArgumentError, CheckpointError
from freemerge.experts import leading
from freemerge.experts.leading import leading_triplets
from freemerge.experts.payload import Reader, numbers_to_bytes
from freemerge.experts.placement import Part, gathered_dense
from freemerge.experts.values import CODINGS, LowRankTensor
from freemerge.experts.values.low_rank import product
from in_memory import noise

LOW_RANK = [coding for coding in CODINGS.values() if issubclass(coding, LowRankTensor)]
LEVELS = np.array([-1.5104176, -0.45278, 0.45278, 1.5104176])
SHAPES = st.one_of(
    st.tuples(st.integers(1, 40)),
    st.tuples(st.integers(1, 20), st.integers(1, 40)),
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)),
)


def as_matrix(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x) if x.ndim > 1 else 1, -1)


def coded(coding: type[LowRankTensor], tensor: Tensor, rank: int) -> LowRankTensor:
    matrix = torch.from_numpy(as_matrix(tensor.numpy()))
    return coding.encode(tuple(tensor.shape), *leading_triplets(matrix, rank))


def component_of_svd2(u: np.ndarray, s: float, w: np.ndarray) -> np.ndarray:
    """The component at two bits in float64, by trying every level for every entry."""
    q_u, q_w = (LEVELS[np.abs(x[:, None] * len(x) ** 0.5 - LEVELS).argmin(1)] for x in (u, w))
    return s * (q_u @ u) * (q_w @ w) / ((q_u @ q_u) * (q_w @ q_w)) * np.outer(q_u, q_w)


@given(shape=SHAPES, rank=st.integers(1, 6), seed=st.integers(0, 99))
def test_codings_follow_their_formula_in_float64(shape: tuple[int, ...], rank: int, seed: int) -> None:
    tensor = noise(*shape, seed=seed)
    u, s, w = np.linalg.svd(as_matrix(tensor.double().numpy()), full_matrices=False)
    rank = min(rank, len(s))
    exact = (u[:, :rank] * s[:rank] @ w[:rank]).reshape(shape)
    expected = sum(component_of_svd2(u[:, k], s[k], w[k]) for k in range(rank))
    two_bits = coded(fx.values.CODINGS["svd2"], tensor, rank)
    np.testing.assert_allclose(two_bits.dense().numpy(), np.reshape(expected, shape), rtol=0, atol=2**-8 * s.sum())
    np.testing.assert_allclose(coded(CODINGS["svd16"], tensor, rank).dense(), exact, rtol=0, atol=2**-9 * s[0])


def test_two_bits_keep_the_energy_that_four_levels_of_a_gaussian_do() -> None:
    tensor = noise(300, 400)
    u, s, w = leading_triplets(tensor, 10)
    left = float((coded(CODINGS["svd2"], tensor, 10).dense() - (u * s) @ w).square().sum() / s.square().sum())
    assert left == pytest.approx(1 - 0.8825**2, abs=0.02)


@pytest.mark.parametrize("coding", LOW_RANK)
@given(shape=SHAPES, rank=st.integers(1, 6), seed=st.integers(0, 99))
def test_they_come_back_from_their_bytes(
    coding: type[LowRankTensor], shape: tuple[int, ...], rank: int, seed: int
) -> None:
    tensor = coded(coding, noise(*shape, seed=seed), rank)
    raw = tensor.to_bytes()
    header = numbers_to_bytes(tensor.rank)
    assert raw.size <= header.size + (tensor.rank * coding.component_bits(shape)) // 8 + 2
    again = coding.from_bytes(shape, Reader(raw))
    assert again.rank == tensor.rank
    assert again.entries == tensor.entries == tensor.rank * sum(as_matrix(np.empty(shape)).shape)
    assert torch.equal(again.dense(), tensor.dense())
    assert np.array_equal(again.to_bytes(), raw)
    for wrong in (raw[:-1], np.append(raw, np.uint8(0))):
        with pytest.raises(ValueError, match=r"bytes|header"):
            coding.from_bytes(shape, Reader(wrong))
    for rank in (0, 41):
        with pytest.raises(ValueError, match=f"rank {rank} of shape"):
            coding.from_bytes(shape, Reader(np.concatenate([numbers_to_bytes(rank), raw[header.size :]])))


def test_what_they_do_not_write_or_cannot_hold_is_refused() -> None:
    raw = coded(CODINGS["svd2"], noise(3, 3), 1).to_bytes()
    raw[-1] |= 0x80
    with pytest.raises(ValueError, match="stray bits"):
        CODINGS["svd2"].from_bytes((3, 3), Reader(raw))
    raw[1:3] = [0x80, 0x7F]  # infinity in bfloat16
    with pytest.raises(ValueError, match="non-finite"):
        CODINGS["svd2"].from_bytes((3, 3), Reader(raw))
    for coding, size in (("svd16", 1e12), ("svd2", 1e39)):
        with pytest.raises(ArgumentError, match=f"{coding} cannot hold"):
            coded(CODINGS[coding], torch.full((2, 2), size, dtype=torch.float64), 1)


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 3, 1000), (999, 5, 301), (2, 1, 1 << 19)])
def test_products_are_summed_in_order_whatever_the_threads_and_the_precision(shape: tuple[int, int, int]) -> None:
    height, rank, width = shape
    left, right = noise(height, rank), noise(rank, width, seed=1)
    expected = torch.zeros(height, width)
    for k in range(rank):
        expected = expected + left[:, k, None] * right[k]
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        for count, lowered in ((1, "highest"), (3, "medium")):
            torch.set_num_threads(count)
            torch.set_float32_matmul_precision(lowered)
            assert torch.equal(product(left, right), expected)
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)


@given(
    shapes=st.dictionaries(NAMES.filter(lambda name: not name.startswith("__")), SHAPES, min_size=1, max_size=6),
    more=st.floats(0, 1), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_file_is_never_larger_than_its_budget(
    shapes: dict[str, tuple[int, ...]], more: float, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = {name: noise(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}
    model = {name: tensor + noise(*tensor.shape, seed=seed + 50 + i) for i, (name, tensor) in enumerate(base.items())}
    base["large"], model["large"] = torch.zeros(60, 70), noise(60, 70, seed=seed)
    dense = sum(2 * tensor.numel() for tensor in base.values())
    budget = (300 + more * (dense - 301)) / dense
    expert = fx.extract_experts(base, {"t": model}, backbone=base, budget=budget)["t"]
    assert expert.save(tmp_path_factory.mktemp("budget") / "t.safetensors") <= budget * dense


def test_the_budget_is_spent(tmp_path: Path) -> None:
    base, models = family()
    for share in (0.1, 0.2):
        expert = fx.extract_experts(base, models, backbone=base, budget=share)["t1"]
        dense = sum(2 * tensor.numel() for tensor in base.values())
        assert 0.95 * share * dense < expert.save(tmp_path / f"{share}.safetensors") <= share * dense
        again = fx.Expert.load(tmp_path / f"{share}.safetensors")
        assert (again.budget, again.density, again.scope, again.values, again.mu) == (share, None, None, "svd2", 1.0)
        for name, tensor in expert.tensors.items():
            assert torch.equal(again.tensors[name].dense(), tensor.dense())


@pytest.mark.parametrize("exact", [True, False])
def test_an_expert_is_near_what_the_merged_model_lacks(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exact:
        monkeypatch.setattr(leading, "EXACT", 0)
        monkeypatch.setattr("freemerge.experts.low_rank.EXACT", 0)
    base, models = family()
    merged = {name: base[name] + sum(model[name] - base[name] for model in models.values()) / 3 for name in base}
    lacking = vectors(merged, models["t2"])
    total = sum((x * x).sum() for x in lacking.values())
    previous = total
    for budget in ("5%", "12%", "40%"):
        expert = fx.extract_experts(base, models, backbone=merged, budget=budget)["t2"]
        left = 0.0
        for name, x in lacking.items():
            kept = expert.tensors.get(name)
            left += ((x - (0 if kept is None else kept.dense().double().numpy())) ** 2).sum()
        assert left < 0.97 * previous
        previous = left


def test_one_changed_tensor_gets_all_that_it_can_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leading, "EXACT", 0)
    monkeypatch.setattr("freemerge.experts.low_rank.EXACT", 0)
    base = {f"layer.{i}": torch.zeros(120, 100) for i in range(9)}
    model = {**base, "layer.4": noise(120, 100)}
    expert = fx.extract_experts(base, {"t": model}, backbone=base, budget="2%")["t"]
    (tensor,) = expert.tensors.values()
    assert tensor.entries / 220 > 60  # ten times what its own share of the budget would give
    size = expert.save(tmp_path / "t.safetensors")
    assert 0.02 * 9 * 2 * 12000 - size < CODINGS["svd2"].component_bits((120, 100)) / 8 + 24


def test_rank_keeps_as_many_components_of_each_matrix_as_twin_merging() -> None:
    base, models = family()
    expert = fx.extract_experts(base, models, backbone=models["t0"], rank=3, values="svd16")["t1"]
    assert sorted(expert.tensors) == ["a.weight", "b.weight", "c.weight"]
    for name, tensor in expert.tensors.items():
        u, s, w = np.linalg.svd(as_matrix(vectors(models["t0"], models["t1"])[name]), full_matrices=False)
        exact = (u[:, :3] * s[:3] @ w[:3]).reshape(tensor.shape)
        np.testing.assert_allclose(tensor.dense(), exact, atol=2**-9 * s[0])
        assert tensor.rank == 3


def test_what_is_the_same_needs_no_bytes(tmp_path: Path) -> None:
    base, models = family()
    expert = fx.extract_experts(base, {"same": models["t1"]}, backbone=models["t1"], budget="20%")["same"]
    assert (expert.entries, dict(expert.tensors)) == (0, {})
    assert expert.save(tmp_path / "same.safetensors") < 250
    weights = {name: tensor.clone() for name, tensor in base.items()}
    with fx.ExpertBank(weights, {"same": fx.Expert.load(tmp_path / "same.safetensors")}).active("same"):
        assert all(torch.equal(weights[name], base[name]) for name in base)


def test_files_memory_and_threads_give_the_same_bytes(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base, models = family(torch.bfloat16, models=2)
    for name, state in {"base": base, **models}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("base", *models)}
    threads = torch.get_num_threads()
    sets = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            sets.append(fx.extract_experts(base, {"t1": models["t1"]}, backbone=models["t0"], budget="20%"))
    finally:
        torch.set_num_threads(threads)
    sets.append(fx.extract_experts(paths["base"], {"t1": paths["t1"]}, backbone=paths["t0"], budget="20%"))
    for i, experts in enumerate(sets):
        experts["t1"].save(tmp_path / f"expert{i}.safetensors")
    written = [(tmp_path / f"expert{i}.safetensors").read_bytes() for i in range(3)]
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize(("options", "passes"), [({"budget": "20%"}, 2), ({"rank": 2}, 1)])
def test_how_often_tensors_are_read(options: dict[str, object], passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = family(models=2)
    experts = fx.iter_experts(base, models, backbone=dict(base), **options)  # type: ignore[arg-type]
    reads = counted_reads(experts, monkeypatch)
    assert reads["a.weight"] == max(reads.values()) == 2 * passes * len(models)  # backbone and model


def low_rank_experts(
    kind: Callable[[], nn.Module], dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, dict[str, fx.Expert]]:
    """A backbone and the low-rank experts of eight tasks; those of every other task have float16 factors."""
    model, _, base = make(kind, dtype)
    merged = untied({name: tensor.float() for name, tensor in model.state_dict().items() if tensor.is_floating_point()})
    base = untied({name: tensor for name, tensor in base.items() if tensor.is_floating_point()})
    experts = {}
    for i, task in enumerate(TASKS):
        own = {name: value for name, value in untied(tuned(kind_of(kind), i + 1)).items() if name in base}
        options = {"rank": 2, "values": "svd16"} if i % 2 else {"budget": "50%"}
        experts |= fx.extract_experts(base, {task: own}, backbone=merged, **options)  # type: ignore[arg-type]
    return model, experts


def kind_of(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", [Text, Vision])
def test_active_adds_the_product_and_undoes_it(kind: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    model, experts = low_rank_experts(kind, dtype)
    bank = fx.ExpertBank(model, experts)
    before = snapshot(model)
    compute = torch.promote_types(dtype, torch.float32)
    for chosen in ({"task0": 1.0}, {"task1": 0.7}, {"task2": 0.3, "task3": 0.5, "task4": -0.2}):
        with bank.active(chosen):
            changed = 0
            for name, value in untied(model.state_dict()).items():
                if name in experts["task0"].statistics:
                    continue
                terms = [
                    experts[task].tensors[name].dense().to(compute) * weight
                    for task, weight in chosen.items()
                    if name in experts[task].tensors
                ]
                expected = (sum(terms[1:], terms[0]) + before[name].to(compute)).to(dtype) if terms else before[name]
                assert torch.equal(value, expected), name
                changed += bool(terms)
            assert changed > 2
        assert_same(model, before)


def test_mixtures_of_both_kinds_and_nested_blocks_leave_every_weight_as_it_was() -> None:
    model, entries, base = make(Text, torch.bfloat16)
    _, products = low_rank_experts(Text)
    bank = fx.ExpertBank(model, {"entries": entries["task0"], "product": products["task1"]}, base=untied(base))
    before = snapshot(model)

    def run() -> None:
        with bank.active({"entries": 0.5, "product": 0.5}):
            for name, tensor in products["task1"].tensors.items():
                expected = (tensor.dense() * 0.5 + before[name].float()).bfloat16()
                if name in entries["task0"].tensors:
                    last = entries["task0"].tensors[name].dense() * (0.5 * entries["task0"].mu)
                    expected = (last + expected.float()).bfloat16()
                assert torch.equal(model.get_parameter(name), expected), name
            with bank.active("product"), bank.active("entries", combine="replace"):
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert_same(model, before)
    with pytest.raises(ArgumentError, match="single entries; 'product'"), bank.active("product", combine="replace"):
        pass
    assert_same(model, before)


@pytest.mark.parametrize("kind", [Text, Vision])
def test_the_forward_pass_adds_what_active_does(kind: Callable[[], nn.Module]) -> None:
    model, experts = low_rank_experts(kind)
    model, entries, _ = make(kind)
    bank = fx.ExpertBank(model, {**experts, "entries": entries["task5"]})
    x = torch.randint(0, 50, (5, 12)) if kind is Text else torch.randn(5, 3, 8, 8)
    chosen = [{"task0": 1.0}, None, {"task1": 0.5, "task2": 0.5}, {"entries": 1.0, "task0": 0.3}, "task3"]
    assert bank.serves_deltas() is None
    assert_forward_adds_what_active_does(model, bank, x, chosen)


def test_pieces_of_a_fused_tensor_get_their_parts() -> None:
    like = torch.zeros(2, 6, 4)
    entries = {name: coded(CODINGS["svd16"], noise(3, 4, seed=i), 2) for i, name in enumerate("abcd")}
    parts = [
        Part(n, Piece((3, 4), n, 0, (4, 1), "w", 24 * (i // 2) + 12 * (i % 2), (4, 1))) for i, n in enumerate("abcd")
    ]
    gathered = gathered_dense(parts, entries, like, {})
    dense = [entry.dense() for entry in entries.values()]
    assert torch.equal(gathered, torch.stack([torch.cat(dense[:2]), torch.cat(dense[2:])]))


def test_bad_arguments_are_named() -> None:
    base, models = family()
    tiny = {"w": torch.zeros(3, 3)}
    for message, options in [
        (
            "backbone must be given for values svd2, which budget and rank choose: they hold what it lacks",
            {"budget": "1%"},
        ),
        ("budget or rank must be given", {"values": "svd2", "backbone": base}),
        ("budget or rank must be given", {"budget": "1%", "rank": 3, "backbone": base}),
        ("budget is not for values sign", {"budget": "1%", "values": "sign", "backbone": base}),
        ("rank is not for values sign; for these there are density, scope", {"rank": 3, "values": "sign"}),
        ("density is not for values svd2, which budget and", {"budget": "1%", "density": 0.01, "backbone": base}),
        ("scope is not for values svd2", {"budget": "1%", "scope": "row", "backbone": base}),
        ("trim is not for values svd2", {"rank": 1, "trim": 0.1, "backbone": base}),
        ("rescale is not for values svd16", {"values": "svd16", "rescale": "released", "rank": 1, "backbone": base}),
        *(
            (f"rank must be a whole number of at least 1, got {rank!r}", {"rank": rank, "backbone": base})
            for rank in (0, 2.5, "2", True)
        ),
        ("budget must be a share", {"budget": "300%", "backbone": base}),
    ]:
        with pytest.raises(ArgumentError, match=message):
            fx.iter_experts(base, models, **options)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="9 bytes are less than an expert file"):
        fx.iter_experts(tiny, {"t": tiny}, backbone=tiny, budget="50%")
    broken = {**base, "n.weight": torch.full((64,), torch.nan)}
    with pytest.raises(CheckpointError, match=r"n\.weight' is not finite"):
        fx.extract_experts(base, models, backbone=broken, budget="20%")
    with pytest.raises(CheckpointError, match=r"n\.weight' is not finite"):
        fx.extract_experts(base, {"t": broken}, backbone=base, budget="20%")
